"""A completion as JSON, between a server that decodes and a client that trusts nothing, and in files; exact."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dllm_sd.files.typed_json import build
from dllm_sd.trajectory import NEVER, NO_MASK, Trajectory, completion_length, left_pad

LATEST_STEP = 2**22
"""No decoding has as many steps: `decode.steps` is at most 2^20, and a canvas has at most one block more."""
LOWEST = torch.finfo(torch.float32).min
ROUNDING = 1e-3
"""How far above 0 rounding may lift a log-probability."""


@dataclass(frozen=True)
class _Row:
    """One completion as it is written; its prompt is not padded."""

    prompt_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    reveal_step: tuple[int, ...]
    length: int
    logp: tuple[float | None, ...] | None
    """None stands for NaN. A float32 is written as the float64 of its value, so that it comes back exactly."""
    block_length: int
    mask_id: int
    end_ids: tuple[int, ...]
    pad_id: int
    blocks_of_prompt: bool
    causal: bool

    partial = True  # a server may say more, such as whose weights decoded


def trajectory_to_json(trajectory: Trajectory) -> dict[str, Any]:
    """Return a trajectory of one completion as JSON.

    Raises:
        ValueError: if a log-probability is infinite, which JSON cannot say.
    """
    if trajectory.size != 1:
        raise ValueError(f"one completion is written at a time, not {trajectory.size}")
    rows = {name: value[0].tolist() for name, value in trajectory.tensors().items() if name != "prompt_mask"}
    logp: list[float] | None = rows.get("logp")
    if logp is not None and any(map(math.isinf, logp)):
        raise ValueError("a log-probability is infinite; the weights or the temperature are beyond all use")
    return {
        "prompt_ids": trajectory.prompt_ids[0][trajectory.prompt_mask[0]].tolist(),
        **{name: rows[name] for name in ("tokens", "reveal_step", "length")},
        "logp": None if logp is None else [None if math.isnan(value) else value for value in logp],
        **{name: getattr(trajectory, name) for name in ("block_length", "mask_id", "pad_id")},
        "end_ids": list(trajectory.end_ids),
        **{name: getattr(trajectory, name) for name in ("blocks_of_prompt", "causal")},
    }


def generate_body(
    prompt: Sequence[int],
    key: int,
    settings: Mapping[str, Any],
    stop_after: Mapping[str, Any] | None,
    model: str | None,
) -> dict[str, Any]:
    """Return the body of ``POST /generate``, whose answer is a trajectory.

    Args:
        prompt: token ids.
        key: seeds the random numbers of the completion.
        settings: the keys of `decode` that decide what is decoded.
        stop_after: ``unit`` and ``count`` of how far it is decoded; None for its end.
        model: name of the weights; None for those that the server was started with.
    """
    return {"prompt_ids": list(prompt), "key": key, "settings": settings, "stop_after": stop_after, "model": model}


def trajectory_from_json(tree: Any, prompt: Sequence[int], length: int, vocabulary: int | None = None) -> Trajectory:
    """Return the trajectory of one completion that `trajectory_to_json` wrote, after checking that it is one.

    Args:
        tree: parsed JSON.
        prompt: the tokens that were sent.
        length: ``l``, the completion positions that were asked for.
        vocabulary: ``v``; no id may reach it. None if it is unknown.

    Raises:
        ValueError: saying in a few words what is wrong.
    """
    row: _Row = build(_Row, tree, "the answer")
    if list(row.prompt_ids) != list(prompt):
        raise ValueError(f"the prompt came back changed, as {len(row.prompt_ids)} tokens where {len(prompt)} were sent")
    lists = {"tokens": row.tokens, "reveal_step": row.reveal_step, **({} if row.logp is None else {"logp": row.logp})}
    for name, values in lists.items():
        if len(values) != length:
            raise ValueError(f"{name} lists {len(values)} positions where {length} were asked for")
    _check_ids(row, vocabulary)
    _check_positions(row)
    tokens, reveal_step = torch.tensor([row.tokens]), torch.tensor([row.reveal_step])
    ended = int(completion_length(tokens, row.end_ids, reveal_step != NEVER))
    if row.length != ended:
        raise ValueError(f"length is {row.length}, but the tokens say {ended}")
    prompt_ids, prompt_mask = left_pad([prompt], row.pad_id)
    trajectory = Trajectory(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        tokens=tokens,
        reveal_step=reveal_step,
        length=torch.tensor([ended]),
        block_length=row.block_length,
        mask_id=row.mask_id,
        end_ids=row.end_ids,
        pad_id=row.pad_id,
        blocks_of_prompt=row.blocks_of_prompt,
        causal=row.causal,
        logp=None if row.logp is None else _float32(row.logp),
    )
    _check_order(trajectory)
    return trajectory


def _float32(values: Sequence[float | None]) -> Tensor:
    """Return numbers as float32 ``[1 l]``, NaN where there is none."""
    return torch.tensor([[math.nan if value is None else value for value in values]], dtype=torch.float32)


def _check_ids(row: _Row, vocabulary: int | None) -> None:
    """Refuse ids that are not tokens, and an end, pad or mask token that no model has."""
    ids = {"tokens": row.tokens, "end_ids": row.end_ids, "pad_id": (row.pad_id,)}
    if row.causal and row.mask_id != NO_MASK:
        raise ValueError(f"mask_id is {row.mask_id}, but an autoregressive model has none ({NO_MASK})")
    if not row.causal:
        ids["mask_id"] = (row.mask_id,)
    for name, values in ids.items():
        if wrong := [token for token in values if token < 0 or (vocabulary is not None and token >= vocabulary)]:
            known = "" if vocabulary is None else f" of a vocabulary of {vocabulary}"
            raise ValueError(f"{name} holds {wrong[0]}, which is not a token{known}")
    if not row.end_ids:
        raise ValueError("end_ids is empty")


def _check_positions(row: _Row) -> None:
    """Refuse a position whose token, step and log-probability do not belong together."""
    logp: Sequence[float | None] = row.logp or [-1.0 if step != NEVER else None for step in row.reveal_step]
    for place, (token, step, value) in enumerate(zip(row.tokens, row.reveal_step, logp, strict=True)):
        if not NEVER <= step < LATEST_STEP:
            raise ValueError(f"reveal_step[{place}] is {step}, which is not a step")
        if step == NEVER and (token != row.pad_id or value is not None):
            raise ValueError(f"position {place} was never revealed, but holds a token or a log-probability")
        if step != NEVER and not row.causal and token == row.mask_id:
            raise ValueError(f"position {place} was revealed, but holds the mask token")
        if step != NEVER and (value is None or not LOWEST <= value <= ROUNDING):
            raise ValueError(f"logp[{place}] is {value}, which is not a log-probability in float32")


def _check_order(trajectory: Trajectory) -> None:
    """Refuse steps in an order in which no decoder reveals: blocks, and tokens if causal, go from left to right."""
    size, steps = trajectory.tokens.shape[1], trajectory.reveal_step[0].tolist()
    if trajectory.causal and (trajectory.block_length != 1 or trajectory.blocks_of_prompt):
        raise ValueError("an autoregressive model has blocks of one token")
    if not 1 <= trajectory.block_length <= size or size % trajectory.block_length:
        raise ValueError(f"block_length is {trajectory.block_length}, which does not divide {size} positions")
    if trajectory.causal:
        written = sum(step != NEVER for step in steps)
        if steps != [*range(written), *[NEVER] * (size - written)]:
            raise ValueError("reveal_step is not that of an autoregressive model, one token after the other")
        if written > int(trajectory.length):
            raise ValueError("an autoregressive model wrote on behind its end token")
    blocks: dict[int, list[float]] = {}
    for block, step in zip(trajectory.block[0].tolist(), steps, strict=True):
        blocks.setdefault(block, []).append(math.inf if step == NEVER else step)
    for earlier, later in pairwise(blocks.values()):
        if max(earlier) >= min(later) < math.inf:
            raise ValueError("reveal_step reveals a block before the one to its left was whole")
