"""Checkpoints: atomic folders of safetensors and JSON that hold everything a run needs to go on.

``checkpoints/000025/`` holds the trained weights, the optimizer, the teachers' copies, `state.json`, and the rollouts
if an update still has to use them. ``checkpoints/best/`` holds weights only. No pickle is written or read.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllm_sd.errors import InputError
from dllm_sd.policies.policy import Policy
from dllm_sd.policies.weights import Teacher, placed_like, trained
from dllm_sd.rollouts import Rollout, Rollouts
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.training.optim import load_state, state_tensors
from dllm_sd.training.sharding import fill, gather_tensors
from dllm_sd.training.zero import ZeroOptimizer, shape_of
from dllm_sd.trajectory import Trajectory


@dataclass
class State:
    """What a run knows besides tensors; all of it is in `state.json`."""

    update: int = 0
    """Finished updates."""
    skipped: int = 0
    """Updates that had nothing to learn from."""
    cursor: int = 0
    """Position in the stream of training problems."""
    too_long: int = 0
    """Problems left out for the length of their prompt."""
    best_update: int = 0
    best_accuracy: float = -1.0
    since_best: int = 0
    """Evaluations since the best one."""
    stopped: str | None = None
    """Why training ended before its last update."""
    before: dict[str, Any] = field(default_factory=dict)
    """Test reports of the initial weights, by decoding schedule."""
    seconds: float = 0.0
    """Time spent in updates."""
    bank: dict[str, Any] | None = None
    """The bank of skills, of runs that have one."""


WEIGHTS, OPTIMIZER, ROLLOUTS, STATE = "model.safetensors", "optimizer.safetensors", "rollouts.safetensors", "state.json"


def write_checkpoint(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write ``tensors`` (file name: named tensors) and ``state`` so that ``folder`` appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, values in tensors.items():
        save_file({key: value.detach().cpu().contiguous() for key, value in values.items()}, partial / name)
    (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    for file in partial.iterdir():
        _flush(file)
    if folder.exists():  # replacing `best`: the old one stays readable until the new one is complete
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    partial.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(folder.with_name(f".{folder.name}.old"), ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def latest_checkpoint(run: Path) -> Path | None:
    """The complete checkpoint of the most updates, or None."""
    return max((folder for folder in _numbered(run) if (folder / STATE).is_file()), key=_update, default=None)


def _numbered(run: Path) -> list[Path]:
    return [folder for folder in (run / "checkpoints").glob("*") if folder.name.isascii() and folder.name.isdigit()]


def _update(folder: Path) -> int:
    return int(folder.name)


def best_checkpoint(run: Path) -> Path | None:
    """The best weights of a run; an interrupted replacement falls back to the former ones."""
    for name in ("best", ".best.old"):
        if (run / "checkpoints" / name / STATE).is_file():
            return run / "checkpoints" / name
    return None


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the latest ``keep`` checkpoints and what interrupted writes left."""
    for path in sorted(_numbered(run), key=_update)[:-keep]:
        shutil.rmtree(path)
    for path in (run / "checkpoints").glob(".*.partial"):
        shutil.rmtree(path)


def read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of one file of a checkpoint.

    Raises:
        InputError: if the file is missing or damaged.
    """
    try:
        return load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise InputError(f"checkpoint {folder / name} is missing or damaged ({error}); remove {folder}") from error


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    try:
        return json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"checkpoint {folder / STATE} is missing or damaged ({error}); remove {folder}") from error


@torch.no_grad()
def load_weights(policy: Policy, folder: Path) -> None:
    """Put the trained weights of a checkpoint into a policy built from the same config."""
    saved, live = read_tensors(folder, WEIGHTS), trained(policy)
    if saved.keys() != live.keys():
        name = sorted(saved.keys() ^ live.keys())[0]
        raise InputError(f"checkpoint {folder} and the model differ in {name!r}; load it with the config of its run")
    for name, value in live.items():
        if shape_of(value) != saved[name].shape:
            raise InputError(f"checkpoint {folder} has another shape for {name!r}; load it with the config of its run")
        fill(value, saved[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer | ZeroOptimizer, policy: Policy) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: ``{parameter}/{entry}``."""
    if isinstance(optimizer, ZeroOptimizer):
        return optimizer.tensors(trained(policy))
    return state_tensors(optimizer, trained(policy))


def load_optimizer(
    optimizer: torch.optim.Optimizer | ZeroOptimizer, policy: Policy, saved: Mapping[str, Tensor]
) -> None:
    """Restore what `optimizer_tensors` gave, after the weights."""
    if isinstance(optimizer, ZeroOptimizer):
        optimizer.load(trained(policy), saved)
    else:
        load_state(optimizer, trained(policy), saved)


def rollout_tensors(rollouts: Rollouts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Kept rollouts as tensors and JSON."""
    tensors: dict[str, Tensor] = {}
    entries: list[dict[str, Any]] = []
    layout: dict[str, Any] = {}
    for i, rollout in enumerate(rollouts.kept):
        for name, value in vars(rollout.trajectory).items():
            if isinstance(value, Tensor):
                tensors[f"{i}/{name}"] = value
            else:
                layout[name] = value
        grade = rollout.grade
        entries.append(
            {
                "problem": {"id": rollout.problem.id, "fields": dict(rollout.problem.fields)},
                "attempt": rollout.attempt,
                "occurrence": rollout.occurrence,
                "text": rollout.text,
                "grade": {"correct": grade.correct, "score": grade.score, "parsed": grade.parsed},
                "teacher_prompts": rollout.teacher_prompts,
                "teacher_weights": rollout.teacher_weights,
                "notes": rollout.notes,
            }
        )
    return tensors, {"kept": entries, "layout": layout, "counts": dict(rollouts.counts)}


def load_rollouts(tensors: Mapping[str, Tensor], tree: Mapping[str, Any]) -> Rollouts:
    """Rebuild what `rollout_tensors` gave."""
    layout = {**tree["layout"]}
    if "end_ids" in layout:
        layout["end_ids"] = tuple(layout["end_ids"])
    names = ("prompt_ids", "prompt_mask", "tokens", "reveal_step", "length", "logp")
    kept = [
        Rollout(
            problem=Problem(**entry["problem"]),
            attempt=entry["attempt"],
            occurrence=entry.get("occurrence", 0),
            text=entry["text"],
            grade=Grade(**entry["grade"]),
            trajectory=Trajectory(
                **{name: tensors[f"{i}/{name}"] for name in names if f"{i}/{name}" in tensors},
                **{name: value for name, value in layout.items() if name not in names},
            ),
            teacher_prompts=tuple(None if prompt is None else tuple(prompt) for prompt in entry["teacher_prompts"]),
            teacher_weights=tuple(entry["teacher_weights"]),
            notes=tuple(entry["notes"]),
        )
        for i, entry in enumerate(tree["kept"])
    ]
    return Rollouts(tuple(kept), tree["counts"])


def save_best(run: Path, weights: Mapping[str, Tensor], state: State) -> None:
    """Keep these weights as the best ones."""
    write_checkpoint(run / "checkpoints" / "best", {WEIGHTS: weights}, vars(state))


def run_tensors(
    policy: Policy, optimizer: torch.optim.Optimizer | ZeroOptimizer, teachers: Sequence[Teacher]
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by file; under FSDP2 all processes must call it, and the first gets them whole."""
    tensors = {WEIGHTS: trained(policy), OPTIMIZER: optimizer_tensors(optimizer, policy)}
    tensors |= {f"teacher{i}.safetensors": teacher.moving for i, teacher in enumerate(teachers) if teacher.moving}
    return {name: gather_tensors(values) for name, values in tensors.items()}


def save_run(
    run: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: State, rollouts: Rollouts | None, keep: int
) -> None:
    """Save everything that the next update depends on; ``rollouts`` only if it still uses them."""
    files, tree = dict(tensors), {**vars(state)}
    if rollouts is not None:
        files[ROLLOUTS], tree["rollouts"] = rollout_tensors(rollouts)
    write_checkpoint(run / "checkpoints" / f"{state.update:06d}", files, tree)
    prune_checkpoints(run, keep)


def restore_run(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer | ZeroOptimizer, teachers: Sequence[Teacher]
) -> tuple[State, Rollouts | None]:
    """Put a checkpoint back into a freshly built run."""
    tree = read_state(folder)
    load_weights(policy, folder)
    load_optimizer(optimizer, policy, read_tensors(folder, OPTIMIZER))
    for i, teacher in enumerate(teachers):
        if teacher.moving:
            saved = read_tensors(folder, f"teacher{i}.safetensors")
            teacher.load({name: placed_like(saved[name], value) for name, value in teacher.moving.items()})
    kept = tree.pop("rollouts", None)
    rollouts = load_rollouts(read_tensors(folder, ROLLOUTS), kept) if kept else None
    if unknown := sorted(tree.keys() - State.__dataclass_fields__.keys()):
        raise InputError(f"checkpoint {folder} is of another version (it holds {unknown[0]!r}); use resume=fresh")
    return State(**tree), rollouts
