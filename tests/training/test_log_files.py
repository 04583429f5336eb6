"""The log files of a run: cut where a run goes on, refused where no run wrote them."""

import json
import os
from pathlib import Path

import pytest

from dllm_sd.errors import InputError
from dllm_sd.training.log_files import LOG_FILES, MetricsLog, check_logs, end_of, log_sums


def write_lines(file: Path, updates: list[int], tail: str = "") -> Path:
    file.write_text("".join(json.dumps({"update": update}) + "\n" for update in updates) + tail, encoding="utf-8")
    return file


def keep_until(file: Path, update: int) -> None:
    os.truncate(file, end_of(file, update))


def updates_in(file: Path) -> list[int]:
    return [json.loads(line)["update"] for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


@pytest.mark.parametrize(
    ("written", "update", "kept"),
    [
        ([0, 1, 2, 3], 2, [0, 1, 2]),
        ([0, 1, 2, 3], 3, [0, 1, 2, 3]),
        ([0, 1, 2, 3], 9, [0, 1, 2, 3]),
        ([0, 1, 1, 2, 2, 3], 2, [0, 1, 1, 2, 2]),  # several samples an update
        ([0, 1, 2], -1, []),
        ([], 3, []),
    ],
)
def test_a_log_is_cut_after_an_update(tmp_path: Path, written: list[int], update: int, kept: list[int]):
    file = write_lines(tmp_path / "metrics.jsonl", written)
    keep_until(file, update)
    assert updates_in(file) == kept
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("tail", ['{"upd', '{"update": 2}', '{"update": 2, "loss": 0.', "\x00\x00"])
def test_a_half_written_line_is_dropped(tmp_path: Path, tail: str):
    file = write_lines(tmp_path / "metrics.jsonl", [0, 1], tail)
    keep_until(file, 5)
    assert file.read_text(encoding="utf-8") == '{"update": 0}\n{"update": 1}\n'


def test_a_log_that_does_not_exist_is_not_made(tmp_path: Path):
    MetricsLog(tmp_path, 3)
    assert not list(tmp_path.iterdir())


def test_only_the_lines_that_go_and_the_last_that_stays_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, parsed, loads = write_lines(tmp_path / "metrics.jsonl", list(range(20000)), '{"half'), [], json.loads
    monkeypatch.setattr(json, "loads", lambda text, **hooks: parsed.append(text) or loads(text, **hooks))
    keep_until(file, 19996)
    assert len(parsed) == 4
    monkeypatch.undo()
    assert updates_in(file) == list(range(19997))


@pytest.mark.parametrize(
    "line", ["garbage", "[1]", "{1}", "{}", '{"loss": 1}', '{"update": true}', "", "\x00", "[" * 9999]
)
@pytest.mark.parametrize("place", [0, 3, 5])
def test_a_line_that_no_run_wrote_is_refused_by_its_number(tmp_path: Path, line: str, place: int):
    file = write_lines(tmp_path / "samples.jsonl", [0, 1, 2, 3, 4])
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:place], line, *lines[place:]]) + "\n")
    write_lines(tmp_path / "metrics.jsonl", [0, 1, 2, 3, 4])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    if line.startswith("{") and place == 0:  # well behind what is looked at
        assert end_of(file, 4) == len(before[file])
        return
    with pytest.raises(InputError) as refused:
        MetricsLog(tmp_path, 2)
    assert str(refused.value) == (
        f"{file}:{place + 1}: this line was not written by a run; correct it, remove the file, or discard the run with "
        "resume=fresh"
    )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_log_is_cut_at_newlines_only(tmp_path: Path):
    log = MetricsLog(tmp_path, -1)
    for update in (1, 2):
        log.write_sample({"update": update, "generation": "a\u2028b\u0085c"})
    keep_until(log.samples, 2)
    assert updates_in(log.samples) == [1, 2]


def test_a_log_goes_on_after_the_checkpoint(tmp_path: Path):
    first = MetricsLog(tmp_path, -1)
    for update in range(5):
        first.write({"update": update, "loss": None})
        first.write_sample({"update": update, "problem": "p"})
    second = MetricsLog(tmp_path, 2)
    second.write({"update": 3, "loss": 1.5})
    assert updates_in(tmp_path / "metrics.jsonl") == [0, 1, 2, 3]
    assert updates_in(tmp_path / "samples.jsonl") == [0, 1, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "samples.jsonl"}


def test_a_log_holds_what_it_held_when_the_checkpoint_was_saved_or_is_refused_by_name(tmp_path: Path):
    lines = {name: [f'{{"update": {i}, "in": "{name}"}}\n' for i in range(1, 5)] for name in LOG_FILES}
    for name in LOG_FILES:
        (tmp_path / name).write_text("".join(lines[name][:3]))
    saved = log_sums(tmp_path, 2)  # a line of the next update stands there already
    assert saved.keys() == set(LOG_FILES)
    for name in LOG_FILES:
        for last in (2, 3, 4):
            (tmp_path / name).write_text("".join(lines[name][:last]))
            check_logs(tmp_path, 2, saved)
        for wrong in (lines[name][:1], lines[name][1:], [lines[name][1], lines[name][0]], []):
            (tmp_path / name).write_text("".join(wrong))
            with pytest.raises(InputError, match=f"{name} does not hold what it held after update 2, .* resume=force"):
                check_logs(tmp_path, 2, saved)
            check_logs(tmp_path, 2, None)  # earlier checkpoints did not remember it
        (tmp_path / name).unlink()
        with pytest.raises(InputError, match=f"{name} does not hold what it held"):
            check_logs(tmp_path, 2, saved)
        (tmp_path / name).write_text("".join(lines[name]))
