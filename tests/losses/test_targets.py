import pytest
import torch

from dllm_sd.errors import InputError
from dllm_sd.losses import TARGETS, Each, Plain, Sampled


def teachers(c: int) -> torch.Tensor:
    return torch.randn(c, 4, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)


def test_the_table_names_every_target():
    assert {"plain": Plain, "each": Each, "sampled": Sampled} == TARGETS


def test_plain_is_the_one_teacher():
    assert torch.equal(Plain()(teachers(1)), teachers(1))


@pytest.mark.parametrize("c", [0, 2, 3])
def test_plain_refuses_any_other_number_of_teachers(c):
    with pytest.raises(InputError, match=rf"exactly one teacher context and got {c}"):
        Plain()(teachers(c))


@pytest.mark.parametrize("c", [1, 3])
def test_each_keeps_the_teachers_apart(c):
    assert torch.equal(Each()(teachers(c)), teachers(c))


def test_each_refuses_no_teacher():
    with pytest.raises(InputError, match="at least one teacher context"):
        Each()(teachers(0))


@pytest.mark.parametrize("c", [0, 1, 2])
def test_sampled_hands_on_whatever_is_there(c):
    assert torch.equal(Sampled()(teachers(c)), teachers(c))
