"""One problem several times in a batch: other random numbers and a group of its own each time, for every method.

And whatever is lost on the way from the data to what is learnt from, is counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch

from dllm_sd.decoding.settings import Decoding
from dllm_sd.experience.feed import Feed
from dllm_sd.methods import METHODS
from dllm_sd.methods.method import Method
from dllm_sd.policies.loading import AnyPolicy
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.gates import All
from dllm_sd.rollouts.horizons import Complete
from dllm_sd.rollouts.rollout import Prompted, Rollout, Rollouts, with_occurrences
from dllm_sd.rollouts.rules import COUNTS, PassAtK, gather
from dllm_sd.tasks.task import Grade, NoChanceLevel, Problem
from dllm_sd.teachers.prompts import Sources, build_teacher_prompts
from dllm_sd.teachers.writing import Writing
from dllm_sd.training.checkpoint import load_rollouts, rollout_tensors
from dllm_sd.training.metrics import rollout_metrics, sample_entry
from dllm_sd.writers import Request, Written
from tests.tiers import spread

SEED, BATCH, COUNT, ATTEMPTS = 5, 3, 6, 3
DECODE = Decoding(length=12, block_length=4, tokens_per_step=2)
DECODED = {name: row.method for name, row in METHODS.items() if isinstance(row.method.rollout, PassAtK)}


class Sums(NoChanceLevel):
    """A random model is right about half of the time."""

    def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{problem.fields['question']}=" if question else "="}]

    def reference(self, problem: Problem) -> str | None:
        return problem.fields["answer"]

    final_answer = reference

    def grade(self, problem: Problem, completion: str) -> Grade:
        correct = sum(map(ord, completion)) % 2 == 0
        return Grade(correct, float(correct), None)


TASK: Any = Sums()
TWO = [Problem(f"p{i}", {"question": f"{i}+2", "answer": f"{i + 2}", "rubric": ["1+2", "3"]}) for i in range(2)]


@pytest.fixture(scope="module", params=["masked_diffusion", "autoregressive"])
def backbone(request: pytest.FixtureRequest, make_policy: Callable[..., Any]) -> AnyPolicy:
    return make_policy() if request.param == "masked_diffusion" else make_policy(as_="autoregressive")


def dealt(policy: AnyPolicy, problems: Sequence[Problem] = TWO) -> list[Prompted]:
    return Feed(problems, policy, TASK, SEED, 64).take(0, COUNT)[0]


def in_digits(part: Any) -> Any:
    """A context whose templates the tiny tokenizer can read, and whose writer may fail as often as it likes."""
    if not is_dataclass(part):
        return part
    if isinstance(part, Writing):
        return replace(part, tolerance=1.0)
    changes: dict[str, Any] = {f.name: in_digits(getattr(part, f.name)) for f in fields(part) if f.init}
    if "template" in changes:
        changes["template"] = "{question}({hint})" + ("{reference}" if changes.get("reference") is True else "")
    return replace(part, **changes)  # pyright: ignore[reportArgumentType]


def rolled(method: Method, policy: AnyPolicy) -> Rollouts:
    """A batch of two problems, three times each, all attempts made and kept at temperature 1."""
    changes = {"problems": COUNT, "attempts": ATTEMPTS, "keep": "all", "until_solved": False, "temperature": 1.0}
    rule = replace(method.rollout, **changes, top_k=0, top_p=1.0, horizon=Complete())
    return gather(rule, All(), dealt_and_tried(rule, policy))


@lru_cache(maxsize=16)  # many methods roll out alike
def dealt_and_tried(rule: Any, policy: AnyPolicy) -> list[list[Rollout]]:
    return rule(policy, TASK, dealt(policy), DECODE, SEED, BATCH)


ANSWERS = ("1", "12345678901234567890", "345")
SEVEN = [Problem(f"p{i}", {"question": "1" * (1 + 9 * (i % 3)), "answer": ANSWERS[i % 3]}) for i in range(7)]
"""Some questions and some answers are too long."""


@lru_cache(maxsize=64)
def taken_and_tried(rule: Any, policy: AnyPolicy, batch: int) -> tuple[list[Prompted], list[list[Rollout]]]:
    """Five of the seven problems again and again: those of a batch and their attempts."""
    feed, cursor, before = Feed(SEVEN, policy, TASK, SEED, 20), 0, 0
    taken, too_long = list[Prompted](), 0
    for _ in range(batch + 1):
        before = cursor
        taken, cursor, too_long = feed.take(cursor, 5)
    assert cursor - before == len(taken) + too_long
    return taken, rule(policy, TASK, taken, DECODE, SEED, batch)


@pytest.mark.parametrize("name", spread(DECODED, 3))
def test_every_rollout_of_a_batch_has_its_own_keys_group_and_hints(name: str, backbone: AnyPolicy):
    method, asked = DECODED[name], []

    def write(writing: Writing, requests: Sequence[Request]) -> list[Written]:
        asked.extend(requests)
        return [Written(None, "silent")] * len(requests)

    def analyse(context: int, prompts: Any, reasoning: Any, keys: Sequence[int]) -> list[str]:
        assert len(set(keys)) == len(prompts)
        return ["1"] * len(prompts)

    rollouts = rolled(method, backbone)
    assert rollouts.size == COUNT * ATTEMPTS
    assert len(set(rollouts.keys(SEED, BATCH))) == rollouts.size
    texts = len({rollout.text for rollout in rollouts.kept})
    if getattr(method.rollout, "draw", "fresh") == "fixed":  # one text a problem, whenever it is met
        assert texts == rollouts.size / 3
    else:
        assert texts > rollouts.size * 0.8  # 12 tokens of 25
    assert rollouts.group.bincount().tolist() == [ATTEMPTS] * COUNT
    contexts = tuple(map(in_digits, method.contexts))
    found = build_teacher_prompts(rollouts, contexts, TASK, backbone, analyse, (SEED, BATCH), Sources(TWO, write))
    own = {parts: {one.text for one in rollouts.kept if one.key_parts == parts} for parts in parts_of(rollouts)}
    for context, hint in enumerate(part.hint for part in contexts):
        if hint is not None and hint.needs_group and hint.writing is None:
            assert found.size
            assert all(one.briefs[context].text in own[one.key_parts] for one in found.kept)
        if hint is not None and hint.writing is not None:
            distinct = {request.key for request in asked}
            assert len(distinct) == (len(TWO) if hint.per_problem else rollouts.size)


@pytest.mark.parametrize("name", METHODS)
def test_every_attempt_is_kept_or_lost_under_a_name(name: str, policy: AnyPolicy):
    """Problems without rubric or answer, hints that are too long, references too long, writers that fail."""
    method = METHODS[name].method
    decodes = isinstance(method.rollout, PassAtK)
    rule: Any = replace(method.rollout, problems=5, **({"attempts": 2} if decodes else {}))
    contexts = tuple(map(in_digits, method.contexts))
    for batch in range(3):
        taken, tried = taken_and_tried(rule, policy, batch)
        rollouts = gather(rule, method.gate, tried)
        failing = Sources(SEVEN, lambda _, requests: [Written(None, "silent")] * len(requests))
        found = build_teacher_prompts(rollouts, contexts, TASK, policy, lambda *_: ["1"] * 99, (SEED, batch), failing)
        counts = found.counts
        lost = counts["rejected"] + counts["no_hint"] + counts["long_hint"]
        assert found.size == counts["kept"]
        assert counts["problems"] == len(taken)
        if decodes and rule.keep == "all":
            assert counts["attempts"] == counts["kept"] + lost
        else:
            assert counts["problems"] == counts["kept"] + lost + counts.get("long_reference", 0)
        logged = rollout_metrics(found)
        for key in ("kept", "rejected", "no_hint", "long_hint", *(["long_reference"] if not decodes else [])):
            assert logged[f"rollouts/{key}"] == counts[key]


def parts_of(rollouts: Rollouts) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(rollout.key_parts for rollout in rollouts.kept))


def test_the_first_occurrence_has_the_keys_of_a_problem_that_comes_once(policy: AnyPolicy):
    one, two, three = with_occurrences([Prompted(TWO[0], (4,))] * 3)
    assert (one.key_parts, two.key_parts, three.key_parts) == (
        ("p0",),
        ("p0", "occurrence 1"),
        ("p0", "occurrence 2"),
    )
    rollouts = Rollouts(tuple(a_rollout(policy, item) for item in (one, two)), {})
    assert rollouts.keys(1, 2)[0] == make_key(1, 2, "p0", 0, "canvases")


def a_rollout(policy: AnyPolicy, item: Prompted, attempt: int = 0) -> Rollout:
    trajectory = policy.demonstration(item.prompt, [5, 6], DECODE)
    return Rollout(item.problem, attempt, "12", Grade(True, 1.0, None), trajectory, occurrence=item.occurrence)


def test_different_problems_of_one_id_are_told_apart(policy: AnyPolicy):
    twins = [replace(problem, id="same") for problem in TWO]
    prompted = dealt(policy, twins)
    assert len({item.key_parts for item in prompted}) == COUNT
    rollouts = Rollouts(tuple(a_rollout(policy, item) for item in prompted), {})
    assert rollouts.group.tolist() == list(range(COUNT))


def test_a_batch_across_epochs_counts_from_its_own_start(policy: AnyPolicy):
    feed, cursor = Feed([replace(TWO[0], id=f"p{i}") for i in range(5)], policy, TASK, SEED, 64), 0
    for _ in range(7):
        taken, cursor, _ = feed.take(cursor, 3)
        assert len({item.key_parts for item in taken}) == 3
        first = {item.problem.id for item in taken}
        assert {item.problem.id for item in taken if item.occurrence == 0} == first


def test_how_many_are_decoded_at_once_changes_no_occurrence(policy: AnyPolicy):
    rule = PassAtK(problems=COUNT, attempts=ATTEMPTS, keep="all", until_solved=False, temperature=1.0)
    whole, pairs = (
        rule(policy, TASK, dealt(policy), replace(DECODE, batch_size=size), SEED, BATCH) for size in (64, 2)
    )
    assert [[one.text for one in attempts] for attempts in whole] == [[x.text for x in tried] for tried in pairs]


def test_occurrences_are_in_checkpoints_and_samples(policy: AnyPolicy):
    rollouts = Rollouts(tuple(a_rollout(policy, item) for item in dealt(policy)), dict.fromkeys(COUNTS, 1.0))
    again = load_rollouts(*rollout_tensors(rollouts))
    assert [one.occurrence for one in again.kept] == [one.occurrence for one in rollouts.kept]
    assert again.keys(1, 2) == rollouts.keys(1, 2)
    assert [sample_entry(1, one)["occurrence"] for one in rollouts.kept] == [one.occurrence for one in rollouts.kept]


def test_rollouts_whose_steps_were_partly_idle_come_back(policy: AnyPolicy):
    settings = replace(DECODE, steps=4 * DECODE.length)
    (rollouts,) = PassAtK(problems=1, attempts=1)(policy, TASK, dealt(policy)[:1], settings, SEED, BATCH)
    assert int(rollouts[0].trajectory.num_steps) > DECODE.length
    again = load_rollouts(*rollout_tensors(Rollouts(tuple(rollouts), dict.fromkeys(COUNTS, 1.0))))
    assert torch.equal(again.kept[0].trajectory.reveal_step, rollouts[0].trajectory.reveal_step)
