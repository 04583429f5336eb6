"""The metrics of an update: summed over all sites and processes, shares and counts of rollouts."""

import math
from typing import Any

import pytest
import torch
from torch import nan

from dllm_sd.objective.equation import Graded
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.rollouts.rules import COUNTS
from dllm_sd.tasks import Grade, Problem
from dllm_sd.training.metrics import rollout_metrics, sample_entry, site_metrics, site_sums


def graded(value: list[float], loss: float, **fields: list[float]) -> Graded:
    m = len(value)
    tensors = {"clipped": torch.tensor(fields.get("clipped", value))}
    tensors |= {"student_entropy": torch.tensor(fields.get("student_entropy", [0.0] * m))}
    tensors |= {
        name: torch.tensor(fields.get(name, [nan] * m)) for name in ("teacher_entropy", "agreement", "advantage")
    }
    measures = {name: torch.tensor(values) for name, values in fields.items() if name.startswith("target/")}
    sites = torch.ones(1, m, dtype=torch.bool)
    return Graded(
        torch.tensor(loss), torch.tensor(value), term=torch.zeros(m), sites=sites, measures=measures, **tensors
    )


def test_losses_add_up_and_the_rest_is_a_mean_over_all_sites():
    parts = [
        graded(
            [1.0, 2.0, 3.0],
            0.25,
            agreement=[1.0, 1.0, 0.0],
            teacher_entropy=[0.0, 1.0, 2.0],
            advantage=[1.0, -4.0, 0.0],
        ),
        graded(
            [10.0],
            0.5,
            agreement=[1.0],
            advantage=[1.0],
            teacher_entropy=[1.0],
            student_entropy=[4.0],
            clipped=[4.0],
        ),
    ]
    metrics = site_metrics(site_sums(parts, (), torch.device("cpu")), ())
    assert metrics == {
        "loss": 0.75,
        "sites": 4,
        "divergence": 4.0,
        "clip_share": 6 / 16,
        "student/entropy": 1.0,
        "teacher/entropy": 1.0,
        "teacher/agreement": 0.75,
        "teacher/advantage": -0.5,
    }
    assert isinstance(metrics["sites"], int)


@pytest.mark.parametrize(
    ("unclipped", "clipped", "share"),
    [
        ([2.0, 6.0], [1.0, 3.0], 0.5),
        ([0.5, 0.5], [0.5, 0.5], 0.0),
        ([0.0], [0.0], 0.0),
        ([1.0, 1.0], [-0.5, -0.5], 1.5),  # a clip of entries makes the sum negative
        ([-1.0], [-0.5], 0.5),
    ],
)
def test_the_clips_share_is_that_of_the_sums_and_not_a_mean_over_sites(unclipped, clipped, share):
    parts = [graded([value], 0.0, clipped=[after]) for value, after in zip(unclipped, clipped, strict=True)]
    assert site_metrics(site_sums(parts, (), torch.device("cpu")), ())["clip_share"] == pytest.approx(share)


def test_there_is_no_share_of_nothing():
    metrics = site_metrics(site_sums([graded([0.0], 0.0, clipped=[-1.0])], (), torch.device("cpu")), ())
    assert "clip_share" not in metrics


def test_without_a_teacher_nothing_is_said_about_it():
    metrics = site_metrics(site_sums([graded([1.0, 2.0], 0.5)], (), torch.device("cpu")), ())
    assert metrics.keys() == {"loss", "sites", "divergence", "clip_share", "student/entropy"}
    assert not any(math.isnan(value) for value in metrics.values())


def test_cutting_an_update_into_parts_does_not_change_its_metrics():
    alpha = "target/alpha"
    clipped = [1.0, 1.5, 0.0]
    whole = graded([1.0, 2.0, 4.0], 0.75, clipped=clipped, agreement=[1.0, 0.0, 1.0], **{alpha: [0.5, 0.25, 0.75]})
    parts = [graded([1.0, 2.0], 0.5, clipped=clipped[:2], agreement=[1.0, 0.0], **{alpha: [0.5, 0.25]})]
    parts += [graded([4.0], 0.25, clipped=clipped[2:], agreement=[1.0], **{alpha: [0.75]})]
    device = torch.device("cpu")
    metrics = site_metrics(site_sums(parts, [alpha], device), [alpha])
    assert metrics == site_metrics(site_sums([whole], [alpha], device), [alpha])
    assert metrics[alpha] == 0.5


def test_references_have_no_pass_rate():
    counts = dict.fromkeys(COUNTS, 3.0)
    rates = {"rollouts/pass_rate", "rollouts/first_try"}
    assert rates <= rollout_metrics(Rollouts((), counts)).keys()
    assert not rates & rollout_metrics(Rollouts((), {**counts, "long_reference": 0.0})).keys()


def test_rollout_metrics_are_shares_of_problems_and_means_over_attempts():
    counts = {"problems": 4, "attempts": 10, "decoded": 12, "solved": 3, "first_try": 1, "tokens": 50, "steps": 20}
    counts |= {"generated": 60, "no_hint": 2, "long_hint": 1}
    metrics = rollout_metrics(Rollouts((), {**counts, "kept": 3, "rejected": 1}))
    assert metrics == {
        **{"rollouts/problems": 4, "rollouts/attempts": 10, "rollouts/decoded": 12, "rollouts/kept": 3},
        **{"rollouts/rejected": 1, "rollouts/pass_rate": 0.75, "rollouts/first_try": 0.25},
        **{"rollouts/length": 5.0, "rollouts/steps": 2.0, "rollouts/generated": 60},
        **{"rollouts/no_hint": 2, "rollouts/long_hint": 1, "rollouts/cut_hint": 0},
    }


def test_a_sample_holds_the_fields_of_its_problem_and_the_verdict(noise: Any):
    problem = Problem("sudoku/train/3", {"puzzle": "12", "solution": "34"})
    rollout = Rollout(problem, 2, "56", Grade(False, 0.5, "5"), noise(b=1))
    assert sample_entry(7, rollout) == {
        **{"puzzle": "12", "solution": "34", "update": 7, "problem": "sudoku/train/3"},
        **{"occurrence": 0, "attempt": 2},
        **{"correct": False, "score": 0.5, "parsed": "5", "generation": "56"},
    }
