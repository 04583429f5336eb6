"""Checkpoints: whole or absent, bit-equal when they come back, refused when they are damaged."""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.policies.weights import BaseWeights, EmaWeights, SnapshotWeights, TeacherModel, trained
from dllm_sd.pretrained.model import Lora
from dllm_sd.rollouts.gates import All
from dllm_sd.rollouts.rollout import Prompted, Rollout, Rollouts, TeacherBrief
from dllm_sd.rollouts.rules import COUNTS, PassAtK, gather
from dllm_sd.tasks import Problem, Sudoku
from dllm_sd.training import checkpoint
from dllm_sd.training.checkpoint import (
    State,
    best_checkpoint,
    latest_checkpoint,
    load_optimizer,
    load_rollouts,
    load_weights,
    optimizer_tensors,
    prune_checkpoints,
    read_state,
    read_tensors,
    restore_run,
    rollout_tensors,
    run_tensors,
    save_best,
    save_run,
    write_checkpoint,
)
from dllm_sd.trajectory import NEVER, Trajectory
from tests.tiers import crossed

Build = Callable[..., MaskedDiffusion]
TASK: Any = Sudoku(prompt="{puzzle}")


def start(make_policy: Build, **options: Any) -> tuple[MaskedDiffusion, torch.optim.AdamW]:
    policy = make_policy(**options)
    return policy, torch.optim.AdamW(trained(policy).values(), lr=1e-2)


def steps(policy: MaskedDiffusion, optimizer: torch.optim.Optimizer, count: int, seed: int = 0) -> None:
    """Optimizer steps with gradients that only depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for value in trained(policy).values():
            value.grad = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        optimizer.step()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name]) for name, value in one.items()
    )


def weights(policy: MaskedDiffusion) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trained(policy).items()}


def roll_out(policy: MaskedDiffusion) -> Rollouts:
    prompted = [Prompted(Problem(f"p{i}", {"puzzle": "0" * 16, "n": i}), (5,) * i) for i in (1, 3, 2)]
    rule = PassAtK(attempts=2, keep="all", until_solved=False)
    decode = Decoding(length=8, block_length=4, tokens_per_step=1)
    return gather(rule, All(), rule(policy, TASK, prompted, decode, 0, 0))


def folders(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"dtype": "float32", "lora": Lora(rank=2)}])
def test_weights_and_optimizer_come_back_bit_equal(make_policy: Build, tmp_path: Path, options: dict[str, Any]):
    policy, optimizer = start(make_policy, **options)
    steps(policy, optimizer, 3)
    save_run(tmp_path, run_tensors(policy, optimizer, []), State(update=3), None, keep=2)
    again, fresh = start(make_policy, **options)
    state, rollouts = restore_run(tmp_path / "checkpoints" / "000003", again, fresh, [])
    assert (state, rollouts) == (State(update=3), None)
    assert same(weights(policy), weights(again))
    assert same(optimizer_tensors(optimizer, policy), optimizer_tensors(fresh, again))
    steps(policy, optimizer, 2, seed=1)
    steps(again, fresh, 2, seed=1)
    assert same(weights(policy), weights(again))


def test_an_optimizer_that_never_stepped_comes_back_empty(make_policy: Build):
    policy, optimizer = start(make_policy)
    assert optimizer_tensors(optimizer, policy) == {}
    load_optimizer(optimizer, policy, {})
    steps(policy, optimizer, 1)


def test_teachers_that_move_come_back_and_the_base_is_not_stored(make_policy: Build, tmp_path: Path):
    policy, optimizer = start(make_policy)
    teachers = [TeacherModel(weights, policy) for weights in (EmaWeights(0.5), SnapshotWeights(2), BaseWeights())]
    steps(policy, optimizer, 3)
    for teacher in teachers:
        teacher.after_update(2)
    steps(policy, optimizer, 1)
    save_run(tmp_path, run_tensors(policy, optimizer, teachers), State(update=3), None, keep=1)
    again, fresh = start(make_policy)
    others = [TeacherModel(weights, again) for weights in (EmaWeights(0.5), SnapshotWeights(2), BaseWeights())]
    restore_run(tmp_path / "checkpoints" / "000003", again, fresh, others)
    for one, other in zip(teachers, others, strict=True):
        assert same(one.copy, other.copy)
    assert not (tmp_path / "checkpoints" / "000003" / "teacher2.safetensors").exists()


def test_every_field_of_the_state_comes_back(make_policy: Build, tmp_path: Path):
    policy, optimizer = start(make_policy)
    steps(policy, optimizer, 2)
    state = State(3, 1, 40, 2, 2, 0.25, 1, "collapse", {"trained": {"accuracy": 0.5, "ci95": [0.0, 1.0]}}, 1.5)
    rollouts = roll_out(policy)
    save_run(tmp_path, run_tensors(policy, optimizer, []), state, rollouts, keep=1)
    found, kept = restore_run(tmp_path / "checkpoints" / "000003", policy, optimizer, [])
    assert found == state
    assert kept is not None
    assert kept.counts == rollouts.counts


@pytest.mark.parametrize("broken", ["save_file", "_flush", "rename"])
def test_a_write_that_fails_leaves_the_former_checkpoint(
    make_policy: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
):
    policy, optimizer = start(make_policy)
    save_run(tmp_path, run_tensors(policy, optimizer, []), State(update=1), None, keep=2)
    save_best(tmp_path, trained(policy), State(update=1))
    before = weights(policy)
    steps(policy, optimizer, 1)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        target = Path if broken == "rename" else checkpoint
        patch.setattr(target, broken, fail)
        for save in (
            lambda: save_run(tmp_path, run_tensors(policy, optimizer, []), State(update=2), None, keep=2),
            lambda: save_best(tmp_path, trained(policy), State(update=2)),
        ):
            with pytest.raises(OSError, match="No space left"):
                save()
    latest, best = latest_checkpoint(tmp_path), best_checkpoint(tmp_path)
    assert latest is not None
    assert best is not None
    assert latest.name == "000001"
    assert same(read_tensors(latest, "model.safetensors"), before)
    assert same(read_tensors(best, "model.safetensors"), before)
    save_run(tmp_path, run_tensors(policy, optimizer, []), State(update=2), None, keep=2)
    save_best(tmp_path, trained(policy), State(update=2))
    assert folders(tmp_path) == {"000001", "000002", "best"}
    assert same(read_tensors(tmp_path / "checkpoints" / "best", "model.safetensors"), weights(policy))


def test_the_best_weights_are_found_wherever_their_replacement_stops(
    make_policy: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    policy, _ = start(make_policy)
    save_best(tmp_path, trained(policy), State(update=1))
    rename, calls = Path.rename, []

    def fail_the_second(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:  # the former one has been moved aside, the new one is not in its place yet
            raise OSError("power cut")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_the_second)
        with pytest.raises(OSError, match="power cut"):
            save_best(tmp_path, trained(policy), State(update=2))
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert read_state(best)["update"] == 1
    save_best(tmp_path, trained(policy), State(update=3))
    assert folders(tmp_path) == {"best"}
    assert read_state(tmp_path / "checkpoints" / "best")["update"] == 3


def test_the_latest_checkpoint_is_the_complete_one_of_the_most_updates(tmp_path: Path):
    assert latest_checkpoint(tmp_path) is None
    for name in ("000002", "000010", "best"):
        write_checkpoint(tmp_path / "checkpoints" / name, {}, {})
    (tmp_path / "checkpoints" / "000011").mkdir()
    (tmp_path / "checkpoints" / ".000012.partial").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "000010"


def test_only_the_latest_checkpoints_and_the_best_stay(tmp_path: Path):
    for name in ("000002", "000004", "000006", "000010", "best"):
        write_checkpoint(tmp_path / "checkpoints" / name, {}, {})
    (tmp_path / "checkpoints" / ".000012.partial").mkdir()
    prune_checkpoints(tmp_path, 2)
    assert folders(tmp_path) == {"000006", "000010", "best"}


@pytest.fixture
def saved(make_policy: Build, tmp_path: Path) -> tuple[Path, MaskedDiffusion, torch.optim.AdamW]:
    policy, optimizer = start(make_policy)
    steps(policy, optimizer, 1)
    tensors = run_tensors(policy, optimizer, [TeacherModel(EmaWeights(), policy)])
    save_run(tmp_path, tensors, State(update=1), roll_out(policy), keep=1)
    return tmp_path / "checkpoints" / "000001", policy, optimizer


FILES = ("model.safetensors", "optimizer.safetensors", "teacher0.safetensors", "rollouts.safetensors", "state.json")


@pytest.mark.parametrize(("name", "size"), crossed(FILES, [None, 0, 30, -5]))
def test_a_damaged_file_is_refused_by_name(
    saved: tuple[Path, MaskedDiffusion, torch.optim.AdamW], name: str, size: int | None
):
    folder, policy, optimizer = saved
    file = folder / name
    content = file.read_bytes()
    file.unlink()
    if size is not None:
        file.write_bytes(content[:size])
    with pytest.raises(InputError) as caught:
        restore_run(folder, policy, optimizer, [TeacherModel(EmaWeights(), policy)])
    assert str(caught.value).startswith(f"checkpoint {file} is missing or damaged (")
    assert str(caught.value).endswith("; use resume=fresh to begin again")
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused(
    saved: tuple[Path, MaskedDiffusion, torch.optim.AdamW], make_policy: Build, policy_shape: Any
):
    folder = saved[0]
    for changes, words in (({"num_hidden_layers": 3}, "differ in"), ({"intermediate_size": 48}, "another shape for")):
        other = make_policy(shape=type(policy_shape)(**{**vars(policy_shape), **changes}))
        with pytest.raises(InputError, match=f"^checkpoint .*{words} 'model.*; load it with the config of its run$"):
            load_weights(other, folder)


def test_a_checkpoint_holds_safetensors_and_json_only(saved: tuple[Path, MaskedDiffusion, torch.optim.AdamW]):
    assert {file.suffix for file in saved[0].iterdir()} == {".safetensors", ".json"}
    json.loads((saved[0] / "state.json").read_text())


def test_a_copied_checkpoint_is_as_good_as_the_original(
    saved: tuple[Path, MaskedDiffusion, torch.optim.AdamW], make_policy: Build, tmp_path: Path
):
    folder, policy, _ = saved
    again, fresh = start(make_policy)
    restore_run(Path(shutil.copytree(folder, tmp_path / "copy")), again, fresh, [TeacherModel(EmaWeights(), again)])
    assert same(weights(policy), weights(again))


# Rollouts


def of_every_kind(kind: Any, other: bool = False) -> Any:
    """A value of a declared type, another one if asked for; fails for a type that it does not know."""
    origin, inner = get_origin(kind), get_args(kind)
    plain: dict[Any, tuple[Any, Any]] = {
        str: ("one", 'two \ud800"'),
        int: (3, -4),
        float: (0.1, 2.5),
        bool: (True, False),
    }
    if kind in plain:
        return plain[kind][other]
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{one.name: of_every_kind(hints[one.name], other) for one in fields(kind)})  # type: ignore[operator]
    if kind is Any:
        return {"nested": [1, None, {"deep": 0.1 + 0.2}], "nan": math.nan} if other else "any"
    if origin in (Union, UnionType):
        return None if other else of_every_kind(next(one for one in inner if one is not type(None)))
    if origin is tuple:
        return () if other else (of_every_kind(inner[0]), of_every_kind(inner[0], True))
    assert origin is Mapping, f"a field of {kind}: teach this test, and see that it survives a resumption"
    return {"a": of_every_kind(inner[1], other), "b": of_every_kind(inner[1])}


def trajectory_of(rich: bool) -> Trajectory:
    """One of two that differ in every field."""
    hints = get_type_hints(Trajectory)
    ids = torch.tensor([[5, 6, 7]] if rich else [[1, 2]])
    logp = torch.tensor([[-0.1, math.nan]], dtype=torch.bfloat16)
    tensors: dict[str, Any] = {
        "prompt_ids": ids,
        "prompt_mask": ids > 5,
        "tokens": torch.tensor([[8, 9]]) + rich,
        "reveal_step": torch.tensor([[1, NEVER]]) if rich else torch.tensor([[0, 1]]),
        "length": torch.tensor([1 + rich]),
        "logp": logp if rich else None,
    }
    rest = {one.name: of_every_kind(hints[one.name], rich) for one in fields(Trajectory) if one.name not in tensors}
    return Trajectory(**tensors, **rest)


def equal(one: Any, other: Any) -> bool:
    """Whether two values are the same in type and content, all through dataclasses, lists and tensors, NaN too."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(one.nan_to_num(7), other.nan_to_num(7))
        )
    if is_dataclass(one):
        return all(equal(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other or (one != one and other != other)


def stored(rollouts: Rollouts, folder: Path) -> Rollouts:
    tensors, tree = rollout_tensors(rollouts)
    write_checkpoint(folder, {"rollouts.safetensors": tensors}, {"rollouts": tree})
    return load_rollouts(read_tensors(folder, "rollouts.safetensors"), read_state(folder)["rollouts"])


def test_every_field_of_rollouts_survives_whatever_it_holds(tmp_path: Path):
    hints = get_type_hints(Rollout)
    names = [one.name for one in fields(Rollout)]
    rejected, kept, alone = (
        Rollout(**{name: path if name == "trajectory" else of_every_kind(hints[name], other) for name in names})  # pyright: ignore[reportArgumentType]
        for other, path in ((False, trajectory_of(False)), (True, trajectory_of(True)), (True, trajectory_of(False)))
    )
    informed = replace(kept, briefs=(TeacherBrief((1, 2), 0.5, "hint"), TeacherBrief()))
    left_out: dict[str, Any] = {"kept": (kept, informed, alone), "chosen": (rejected, kept)}
    left_out["counts"] = {**dict.fromkeys(COUNTS, 0.1), "dropped/no_text": 3.0}
    more = get_type_hints(Rollouts).items()
    rollouts = Rollouts(**left_out, **{name: of_every_kind(kind) for name, kind in more if name not in left_out})
    again = stored(rollouts, tmp_path / "000001")
    assert equal(rollouts, again)
    assert again.kept[0] is again.chosen[1]
    assert again.kept[1].trajectory is again.kept[0].trajectory
    assert again.kept[2].trajectory is not again.chosen[0].trajectory
    saved = read_tensors(tmp_path / "000001", "rollouts.safetensors")
    assert len({name.split("/")[0] for name in saved}) == 3


def test_the_comparison_of_the_test_above_sees_every_difference():
    one, other = trajectory_of(False), trajectory_of(True)
    for f in fields(Trajectory):
        assert not equal(one, replace(one, **{f.name: getattr(other, f.name)})), f.name
    assert equal(other, replace(other))


def test_real_rollouts_come_back_with_what_the_gate_rejected(policy: MaskedDiffusion, tmp_path: Path):
    rollouts = roll_out(policy)
    rejecting = replace(rollouts, kept=rollouts.kept[::2])
    again = stored(rejecting, tmp_path / "000001")
    assert equal(rejecting, again)
    assert len(again.chosen) == 6
    assert all(one is again.chosen[2 * i] for i, one in enumerate(again.kept))


def test_rollouts_of_checkpoints_without_checksums_are_still_read(policy: MaskedDiffusion):
    brief = TeacherBrief((1, 2), 0.5, "hint")
    rollouts = roll_out(policy)
    kept = tuple(replace(one, briefs=(brief, TeacherBrief())) for one in rollouts.kept)
    rollouts = replace(rollouts, kept=kept, chosen=kept)
    tensors, tree = rollout_tensors(rollouts)
    lists = {"teacher_prompts": [[1, 2], None], "teacher_weights": [0.5, 1.0], "notes": ["hint", None]}
    known = {"problem", "attempt", "text", "grade"}
    entries = [{name: value for name, value in entry.items() if name in known} | lists for entry in tree["rollouts"]]
    layout = {**tree["trajectories"][0], "logp": None}
    former = json.loads(json.dumps({"kept": entries, "layout": layout, "counts": dict(rollouts.counts)}))
    again = load_rollouts(tensors, former)
    assert equal(rollouts, again)


def test_a_full_disk_is_an_error_of_the_system_also_where_safetensors_meets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    write_checkpoint(tmp_path / "000001", {"model.safetensors": {"x": torch.ones(2)}}, {})
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_checkpoint(tmp_path / "000002", {"model.safetensors": {"x": torch.ones(2)}}, {})
    assert Path(caught.value.filename).name == "model.safetensors"
    assert (tmp_path / "000001" / "model.safetensors").is_file()
    assert not (tmp_path / "000002").exists()
