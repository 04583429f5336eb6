"""Rows, splits and templates say in one sentence what is wrong and where."""

import csv
import datetime
import decimal
import gzip
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from dllm_sd.errors import InputError
from dllm_sd.tasks.datafile import Entry, Generated, chosen_split, divide, read_rows, render, split_of
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


ROWS = [{"question": f"{n} + 1", "answer": str(n + 1), "level": str(n % 3)} for n in range(20)]


def saved(folder: Path, form: str) -> str:
    """The rows in a file of that form."""
    file = folder / f"rows.{form}"
    if form.startswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
        return str(file)
    if form.startswith("csv"):
        table = io.StringIO()
        writer = csv.DictWriter(table, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
        text = table.getvalue()
    else:
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
    file.write_bytes(gzip.compress(text.encode()) if form.endswith("gz") else text.encode())
    return str(file)


@pytest.mark.parametrize("form", ["jsonl", "jsonl.gz", "csv", "csv.gz", "parquet"])
def test_the_same_rows_are_read_from_every_format(tmp_path: Path, form: str):
    rows = read_rows(saved(tmp_path, form), "task.data")
    assert [row.fields for row in rows] == ROWS
    assert [row.number for row in rows] == [*range(20)]
    assert rows[3].where.endswith(", row 3" if form == "parquet" else f", line {5 if 'csv' in form else 4}")


@pytest.mark.parametrize(("packed", "form"), [("jsonl.gz", "jsonl"), ("csv.gz", "csv"), ("parquet", "jsonl")])
def test_what_is_packed_is_known_by_its_content(tmp_path: Path, packed: str, form: str):
    file = Path(saved(tmp_path, packed)).rename(tmp_path / f"data.{form}")
    assert [row.fields for row in read_rows(str(file), "task.data")] == ROWS


def test_a_line_of_a_packed_file_is_named(write):
    packed = write("a.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a": \n'))
    with pytest.raises(InputError, match=r"a\.jsonl\.gz, line 2 is not valid JSON"):
        read_rows(packed, "task.data")
    with pytest.raises(InputError, match=r"a\.csv\.gz, line 2 has 1 cells, the header 2"):
        read_rows(write("a.csv.gz", gzip.compress(b"a,b\n1\n")), "task.data")


def test_the_values_of_a_typed_table_become_json(tmp_path: Path):
    values = {
        "day": datetime.date(2026, 1, 2),
        "price": decimal.Decimal("1.50"),
        "missing": math.nan,
        "deep": [{"role": "user", "content": "x"}],
        "raw": b"bytes",
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([values]), tmp_path / "a.parquet")
    (row,) = read_rows(str(tmp_path / "a.parquet"), "task.data")
    assert row.fields == {
        "day": "2026-01-02",
        "price": "1.50",
        "missing": None,
        "deep": [{"role": "user", "content": "x"}],
    }
    assert json.loads(json.dumps(row.fields)) == row.fields


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
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv, line 3 has 1 cells, the header 2; give each line"),
        ("a.csv", b"a,b\n1,2,3\n", r"a\.csv, line 2 has 3 cells"),
        ("a.csv", b'a,b\n"1"2,3\n', r"a\.csv, line 2 is not valid CSV"),
        ("a.csv", b"a,b\n\xff,3\n", r"a\.csv, line 2 is not UTF-8 text"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line_and_a_remedy(write, name: str, content: bytes, message: str):
    with pytest.raises(InputError, match=r"^task\.data: .*" + message) as caught:
        read_rows(write(name, content), "task.data")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1\x15\x04", r" is a Parquet file that cannot be read \(.+\); write it again, or as \.jsonl"),
        (b"ARROW1\0\0", r" is an Arrow file; "),
        (b"\xff\xff\xff\xff\x10", r" is an Arrow file; "),
        (b"\x1f\x8b\x08", r" cannot be read \(damaged: .+\); give the path of a readable file"),
        (b"PK\x03\x04", r" is a zip archive or a spreadsheet; unpack it first"),
        (b"(\xb5/\xfd", r" is a zstd archive; "),
        ('{"a": 1}\n'.encode("utf-16"), r" is UTF-16 .*; save the file as UTF-8"),
        ('{"a": 1}\n'.encode("utf-16-le"), r" is UTF-16 .*; save the file as UTF-8"),
        ('{"a": 1}\n'.encode("utf-32-be"), r" is UTF-16 or UTF-32 .*; save the file as UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", r" is a pointer of Git LFS; "),
        (b"<!DOCTYPE html>\n", r" is a web page; "),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_file_of_another_kind_is_called_by_its_name(write, name: str, content: bytes, message: str):
    with pytest.raises(InputError, match=rf"^task\.data: [^ ]*{name}{message}"):
        read_rows(write(name, content), "task.data")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'[\n{"a": 1}\n]\n',
            "line 1 is not valid JSON; a JSON array begins there; write its objects one on",
        ),
        (b'[{"a": 1}]\n', "line 1 is not a JSON object; a JSON array begins there"),
        (b'{\n"a": 1\n}\n', "line 1 is not valid JSON: an object begins there that goes on below"),
        (b"question,answer\na,b\n", r"line 1 is not valid JSON: it looks like CSV; give the file a name .* \.csv"),
        (b"question\tanswer\na\tb\n", "line 1 is not valid JSON: it looks like a table with tabs"),
        (b'{"a": 1}\r{"a": 2}\r', "line 1 is not valid JSON: its lines end with carriage returns alone"),
        (b'{"a": 1, "a": 2}\n', r"line 1 is not valid JSON \('a' occurs twice\)"),
        (b'{"a": {"b": 1, "b": 1}}\n', r"line 1 is not valid JSON \('b' occurs twice\)"),
        (
            b'{"a": 1} {"a": 2}\n',
            "line 1 is not valid JSON: there are two objects on one line; write each one on a line",
        ),
        (
            b'{"a": 1}, {"a": 2}\n',
            "line 1 is not valid JSON: there are two objects on one line; write each one on a line",
        ),
        (b'{"a": 1}\n{"a": 1},\n', "line 2 is not valid JSON: there is a comma after the object; remove it"),
        (b'{"a": [1], }\n', "line 1 is not valid JSON: there is a comma after the last field; remove it"),
        (b'{"a": NaN}\n', r"line 1 is not valid JSON \(NaN is no JSON number\)"),
        (b'{"a": [-Infinity]}\n', r"line 1 is not valid JSON \(-Infinity is no JSON number\)"),
        (b'{"a": 1e999}\n', r"line 1 is not valid JSON \(the number 1e999 is beyond all measure\)"),
        (b'{"a": -' + b"9" * 5000 + b"}\n", r"line 1 is not valid JSON \(a number has 5001 digits\)"),
        (
            b'{"a": "x"}\n{"a": "1\\ud8002"}\n',
            r"line 2 is not valid JSON \(half a surrogate pair \(\\ud800\), which is",
        ),
        (
            b'{"a": ["\\uDFFF"]}\n',
            r"line 1 is not valid JSON \(half a surrogate pair \(\\udfff\), which is",
        ),
        (b'{"\\ud83d": 1}\n', r"line 1 is not valid JSON \(half a surrogate pair \(\\ud83d\), which is"),
    ],
)
def test_a_line_that_json_lets_pass_or_that_is_something_else_is_explained(write, content: bytes, message: str):
    with pytest.raises(InputError, match=r"^task\.data: .*a\.jsonl, " + message) as caught:
        read_rows(write("a.jsonl", content), "task.data")
    assert len(str(caught.value)) < 400


def test_whole_pairs_and_long_numbers_are_read_as_they_stand(write):
    rows = read_rows(write("a.jsonl", b'{"a": "\\ud83e\\uddff \\\\ud800", "b": ' + b"9" * 30 + b"}"), "task.data")
    assert rows[0].fields == {"a": "\U0001f9ff \\ud800", "b": 10**30 - 1}
    assert render("{b}", rows[0].fields, "task.prompt") == "9" * 30


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1, "b": 2}\n', "line 1 holds JSON and not the names of columns; .* ends in .jsonl"),
        (b"a;b\n1;2\n", "line 1 separates its columns by ';'; save the file with commas"),
        (b"a\tb\n1\t2\n", r"line 1 separates its columns by '\\t'; save the file with commas"),
        (
            b"a,b\r1,2\r",
            r"line 1 is not valid CSV .*; its lines end with carriage returns alone, or a cell contains one",
        ),
        (b'a,b\n1,"2\n', r"line 2 is not valid CSV .*; the quote that opens the last cell is never closed"),
        (b'a,b\n1,"2"x\n', r"line 2 is not valid CSV .*; correct its quotes"),
        (b"a,b,a\n1,2,3\n", "line 1 has the column 'a' twice; give every column a different name"),
    ],
)
def test_a_table_that_would_be_misread_is_refused(write, content: bytes, message: str):
    with pytest.raises(InputError, match=r"^task\.data: .*a\.csv, " + message):
        read_rows(write("a.csv", content), "task.data")


def test_a_cell_may_be_as_long_as_a_line(write):
    text = "word, " * 50_000
    rows = read_rows(write("a.csv", f'question,answer\n"{text}",1\n'.encode()), "task.data")
    assert rows[0].fields == {"question": text, "answer": "1"}


def test_a_cell_that_is_never_closed_is_named_as_such(write):
    lines = b"x" * 2**20 + b"\n"
    with pytest.raises(InputError, match=r"is not valid CSV .*; a cell has more characters than that, or the quote"):
        read_rows(write("a.csv", b'question,answer\n"' + lines * 18), "task.data")


def test_an_empty_text_is_no_text(write):
    for blank in ("", " \\n"):
        row = read_rows(write("a.jsonl", f'{{"a": "{blank}"}}\n'.encode()), "task.data")[0]
        with pytest.raises(InputError, match=r"line 1: field 'a' is empty; fill it, or leave the row out"):
            row.text("a")


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


@pytest.mark.parametrize(
    ("train", "test", "size_dev", "split", "words"),
    [
        (
            "abcd",
            "dcba",
            1,
            "train",
            "all 4 rows of task.data occur in the test split too; set task.data_test to",
        ),
        ("abcd", "dcba", 1, "dev", "all 4 rows of task.data occur in the test split too"),
        (
            "abcd",
            "b",
            5,
            "train",
            "which is 5, or lower that (the file has 3 rows, of which the dev split takes 3, and",
        ),
        ("abcd", "", 4, "train", "which is 4, or lower that (the file has 4 rows, of which the dev split takes 4)"),
        (
            "aaaa",
            "",
            1,
            "train",
            "takes 1 of the 4 rows of task.data, and the 3 others repeat problems of the dev split",
        ),
        (
            "ababc",
            "c",
            2,
            "train",
            "takes 2 of the 4 rows of task.data, and the 2 others repeat problems of the dev split",
        ),
        ("abcd", "", 0, "dev", "set task.data to a file and task.size_dev above 0"),
        ("", "a", 2, "train", "set task.data to a file."),
        ("abcd", "", 1, "test", "set task.data_test to a file."),
    ],
)
def test_an_empty_split_says_what_emptied_it(train: str, test: str, size_dev: int, split: Any, words: str):
    with pytest.raises(InputError, match=rf"^The {split} split holds no problems; ") as caught:
        chosen_split(divide("t", entries(*train), entries(*test), size_dev, None), split)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        ({"b": 1}, "{'b': 1}"),
        ([{"b": 1}], "[{'b': 1}]"),
        ([["x"]], "[['x']]"),
        (["x", None], "null"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        (b"x", "b'x'"),
    ],
)
def test_a_value_that_has_no_one_way_to_be_written_is_refused(value: Any, words: str):
    with pytest.raises(InputError, match=r"^task\.prompt asks for \{a\}, which holds ") as caught:
        render("Q: {a}", {"a": value}, "task.prompt")
    assert f"holds {words}; give it text or a number" in str(caught.value)
    assert render("Q: {b}", {"a": value, "b": "x"}, "task.prompt") == "Q: x"  # what is not asked for may be anything


@pytest.mark.parametrize(("value", "text"), [(3, "3"), (0.5, "0.5"), ("0.50", "0.50"), (["a", 1, 0.5], "a, 1, 0.5")])
def test_text_and_numbers_are_written_as_they_are(value: Any, text: str):
    assert render("{a}", {"a": value}, "task.prompt") == text


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
