"""The attacks of `tools/attack_runs.py`: a sample of them finds no fault, and what they look for they would find."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tools.attacks.child import Ended
from tools.attacks.configs import all_hostile
from tools.attacks.contents import contents, differences
from tools.attacks.damage import BYTES, TEXTS, VALUES, damages
from tools.attacks.findings import spread

ROOT = Path(__file__).parents[2]
POINTS = 4
WANTED = {"kills": 5, "writes": 6, "damage": 4, "races": 2, "configs": 5}
"""Attacks of each kind in a sample of so many points."""


@pytest.mark.slow
def test_killed_starved_damaged_raced_and_misled_runs_lose_nothing_and_say_what_is_wrong(tmp_path: Path) -> None:
    out = tmp_path / "findings.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "tools.attack_runs", "--quick", "--points", str(POINTS), "--out", str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    findings = [json.loads(line) for line in out.read_text().splitlines()]
    assert not [finding for finding in findings if finding["outcome"] == "FAULT"]
    assert Counter(finding["kind"] for finding in findings) == WANTED
    said = {finding["kind"] for finding in findings if finding["outcome"] == "sentence"}
    assert said == {"writes", "damage", "races", "configs"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder in small."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"update": 1, "loss": 0.5, "time/eval": 3}\n')
    (tmp_path / "report.json").write_text('{"accuracy": 0.5, "time/updates": 3, "before": {"n": 4, "time/s": 1}}\n')
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.jsonl", '{"update": 1, "loss": 0.5, "time/eval": 9}\n', []),
        ("report.json", '{"accuracy": 0.5, "time/updates": 9, "before": {"n": 4, "time/seconds": 9}}', []),
        ("metrics.jsonl", '{"update": 1, "loss": 0.25}\n', ["metrics.jsonl differs at .0.loss: 0.25, not 0.5"]),
        ("metrics.jsonl", '{"update": 1, "loss": 0.5}\n' * 2, ["metrics.jsonl differs at the top: 2 entries, not 1"]),
        ("metrics.jsonl", '{"update": 1, "loss": 0.5', ["metrics.jsonl differs"]),
        ("report.json", '{"accuracy": 0.5, "before": {}}', ["report.json differs at .before.n: None, not 4"]),
        ("model.safetensors", "12345679", ["model.safetensors differs"]),
        ("checkpoints/.000001.partial", "", ["left over checkpoints/.000001.partial"]),
        (".lock", "", []),
    ],
)
def test_folders_differ_in_all_but_times_and_locks(folder: Path, name: str, content: str, words: list[str]) -> None:
    wanted = contents(folder)
    (folder / name).write_text(content)
    assert differences(wanted, contents(folder)) == words


def test_a_lost_file_and_a_link_are_differences(folder: Path) -> None:
    wanted: dict[str, Any] = contents(folder)
    (folder / "model.safetensors").rename(folder / "metrics.partial")
    (folder / "report.json").unlink()
    (folder / "report.json").symlink_to("metrics.partial")
    assert differences(wanted, contents(folder)) == [
        "missing model.safetensors",
        "left over metrics.partial",
        "report.json differs",
    ]


@pytest.mark.parametrize(
    ("count", "points", "numbers"), [(3, None, [0, 1, 2]), (9, 3, [0, 4, 8]), (9, 1, [4]), (2, 5, [0, 1]), (0, 4, [])]
)
def test_points_are_spread_from_the_first_to_the_last(count: int, points: int | None, numbers: list[int]) -> None:
    assert spread(count, points) == numbers


@pytest.mark.parametrize(
    ("status", "err", "sentence"),
    [
        (2, "dllm-sd: seed is -1; give 0 or more\n", "seed is -1; give 0 or more"),
        (1, "a warning\ndllm-sd: the disk is full\n", "the disk is full"),
        (1, "Traceback (most recent call last):\nOSError: no\ndllm-sd: the disk is full\n", None),
        (1, "Traceback (most recent call last):\nOSError: no\n", None),
        (0, "dllm-sd: a warning\n", None),
        (-9, "dllm-sd: a warning\n", None),
        (None, "dllm-sd: a warning\n", None),
        (2, "", None),
        (2, "usage: dllm-sd\n", None),
    ],
)
def test_a_refusal_is_a_status_and_a_sentence(status: int | None, err: str, sentence: str | None) -> None:
    assert Ended(status, "", err, 0.0, 0).sentence == sentence


def seen(file: Path) -> bytes | str:
    """What stands at a path."""
    return str(file.readlink()) if file.is_symlink() else file.read_bytes() if file.is_file() else f"{file.is_dir()}"


def test_every_file_and_every_key_is_damaged_in_every_way(folder: Path, tmp_path: Path) -> None:
    run, other, work = folder / "run", folder / "run" / "other" / "model.safetensors", folder / "work"
    other.parent.mkdir(parents=True)
    other.write_bytes(b"abcdefgh")
    for name in ("metrics.jsonl", "report.json", "model.safetensors"):
        (folder / name).rename(run / name)
    names: dict[str, set[str]] = {}
    for name, file, deed in damages(run, [other]):
        shutil.copytree(run, work)
        (work / "skills.json").touch()  # marks the working folder
        inside = file.relative_to(run)
        deed(work / inside)
        assert seen(work / inside) != seen(file), f"{name} does nothing to {inside}"
        names.setdefault(str(inside), set()).add(name)
        shutil.rmtree(work)
    assert names.keys() == {"metrics.jsonl", "report.json", "model.safetensors", "other/model.safetensors"}
    for file, done in names.items():
        assert {*BYTES, "deleted", "a folder in its place", "a link to nothing", "a link to a copy outside"} <= done
        assert file.endswith("safetensors") or {*TEXTS} <= done
    assert {f"accuracy: {value}" for value in VALUES if value != "half"} <= names["report.json"]
    assert "that of other" in names["model.safetensors"]


def test_no_two_hostile_commands_have_one_name() -> None:
    names = Counter(hostile.name for hostile in all_hostile())
    assert [name for name, count in names.items() if count > 1] == []
