"""Whether tensors hold numbers that training can go on with, or changed: a pass over them, and nothing copied."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

LARGEST = 1e19
"""A float32 whose square overflows (1.8e19) makes every norm infinite: such a weight is as lost as one that is NaN."""


@torch.no_grad()
def largest(tensors: Iterable[Tensor]) -> float:
    """The largest magnitude in all floating tensors, NaN if one holds it; of pieces, what lies on this process."""
    local = [value.to_local() if isinstance(value, DTensor) else value for value in tensors]
    held = [value.detach() for value in local if value.is_floating_point() and value.numel()]
    ends = [torch.stack(torch.aminmax(value)).abs().amax().float() for value in held]
    return float(torch.stack(ends).amax()) if ends else 0.0


def find_broken(tensors: Mapping[str, Tensor], limit: float = math.inf) -> str | None:
    """The name of the first floating tensor with an entry that is not finite, or not below ``limit`` in magnitude."""
    if largest(tensors.values()) < limit:
        return None
    return next(name for name, value in tensors.items() if not largest([value]) < limit)


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor]) -> list[float]:
    """Sum and norm of each floating tensor in float64, of what lies on this process: other values, other figures."""
    local = [value.to_local() if isinstance(value, DTensor) else value.detach() for value in tensors]
    held = [value for value in local if value.is_floating_point() and value.numel()]
    wide = torch.float64
    figures = [x for value in held for x in (value.sum(dtype=wide), torch.linalg.vector_norm(value, dtype=wide))]
    return torch.stack(figures).tolist() if figures else []
