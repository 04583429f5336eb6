"""Continuous batching against `generate`: the same tokens for the same keys, and a network that is left as it was."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching import ContinuousBatchingManager, RequestState
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import FutureRequestState

from dllm_sd.decoding import continuous
from dllm_sd.decoding.continuous import ContinuousSampler
from dllm_sd.decoding.sampling import draw
from dllm_sd.decoding.settings import Decoding, Meter
from dllm_sd.errors import InputError
from dllm_sd.network.view import View
from dllm_sd.policies.autoregressive import Autoregressive
from dllm_sd.pretrained.model import Lora, Shape
from dllm_sd.randomness import fold, key_tensor, make_key, uniform
from dllm_sd.trajectory import StopAfter, Trajectory
from tests.tiers import later

END, PAD = 1, 2
PROMPTS = [[4, 5, 14, 6], [7], [8, 9, 10, 11, 12, 13, 4], [5, 16, 5], [20, 21], [6] * 5, [5, 16, 5], [9] * 30]
KEYS = [make_key("row", i) for i in range(len(PROMPTS))]
GREEDY = Decoding(length=14)
WARM = replace(GREEDY, temperature=1.0)
SETTINGS = {
    "greedy": GREEDY,
    "sampled": WARM,
    "cold": replace(WARM, temperature=0.7),
    "top k and top p": replace(WARM, temperature=1.1, top_k=9, top_p=0.8),
    "suppressed": replace(WARM, suppress=(7, 12, 13)),
    "long": replace(WARM, length=40),
    "one token": replace(WARM, length=1),
}
QUICK = ("greedy", "sampled")
"""Those of the first tier."""
LORA = Lora(rank=4, alpha=8, dropout=0.5)

Make = Callable[..., Autoregressive]


@pytest.fixture(scope="module")
def make(make_policy: Callable[..., Any]) -> Make:
    """Builds a random causal policy in float64."""
    return lambda **options: make_policy(as_="autoregressive", **options)


@pytest.fixture(scope="module")
def causal(make: Make) -> Autoregressive:
    """One causal policy for all tests that change nothing in it."""
    return make()


@pytest.fixture(scope="module", params=["llama", *later("qwen3")])
def both(request: pytest.FixtureRequest, make: Make, policy_shape: Shape) -> Autoregressive:
    return make(shape=replace(policy_shape, architecture=request.param))


def in_turns(policy: Autoregressive, settings: Decoding, prompts: Any = PROMPTS, keys: Any = KEYS, **more: Any):
    return policy.decode(prompts, replace(settings, continuous=True), keys, **more)


def same(ours: Trajectory, theirs: Trajectory, atol: float = 1e-5) -> None:
    """Equal in all; log-probabilities to 1e-5 (they are of float32)."""
    for name in ("prompt_ids", "prompt_mask", "tokens", "reveal_step", "length"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    torch.testing.assert_close(ours.logp, theirs.logp, atol=atol, rtol=0, equal_nan=True)


def disturb(policy: Autoregressive) -> None:
    """Adapters start at zero, where they show nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in policy.module.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype))


def view_of(done: Trajectory) -> View:
    mask = torch.cat([done.prompt_mask, done.is_written], 1)
    sites = torch.cat([torch.zeros_like(done.prompt_mask), done.is_written], 1)
    return View(torch.cat([done.prompt_ids, done.tokens], 1), mask, sites)


# The same trajectories


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS if name not in QUICK)]
)
def test_tokens_and_reveal_steps_are_those_of_generate(both, name):
    settings = SETTINGS[name]
    theirs = both.decode(PROMPTS, settings, KEYS)
    same(in_turns(both, settings), theirs)
    if name == "sampled":
        assert len({int(length) for length in theirs.length}) > 2, "rows end at different steps"
        assert {bool(x) for x in theirs.ended} == {True, False}


@pytest.mark.parametrize("batch_size", [3, *(pytest.param(value, marks=pytest.mark.slow) for value in (1, 2, 7))])
def test_the_number_of_slots_changes_nothing(causal, batch_size):
    same(in_turns(causal, replace(WARM, batch_size=batch_size)), causal.decode(PROMPTS, WARM, KEYS))


@pytest.mark.slow
def test_the_order_of_rows_changes_nothing(causal):
    order = [5, 0, 7, 2, 6, 1, 4, 3]
    ours = in_turns(causal, WARM, [PROMPTS[i] for i in order], [KEYS[i] for i in order])
    same(ours, causal.decode(PROMPTS, WARM, KEYS).select(torch.tensor(order)))


@pytest.mark.slow
def test_equal_prompts_share_nothing_but_the_prompt(causal):
    prompts, keys = [[4, 5, 6, 7] * 150] * 5, KEYS[:5]  # more than two pages, that transformers keeps once
    ours = in_turns(causal, replace(WARM, batch_size=2), prompts, keys)
    same(ours, causal.decode(prompts, WARM, keys))
    assert len({tuple(tokens) for tokens in ours.tokens.tolist()}) == 5


def test_a_row_ends_with_any_of_the_end_tokens(causal):
    policy = Autoregressive(causal.module.model, causal.chat, end_ids=(1, 7, 9), pad_id=9)
    theirs = policy.decode(PROMPTS, WARM, KEYS)
    same(in_turns(policy, WARM), theirs)
    assert len({int(theirs.tokens[row, theirs.length[row] - 1]) for row in range(theirs.size)} & {1, 7, 9}) > 1


@pytest.mark.parametrize("count", [5, *(pytest.param(value, marks=pytest.mark.slow) for value in (1, 99))])
def test_a_horizon_is_the_start_of_the_whole(causal, count):
    stop_after = StopAfter("steps", count)
    ours = in_turns(causal, WARM, stop_after=stop_after)
    same(ours, causal.decode(PROMPTS, WARM, KEYS, stop_after=stop_after))
    assert int(ours.written.max()) == min(count, 14)


@pytest.mark.parametrize("merge_rollouts", [False, *later(True)])
def test_adapters_are_read_as_in_generate(make, merge_rollouts):
    policy, bare = make(lora=replace(LORA, merge_rollouts=merge_rollouts)), make()
    disturb(policy)
    ours = in_turns(policy, WARM)
    same(ours, policy.decode(PROMPTS, WARM, KEYS))
    assert not torch.equal(ours.tokens, bare.decode(PROMPTS, WARM, KEYS).tokens)


@pytest.mark.slow
def test_the_eager_attention_of_a_model_stays_its_own(make):
    policy = make(attention="eager", dtype="float32")
    same(in_turns(policy, WARM), policy.decode(PROMPTS, WARM, KEYS))
    assert policy.module.network.config._attn_implementation == "eager"


def test_autocast_reaches_the_thread_in_which_transformers_decodes(make):
    policy = make(lora=replace(LORA, rank=8), dtype="bfloat16")
    disturb(policy)
    kinds: list[bool] = []
    layer = policy.module.network.base_model.layers[0]
    hook = layer.register_forward_hook(lambda *_: kinds.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        ours = in_turns(policy, WARM)
        assert kinds
        assert all(kinds)
        theirs = policy.decode(PROMPTS, WARM, KEYS)
    hook.remove()
    assert torch.equal(ours.tokens[:, 0], theirs.tokens[:, 0])  # later ones hang on the rounding of attention
    assert "forward" not in vars(policy.module.network)


@pytest.mark.slow
def test_a_prompt_that_is_read_in_several_passes_changes_nothing(causal, monkeypatch):
    monkeypatch.setattr(continuous, "MAX_FORWARD_TOKENS", 11)
    same(in_turns(causal, replace(WARM, batch_size=4)), causal.decode(PROMPTS, WARM, KEYS))


@pytest.mark.slow
@pytest.mark.parametrize("room", [0.2, pytest.param(0.5, marks=pytest.mark.slow)])
def test_rows_that_give_their_pages_away_begin_anew_and_end_the_same(causal, monkeypatch, room):
    monkeypatch.setattr(continuous, "PAGE_TOKENS", 4)
    monkeypatch.setattr(continuous, "PAGE_SURPLUS", room)
    restarted: list[str] = []
    anew = RequestState.create_equivalent_initial_request

    def noted(state: RequestState) -> RequestState:
        restarted.append(state.request_id)
        return anew(state)

    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", noted)
    settings = replace(WARM, length=40, batch_size=8, suppress=(END,))
    same(in_turns(causal, settings), causal.decode(PROMPTS, settings, KEYS))
    assert restarted


@pytest.mark.slow
def test_passes_that_are_padded_and_warmed_up_as_for_cuda_graphs_change_nothing(causal, monkeypatch):
    made: Any = ModelRunner.__init__
    widths: list[tuple[int, int]] = []
    choose = ContinuousSampler.__call__

    def padding(runner: ModelRunner, *arguments: Any, **options: Any) -> None:
        made(runner, *arguments, **options)
        runner.pad_inputs = True

    def noted(choice: ContinuousSampler, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        widths.append((len(scores), int((tensor_arg[: len(scores)] != choice.nobody).sum())))
        return choose(choice, scores, tensor_arg)

    monkeypatch.setattr(ModelRunner, "__init__", padding)
    monkeypatch.setattr(ContinuousSampler, "__call__", noted)
    settings, meter = replace(WARM, batch_size=5), Meter()
    same(in_turns(causal, settings, meter=meter), causal.decode(PROMPTS, settings, KEYS))
    assert {width for width, _ in widths} == {5}
    assert {busy for _, busy in widths} > {0, 1, 5}
    assert meter.forwards < len(widths), "the warm-up is not counted"


def test_log_probabilities_are_those_of_the_students_logits_at_the_same_sites(both):
    done = in_turns(both, replace(WARM, temperature=0.8, top_k=5))
    logits = both.site_logits(view_of(done))
    logp = (logits / 0.8).log_softmax(-1).gather(-1, done.tokens[done.is_written][:, None])[:, 0]
    assert done.logp is not None
    torch.testing.assert_close(done.logp[done.is_written].double(), logp, atol=1e-5, rtol=0)
    assert done.logp[~done.is_written].isnan().all()


# What it costs, and who is told


def test_rows_are_told_of_as_they_end(causal):
    told: list[tuple[list[int], Trajectory]] = []
    done = in_turns(causal, replace(WARM, batch_size=3), finished=lambda rows, part: told.append((rows.tolist(), part)))
    assert sorted(row for rows, _ in told for row in rows) == list(range(len(PROMPTS)))
    for rows, part in told:
        one = done.select(torch.tensor(rows))
        assert torch.equal(part.tokens, one.tokens)
        torch.testing.assert_close(part.logp, one.logp, equal_nan=True)
    assert [row for rows, _ in told for row in rows] != list(range(len(PROMPTS)))


@pytest.mark.parametrize("batch_size", [3, *(pytest.param(value, marks=pytest.mark.slow) for value in (2, 64))])
def test_the_meter_counts_passes_and_busy_slots(causal, batch_size):
    settings = replace(WARM, batch_size=batch_size)
    meter, other, passes = Meter(), Meter(), []
    hook = causal.module.network.base_model.register_forward_hook(lambda *_: passes.append(1))
    done = in_turns(causal, settings, meter=meter)
    hook.remove()
    causal.decode(PROMPTS, settings, KEYS, meter=other)
    assert meter.forwards == len(passes)
    assert meter.slots == meter.forwards * min(batch_size, len(PROMPTS))
    assert meter.rows == other.rows == int(done.written.sum())
    if batch_size < len(PROMPTS):
        assert meter.occupancy > other.occupancy, "a free slot is taken at once"


# The network afterwards


@pytest.mark.slow
def test_logits_modes_and_settings_are_the_same_before_and_after(make):
    policy = make(lora=LORA)
    disturb(policy)
    network = policy.module.network
    policy.module.train()
    next(iter(policy.module.children())).eval()
    view = view_of(policy.decode(PROMPTS, GREEDY, KEYS))
    with torch.no_grad():
        before = policy.site_logits(view)
    modes = [part.training for part in policy.module.modules()]
    own, attention, names = network.generation_config, network.config._attn_implementation, set(vars(network))
    text = own.to_json_string()
    torch.manual_seed(11)
    random.seed(11)
    state, other = torch.get_rng_state(), random.getstate()
    one, again = in_turns(policy, WARM), in_turns(policy, WARM)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == other
    same(one, again, atol=0)
    assert [part.training for part in policy.module.modules()] == modes
    assert (network.generation_config, network.config._attn_implementation) == (own, attention)
    assert own.to_json_string() == text
    assert set(vars(network)) == names
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert torch.equal(policy.site_logits(view), before)
    assert not any(value.grad is not None for value in policy.module.parameters())


@pytest.mark.parametrize(
    "changes",
    [{"repetition_penalty": 5.0}, *later({"do_sample": True, "temperature": 0.2}, {"max_new_tokens": 2})],
    ids=lambda changes: next(iter(changes)),
)
def test_what_the_checkpoint_says_of_generation_changes_nothing(make, causal, changes):
    policy = make()
    policy.module.network.generation_config.update(**changes)
    same(in_turns(policy, WARM), causal.decode(PROMPTS, WARM, KEYS))


# Failures


def broken(monkeypatch: pytest.MonkeyPatch, policy: Autoregressive, after: int) -> None:
    passes = iter(range(1000))

    def forward(*_: Any, **__: Any) -> Any:
        if next(passes) >= after:
            raise ValueError("no more")
        return own(*_, **__)

    own = policy.module.network.base_model.forward
    monkeypatch.setattr(policy.module.network.base_model, "forward", forward)


@pytest.mark.parametrize("after", [5, pytest.param(0, marks=pytest.mark.slow)])
def test_a_failure_of_the_thread_is_an_error_here(make, monkeypatch, after):
    policy = make(attention="eager", dtype="float32")
    with monkeypatch.context() as patch:
        broken(patch, policy, after)
        with pytest.raises(RuntimeError, match=r"^continuous batching failed \(no more\); set decode.continuous to"):
            in_turns(policy, replace(WARM, batch_size=3))
    assert policy.module.network.config._attn_implementation == "eager"
    same(in_turns(policy, WARM), policy.decode(PROMPTS, WARM, KEYS))


def test_a_thread_that_stops_is_an_error_here(causal, monkeypatch):
    monkeypatch.setattr(ContinuousBatchingManager, "_run_generation_loop", lambda _: None)
    with pytest.raises(RuntimeError, match="continuous batching stopped before all rows had ended"):
        in_turns(causal, WARM)


def test_a_row_that_is_left_unfinished_is_an_error_here(causal, monkeypatch):
    add = ContinuousBatchingManager.add_request
    monkeypatch.setattr(
        ContinuousBatchingManager, "add_request", lambda self, ids, request_id: add(self, ids, request_id, 3)
    )
    with pytest.raises(RuntimeError, match="continuous batching left a row unfinished"):
        in_turns(causal, replace(WARM, suppress=(END,)))


@pytest.mark.slow
def test_an_error_of_who_is_told_stops_the_thread(causal):
    def refuse(*_: Any) -> None:
        raise KeyError("told")

    with pytest.raises(KeyError, match="told"):
        in_turns(causal, replace(WARM, batch_size=1), finished=refuse)
    same(in_turns(causal, WARM), causal.decode(PROMPTS, WARM, KEYS))


def test_a_model_that_transformers_does_not_take_is_refused(make, monkeypatch):
    policy = make(attention="eager")
    monkeypatch.setattr(policy.module.network.config, "layer_types", ["linear_attention"] * 2, raising=False)
    with pytest.raises(InputError) as caught:
        in_turns(policy, WARM)
    assert str(caught.value) == (
        "decode.continuous cannot run this model here (Invalid layer type: linear_attention); set it to false"
    )
    assert policy.module.network.config._attn_implementation == "eager", "though nothing had started"


@pytest.mark.slow
def test_without_memory_for_all_rows_the_free_memory_is_taken(causal, monkeypatch):
    seen: list[Any] = []
    warmup = ContinuousBatchingManager.warmup

    def narrow(manager: ContinuousBatchingManager) -> None:
        seen.append(manager.continuous_batching_config.num_blocks)
        if len(seen) == 1:
            raise MemoryError("too much")
        manager.continuous_batching_config.num_blocks = 4
        warmup(manager)

    monkeypatch.setattr(ContinuousBatchingManager, "warmup", narrow)
    same(in_turns(causal, WARM), causal.decode(PROMPTS, WARM, KEYS))
    assert seen == [11, None]


def test_nothing_can_be_watched(causal):
    with pytest.raises(InputError, match=r"^decode\.continuous has no common step to watch; set it to false$"):
        in_turns(causal, WARM, watch=lambda _: None)


def test_weights_of_another_type_than_autocasts_are_refused(causal):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="needs weights of that type"):
        in_turns(causal, WARM)


def test_weights_in_pieces_are_refused(causal, monkeypatch):
    monkeypatch.setattr(continuous, "FSDPModule", torch.nn.Embedding)
    with pytest.raises(InputError, match=r"^decode\.continuous needs whole weights and FSDP2 keeps them in pieces"):
        in_turns(causal, WARM)


# The choice itself


def waiting(read: Sequence[tuple[str, int]]) -> list[FutureRequestState]:
    """Requests that have so many tokens read with the pass that is being prepared."""
    return [FutureRequestState(RequestState(name, [0], position_offset=count), True, {}, 1) for name, count in read]


@pytest.fixture
def choice() -> ContinuousSampler:
    settings = replace(WARM, temperature=0.8, top_k=6, suppress=(3,), batch_size=4)
    return ContinuousSampler(settings, key_tensor(KEYS[:3]), (5,), [[4] * 2, [4] * 7, [4]], steps=6)


def test_a_slot_draws_what_its_row_draws_at_its_step(choice):
    scores = 3 * torch.randn((3, 23), generator=torch.Generator().manual_seed(0))
    argument = choice.prepare_tensor_args(waiting([("2", 1), ("0", 5), ("1", 12)]))
    assert argument.tolist() == [12, 3, 11]
    forced = choice(scores, argument)
    for slot, (row, step) in enumerate([(2, 0), (0, 3), (1, 5)]):
        u = uniform(fold(key_tensor([KEYS[row]]), step), 1)[:, 0]
        drawn = draw(scores[slot : slot + 1].clone(), choice.settings, torch.tensor([3, 5]), u)
        assert int(forced[slot].argmax()) == int(drawn.token)
        assert sorted(forced[slot].tolist())[-2:] == [-torch.inf, 0.0]
        assert torch.equal(choice.logp[row * 6 + step], drawn.logp[0])
    assert int(choice.logp[:-1].isnan().logical_not().sum()) == 3


def test_slots_without_a_row_write_where_nobody_reads(choice):
    processors: Any = [choice]
    every = ContinuousBatchingLogitsProcessorList(LogitsProcessorList(processors))
    kept = torch.empty((1, 8), dtype=torch.int32)
    every.fill_defaults(kept)
    ids: Any = torch.zeros((3, 1), dtype=torch.int64)
    scores = torch.randn((3, 23), generator=torch.Generator().manual_seed(0))
    beyond, nothing, warm_up = [("0", 8)], [], [("__warmup__", 1)]
    seen: set[int] = set()
    for read, cells in (
        ([("2", 1), ("0", 5), ("1", 12)], {12, 3, 11}),
        ([("2", 2)], {13}),
        (warm_up, set()),
        (beyond, set()),
        (nothing, set()),
    ):
        every.prepare_tensor_args(waiting(read), kept)
        before = choice.logp.clone()
        every(ids, scores, kept)
        seen |= cells
        assert set(choice.logp[:-1].isnan().logical_not().nonzero()[:, 0].tolist()) == seen
        old = torch.tensor(sorted(seen - cells), dtype=torch.int64)
        assert torch.equal(choice.logp[old], before[old])
    assert choice.passes == 4, "all but the warm-up"
    assert kept[0, 4:].tolist() == [18] * 4


def test_positions_that_are_counted_in_another_way_are_noticed(choice):
    with pytest.raises(RuntimeError, match="transformers counts positions in another way"):
        choice.prepare_tensor_args(waiting([("1", 3)]))


def test_the_numbers_lie_ready_for_every_row_and_step(choice):
    plain = [float(uniform(fold(key_tensor([key]), step), 1)) for key in KEYS[:3] for step in range(6)]
    assert choice.u[:-1].tolist() == plain
