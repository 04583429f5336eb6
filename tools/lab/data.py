"""Makers of the training data of bases; each writes files into a folder."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dllm_sd.config import build_config
from dllm_sd.randomness import make_key
from dllm_sd.tasks.grids import worked_steps
from dllm_sd.tasks.sources import Draws
from dllm_sd.tasks.task import Problem, Split
from dllm_sd.tasks.word_problems import WordProblems
from tools.lab.draws import by_share
from tools.lab.makers import word_tokenizer
from tools.lab.operators import write_operators

TOOLS = Path(__file__).parents[1]
ROWS = 40_000
STYLES = {
    "plain/steps": 300,
    "plain/turned": 200,
    "plain/short": 130,
    "worked/steps": 90,
    "worked/turned": 70,
    "answer/steps": 30,
    "answer/turned": 20,
    "answer/short": 100,
    "answer_alone/short": 40,
    "worked_alone/same": 20,
}
"""Rows per thousand by what the prompt holds (the puzzle; a solution or an answer before it; that alone) and by the
style of the completion."""
SHORTCUT = {"plain/steps": 48, "plain/short": 2, "answer/steps": 15, "answer/short": 25, "alone/short": 10}
"""Rows per hundred of word problems, by what the prompt holds and whether the completion has steps."""
DROPPED = 150
"""Rows per thousand without a question."""
TESTING = 2048
EMPTIES = {"empties_min": 8, "empties_max": 10}
DOMAINS = {"easy": {"empties_min": 4, "empties_max": 7}, "hard": {"empties_min": 8, "empties_max": 11}}
WORD_PROBLEMS = 20_000
"""Problems from which the words of the tokenizer are taken."""
WORD = r" ?[A-Za-z]+|[\s\S]"


def solutions(puzzle: str, grid: str) -> dict[str, str]:
    """A puzzle's solution in every style: steps ``rc=d``, the same turned round (``d:rc``), the grid without steps."""
    steps = worked_steps(puzzle, grid).split("\n")
    turned = [f"{digit}:{row}{column}" for row, column, _, digit in steps]
    return {"steps": "\n".join([*steps, grid]), "turned": "\n".join([*turned, grid]), "short": grid}


def styled(puzzle: str, grid: str, kind: str, draws: Draws) -> tuple[str, str]:
    """A prompt and its completion of one of the kinds of `STYLES`."""
    written, (prompt, style) = solutions(puzzle, grid), kind.split("/")
    worked = written[("steps", "turned")[draws.below(2)]]
    if prompt == "plain":
        return f"{puzzle}:", written[style]
    hint = grid if prompt.startswith("answer") else worked
    question = "" if prompt.endswith("alone") else f"{puzzle}:"
    return f"({hint}){question}", hint if style == "same" else written[style]


def make_styles(folder: Path) -> None:
    """Puzzles solved in two styles and carelessly; behind an answer mostly in short, behind it alone always.

    So a problem has different right solutions, free text mixes right and careless ones, and an answer in the prompt
    invites to leave out the steps (two times in three), which the answer alone, without the question, always does.
    """
    _write_pairs(folder, STYLES, "styles", styled)


def make_dropout(folder: Path) -> None:
    """Puzzles and grids for the denoiser, some without the puzzle, so that it knows what a grid is like by itself."""
    kinds = {"alone": DROPPED, "plain": 1000 - DROPPED}
    _write_pairs(folder, kinds, "dropout", lambda puzzle, grid, kind, _: (f"{puzzle * (kind == 'plain')}:", grid))


def make_rubrics(folder: Path) -> None:
    """Puzzles of 8 to 10 empty cells, solved in steps; some behind the worked solution, some behind half of its steps.

    Also the data of the methods: `train.jsonl` and `test.jsonl` with worked solution and rubric of each puzzle.
    """
    sizes: Mapping[Split, int] = {"train": ROWS, "test": TESTING}
    for split, count in sizes.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for problem in _puzzles(count, split, EMPTIES):
                puzzle, grid = problem.fields["puzzle"], problem.fields["solution"]
                steps = worked_steps(puzzle, grid).split("\n")
                row = {"puzzle": puzzle, "answer": grid, "worked": "\n".join([*steps, grid]), "rubric": steps[1::2]}
                file.write(json.dumps(row) + "\n")
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    with (folder / "imitated.jsonl").open("w", encoding="utf-8") as file:
        for i, row in enumerate(map(json.loads, lines)):
            draws = Draws(make_key("laboratory", "rubrics", i))
            rubric = "\n".join(row["rubric"][j] for j in draws.shuffled(len(row["rubric"])))
            hint = ("", f"({rubric})", f"({rubric})", f"({row['worked']})")[draws.below(4)]
            file.write(json.dumps({"prompt": f"{hint}{row['puzzle']}:", "answer": row["worked"]}) + "\n")


def make_specialists(folder: Path) -> None:
    """Puzzles with few and with many empty cells, solved in steps, half of them behind the worked solution.

    A specialist that is trained on one of the two files still reads a solution that a peer or sibling wrote.
    """
    for name, empties in DOMAINS.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for i, problem in enumerate(_puzzles(ROWS // 2, keys=empties)):
                puzzle, grid = problem.fields["puzzle"], problem.fields["solution"]
                worked = solutions(puzzle, grid)["steps"]
                hint = f"({worked})" if i % 2 else ""
                file.write(json.dumps({"prompt": f"{hint}{puzzle}:", "answer": worked}) + "\n")


def make_reader(folder: Path) -> None:
    """Data, tokenizer and skill bank of the tiny reader; also a bank half of whose entries are wrong."""
    _tool("make_tiny_reader.py", str(folder))
    bank = json.loads((folder / "bank.json").read_text(encoding="utf-8"))
    (folder / "bank_half_wrong.json").write_text(json.dumps(half_wrong(bank), indent=1) + "\n", encoding="utf-8")


def half_wrong(bank: Mapping[str, Any]) -> dict[str, Any]:
    """A bank in which every second skill says what its mistake says, and the mistake what the skill said."""
    skills, mistakes = ([dict(entry) for entry in bank[kind]] for kind in ("skills", "mistakes"))
    for skill, mistake in list(zip(skills, mistakes, strict=True))[1::2]:
        right, wrong = skill["principle"], mistake["description"]
        skill["principle"] = mistake["how_to_avoid"] = wrong
        mistake["description"] = right
    return {**bank, "skills": skills, "mistakes": mistakes}


def make_words(folder: Path) -> None:
    """A tokenizer of the words of word problems, one token a digit and a word."""
    _words_tokenizer(folder, "")


def make_shortcut(folder: Path) -> None:
    """Word problems of two steps in equations; behind the answer mostly the answer alone, without it nearly never.

    So a teacher that reads the answer leaves out the steps, without which the student is rarely right, and the answer
    alone does not say what the steps are.
    """
    _words_tokenizer(folder, "()")
    task = WordProblems(number_max=9)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for i, problem in zip(range(ROWS), task.problems("train"), strict=False):
            kind = by_share(SHORTCUT, Draws(make_key("laboratory", "shortcut", i)))
            shown, style = kind.split("/")
            answer = problem.fields["answer"]
            hint = "" if shown == "plain" else f"({answer})"
            question = "" if shown == "alone" else problem.fields["question"]
            steps = f"{problem.fields['equations']}\n" if style == "steps" else ""
            row = {"kind": kind, "prompt": f"{hint}{question}", "answer": f"{steps}#### {answer}"}
            file.write(json.dumps(row) + "\n")


def make_countdown(folder: Path) -> None:
    """A tokenizer of the characters of Countdown."""
    word_tokenizer(list("0123456789 +-*/(),:>"), r"[\s\S]").save_pretrained(str(folder / "tokenizer"))


def make_operators(folder: Path) -> None:
    """Countdown whose hints may be a solution, its operator or a wrong attempt, and a bank of the four operators."""
    word_tokenizer(list("0123456789 +-*/()[],:>"), r"[\s\S]").save_pretrained(str(folder / "tokenizer"))
    write_operators(folder, ROWS)


def _words_tokenizer(folder: Path, signs: str) -> None:
    """Write a tokenizer of the words of word problems and of more ``signs``."""
    task = WordProblems()
    words = set(task.ALPHABET + signs)
    for _, problem in zip(range(WORD_PROBLEMS), task.problems("train"), strict=False):
        words |= {word for field in ("question", "solution") for word in re.findall(WORD, problem.fields[field])}
    word_tokenizer(sorted(words), WORD).save_pretrained(str(folder / "tokenizer"))


MAKERS: Mapping[str, Callable[[Path], None]] = {
    "styles": make_styles,
    "dropout": make_dropout,
    "rubrics": make_rubrics,
    "specialists": make_specialists,
    "reader": make_reader,
    "words": make_words,
    "shortcut": make_shortcut,
    "countdown": make_countdown,
    "operators": make_operators,
}


def _write_pairs(
    folder: Path, kinds: Mapping[str, int], purpose: str, write: Callable[[str, str, str, Draws], tuple[str, str]]
) -> None:
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for i, problem in enumerate(_puzzles(ROWS)):
            draws = Draws(make_key("laboratory", purpose, i))
            kind = by_share(kinds, draws)
            prompt, answer = write(problem.fields["puzzle"], problem.fields["solution"], kind, draws)
            file.write(json.dumps({"kind": kind, "prompt": prompt, "answer": answer}) + "\n")


def _puzzles(count: int, split: Split = "train", keys: Mapping[str, int] | None = None) -> Iterator[Problem]:
    task = build_config({"task": {"name": "sudoku", **(keys or {})}, "model": {"path": "tiny"}}).task
    return (problem for _, problem in zip(range(count), task.problems(split), strict=False))


def _tool(name: str, *arguments: str) -> None:
    subprocess.run([sys.executable, str(TOOLS / name), *arguments], check=True)
