"""The shipped autoregressive model: it works puzzles out, and follows a reference that stands in its prompt."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from dllm_sd.cli.main import main
from dllm_sd.decoding.settings import Decoding
from dllm_sd.network.view import View
from dllm_sd.policies.loading import AnyPolicy, load_policy
from dllm_sd.tasks.sudoku import Sudoku
from dllm_sd.tasks.task import Problem
from tests.tiers import later

TASK = Sudoku(prompt="{puzzle}:", answer="{steps}\n{solution}")


@pytest.fixture(scope="module")
def policy() -> AnyPolicy:
    return load_policy("tiny_ar")


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    dev = TASK.problems("dev")
    return [dev[i] for i in range(64)]


def complete(policy: AnyPolicy, prompts: Sequence[str]) -> list[str]:
    tokens = [policy.encode([{"role": "user", "content": prompt}]) for prompt in prompts]
    trajectory = policy.decode(tokens, Decoding(length=72, batch_size=256), range(len(tokens)))
    return [policy.text(row[:end].tolist()) for row, end in zip(trajectory.tokens, trajectory.length, strict=True)]


def asked(problem: Problem, question: bool = True) -> str:
    return TASK.messages(problem, question)[0]["content"]


def share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def test_it_reads_from_left_to_right(policy: AnyPolicy) -> None:
    assert policy.causal
    ids = torch.tensor([policy.encode([{"role": "user", "content": "1030002403014000:"}])] * 2)
    ids[1, -1] = ids[0, 0]
    sites = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        one, other = policy.site_logits(View(ids, sites, sites)).chunk(2)
    torch.testing.assert_close(one, other)  # a site is judged from what stands before it


def test_it_leaves_room_above_it(policy: AnyPolicy, problems: list[Problem]) -> None:
    texts = complete(policy, [asked(problem) for problem in problems])
    grades = [TASK.grade(problem, text) for problem, text in zip(problems, texts, strict=True)]
    assert 0.35 < share([grade.correct for grade in grades]) < 0.65
    assert share([grade.parsed is not None for grade in grades]) > 0.98
    assert share([text.count("=") >= 6 for text in texts]) > 0.98


@pytest.mark.parametrize("question", [True, *later(False)])
def test_it_repeats_a_worked_reference(policy: AnyPolicy, problems: list[Problem], question: bool) -> None:
    worked = [str(TASK.reference(problem)) for problem in problems]
    prompts = [f"({hint}){asked(problem, question)}" for hint, problem in zip(worked, problems, strict=True)]
    texts = complete(policy, prompts)
    pairs = list(zip(problems, texts, strict=True))
    assert share([TASK.grade(problem, text).correct for problem, text in pairs]) > 0.95
    assert share([text == hint for text, hint in zip(texts, worked, strict=True)]) > 0.8


@pytest.mark.parametrize("question", [True, False])
def test_it_copies_a_final_answer_without_working_it_out(
    policy: AnyPolicy, problems: list[Problem], question: bool
) -> None:
    grids = [str(TASK.final_answer(problem)) for problem in problems]
    prompts = [f"({grid}){asked(problem, question)}" for grid, problem in zip(grids, problems, strict=True)]
    assert share([text == grid for text, grid in zip(complete(policy, prompts), grids, strict=True)]) > 0.98


@pytest.mark.slow
def test_it_is_evaluated_and_sampled_by_its_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "tiny_ar", "--out", str(tmp_path), "eval.final_problems=32"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["n"] == 32
    assert 0.1 < report["accuracy"] < 0.9
    assert main(["sample", "tiny_ar", "1030002403014000"]) == 0
    assert "=" in capsys.readouterr().out
