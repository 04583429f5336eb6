"""The queue of attempts, alone and shared by several processes (here: threads that meet in `gather`)."""

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dllm_sd.decoding.settings import Decoding, Meter
from dllm_sd.errors import Stopped
from dllm_sd.network.merging import inference
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.attempt_queue import STEPS_PER_EXCHANGE, AttemptQueue, Workers
from dllm_sd.rollouts.rollout import Prompted
from dllm_sd.tasks.task import Grade, Problem
from dllm_sd.trajectory import Trajectory
from tests.tiers import later

N, LIMIT = 12, 6
PROMPTED = [Prompted(Problem(f"p{i}", {}), (4,) * (1 + i % 5)) for i in range(N)]
SETTINGS = Decoding(length=16, block_length=8, temperature=1.0, batch_size=3)


def key(problem: int, number: int) -> int:
    return make_key("attempts", problem, number)


def solves(problem: int, number: int) -> bool:
    """By hand: some are solved at once, some later, some never."""
    return number >= problem - 3 if problem < 8 else False


class Grader:
    """Solved by the number of the attempt, which it counts itself: attempts at a problem must come in order."""

    def __init__(self) -> None:
        self.seen: dict[int, int] = {}

    def __call__(self, problem: int, one: Trajectory) -> tuple[str, Grade]:
        number = self.seen.get(problem, 0)
        self.seen[problem] = number + 1
        return str(number), Grade(solves(problem, number), 0.0, None)


def together(size: int, work: Callable[[Workers], Any]) -> list[Any]:
    """What each of ``size`` processes makes of its work."""
    barrier, board, results = threading.Barrier(size, timeout=60), [None] * size, [None] * size

    def run(rank: int) -> None:
        def gather(own: list[Any]) -> list[Any]:
            board[rank] = own  # pyright: ignore[reportCallIssue, reportArgumentType]
            barrier.wait()
            every = [x for part in board for x in part or []]
            barrier.wait()
            return every

        try:
            results[rank] = work(Workers(rank, size, gather))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def serial(problem: int) -> int:
    """Attempts of a serial loop."""
    return next((i + 1 for i in range(LIMIT) if solves(problem, i)), LIMIT)


def test_a_serial_loop_by_hand():
    assert [serial(i) for i in range(N)] == [1, 1, 1, 1, 2, 3, 4, 5, 6, 6, 6, 6]


def drive(queue: AttemptQueue, room: int, meet: Callable[[int], int]) -> list[list[str]]:
    """A decoder without a model: each job takes ``meet(problem)`` rounds. Returns the names begun in each round."""
    busy: dict[tuple[int, ...], int] = {}
    begun: list[list[str]] = []
    while (jobs := queue.take(room - len(busy))) is not None:
        begun.append([f"{job.name[0]}.{job.name[1]}" for job in jobs])
        busy |= {job.name: meet(job.name[0]) for job in jobs}
        busy = {name: left for name, left in busy.items() if name in queue.open}
        for name, left in list(busy.items()):
            busy[name] = left - 1
            if left == 1:
                del busy[name]
                queue._unreported.append((*name, solves(*name)))  # pyright: ignore[reportArgumentType]
    return begun


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("ahead", [0, 2])
def test_each_attempt_of_the_serial_loop_begins_once_on_one_process(size: int, ahead: int):
    def work(workers: Workers) -> list[list[str]]:
        rng = random.Random(workers.rank)
        queue = AttemptQueue(PROMPTED, key, Grader(), limit=LIMIT, ahead=ahead, workers=workers)
        return drive(queue, 2, lambda problem: rng.randrange(1, 5))

    begun = [name for rounds in together(size, work) for names in rounds for name in names]
    needed = {f"{i}.{a}" for i in range(N) for a in range(serial(i))}
    assert len(begun) == len(set(begun))
    assert set(begun) >= needed
    assert ahead or set(begun) == needed


def test_no_process_is_without_work_while_another_has_some_to_give():
    def work(workers: Workers) -> list[tuple[int, int]]:
        queue, seen = AttemptQueue(PROMPTED, key, Grader(), limit=LIMIT, workers=workers), []
        take = queue.take

        def noted(room: int) -> Any:
            jobs = take(room)
            seen.append((room - len(jobs or []), len(queue.open)))
            return jobs

        queue.take = noted  # pyright: ignore[reportAttributeAccessIssue]
        drive(queue, 2, lambda problem: 1 + problem % 3)
        return seen

    seen = together(2, work)
    assert [under_way for _, under_way in seen[0]] == [under_way for _, under_way in seen[1]]
    for (free, under_way), (also_free, _) in zip(*seen, strict=True):
        assert free + also_free + under_way == 4 or under_way == 0  # every slot is taken or nothing waits
        assert abs(free - also_free) <= 2


def test_the_least_tried_problems_come_first_and_of_them_the_longest():
    queue = AttemptQueue(PROMPTED[:4], key, Grader(), limit=3, until_solved=False)
    assert [job.name for job in queue.take(5) or []] == [(3, 0), (2, 0), (1, 0), (0, 0), (3, 1)]
    assert queue.most == 12
    assert queue.longest == 4


@pytest.mark.parametrize(("size", "ahead"), [(2, 3), *later((3, 3), (2, 0), (3, 0))])
def test_several_processes_make_the_rollouts_of_one(policy: Any, size: int, ahead: int):
    def grade(problem: int, one: Trajectory) -> tuple[str, Grade]:
        return "", Grade(int(one.tokens[0, 0]) % 4 == 0, 0.0, None)

    def work(workers: Workers) -> tuple[list[Any], int]:
        queue, meter = AttemptQueue(PROMPTED, key, grade, limit=LIMIT, ahead=ahead, workers=workers), Meter()
        policy.decoder.complete(queue, SETTINGS, meter=meter)
        found = queue.collected()
        kept = [[one for one in tried if one.counted] for tried in found]
        return [[(x.attempt, x.trajectory.tokens.tolist(), x.grade) for x in tried] for tried in kept], meter.rows

    with torch.no_grad(), inference(policy.module):  # threads share its mode
        alone, rows = work(Workers())
        several = together(size, work)
    assert sum(map(len, alone)) > N
    for outcome, own in several:
        assert outcome == alone
        assert own > rows / size / 4
    assert AttemptQueue(PROMPTED, key, grade, limit=1, workers=Workers(0, 2)).patience == STEPS_PER_EXCHANGE


def test_a_decoder_that_fails_on_one_process_stops_the_others_with_its_sentence():
    def work(workers: Workers) -> str:
        queue = AttemptQueue(PROMPTED, key, Grader(), limit=2, workers=workers)
        try:
            while queue.take(1) is not None:
                if workers.rank == 1:
                    raise Stopped("the server is gone")
        except Stopped as error:
            queue.abandon(error)
            return str(error)
        return "went on"

    assert together(2, work) == ["the server is gone"] * 2
