"""Rows, splits and templates say in one sentence what is wrong and where."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dllm_sd.errors import InputError
from dllm_sd.tasks.datafile import Entry, Generated, divide, read_rows, render, split_of
from dllm_sd.tasks.task import Problem


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], str]:
    def write(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return write


def test_json_lines_become_rows_and_blank_lines_are_passed_over(write):
    rows = read_rows(write("a.jsonl", b'\xef\xbb\xbf{"a": 1}\n\n{"a": "\xc3\xa9"}\r\n'), "task.data")
    assert [row.fields for row in rows] == [{"a": 1}, {"a": "\u00e9"}]
    assert [row.number for row in rows] == [0, 1]
    assert rows[1].where.endswith("a.jsonl, line 3")


def test_csv_lines_become_rows_of_strings(write):
    rows = read_rows(write("a.csv", b'Puzzle,Solution\r\n0012,"1,2"\r\n\r\n3,4\r\n'), "task.data")
    assert [row.fields for row in rows] == [{"Puzzle": "0012", "Solution": "1,2"}, {"Puzzle": "3", "Solution": "4"}]
    assert rows[1].where.endswith("a.csv, line 4")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl holds no problems"),
        ("a.jsonl", b"\n \n", r"a\.jsonl holds no problems"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl, line 2 is not valid JSON; write one JSON object"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1 is not a JSON object"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"a\.jsonl, line 2 is not UTF-8 text; save the file as UTF-8"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1 is not valid JSON"),
        ("a.jsonl", b'{"a": ' + b"9" * 10_000 + b"}", r"a\.jsonl, line 1 is not valid JSON"),
        ("a.csv", b"", r"a\.csv holds no problems"),
        ("a.csv", b"Puzzle,Solution\n", r"a\.csv holds no problems"),
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv, line 3 has 1 cells, the header 2; give every line"),
        ("a.csv", b"a,b\n1,2,3\n", r"a\.csv, line 2 has 3 cells"),
        ("a.csv", b'a,b\n"1"2,3\n', r"a\.csv, line 2 is not valid CSV"),
        ("a.csv", b"a,b\n\xff,3\n", r"a\.csv, line 2 is not UTF-8 text"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line_and_a_remedy(write, name: str, content: bytes, message: str):
    with pytest.raises(InputError, match=r"^task\.data: .*" + message) as caught:
        read_rows(write(name, content), "task.data")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"^task\.data: .*none\.jsonl cannot be read .*; give the path"):
        read_rows(str(tmp_path / "none.jsonl"), "task.data")
    with pytest.raises(InputError, match="cannot be read"):
        read_rows(str(tmp_path), "task.data")


def test_a_missing_field_and_a_wrong_type_name_the_line(write):
    row = read_rows(write("a.jsonl", b'{"a": 1}\n'), "task.data")[0]
    with pytest.raises(InputError, match=r"line 1 has no field 'b' \(it has a\); add it"):
        row.text("b")
    with pytest.raises(InputError, match=r"line 1: field 'a' must be a string, not 1"):
        row.text("a")


def entries(*identities: str) -> list[Entry]:
    return [Entry(number, identity, {"x": identity}) for number, identity in enumerate(identities)]


def values(problems) -> list[str]:
    return [problem.fields["x"] for problem in problems]


def test_without_a_key_the_last_rows_are_held_out():
    splits = divide("t", entries("a", "b", "c", "d"), entries("e"), 1, None)
    assert (values(splits["train"]), values(splits["dev"]), values(splits["test"])) == (["a", "b", "c"], ["d"], ["e"])
    assert [problem.id for problem in splits["dev"]] == ["t/dev/3"]


def test_with_a_key_the_held_out_rows_are_scattered_and_always_the_same():
    names = [str(number) for number in range(100)]
    first, again, other = (divide("t", entries(*names), [], 10, key) for key in (1, 1, 2))
    assert values(first["dev"]) == values(again["dev"]) != values(other["dev"])
    assert values(first["dev"]) != names[-10:]
    assert sorted(values(first["dev"]) + values(first["train"])) == sorted(names)


@pytest.mark.parametrize("key", [None, 1, 2, 3])
def test_splits_stay_disjoint_when_rows_recur(key: int | None):
    splits = divide("t", entries(*"abcabcdefg"), entries(*"gg"), 3, key)
    train, dev, test = (set(values(splits[split])) for split in ("train", "dev", "test"))
    assert not train & dev
    assert not (train | dev) & test
    assert train | dev | test == set("abcdefg")
    assert len(splits["dev"]) == 3
    assert len(splits["test"]) == 2


def test_a_dev_split_larger_than_the_data_takes_what_is_there():
    splits = divide("t", entries("a", "b"), [], 10, None)
    assert (values(splits["train"]), values(splits["dev"])) == ([], ["a", "b"])


def test_generated_problems_are_made_only_when_looked_at():
    made: list[int] = []

    def make(index: int) -> Problem:
        made.append(index)
        return Problem(str(index), {})

    problems = Generated(range(10**9), make)
    assert len(problems) == 10**9
    assert len(problems[5:50:5]) == 9
    assert made == []
    assert problems[-1].id == "999999999"
    assert [problem.id for problem in problems[5:20:5]] == ["5", "10", "15"]
    with pytest.raises(IndexError):
        problems[10**9]


def test_a_hash_gives_one_sixteenth_each_to_dev_and_test():
    splits = [split_of("x", number) for number in range(16_000)]
    assert 850 < splits.count("dev") < 1150
    assert 850 < splits.count("test") < 1150


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{a}", "x{b}"),
        ("{a} and {n}", "x{b} and 1, 2"),
        (r"\boxed{{{a}}}", r"\boxed{x{b}}"),
        ("{{}}", "{}"),
        ("", ""),
    ],
)
def test_templates_fill_plain_names_once(template: str, text: str):
    assert render(template, {"a": "x{b}", "n": [1, 2]}, "task.prompt") == text


@pytest.mark.parametrize(
    "template", ["{b}", "{a.__class__}", "{a[0]}", "{a!r}", "{a:>1000000000}", "{}", "{0}", "{a:{a}}"]
)
def test_templates_refuse_all_but_plain_names(template: str):
    with pytest.raises(InputError, match=r"^task\.prompt asks for .* plain fields only, of which there are: \{a\}\.$"):
        render(template, {"a": "x"}, "task.prompt")


@pytest.mark.parametrize("template", ["{a", "a}", r"\boxed{a}}"])
def test_single_braces_are_refused_with_the_remedy(template: str):
    with pytest.raises(InputError, match=r"^task\.prompt is not a template .*double the braces"):
        render(template, {"a": "x"}, "task.prompt")
