"""The loop: equal under any cut, exact after any crash, honest about what it skips."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from dllm_sd.config import build_config
from dllm_sd.policies.weights import trained
from dllm_sd.training import learner as learner_module
from dllm_sd.training import trainer as trainer_module
from dllm_sd.training.learner import Learner
from dllm_sd.training.trainer import Trainer

TREE: dict[str, Any] = {
    "seed": 3,
    "updates": 6,
    "model": {"path": "tiny", "dtype": "float64"},
    "task": {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}"},
    "decode": {"length": 16, "block_length": 8, "tokens_per_step": 4},
    "method": {"name": "d_opsd", "rollout": {"problems": 4, "attempts": 2}},
    "optim": {"lr": 3e-4, "weight_decay": 0.01, "warmup": 2, "schedule": "cosine", "tokens_per_batch": 1024},
    "eval": {"every": 3, "problems": 4, "final_problems": 2},
    "checkpoint": {"every": 2},
    "log": {"progress": False, "trackers": [], "samples_every": 2},
}


LONG = pytest.mark.slow
"""A run like another one, which the first tier has."""
SMALL: dict[str, Any] = {"name": "d_opsd", "rollout": {"problems": 4, "attempts": 2}}
CHUNKS: dict[str, Any] = {"name": "d_opsd_reference", "rollout": {**SMALL["rollout"], "passes": 3}}
FOUR_BLOCKS = {"length": 16, "block_length": 4, "tokens_per_step": 2}
"""Decoding in which `CHUNKS` has canvases to learn from."""
LEAST: dict[str, Any] = {"name": "d_opsd", "gate": "all", "rollout": {"problems": 1, "attempts": 1}}
"""One rollout, which is learnt from whatever it says."""


def config_at(run: Path, **changes: Any) -> Any:
    tree = json.loads(json.dumps(TREE))
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree[section][name] = value
        else:
            tree[section] = value
    return build_config({**tree, "run": str(run)})


def metrics_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def weights_of(run: Path, update: int = 6) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"{update:06d}" / "model.safetensors")


EARLY = frozenset({"rollouts/decoded", "rollouts/generated"})
"""How many attempts are made early depends on the free rows."""


def assert_same_run(one: Path, other: Path, tolerance: float = 0.0, apart: frozenset[str] = frozenset()) -> None:
    """Metrics, those ``apart`` left out, and the last weights."""
    first, second = metrics_of(one), metrics_of(other)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - apart:
            if tolerance and isinstance(a[key], float):
                assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), key
            else:
                assert a[key] == b[key], key
    x, y = weights_of(one), weights_of(other)
    for name in x:
        assert (x[name] - y[name]).abs().max() <= tolerance, name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    Trainer(config_at(run)).train()
    return run


def stop_after(monkeypatch: pytest.MonkeyPatch, config: Any, update: int) -> None:
    """Run ``config`` and die right after the metrics of ``update`` are written."""
    evaluate = Trainer._evaluate

    def dying(self: Trainer, metrics: dict[str, Any]) -> None:
        evaluate(self, metrics)
        if metrics["update"] == update:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", dying)
        trainer = Trainer(config)
        with pytest.raises(RuntimeError, match="power cut"):
            trainer.train()


CHECKPOINTED = {"model": {**TREE["model"], "gradient_checkpointing": True}}
COMPUTED: dict[str, dict[str, Any]] = {
    "all at once": {"optim__tokens_per_batch": 320, "decode__batch_size": 5, **CHECKPOINTED},
    **{f"micro-batches of {tokens} tokens": {"optim__tokens_per_batch": tokens} for tokens in (32, 96, 320, 10**6)},
    "gradient checkpointing": CHECKPOINTED,
    "decoding batches": {"decode__batch_size": 5},
}
"""Ways to compute the same run; the second tier says which of them it is where it becomes another."""


@pytest.mark.parametrize("way", [pytest.param(way, marks=LONG if way != "all at once" else ()) for way in COMPUTED])
def test_the_way_it_is_computed_does_not_change_a_run(whole: Path, tmp_path: Path, way: str) -> None:
    Trainer(config_at(tmp_path / "run", **COMPUTED[way])).train()
    assert_same_run(whole, tmp_path / "run", 1e-9, EARLY if "decode__batch_size" in COMPUTED[way] else frozenset())


@pytest.mark.parametrize(
    "model",
    [
        pytest.param({"path": "tiny", "dtype": "bfloat16"}, id="weights"),
        pytest.param({"path": "tiny", "lora": {"rank": 4}}, id="autocast", marks=LONG),
    ],
)
def test_bfloat16_trains_to_finite_losses(tmp_path: Path, model: dict[str, Any]) -> None:
    autocast = None if "dtype" in model else "bfloat16"
    optim = {"optim__autocast": autocast, "optim__pure_bfloat16": "dtype" in model}
    config = config_at(
        tmp_path / "run", model=model, updates=2, eval__every=0, eval__final_problems=0, method=SMALL, **optim
    )
    AcceleratorState._reset_state()  # a process has one precision; a test session has several
    Trainer(config).train()
    AcceleratorState._reset_state()
    losses = [line["loss"] for line in metrics_of(tmp_path / "run") if line["update"]]
    assert len(losses) == 2
    assert all(loss is not None and 0 < loss < 10 for loss in losses)


@pytest.mark.parametrize("crash", [pytest.param(crash, marks=LONG) for crash in (1, 3, 5)])
def test_a_crashed_run_goes_on_as_if_nothing_had_happened(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int
) -> None:
    config = config_at(tmp_path / "run")
    stop_after(monkeypatch, config, crash)
    Trainer(config).train()
    assert_same_run(whole, tmp_path / "run")
    assert (whole / "samples.jsonl").read_bytes() == (tmp_path / "run" / "samples.jsonl").read_bytes()
    assert (whole / "traces.jsonl").read_bytes() == (tmp_path / "run" / "traces.jsonl").read_bytes()


@pytest.mark.parametrize(
    "method",
    [
        pytest.param({**SMALL, "teacher": {"name": "ema", "decay": 0.9}}, id="ema", marks=LONG),
        pytest.param({**SMALL, "teacher": {"name": "snapshot", "every": 2}}, id="snapshot", marks=LONG),
        pytest.param(CHUNKS, id="chunks", marks=LONG),
        pytest.param({"name": "diffu_grpo", "rollout": {"problems": 4, "attempts": 4}}, id="grpo", marks=LONG),
    ],
)
def test_teachers_and_half_used_rollouts_survive_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Mapping[str, Any]
) -> None:
    Trainer(config_at(tmp_path / "whole", method=method, decode=FOUR_BLOCKS)).train()
    stop_after(monkeypatch, config_at(tmp_path / "run", method=method, decode=FOUR_BLOCKS), 5)
    Trainer(config_at(tmp_path / "run", method=method, decode=FOUR_BLOCKS)).train()
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert [line["loss"] is None for line in metrics_of(tmp_path / "run")[1:]].count(True) < 3


@pytest.mark.slow
def test_lora_runs_resume_exactly_with_the_base_behind_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {"path": "tiny", "dtype": "float64", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
    Trainer(config_at(tmp_path / "whole", model=model, optim__lr=3e-3)).train()
    stop_after(monkeypatch, config_at(tmp_path / "run", model=model, optim__lr=3e-3), 5)
    Trainer(config_at(tmp_path / "run", model=model, optim__lr=3e-3)).train()
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    weights = weights_of(tmp_path / "run")
    assert weights
    assert all("lora_" in name for name in weights)


def test_a_finished_run_is_not_run_again(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Trainer, update: int) -> dict[str, Any]:
        raise AssertionError("a finished run must not update")

    monkeypatch.setattr(Trainer, "_update", refuse)
    assert Trainer(config_at(whole)).train()["updates"] == 6


@pytest.mark.learns_nothing
def test_updates_without_a_correct_rollout_are_skipped_and_counted(tmp_path: Path) -> None:
    model = {"random_init": True, "tokenizer": "tiny", "shape": {"hidden_size": 16, "num_hidden_layers": 1}}
    trainer = Trainer(config_at(tmp_path / "run", model=model, updates=3, eval__every=0))
    before = {name: value.clone() for name, value in trainer.policy.module.state_dict().items()}
    report = trainer.train()
    assert report["updates_skipped"] == 3
    assert [line["updates_skipped"] for line in metrics_of(tmp_path / "run")[1:]] == [1, 2, 3]
    assert all(line["loss"] is None and line["sites"] == 0 for line in metrics_of(tmp_path / "run")[1:])
    for name, value in trainer.policy.module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_non_finite_loss_stops_before_the_step_and_names_the_rollouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config_at(tmp_path / "run", eval__every=0))
    grade = learner_module.grade_micro_batch

    def poisoned(*arguments: Any) -> Any:
        graded = grade(*arguments)
        graded.term[0] = torch.nan
        return type(graded)(**{**vars(graded), "loss": graded.loss * torch.nan})

    monkeypatch.setattr(learner_module, "grade_micro_batch", poisoned)
    before = {name: value.clone() for name, value in trainer.policy.module.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"update 1 .*sudoku/train/\d+"):
        trainer.train()
    for name, value in trainer.policy.module.state_dict().items():
        assert torch.equal(value, before[name]), name
    written = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert written["sites"][0].keys() == {"problem", "occurrence", "attempt", "step", "position", "loss"}


@pytest.mark.parametrize(
    "method",
    [TREE["method"], pytest.param(CHUNKS, marks=LONG)],
)
def test_what_was_learnt_before_a_non_finite_loss_is_kept(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Mapping[str, Any]
) -> None:
    decode = TREE["decode"]
    if method != TREE["method"]:
        whole, decode = tmp_path / "whole", FOUR_BLOCKS
        Trainer(config_at(whole, method=method, decode=decode)).train()
    learn = Learner.step

    def broken(self: Learner, plan: Any, rollouts: Any, update: int, *rest: Any) -> Any:
        if update == 4:
            raise FloatingPointError("not finite")
        return learn(self, plan, rollouts, update, *rest)

    config = config_at(tmp_path / "run", method=method, decode=decode, checkpoint__every=100)
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", broken)
        trainer = Trainer(config)
        with pytest.raises(FloatingPointError):
            trainer.train()
    assert (tmp_path / "run" / "checkpoints" / "000003" / "state.json").is_file()
    Trainer(config).train()
    assert_same_run(whole, tmp_path / "run")


def overshoot(trainer: Trainer) -> None:
    """A step so long that the square of a weight overflows float32."""
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e25


def spoil(entry: str, value: float) -> Any:
    """A step that leaves one number of the weights or of the optimizer's state not finite."""

    def change(trainer: Trainer) -> None:
        *_, parameter = trained(trainer.policy).values()
        optimizer: Any = trainer.optimizer
        held = parameter.data if entry == "weight" else optimizer.state[parameter][entry]
        held.view(-1)[-1] = value

    return change


SPOILT = {"exp_avg": -torch.inf}


@pytest.mark.parametrize("entry", ["overshoot", *(pytest.param(entry, marks=LONG) for entry in SPOILT)])
def test_nothing_is_saved_of_a_step_that_made_weights_useless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    method = {**LEAST, "teacher": {"name": "ema", "decay": 0.5}}
    config = config_at(tmp_path / "run", eval__every=4, updates=4, method=method)
    trainer = Trainer(config)
    step, done = trainer.optimizer.step, []

    def broken() -> None:
        done.append(True)
        if len(done) == 4 and entry == "overshoot":
            overshoot(trainer)
        step()
        if len(done) == 4 and entry != "overshoot":
            spoil(entry, SPOILT[entry])(trainer)

    monkeypatch.setattr(trainer.optimizer, "step", broken)
    followed: list[int] = []
    (teacher,) = trainer.models.values()
    follow = teacher.after_update
    monkeypatch.setattr(teacher, "after_update", lambda update, **how: (followed.append(update), follow(update, **how)))
    with pytest.raises(
        FloatingPointError, match=r"^the step of update 4 made .*; nothing of it was saved: .* update 2$"
    ):
        trainer.train()
    assert followed == [1, 2, 3]
    folders = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert folders == {"000002", "best"}  # the best are the initial ones
    again = Trainer(config)
    assert again.state.update == 2
    again.train()
    assert all(torch.isfinite(value).all() for value in weights_of(tmp_path / "run", 4).values())
    assert [line["update"] for line in metrics_of(tmp_path / "run")] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_a_run_that_stops_at_a_non_finite_loss_removes_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = Learner.step

    def broken(self: Learner, plan: Any, rollouts: Any, update: int, *rest: Any) -> Any:
        if update == 4:
            raise FloatingPointError("not finite")
        return learn(self, plan, rollouts, update, *rest)

    monkeypatch.setattr(Learner, "step", broken)
    config = config_at(tmp_path / "run", eval__every=0, checkpoint={"every": 2, "keep": 1}, method=LEAST)
    for _ in range(2):
        with pytest.raises(FloatingPointError):
            Trainer(config).train()
        assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"000002", "000003"}


@pytest.mark.slow
def test_training_ends_when_accuracy_collapses_and_the_best_weights_stay(tmp_path: Path) -> None:
    config = config_at(
        tmp_path / "run",
        updates=12,
        optim={"lr": 0.3, "max_grad_norm": None},
        eval={"every": 1, "problems": 64, "final_problems": 64, "collapse": 0.2},
    )
    trainer = Trainer(config)
    report = trainer.train()
    assert report["stopped"].startswith("dev accuracy fell")
    assert report["updates"] < 12
    assert report["best"]["trained"]["accuracy"] > report["after"]["trained"]["accuracy"] + 0.2
    assert report["accuracy"] == report["best"]["trained"]["accuracy"]
    best = load_file(tmp_path / "run" / "checkpoints" / "best" / "model.safetensors")
    live = dict(trainer.policy.module.named_parameters())
    assert all(torch.equal(value, live[name]) for name, value in best.items())


@pytest.mark.slow
def test_patience_ends_training(tmp_path: Path) -> None:
    evaluation = {"every": 1, "problems": 4, "final_problems": 2, "patience": 2}
    config = config_at(tmp_path / "run", optim={"lr": 1e-30}, eval=evaluation, method=LEAST)
    report = Trainer(config).train()
    assert report["updates"] == 2
    assert report["stopped"] == "no better dev accuracy in 2 evaluations"


def launch(run: Path, *prefix: str, **environment: str) -> subprocess.Popen[str]:
    """The command line on a YAML file, as a process of its own; its norms are those of this process."""
    file = run.parent / "small.yaml"
    file.write_text(json.dumps(TREE))
    command = [*(prefix or (sys.executable, "-m", "tests.exact")), "train", str(file), f"run={run}"]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


def wait_for_lines(run: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text().splitlines()) >= count:
            return
        time.sleep(0.002)
    raise AssertionError(f"the run wrote no {count} lines: {process.communicate()[1]}")


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_ends_in_the_same_place(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = launch(run)
    wait_for_lines(run, 5, process)
    process.kill()
    process.communicate()
    process = launch(run)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert_same_run(whole, run)


@pytest.mark.slow
def test_ctrl_c_saves_and_exits_with_130(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = launch(run)
    wait_for_lines(run, 4, process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "continues from the last saved update" in error
    done = len(metrics_of(run)) - 1
    assert (run / "checkpoints" / f"{done:06d}" / "state.json").is_file()
    process = launch(run)
    process.communicate(timeout=120)
    assert_same_run(whole, run)


@pytest.mark.slow
def test_two_processes_give_the_same_updates_as_one(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    process = launch(run, *launcher, "--main_process_port", "0", "-m", "tests.exact", ACCELERATE_USE_CPU="true")
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert_same_run(whole, run, 1e-9)


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param({"name": "ema", "decay": 0.5}, id="ema"),
        pytest.param({"name": "snapshot", "every": 2}, id="snapshot", marks=LONG),
    ],
)
def test_an_average_stays_where_it_is_at_an_update_without_a_step(
    weights: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under accumulation and over a stop; snapshots go by updates, which decide whose rollouts are graded."""
    plan, skipped = trainer_module.plan_update, {2, 3, 6}
    numbers: list[int] = []

    def planned(*arguments: Any) -> Any:
        return None if numbers[-1] in skipped else plan(*arguments)

    update = Trainer._update
    seen: dict[int, tuple[dict[str, torch.Tensor], ...]] = {}

    def noting(self: Trainer, number: int) -> dict[str, Any]:
        numbers.append(number)
        metrics = update(self, number)
        (model,) = self.models.values()
        copies = model.copy, trained(self.policy)
        seen[number] = tuple({name: value.detach().clone() for name, value in one.items()} for one in copies)
        return metrics

    monkeypatch.setattr(trainer_module, "plan_update", planned)
    monkeypatch.setattr(Trainer, "_update", noting)
    method = {**LEAST, "rollout": {"problems": 2, "attempts": 1}, "teacher": weights}
    settings = config_at(tmp_path / "run", method=method, eval__every=0, optim__tokens_per_batch=96)
    Trainer(settings).train(until=4)
    Trainer(settings).train()
    assert numbers == [1, 2, 3, 4, 5, 6]
    ema = weights["name"] == "ema"
    for number in range(2, 7):
        (before, _), (copy, live) = seen[number - 1], seen[number]
        for name, value in copy.items():
            if ema:
                wanted = before[name] if number in skipped else 0.5 * before[name] + 0.5 * live[name]
            else:
                wanted = before[name] if number % 2 else live[name]
            assert torch.equal(value, wanted) or torch.allclose(value, wanted, rtol=1e-14, atol=0), (number, name)
    moved = [
        number for number in range(2, 7) if any((seen[number][0][n] != v).any() for n, v in seen[number - 1][0].items())
    ]
    assert moved == ([4, 5] if ema else [2, 4, 6])
