"""Every key that a user gives to a command that does not train has an effect there, or is refused in a sentence."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.cli.main import main
from dllm_sd.cli.used_keys import INSTEAD, UNUSED, USED, refuse_unused
from dllm_sd.config import Config
from dllm_sd.errors import InputError
from dllm_sd.keys import all_keys
from dllm_sd.serving import server
from dllm_sd.settings import Checkpoints, Evaluation, Log, Optim

PLAIN = sorted({key.path for key in all_keys() if "*" not in key.path and not key.parts})
BLOCKS = {Config: "", Evaluation: "eval.", Optim: "optim.", Checkpoints: "checkpoint.", Log: "log."}
COPYING = {"dllm_sd.config", "dllm_sd.parts", "dllm_sd.ranges", "dllm_sd.settings", "dataclasses"}
"""Modules that read all fields to check or copy them."""
CHECKING = {"dllm_sd.pairing", "dllm_sd.evaluation.evaluate.about_counts", "dllm_sd.experience.rollout_engine"}
"""Modules that only check values, or name the folder of servers that no test has."""
ELSEWHERE = {"plugins", "cache", "optim.pure_bfloat16"}
"""Keys that act where these runs do not come: imports, written hints, bfloat16."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The keys of a config that are read from now on, with the modules that read them."""
    found: dict[str, set[str]] = {}

    def watch(cls: type, prefix: str) -> None:
        def read(self: Any, name: str, plain: Any = cls.__getattribute__) -> Any:
            frame = sys._getframe(1)
            module = frame.f_globals.get("__name__", "")
            if name in cls.__dataclass_fields__ and (module not in COPYING or frame.f_code.co_name == "held_out"):
                found.setdefault(f"{prefix}{name}", set()).add(module)
            return plain(self, name)

        monkeypatch.setattr(cls, "__getattribute__", read)

    for cls, prefix in BLOCKS.items():
        watch(cls, prefix)
    return found


def graded(folder: Path) -> Path:
    file = folder / "given.jsonl"
    row = {"puzzle": "1200" * 4, "solution": "1234" * 4, "generation": "1"}
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return file


COMMANDS: dict[str, list[str]] = {
    "eval": ["eval", "tiny", "--problems", "2", "--out", "out"],
    "sample": ["sample", "tiny", "test:0"],
    "serve": ["serve", "tiny", "--port", "0"],
    "probe": ["probe", "quickstart_ar", "--problems", "4"],
    "grade": ["grade", "given.jsonl", "--task", "sudoku", "--out", "out"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_keys_that_a_command_accepts_are_those_that_it_reads(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: dict[str, set[str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    graded(tmp_path)
    monkeypatch.setattr(server.HttpServer, "run", lambda self, listeners: [one.close() for one in listeners])
    assert main(COMMANDS[command]) == 0
    blocks = {prefix.rstrip(".") for prefix in BLOCKS.values()}
    acting = {key for key, modules in reads.items() if modules - CHECKING} - blocks
    if command == "eval":  # what is said of numbers of problems reads all of them
        acting -= {"eval.problems", "eval.probe_problems"}
    if command == "probe":  # a sentence says that it has no effect
        acting -= {"eval.thinking"}
    refused = {key for key in acting if not is_accepted(command, key)}
    assert refused == set(), f"{command} reads keys that it refuses"
    idle = set(USED[command]) - reads.keys() - ELSEWHERE
    assert idle == ({"task"} if command == "serve" else set()), f"{command} accepts keys that it does not read"


def is_accepted(command: str, key: str) -> bool:
    try:
        refuse_unused(command, [f"{key}=1"])
    except InputError:
        return False
    return True


@pytest.mark.parametrize("command", USED)
def test_every_key_of_a_config_is_accepted_or_refused_by_name(command: str) -> None:
    accepted = {key for key in PLAIN if is_accepted(command, key)}
    assert accepted
    for key in set(PLAIN) - accepted:
        with pytest.raises(InputError, match=f"^{key} has no effect in dllm-sd {command}; "):
            refuse_unused(command, [f"{key}=1"])
    never = ("updates", "resume", "checkpoint.every", "log.samples", "eval.every", "optim.lr")
    assert not accepted & {*never, "eval.problems", "model.gradient_checkpointing" if command in UNUSED else "run"}
    assert all(not is_accepted(name, key) for name, key in INSTEAD)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["eval", "tiny", "eval.problems=5"],
            "eval.problems has no effect in dllm-sd eval; set eval.final_problems, or",
        ),
        (["eval", "tiny", "eval={attempts: 1, every: 3}"], "eval.every has no effect in dllm-sd eval"),
        (["eval", "tiny", "optim.lr=1"], "optim.lr has no effect in dllm-sd eval; leave it out"),
        (
            ["sample", "tiny", "1", "eval.attempts=2", "eval.temperature=1"],
            "eval.attempts has no effect in dllm-sd sample",
        ),
        (["eval", "tiny", "task.size_train=10"], "task.size_train has no effect in dllm-sd eval; leave it out"),
        (["grade", "given.jsonl", "--task", "sudoku", "task.size_train=10"], "task.size_train has no effect"),
        (["probe", "quickstart_ar", "eval.thinking=true"], "set model.thinking, since a probe reads the prompts of"),
        (["probe", "quickstart_ar", "updates=7"], "updates has no effect in dllm-sd probe"),
        (["probe", "quickstart_ar", "eval.problems=7"], "set eval.probe_problems, or --problems"),
        (["serve", "tiny", "--port", "0", "eval.temperature=1"], "set decode.temperature"),
        (["grade", "given.jsonl", "--task", "sudoku", "seed=1"], "seed has no effect in dllm-sd grade"),
        (
            ["eval", "tiny", "model={path: tiny, gradient_checkpointing: true}"],
            "model.gradient_checkpointing has no effect",
        ),
        (["eval", "tiny", "eval.problms=5"], "unknown key"),  # a misspelt key is called that
    ],
)
def test_a_key_without_an_effect_is_refused_before_weights_are_read(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    graded(tmp_path)
    monkeypatch.setattr("dllm_sd.cli.run_or_model.build_policy", None)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert [path.name for path in tmp_path.iterdir()] == ["given.jsonl"]


def test_a_thinking_mode_of_evaluations_that_a_probe_does_not_use_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mine.yaml"
    task = "task: {name: sudoku, prompt: '{puzzle}', answer: '{solution}'}"
    config.write_text(f"model: {{path: tiny_ar}}\n{task}\nmethod: opsd\neval: {{thinking: true}}\n", encoding="utf-8")
    assert main(["probe", str(config), "--problems", "1"]) == 2  # the template of tiny_ar has no switch
    said, refused = capsys.readouterr().err.splitlines()
    assert said.startswith("dllm-sd: eval.thinking is True, but a probe reads the prompts of training")
    assert "no thinking switch" in refused


def test_an_evaluation_takes_as_many_problems_as_are_asked_for(tmp_path: Path) -> None:
    for option in ("--problems", "--limit"):
        assert main(["eval", "tiny", option, "3", "--out", str(tmp_path / option)]) == 0
        assert json.loads((tmp_path / option / "report.json").read_text(encoding="utf-8"))["n"] == 3
