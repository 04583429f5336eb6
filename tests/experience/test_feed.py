"""The feed: every problem once an epoch, in an order that depends on the seed and the position alone."""

from collections.abc import Sequence
from typing import Any

import pytest

from dllm_sd.errors import InputError
from dllm_sd.experience.feed import Feed, order_of_epoch
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.randomness import make_key, permutation
from dllm_sd.tasks import Problem, Sudoku

TASK: Any = Sudoku(prompt="{puzzle}")


def problems(lengths: Sequence[int]) -> list[Problem]:
    return [Problem(f"p{i}", {"puzzle": "1" * length}) for i, length in enumerate(lengths)]


def feed(policy: MaskedDiffusion, lengths: Sequence[int] = (4,) * 7, seed: int = 0, max_prompt: int = 4) -> Feed:
    return Feed(problems(lengths), policy, TASK, seed, max_prompt)


def names(feed: Feed, cursor: int, count: int) -> list[str]:
    return [item.problem.id for item in feed.take(cursor, count)[0]]


def test_an_epoch_holds_every_problem_once(policy: MaskedDiffusion):
    dealt = names(feed(policy), 0, 28)
    epochs = [dealt[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == [f"p{i}" for i in range(7)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_of_an_epoch_is_the_keyed_permutation_and_takes_four_bytes_a_problem(policy: MaskedDiffusion):
    source = feed(policy, lengths=(4,) * 50, seed=3)
    for epoch in range(3):
        expected = permutation(make_key(3, "epoch", epoch), 50)
        assert names(source, 50 * epoch, 50) == [f"p{i}" for i in expected]
        assert order_of_epoch(3, epoch, 50).nbytes == 4 * 50


def test_the_order_follows_from_the_seed(policy: MaskedDiffusion):
    assert names(feed(policy, seed=3), 0, 20) == names(feed(policy, seed=3), 0, 20)
    assert names(feed(policy, seed=3), 0, 20) != names(feed(policy, seed=4), 0, 20)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_it_does_not_matter_how_many_are_taken_at_once(policy: MaskedDiffusion, count: int):
    source, cursor, dealt = feed(policy, lengths=(4, 4, 9, 4, 9, 4, 4)), 0, []
    while len(dealt) < 30:
        taken, cursor, _ = source.take(cursor, count)
        assert len(taken) == count
        dealt += [item.problem.id for item in taken]
    assert dealt[:30] == names(feed(policy, lengths=(4, 4, 9, 4, 9, 4, 4)), 0, 30)


def test_the_cursor_is_all_that_a_resumed_run_needs(policy: MaskedDiffusion):
    source = feed(policy, lengths=(4, 9, 4, 9, 4))
    _, cursor, _ = source.take(0, 4)
    assert names(feed(policy, lengths=(4, 9, 4, 9, 4)), cursor, 6) == names(source, 0, 10)[4:]


def test_long_prompts_are_left_out_and_counted(policy: MaskedDiffusion):
    taken, cursor, dropped = feed(policy, lengths=(4, 5, 4, 9, 4, 4, 4)).take(0, 10)
    assert cursor == len(taken) + dropped == 10 + dropped
    assert 2 <= dropped <= 4
    assert all(len(item.prompt) == 4 for item in taken)
    assert not {"p1", "p3"} & {item.problem.id for item in taken}


def test_a_prompt_of_exactly_the_longest_length_is_kept(policy: MaskedDiffusion):
    assert len(names(feed(policy, lengths=(4, 4), max_prompt=4), 0, 2)) == 2


def test_prompts_are_those_of_the_task(policy: MaskedDiffusion):
    (item,), _, _ = feed(policy, lengths=(3,)).take(0, 1)
    assert list(item.prompt) == policy.encode([{"role": "user", "content": "111"}])


def test_an_epoch_without_a_short_prompt_is_refused(policy: MaskedDiffusion):
    with pytest.raises(InputError, match=r"^every training prompt is longer than max_prompt 4; raise it$"):
        feed(policy, lengths=(5, 6, 7)).take(2, 1)


def test_a_single_short_prompt_is_found_wherever_the_cursor_stands(policy: MaskedDiffusion):
    for cursor in range(12):
        taken, after, dropped = feed(policy, lengths=(9, 9, 9, 4, 9, 9)).take(cursor, 2)
        assert [item.problem.id for item in taken] == ["p3", "p3"]
        assert after == cursor + 2 + dropped


def test_an_empty_split_is_refused(policy: MaskedDiffusion):
    with pytest.raises(InputError, match=r"^the training split holds no problems; name other data in task$"):
        feed(policy, lengths=())
