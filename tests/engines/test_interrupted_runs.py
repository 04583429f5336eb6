"""Runs on servers that stop, move and go on: what was learnt and made is kept, and what is wrong is not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_sd.config import build_config
from dllm_sd.errors import InputError, Stopped
from dllm_sd.experience.rollout_engine import RolloutEngine, check_servers
from dllm_sd.rollouts.journal import RolloutJournal
from dllm_sd.training import trainer as trainer_module
from dllm_sd.training.trainer import Trainer
from tests.engines.double import MODEL, Double
from tests.engines.test_vllm import learnt, metrics, refuse, tree
from tests.tiers import later


@pytest.fixture(scope="module")
def whole(shared: Double, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run = tmp_path_factory.mktemp("whole") / "run"
    trainer_of(run, shared).train()
    return learnt(metrics(run))


def trainer_of(run: Path, double: Double, resume: str = "auto", **engine: Any) -> Trainer:
    settings = tree(run, double.url, **{"concurrency": 1, "retries": 0, "backoff": 0.0, **engine})
    return Trainer(build_config({**settings, "resume": resume, "checkpoint": {"every": 5}}))


def stop_at(double: Double, count: int) -> list[Any]:
    """Let all servers be gone after some completions; return the list of what is made."""
    made: list[Any] = []

    def note(answer: dict[str, Any]) -> dict[str, Any]:
        made.append((answer["model"].rsplit("-", 1)[1], tuple(answer["choices"][0]["prompt_token_ids"])))
        if len(made) == count:
            double.faults = [refuse(500)] * 1000
        return answer

    double.edit = note
    return made


BEFORE_THE_LAST_EVALUATION = 2 + 4 + 4
"""The first evaluation, and two batches."""


@pytest.mark.parametrize("count", [BEFORE_THE_LAST_EVALUATION + 1, *later(1)], ids=["the last", "the first"])
def test_servers_gone_in_an_evaluation_lose_neither_an_update_nor_a_completion(
    whole: list[dict[str, Any]], double: Double, tmp_path: Path, count: int
):
    made = stop_at(double, count)
    with pytest.raises(Stopped, match="finished rollouts are kept"):
        trainer_of(tmp_path / "run", double).train()
    double.faults = []
    resumed = trainer_of(tmp_path / "run", double)
    assert resumed.state.update == (0 if count == 1 else 2)
    resumed.train()
    assert learnt(metrics(tmp_path / "run")) == whole
    assert len(made) == len(set(made)) == BEFORE_THE_LAST_EVALUATION + 2


def test_an_evaluation_with_other_weights_stops_the_run_and_is_made_again(
    whole: list[dict[str, Any]], double: Double, tmp_path: Path
):
    made = 0

    def stale(answer: dict[str, Any]) -> dict[str, Any]:
        nonlocal made
        made += 1
        double.stale = made >= BEFORE_THE_LAST_EVALUATION
        return answer

    double.edit = stale
    with pytest.raises(Stopped, match=r"does not decode with the student's weights \S+-2: "):
        trainer_of(tmp_path / "run", double).train()
    assert [line["update"] for line in metrics(tmp_path / "run")] == [0, 1]
    double.stale, double.edit = False, lambda answer: answer
    resumed = trainer_of(tmp_path / "run", double)
    assert (resumed.state.update, resumed.pipeline.engine.journal.found) == (2, 0)
    resumed.train()
    lines = metrics(tmp_path / "run")
    assert learnt(lines) == whole
    assert [line.get("engine/eval_logp_gap", 1.0) < 1e-4 for line in lines] == [True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["moved", "linked"])
def test_a_run_folder_that_is_found_elsewhere_keeps_its_completions(
    whole: list[dict[str, Any]], double: Double, tmp_path: Path, way: str
):
    made = stop_at(double, 2 + 2)
    with pytest.raises(Stopped, match="finished rollouts are kept"):
        trainer_of(tmp_path / "run", double).train()
    (folder,) = (path for path in (tmp_path / "run" / "engine").iterdir() if path.is_dir())
    other = tmp_path / "other"
    if way == "moved":
        (tmp_path / "run").rename(other)
    else:
        other.symlink_to(tmp_path / "run")
    double.faults, double.served = [], folder.name  # a server that took all weights has their name
    check_servers(build_config(tree(other, double.url)))
    double.served = MODEL
    trainer_of(other, double).train()
    assert learnt(metrics(other)) == whole
    assert len(made) == len(set(made))


@pytest.mark.slow
def test_a_run_that_gets_more_updates_makes_the_completions_of_other_weights_again(double: Double, tmp_path: Path):
    def run(name: str, updates: int) -> Trainer:
        options = {"optim": {"lr": 0.05, "warmup": 0, "schedule": "linear"}, "checkpoint": {"every": 9}}
        settings = tree(tmp_path / name, double.url, concurrency=1, retries=0, backoff=0.0)
        return Trainer(build_config({**settings, **options, "updates": updates}))

    run("whole", 4).train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_write", lambda *_, **__: None)  # killed: nothing is saved beside the completions
        stop_at(double, 2 + 4 + 4 + 1)
        with pytest.raises(Stopped, match="finished rollouts are kept"):
            run("run", 3).train()
    double.faults, double.edit = [], lambda answer: answer
    assert (tmp_path / "run" / "engine" / "rollouts.0.jsonl").stat().st_size
    run("run", 4).train()
    assert learnt(metrics(tmp_path / "run")) == learnt(metrics(tmp_path / "whole"))
    assert all(line["engine/found"] == 0 for line in metrics(tmp_path / "run")[1:])


def test_a_run_that_is_forced_and_refused_keeps_its_completions(
    double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run, journal = tmp_path / "run", tmp_path / "run" / "engine" / "rollouts.0.jsonl"
    stop_at(double, 2 + 2)
    with pytest.raises(Stopped, match="finished rollouts are kept"):
        trainer_of(run, double).train()
    double.faults, kept = [], journal.read_bytes()

    def refused(*_: Any) -> Any:
        raise InputError("at the very last")

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "MetricsLog", refused)
        for resume in ("force", "fresh", "auto"):
            with pytest.raises(InputError, match="at the very last"):
                trainer_of(run, double, resume)
            assert journal.read_bytes() == kept
    forced = trainer_of(run, double, "force")
    assert forced.pipeline.engine.journal.found == 0
    assert not journal.exists()


@pytest.mark.parametrize("key", ["tolerance", *later("checked", "retries", "backoff", "timeout", "concurrency")])
def test_how_servers_are_asked_may_change_when_a_run_goes_on(double: Double, tmp_path: Path, key: str):
    stop_at(double, 1)
    with pytest.raises(Stopped, match="finished rollouts are kept"):
        trainer_of(tmp_path / "run", double).train()
    double.faults = []
    changed: dict[str, Any] = {key: 7}
    assert trainer_of(tmp_path / "run", double, **changed).resumed


def test_a_completion_that_another_process_made_is_found(double: Double, tmp_path: Path):
    """Which process asks for an attempt depends on which has room, so each needs the completions of all."""
    stop_at(double, 3)
    with pytest.raises(Stopped, match="finished rollouts are kept"):
        trainer_of(tmp_path / "run", double).train()
    lines = (tmp_path / "run" / "engine" / "rollouts.0.jsonl").read_text().splitlines()
    assert [RolloutJournal(tmp_path / "run" / "engine", rank).found for rank in (0, 1)] == [3, 3] == [len(lines)] * 2
    assert {json.loads(line)["request"] for line in lines} == {*RolloutJournal(tmp_path / "run" / "engine", 1)._stored}


def test_names_of_weights_are_those_of_the_main_process(double: Double, tmp_path: Path):
    """A folder that another process sees elsewhere is the same to the servers."""
    engine = trainer_of(tmp_path / "run", double).pipeline.engine
    assert isinstance(engine, RolloutEngine)
    engine.folder = tmp_path / "as others see it"
    engine.folder.mkdir()
    engine.use("7")
    (body,) = (
        body for path, body in double.seen if path.endswith("load_lora_adapter") and body["lora_name"][-1] == "7"
    )
    assert body["lora_path"] == str(tmp_path / "run" / "engine" / body["lora_name"])


@pytest.mark.parametrize("part", ["nothing", "the adapter", "the base model"])
def test_completions_of_other_weights_are_not_reused(double: Double, tmp_path: Path, part: str):
    """Another checkpoint was put in place, or the model at `model.path` was replaced."""
    stop_at(double, 2 + 2)
    with pytest.raises(Stopped, match="finished rollouts are kept"):
        trainer_of(tmp_path / "run", double).train()
    double.faults, double.edit = [], lambda answer: answer
    resumed = trainer_of(tmp_path / "run", double)
    engine, trained = resumed.pipeline.engine, part == "the adapter"
    engine.version, engine._frozen = "", None  # as if these had been the weights from the start
    if part != "nothing":
        values = (x for x in resumed.policy.module.parameters() if x.requires_grad == trained)
        with torch.no_grad():
            next(values).view(-1)[:1] += 1e-6
    resumed.train()
    assert metrics(tmp_path / "run")[-1]["engine/found"] == (2 if part == "nothing" else 0)
