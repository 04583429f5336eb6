"""Whether weights are the same, bit for bit."""

from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import Tensor

ENTRIES = 2**22
"""Entries that are summed together."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def weight_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of some tensors: another one if a bit, a name or a shape is another, on whatever device they are.

    Of the bits, read as integers, two sums modulo 2^64 are taken on the device: the plain one, and one with weights
    that grow with the place. Unlike sums of floats they do not depend on an order.
    """
    whole = sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        bits = tensor.contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])
        sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
        for start in range(0, len(bits), ENTRIES):
            part = bits[start : start + ENTRIES].long()
            places = torch.arange(start + 1, start + 1 + len(part), device=bits.device)
            sums += torch.stack([part.sum(), (part * places).sum()])
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {sums.tolist()}\n".encode())
    return whole.hexdigest()[:16]
