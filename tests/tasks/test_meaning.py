"""No answer whose meaning differs passes, and no way of writing the same fails: random values in random spellings."""

import random
from collections.abc import Callable
from fractions import Fraction
from itertools import combinations

import pytest

from dllm_sd.tasks import Choice, Countdown, Gsm8k, Math, Problem, Sudoku
from dllm_sd.tasks.answers import same_answer
from dllm_sd.tasks.grading import evaluate_expression
from dllm_sd.tasks.grids import grids

Draw = random.Random


def spaced(draw: Draw, text: str) -> str:
    """A text between math marks and spaces that say nothing."""
    return draw.choice(["{}", " {} ", "${}$", r"\({}\)", "{}.", r"\displaystyle {}", r"\,{}"]).format(text)


def whole(draw: Draw, value: int) -> str:
    """A way to write a whole number."""
    sign, digits = draw.choice(["-", "\u2212", "\u2013"]) if value < 0 else "", str(abs(value))
    forms = [digits, f"{digits}.0"]
    if abs(value) >= 1000:
        forms += [f"{abs(value):,}".replace(",", mark) for mark in (",", "{,}", r"\,")]
    return sign + draw.choice(forms)


def rational(draw: Draw, value: Fraction) -> str:
    """A way to write a number."""
    if value.denominator == 1:
        return whole(draw, int(value))
    sign, top, under = "-" if value < 0 else "", abs(value.numerator), value.denominator
    times = draw.choice([1, 1, 2, 3])
    forms = [
        f"{sign}{draw.choice(['d', 't', ''])}".replace("d", "").replace("t", "")
        + rf"\frac{{{top * times}}}{{{under * times}}}",
        rf"{sign}\dfrac{{{top}}}{{{under}}}",
        f"{sign}{top}/{under}",
    ]
    if sign:
        forms += [rf"\frac{{-{top}}}{{{under}}}", rf"\frac{{{top}}}{{-{under}}}"]
    if top > under:
        forms.append(rf"{sign}{top // under}\frac{{{top % under}}}{{{under}}}")
    if under in (2, 4, 5, 8):
        forms.append(f"{sign}{top / under}")
    if top < 10 and under < 10:
        forms.append(rf"{sign}\frac{top}{under}")
    return draw.choice(forms)


def root(draw: Draw, value: tuple[int, int]) -> str:
    """A way to write ``a sqrt(b)``."""
    factor, inside = value
    marks = [rf"\sqrt{{{inside}}}"] + (
        [rf"\sqrt {inside}", rf"\sqrt{inside}", f"\u221a{inside}"] if inside < 10 else []
    )
    return draw.choice([f"{factor}{{}}", rf"{factor} \cdot {{}}", rf"{factor} {{}}"]).format(draw.choice(marks))


def numbers(draw: Draw, values: tuple[int, ...]) -> list[str]:
    return [whole(draw, value) for value in values]


def pair(draw: Draw, value: tuple[str, str, int, int]) -> str:
    """A way to write an interval or a point."""
    opened, closed, first, second = value
    sized = draw.random() < 0.5
    left, right = (rf"\left{opened}", rf"\right{closed}") if sized else (opened, closed)
    return f"{left}{first},{draw.choice(['', ' ', chr(92) + ','])}{second}{right}"


def collection(draw: Draw, value: tuple[int, ...]) -> str:
    """A way to write several answers, which are a set."""
    texts = [str(item) for item in draw.sample(value, len(value))]
    if draw.random() < 0.5:
        return r"\{" + draw.choice([",", ", "]).join(texts) + r"\}"
    return draw.choice([", ", r" \text{ and } ", r" \text{ or } "]).join(texts)


def measure(draw: Draw, value: tuple[int, str]) -> str:
    """A way to write a number with a unit."""
    number, unit = value
    names = {
        "cm": ["cm", "centimeters"],
        "kg": ["kg", "kilograms"],
        "apples": ["apples", "apple"],
        "cm^2": ["square cm"],
    }
    return rf"{number}{draw.choice([' ', chr(92) + ' ', ''])}\text{{ {draw.choice(names[unit])}}}"


def word(draw: Draw, value: str) -> str:
    """A way to write a word."""
    return draw.choice([value, value.capitalize(), rf"\text{{{value}}}", rf"\text{{ {value.capitalize()} }}"])


def polynomial(draw: Draw, value: tuple[int, int, int]) -> str:
    """A way to write ``a x^2 + b x + c``."""
    a, b, c = value
    square, sign = draw.choice(["x^2", "x^{2}", "x^ 2"]), draw.choice(["", " "])
    dot = draw.choice(["", r"\cdot ", " "])
    return (
        f"{a}{dot}{square}{sign}{'+' if b > 0 else '-'}{sign}{abs(b)}{dot}x{sign}{'+' if c > 0 else '-'}{sign}{abs(c)}"
    )


UNITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


def spelled(draw: Draw, value: int) -> str:
    """A way to write a whole number below a million in words, or in digits."""
    if draw.random() < 0.3:
        return str(value)
    if value < 0:
        return f"{draw.choice(['minus', 'negative'])} {spelled_out(draw, -value)}"
    return draw.choice(["{}", r"\text{{{}}}", r"\text{{ {}}}"]).format(spelled_out(draw, value))


def spelled_out(draw: Draw, value: int) -> str:
    """A number as words."""
    if value >= 1000:
        rest = f" {spelled_out(draw, value % 1000)}" if value % 1000 else ""
        return f"{spelled_out(draw, value // 1000)} thousand{rest}"
    if value >= 100:
        rest = f" {draw.choice(['and ', ''])}{spelled_out(draw, value % 100)}" if value % 100 else ""
        return f"{UNITS[value // 100]} hundred{rest}"
    if value < 20:
        teens = ("thir", "four", "fif", "six", "seven", "eigh", "nine")
        return UNITS[value] if value < 13 else f"{teens[value - 13]}teen"
    rest = f"{draw.choice(['-', ' '])}{UNITS[value % 10]}" if value % 10 else ""
    return TENS[value // 10 - 2] + rest


def chain(draw: Draw, value: int) -> str:
    """A way to say how a number is reached."""
    part = draw.randint(1, 20)
    steps = [
        f"{value - part} + {part}",
        f"{value + part} - {part}",
        rf"\frac{{{value * part}}}{{{part}}}",
        rf"\frac{{{value * part + part} - {part}}}{{{part}}}",
        f"2({value}) - {value}",
        rf"\sqrt{{{part * part}}} + {value} - {part}",
    ]
    name = draw.choice(["", "P(A|B) = "])  # with two names that differ answers do, too
    return f"{name}{' = '.join([*draw.sample(steps, draw.randint(1, 2)), str(value)])}"


def named_pair(draw: Draw, value: tuple[int, int]) -> str:
    """A way to write two named values."""
    one, other = value
    pairs = [f"(x, y) = ({one}, {other})", rf"(x,y)=\left({one},{other}\right)"]
    return draw.choice([*pairs, f"x = {one}, y = {other}", rf"y={other} \text{{ and }} x={one}"])


def speed(draw: Draw, value: tuple[int, str]) -> str:
    """A way to write a number with a unit that is a quotient."""
    number, unit = value
    over, under = unit.split("/")
    square = "^2" if under.endswith("^2") else ""
    under = under.removesuffix("^2")
    words = {"km": "kilometers", "m": "meters", "h": "hour", "s": "second"}
    return draw.choice(
        [
            f"{number} {unit}",
            rf"{number} \text{{ {unit}}}",
            rf"{number} \text{{ {over}/{under}}}{square}",
            rf"{number}\frac{{\text{{{over}}}}}{{\text{{{under}}}{square}}}",
            rf"{number}\text{{ {words[over]} per {words[under]}{' squared' if square else ''}}}",
            f"{number} {over}/{under}" + ("\u00b2" if square else ""),
        ]
    )


def matrix(draw: Draw, value: tuple[int, ...]) -> str:
    """A way to write a matrix of two rows."""
    a, b, c, d = value
    inside = rf"{a} & {b} \\ {c} & {d}"
    left, right = draw.choice([("(", ")"), ("[", "]")])
    frames = [("pmatrix", "", "", ""), ("bmatrix", "", "", ""), ("array", "{cc}", rf"\left{left}", rf"\right{right}")]
    name, columns, opened, closed = draw.choice([*frames, ("matrix", "", rf"\left{left}", rf"\right{right}")])
    return rf"{opened}\begin{{{name}}}{columns} {inside} \end{{{name}}}{closed}"


def _rational(draw: Draw) -> Fraction:
    return Fraction(draw.randint(-60, 60), draw.randint(1, 12))


KINDS: dict[str, tuple[Callable[[Draw], object], Callable[[Draw, object], str]]] = {  # pyright: ignore
    "wholes": (lambda draw: draw.choice([-1, 1]) * draw.randint(0, 10 ** draw.randint(1, 7)), whole),
    "rationals": (_rational, rational),
    "roots": (lambda draw: (draw.randint(2, 12), draw.choice([2, 3, 5, 6, 7, 10, 11, 13])), root),
    "pairs": (lambda draw: (*draw.choice(["()", "[]", "(]", "[)"]), draw.randint(-4, 4), draw.randint(-4, 4)), pair),
    "collections": (
        lambda draw: tuple(sorted(draw.sample(range(-4, 5), draw.randint(2, 3)))),
        collection,
    ),
    "measures": (lambda draw: (draw.randint(1, 5), draw.choice(["cm", "kg", "apples", "cm^2"])), measure),
    "words": (lambda draw: draw.choice(["monday", "tuesday", "even", "odd", "not even", "two lines", "lines"]), word),
    "spelled": (lambda draw: draw.choice([-1, 1]) * draw.randint(0, 10 ** draw.randint(1, 6) - 1), spelled),
    "chains": (lambda draw: draw.randint(1, 9), chain),
    "named pairs": (lambda draw: (draw.randint(1, 3), draw.randint(1, 3)), named_pair),
    "speeds": (lambda draw: (draw.randint(1, 5), draw.choice(["km/h", "m/s", "m/s^2", "km/s"])), speed),
    "arrays": (lambda draw: tuple(draw.randint(0, 1) for _ in range(4)), matrix),
    "polynomials": (lambda draw: tuple(draw.choice([-3, -2, 2, 3, 4]) for _ in range(3)), polynomial),
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_equal_exactly_when_they_mean_the_same(kind: str) -> None:
    draw = Draw(kind)
    make, write = KINDS[kind]
    for _ in range(150):
        values = [make(draw) for _ in range(3)]
        texts = [(value, spaced(draw, write(draw, value))) for value in [*values, values[0]]]
        for (one, first), (other, second) in combinations(texts, 2):
            assert same_answer(first, second) is (one == other), (first, second)
            assert same_answer(second, first) is (one == other), (second, first)
        assert all(same_answer(text, text) for _, text in texts)


def test_answers_of_different_kinds_are_different() -> None:
    draw = Draw("kinds")
    texts = [(kind, write(draw, make(draw))) for kind, (make, write) in KINDS.items() for _ in range(12)]
    texts = [(kind, text) for kind, text in texts if kind not in ("measures", "speeds")]
    numeric = {"wholes", "rationals", "spelled", "chains"}
    for (one, first), (other, second) in combinations(texts, 2):
        if one != other and not {one, other} <= numeric:
            assert not same_answer(first, second), (first, second)


FRAMES = [
    r"so \boxed{{{}}}",
    r"\boxed{{1}} no, \boxed{{{}}} as \boxed{{}} asks",
    "<answer>{}</answer>",
    "<answer> {} </answer> <answer>...</answer>",
    "#### {}",
    "The answer is {}.",
]
NUMERIC = [whole, rational]


def test_a_number_is_right_exactly_when_its_value_is() -> None:
    draw, task = Draw("numbers"), Gsm8k()
    for _ in range(1500):
        gold = _rational(draw)
        value = draw.choice([gold, _rational(draw), -gold, gold + 1])
        text = rational(draw, value)
        frame = draw.choice(FRAMES if "\\" not in text else FRAMES[:4])
        grade = task.grade(Problem("x", {"answer": str(gold)}), frame.format(text))
        assert grade.correct is (value == gold), (gold, frame.format(text), grade.parsed)


HEDGES = ["{} or {}", "{}, {}", "{} and {}", "either {} or {}", "{} (or {})", "{} / {}", "maybe {} or maybe {}"]


@pytest.mark.parametrize(
    "frame", [r"\boxed{{{}}}", "<answer>{}</answer>", r"\boxed{{\text{{{}}}}}", "The answer is {}"]
)
@pytest.mark.parametrize("hedge", HEDGES)
def test_two_answers_are_never_both_right(frame: str, hedge: str) -> None:
    draw = Draw(frame + hedge)
    for _ in range(20):
        one, other = draw.sample(range(2, 50), 2)
        text = frame.format(hedge.format(one, other))
        for task in (Gsm8k(), Math()):
            golds = [gold for gold in (one, other) if task.grade(Problem("x", {"answer": str(gold)}), text).correct]
            assert len(golds) < 2, (text, golds)
        letters = [draw.choice("AB"), draw.choice("CD")]
        text = frame.format(hedge.format(*letters))
        problem = {"question": "Which?", "letters": "ABCD"}
        right = [
            letter for letter in "ABCD" if Choice().grade(Problem("x", {**problem, "answer": letter}), text).correct
        ]
        assert not right, (text, right)


def test_options_and_questions_that_are_copied_are_no_choice() -> None:
    draw = Draw("copied")
    for _ in range(200):
        options = [str(number) for number in draw.sample(range(100), 4)]
        form = draw.choice(["{}: {}", "{}) {}", "({}) {}", "{}. {}", "**{}.** {}"])
        lines = [form.format(letter, option) for letter, option in zip("ABCD", options, strict=True)]
        text = draw.choice(["", "Which one?\n", "The options are:\n"]) + draw.choice(["\n", " ", "\n\n"]).join(lines)
        fields = {"question": "Which one?", "options": options}
        for letter in "ABCD":
            assert not Choice().grade(Problem("x", {**fields, "answer": letter}), text).correct, (text, letter)


def test_an_expression_is_right_exactly_when_it_uses_the_numbers_and_reaches_the_target() -> None:
    draw, task = Draw("countdown"), Countdown()
    for _ in range(1500):
        numbers = [draw.randint(1, 9) for _ in range(3)]
        used = draw.choice([numbers, draw.sample(numbers, 3), numbers[:2], [*numbers[:2], draw.randint(1, 9)]])
        text = str(used[0])
        for number in used[1:]:
            text = draw.choice(["({} {} {})", "{} {} {}"]).format(text, draw.choice("+-*/"), number)
        read = evaluate_expression(text)
        target = draw.choice([draw.randint(1, 30), int(read[0]) if read and read[0].denominator == 1 else 7])
        shown = text.replace("*", draw.choice(["*", r"\times", r"\cdot", "\u00d7"])).replace(
            "/", draw.choice("/\u00f7")
        )
        shown += draw.choice(["", f" = {target}"])
        right = read is not None and read[0] == target and sorted(used) == sorted(numbers)
        grade = task.grade(Problem("x", {"numbers": numbers, "target": target}), rf"\boxed{{{shown}}}")
        assert grade.correct is right, (numbers, target, shown)


def test_a_grid_is_right_exactly_when_it_is_the_solution() -> None:
    draw, task = Draw("sudoku"), Sudoku()
    problems = task.problems("dev")
    for number in range(300):
        problem = problems[number]
        solution = problem.fields["solution"]
        grid = draw.choice([solution, draw.choice(grids()), problem.fields["puzzle"], solution[::-1]])
        rows = [grid[place : place + 4] for place in range(0, 16, 4)]
        shown = draw.choice([grid, " ".join(grid), "\n".join(rows), str([[*map(int, row)] for row in rows])])
        text = draw.choice(["<answer>{}</answer>", "<answer>{}</answer> in <answer></answer>", "{}"]).format(shown)
        assert task.grade(problem, text).correct is (grid == solution), (problem.fields, text)
