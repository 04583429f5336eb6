"""Check whether tensors are finite or have changed, in one pass and without a copy."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

MAX_WEIGHT = 1e19
"""A float32 whose square overflows (above 1.8e19) makes every norm infinite, so such a weight counts as broken."""


@torch.no_grad()
def largest(tensors: Iterable[Tensor]) -> float:
    """Return the largest magnitude in all floating tensors, NaN if any is NaN; of sharded tensors the local shard."""
    local = [value.to_local() if isinstance(value, DTensor) else value for value in tensors]
    held = [value.detach() for value in local if value.is_floating_point() and value.numel()]
    ends = [torch.stack(torch.aminmax(value)).abs().amax().float() for value in held]
    return float(torch.stack(ends).amax()) if ends else 0.0


def find_broken(tensors: Mapping[str, Tensor], limit: float = math.inf) -> str | None:
    """Return the name of the first floating tensor with an entry that is not finite or not below ``limit``."""
    if largest(tensors.values()) < limit:
        return None
    return next(name for name, value in tensors.items() if not largest([value]) < limit)


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor]) -> list[float]:
    """Return sum and norm of each floating tensor (its local shard) in float64, to detect changed values."""
    local = [value.to_local() if isinstance(value, DTensor) else value.detach() for value in tensors]
    held = [value for value in local if value.is_floating_point() and value.numel()]
    wide = torch.float64
    figures = [x for value in held for x in (value.sum(dtype=wide), torch.linalg.vector_norm(value, dtype=wide))]
    return torch.stack(figures).tolist() if figures else []
