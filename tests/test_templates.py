"""Wordings of the teachers' prompts are compared on texts that say what their writers would, and no more."""

from collections.abc import Callable

import pytest

from dllm_sd.tasks import Problem, WordProblems
from dllm_sd.teachers import HINTS as PARTS
from dllm_sd.teachers import Reference
from dllm_sd.teachers.written import COMMENT
from dllm_sd.texts import parse_rubric
from dllm_sd.texts.critique import parse_steps
from tools.lab import reader_templates
from tools.lab.claims import read_laboratory
from tools.lab.templates import DATA, HINTS, feedback, read_rows, skills, table

PAGE = DATA.parents[1] / "smollm2.md"


@pytest.fixture(scope="module", params=[1, 2, 3])
def problems(request: pytest.FixtureRequest) -> list[Problem]:
    return list(WordProblems(steps=request.param).problems("dev")[:40])


def test_every_hint_that_shows_a_text_is_compared_in_several_wordings() -> None:
    assert set(HINTS) - {"answer"} == set(PARTS) - {"no_question"}
    for name, compared in HINTS.items():
        assert len(set(compared.templates.values())) == len(compared.templates) >= 3, name
        assert all("{question}" in template and "{hint}" in template for template in compared.templates.values())


def test_right_texts_are_graded_right(problems: list[Problem]) -> None:
    for problem in problems:
        for name in ("reference", "answer", "sibling", "critique"):
            assert WordProblems().grade(problem, HINTS[name].text(problem)).correct, name


@pytest.mark.parametrize("text", [feedback, skills])
def test_advice_names_the_operation_and_no_result(problems: list[Problem], text: Callable[[Problem], str]) -> None:
    words = {"+": "add", "-": "subtract", "*": "ultiply", "/": "ivide"}
    for problem in problems:
        equations = [line.split() for line in problem.fields["equations"].splitlines()]
        said = text(problem)
        assert words[equations[0][1]] in said
        numbers = {word.strip(".") for word in said.split()}
        operands = {word for equation in equations for word in (equation[0], equation[2])}
        assert problem.fields["answer"] not in numbers - operands


def test_written_forms_are_those_that_the_hints_read(problems: list[Problem]) -> None:
    for problem in problems:
        rubric, copied = parse_rubric(HINTS["rubric"].text(problem)), parse_steps(HINTS["critique"].text(problem))
        assert not isinstance(rubric, str)
        assert not isinstance(copied, str)
        assert len(copied.steps) == len(rubric.criteria) - 1 == len(problem.fields["equations"].splitlines())


@pytest.mark.parametrize("name", HINTS)
def test_the_wording_that_was_best_is_the_default(name: str) -> None:
    rows = [row for row in read_rows(DATA) if row["hint"] == name]
    if len(rows) < len(HINTS[name].templates):
        pytest.skip("not all wordings are measured yet")
    if name in ("reference", "answer"):
        shipped = Reference(source="solution" if name == "reference" else "answer").wording
    else:
        shipped = PARTS[name].__dataclass_fields__["template"].default
    shipped = shipped.replace("{hint}", COMMENT) if name == "feedback" else shipped
    best = max(rows, key=lambda row: row["right"])
    assert shipped == best["template"]


def test_the_page_shows_what_was_measured() -> None:
    rows = read_rows(DATA)
    assert table(rows) in PAGE.read_text(encoding="utf-8"), "run: python -m tools.lab.templates"
    assert {row["hint"] for row in rows} <= {"none", *HINTS}


def test_the_laboratory_asks_its_readers_in_the_wording_that_was_best() -> None:
    rows, claims = read_rows(reader_templates.DATA), read_laboratory().claims
    for hint, (claim, row) in reader_templates.READERS.items():
        of_hint = [one for one in rows if one["hint"] == hint]
        assert [one["wording"] for one in of_hint] == list(reader_templates.WORDINGS)
        best = max(of_hint, key=lambda one: one["teacher"])["template"]
        assert best in " ".join(claims[claim].rows[row].set), hint
    assert reader_templates.table(rows) in (PAGE.parent / "probe.md").read_text(encoding="utf-8")
