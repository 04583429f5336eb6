"""Whatever lies where a file should lie is refused in one sentence, by every reader, without reading it whole."""

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.errors import InputError
from dllm_sd.evaluation.comparison import compare_files
from dllm_sd.evaluation.generations import grade_file, read_generations
from dllm_sd.files import reading
from dllm_sd.files.reading import LONGEST_LINE, MAX_JSON_DEPTH, open_regular, parse_json, read_whole
from dllm_sd.skills.bank import read_bank
from dllm_sd.tasks import Gsm8k
from dllm_sd.tasks.datafile import read_rows

READERS: dict[str, Callable[[Path], Any]] = {
    "rows": lambda path: read_rows(str(path), "task.data"),
    "generations": read_generations,
    "grade": lambda path: grade_file(path, Gsm8k(), path.parent / "out", name="gsm8k"),
    "compare": lambda path: compare_files(path, path),
    "bank": read_bank,
}
LINES = [name for name in READERS if name != "bank"]
each = pytest.mark.parametrize("read", READERS.values(), ids=READERS)
each_of_lines = pytest.mark.parametrize("read", [READERS[name] for name in LINES], ids=LINES)


def refusal(read: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 500
    return message


def pipe(path: Path) -> None:
    os.mkfifo(path)


@each
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz"])
def test_a_pipe_nobody_writes_to_is_not_waited_for(tmp_path: Path, read: Callable[[Path], Any], name: str):
    pipe(tmp_path / name)
    assert "cannot be read (a device or a pipe, not a regular file)" in refusal(read, tmp_path / name)


@each
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_device_is_refused_also_through_a_link(tmp_path: Path, read: Callable[[Path], Any], device: str):
    (tmp_path / "a.jsonl").symlink_to(device)
    assert "cannot be read (a device or a pipe, not a regular file)" in refusal(read, tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["rows", "generations", "grade", "bank"])
def test_a_folder_is_refused(tmp_path: Path, name: str):
    (tmp_path / "a.jsonl").mkdir()
    assert "cannot be read (Is a directory)" in refusal(READERS[name], tmp_path / "a.jsonl")


@each
def test_a_sparse_file_of_ten_gigabytes_is_refused_after_its_first_piece(tmp_path: Path, read: Callable[[Path], Any]):
    file = tmp_path / "a.jsonl"
    file.touch()
    os.truncate(file, 10 * 2**30)
    tracemalloc.start()
    message = refusal(read, file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "1 is longer than 16 MiB; write one object on each line" in message or "larger than 64 MiB" in message
    assert peak < 5 * 2**26


@each_of_lines
def test_a_long_line_is_named_and_one_of_just_the_length_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], Any]
):
    monkeypatch.setattr(reading, "LONGEST_LINE", 200)
    line = json.dumps({"id": "a", "generation": "7", "answer": "7", "correct": True})
    file = tmp_path / "a.jsonl"
    file.write_text(f"{line}\n\n" + json.dumps({**json.loads(line), "id": "b"}).ljust(199) + "\n")
    read(file)
    file.write_text(f"{line}\n\n{line.ljust(200)}\n")
    message = refusal(read, file)
    assert "a.jsonl, line 3 is longer" in message or "a.jsonl:3 is longer" in message


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


@each_of_lines
@pytest.mark.parametrize("levels", [MAX_JSON_DEPTH, 500, 10_000, 1_000_000])
def test_deep_json_names_its_line(tmp_path: Path, read: Callable[[Path], Any], levels: int):
    line = {"id": "a", "generation": "7", "answer": "7", "correct": True}
    deep = json.dumps({**line, "id": "b", "more": "deep"}).replace('"deep"', nested(levels))
    file = tmp_path / "a.jsonl"
    file.write_text(f"{json.dumps(line)}\n{deep}\n")
    message = refusal(read, file)
    assert "2" in message.partition("a.jsonl")[2][:9]
    assert (
        f"is not valid JSON (nested more than {MAX_JSON_DEPTH} levels deep); write one JSON object on each line"
        in message
    )


def test_depth_is_counted_in_lists_and_objects_and_not_in_text():
    assert parse_json(nested(MAX_JSON_DEPTH), "it is not valid JSON", "mend it")
    assert parse_json('"' + "[" * 1000 + '"', "it is not valid JSON", "mend it") == "[" * 1000
    assert len(parse_json("[" + ",".join(["[]"] * 1000) + "]", "it is not valid JSON", "mend it")) == 1000
    for text in (nested(MAX_JSON_DEPTH + 1), '{"a":' * 101 + "1" + "}" * 101, "[" * 100_000):
        with pytest.raises(InputError, match=r"^it is not valid JSON \(nested more than 100 levels deep\); mend it$"):
            parse_json(text, "it is not valid JSON", "mend it")


def test_a_file_is_read_whole_up_to_its_bound(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"x" * 2**20)
    assert len(read_whole(tmp_path / "a", 2**20)) == 2**20
    (tmp_path / "a").write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(OSError, match="larger than 1 MiB"):
        read_whole(tmp_path / "a", 2**20)
    with pytest.raises(OSError, match="NUL"):
        open_regular(Path("a\0b"))
    assert LONGEST_LINE == 2**24
