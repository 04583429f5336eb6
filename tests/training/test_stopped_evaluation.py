"""Evaluations that cannot go on: what was learnt is saved, and they are made when the run goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.errors import InputError, Stopped
from dllm_sd.experience.skill_bank import SkillBankState
from dllm_sd.training.trainer import Trainer
from tests.tiers import later
from tests.training.test_trainer import SMALL, config_at, metrics_of

RUN: dict[str, Any] = {
    "updates": 4,
    "decode": {"length": 8, "block_length": 4, "tokens_per_step": 4},
    "method": {**SMALL, "gate": "all"},
    "eval": {"every": 2, "problems": 2, "final_problems": 1, "probe_every": 2, "probe_problems": 1},
    "checkpoint": {"every": 3},
}
MEASURED = ["initial test", "eval 0", "probe 0", "eval 2", "probe 2", "eval 4", "probe 4", "last test"]
"""All measurements of the run, in their order."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    Trainer(config_at(run, **RUN)).train()
    return run


def failing(patch: pytest.MonkeyPatch, fails: Callable[[int], bool], error: Exception) -> list[tuple[str, int]]:
    """Let measurements fail by their number; return a list that gets what is measured and learnt, and after what."""
    done: list[tuple[str, int]] = []
    count = 0
    measures = {name: getattr(Trainer, name) for name in ("_accuracy", "_probe")}
    update = Trainer._update

    def measured(name: str) -> Any:
        def measure(self: Trainer, *given: Any) -> Any:
            nonlocal count
            count += 1
            if fails(count - 1):
                raise error
            result = measures[name](self, *given)
            done.append((name, self.state.update))
            return result

        return measure

    def updating(self: Trainer, number: int) -> Any:
        done.append(("update", number))
        return update(self, number)

    for name in measures:
        patch.setattr(Trainer, name, measured(name))
    patch.setattr(Trainer, "_update", updating)
    return done


FIRST = [("initial test", Stopped), ("eval 4", FloatingPointError)]
EVERY = [(name, kind) for name in MEASURED for kind in (Stopped, FloatingPointError)]


@pytest.mark.parametrize(("name", "kind"), [*FIRST, *later(*(pair for pair in EVERY if pair not in FIRST))])
def test_no_update_is_learnt_twice_for_a_measurement_that_stops_the_run(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: type[Exception]
):
    place, error = MEASURED.index(name), kind("it cannot go on")
    config = config_at(tmp_path / "run", **RUN)
    with monkeypatch.context() as patch:
        done = failing(patch, lambda number: number == place, error)
        with pytest.raises(kind, match="it cannot go on"):
            Trainer(config).train()
        learnt = max([number for what, number in done if what == "update"], default=0)
        waits = name != "last test"
        assert logged(tmp_path / "run") == [*range(learnt + (not waits))]
        resumed = Trainer(config)
        assert (resumed.state.update, resumed.state.unevaluated is not None) == (learnt, waits)
        resumed.train()
    assert [number for what, number in done if what == "update"] == [1, 2, 3, 4]
    assert_same_run_of(whole, tmp_path / "run")


def logged(run: Path) -> list[int]:
    """The updates whose metrics are there."""
    return [line["update"] for line in metrics_of(run)] if (run / "metrics.jsonl").exists() else []


def assert_same_run_of(whole: Path, run: Path) -> None:
    """Equal metrics, a line an update, and equal reports."""
    assert metrics_of(run) == metrics_of(whole)
    one, two = (json.loads((folder / "report.json").read_text()) for folder in (whole, run))
    for tree in (one, two):
        for name in ("before", "after", "best"):
            tree[name] = {key: {k: v for k, v in x.items() if "time" not in k} for key, x in tree[name].items()}
    kept = one.keys() - {"settings", "time/updates"}
    assert {key: one[key] for key in kept} == {key: two[key] for key in kept}


@pytest.mark.slow
def test_a_run_that_stops_again_and_again_in_evaluations_judges_each_once(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every measurement fails at its first try."""
    config = config_at(tmp_path / "run", **RUN)
    with monkeypatch.context() as patch:
        tried: set[tuple[int, str]] = set()
        measures = {name: getattr(Trainer, name) for name in ("_accuracy", "_probe")}

        def once(name: str) -> Any:
            def measure(self: Trainer, *given: Any) -> Any:
                if (self.state.update, name) not in tried:
                    tried.add((self.state.update, name))
                    raise Stopped("gone")
                return measures[name](self, *given)

            return measure

        for name in measures:
            patch.setattr(Trainer, name, once(name))
        for _ in range(6):
            with pytest.raises(Stopped, match="gone"):
                Trainer(config).train()
        Trainer(config).train()
    assert_same_run_of(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_is_killed_after_the_evaluation_was_made_up_for_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_at(tmp_path / "run", **RUN)
    with monkeypatch.context() as patch:
        failing(patch, lambda number: number == MEASURED.index("eval 2"), Stopped("gone"))
        with pytest.raises(Stopped, match="gone"):
            Trainer(config).train()

    def killed(self: Trainer) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", killed)
        with pytest.raises(RuntimeError, match="killed"):
            Trainer(config).train()
    assert logged(tmp_path / "run") == [0, 1, 2]
    Trainer(config).train()
    assert_same_run_of(whole, tmp_path / "run")


def test_another_config_is_refused_where_only_the_initial_weights_were_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        failing(patch, lambda number: True, Stopped("gone"))
        with pytest.raises(Stopped, match="gone"):
            Trainer(config_at(tmp_path / "run", **RUN)).train()
    with pytest.raises(InputError, match="holds a run with another seed"):
        Trainer(config_at(tmp_path / "run", **RUN, seed=9))


@pytest.mark.slow
def test_an_update_that_stops_between_its_step_and_its_end_is_not_saved_as_the_one_before(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = config_at(tmp_path / "run", **RUN)
    after = SkillBankState.after_update

    def stopping(self: SkillBankState, number: int, rollouts: Any) -> Any:
        if number == 2:
            raise Stopped("no writer")
        return after(self, number, rollouts)

    with monkeypatch.context() as patch:
        patch.setattr(SkillBankState, "after_update", stopping)
        with pytest.raises(Stopped, match="no writer"):
            Trainer(config).train()
    assert not (tmp_path / "run" / "checkpoints" / "000001").exists()
    Trainer(config).train()
    assert_same_run_of(whole, tmp_path / "run")
