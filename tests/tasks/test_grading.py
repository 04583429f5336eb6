"""Answers are found where they are marked, read exactly, and never cost more than a moment."""

import time
from fractions import Fraction

import pytest

from dllm_sd.errors import InputError
from dllm_sd.tasks.grading import (
    evaluate_expression,
    final_number,
    gold_number,
    last_answer,
    last_boxed,
    marked_expression,
    only_number,
)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{72}", "72"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{5} and \boxed{6", "5"),
        (r"\boxed{5 and \boxed{6}", "6"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"{ stray \boxed{8}", "8"),
        (r"} stray \boxed {9}", "9"),
        (r"\boxed{\{3\}}", r"\{3\}"),
        (r"\boxed{", None),
        ("boxed{4}", None),
        ("", None),
    ],
)
def test_the_last_closed_box_counts(text: str, inside: str | None):
    assert last_boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("<answer>7</answer>", "7"),
        ("<answer>7</answer> no, <answer>8</answer>", "8"),
        ("<answer>7</answer> no, <answer>8", "7"),
        ("<answer>7 <answer>8</answer>", "8"),
        ("7</answer>", None),
        ("<answer>7", None),
    ],
)
def test_the_last_closed_answer_tag_counts(text: str, inside: str | None):
    assert last_answer(text) == inside


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72),
        ("1,200", 1200),
        (r"1{,}200", 1200),
        (r"1\,200", 1200),
        (r"\$1,200.50", Fraction(2401, 2)),
        ("-$5", -5),
        ("\u22125", -5),
        ("- 5", -5),
        ("50%", 50),
        (r"12.5\%", Fraction(25, 2)),
        ("72.", 72),
        ("72.00", 72),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"\dfrac34", Fraction(3, 4)),
        (r"25\text{ m}^2", 25),
        ("5kg", 5),
        ("3 * 4 = 12 apples", 12),
        ("5, that is 5", 5),
        ("3 or 4", None),
        ("1,2", None),
        ("10^2", None),
        (r"1\frac{1}{2}", Fraction(3, 2)),
        ("1/0", None),
        (r"\frac{1}{0}", None),
        ("none", None),
        ("", None),
        ("\u0667\u0662", None),
        ("7\u0662", None),
        ("\u06672", None),
        ("9" * 41, None),
        ("x2", None),
    ],
)
def test_a_marked_answer_must_hold_one_number(text: str, value: Fraction | int | None):
    assert only_number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"1 <answer>2</answer> #### 3 \boxed{4} 5", 4),
        ("1 <answer>2</answer> #### 3", 2),
        ("1 #### 2\n3", 2),
        ("first 1, then 2.", 2),
        (r"5 \boxed{} <answer> </answer> 6", 6),
        (r"5 \boxed{no idea}", None),
        (r"<answer>\boxed{5}</answer>", 5),
        ("it costs 10 - 4 = 6 dollars", 6),
        ("5-3", 3),
        ("no number", None),
    ],
)
def test_marks_are_tried_in_order_and_a_filled_one_decides(text: str, value: int | None):
    assert final_number(text) == value


@pytest.mark.parametrize(
    ("answer", "value"),
    [("72", 72), ("steps 1\n#### 1,080", 1080), ("#### -3", -3), (5, 5), (0.5, Fraction(1, 2)), ("$18", 18)],
)
def test_gold_answers_keep_commas_and_signs(answer: object, value: Fraction | int):
    assert gold_number(answer, "here") == value


@pytest.mark.parametrize("answer", ["", "seven", None, True, "1/0", [1], "9" * 50, "\u0667"])
def test_a_gold_answer_that_is_no_number_is_the_users_mistake(answer: object):
    with pytest.raises(InputError, match=r"file\.jsonl, line 3: the answer .* is not a number"):
        gold_number(answer, "file.jsonl, line 3")


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("1 + 2 * 3", 7, [1, 2, 3]),
        ("(1 + 2) * 3", 9, [1, 2, 3]),
        ("8 - 4 - 2", 2, [8, 4, 2]),
        ("8 / 4 / 2", 1, [8, 4, 2]),
        ("1 / 3 * 3", 1, [1, 3, 3]),
        ("-2 + 5", 3, [2, 5]),
        ("3 - -2", 5, [3, 2]),
        ("2*-3", -6, [2, 3]),
        ("((((7))))", 7, [7]),
        (" 7\n", 7, [7]),
    ],
)
def test_arithmetic_is_exact_and_lists_its_numbers(text: str, value: int, numbers: list[int]):
    assert evaluate_expression(text) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "()",
        "1 +",
        "+1",
        "* 1",
        "(1",
        "1)",
        "1 2",
        "(1)(2)",
        "9**9**9",
        "9^9",
        "7//2",
        "7%2",
        "1.5",
        "1e3",
        "1_0",
        "1/0",
        "1/(2-2)",
        "x",
        "__import__('os')",
        "\u0663 + 1",
        "1\u00a0+ 1",
        "9" * 41,
        "1+" * 100 + "1",
        "(" * 21 + "1" + ")" * 21,
        "-" * 22 + "1",
        "(" * 100_000,
    ],
)
def test_anything_but_small_arithmetic_has_no_value(text: str):
    assert evaluate_expression(text) is None


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        (r"\boxed{1 + 2}", "1 + 2"),
        (r"\boxed{1+2=3}", "1+2"),
        (r"\boxed{2 \times 3 \div 4 \cdot 5}", "2 * 3 / 4 * 5"),
        ("2 \u00d7 3 \u00f7 4 \u00b7 5 \u2212 1", "2 * 3 / 4 * 5 - 1"),
        (r"<answer>$(1+2)$</answer>", "(1+2)"),
        (r"<answer>3</answer> \boxed{4}", "4"),
        ("1+2", "1+2"),
        ("5%3", "5%3"),
        (r"5\,3", "5 3"),
        ("1+" * 150, None),
        ("= 3", None),
        ("", None),
    ],
)
def test_expressions_are_read_from_marks_or_a_short_text(text: str, expression: str | None):
    assert marked_expression(text) == expression


HOSTILE = {
    "open boxes": r"\boxed{" * 100_000,
    "open boxes with a digit": r"\boxed{5" * 100_000,
    "nested boxes": r"\boxed{" * 10_000 + "5" + "}" * 10_000,
    "open answers": "<answer>" * 100_000,
    "closed answers": "</answer>" * 100_000,
    "braces": "{" * 1_000_000,
    "parentheses": "(" * 100_000 + "1" + ")" * 100_000,
    "boxed parentheses": r"\boxed{" + "(" * 40_000 + "1" + ")" * 40_000 + "}",
    "digits": "7" * 1_000_000,
    "boxed digits": r"\boxed{" + "7" * 90_000 + "}",
    "digits before a foreign digit": "7" * 90_000 + "\u0667",
    "commas": "1," * 500_000,
    "thousands": "111," * 250_000 + "1111",
    "slashes": "1/" * 500_000,
    "points": "1." * 500_000,
    "signs": "-" * 1_000_000,
    "spaces": "7" + " " * 1_000_000,
    "hashes": "#" * 1_000_000,
    "fractions": r"\frac{1" * 200_000,
    "texts": r"\boxed{" + r"\text{" * 15_000 + "}" * 15_001,
    "marked fraction": r"\boxed{\frac{" + "1" * 40_000 + "}{" + "1" * 40_000 + "}}",
    "powers": r"\boxed{9**9**9**9}",
    "zero division": r"\boxed{1/0}",
    "layout": "1 " * 500_000,
    "lone surrogate": "\ud800" * 1000,
    "nothing": "\x00",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("read", [final_number, marked_expression])
def test_hostile_text_is_read_in_bounded_time(name: str, read):
    start = time.process_time()
    read(HOSTILE[name])
    assert time.process_time() - start < 1
