"""Hashes of weights: any other bit, place, name, shape or type is another hash."""

import pytest
import torch
from torch import Tensor

from dllm_sd.policies import weight_hash as module
from dllm_sd.policies.weight_hash import weight_hash

BASE = {"a": torch.arange(12.0).view(3, 4), "b": torch.tensor(2.0)}


@pytest.mark.parametrize(
    "other",
    [
        BASE["a"] + torch.eye(3, 4) * 1e-6,
        BASE["a"].flip(0),
        BASE["a"].view(4, 3),
        BASE["a"].double(),
        BASE["a"] * torch.tensor([[-1.0], [1.0], [1.0]]),
    ],
)
def test_other_weights_have_another_hash(other: Tensor):
    assert weight_hash({**BASE, "a": other}) != weight_hash(BASE)


def test_equal_weights_have_an_equal_hash_however_they_lie_in_memory(monkeypatch: pytest.MonkeyPatch):
    whole = weight_hash(BASE)
    assert weight_hash({"b": BASE["b"].clone(), "a": BASE["a"].t().contiguous().t()}) == whole
    assert weight_hash({"c": BASE["a"], "b": BASE["b"]}) != whole
    monkeypatch.setattr(module, "ENTRIES", 5)
    assert weight_hash(BASE) == whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool])
def test_weights_of_every_type_are_read(dtype: torch.dtype):
    one, other = torch.zeros(7, dtype=dtype), torch.zeros(7, dtype=dtype)
    other[3] = 1
    assert weight_hash({"a": one}) != weight_hash({"a": other})
