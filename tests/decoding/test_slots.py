"""The slots of the denoiser: how rows are cut into forwards, fixed shapes, queues that grow, rows that are dropped."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_sd.decoding import denoising, slots
from dllm_sd.decoding.denoising import denoise
from dllm_sd.decoding.queue import Job, Listed
from dllm_sd.decoding.settings import Decoding, Meter
from dllm_sd.decoding.slots import CanvasLayout, split_by_budget
from dllm_sd.errors import InputError
from dllm_sd.network.merging import inference
from dllm_sd.randomness import make_key
from dllm_sd.trajectory import StopAfter, Trajectory
from tests.tiers import crossed, later

PROMPTS = [[4 + (i + j) % 20 for j in range(n)] for i, n in enumerate([4, 1, 7, 3, 2, 30, 11, 5, 1, 17])]
KEYS = [make_key("slots", i) for i in range(len(PROMPTS))]
SHORT = Decoding(length=12, block_length=6, tokens_per_step=2, temperature=1.0)


def assert_same(ours: Trajectory, theirs: Trajectory, but: str = "") -> None:
    for name in ("prompt_ids", "tokens", "reveal_step", "length"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), (name, but)
    torch.testing.assert_close(ours.logp, theirs.logp, equal_nan=True, atol=1e-5, rtol=0)


def fixed(policy: Any, settings: Decoding, prompts: Sequence[Sequence[int]] = PROMPTS, **options: Any) -> Trajectory:
    """Decoded in fixed shapes, as for a compiled module."""
    queue = Listed(prompts, KEYS[: len(prompts)])
    layout = CanvasLayout(policy.mask_id, policy.end_ids, policy.pad_id, policy.block_length is not None)
    with inference(policy.module):
        settings = replace(settings, suppress=policy.suppress)
        denoise(policy.module, queue, settings, layout, vocabulary=30, static_shapes=True, **options)
    return queue.collected()


CASES = {
    "sampled": SHORT,
    "greedy": replace(SHORT, temperature=0.0),
    "margin": replace(SHORT, order="margin"),
    "entropy": replace(SHORT, order="entropy"),
    "random": replace(SHORT, order="random"),
    "left to right": replace(SHORT, order="left_to_right"),
    "threshold": replace(SHORT, threshold=0.3),
    "guidance": replace(SHORT, guidance=1.5),
    "idle steps": replace(SHORT, steps=18),
    "no early end": replace(SHORT, early_end=False),
}


def cases(*first: str) -> pytest.MarkDecorator:
    """All cases of a test, of which some are in the first tier, each in some test."""
    return pytest.mark.parametrize("name", [*first, *later(*(name for name in CASES if name not in first))])


@cases("sampled", "idle steps")
@pytest.mark.parametrize("batch_size", [3, pytest.param(64, marks=pytest.mark.slow)])
def test_fixed_shapes_change_nothing(policy: Any, name: str, batch_size: int):
    settings = replace(CASES[name], batch_size=batch_size)
    assert_same(fixed(policy, settings), policy.decode(PROMPTS, settings, KEYS))


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_fixed_shapes_change_nothing_where_blocks_begin_in_the_prompt(make_policy: Any, threshold: float | None):
    policy = make_policy(block_length=6)
    settings = replace(SHORT, threshold=threshold, prefix_cache=False)
    assert_same(fixed(policy, settings), policy.decode(PROMPTS, settings, KEYS))


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_whole_blocks_change_nothing_with_the_prefix_cache(make_policy: Any, threshold: float | None, monkeypatch: Any):
    policy, settings = make_policy(block_length=6), replace(SHORT, threshold=threshold)
    expected, sizes = policy.decode(PROMPTS, settings, KEYS), []
    stepper: Any = denoising._Stepper.__init__
    monkeypatch.setattr(denoising._Stepper, "__init__", lambda *args: stepper(*args[:-1], True))
    head = policy.module.network.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    assert_same(policy.decode(PROMPTS, settings, KEYS), expected)
    hook.remove()
    assert sizes
    assert all(size % 6 == 0 for size in sizes)


def test_fixed_shapes_change_nothing_where_logits_speak_about_the_next_position(make_policy: Any):
    policy = make_policy()
    policy.module.shift = True
    assert_same(fixed(policy, SHORT), policy.decode(PROMPTS, SHORT, KEYS))


def test_fixed_shapes_are_few(policy: Any):
    shapes: set[tuple[int, ...]] = set()
    hook = policy.module.register_forward_pre_hook(lambda module, args: shapes.add((*args[0].shape, *args[2].shape)))
    fixed(policy, replace(SHORT, batch_size=5))
    hook.remove()
    assert shapes <= {(rows, 42, rows, 6) for rows in (1, 2, 4, 5)}
    assert (5, 42, 5, 6) in shapes


@pytest.mark.parametrize("every", [4, *later(1, 100)])
def test_looking_seldom_changes_nothing_but_what_is_read(policy: Any, every: int):
    settings, meter = replace(SHORT, batch_size=3), Meter()
    plain = Listed(PROMPTS[:5], KEYS[:5])
    policy.decoder.complete(plain, settings, meter=meter)
    queue, rare = Listed(PROMPTS[:5], KEYS[:5]), Meter()
    queue.patience = every
    policy.decoder.complete(queue, settings, meter=rare)
    assert_same(queue.collected(), plain.collected())
    assert rare.rows == meter.rows == int(plain.collected().num_steps.sum())
    assert rare.read >= meter.read == meter.rows


GUIDED = replace(SHORT, guidance=1.0)


@pytest.mark.parametrize(
    ("settings", "budget"),
    [(SHORT, 1), (GUIDED, 40), *later((SHORT, 10_000), (GUIDED, 1), (SHORT, 40), (GUIDED, 10_000))],
)
def test_the_cut_into_forwards_changes_nothing(
    policy: Any, settings: Decoding, budget: int, monkeypatch: pytest.MonkeyPatch
):
    expected = policy.decode(PROMPTS, settings, KEYS)
    monkeypatch.setitem(slots.POSITIONS_PER_FORWARD, "cpu", budget)
    monkeypatch.setitem(denoising.DECODE_CHUNK_LOGITS, "cpu", 70)
    passes: list[Tensor] = []
    hook = policy.module.register_forward_pre_hook(lambda module, args: passes.append(args[0]))
    meter = Meter()
    assert_same(policy.decode(PROMPTS, settings, KEYS, meter=meter), expected)
    hook.remove()
    assert meter.positions * (2 if settings.guidance else 1) == sum(ids.numel() for ids in passes)
    if budget == 1:
        assert all(len(ids) == 1 for ids in passes)
        real = sum(len(prompt) + SHORT.length for prompt in PROMPTS)
        assert meter.positions < real * int(expected.num_steps.max())
    if budget == 10_000:
        assert len(passes) == meter.forwards * (2 if settings.guidance else 1)


def test_rows_are_cut_into_parts_of_like_width():
    assert split_by_budget([5, 5, 5, 5], 10) == [(0, 2), (2, 4)]
    assert split_by_budget([9, 3, 3, 3, 3], 9) == [(0, 1), (1, 4), (4, 5)]
    assert split_by_budget([7], 3) == [(0, 1)]
    assert split_by_budget([], 3) == []
    for seed in range(50):
        widths = sorted(torch.randint(1, 90, (seed + 1,), generator=torch.Generator().manual_seed(seed)).tolist())[::-1]
        cut = split_by_budget(widths, 200)
        assert [i for a, b in cut for i in range(a, b)] == list(range(len(widths)))
        assert all((b - a) * widths[a] <= 200 for a, b in cut)
        assert all((b + 1 - a) * widths[a] > 200 for a, b in cut[:-1])


class Growing:
    """A queue that asks for more once something has ended, and drops a job while it is under way."""

    patience: int | None = None
    most, longest = 4, 30

    def __init__(self) -> None:
        self.due = [0, 1, 2, 3]
        self.open: set[int] = set()
        self.dropped: set[int] = set()
        self.done: dict[int, Trajectory] = {}

    def take(self, room: int) -> list[Job] | None:
        begun, self.due = self.due[:room], self.due[room:]
        self.open |= set(begun)
        return [Job((i,), PROMPTS[i], KEYS[i]) for i in begun] if self.open else None

    def wanted(self, job: Job) -> bool:
        return job.name[0] not in self.dropped

    def ended(self, jobs: Sequence[Job], trajectory: Trajectory) -> None:
        for job, one in zip(jobs, trajectory.unstack(), strict=True):
            self.done[job.name[0]] = one
            self.open.discard(job.name[0])
            if job.name[0] + 4 < 10:
                self.due.append(job.name[0] + 4)
        if 5 in self.open:
            self.dropped.add(5)
            self.open.discard(5)


@pytest.mark.parametrize(("batch_size", "patience"), crossed([2, 3, 64], [None, 2]))
def test_a_queue_may_grow_and_drop_what_it_no_longer_wants(policy: Any, batch_size: int, patience: int | None):
    expected, queue = policy.decode(PROMPTS, SHORT, KEYS), Growing()
    queue.patience = patience
    policy.decoder.complete(queue, replace(SHORT, batch_size=batch_size))
    assert queue.dropped == {5}
    assert set(queue.done) == {0, 1, 2, 3, 4, 6, 7, 8}  # what follows 5 was never asked for
    for i, one in queue.done.items():
        assert_same(one, expected.select(torch.tensor([i])), str(i))


def test_the_reach_holds_in_fixed_shapes(policy: Any):
    for stop_after in (StopAfter("steps", 4), StopAfter("blocks", 1)):
        assert_same(
            fixed(policy, SHORT, stop_after=stop_after), policy.decode(PROMPTS, SHORT, KEYS, stop_after=stop_after)
        )


def test_nothing_to_decode_is_nothing(policy: Any):
    queue = Listed([], [])
    policy.decoder.complete(queue, SHORT)
    assert queue.take(3) is None


def test_compiling_is_refused_where_shapes_are_not_static(make_policy: Any):
    policy = make_policy(block_length=6)
    with pytest.raises(InputError, match=r"^decode\.compile needs static shapes and decode\.prefix_cache has none"):
        policy.decode(PROMPTS, replace(SHORT, compile="default"), KEYS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_compiled_layers_change_nothing(policy: Any):
    expected = policy.decode(PROMPTS, SHORT, KEYS)
    for _ in range(2):  # the second time from what was compiled
        assert_same(policy.decode(PROMPTS, replace(SHORT, compile="default"), KEYS), expected)
        assert policy.module.body is None


class HostReads(TorchDispatchMode):
    """Notes the operations that make a host wait for its device: values as Python numbers, results of unknown size."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or name.lstrip("_") in {wait.lstrip("_") for wait in self.WAITS}:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@cases("entropy", "threshold", "guidance")
def test_a_step_of_fixed_shapes_waits_for_nothing_on_the_device(policy: Any, name: str, monkeypatch: Any):
    settings, steps, read = replace(CASES[name], batch_size=4), 0, HostReads()
    step = denoising._Stepper.__call__

    def watched(self: Any, group: Any) -> None:
        nonlocal steps
        steps += 1
        with read:
            step(self, group)

    monkeypatch.setattr(denoising._Stepper, "__call__", watched)
    fixed(policy, settings, PROMPTS[:5])  # one row more than there are slots
    assert steps > 5
    assert read.seen == []
    policy.decode(PROMPTS[:1], settings, KEYS[:1])  # what is masked is known to the device alone
    assert "nonzero" in read.seen or "index" in read.seen
