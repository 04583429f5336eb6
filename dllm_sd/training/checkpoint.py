"""Checkpoints: folders of safetensors and JSON, written atomically, that hold everything a run needs to resume.

``checkpoints/000025/`` holds the trained weights, the optimizer, the teachers' copies, `state.json`, and the rollouts
if a later update still uses them. ``checkpoints/best/`` holds weights only. No pickle is written or read.
"""

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dllm_sd.errors import InputError, on_one_line
from dllm_sd.files.checkpoint_files import (
    CHECKPOINT_WEIGHTS,
    CHECKPOINTS,
    FILES,
    FORMAT,
    STATE,
    checksum,
    damaged_checkpoint,
    load_tensors,
    numbered_checkpoints,
    read_state,
    read_tensors,
    remedy,
    state_text,
    verify,
)
from dllm_sd.files.typed_json import all_finite, build
from dllm_sd.files.writing import remove, write_file
from dllm_sd.network.finite import find_broken
from dllm_sd.parallel.sharding import fill, gather_tensors
from dllm_sd.parallel.zero import ZeroOptimizer, shape_of
from dllm_sd.policies.policy import Policy
from dllm_sd.policies.weights import TeacherModel, placed_like, trained
from dllm_sd.rollouts.rollout import Batch, Rollouts, UnfinishedBatch
from dllm_sd.rollouts.stored import TensorError, batch_tensors, load_batch, load_rollouts, rollout_tensors
from dllm_sd.training.optim import load_state, state_shapes, state_tensors
from dllm_sd.training.state import State

OPTIMIZER, ROLLOUTS, AHEAD = "optimizer.safetensors", "rollouts.safetensors", "ahead.safetensors"
LOG_SUMS = "logs"
"""Key of `state.json`: checksums of the logs as they were when it was saved (`log_files.log_sums`)."""
BESIDE_STATE = (FILES, FORMAT, LOG_SUMS, "rollouts", "ahead")
"""Keys of `state.json` that are not those of `State`."""
T = TypeVar("T")
ADDED = ("best_loss", "loss_sum", "losses", "unevaluated")
"""Keys that checkpoints of earlier versions do not have."""


def write_checkpoint(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write ``tensors`` (file name: named tensors) and ``state`` so that ``folder`` appears whole or not at all.

    Files at the names that it writes to are removed first; a symbolic link there is not followed.
    """
    folder.parent.mkdir(exist_ok=True)  # without parents: a run folder that was removed is not made again
    partial, old = (folder.with_name(f".{folder.name}.{end}") for end in ("partial", "old"))
    remove(partial)
    partial.mkdir()
    for name, values in tensors.items():
        _write_tensors(partial / name, values)
        _flush(partial / name)
    write_file(partial / STATE, state_text(state, {name: checksum(partial / name) for name in tensors}))
    _flush(partial)
    if folder.exists() or folder.is_symlink():  # `best` is replaced: the old one stays readable until the new one is
        remove(old)
        folder.rename(old)
    partial.rename(folder)
    _flush(folder.parent)
    remove(old)


def _write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file; a full disk raises `OSError`, as for any other file."""
    try:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, file)
    except SafetensorError as error:
        raise OSError(errno.EIO, on_one_line(error), str(file)) from error


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def latest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the most updates, or None.

    Raises:
        InputError: if it is a symbolic link.
    """
    checkpoints = numbered_checkpoints(run)
    return _not_a_link(checkpoints[-1]) if checkpoints else None


def best_checkpoint(run: Path) -> Path | None:
    """The best weights of a run; if their replacement was interrupted, the former ones.

    Raises:
        InputError: if they are a symbolic link.
    """
    for name in ("best", ".best.old"):
        if (run / CHECKPOINTS / name / STATE).is_file():
            return _not_a_link(run / CHECKPOINTS / name)
    return None


def chosen_checkpoint(run: Path, last: bool = False) -> Path:
    """The best weights of a run, or the last ones; the last ones also if no best ones were chosen.

    Raises:
        InputError: if the run has no checkpoint, or ``last`` is asked for and it has the best weights only.
    """
    best, latest = best_checkpoint(run), latest_checkpoint(run)
    if best is None and latest is None:
        raise InputError(f"run {str(run)!r} has no checkpoint yet; train it further")
    chosen = latest if last else best or latest
    if chosen is None:
        raise InputError(f"run {str(run)!r} has no last weights; export --weights best")
    return chosen


def _not_a_link(folder: Path) -> Path:
    if folder.is_symlink():
        raise InputError(f"checkpoint {folder} is a symbolic link, which is not followed; {remedy(folder)}")
    return folder


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the latest ``keep`` checkpoints and what interrupted writes left."""
    for pattern in (".*.partial", ".[0-9]*.old"):
        for path in (run / CHECKPOINTS).glob(pattern):
            remove(path)
    for path in numbered_checkpoints(run)[:-keep]:
        remove(path.rename(path.with_name(f".{path.name}.partial")))  # hidden while it is removed


def state_of(folder: Path) -> State:
    """Read the `State` of a checkpoint.

    Raises:
        InputError: if `state.json` is missing or damaged, with the remedy.
    """
    return _build_state(read_state(folder), folder)


def _build_state(tree: Mapping[str, Any], folder: Path) -> State:
    try:
        stored = {name: value for name, value in tree.items() if name not in BESIDE_STATE}
        values = {entry.name: entry.default for entry in fields(State) if entry.name in ADDED} | stored
        state: State = build(State, values)
        if not all_finite(values):
            raise ValueError("it holds a number that is not finite")
        for entry in fields(State):
            least, value = entry.default, getattr(state, entry.name)
            if isinstance(least, int | float) and value < least:
                raise ValueError(f"{entry.name} must be {least} or more, not {value}")
        if folder.parent.name == CHECKPOINTS and folder.name.isdigit() and state.update != int(folder.name):
            raise ValueError(f"update must be {int(folder.name)}, as the folder says, not {state.update}")
        if max(state.skipped, state.best_update) > state.update:
            raise ValueError(f"skipped and best_update cannot be above the {state.update} updates")
        if state.unevaluated is not None and state.unevaluated.get("update") != state.update:
            raise ValueError(f"unevaluated must hold the metrics of update {state.update}")
    except ValueError as error:
        raise damaged_checkpoint(folder / STATE, error) from error
    return state


def check_checkpoint(folder: Path) -> State:
    """Read the `State` of a checkpoint and check all its files, as far as that is possible without a model.

    Raises:
        InputError: naming the file that is missing or damaged, with the remedy.
    """
    tree = read_state(folder)
    state = _build_state(tree, folder)
    verify(folder, tree.get(FILES, {}))
    if CHECKPOINT_WEIGHTS not in tree.get(FILES, [CHECKPOINT_WEIGHTS]):
        raise damaged_checkpoint(folder / CHECKPOINT_WEIGHTS, f"it is not listed in {STATE}")
    for file in () if FILES in tree else sorted(folder.glob("*.safetensors")):
        load_tensors(folder, file.name)
    return state


def check_best(run: Path, state: State) -> None:
    """Check the best weights of a run that resumes from ``state``, since it will test them at its end.

    Raises:
        InputError: naming the file that is missing, damaged, or of an earlier update than `State.best_update`, with
            the remedy.
    """
    if state.best_accuracy < 0:  # no best weights were chosen yet
        return
    best = best_checkpoint(run)
    if best is None:
        raise damaged_checkpoint(run / CHECKPOINTS / "best" / STATE, "the file does not exist")
    if (update := check_checkpoint(best).update) < state.best_update:
        raise damaged_checkpoint(
            best / STATE, f"it is of update {update}, and the best weights are of update {state.best_update}"
        )


def why_no_best(run: Path, state: State) -> str | None:
    """Why the best weights of a run cannot be used; None if they can."""
    try:
        check_best(run, state)
    except InputError as error:
        return str(error).partition("; ")[0]
    return None


def saved_log_sums(folder: Path) -> dict[str, str] | None:
    """The checksums of the run's logs when a checkpoint was saved; None if an earlier version saved it.

    Raises:
        InputError: if `state.json` is missing or damaged.
    """
    sums = read_state(folder).get(LOG_SUMS)
    try:
        return None if sums is None else build(dict[str, str], sums, LOG_SUMS)
    except ValueError as error:
        raise damaged_checkpoint(folder / STATE, error) from error


Shapes = Mapping[str, tuple[torch.Size, torch.dtype]]
"""Shape and dtype of whole (unsharded) tensors by name."""


def shapes_of(values: Mapping[str, Tensor]) -> Shapes:
    """Shapes and dtypes of tensors; of sharded ones those of the whole tensor."""
    return {name: (shape_of(value), value.dtype) for name, value in values.items()}


def check_tensors(loaded: Mapping[str, Tensor], wanted: Shapes) -> None:
    """Refuse tensors whose names, shapes or dtypes differ from the wanted ones, and tensors that are not finite.

    Raises:
        ValueError: naming the first such tensor.
    """
    if lacking := sorted(wanted.keys() - loaded.keys()):
        raise ValueError(f"it lacks {lacking[0]}")
    if more := sorted(loaded.keys() - wanted.keys()):
        raise ValueError(f"it holds {more[0]:.80}, which the run does not have")
    for name, (shape, dtype) in wanted.items():
        if loaded[name].shape != shape:
            raise ValueError(f"{name} has the shape {list(loaded[name].shape)} and should have {list(shape)}")
        if loaded[name].dtype != dtype and not _autocast_pair(loaded[name].dtype, dtype):
            raise ValueError(f"{name} is of type {loaded[name].dtype} and should be of {dtype}")
    if broken := find_broken(loaded):
        raise ValueError(f"{broken} is not finite")


def _autocast_pair(saved: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether the dtypes may differ because one engine is FSDP2, which keeps weights in float32 under autocast."""
    return torch.float32 in (saved, wanted) and {saved, wanted} <= {torch.float32, torch.bfloat16, torch.float16}


def load_weights(policy: Policy, folder: Path) -> None:
    """Load the trained weights of a checkpoint into a policy built from the same config, in the policy's own dtype.

    Raises:
        InputError: if they are missing or damaged, or belong to another model.
    """
    _fill(policy, read_tensors(folder, CHECKPOINT_WEIGHTS), folder)


@torch.no_grad()
def _fill(policy: Policy, saved: Mapping[str, Tensor], folder: Path) -> None:
    parameters = trained(policy)
    if saved.keys() != parameters.keys():
        name = sorted(saved.keys() ^ parameters.keys())[0]
        raise InputError(f"checkpoint {folder} and the model differ in {name!r}; load it with the config of its run")
    for name, value in parameters.items():
        if shape_of(value) != saved[name].shape:
            raise InputError(f"checkpoint {folder} has another shape for {name!r}; load it with the config of its run")
        if not saved[name].is_floating_point():
            raise damaged_checkpoint(folder / CHECKPOINT_WEIGHTS, f"{name} is of type {saved[name].dtype}")
    if broken := find_broken(saved):
        raise damaged_checkpoint(folder / CHECKPOINT_WEIGHTS, f"{broken} is not finite")
    for name, value in parameters.items():
        fill(value, saved[name])
    if broken := find_broken(parameters):
        raise InputError(f"checkpoint {folder} overflows in another type ({broken}); load it with its own model.dtype")


def optimizer_tensors(optimizer: torch.optim.Optimizer | ZeroOptimizer, policy: Policy) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: ``{parameter}/{entry}``."""
    if isinstance(optimizer, ZeroOptimizer):
        return optimizer.tensors(trained(policy))
    return state_tensors(optimizer, trained(policy))


def load_optimizer(
    optimizer: torch.optim.Optimizer | ZeroOptimizer, policy: Policy, saved: Mapping[str, Tensor]
) -> None:
    """Restore the result of `optimizer_tensors`; to be called after the weights are loaded.

    Raises:
        InputError: if another kind of optimizer saved it.
        ValueError: naming an entry that is missing, unknown, of a wrong shape or not finite.
    """
    parameters = trained(policy)
    torch_optimizer = None if isinstance(optimizer, ZeroOptimizer) else optimizer
    if saved:
        check_tensors(saved, state_shapes(torch_optimizer, shapes_of(parameters), parameters, saved))
    if isinstance(optimizer, ZeroOptimizer):
        optimizer.load(parameters, saved)
    else:
        load_state(optimizer, parameters, saved)


def save_best(run: Path, weights: Mapping[str, Tensor], state: State) -> None:
    """Save these weights as the best ones."""
    write_checkpoint(run / CHECKPOINTS / "best", {CHECKPOINT_WEIGHTS: weights}, vars(state))


def run_tensors(
    policy: Policy, optimizer: torch.optim.Optimizer | ZeroOptimizer, teachers: Sequence[TeacherModel]
) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint by file; under FSDP2 all processes must call it, and rank 0 gets whole tensors."""
    tensors = {CHECKPOINT_WEIGHTS: trained(policy), OPTIMIZER: optimizer_tensors(optimizer, policy)}
    tensors |= {
        f"teacher{i}.safetensors": teacher.checkpoint_tensors
        for i, teacher in enumerate(teachers)
        if teacher.checkpoint_tensors
    }
    return {name: gather_tensors(values) for name, values in tensors.items()}


def save_run(
    run: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: State,
    rollouts: Rollouts | None,
    keep: int | None,
    logs: Mapping[str, str] | None = None,
    ahead: Batch | UnfinishedBatch | None = None,
) -> None:
    """Save everything that the next updates depend on: ``rollouts`` that they still use, a batch that runs ``ahead``.

    The latest ``keep`` checkpoints are kept; all if it is None. ``logs`` is the result of `log_files.log_sums`.
    """
    files, tree = dict(tensors), {**vars(state), **({LOG_SUMS: dict(logs)} if logs is not None else {})}
    if rollouts is not None:
        files[ROLLOUTS], tree["rollouts"] = rollout_tensors(rollouts)
    if ahead is not None:
        files[AHEAD], tree["ahead"] = batch_tensors(ahead)
    write_checkpoint(run / CHECKPOINTS / f"{state.update:06d}", files, tree)
    if keep is not None:
        prune_checkpoints(run, keep)


def restore_run(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer | ZeroOptimizer, teachers: Sequence[TeacherModel]
) -> tuple[State, Rollouts | None]:
    """Load a checkpoint into a newly built run.

    Raises:
        InputError: naming the file that is missing, damaged or of another run, with the remedy.
    """
    tree = read_state(folder)
    state = _build_state(tree, folder)
    verify(folder, tree.get(FILES, {}))
    optimizer_state = _load(folder, OPTIMIZER, tree)
    _fill(policy, _load(folder, CHECKPOINT_WEIGHTS, tree), folder)
    try:
        if not optimizer_state and state.skipped < state.update:
            raise ValueError("it is empty, although the run has learnt")
        load_optimizer(optimizer, policy, optimizer_state)
    except InputError:
        raise
    except ValueError as error:
        raise damaged_checkpoint(folder / OPTIMIZER, error) from error
    for i, teacher in enumerate(teachers):
        if teacher.checkpoint_tensors:
            _load_teacher(teacher, _load(folder, f"teacher{i}.safetensors", tree), folder / f"teacher{i}.safetensors")
    return state, _load_stored(folder, ROLLOUTS, tree, load_rollouts) if "rollouts" in tree else None


def _load(folder: Path, name: str, tree: Mapping[str, Any]) -> dict[str, Tensor]:
    if name not in tree.get(FILES, [name]):
        raise damaged_checkpoint(folder / name, f"it is not listed in {STATE}")
    return load_tensors(folder, name)


def _load_teacher(teacher: TeacherModel, saved: Mapping[str, Tensor], file: Path) -> None:
    try:
        check_tensors(saved, shapes_of(teacher.checkpoint_tensors))
    except ValueError as error:
        raise damaged_checkpoint(file, error) from error
    teacher.load({name: placed_like(saved[name], value) for name, value in teacher.checkpoint_tensors.items()})


def restore_ahead(folder: Path, policy: Policy) -> Batch | UnfinishedBatch | None:
    """Load the batch that runs ahead of learning, if a checkpoint that `restore_run` has loaded holds one.

    Raises:
        InputError: naming the file that is missing or damaged, with the remedy.
    """
    tree = read_state(folder)
    if "ahead" not in tree:
        return None
    batch = _load_stored(folder, AHEAD, tree, load_batch)
    if isinstance(batch, Batch):
        return batch
    live = trained(policy)
    try:
        check_tensors(batch.weights, shapes_of(live))
    except ValueError as error:
        raise damaged_checkpoint(folder / AHEAD, error) from error
    return replace(batch, weights={name: placed_like(value, live[name]) for name, value in batch.weights.items()})


def _load_stored(folder: Path, file: str, tree: Mapping[str, Any], load: Callable[[dict[str, Tensor], Any], T]) -> T:
    tensors, name = _load(folder, file, tree), Path(file).stem
    try:
        return load(tensors, build(dict[str, Any], tree[name], name))
    except TensorError as error:
        raise damaged_checkpoint(folder / file, error) from error
    except ValueError as error:
        raise damaged_checkpoint(folder / STATE, error) from error
