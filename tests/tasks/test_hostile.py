"""Whatever a model writes, every grader answers, quickly, and runs nothing of it."""

import random
import time
from collections.abc import Iterator

import pytest

from dllm_sd.tasks import Choice, Countdown, Gsm8k, Jsonl, Math, Problem, Sudoku, Task, WordProblems
from dllm_sd.tasks.grids import large_grid
from dllm_sd.tasks.sources import Draws
from tests.tiers import later

LARGE = large_grid(Draws(1))
NUMBER = {"answer": "98", "numbers": [44, 19, 35], "target": 98}
SMALL = {"puzzle": "0204341221034301", "solution": "1234341221434321"}
GRADERS: dict[str, tuple[Task, dict]] = {
    "gsm8k": (Gsm8k(), NUMBER),
    "gsm8k compatible": (Gsm8k(mode="compatible"), NUMBER),
    "math": (Math(), {"answer": "\\frac{1}{2}"}),
    "math compatible": (Math(mode="compatible"), {"answer": "\\frac{1}{2}"}),
    "countdown": (Countdown(), NUMBER),
    "countdown compatible": (Countdown(mode="compatible"), NUMBER),
    "word_problems": (WordProblems(), NUMBER),
    "sudoku": (Sudoku(), SMALL),
    "sudoku compatible": (Sudoku(mode="compatible"), SMALL),
    "sudoku 9x9": (Sudoku(size=9), {"puzzle": "0" + LARGE[1:], "solution": LARGE}),
    "choice": (Choice(), {"question": "Which?\nA: a\nB: b", "answer": "B"}),
    "choice of texts": (Choice(), {"options": ["one", "two"], "answer": 1}),
    "jsonl exact": (Jsonl(), {"answer": "x"}),
    "jsonl number": (Jsonl(grader="number"), {"answer": "98"}),
    "jsonl expression": (Jsonl(grader="expression"), {"answer": "98"}),
    "jsonl math": (Jsonl(grader="math"), {"answer": "x"}),
    "jsonl choice": (Jsonl(grader="choice"), {"question": "A: a\nB: b", "answer": "B"}),
}
PIECES = [
    *(
        "\\boxed{",
        "\\boxed ",
        "}",
        "{",
        "<answer>",
        "</answer>",
        "```",
        "####",
        "\\frac",
        "\\frac{1}{2}",
        "\\text{ cm}",
    ),
    *(
        "\\sqrt",
        "\\div",
        "\\times",
        "\\left(",
        "\\right)",
        "\\%",
        "\\$",
        "$",
        "=",
        "/",
        "//",
        "**",
        "*",
        "+",
        "-",
        "(",
        ")",
    ),
    *("44", "19", "35", "98", "1,200", "1e999999", "9" * 50, "0.5", ".", "\u0663", "\u0667\u0662", "\u2212", "\u00bd"),
    *("<|eot_id|>", "<|endoftext|>", "\n", " ", "\t", "\x00", "\ud800", "\U0001f600", "A", "B", "(C)", "answer is B"),
    *("1234341221434321", "x", "__import__('os').abort()", "nan", "inf", "\\", "^", "!", ",", "|", "[", "]", "\u00a0"),
]


def crafted() -> Iterator[str]:
    """Towers, nests, floods and injections, bare and inside every mark."""
    bodies = [
        *("90**80**5", "9**9**9**9", "2**2**2**2**2**2", "44**19**35", "-9**9**9", "9^9^9^9", "9!!!!!!", "44//19**35"),
        *("1/0", "44/(19-19)+35", "0**-1", "1%0", "1e999999", "-1e999999", "1e-999999", "nan", "inf", "-inf", "1_0"),
        *("(" * 1_000_000, ")" * 1_000_000, "(" * 500_000 + "1" + ")" * 500_000, "-" * 1_000_000 + "1", "1+" * 300_000),
        *("7" * 1_000_000, "7" * 4301 + "/" + "7" * 4301, "0." + "3" * 90_000, "1," * 300_000, "1 " * 300_000),
        *("\u0663" * 90_000, "\uff11\uff12", "\u00b2", "44\u00d719", "{" * 500_000, "}" * 500_000, "{}" * 200_000),
        *("\\boxed{" * 100_000, "\\boxed{5" * 50_000, "\\boxed{\n" * 50_000 + "}", "\\boxed " * 100_000, "\\boxed"),
        *(
            "\\fbox{" * 50_000,
            "<answer>" * 100_000,
            "</answer>" * 100_000,
            "<answer></answer>" * 50_000,
            "```" * 200_000,
        ),
        *("``` 1 " * 100_000, "\\frac" * 100_000, "\\frac1" * 50_000, "\\sqrt" * 100_000, "\\sqrt3" * 80_000),
        *(
            "\\text{ " * 80_000,
            "\\text{a}" * 80_000,
            "a/b" * 100_000,
            "=" * 500_000,
            "1=" * 200_000,
            "+" * 90_000 + "=1",
        ),
        *(
            " " * 1_000_000,
            "\n" * 1_000_000,
            "x" * 3_000_000,
            "\x00" * 100_000,
            "\ud800" * 50_000,
            "<|eot_id|>" * 80_000,
        ),
        *("__import__('os').abort()", "().__class__.__bases__[0]", "exit()", "{0.__class__}", "%s%n", "${7*7}", "`id`"),
        *("answer is " * 80_000, "answer is B" * 50_000, "(A)" * 200_000, "A\n" * 200_000, "option " * 90_000),
        *(
            "[" * 500_000 + "1234341221434321",
            "1234" * 200_000,
            "1" * 17,
            "<b>44</b>",
            "<!--",
            "&lt;98&gt;",
            "\\(98\\)",
        ),
    ]
    for body in bodies:
        for pattern in (
            "{}",
            "\\boxed{{{}}}",
            "\\boxed {}$",
            "<answer>{}</answer>",
            "<answer>```{}```</answer>",
            "#### {}",
        ):
            yield pattern.format(body)
        yield f"\\boxed{{{body}"


QUICK = 0.1
"""Seconds of a core, on machines that other programs make twice as slow."""


def scattered(count: int, seed: int = 0) -> Iterator[str]:
    """Random strings, half of pieces that graders look for, half of any characters."""
    draws = random.Random(seed)
    for number in range(count):
        length = draws.choice((3, 10, 40, 150))
        if number % 2:
            yield "".join(draws.choices(PIECES, k=length))
        else:
            yield "".join(map(chr, draws.choices(range(0x3000), k=length)))


def seconds(texts: Iterator[str]) -> list[tuple[float, str, str]]:
    """How long each grader took for each text, sorted; fails on any verdict that is none."""
    spent = []
    problems = {name: Problem(name, fields) for name, (_, fields) in GRADERS.items()}
    for text in texts:
        for name, (task, _) in GRADERS.items():
            start = time.process_time()
            verdict = task.grade(problems[name], text)
            spent.append((time.process_time() - start, name, text[:60]))
            assert 0 <= verdict.score <= 1
            assert verdict.correct <= (verdict.score == 1)
    return sorted(spent)


def check(spent: list[tuple[float, str, str]]) -> None:
    late = spent[min(int(0.9999 * len(spent)), len(spent) - 1)]
    assert late[0] <= QUICK, late
    assert spent[-1][0] < 1, spent[-1]


@pytest.mark.parametrize(("share", "step"), [(1 / 64, 6), *later((1 / 64, 1), (1, 6))])
def test_crafted_texts_are_graded_quickly(share: float, step: int) -> None:
    """Beginnings of the texts in the first tier: what is quadratic shows there too, by a lower bound.

    There are seven texts of each body, so that every sixth is of each body at least one, of all patterns in turn.
    """
    texts = [text[: max(200, int(share * len(text)))] for text in crafted()][::step]
    assert len(texts) > 500 // step
    spent = seconds(iter(texts))
    assert spent[-1][0] < 1, spent[-1]
    assert spent[int(0.99 * len(spent))][0] <= QUICK, spent[int(0.99 * len(spent))]


def test_random_texts_are_graded_quickly() -> None:
    check(seconds(scattered(400)))


@pytest.mark.slow
def test_many_random_texts_are_graded_quickly() -> None:
    check(seconds(scattered(5_000, seed=1)))
