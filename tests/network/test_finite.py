"""Whether tensors are fit to go on with, whatever their type, shape and place."""

import math

import pytest
import torch

from dllm_sd.network.finite import MAX_WEIGHT, find_broken, largest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_found_wherever_it_stands(dtype: torch.dtype, bad: float):
    tensors = {"first": torch.ones(3, 5, dtype=dtype), "second": torch.zeros(7), "third": torch.tensor(2.0)}
    assert find_broken(tensors) is None
    for name, value in tensors.items():
        for place in range(value.numel()):
            broken = value.clone()
            broken.view(-1)[place] = bad
            assert find_broken({**tensors, name: broken}) == name


def test_the_largest_magnitude_counts_floats_only_and_nothing_of_nothing():
    assert largest([]) == largest([torch.zeros(0)]) == 0
    assert largest([torch.tensor([3, 9]), torch.tensor([True]), torch.tensor([1.5, -2.5])]) == 2.5
    assert largest([torch.tensor(-7.0, dtype=torch.float64), torch.ones(2, dtype=torch.float16)]) == 7
    assert math.isnan(largest([torch.tensor([math.nan]), torch.tensor([math.inf])]))


def test_a_weight_whose_square_overflows_is_beyond_the_limit_and_no_sooner():
    edge = torch.tensor([1.01 * MAX_WEIGHT])
    assert find_broken({"w": edge}, MAX_WEIGHT) == "w"
    assert find_broken({"w": edge}) is None
    assert find_broken({"w": edge * 0.98}, MAX_WEIGHT) is None
    assert torch.isinf((2 * edge).square()).all()
