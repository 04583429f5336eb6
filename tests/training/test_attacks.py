"""The attacks of `tools/attack_runs.py`: what they look for they would find."""

from pathlib import Path
from typing import Any

import pytest

from tools.attacks.contents import contents, differences
from tools.attacks.findings import spread


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder in small."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"update": 1, "loss": 0.5, "time/eval": 3}\n')
    (tmp_path / "report.json").write_text('{"accuracy": 0.5, "time/updates": 3, "before": {"n": 4, "time/seconds": 1}}')
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
        ("run.lock", "", []),
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
