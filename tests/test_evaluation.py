"""Evaluation: the estimators are right, batches do not matter, and training does not notice it."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from dllm_sd.errors import InputError
from dllm_sd.evaluation import Item, Report, evaluate, first, pass_at_k, wilson_interval
from dllm_sd.policies.denoising import Denoising
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.rollouts import PassAtK, prompt_tokens
from dllm_sd.tasks import Grade, Problem, Sudoku

TASK = Sudoku(prompt="{puzzle}", answer="{solution}")
DECODE = Denoising(length=16, block_length=4, tokens_per_step=2)


class Parity:
    """Counts a completion as correct if its first character is an even digit; prompts are as long as they say."""

    def problems(self, split: str) -> Sequence[Problem]:
        return [Problem(f"parity/{i}", {"prompt": "1" * (1 + i % 5)}) for i in range(10)]

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        return [{"role": "user", "content": problem.fields["prompt"]}]

    def reference(self, problem: Problem) -> str | None:
        return None

    def grade(self, problem: Problem, completion: str) -> Grade:
        correct = completion[:1] in tuple("02468")
        return Grade(correct, float(correct), completion[:1] or None)


def run(policy: MaskedDiffusion, **changes: Any) -> tuple[Report, list[Item]]:
    settings: dict[str, Any] = {"task": Parity(), "decode": DECODE, "temperature": 1.0, "attempts": 4} | changes
    task = settings.pop("task")
    problems = settings.pop("problems", task.problems("test"))
    return evaluate(policy, task, problems, settings.pop("decode"), **settings)


@pytest.mark.parametrize("attempts", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_attempt(attempts: int):
    for correct, k in itertools.product(range(attempts + 1), range(1, attempts + 1)):
        subsets = list(itertools.combinations([True] * correct + [False] * (attempts - correct), k))
        expected = sum(any(subset) for subset in subsets) / len(subsets)
        assert pass_at_k(attempts, correct, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_does_not_overflow():
    assert pass_at_k(1000, 1, 500) == pytest.approx(0.5)
    assert pass_at_k(1000, 500, 1) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [  # Newcombe (1998), Statistics in Medicine 17, Table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_that_of_wilson(hits: int, n: int, low: float, high: float):
    share = hits / n
    assert wilson_interval(share, n) == pytest.approx((low, high), abs=5.1e-5)
    for p in wilson_interval(share, n):  # its ends are where the score test just does not reject
        assert abs(share - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), abs=1e-9)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = random.Random(0)
    covered = 0
    for _ in range(2000):
        low, high = wilson_interval(sum(rng.random() < 0.3 for _ in range(60)) / 60, 60)
        covered += low <= 0.3 <= high
    assert 0.93 < covered / 2000 < 0.97


def test_a_report_follows_from_its_items(policy: MaskedDiffusion):
    report, items = run(policy)
    correct = [item.correct for item in items]
    assert 0 < sum(map(sum, correct)) < 40
    assert (report.n, report.too_long) == (10, 0)
    assert report.accuracy == report.score == pytest.approx(sum(map(sum, correct)) / 40)
    assert report.pass_at_k == {1: pytest.approx(report.accuracy), 4: sum(map(any, correct)) / 10}
    assert report.ci95 == wilson_interval(report.accuracy, 10)
    lengths, steps = ([sum(getattr(item, name)) for item in items] for name in ("lengths", "steps"))
    assert report.length == sum(lengths) / 40
    assert report.tokens_per_step == pytest.approx(sum(lengths) / sum(steps))


def test_a_report_is_plain_data(policy: MaskedDiffusion):
    tree = run(policy)[0].tree()
    assert {"n", "accuracy", "ci95", "pass_at_k", "score", "length", "tokens_per_step", "too_long"} <= tree.keys()
    assert tree["pass_at_k"].keys() == {"1", "4"}
    assert isinstance(tree["ci95"], list)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_do_not_matter(policy: MaskedDiffusion, batch_size: int):
    assert run(policy, decode=replace(DECODE, batch_size=batch_size))[1] == run(policy)[1]


def test_neither_does_the_company_of_a_problem(policy: MaskedDiffusion):
    problems = Parity().problems("test")
    alone = [run(policy, problems=[problem])[1][0] for problem in reversed(problems)]
    assert alone[::-1] == run(policy)[1]


def test_more_attempts_keep_the_former_ones(policy: MaskedDiffusion):
    few, many = run(policy, attempts=2)[1], run(policy, attempts=5)[1]
    assert [item.texts for item in few] == [item.texts[:2] for item in many]


def test_the_seed_decides_what_is_sampled(policy: MaskedDiffusion):
    assert run(policy, seed=1)[1] == run(policy, seed=1)[1]
    assert run(policy, seed=1)[1] != run(policy, seed=2)[1]


def test_evaluation_leaves_no_trace(make_policy: Callable[..., MaskedDiffusion]):
    policy = make_policy()
    policy.module.train()
    before = {name: value.clone() for name, value in policy.module.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    random.seed(5)
    expected = random.getstate()
    run(policy)
    assert policy.module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == expected
    assert all(torch.equal(value, before[name]) for name, value in policy.module.state_dict().items())
    assert all(value.grad is None for value in policy.module.parameters())


def test_long_prompts_are_left_out_and_counted(policy: MaskedDiffusion):
    report, items = run(policy, max_prompt=3)
    assert (report.n, report.too_long) == (6, 4)
    assert items == [item for i, item in enumerate(run(policy)[1]) if i % 5 < 3]


def test_nothing_to_evaluate_is_refused(policy: MaskedDiffusion):
    with pytest.raises(InputError, match=r"^no problem is left to evaluate \(10 prompts exceed max_prompt 0\)"):
        run(policy, max_prompt=0)


def test_training_rollouts_and_evaluation_use_one_grader_and_one_sampler(policy: MaskedDiffusion):
    problems = Parity().problems("test")
    prompted = [prompt_tokens(policy, Parity(), problem, 100) for problem in problems]
    rule = PassAtK(attempts=1, temperature=0.0)
    rollouts = rule(policy, Parity(), [item for item in prompted if item], DECODE, 0, 0)
    items = run(policy, temperature=0.0, attempts=1)[1]
    assert [(r.text, r.grade.correct) for (r,) in rollouts] == [(i.texts[0], i.correct[0]) for i in items]


def test_the_first_problems_of_a_split_are_taken():
    split = TASK.problems("dev")
    assert [problem.id for problem in first(split, 3)] == ["sudoku/dev/0", "sudoku/dev/1", "sudoku/dev/2"]
    assert len(first(split, math.comb(30, 5))) == len(split)
