"""The training data of the laboratory: problems are right, hints are what they are called, shares are kept."""

import json
from collections import Counter
from itertools import islice

import pytest

from dllm_sd.randomness import make_key
from dllm_sd.skills import build_bank, format_pair, retrieve
from dllm_sd.tasks.datafile import split_of
from dllm_sd.tasks.sources import Draws
from tools.lab.countdown_score import score
from tools.lab.data import half_wrong, solutions
from tools.lab.draws import by_share
from tools.lab.operators import (
    DOMAINS,
    KINDS,
    LARGEST,
    LARGEST_ELSEWHERE,
    LEAST_TARGET,
    OPERATORS,
    PLAIN,
    SHARE_OF,
    TRAINED_ON,
    bank,
    once,
    problems,
    row,
    training_rows,
    wrong_attempts,
)


def test_half_of_the_bank_says_what_is_wrong() -> None:
    skills = [{"principle": f"right {i}"} for i in range(4)]
    mistakes = [{"description": f"wrong {i}", "how_to_avoid": f"right {i}"} for i in range(4)]
    bank = half_wrong({"skills": skills, "mistakes": mistakes, "metadata": {}})
    assert [skill["principle"] for skill in bank["skills"]] == ["right 0", "wrong 1", "right 2", "wrong 3"]
    assert bank["mistakes"][1] == {"description": "right 1", "how_to_avoid": "wrong 1"}
    assert json.dumps(bank)


def test_styles_solve_the_same_puzzle() -> None:
    grid = "1234341221434321"
    written = solutions("0" + grid[1:15] + "0", grid)
    assert {text.split("\n")[-1] for text in written.values()} == {grid}
    assert written["steps"].split("\n")[0][::-1].replace("=", ":")[:2] == written["turned"].split("\n")[0][:2]
    assert written["short"] == grid


def test_names_are_drawn_in_proportion_to_their_shares() -> None:
    drawn = Counter(by_share({"a": 3, "b": 1, "none": 0}, Draws(make_key("shares", i))) for i in range(4000))
    assert set(drawn) == {"a", "b"}
    assert drawn["a"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_forms_of_a_countdown_problem_are_all_that_reach_the_target() -> None:
    """The grader, which evaluates the text, agrees with the maker on every expression of the two numbers."""
    for problem in islice(problems("train", "test"), 300):
        fields = {"numbers": list(problem.numbers), "target": problem.target}
        assert problem.target >= LEAST_TARGET
        assert split_of(*sorted(problem.numbers), problem.target) == "train"
        assert any(problem.operator in form for form in problem.forms)
        assert [score(fields, form) for form in problem.forms] == [1.0] * len(problem.forms)
        assert [score(fields, text) for text in wrong_attempts(problem)] == [0.0] * len(wrong_attempts(problem))
    assert score({"numbers": [3, 15], "target": 45}, "45") == 0.0
    assert score({"numbers": [3, 15], "target": 45}, "no expression") == 0.0


def test_shares_and_sizes_of_countdown_problems_are_as_asked() -> None:
    mostly_sums = list(islice(problems("train", "test", {"+": 43, "-": 43, "*": 14}, most=PLAIN), 400))
    assert max(max(problem.numbers) for problem in mostly_sums) <= PLAIN
    sums = sum(DOMAINS[problem.operator] == "sums" for problem in mostly_sums)
    assert sums / 400 == pytest.approx(0.86, abs=0.05)


@pytest.mark.parametrize(("least", "most", "fewest"), [(1, LARGEST, 600), (LARGEST + 1, LARGEST_ELSEWHERE, 1000)])
def test_test_problems_are_distinct_and_of_every_operator(least: int, most: int, fewest: int) -> None:
    kept = once("test", least, most)
    assert len({(*sorted(problem.numbers), problem.target) for problem in kept}) == len(kept) >= fewest
    assert all(least <= max(problem.numbers) <= most for problem in kept)
    found = Counter(problem.operator for problem in kept)
    for operator, share in SHARE_OF.items():
        assert found[operator] / len(kept) == pytest.approx(share / 100, abs=0.02)
    train = {(*sorted(problem.numbers), problem.target) for problem in once("train", least, most)}
    assert not train & {(*sorted(problem.numbers), problem.target) for problem in kept}


@pytest.mark.parametrize("kind", KINDS)
def test_the_hint_of_a_countdown_row_is_of_its_kind_and_the_answer_is_right(kind: str) -> None:
    comments = Counter[bool]()
    for i, problem in enumerate(islice(problems("train", "test"), 200)):
        written = row(problem, kind, Draws(make_key("row", i)))
        hint = written["prompt"].removesuffix(problem.question)
        assert written["answer"] in problem.forms
        if kind == "plain":
            assert hint == ""
        elif kind == "operator":
            assert hint == f"({problem.operator})"
            assert problem.operator in written["answer"]
        elif kind == "attempt":
            assert hint.strip("[]") in wrong_attempts(problem)
        else:
            shown, *comment = hint.strip("()").split(")(")
            assert shown in problem.forms
            assert len(comment) == (kind == "solution and comment")
            comments.update(text in problem.forms for text in comment)
    if kind == "solution and comment":
        assert 60 < comments[False] < 140


def test_the_bank_offers_every_operator_once() -> None:
    read = build_bank(bank(), "bank")
    offered = [format_pair(pair, "{principle}") for pair in retrieve(read, "15 3 > 45:", len(OPERATORS))]
    assert sorted(offered) == sorted(OPERATORS)


@pytest.mark.parametrize("name", TRAINED_ON)
def test_a_data_set_asks_without_a_hint_what_its_model_is_to_know(name: str) -> None:
    seen: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    largest = 0
    for entry in islice(training_rows(name), 1500):
        hinted = entry["prompt"][0] in "(["
        numbers, _, target = entry["prompt"].rpartition(")")[2].rpartition("]")[2].rstrip(":").partition(" > ")
        small, large = sorted(map(int, numbers.split()))
        assert split_of(small, large, int(target)) == "train"
        assert score({"numbers": [small, large], "target": int(target)}, entry["answer"]) == 1
        seen[hinted][next(operator for operator in OPERATORS if operator in entry["answer"])] += 1
        largest = max(largest, 0 if hinted else large)
    assert seen[True].keys() == set(OPERATORS)
    training = TRAINED_ON[name]
    assert training.most - 5 < largest <= training.most
    for operator in OPERATORS:
        share = 100 * seen[False][operator] / seen[False].total()
        assert share == pytest.approx(training.plain.get(operator, 0), abs=6)
