"""Two processes: whatever one of them refuses, or cannot write, both say and end with the same status."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.files.locking import FolderLock
from tests.training.test_folder import TINY

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes made of every fault."""
    folder = tmp_path_factory.mktemp("two")
    tree = {**TINY, "updates": 2, "eval": {"every": 0, "final_problems": 4}}
    (folder / "small.yaml").write_text(json.dumps(tree))
    lock = FolderLock(folder / "locked", "run folder", "")
    lock.acquire()
    command = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command, "-m", "tests.training.refusing", str(folder)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lock.release()
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_one_mechanism_tells_all_processes(said: list[dict[str, Any]]):
    first, second = (one["mechanism"] for one in said)
    for way in ("on_main", "together"):
        for name, text in (
            ("input", "InputError: wrong"),
            ("stopped", "Stopped: no more"),
            ("full", "OSError: [Errno 28] No space left on device: '/full/file'"),
        ):
            assert first[f"{way} {name}"] == second[f"{way} {name}"] == text
    told = "Stopped: another process failed with KeyError: 'x'"
    assert (first["on_main bug"], second["on_main bug"]) == ("KeyError: 'x'", told)
    assert (first["together bug"], second["together bug"]) == (told, "KeyError: 'x'")
    assert first["value"] == second["value"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        ("in use", 2, "is in use by another process (pid "),
        ("data", 2, "dllm-sd: no references"),
        ("full disk", 1, "'/full/file': No space left on device"),
        ("hung up", 130, "interrupted; the same command continues from the last saved update"),
        ("gone on", 0, ""),
        ("evaluation", 1, "'/full/file': No space left on device"),
        ("its end", 2, "dllm-sd: incomplete"),
        ("evaluated", 0, ""),
    ],
)
def test_both_processes_end_with_the_sentence(said: list[dict[str, Any]], fault: str, status: int, words: str):
    for one in said:
        assert one[fault][0] == status
        assert words in one[fault][1]
