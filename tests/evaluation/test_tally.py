"""Grading a file as a stream gives what grading it in memory gives, and keeps a few bytes of each line."""

import json
import random
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.evaluation.estimates import wilson_interval
from dllm_sd.evaluation.generations import grade_file, stream_generations, summarise
from dllm_sd.tasks import Choice, Countdown, Grade, Gsm8k, Problem, Sudoku
from dllm_sd.tasks.task import Task
from tests.tiers import later

Line = dict[str, Any]


class Weighed(Gsm8k):
    """Partial scores, and figures that look at every line and problem, forwards and at will."""

    def grade(self, problem: Problem, completion: str) -> Grade:
        found = super().grade(problem, completion)
        return Grade(found.correct, len(completion) / 30, found.parsed)

    def summary(self, graded: Sequence[tuple[Problem, Grade]]) -> dict[str, float]:
        last = graded[len(graded) - 1], graded[-1], list(graded)[-1], graded[-1:][0]
        assert all(item == last[0] for item in last)
        return {f"line {i} of {problem.id}": grade.score for i, (problem, grade) in enumerate(graded)}

    def chance(self, problems: Sequence[Problem]) -> float | None:
        return sum(i * problem.fields["weight"] for i, problem in enumerate(problems))


class Easy(Gsm8k):
    """Its verdicts take no time."""

    def grade(self, problem: Problem, completion: str) -> Grade:
        return Grade(True, 1.0, completion)


def numbers(rng: random.Random) -> Line:
    answer = str(rng.randrange(3))
    text = rng.choice([r"so \boxed{%s}", "I say %s", "nothing \ud800 \u2028"])
    generation = text % rng.randrange(3) if "%" in text else text
    return {"generation": generation, "answer": answer, "weight": rng.random()}


def letters(rng: random.Random) -> Line:
    letters = "ABCDEF"[: rng.randrange(2, 7)]
    return {"generation": rng.choice(letters), "answer": rng.choice(letters), "letters": letters}


def targets(rng: random.Random) -> Line:
    a, b = rng.randrange(1, 9), rng.randrange(1, 9)
    return {"generation": rf"\boxed{{{a} + {b}}}", "numbers": [a, b], "target": rng.choice([a + b, a * b])}


def puzzles(rng: random.Random) -> Line:
    solution = "1234341221434321"
    puzzle = "".join(rng.choice((cell, "0")) for cell in solution)
    generation = "".join(
        rng.choice((cell, "1")) if hole == "0" else cell for cell, hole in zip(solution, puzzle, strict=True)
    )
    return {"generation": f"<answer>{generation}</answer>", "puzzle": puzzle, "solution": solution}


KINDS: dict[str, tuple[Task, Callable[[random.Random], Line]]] = {
    "numbers": (Weighed(), numbers),
    "choice": (Choice(), letters),
    "countdown": (Countdown(), targets),
    "sudoku": (Sudoku(), puzzles),
    "compatible": (Sudoku(mode="compatible"), puzzles),
}


def named(rng: random.Random, lines: list[Line], naming: str) -> list[Line]:
    """The lines with ids, attempts and schedules, in mixed order."""
    if naming == "nothing":
        return lines
    if naming == "schedules":
        return [{**line, "schedule": rng.choice(["slow", "fast"])} for line in lines]
    asked = [(i % 11, i // 11) for i in range(len(lines))]
    rng.shuffle(asked)
    many = [{"id": i, "attempt": attempt, **line} for (i, attempt), line in zip(asked, lines, strict=True)]
    if naming == "attempts":
        return many
    return [{**line, "schedule": f"s{line['attempt'] % 2}", "id": f"p{line['id']}"} for line in many]


def oracle(task: Task, lines: list[Line]) -> dict[str, Any]:
    """All of it in memory."""
    schedules: dict[str | None, list[tuple[Problem, Grade]]] = {}
    for number, line in enumerate(lines, 1):
        name = str(line["id"]) if "id" in line else f"line {number}"
        problem = Problem(name, {key: value for key, value in line.items() if key != "generation"})
        schedules.setdefault(line.get("schedule"), []).append((problem, task.grade(problem, line["generation"])))
    trees = {}
    for schedule, graded in schedules.items():
        problems: dict[str, list[Grade]] = {}
        for problem, grade in graded:
            problems.setdefault(problem.id, []).append(grade)
        chance = task.chance(list({problem.id: problem for problem, _ in graded}.values()))
        tree: dict[str, Any] = summarise(problems.values()) | task.summary(graded)
        tree |= {} if chance is None else {"chance": chance}
        trees[schedule] = tree | {"ci95": list(wilson_interval(tree["accuracy"], tree["n"]))}
    first = next(iter(trees))
    return trees[first] | ({} if len(trees) == 1 else {"schedule": first, "schedules": trees})


@pytest.mark.parametrize("naming", ["nothing", "schedules", "attempts", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_gives_the_report_and_the_lines_of_the_whole_file_in_memory(tmp_path: Path, kind: str, naming: str):
    task, make = KINDS[kind]
    rng = random.Random(f"{kind} {naming}")
    lines = named(rng, [make(rng) for _ in range(66)], naming)
    file = tmp_path / "given.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = grade_file(file, task, tmp_path / "out", name="it")
    expected = {"task": "it", "mode": "default", **oracle(task, lines), "settings": {}}
    assert found == expected
    assert (tmp_path / "out" / "report.json").read_text() == json.dumps(expected, indent=1)
    graded = (tmp_path / "out" / "graded.jsonl").read_text().splitlines()
    for text, line in zip(graded, lines, strict=True):
        grade = task.grade(Problem("", line), line["generation"])
        verdict = {"correct": grade.correct, "score": grade.score, "parsed": grade.parsed}
        assert text == json.dumps({**line, **verdict})


def held(count: int, tmp_path: Path, work: Callable[[Path], Any], naming: dict[str, Any]) -> int:
    """Bytes that are held at most while a file of ``count`` lines is worked on."""
    file = tmp_path / f"{count}.jsonl"
    with file.open("w") as lines:
        for i in range(count):
            fields = {key: f"p{i // value}" for key, value in naming.items()}
            line = {**fields, "generation": f"it is {i}", "answer": str(i), "correct": True, "more": [i] * 20}
            lines.write(json.dumps(line) + "\n")
    work(file)  # caches are filled
    tracemalloc.start()
    work(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize(
    ("naming", "most"), [({"id": 8}, 80), *later(({}, 70), ({"id": 1}, 250))], ids=["attempts", "no ids", "ids"]
)
def test_a_graded_line_leaves_tens_of_bytes(tmp_path: Path, naming: dict[str, Any], most: int):
    def work(file: Path) -> None:
        grade_file(file, Easy(), tmp_path / "out", name="gsm8k")

    small, large = (held(count, tmp_path, work, naming) for count in (200, 1200))
    assert (large - small) / 1000 < most


def test_a_line_that_is_read_to_be_compared_leaves_nothing_of_its_text(tmp_path: Path):
    def work(file: Path) -> None:
        assert sum(item.correct for item in stream_generations(file)) == int(file.stem)

    small, large = (held(count, tmp_path, work, {"id": 1}) for count in (200, 1200))
    assert (large - small) / 1000 < 250
