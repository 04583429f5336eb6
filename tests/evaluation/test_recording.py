"""The record of an evaluation: whole lines only, every attempt there, whatever a crash left behind."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.errors import InputError
from dllm_sd.evaluation.recording import GradedAttempt, Record, begin, finish

FIRST = GradedAttempt("0", "abc", 0, "a generation\nof two lines \u2028 and é", True, 0.5, None, 3, 2)
LINES = [FIRST, replace(FIRST, id="1", parsed="7"), replace(FIRST, id="2", generation="half a pair \ud800")]


def ids(folder: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (folder / "generations.jsonl").read_bytes().splitlines()]


def recorded(folder: Path, lines: list[GradedAttempt]) -> Record:
    record = Record(folder, "trained", 0)
    for line in lines:
        if (line.id, line.attempt) not in record.lines:
            record.append(line)
    return record


def test_wherever_a_line_is_cut_off_the_record_goes_on_complete(tmp_path: Path):
    recorded(tmp_path, LINES[:2])
    file = tmp_path / ".generations.0.jsonl"
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(len(whole) + 1):
        file.write_bytes(whole[:size])
        known = list(Record(tmp_path, "trained", 0).lines.values())
        assert known == LINES[: (size >= first) + (size == len(whole))]
        recorded(tmp_path, LINES)
        finish(tmp_path, ["0", "1", "2"])
        assert ids(tmp_path) == ["0", "1", "2"], f"cut off at byte {size}"
        assert list(Record(tmp_path, "trained", 0).lines.values()) == LINES
        (tmp_path / "generations.jsonl").unlink()


def test_the_file_of_another_process_is_left_alone(tmp_path: Path):
    other = tmp_path / ".generations.1.jsonl"
    other.write_bytes(b'{"schedule": "trai')  # it is writing this very moment
    assert not Record(tmp_path, "trained", 0).lines
    assert other.read_bytes() == b'{"schedule": "trai'


@pytest.mark.parametrize("gone", range(3))
def test_a_missing_attempt_is_noticed_and_nothing_is_written(tmp_path: Path, gone: int):
    recorded(tmp_path, [line for i, line in enumerate(LINES) if i != gone])
    with pytest.raises(InputError, match=rf"lacks 1 of 3 attempts, .* attempt 0 at problem {gone} under trained; run"):
        finish(tmp_path, ["0", "1", "2"])
    assert {path.name for path in tmp_path.iterdir()} == {".generations.0.jsonl"}


def test_missing_attempts_and_schedules_are_noticed_too(tmp_path: Path):
    recorded(tmp_path, [*LINES, replace(LINES[1], attempt=1)])
    with pytest.raises(InputError, match="lacks 2 of 6 attempts"):
        finish(tmp_path, ["0", "1", "2"])
    with pytest.raises(InputError, match=r"lacks 3 of 6 attempts, .* under fast"):
        finish(tmp_path, ["0", "1", "2"], ["trained", "fast"], 1)
    with pytest.raises(InputError, match="lacks 2 of 2 attempts"):
        finish(tmp_path, ["0", "0"], ["fast"], 2)
    finish(tmp_path, ["1"], ["trained"], 2)
    assert ids(tmp_path) == ["1", "1"]


WHOLE: dict[str, Any] = {"schedule": "trained", **asdict(FIRST)}
FOREIGN: dict[str, Any] = {name: {**WHOLE, name: [value]} for name, value in WHOLE.items()}
FOREIGN |= {f"no {name}": {key: value for key, value in WHOLE.items() if key != name} for name in WHOLE}
FOREIGN |= {"more": {**WHOLE, "more": 1}, "list": [], "number": 3, "null": None, "huge": {**WHOLE, "length": 2**70}}
FOREIGN |= {"infinite": {**WHOLE, "score": float("inf")}, "one": {**WHOLE, "correct": 1}}


NO_TREE = [b"", b"no json", b'"\xff"', b"[" * 10**5, b'{"a": 1, "a": 1}']


@pytest.mark.parametrize("file", [".generations.0.jsonl", ".generations.3.jsonl", "generations.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        *(json.dumps(tree).encode() for tree in FOREIGN.values()),
        b"",
        b"no json",
        b'"\xff"',
        b"[" * 10**5,
        b'{"a": 1, "a": 1}',
    ],
    ids=[*FOREIGN, "empty", "no JSON", "no UTF-8", "deep", "twice"],
)
def test_a_whole_line_that_is_no_attempt_is_refused_by_file_and_number(tmp_path: Path, file: str, text: bytes):
    good = json.dumps(WHOLE).encode()
    content = good + b"\n" + text + b"\n" + good[:9]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError) as refusal:
        Record(tmp_path, "trained", 1)
    said = str(refusal.value)
    assert said.startswith(f"{tmp_path / file} line 2 holds no graded attempt (")
    assert said.endswith("); remove the file, and what it held is decoded again")
    assert "\n" not in said
    assert len(said) < 350 + len(str(tmp_path))
    assert (tmp_path / file).read_bytes() == content


def test_settings_that_are_no_text_are_other_settings(tmp_path: Path):
    recorded(tmp_path, LINES)
    (tmp_path / "settings.json").write_bytes(b"\xff\xfe")
    begin(tmp_path, {"seed": 1})
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json"}
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 1}
