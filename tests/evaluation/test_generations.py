"""Files of generations: graded line by line, summed up problem by problem, and refused with the line that is wrong."""

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.cli.main import main
from dllm_sd.errors import InputError
from dllm_sd.evaluation.estimates import majority, pass_at_k, wilson_interval
from dllm_sd.evaluation.generations import grade_file, grades_folder, read_generations, summarise
from dllm_sd.tasks import TASKS, Grade, Gsm8k
from tests.oracles.fixtures import fixture_folder

PUZZLE, SOLUTION = "1200341221434321", "1234341221434321"  # two empty cells
Line = dict[str, Any]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes objects, or lines as they are, to a file."""

    def write(*lines: Line | str | bytes, name: str = "given.jsonl") -> Path:
        texts = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
        content = b"".join((text if isinstance(text, bytes) else text.encode()) + b"\n" for text in texts)
        file = tmp_path / name
        file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return file

    return write


def line(generation: str, answer: Any = "7", **more: Any) -> Line:
    return {"generation": generation, "answer": answer, **more}


def outcome(folder: Path) -> tuple[dict[str, Any], list[Line]]:
    """What grading wrote."""
    graded = (folder / "graded.jsonl").read_text(encoding="utf-8").split("\n")
    assert graded.pop() == ""
    return json.loads((folder / "report.json").read_text(encoding="utf-8")), [json.loads(text) for text in graded]


def grades(*attempts: tuple[str | None, bool]) -> list[Grade]:
    return [Grade(correct, float(correct), parsed) for parsed, correct in attempts]


def test_the_majority_is_asked_and_ties_go_to_the_first_seen():
    assert majority(["3", "7", "7"], [False, True, True])
    assert not majority(["3", "3", "7"], [False, False, True])
    assert majority(["7", "3", "3", "7"], [True, False, False, True])
    assert not majority(["3", "7", "7", "3"], [False, True, True, False])


def test_what_was_not_parsed_does_not_vote():
    assert majority([None, None, None, "7"], [False, False, False, True])
    assert not majority([None, None], [False, False])
    assert not majority([None, "3", None], [False, False, False])


def test_the_figures_are_means_over_problems_of_what_their_attempts_say():
    problems = [
        grades(("7", True), ("3", False), ("7", True), (None, False)),  # 2 of 4, majority 7
        grades(("1", False), ("1", False), ("7", True), (None, False)),  # 1 of 4, majority 1
        grades((None, False), (None, False), (None, False), ("7", True)),  # 1 of 4, majority 7
        grades(*[("7", True)] * 4),
    ]
    tree = summarise(problems)
    assert (tree["n"], tree["generations"]) == (4, 16)
    assert tree["accuracy"] == tree["score"] == tree["avg_at_k"]["4"] == 0.5
    assert tree["ci95"] == pytest.approx([0.1500, 0.8500], abs=5e-5)  # Wilson, by hand: 0.5 +- 0.35
    # pass@2 = 1 - C(4 - c, 2) / C(4, 2): 1 - 1/6, 1 - 3/6, 1 - 3/6, 1
    assert tree["pass_at_k"] == {"1": 0.5, "2": pytest.approx((5 / 6 + 1 / 2 + 1 / 2 + 1) / 4), "4": 1.0}
    assert tree["maj_at_k"] == {"4": 0.75}


def test_single_attempts_have_no_majority():
    tree = summarise([grades(("7", True)), grades(("3", False))])
    assert tree["pass_at_k"] == {"1": 0.5}
    assert "maj_at_k" not in tree
    assert "avg_at_k" not in tree


def test_a_problem_weighs_the_same_however_many_attempts_it_has():
    problems = [
        grades(("3", False), ("7", True), ("3", False), ("7", True), ("7", True), ("7", True)),  # 4 of 6; first 3: 3
        grades(("7", True), (None, False), (None, False)),
    ]
    tree = summarise(problems)
    assert tree["accuracy"] == pytest.approx((4 / 6 + 1 / 3) / 2)
    assert tree["pass_at_k"].keys() == {"1", "2", "3"}
    assert tree["pass_at_k"]["3"] == pytest.approx((1 - 0 + 1 - 0) / 2)  # C(2, 3) = 0 and C(2, 3) = 0
    assert tree["pass_at_k"]["2"] == pytest.approx((1 - 1 / 15 + 1 - 1 / 3) / 2)
    assert tree["maj_at_k"] == {"3": 0.5}


def test_a_file_is_graded_line_by_line(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write(line(r"so \boxed{7}", source="x"), line("#### 8", 7), line("none at all", 7.0, correct=True))
    assert main(["grade", str(file), "--task", "gsm8k"]) == 0
    report, graded = outcome(tmp_path / "given_graded")
    assert {path.name for path in tmp_path.iterdir()} == {"given.jsonl", "given_graded"}
    assert {path.name for path in (tmp_path / "given_graded").iterdir()} == {"graded.jsonl", "report.json"}
    assert {key: report[key] for key in ("task", "mode", "n", "score")} == {
        "task": "gsm8k",
        "mode": "default",
        "n": 3,
        "score": pytest.approx(1 / 3),
    }
    assert report["accuracy"] == pytest.approx(1 / 3)
    assert report["ci95"] == list(wilson_interval(1 / 3, 3))
    assert report["settings"]["file"] == str(file)
    assert report["settings"]["task"]["name"] == "gsm8k"
    assert graded == [
        {**line(r"so \boxed{7}", source="x"), "correct": True, "score": 1.0, "parsed": "7"},
        {**line("#### 8", 7), "correct": False, "score": 0.0, "parsed": "8"},
        {**line("none at all", 7.0), "correct": False, "score": 0.0, "parsed": None},
    ]
    out = capsys.readouterr().out
    assert "33.33 %" in out
    assert "given_graded: report.json, graded.jsonl" in out


def test_partial_scores_are_written(write: Write, tmp_path: Path):
    fields = {"puzzle": PUZZLE, "solution": SOLUTION}
    texts = [SOLUTION, SOLUTION.replace("1234", "1231", 1), "no grid"]
    file = write(*({"generation": f"<answer>{text}</answer>", **fields} for text in texts))
    assert main(["grade", str(file), "--task", "sudoku", "--out", str(tmp_path / "a" / "b")]) == 0
    report, graded = outcome(tmp_path / "a" / "b")
    assert [(item["correct"], item["score"], item["parsed"]) for item in graded] == [
        (True, 1.0, SOLUTION),
        (False, 0.5, "1231341221434321"),
        (False, 0.0, None),
    ]
    assert report["accuracy"] == pytest.approx(1 / 3)
    assert report["score"] == pytest.approx(0.5)


def test_countdown_reads_numbers_and_target(write: Write, tmp_path: Path):
    fields = {"numbers": [3, 4, 5], "target": 17}
    file = write(*({"generation": rf"\boxed{{{text}}}", **fields} for text in ("3 * 4 + 5", "3 + 4 + 5", "17")))
    assert main(["grade", str(file), "--task", "countdown"]) == 0
    assert [item["correct"] for item in outcome(tmp_path / "given_graded")[1]] == [True, False, False]


def test_the_task_is_configured_as_in_a_config(write: Write, tmp_path: Path):
    file = write({"generation": "It is 3.50", "gold": "7/2"}, {"generation": "It is 3", "gold": "7/2"})
    settings = ["task.grader=number", "task.answer_field=gold"]
    assert main(["grade", str(file), "--task", "jsonl", *settings]) == 0
    report, graded = outcome(tmp_path / "given_graded")
    assert [item["correct"] for item in graded] == [True, False]
    assert report["settings"]["task"]["answer_field"] == "gold"


def test_compressed_files_are_read_alike(write: Write, tmp_path: Path):
    lines = [line("7"), line("8"), line("so 7")]
    for file in (write(*lines), write(*lines, name="packed.jsonl.gz")):
        assert main(["grade", str(file), "--task", "gsm8k"]) == 0
    report, graded = outcome(tmp_path / "given_graded")
    packed, packed_lines = outcome(tmp_path / "packed_graded")
    assert graded == packed_lines
    assert {**report, "settings": 0} == {**packed, "settings": 0}


def test_the_folder_is_beside_the_file():
    names = ("a.jsonl", "a.jsonl.gz", "a.txt")
    assert [str(grades_folder(Path("x") / name)) for name in names] == [
        "x/a_graded",
        "x/a_graded",
        "x/a.txt_graded",
    ]


def test_only_a_line_feed_ends_a_line(write: Write, tmp_path: Path):
    text = "one\u2028two\x85three\u2029\x0b\x0c\x1c 7"
    raw = json.dumps(line(text), ensure_ascii=False).encode()
    assert main(["grade", str(write(raw, b"", b"  ", raw)), "--task", "gsm8k"]) == 0
    report, graded = outcome(tmp_path / "given_graded")
    assert report["n"] == 2
    assert [item["generation"] for item in graded] == [text, text]


def test_lone_surrogates_and_a_byte_order_mark_do_no_harm(write: Write, tmp_path: Path):
    file = write(b"\xef\xbb\xbf" + rb'{"generation": "\ud800 7", "answer": 7}')
    assert main(["grade", str(file), "--task", "gsm8k"]) == 0
    assert outcome(tmp_path / "given_graded")[1][0]["generation"] == "\ud800 7"


def test_lines_with_one_id_are_attempts(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    texts = {"a": ["7", "3", "7"], "b": ["3", "3", "7"]}
    file = write(*(line(texts[name][i], id=name) for i in range(3) for name in "ab"))
    assert main(["grade", str(file), "--task", "gsm8k"]) == 0
    report, _ = outcome(tmp_path / "given_graded")
    assert (report["n"], report["generations"], report["accuracy"]) == (2, 6, 0.5)
    assert report["pass_at_k"] == {"1": 0.5, "2": pytest.approx((1 + 2 / 3) / 2), "3": 1.0}
    assert report["maj_at_k"] == {"3": 0.5}
    assert report["avg_at_k"] == {"3": 0.5}
    out = capsys.readouterr().out
    assert "pass@3" in out
    assert "maj@3" in out


def test_schedules_are_reported_one_by_one(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [("slow", "a", "7"), ("slow", "b", "7"), ("fast", "a", "7"), ("fast", "b", "3")]
    file = write(*(line(text, id=name, attempt=0, schedule=schedule) for schedule, name, text in rows))
    assert main(["grade", str(file), "--task", "gsm8k"]) == 0
    report, _ = outcome(tmp_path / "given_graded")
    assert (report["schedule"], report["n"], report["accuracy"]) == ("slow", 2, 1.0)
    assert {name: tree["accuracy"] for name, tree in report["schedules"].items()} == {"slow": 1.0, "fast": 0.5}
    assert "slow 100.00 %, fast 50.00 %" in capsys.readouterr().out


class Tallied(Gsm8k):
    """A task with figures of its own."""

    def summary(self, graded: Sequence[tuple[Any, Grade]]) -> dict[str, float]:
        return {"ids": float("".join(problem.id for problem, _ in graded)), "right": sum(g.correct for _, g in graded)}

    def chance(self, problems: Sequence[Any]) -> float | None:
        return 1 / len(problems)


def test_what_the_task_adds_is_reported(write: Write, tmp_path: Path):
    file = write(line("7", id=1), line("3", id=2), line("7", id=1))
    report = grade_file(file, Tallied(), tmp_path / "out", name="tallied")
    assert {key: report[key] for key in ("ids", "right", "chance")} == {"ids": 121.0, "right": 2, "chance": 0.5}
    assert outcome(tmp_path / "out")[0] == report


GOOD = line("7", id="a")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([GOOD, '{"generation": '], "given.jsonl:2: this is not valid JSON; write one JSON object on each line"),
        ([GOOD, "", "[1]"], "given.jsonl:3: this is no JSON object; write one as in "),
        ([GOOD, b'{"generation": "\xff"}'], "given.jsonl:2: this is not UTF-8 text; save the file as UTF-8"),
        ([GOOD, "1" * 5000], "given.jsonl:2: this is not valid JSON"),
        ([GOOD, "[" * 100_000], "given.jsonl:2: this is not valid JSON"),
        ([GOOD, {"id": "b", "answer": "7"}], "given.jsonl:2: there is no 'generation'; put the model's output there"),
        ([{"generation": ["7"], "answer": 7}], "given.jsonl:1: 'generation' must be text, not ['7']; put"),
        ([{"generation": None, "answer": 7}], "given.jsonl:1: 'generation' must be text, not None; put"),
        ([GOOD, {"generation": "7", "id": "b"}], "given.jsonl:2: The problem has no field 'answer'"),
        ([GOOD, line("7", "seven", id="b")], "given.jsonl:2: "),
        ([GOOD, line("7")], "given.jsonl:2: some lines have an 'id' and others have none; give one to all or to none"),
        ([line("7"), GOOD], "given.jsonl:2: some lines have an 'id'"),
        ([line("7", id=True)], "given.jsonl:1: 'id' must be text or a whole number, not True; correct it"),
        ([line("7", id=[1])], "given.jsonl:1: 'id' must be text or a whole number, not [1]; correct it"),
        ([line("7", id="a", attempt="0")], "given.jsonl:1: 'attempt' must be a whole number, not '0'; correct it"),
        ([line("7", id="a", schedule=3)], "given.jsonl:1: 'schedule' must be text, not 3; correct it or leave it out"),
        (
            [line("7", id="a", attempt=1), line("7", id="a", attempt=1)],
            "given.jsonl:2: attempt 1 at 'a' occurs twice",
        ),
        ([], "given.jsonl holds no generations; give a file with one JSON object on each line"),
        (["", " "], "given.jsonl holds no generations"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_left_behind(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[Line | str | bytes], words: str
):
    file = write(*lines)
    assert main(["grade", str(file), "--task", "gsm8k", "--out", str(tmp_path / "new" / "deep")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"dllm-sd: {tmp_path}/{words}")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["given.jsonl"]


def test_former_grades_stay_where_new_ones_fail(write: Write, tmp_path: Path):
    assert main(["grade", str(write(line("7"))), "--task", "gsm8k"]) == 0
    before = outcome(tmp_path / "given_graded")
    assert main(["grade", str(write(line("3"), "{")), "--task", "gsm8k"]) == 2
    assert outcome(tmp_path / "given_graded") == before
    assert {path.name for path in (tmp_path / "given_graded").iterdir()} == {"graded.jsonl", "report.json"}
    assert main(["grade", str(write(line("3"))), "--task", "gsm8k"]) == 0
    assert outcome(tmp_path / "given_graded")[0]["accuracy"] == 0


def test_a_crash_leaves_nothing_half_written(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def crash(self: Gsm8k, problem: Any, completion: str) -> Grade:
        assert completion == "7"
        return Grade(True, 1.0, "7")

    monkeypatch.setattr(Gsm8k, "grade", crash)
    with pytest.raises(AssertionError):
        main(["grade", str(write(line("7"), line("3"))), "--task", "gsm8k"])
    assert [path.name for path in tmp_path.iterdir()] == ["given.jsonl"]


def test_nothing_else_is_overwritten(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write(line("7"), name="graded.jsonl")
    before = file.read_bytes()
    assert main(["grade", str(file), "--task", "gsm8k", "--out", str(tmp_path)]) == 2
    assert "would be written over it; give another --out" in capsys.readouterr().err
    assert file.read_bytes() == before
    run = tmp_path / "run"
    run.mkdir()
    (run / "report.json").write_text("of training")
    assert main(["grade", str(file), "--task", "gsm8k", "--out", str(run)]) == 2
    assert "report.json is the report of something else; give another --out" in capsys.readouterr().err
    assert [path.read_text() for path in run.iterdir()] == ["of training"]
    (tmp_path / "file").write_text("")
    assert main(["grade", str(file), "--task", "gsm8k", "--out", str(tmp_path / "file")]) == 2
    assert "cannot write to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.jsonl", "--task", "gsm8k"], "missing.jsonl cannot be read (No such file or directory); give the"),
        (["given.jsonl", "--task", "gsm9k"], "task.name 'gsm9k' is unknown; did you mean 'gsm8k'?"),
        (["given.jsonl", "--task", "gsm9k", "--mode", "compatible"], "task.name 'gsm9k' is unknown"),
        (["given.jsonl", "--task", "jsonl", "--mode", "strict"], "--mode strict: task jsonl is graded in one way only"),
        (["given.jsonl", "--task", "gsm8k", "seed=3"], "seed has no effect in dllm-sd grade; leave it out"),
        (["given.jsonl", "--task", "gsm8k", "task.sead=3"], "unknown key 'task.sead'"),
    ],
)
def test_bad_arguments_are_named(
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
):
    write(line("7"))
    monkeypatch.chdir(tmp_path)
    assert main(["grade", *words]) == 2
    assert capsys.readouterr().err.startswith(f"dllm-sd: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["given.jsonl"]


def test_damaged_files_are_named(write: Write, tmp_path: Path):
    whole = write(line("7"), name="packed.jsonl.gz").read_bytes()
    for number, content in enumerate((whole[:-9], b"no gzip", whole[:12] + b"\xff" * 20)):
        file = tmp_path / f"{number}.jsonl.gz"
        file.write_bytes(content)
        with pytest.raises(
            InputError, match=r"\.jsonl\.gz cannot be read \(damaged: .+\); give the path of a readable"
        ):
            read_generations(file)


def test_graded_generations_are_read_back(write: Write, tmp_path: Path):
    fields = {"puzzle": PUZZLE, "solution": SOLUTION, "length": 16, "steps": 4}
    texts = [SOLUTION, SOLUTION.replace("1234", "1231", 1)]
    file = write(*({"id": 5, "schedule": "slow", "generation": text, **fields} for text in texts))
    assert main(["grade", str(file), "--task", "sudoku"]) == 0
    first, second = read_generations(tmp_path / "given_graded" / "graded.jsonl")
    assert (first.id, first.attempt, first.correct, first.score, first.parsed) == ("5", 0, True, 1.0, SOLUTION)
    assert (second.id, second.attempt, second.correct, second.score) == ("5", 1, False, 0.5)
    assert (first.generation, first.schedule, dict(first.fields)) == (SOLUTION, "slow", fields)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"correct": True}, ":1: there is no 'id'; give every line the id of its problem"),
        ({"id": None, "correct": True}, ":1: 'id' must be text or a whole number, not None; give every line"),
        ({"id": "a"}, ":1: there is no 'correct'; grade the file first: dllm-sd grade FILE --task NAME"),
        ({"id": "a", "correct": 1}, ":1: 'correct' must be true or false, not 1; grade the file first"),
        ({"id": "a", "correct": True, "score": "high"}, ":1: 'score' must be a number, not 'high'; correct it"),
        ({"id": "a", "correct": True, "score": float("nan")}, ":1: 'score' must be finite, not nan; correct it"),
        ({"id": "a", "correct": True, "generation": 3}, ":1: 'generation' must be text, not 3; correct it or leave"),
    ],
)
def test_what_is_not_graded_is_refused(write: Write, given: Line, words: str):
    with pytest.raises(InputError) as error:
        read_generations(write(given))
    assert words in str(error.value)


def golden_files() -> list[Path]:
    """The published generations with their verdicts, in ``<folder>/golden/`` or in ``<folder>/`` itself."""
    return sorted({path for part in ("golden", "") for path in (fixture_folder() / part).glob("parsers_*_*.jsonl.gz")})


def as_lines(task: str, item: Line) -> Line:
    """A published generation as ``dllm-sd grade`` reads it."""
    gold = item["ground_truth"]
    if task == "countdown":
        fields = {"numbers": gold[0], "target": gold[1]}
    elif task == "sudoku":
        fields = {"puzzle": item["question"].split()[-1], "solution": gold}
    else:
        fields = {"answer": gold}
    return {"id": item["id"], "generation": item["generation"], **fields}


@pytest.mark.fixture
@pytest.mark.parametrize("file", golden_files(), ids=lambda file: file.name.split(".")[0])
def test_compatible_grading_gives_the_published_verdicts(file: Path, write: Write, tmp_path: Path):
    items = [json.loads(text) for text in gzip.decompress(file.read_bytes()).splitlines()]
    totals = {entry["file"]: entry for entry in json.loads((file.parent / "parsers.json").read_text())["files"]}
    total = totals[file.name]
    task = "math" if total["task"] == "math500" else total["task"]
    assert task in TASKS
    given = write(*(as_lines(task, item) for item in items))
    assert main(["grade", str(given), "--task", task, "--mode", "compatible"]) == 0
    report, graded = outcome(tmp_path / "given_graded")
    assert (report["mode"], report["n"]) == ("compatible", len(items))
    assert len(items) == total["items"]
    if task == "sudoku":
        cells = [round(item["score"] * given["empty_cells"]) for item, given in zip(graded, items, strict=True)]
        assert cells == [item["correct_cells"] for item in items]
        assert (sum(cells), sum(item["empty_cells"] for item in items)) == (
            total["correct_cells"],
            total["empty_cells"],
        )
        assert round(100 * report["accuracy"], 2) == round(100 * report["cells"], 2) == total["accuracy_percent"]
        assert sum(item["correct"] for item in graded) == total["solved_puzzles"]
    else:
        assert [item["correct"] for item in graded] == [item["correct"] for item in items]
        assert report["accuracy"] == pytest.approx(total["correct"] / total["items"], abs=1e-12)
        assert round(100 * report["accuracy"], 2) == total["accuracy_percent"]


def test_pass_at_k_of_one_attempt_is_accuracy():
    assert [pass_at_k(5, correct, 1) for correct in range(6)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
