"""The subspace of SPD (arXiv 2605.22675) the slow way: one singular vector, one position, one token at a time."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.oracles.block_decoding import naive_block_mask


def singular_vectors(rows: Any, centre: bool = True) -> tuple[Any, Any]:
    """Singular values, and right singular vectors as rows, of a matrix of numpy."""
    wide = np.asarray(rows, dtype=np.float64)
    if centre:
        wide = wide - sum(wide) / len(wide)
    return np.linalg.svd(wide, full_matrices=False)[1:]


def rank_for_energy(singular: Sequence[float], energy: float) -> int:
    """One more than the number of leading groups of squares that hold less than ``energy``."""
    whole = sum(value**2 for value in singular)
    below = [n for n in range(1, len(singular) + 1) if sum(value**2 for value in singular[:n]) / whole < energy]
    return min(1 + len(below), len(singular))


def projector(rows: Any, rank: int | None = None, energy: float | None = None, centre: bool = True) -> Any:
    """A sum of outer products."""
    singular, vectors = singular_vectors(rows, centre)
    if energy is not None:
        rank = rank_for_energy(list(singular), energy)
    elif rank is None:
        rank = len(rows[0]) // 2
    return sum(np.outer(vector, vector) for vector in vectors[:rank])


def gradients(
    network: Any,
    part: nn.Module,
    ids: Sequence[int],
    answers: dict[int, int],
    *,
    block_length: int | None,
    shift: bool,
) -> Tensor:
    """The gradient at what ``part`` gives, one position after the other: each is moved by a number that starts at 0.

    Args:
        network: a bare model of transformers.
        part: a linear layer of it, or the adapted layer around one.
        ids: the text.
        answers: the right token by position.
        block_length: 1 for a causal model, None for one that sees everything.
        shift: whether the logits at a position speak about the next one.
    """
    seen = torch.tensor(naive_block_mask(len(ids), block_length or len(ids)))
    added = torch.zeros(seen.shape, dtype=network.dtype).masked_fill(~seen, -torch.inf)
    rows = []
    for position in range(len(ids)):
        moved: list[Tensor] = []

        def move(_: nn.Module, __: Any, output: Tensor, at: int = position, moved: list[Tensor] = moved) -> Tensor:
            moved.append(torch.zeros(output.shape[-1], dtype=output.dtype, requires_grad=True))
            before, after = output[:, :at], output[:, at + 1 :]
            return torch.cat([before, output[:, at : at + 1] + moved[0], after], 1)

        with part.register_forward_hook(move), torch.enable_grad():
            logits = network(
                input_ids=torch.tensor([list(ids)]),
                attention_mask=added[None, None],
                position_ids=torch.arange(len(ids))[None],
                use_cache=False,
            ).logits[0]
            losses = []
            for at, token in answers.items():
                row = logits[at - 1 if shift else at]
                losses.append(row.exp().sum().log() - row[token])
            loss = torch.stack(losses).mean()
        rows.append(torch.autograd.grad(loss, moved)[0])
    return torch.stack(rows)


@contextmanager
def multiplied(parts: Sequence[tuple[nn.Module, Tensor | None]]) -> Iterator[None]:
    """What each part gives is multiplied by its matrix, in the way of the authors' hooks; None leaves it."""
    with ExitStack() as hooks:
        for part, matrix in parts:
            if matrix is not None:
                hooks.enter_context(part.register_forward_hook(lambda _, __, output, by=matrix: output @ by))
        yield


def outputs(network: Any, parts: Sequence[nn.Module], ids: Tensor) -> Tensor:
    """Logits for ids ``[s]``, behind them what each part gives: no norm in float32 has rounded that. All in one row."""
    seen: list[Tensor] = []
    with ExitStack() as hooks, torch.no_grad():
        for part in parts:
            hooks.enter_context(part.register_forward_hook(lambda _, __, output: seen.append(output.flatten())))
        return torch.cat([network(ids[None]).logits.flatten(), *seen])
