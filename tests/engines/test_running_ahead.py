"""Servers that make the next batch while one is learnt: beside learning, with whole weights, and without losing any."""

import time
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.config import build_config
from dllm_sd.errors import Stopped
from dllm_sd.training.trainer import Trainer
from tests.engines.double import Double
from tests.engines.test_vllm import metrics, refuse, tree


def trainer(run: Path, double: Double, **engine: Any) -> Trainer:
    settings = tree(run, double.url, **engine)
    settings["method"]["rollout"]["lag"] = 1
    settings["method"]["trust"] = {"name": "importance_cap"}
    return Trainer(build_config({**settings, "updates": 3}))


def plain(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("engine/retried", "engine/found")} for line in metrics(run)]


@pytest.mark.slow
def test_servers_work_while_the_trainer_learns_and_get_weights_only_when_they_rest(double: Double, tmp_path: Path):
    run = trainer(tmp_path / "run", double)
    step, complete, change = run.learner.step, double.complete, double.change
    busy, seen, resting = [], [], []

    def counted(body: Any) -> Any:
        busy.append(1)
        try:
            return complete(body)
        finally:
            busy.pop()

    def changed(path: str, body: Any) -> tuple[int, str]:
        resting.append(not busy)
        return change(path, body)

    def waiting(*args: Any) -> Any:
        """Does not end before the requests of the next batch are there."""
        until, wanted = time.monotonic() + 30, min(12, 4 * (len(seen) + 2))
        while (count := sum(body["temperature"] == 1 for body in double.completions)) < wanted:
            assert time.monotonic() < until
            time.sleep(0.01)
        seen.append(count)
        return step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.learner, "step", waiting)
        patch.setattr(double, "complete", counted)
        patch.setattr(double, "change", changed)
        run.train()
    assert seen == [8, 12, 12]
    assert len(resting) == 3 + 4  # three versions loaded; all unloaded, after a name that no server knows at the start
    assert all(resting)
    lines = metrics(tmp_path / "run")[1:]
    assert [line["rollouts/lag"] for line in lines] == [0, 1, 1]
    assert max(line["engine/logp_gap_max"] for line in lines) < 1e-4  # those of the weights of then
    asked = [body["model"].rsplit("-", 1)[1] for body in double.completions if body["temperature"] == 1]
    assert asked == ["0"] * 8 + ["1"] * 4


@pytest.mark.slow
def test_a_batch_that_the_servers_leave_is_finished_with_the_weights_that_began_it(double: Double, tmp_path: Path):
    trainer(tmp_path / "whole", double).train()
    made: list[Any] = []

    def note(answer: dict[str, Any]) -> dict[str, Any]:
        made.append((answer["model"].split("-", 3)[-1], tuple(answer["choices"][0]["prompt_token_ids"])))
        if len(made) == 2 + 4 + 2:  # the first evaluation, the first batch, half of the next
            double.faults = [refuse(500)] * 1000
        return answer

    double.edit = note
    options: dict[str, Any] = {"retries": 1, "concurrency": 1, "backoff": 0.0}
    with pytest.raises(Stopped, match="finished rollouts are kept"):
        trainer(tmp_path / "run", double, **options).train()
    assert [line["update"] for line in metrics(tmp_path / "run")] == [0, 1]
    double.faults = []
    trainer(tmp_path / "run", double, **options).train()
    assert plain(tmp_path / "run") == plain(tmp_path / "whole")
    assert len(made) == len(set(made)) == 2 + 3 * 4 + 2 + 2


@pytest.mark.slow
def test_an_adapter_that_is_not_active_stops_a_run_ahead_and_its_rollouts_are_made_again(
    double: Double, tmp_path: Path
):
    trainer(tmp_path / "whole", double).train()
    double.stale = True
    with pytest.raises(Stopped, match=r"does not decode with the student's weights \S+-1: "):
        trainer(tmp_path / "run", double).train()
    assert [line["update"] for line in metrics(tmp_path / "run")] == [0, 1]  # the third batch has an adapter
    double.stale = False
    trainer(tmp_path / "run", double).train()
    assert plain(tmp_path / "run") == plain(tmp_path / "whole")
