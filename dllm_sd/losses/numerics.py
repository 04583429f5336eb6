"""Numeric helpers of the losses: dtypes of enough precision, and log-probabilities without infinities."""

import torch
from torch import Tensor

#: A probability of zero counts as ``exp(LOG_ZERO)``: still exactly 0.0 as a number, but its logarithm is finite.
LOG_ZERO = -1e4


def at_least_float32(x: Tensor) -> Tensor:
    """Widen ``[...]`` to float32 where its dtype is lower or an integer; float64 stays float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def floor_logp(logp: Tensor) -> Tensor:
    """Log-probabilities ``[...]`` in float32 or float64 with -inf replaced by ``LOG_ZERO``, where the gradient is 0.

    Products such as ``0 * log 0`` and differences such as ``log 0 - log 0`` are then 0 instead of NaN.
    A NaN in the input stays a NaN.
    """
    return at_least_float32(logp).clamp(min=LOG_ZERO)
