"""Make the data and the tokenizer of the tiny reader, on which methods with written hints are measured.

python tools/make_tiny_reader.py runs/reader            # tokenizer, training data, data of the methods, skill bank
dllm-sd train configs/tiny_reader_sft.yaml              # the autoregressive model; about eight minutes on one core

The task is 4x4 Sudoku with a space between rows. The solution is written in tagged steps. A hint in brackets before the
question may be a rubric (some of the cells, one per line), a critique in any of its three forms, or a skill.
"""

import json
import re
import sys
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

from make_tiny_asset import CHARACTERS, word_tokenizer

from dllm_sd.config import build_config
from dllm_sd.randomness import make_key
from dllm_sd.skills import PAIR, Bank, Mistake, Skill, format_pair, numbered, retrieve, write_bank
from dllm_sd.tasks.grids import worked_steps
from dllm_sd.tasks.sources import Draws
from dllm_sd.tasks.task import Split
from dllm_sd.texts import FORMS
from dllm_sd.texts.critique import RIGHT_STEP, WRONG_STEP

ROWS = 100_000
TRAINING = 20_000
TESTING = 1024
KINDS = {
    **{"plain": 540, "worked": 100, "rubric": 90, "skill": 70, "ask_rubric": 50, "gold_rubric": 30},
    **dict.fromkeys(FORMS, 40),
}
"""Rows per thousand by the hint in the prompt."""
MOST_STEPS = 10
STEP = re.compile(r"<step_\d+>([1-4])([1-4])=([1-4])</step_\d+>")


def in_rows(grid: str) -> str:
    """16 digits with a space between rows."""
    return " ".join(grid[i : i + 4] for i in range(0, 16, 4))


def trace(steps: Sequence[str], grid: str) -> str:
    """A solution in tagged steps."""
    tagged = "".join(f"<step_{i}>{step}</step_{i}>" for i, step in enumerate(steps, 1))
    return f"{tagged}<answer>{in_rows(grid)}</answer>"


def corrected(puzzle: str, solution: str, text: str) -> str:
    """A perfect critic's correction of a trace: its right steps, then forced steps from the first wrong one on.

    A step is right if it fills an empty cell as in the solution. ``puzzle`` and ``solution`` are 16 digits.
    """
    cells, kept = list(puzzle), []
    for row, column, digit in STEP.findall(text):
        cell = 4 * (int(row) - 1) + int(column) - 1
        if cells[cell] != "0" or solution[cell] != digit:
            break
        cells[cell] = digit
        kept.append(f"{row}{column}={digit}")
    left = worked_steps("".join(cells), solution).split("\n") if "0" in cells else []
    return trace([*kept, *left], solution)


def flawed(puzzle: str, solution: str, draws: Draws) -> str:
    """A trace with errors: two steps may be swapped, and a wrong digit may be followed by more of them."""
    steps = worked_steps(puzzle, solution).split("\n")
    place = draws.below(len(steps) - 1)
    if draws.below(2):
        steps[place : place + 2] = reversed(steps[place : place + 2])
    grid, wrong = list(solution), draws.below(len(steps) + 2)
    for number in range(wrong, len(steps)):
        row, column, _, digit = steps[number]
        other = str(1 + (int(digit) + draws.below(3)) % 4) if number == wrong or draws.below(2) else digit
        steps[number] = f"{row}{column}={other}"
        grid[4 * (int(row) - 1) + int(column) - 1] = other
    return trace(steps, "".join(grid))


def bank() -> Bank:
    """A bank of skills that fill a row with one empty cell, and of mistakes in filling it."""
    skills, mistakes = [], []
    for digits in permutations("1234"):
        for hole in range(4):
            full = "".join(digits)
            row = f"{full[:hole]}0{full[hole + 1 :]}"
            bad = f"{full[:hole]}{full[(hole + 1) % 4]}{full[hole + 1 :]}"
            skills.append(Skill("", row, f"{row}={full}", row))
            mistakes.append(Mistake("", f"{row}={bad}", row, f"{row}={full}"))
    return Bank(numbered(skills), numbered(mistakes))


def make_tokenizer(folder: Path) -> None:
    """Write a tokenizer with one token per character, tag, and word of the prompts around a hint."""
    tags = [f"<{slash}step_{number}>" for number in range(1, MOST_STEPS + 7) for slash in ("", "/")]
    words = sorted(set(re.findall(r" ?[A-Za-z]+", " ".join([re.sub(r"\{\w+\}", "", PAIR), RIGHT_STEP, WRONG_STEP]))))
    vocabulary = [*CHARACTERS, ".", "?", *tags, "<answer>", "</answer>", *words]
    pattern = r"</?(?:step_\d+|answer)>| ?[A-Za-z]+|[\s\S]"
    word_tokenizer(vocabulary, pattern).save_pretrained(str(folder))


def imitated(puzzle: str, solution: str, kind: str, skills: Bank, draws: Draws) -> tuple[str, str]:
    """A prompt and its completion."""
    question = f"{in_rows(puzzle)}:"
    steps = worked_steps(puzzle, solution).split("\n")
    worked, rubric = trace(steps, solution), "\n".join(criteria(steps))
    if kind == "plain":
        return question, worked
    if kind == "ask_rubric":
        return f"?{question}", rubric
    if kind == "gold_rubric":
        return f"({rubric})?{question}", rubric
    if kind == "rubric":
        lines = rubric.split("\n")
        return "({}){}".format("\n".join(lines[i] for i in draws.shuffled(len(lines))), question), worked
    if kind == "skill":
        pairs = retrieve(skills, question, 4)
        return f"({format_pair(pairs[draws.below(4)])}){question}", worked
    text = worked if kind == "worked" else flawed(puzzle, solution, draws)
    right = corrected(puzzle, solution, text)
    hint = text if kind == "worked" else next(write for form, write in FORMS.items() if form == kind)(text, right)
    return f"({hint}){question}", right


def criteria(steps: Sequence[str]) -> list[str]:
    """The rubric of a puzzle: its last four steps, which depend on the others."""
    return list(steps[-4:])


def make_data(folder: Path) -> None:
    """Write imitated.jsonl, the training and test data of the methods, and the skill bank."""
    task = build_config({"task": {"name": "sudoku"}, "model": {"path": "tiny"}}).task
    kinds = [kind for kind, share in KINDS.items() for _ in range(share)]
    skills = bank()
    write_bank(skills, folder / "bank.json")
    with (folder / "imitated.jsonl").open("w", encoding="utf-8") as file:
        for i, problem in zip(range(ROWS), task.problems("train"), strict=False):
            draws = Draws(make_key("tiny_reader", i))
            kind = kinds[draws.below(len(kinds))]
            puzzle, solution = problem.fields["puzzle"], problem.fields["solution"]
            prompt, text = imitated(puzzle, solution, kind, skills, draws)
            final = in_rows(solution) if "<answer>" in text else text
            file.write(json.dumps({"kind": kind, "prompt": prompt, "text": text, "answer": final}) + "\n")
    sizes: dict[Split, int] = {"train": TRAINING, "test": TESTING}
    for split, count in sizes.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for _, problem in zip(range(count), task.problems(split), strict=False):
                puzzle, solution = problem.fields["puzzle"], problem.fields["solution"]
                steps = worked_steps(puzzle, solution).split("\n")
                row = {
                    "puzzle": puzzle,
                    "solution": solution,
                    "rows": in_rows(puzzle),
                    "answer": in_rows(solution),
                    "worked": trace(steps, solution),
                    "rubric": criteria(steps),
                    "lines": "\n".join(criteria(steps)),
                    "domain": "few" if puzzle.count("0") < 9 else "many",
                }
                file.write(json.dumps(row) + "\n")
    for domain in ("few", "many"):
        lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        in_domain = [line for line in lines if json.loads(line)["domain"] == domain]
        (folder / f"{domain}.jsonl").write_text("".join(in_domain), encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    make_tokenizer(target / "tokenizer")
    make_data(target)
