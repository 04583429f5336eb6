from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from dllm_sd.decoding.queue import Queue
from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError
from dllm_sd.randomness import key_tensor, make_key, uniform
from dllm_sd.rollouts.gates import All, Correct, Mixed, Score
from dllm_sd.rollouts.rollout import Prompted, Rollout, Rollouts
from dllm_sd.rollouts.rules import Demonstrations, PassAtK, encode_problem, gather
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.trajectory import StopAfter, Trajectory, left_pad
from tests.tiers import later

SEED, UPDATE = 3, 7


@dataclass
class StubPolicy:
    """Writes a number below 100 that depends on the key alone; notes what it was asked."""

    calls: list[dict[str, Any]] = field(default_factory=list)

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Decoding,
        keys: Sequence[int],
        stop_after: StopAfter | None = None,
    ) -> Trajectory:
        self.calls.append(
            {"prompts": list(prompts), "settings": settings, "keys": list(keys), "stop_after": stop_after}
        )
        written = [self.number(key) for key in keys]
        prompt_ids, prompt_mask = left_pad(prompts, 0)
        return Trajectory(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            tokens=torch.tensor([[n, 101, 0] for n in written]),
            reveal_step=torch.tensor([[n % 3, n % 3 + 1, -1] for n in written]),
            length=torch.full((len(written),), 2),
            block_length=3,
            mask_id=102,
            end_ids=(101,),
            pad_id=0,
        )

    @property
    def decoder(self) -> "StubPolicy":
        return self

    def complete(
        self, queue: Queue, settings: Decoding, *, meter: Any = None, stop_after: StopAfter | None = None
    ) -> None:
        while (jobs := queue.take(settings.batch_size)) is not None:
            if jobs:
                keys = [job.key for job in jobs]
                queue.ended(jobs, self.decode([job.prompt for job in jobs], settings, keys, stop_after=stop_after))

    @staticmethod
    def number(key: int) -> int:
        return int(uniform(key_tensor([key]), 1)[0, 0] * 100)

    def extent(self, unit: str, settings: Decoding) -> int:
        return 3

    def text(self, tokens: Sequence[int]) -> str:
        assert tokens[-1] == 101, "only what stands up to the end token is text"
        return str(tokens[0])

    def encode(self, messages: Sequence[dict[str, str]], thinking: bool | None = None) -> list[int]:
        return [ord(c) for c in messages[0]["content"]]


class StubTask:
    """Solved by a number of at least `bar`; partial credit otherwise."""

    def messages(self, problem: Problem, question: bool = True) -> list[dict[str, str]]:
        return [{"role": "user", "content": problem.id}]

    def grade(self, problem: Problem, completion: str) -> Grade:
        number = int(completion)
        return Grade(number >= problem.fields["bar"], number // 10 / 10, completion)

    def reference(self, problem: Problem) -> str | None:
        return problem.fields.get("reference")

    def final_answer(self, problem: Problem) -> str | None:
        return None


PROBLEMS = [
    Prompted(Problem(f"p{i}", {"bar": bar}), tuple(range(1, 2 + i)))
    for i, bar in enumerate([0, 100, 50, 80, 95, 60, 90, 30, 85, 70])
]


def roll(rule: PassAtK, room: int = 64, policy: StubPolicy | None = None) -> list[list[Rollout]]:
    decode = Decoding(length=3, block_length=3, batch_size=room)
    return rule(policy or StubPolicy(), StubTask(), PROBLEMS, decode, SEED, UPDATE)  # pyright: ignore[reportArgumentType]


def serial(attempts: int, item: Prompted, until_solved: bool = True) -> list[int]:
    """The numbers that a plain retry loop writes."""
    written = []
    for attempt in range(attempts):
        written.append(StubPolicy.number(make_key(SEED, UPDATE, item.problem.id, attempt, "decode")))
        if until_solved and written[-1] >= item.problem.fields["bar"]:
            break
    return written


def summary(rollouts: Sequence[Rollout]) -> list[tuple[str, int, str, Grade, list[int]]]:
    return [(r.problem.id, r.attempt, r.text, r.grade, r.trajectory.prompt_ids[0].tolist()) for r in rollouts]


@pytest.mark.parametrize("room", [3, 64, *later(1, 8, 11, 1000)])
@pytest.mark.parametrize(("attempts", "ahead"), [(1, 0), (4, 0), (8, 0), (8, 2), (8, 20)])
def test_the_counted_attempts_are_those_of_a_serial_loop(room, attempts, ahead):
    tried = roll(PassAtK(attempts=attempts, ahead=ahead), room)
    for item, done in zip(PROBLEMS, tried, strict=True):
        counted = [rollout for rollout in done if rollout.counted]
        assert [int(rollout.text) for rollout in counted] == serial(attempts, item)
        assert [rollout.attempt for rollout in done] == list(range(len(done)))
        assert all(rollout.trajectory.prompt_ids.tolist() == [list(item.prompt)] for rollout in done)


def test_only_problems_not_yet_solved_are_tried_again():
    policy = StubPolicy()
    roll(PassAtK(attempts=8), room=len(PROBLEMS), policy=policy)
    asked = [(i, key) for call in policy.calls for i, key in zip(map(len, call["prompts"]), call["keys"], strict=True)]
    assert len(asked) == len(set(asked))
    solved: set[int] = set()
    for call in policy.calls:
        assert not solved & {len(prompt) for prompt in call["prompts"]}
        for prompt, key in zip(call["prompts"], call["keys"], strict=True):
            if StubPolicy.number(key) >= PROBLEMS[len(prompt) - 1].problem.fields["bar"]:
                solved.add(len(prompt))
    assert 0 < len(solved) < len(PROBLEMS)


@pytest.mark.parametrize("room", [1, 4, 64])
def test_nothing_is_decoded_that_a_serial_loop_would_not_decode(room):
    policy = StubPolicy()
    roll(PassAtK(attempts=8), room, policy)
    assert sum(len(call["keys"]) for call in policy.calls) == sum(len(serial(8, item)) for item in PROBLEMS)
    assert all(len(call["keys"]) <= room for call in policy.calls)


def test_attempts_ahead_fill_what_would_stay_empty():
    calls = {}
    for ahead in (0, 1, 7):
        policy = StubPolicy()
        roll(PassAtK(attempts=8, ahead=ahead), room=24, policy=policy)
        calls[ahead] = [len(call["keys"]) for call in policy.calls]
    assert max(map(max, calls.values())) <= 24
    assert calls[0][0] == 10
    assert calls[1][0] == 20
    assert calls[7][0] == 24
    assert len(calls[7]) < len(calls[0])
    assert sum(calls[7]) > sum(calls[0])


def test_the_rule_sets_how_tokens_are_drawn():
    policy = StubPolicy()
    roll(PassAtK(temperature=0.6, top_k=7, top_p=0.8), policy=policy)
    drawn = {(call["settings"].temperature, call["settings"].top_k, call["settings"].top_p) for call in policy.calls}
    assert drawn == {(0.6, 7, 0.8)}


@pytest.mark.parametrize("room", [1, 5, 64])
def test_keeping_the_first_takes_the_first_correct_or_the_last(room):
    rule = PassAtK(attempts=5)
    kept = gather(rule, All(), roll(rule, room)).kept
    assert [int(rollout.text) for rollout in kept] == [serial(5, item)[-1] for item in PROBLEMS]


def test_keeping_the_best_takes_the_highest_score_and_the_latest_of_equals():
    rule = PassAtK(attempts=8, keep="best", until_solved=False)
    for item, rollout in zip(PROBLEMS, gather(rule, All(), roll(rule)).kept, strict=True):
        scores = [number // 10 for number in serial(8, item, until_solved=False)]
        assert rollout.attempt == max(i for i in range(8) if scores[i] == max(scores))


def test_keeping_all_keeps_every_attempt_in_order():
    rule = PassAtK(attempts=4, keep="all", until_solved=False)
    rollouts = gather(rule, All(), roll(rule))
    assert [int(r.text) for r in rollouts.kept] == [n for item in PROBLEMS for n in serial(4, item, False)]
    assert rollouts.group.tolist() == [i for i in range(len(PROBLEMS)) for _ in range(4)]
    assert rollouts.reward.tolist() == [rollout.grade.score for rollout in rollouts.kept]
    assert rollouts.size == rollouts.trajectory.size == 40


@pytest.mark.parametrize("room", [1, 7, 64])
@pytest.mark.parametrize("until_solved", [True, False])
def test_counts_are_those_of_the_serial_loop(room, until_solved):
    rule = PassAtK(attempts=5, until_solved=until_solved)
    policy = StubPolicy()
    counts = gather(rule, Correct(), roll(rule, room, policy)).counts
    written = [serial(5, item, until_solved) for item in PROBLEMS]
    bars = [item.problem.fields["bar"] for item in PROBLEMS]
    solved = [max(numbers) >= bar for numbers, bar in zip(written, bars, strict=True)]
    assert counts == {
        "problems": 10,
        "attempts": sum(map(len, written)),
        "decoded": sum(len(call["keys"]) for call in policy.calls),
        "solved": sum(solved),
        "first_try": sum(numbers[0] >= bar for numbers, bar in zip(written, bars, strict=True)),
        "tokens": 2 * sum(map(len, written)),
        "generated": 2 * sum(len(call["keys"]) for call in policy.calls),
        "steps": sum(n % 3 + 2 for numbers in written for n in numbers),
        "no_hint": 0,
        "long_hint": 0,
        "kept": sum(solved),
        "rejected": 10 - sum(solved),
    }
    assert 0 < counts["first_try"] < counts["solved"] < 10


def attempts_scoring(*scores: float) -> list[Rollout]:
    trajectory = StubPolicy().decode([[1]], Decoding(), [0])
    problem = Problem("p", {})
    return [Rollout(problem, i, "", Grade(score == 1, score, None), trajectory) for i, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("gate", "scores", "passed"),
    [
        (All(), [0, 0.3, 1], [0, 1, 2]),
        (Correct(), [0, 0.3, 1], [2]),
        (Correct(count_rejected=True), [0.9], []),
        (Score(), [0.2, 0.25, 1, 0], [1, 2]),
        (Score(at_least=0.5), [0.2, 0.25, 1, 0], [2]),
        (Mixed(), [0, 0.3, 1], [0, 1, 2]),
        (Mixed(), [0.3, 0.3, 0.3], []),
        (Mixed(), [1], []),
    ],
    ids=repr,
)
def test_a_gate_lets_pass_what_it_says(gate, scores, passed):
    assert [rollout.attempt for rollout in gate(attempts_scoring(*scores))] == passed


def test_gathering_counts_what_the_gate_rejects():
    rule = PassAtK(attempts=2, keep="all", until_solved=False)
    rollouts = gather(rule, Mixed(), [attempts_scoring(0, 1), attempts_scoring(1, 1), attempts_scoring(0, 0)])
    assert (rollouts.size, rollouts.counts["kept"], rollouts.counts["rejected"]) == (2, 2, 4)
    assert gather(rule, All(), [[]]).counts["problems"] == 1
    assert gather(rule, All(), []).size == 0


def test_keys_of_rollouts_depend_on_what_they_are_not_on_where_they_stand():
    rule = PassAtK(attempts=3, keep="all", until_solved=False)
    rollouts = gather(rule, All(), roll(rule))
    keys = rollouts.keys(1, 2)
    assert len(set(keys)) == rollouts.size
    assert replace(rollouts, kept=rollouts.kept[::-1]).keys(1, 2) == keys[::-1]
    assert not set(keys) & {*rollouts.keys(1, 3), *rollouts.keys(2, 2)}


def test_the_outcome_of_real_decoding_does_not_depend_on_the_batch(policy):
    class Parity(StubTask):
        def grade(self, problem: Problem, completion: str) -> Grade:
            return Grade(len(completion) % 3 == 0, len(completion) / 16, completion)

    prompted = [Prompted(Problem(f"p{i}", {}), tuple(range(4, 5 + i))) for i in range(6)]
    rule, outcomes = PassAtK(attempts=4), []
    for room in (1, 4, 64):
        decode = Decoding(length=16, block_length=8, batch_size=room)
        tried = rule(policy, Parity(), prompted, decode, SEED, UPDATE)  # pyright: ignore[reportArgumentType]
        rollouts = gather(rule, All(), tried)
        outcomes.append((summary(rollouts.kept), rollouts.trajectory.tokens.tolist()))
        assert rollouts.counts["attempts"] > 6
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_prompts_that_are_too_long_are_left_out_and_never_cut():
    problem = Problem("1+2=", {})
    assert encode_problem(StubPolicy(), StubTask(), problem, 4) == Prompted(problem, (49, 43, 50, 61))  # pyright: ignore[reportArgumentType]
    assert encode_problem(StubPolicy(), StubTask(), problem, 3) is None  # pyright: ignore[reportArgumentType]


def test_demonstrations_are_the_references_of_the_task(policy):
    def tried(reference: str | None, length: int = 6) -> list[Rollout]:
        item = Prompted(Problem("p", {"reference": reference}), (4, 5))
        decode = Decoding(length=length, block_length=length)
        return Demonstrations()(policy, StubTask(), [item], decode, 0, 0)[0]  # pyright: ignore[reportArgumentType]

    (one,) = tried("123")
    assert one.trajectory.tokens.tolist() == [[5, 6, 7, 1, 2, 2]]
    assert one.trajectory.length.tolist() == [4]
    assert one.grade.correct
    assert tried("123456")[0].trajectory.tokens.tolist() == [[5, 6, 7, 8, 9, 10]]  # the canvas ends it
    assert tried("1234567") == []
    counts = gather(Demonstrations(), All(), [tried("1234567"), tried("12"), tried("1234567")]).counts
    assert (counts["problems"], counts["long_reference"], counts["kept"]) == (3, 2, 1)
    with pytest.raises(InputError, match="problem p has no reference"):
        tried(None)


@pytest.mark.parametrize(
    "build",
    [
        lambda: PassAtK(problems=0),
        lambda: PassAtK(attempts=0),
        lambda: PassAtK(passes=0),
        lambda: PassAtK(keep="all"),
        lambda: Demonstrations(problems=0),
    ],
)
def test_impossible_rules_are_refused(build):
    with pytest.raises(InputError, match=r"method\.rollout"):
        build()


def test_no_rollouts_are_an_empty_group():
    assert Rollouts((), {}).group.tolist() == []
