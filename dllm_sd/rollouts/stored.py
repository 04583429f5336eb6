"""Rollouts as tensors and JSON in a checkpoint: all fields of all dataclasses, for updates that still need them."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from dllm_sd.files.typed_json import build
from dllm_sd.rollouts.rollout import Batch, Rollout, Rollouts, UnfinishedBatch
from dllm_sd.rollouts.rules import COUNTS
from dllm_sd.trajectory import NEVER, Trajectory
from dllm_sd.trajectory_json import LATEST_STEP

INT_TENSORS = {"prompt_ids": "p", "tokens": "l", "reveal_step": "l", "length": ""}
"""The int64 tensors of a trajectory, and the axis of each after the batch axis of size 1."""


def rollout_tensors(rollouts: Rollouts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Rollouts as tensors, ``{place of the trajectory}/{field}``, and JSON.

    A rollout that is both kept and chosen is stored once, and so is a trajectory that several rollouts share.
    """
    by_id = {id(rollout): rollout for rollout in (*rollouts.chosen, *rollouts.kept)}
    trajectories = {id(rollout.trajectory): rollout.trajectory for rollout in by_id.values()}
    places, shared = ({key: place for place, key in enumerate(table)} for table in (by_id, trajectories))
    tensors = {
        f"{shared[key]}/{name}": value
        for key, trajectory in trajectories.items()
        for name, value in trajectory.tensors().items()
    }
    layouts = [
        {name: value for name, value in vars(trajectory).items() if not isinstance(value, Tensor)}
        for trajectory in trajectories.values()
    ]
    entries = [{**_tree(rollout), "trajectory": shared[id(rollout.trajectory)]} for rollout in by_id.values()]
    lists = {name: [places[id(rollout)] for rollout in getattr(rollouts, name)] for name in ("kept", "chosen")}
    return tensors, {**_tree(rollouts), **lists, "rollouts": entries, "trajectories": layouts}


def _tree(value: Any) -> Any:
    """A dataclass and the dataclasses in its fields as JSON; tuples of them and trajectories have places instead."""
    if not is_dataclass(value):
        return (
            dict(value) if isinstance(value, Mapping) else [*map(_tree, value)] if isinstance(value, tuple) else value
        )
    names = [field.name for field in fields(value) if field.name not in ("trajectory", "kept", "chosen")]
    return {name: _tree(getattr(value, name)) for name in names}


def batch_tensors(batch: Batch | UnfinishedBatch) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A batch that runs ahead of learning as tensors and JSON; of an unfinished one the weights that decode it."""
    if isinstance(batch, UnfinishedBatch):
        numbers = {"number": batch.number, "version": batch.version, "cursor": batch.cursor}
        return dict(batch.weights), {"unfinished": numbers}
    attempts = tuple(rollout for group in batch.attempts for rollout in group)
    tensors, tree = rollout_tensors(Rollouts(attempts, dict.fromkeys(COUNTS, 0.0)))
    numbers = {name: value for name, value in vars(batch).items() if name != "attempts"}
    return tensors, {**numbers, "metrics": dict(batch.metrics), "sizes": [*map(len, batch.attempts)], "rollouts": tree}


def load_batch(tensors: Mapping[str, Tensor], tree: Mapping[str, Any]) -> Batch | UnfinishedBatch:
    """Rebuild a batch from what `batch_tensors` returned; the weights of an unfinished one are not checked.

    Raises:
        TensorError: saying which tensor is wrong.
        ValueError: saying which value of the JSON is wrong.
    """
    if "unfinished" in tree:
        numbers = build(dict[str, int], tree["unfinished"], "unfinished")
        batch: Batch | UnfinishedBatch = build(UnfinishedBatch, {**numbers, "weights": tensors}, "unfinished")
    else:
        values = dict(tree)
        attempts = load_rollouts(tensors, build(dict[str, Any], values.pop("rollouts", None), "rollouts")).kept
        sizes = build(tuple[int, ...], values.pop("sizes", None), "sizes")
        if min(sizes, default=0) < 1 or sum(sizes) != len(attempts):
            raise ValueError(f"sizes must be those of the groups of {len(attempts)} attempts")
        ends = [*accumulate(sizes, initial=0)]
        batch = build(Batch, {**values, "attempts": [attempts[a:b] for a, b in pairwise(ends)]}, "batch")
    if min(batch.number, batch.version, batch.cursor) < 0 or batch.number < 1:
        raise ValueError("number, version and cursor of a batch cannot be below those of the second batch")
    return batch


class TensorError(ValueError):
    """The tensors of stored rollouts are wrong, not their JSON."""


def load_rollouts(tensors: Mapping[str, Tensor], tree: Mapping[str, Any]) -> Rollouts:
    """Rebuild rollouts from what `rollout_tensors` returned.

    Raises:
        TensorError: saying which tensor is wrong.
        ValueError: saying which value of the JSON is wrong.
    """
    tree = _current(tree)
    layouts = build(tuple[dict[str, Any], ...], tree.get("trajectories"), "trajectories")
    entries = build(tuple[dict[str, Any], ...], tree.get("rollouts"), "rollouts")
    trajectories = _trajectories(tensors, layouts)
    stored: list[Rollout] = [
        build(Rollout, {**entry, "trajectory": _at(trajectories, entry.get("trajectory"))}, f"rollouts[{place}]")
        for place, entry in enumerate(entries)
    ]
    plain = {field.name: tree[field.name] for field in fields(Rollouts) if field.name in tree}
    lists = {
        name: [_at(stored, place) for place in build(tuple[int, ...], tree.get(name), name)]
        for name in ("kept", "chosen")
    }
    rollouts: Rollouts = build(Rollouts, {**plain, **lists}, "rollouts")
    if lacking := [name for name in COUNTS if name not in rollouts.counts]:
        raise ValueError(f"counts lacks {lacking[0]!r}")
    return rollouts


def _trajectories(tensors: Mapping[str, Tensor], layouts: Sequence[Mapping[str, Any]]) -> list[Trajectory]:
    tensors_of: list[dict[str, Tensor]] = [{} for _ in layouts]
    for key, value in tensors.items():
        place, _, name = key.partition("/")
        if not (place.isascii() and place.isdigit() and int(place) < len(layouts)):
            raise TensorError(f"{key!r:.60} belongs to no trajectory")
        tensors_of[int(place)][name] = value
    return [
        _trajectory({**layout, **columns}, place)
        for place, (layout, columns) in enumerate(zip(layouts, tensors_of, strict=True))
    ]


def _at(items: Sequence[Any], place: Any) -> Any:
    if type(place) is not int or not 0 <= place < len(items):
        raise ValueError(f"{place!r:.60} is not an index of a list of {len(items)}")
    return items[place]


def _trajectory(values: Mapping[str, Any], place: int) -> Trajectory:
    if lacking := [name for name in (*INT_TENSORS, "prompt_mask") if not isinstance(values.get(name), Tensor)]:
        raise TensorError(f"trajectory {place} has no {lacking[0]}")
    trajectory: Trajectory = build(Trajectory, values, f"trajectories[{place}]")
    sizes = {"p": trajectory.prompt_mask.shape[-1:], "l": trajectory.tokens.shape[-1:], "": torch.Size()}
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        name: (torch.int64, (1, *sizes[axis])) for name, axis in INT_TENSORS.items()
    }
    kinds["prompt_mask"] = (torch.bool, tuple(trajectory.prompt_ids.shape))
    if trajectory.logp is not None and trajectory.logp.is_floating_point():
        kinds["logp"] = (trajectory.logp.dtype, tuple(trajectory.tokens.shape))
    for name, value in trajectory.tensors().items():
        if kinds.get(name) != (value.dtype, tuple(value.shape)):
            raise TensorError(f"{name} of trajectory {place} is of the wrong type or shape")
    length, reveal_step = trajectory.tokens.shape[1], trajectory.reveal_step
    if not (
        1 <= int(trajectory.length) <= length and bool(((reveal_step >= NEVER) & (reveal_step < LATEST_STEP)).all())
    ):
        raise TensorError(f"trajectory {place} has a length or steps out of range")
    return trajectory


def _current(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """The JSON of today, from that of this or a former version.

    The oldest hold the kept ones only, with one layout for all; later ones have three lists in the place of `briefs`.
    """
    if "layout" not in tree:
        entries = build(tuple[dict[str, Any], ...], tree.get("rollouts"), "rollouts")
        return {**tree, "rollouts": [*map(_with_briefs, entries)]}
    entries = build(tuple[dict[str, Any], ...], tree.get("kept"), "kept")
    places = list(range(len(entries)))
    defaults = {field.name: field.default for field in fields(Rollout) if field.default is not MISSING}
    return {
        "rollouts": [{**defaults, **_with_briefs(entry), "trajectory": place} for place, entry in enumerate(entries)],
        "trajectories": [build(dict[str, Any], tree["layout"], "layout")] * len(entries),
        "counts": tree.get("counts"),
        "kept": places,
        "chosen": places,
    }


def _with_briefs(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A rollout's entry whose lists of prompts, weights and texts became one of `TeacherBrief`."""
    former = ("teacher_prompts", "teacher_weights", "notes")
    if not any(name in entry for name in former):
        return dict(entry)
    prompts, weights, texts = (build(tuple[Any, ...], entry.get(name, []), name) for name in former)
    size = max(len(prompts), len(weights), len(texts))
    columns = zip(prompts or [None] * size, weights or [1.0] * size, texts or [None] * size, strict=False)
    briefs = [dict(zip(("prompt", "weight", "text"), values, strict=True)) for values in columns]
    return {**{name: value for name, value in entry.items() if name not in former}, "briefs": briefs}
