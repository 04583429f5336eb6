"""Shell completion: what a shell offers after TAB, without a library of models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_sd.cli.completion import keys, settings
from dllm_sd.cli.main import main
from dllm_sd.keys import all_keys
from dllm_sd.methods import METHODS
from dllm_sd.tasks import TASKS


def offered(line: str, tmp_path: Path) -> list[str]:
    """What a shell is told when TAB is pressed at the end of ``line``."""
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9", "_ARC_DEBUG": ""}
    answer = tmp_path / "answer"
    program = "import sys; from dllm_sd.cli.main import main; main()"
    environment = {**os.environ, **asked, "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60, capture_output=True)
    return [word.rstrip() for word in answer.read_text().split("\n") if word]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dllm-sd tra", {"train"}),
        ("dllm-sd list me", {"methods"}),
        ("dllm-sd train quickst", {"quickstart", "quickstart_ar"}),
        ("dllm-sd train quickstart optim.l", {"optim.lr="}),
        ("dllm-sd train quickstart optim.lr=1e-4 checkpoint.k", {"checkpoint.keep="}),
        ("dllm-sd explain optim.warm", {"optim.warmup"}),
        ("dllm-sd eval tiny --task cou", {"countdown"}),
        ("dllm-sd init --method d_opsd_p", {"d_opsd_paper", "d_opsd_prompt", "d_opsd_pmi"}),
        ("dllm-sd show quickstart --proc", {"--processes"}),
    ],
)
def test_a_shell_is_told_what_may_follow(line: str, expected: set[str], tmp_path: Path):
    pytest.importorskip("argcomplete")
    assert set(offered(line, tmp_path)) == expected


def test_every_key_that_is_offered_exists_and_its_choices_are_those_of_the_schema():
    paths = keys("")
    assert len(paths) == len(set(paths)) > 150
    known = {key.path.replace("method.contexts.*", "method.contexts.0") for key in all_keys()}
    assert set(paths) == {path for path in known if "*" not in path}
    assert {"seed", "optim.lr", "task.grader", "method.contexts.0.ratio", "method.divergence.beta"} < set(paths)
    assert {f"method={name}" for name in METHODS} <= set(settings("method="))
    assert set(settings("task=")) == {f"task={name}" for name in TASKS}
    assert settings("optim.schedule=co") == ["optim.schedule=constant", "optim.schedule=cosine"]
    assert settings("model.random_init=") == ["model.random_init=true", "model.random_init=false"]
    assert settings("optim.lr=") == settings("nonsense=") == []


def test_without_argcomplete_a_question_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    with pytest.raises(SystemExit) as ended:
        main(["list", "methods"])
    assert ended.value.code == 1
    assert capsys.readouterr() == ("", "")


def test_argcomplete_is_not_imported_by_a_command():
    program = (
        "import sys; from dllm_sd.cli.main import main; main(['list', 'tasks']); print('argcomplete' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"
