"""From 50 lines of one's own to a trained model and an evaluation of it: two commands, at most five keys."""

import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

import dllm_sd
import dllm_sd.api
from dllm_sd import InputError
from dllm_sd.cli.main import main
from dllm_sd.config import build_config, load_config, to_tree, with_whole_paths
from dllm_sd.training import trainer
from tests.test_docs import README, blocks

KEYS = ["task=jsonl", "task.data=own.jsonl", "method=sft", "task.reference_field=answer"]
FAST = ["updates=16", "eval.every=16", "method.rollout.problems=8", "log.progress=false", "log.trackers=[]"]
FAST += ["decode.length=16", "eval.schedules={}"]
"""What makes the test fast, and nobody needs."""
REWARD = "def score(problem, completion):\n    return completion.startswith(problem['answer']) or 0.25\n"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with 50 lines of questions and answers, and a reward."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"{n % 4}{n // 4 % 4}{n // 16}", "answer": str(n % 4)} for n in range(50)]
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("my_reward.py").write_text(REWARD)
    return tmp_path


@pytest.mark.parametrize("base", ["quickstart", pytest.param("quickstart_ar", marks=pytest.mark.slow)])
def test_fifty_lines_become_a_trained_model_and_an_evaluation(base: str, own: Path, capfd: pytest.CaptureFixture[str]):
    commands = [["train", base, *KEYS], ["eval", f"runs/{base}"]]
    assert len(commands) == 2
    assert len([word for command in commands for word in command if "=" in word]) <= 5
    assert main([*commands[0], *FAST]) == 0
    said = capfd.readouterr().err.splitlines()
    assert any("keys are dropped: prompt, answer" in line for line in said)
    assert "task.size_dev is not set: 5 of the 50 rows of task.data are the dev split, 45 are left to train on" in said
    lines = [json.loads(line) for line in Path("runs", base, "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines[1:]]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert main(commands[1]) == 0
    assert "models are tested on the dev split" in capfd.readouterr().err
    report = json.loads(Path("runs", base, "eval", "jsonl", "report.json").read_text())
    assert (report["n"], report["split"], report["task"]) == (5, "dev", "jsonl")
    assert main(["sample", f"runs/{base}", "test:0"]) == 0  # of the same problems as the evaluation
    said = capfd.readouterr()
    assert "models are tested on the dev split" in said.err
    assert re.search(r"(right|wrong) \(jsonl/dev/\d+; ", said.out)


CONFIG: dict[str, Any] = {
    "run": "runs/api",
    "updates": 1,
    "model": {"path": "tiny"},
    "task": {"name": "jsonl", "data": "own.jsonl", "grader": "my_reward.py:score"},
    "decode": {"length": 16, "block_length": 4, "tokens_per_step": 4},
    "method": {"name": "d_opsd", "gate": "all", "rollout": {"problems": 4, "attempts": 1}},
    "eval": {"every": 1, "problems": 2, "final_problems": 0},
    "log": {"progress": False, "trackers": []},
}


def test_training_from_python_is_training_from_the_command_line(own: Path, monkeypatch: pytest.MonkeyPatch):
    report = dllm_sd.train(CONFIG, {"optim.lr": 1e-3}, optim__weight_decay=0.0, run=Path("runs/a"))
    assert report == json.loads(Path("runs/a/report.json").read_text())
    assert report["settings"]["optim"]["lr"] == 1e-3
    assert Path("runs/a/report.html").is_file()
    lines = [json.loads(line) for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["eval/score"] >= 0.25  # what the reward of one's own gives at least
    config = build_config({**CONFIG, "optim": {"lr": 1e-3, "weight_decay": 0.0}, "run": "runs/a"})
    assert load_config("runs/a") == with_whole_paths(config)
    monkeypatch.setattr(trainer.Trainer, "_train", lambda *given: pytest.fail("a finished run is not trained again"))
    assert dllm_sd.train("runs/a") == report
    assert dllm_sd.train(config) == report


@pytest.mark.slow
def test_training_works_off_the_main_thread_and_in_another_precision(own: Path):
    reports: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: reports.append(dllm_sd.train(CONFIG, optim__autocast="bfloat16")))
    thread.start()
    thread.join()
    assert reports[0]["updates"] == 1
    assert dllm_sd.train(CONFIG, optim__autocast=None, run="runs/c")["updates"] == 1


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ("quickstrat", {}, "did you mean 'quickstart'"),
        ("quickstart", {"optim.lr": "fast"}, r"^optim\.lr must be a number, not 'fast'"),
        ("quickstart", {"optim.lr": {1}}, r"^optim\.lr is \{1\}, which a config cannot hold"),
        ("quickstart", {"optm.lr": 1}, "did you mean 'optim'"),
        ({"updates": 1}, {}, "the config has no task"),
    ],
)
def test_wrong_input_is_raised_and_never_ends_the_process(own: Path, config: Any, overrides: dict, message: str):
    with pytest.raises(InputError, match=message):
        dllm_sd.train(config, overrides)
    assert to_tree(build_config(CONFIG))["updates"] == 1


@pytest.mark.parametrize("page", ["own_data.md", "python.md"])
def test_the_code_on_the_pages_runs(page: str):
    for source in blocks(README.parent / "docs" / page, "python"):
        exec(compile(source, page, "exec"), {"__name__": "page"})


def test_the_methods_on_the_page_are_configs(own: Path, monkeypatch: pytest.MonkeyPatch):
    trained: list[Any] = []
    monkeypatch.setattr(
        dllm_sd.api.peers, "train_config", lambda config: trained.append(config) or {Path(config.run): {}}
    )
    monkeypatch.setattr(dllm_sd.api, "write_report", lambda folders, out: None)
    monkeypatch.setitem(dllm_sd.METHODS, "half", dllm_sd.METHODS["d_opsd"])  # taken out again
    first, second = blocks(README.parent / "docs" / "python.md", "py")
    first = "".join(line for line in first.splitlines(True) if 'runs/mine", updates=24' not in line)
    for source in (first, second):
        exec(compile(source, "python.md", "exec"), {"__name__": "page"})
    assert [Path(config.run).name for config in trained] == ["mine", "rft", "dict", "half"]
    assert trained[-1].method.contexts[0].ratio == 0.5
