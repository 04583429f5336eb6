"""Evaluation: the estimators are right, batches do not matter, and training does not notice it."""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dllm_sd.cli.main import main
from dllm_sd.config import build_config
from dllm_sd.decoding.denoising import Denoiser
from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError
from dllm_sd.evaluation.estimates import pass_at_k, wilson_interval
from dllm_sd.evaluation.evaluate import ProblemResult, Report, evaluate, evaluate_into, first
from dllm_sd.evaluation.recording import GradedAttempt, Record, begin, digest, finish
from dllm_sd.policies.loading import build_policy
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.reports.tables import EVALUATION_COUNTS, print_evaluation
from dllm_sd.rollouts.rules import PassAtK, encode_problem
from dllm_sd.tasks import TASKS, Grade, Problem, Sudoku
from dllm_sd.tasks.task import NoChanceLevel
from tests.tiers import later

TASK = Sudoku(prompt="{puzzle}", answer="{solution}")
DECODE = Decoding(length=16, block_length=4, tokens_per_step=2)


class Parity(NoChanceLevel):
    """Counts a completion as correct if its first character is an even digit; prompts are as long as they say."""

    def problems(self, split: str) -> Sequence[Problem]:
        return [Problem(f"parity/{i}", {"prompt": "1" * (1 + i % 5)}) for i in range(10)]

    def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
        return [{"role": "user", "content": problem.fields["prompt"]}]

    def reference(self, problem: Problem) -> str | None:
        return None

    def final_answer(self, problem: Problem) -> str | None:
        return None

    def grade(self, problem: Problem, completion: str) -> Grade:
        correct = completion[:1] in tuple("02468")
        return Grade(correct, float(correct), completion[:1] or None)


def run(policy: MaskedDiffusion, **changes: Any) -> tuple[Report, list[ProblemResult]]:
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
    assert report.pass_at_k == {
        1: pytest.approx(report.accuracy),
        2: pytest.approx(sum(pass_at_k(4, sum(row), 2) for row in correct) / 10),
        4: sum(map(any, correct)) / 10,
    }
    assert report.ci95 == wilson_interval(report.accuracy, 10)
    lengths, steps = ([sum(getattr(item, name)) for item in items] for name in ("lengths", "steps"))
    assert report.length == sum(lengths) / 40
    assert report.tokens_per_step == pytest.approx(sum(lengths) / sum(steps))


def test_a_report_is_plain_data(policy: MaskedDiffusion):
    tree = run(policy)[0].tree()
    assert {"n", "accuracy", "ci95", "pass_at_k", "score", "length", "tokens_per_step", "too_long"} <= tree.keys()
    assert tree["pass_at_k"].keys() == {"1", "2", "4"}
    assert isinstance(tree["ci95"], list)


@pytest.mark.parametrize("batch_size", [3, *later(1, 64)])
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


@pytest.mark.parametrize("attempts", [1, 4])
@pytest.mark.parametrize("max_prompt", [1, 3, 9])
def test_whatever_is_left_out_cut_or_not_read_is_counted_by_name_and_shown(
    policy: MaskedDiffusion, max_prompt: int, attempts: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")
    report, items = run(policy, max_prompt=max_prompt, attempts=attempts)
    assert report.n + report.too_long == len(Parity().problems("test"))
    assert report.n == len(items)
    lengths = [length for item in items for length in item.lengths]
    assert sum(length == DECODE.length for length in lengths) >= report.cut >= (max_prompt * attempts > 30)
    assert report.unread == sum(parsed is None for item in items for parsed in item.parsed)
    right = sum(map(sum, (item.correct for item in items)))
    assert report.accuracy == pytest.approx(right / (report.n * attempts))  # cut and unread ones are in it
    tree = json.loads(json.dumps(report.tree()))
    console = Console(record=True, width=200)
    monkeypatch.setattr("dllm_sd.reports.tables.Console", lambda: console)
    print_evaluation("a title", {"schedules": {"trained": tree}})
    lines = console.export_text().splitlines()
    for name, (words, _) in EVALUATION_COUNTS.items():
        assert tree[name] == getattr(report, name)
        shown = any(words in line and f" {tree[name]} " in line for line in lines)
        assert shown == (tree[name] > 0), name  # a table has no rows of zeros


@pytest.mark.parametrize(
    ("fields", "words"), [({"prompt": "11"}, "another 'prompt'"), ({"prompt": "1"}, "same fields")]
)
def test_two_problems_with_one_id_are_refused_before_anything_is_decoded(
    policy: MaskedDiffusion, fields: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(MaskedDiffusion, "decode", None)
    problems = [Problem("a", {"prompt": "1"}), Problem("b", {"prompt": "1"}), Problem("a", fields)]
    with pytest.raises(InputError, match=f"^problem 'a' occurs twice, with .*{words}; give every problem an id of"):
        run(policy, problems=problems)


def test_an_evaluation_whose_problems_changed_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    decoded: list[str] = []
    monkeypatch.setattr(
        Parity, "grade", lambda self, problem, text: decoded.append(problem.id) or Grade(True, 1.0, "1")
    )
    monkeypatch.setitem(TASKS, "parity", Parity)
    config = build_config({"task": "sudoku", "model": {"path": "tiny"}, "decode": {"length": 8, "block_length": 4}})
    config = replace(config, task=Parity())
    policy, settings = build_policy(config.model), {"task": {"name": "parity"}}
    for fields, count in (("1", 10), ("1", 0), ("2", 10)):
        monkeypatch.setattr(
            Parity,
            "problems",
            lambda self, split, f=fields: [Problem(f"parity/{i}", {"prompt": f * 2}) for i in range(10)],
        )
        decoded.clear()
        assert evaluate_into(tmp_path / "scores", policy, config, settings)["n"] == 10
        assert len(decoded) == count


def test_nothing_to_evaluate_is_refused(policy: MaskedDiffusion):
    with pytest.raises(InputError, match=r"^no problem is left to evaluate \(10 prompts exceed max_prompt 0\)"):
        run(policy, max_prompt=0)


def test_training_rollouts_and_evaluation_use_one_grader_and_one_sampler(policy: MaskedDiffusion):
    problems = Parity().problems("test")
    prompted = [encode_problem(policy, Parity(), problem, 100) for problem in problems]
    rule = PassAtK(attempts=1, temperature=0.0)
    rollouts = rule(policy, Parity(), [item for item in prompted if item], DECODE, 0, 0)
    items = run(policy, temperature=0.0, attempts=1)[1]
    assert [(r.text, r.grade.correct) for (r,) in rollouts] == [(i.texts[0], i.correct[0]) for i in items]


def test_the_first_problems_of_a_split_are_taken():
    split = TASK.problems("dev")
    assert [problem.id for problem in first(split, 3)] == ["sudoku/dev/0", "sudoku/dev/1", "sudoku/dev/2"]
    assert len(first(split, math.comb(30, 5))) == len(split)


class Stop(Exception):
    """The program dies."""


def test_a_stopped_evaluation_goes_on_where_it_stopped(
    policy: MaskedDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = run(policy)
    begin(tmp_path, {"seed": 0})
    written: list[GradedAttempt] = []
    assert digest(Problem("a", {"x": 1})) == digest(Problem("b", {"x": 1})) != digest(Problem("a", {"x": 2}))

    def append(self: Record, line: GradedAttempt) -> None:
        if len(written) == 17:
            raise Stop
        written.append(line)
        keep(self, line)

    keep = Record.append
    monkeypatch.setattr(Record, "append", append)
    with pytest.raises(Stop):
        run(policy, record=Record(tmp_path, "trained", 0))
    monkeypatch.undo()
    with (tmp_path / ".generations.0.jsonl").open("a") as file:
        file.write('{"schedule": "trained", "id": "parity/3", "att')  # cut off by the crash
    begin(tmp_path, {"seed": 0})
    record = Record(tmp_path, "trained", 1)  # another number of processes, another file
    assert list(record.lines.values()) == written
    decoded: list[int] = []
    complete = Denoiser.complete
    monkeypatch.setattr(
        Denoiser,
        "complete",
        lambda self, queue, *rest, **more: (decoded.append(queue.most), complete(self, queue, *rest, **more))[1],
    )
    items = run(policy, record=record)[1]
    assert decoded == [40 - 17]
    assert items == whole[1]
    finish(tmp_path, [f"parity/{i}" for i in range(10)])
    lines = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert [(line["id"], line["attempt"]) for line in lines] == [
        (f"parity/{i}", k) for i in range(10) for k in range(4)
    ]
    assert [line["generation"] for line in lines] == [text for item in items for text in item.texts]
    assert {path.name for path in tmp_path.iterdir()} == {"generations.jsonl", "settings.json"}
    run(policy, record=Record(tmp_path, "trained", 0))
    assert decoded == [40 - 17]  # nothing was left to do
    begin(tmp_path, {"seed": 1})
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json"}


def test_the_majority_of_attempts_is_reported(policy: MaskedDiffusion):
    report, items = run(policy, attempts=5)
    shares = []
    for item in items:
        votes = [answer for answer in item.parsed if answer is not None]
        chosen = max(dict.fromkeys(votes), key=votes.count)
        shares.append(chosen in tuple("02468"))
    assert report.maj_at_k == {5: sum(shares) / 10}
    assert report.pass_at_k.keys() == {1, 2, 4, 5}


@pytest.mark.slow
def test_slots_stay_busy_when_completions_end_early(make_policy: Callable[..., MaskedDiffusion]):
    class Many(Parity):
        def problems(self, split: str) -> Sequence[Problem]:
            return [Problem(f"parity/{i}", {"prompt": "1" * (1 + i % 5)}) for i in range(100)]

    decode = Decoding(length=20, block_length=4, tokens_per_step=2, batch_size=4)
    report, items = run(make_policy(), task=Many(), attempts=1, decode=decode)
    assert len({item.steps for item in items}) > 4  # unequal ends
    assert 0.9 < report.occupancy < 1


def test_separators_inside_a_generation_do_not_break_its_line(tmp_path: Path):
    record = Record(tmp_path, "trained", 0)
    line = GradedAttempt("a", "0", 0, "one\u2028two\x85three\rfour\nfive", True, 1.0, None, 3, 2)
    record.append(line)
    finish(tmp_path, ["a"])
    assert list(Record(tmp_path, "trained", 0).lines.values()) == [line]


@pytest.mark.slow
def test_two_processes_report_what_one_reports(tmp_path: Path):
    reports = []
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launcher += ["--main_process_port", "0", "-m", "dllm_sd"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        command = ["eval", "tiny", "--out", str(out), "eval.final_problems=31", "decode.batch_size=8"]
        if processes == 1:
            assert main(command) == 0
        else:
            subprocess.run([*launcher, *command], check=True, env=environment, capture_output=True)
        report = json.loads((out / "report.json").read_text())
        lines = [json.loads(line) for line in (out / "generations.jsonl").read_text().split("\n") if line]
        reports.append(({key: report[key] for key in ("n", "accuracy", "score", "length", "cells")}, lines))
        assert {path.name for path in out.iterdir()} == {"report.json", "generations.jsonl", "settings.json"}
    assert reports[0] == reports[1]
    assert len(reports[0][1]) == 31


@pytest.mark.parametrize("thinking", [None, True, False])
def test_evaluations_ask_with_the_thinking_that_is_set_for_them(
    policy: MaskedDiffusion, thinking: bool | None, monkeypatch: pytest.MonkeyPatch
):
    encode, asked = MaskedDiffusion.encode, list[bool | None]()

    def noted(self: MaskedDiffusion, messages: Any, thinking: bool | None = None) -> list[int]:
        asked.append(thinking)
        return encode(self, messages)

    monkeypatch.setattr(MaskedDiffusion, "encode", noted)
    run(policy, thinking=thinking, attempts=1)
    assert asked == [thinking] * len(Parity().problems("test"))
