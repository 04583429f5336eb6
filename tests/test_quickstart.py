"""The main job: a small diffusion model gets better by on-policy self-distillation."""

import json
from pathlib import Path

import pytest

from dllm_sd.config import load_config
from dllm_sd.training.trainer import Trainer


def test_the_quickstart_starts_where_it_says_and_learns(tmp_path: Path) -> None:
    """The first update, of fewer problems; `-m slow` goes on to the end."""
    changes = ["updates=1", "eval={every: 2, problems: 32, final_problems: 0, schedules: {}}", "log.progress=false"]
    changes += ["method.rollout.problems=12"]
    Trainer(load_config("quickstart", [*changes, f"run={tmp_path / 'run'}"])).train()
    start, *lines = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert 0.4 < start["eval/accuracy"] < 0.75
    assert [line["update"] for line in lines] == [1]
    for line in lines:
        assert line["sites"] > 100
        assert line["grad_norm"] > 0
        assert 0 < line["loss"] < 0.7  # of JSD 0.5, which is at most log 2
        assert 0.4 < line["rollouts/pass_rate"] < 1
    assert (tmp_path / "run" / "samples.jsonl").stat().st_size > 0
    assert list((tmp_path / "run" / "tb").iterdir())


@pytest.mark.slow
def test_the_quickstart_lifts_test_accuracy_by_twenty_points(tmp_path: Path) -> None:
    """A few minutes; its digits for three seeds are in docs/log.md. Evaluations change nothing, so that fewer do."""
    changes = ["eval.every=20", "eval.problems=512", "eval.final_problems=1024", "eval.schedules={}"]
    changes += ["log.progress=false", f"run={tmp_path / 'run'}"]
    report = Trainer(load_config("quickstart", changes)).train()
    assert report["updates"] == 60
    assert report["n"] == 1024
    assert report["accuracy"] > report["before"]["trained"]["accuracy"] + 0.20
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    accuracy = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    assert len(accuracy) == 4
    assert 0.5 < accuracy[0] < 0.65
    assert accuracy[1] > accuracy[0] + 0.05
