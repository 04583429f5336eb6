"""Keyed randomness: every random number is a pure function of a key that says what the number is used for.

A key is a 63-bit integer made from (seed, update, problem, attempt, purpose). Numbers are drawn by hashing
(key, counter). They do not depend on rank, batch position, device or the number of earlier draws, so that a run that is
resumed, re-sharded or re-batched is the same run.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def make_key(*parts: int | str) -> int:
    """Hash ``parts`` (any integers and strings, in order) to a key in ``[0, 2**63)``."""
    text = "\x1f".join([f"int:{part}" if type(part) is int else _escaped(part) for part in parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _escaped(part: int | str) -> str:
    word = str(part).replace("\\", "\\\\").replace("\x1f", "\\x1f")
    return f"{type(part).__name__}:{word}"


def key_tensor(keys: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Keys as int64 ``[n]``."""
    return torch.tensor(keys, dtype=torch.int64, device=device)


def fold(keys: Tensor, counter: Tensor | int) -> Tensor:
    """Derive new keys from ``keys`` and an integer ``counter``; shapes broadcast (int64 in, int64 out)."""
    return _mix(keys ^ _mix(torch.as_tensor(counter, dtype=torch.int64, device=keys.device)))


def uniform(keys: Tensor, size: int) -> Tensor:
    """Uniform numbers strictly between 0 and 1, float32 ``[*keys.shape, size]``; entry i hashes (key, i)."""
    return uniform_at(keys[..., None], torch.arange(size, dtype=torch.int64, device=keys.device))


def uniform_at(keys: Tensor, counters: Tensor) -> Tensor:
    """The uniform numbers that hash (key, counter), float32; shapes broadcast."""
    bits = _shift_right(fold(keys, counters), 41)  # 23 bits: k + 1/2 is exact in float32
    return (bits.to(torch.float32) + 0.5) * 2.0**-23


def random_order(key: int, size: int) -> Tensor:
    """A uniformly random order of ``range(size)``, a function of ``key`` alone, int64 ``[size]``."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(key))


def permutation(key: int, size: int) -> list[int]:
    """`random_order` as a list, for short orders."""
    return random_order(key, size).tolist()


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finaliser (Steele, Lea, Flood, OOPSLA 2014) in wrapping int64 arithmetic."""
    x = x + -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift_right(x, 31)
