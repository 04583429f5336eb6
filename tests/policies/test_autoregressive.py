"""The autoregressive policy against plain transformers: tokens, log-probabilities, logits, gradients."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import dllm_sd
from dllm_sd.decoding.settings import Decoding, Meter
from dllm_sd.errors import InputError
from dllm_sd.network.view import View
from dllm_sd.policies.autoregressive import Autoregressive
from dllm_sd.policies.loading import AnyPolicy, build_policy, load_policy
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.pretrained.model import Lora, Model, Shape
from dllm_sd.randomness import fold, key_tensor, make_key, uniform
from dllm_sd.trajectory import NEVER, NO_MASK, StopAfter, Trajectory, left_pad
from tests.oracles.sampling import inverse, kept
from tests.tiers import crossed, later

TINY = Path(dllm_sd.__file__).parent / "assets" / "tiny"
END, PAD = 1, 2
PROMPTS = [[4, 5, 14, 6], [7], [8, 9, 10, 11, 12, 13, 4], [5, 16, 5], [20, 21], [6, 6, 6, 6, 6]]
KEYS = [make_key("row", i) for i in range(len(PROMPTS))]
WARM = Decoding(length=14, temperature=1.0)
SAMPLING = {
    "temperature": replace(WARM, temperature=0.7),
    "top k": replace(WARM, temperature=1.3, top_k=4),
    "top p": replace(WARM, temperature=1.1, top_p=0.6),
    "top k and top p": replace(WARM, temperature=0.9, top_k=6, top_p=0.8),
    "more than there are": replace(WARM, top_k=1000),
}


def sampling(*first: str) -> pytest.MarkDecorator:
    """All settings as cases of a test, of which some are in the first tier, each in some test."""
    return pytest.mark.parametrize("name", [*first, *later(*(name for name in SAMPLING if name not in first))])


Make = Callable[..., Autoregressive]


@pytest.fixture(scope="module")
def make(make_policy: Callable[..., Any]) -> Make:
    """Builds a random causal policy in float64."""
    return lambda **options: make_policy(as_="autoregressive", **options)


@pytest.fixture(scope="module")
def causal(make: Make) -> Autoregressive:
    """One causal policy for all tests that change nothing in it."""
    return make()


@pytest.fixture(scope="module", params=["qwen3", *later("llama")])
def both(request: pytest.FixtureRequest, make: Make, policy_shape: Shape) -> Autoregressive:
    return make(shape=replace(policy_shape, architecture=request.param))


def network(policy: AnyPolicy) -> PreTrainedModel:
    return policy.module.network


def plain_logits(policy: Autoregressive, ids: Sequence[int]) -> Tensor:
    """Logits ``[s v]`` of one sequence without padding, cache or choice of sites; row i speaks about position i + 1."""
    with torch.no_grad():
        return network(policy)(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def written(trajectory: Trajectory, row: int) -> list[int]:
    return trajectory.tokens[row, : int(trajectory.written[row])].tolist()


def prompt_of(trajectory: Trajectory, row: int) -> list[int]:
    return trajectory.prompt_ids[row][trajectory.prompt_mask[row]].tolist()


def same(ours: Trajectory, theirs: Trajectory) -> None:
    """Equal in all but the width of the prompts; log-probabilities to 1e-5 (they are of float32)."""
    assert [prompt_of(ours, i) for i in range(ours.size)] == [prompt_of(theirs, i) for i in range(theirs.size)]
    for name in ("tokens", "reveal_step", "length"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    torch.testing.assert_close(ours.logp, theirs.logp, atol=1e-5, rtol=0, equal_nan=True)


@contextmanager
def counted(policy: Autoregressive) -> Iterator[list[int]]:
    """The rows of every forward pass inside."""
    passes: list[int] = []
    hook = network(policy).base_model.register_forward_hook(lambda _, __, out: passes.append(len(out[0])))
    try:
        yield passes
    finally:
        hook.remove()


def test_greedy_tokens_are_those_of_plain_transformers(both):
    plain = deepcopy(network(both))
    ids, mask = left_pad(PROMPTS, PAD)
    settings: Any = {"do_sample": False, "max_new_tokens": 14, "eos_token_id": [END], "pad_token_id": PAD}
    theirs: Any = plain.generate(input_ids=ids, attention_mask=mask, **settings)  # pyright: ignore[reportCallIssue]
    ours = both.decode(PROMPTS, Decoding(length=14), KEYS)
    lengths = set()
    for row, prompt in enumerate(PROMPTS):
        alone: Any = plain.generate(input_ids=torch.tensor([prompt]), **settings)  # pyright: ignore[reportCallIssue]
        tokens = alone[0, len(prompt) :].tolist()
        batched = theirs[row, ids.shape[1] :].tolist()
        assert written(ours, row) == tokens == batched[: len(tokens)]
        lengths.add(len(tokens))
    assert len(lengths) > 1, "some end early, some do not"


@sampling("top k", "top p")
def test_sampled_tokens_are_those_of_an_inverse_distribution_at_the_keyed_numbers(both, name):
    settings = SAMPLING[name]
    ours = both.decode(PROMPTS, settings, KEYS)
    for row, prompt in enumerate(PROMPTS):
        tokens = written(ours, row)
        assert len(tokens) == settings.length or tokens[-1] == END
        assert END not in tokens[:-1]
        logits = plain_logits(both, [*prompt, *tokens])[len(prompt) - 1 :]
        for step, token in enumerate(tokens):  # each behind those that were right before it
            probability = kept(logits[step].float().tolist(), settings.temperature, settings.top_k, settings.top_p)
            assert inverse(probability, float(uniform(fold(key_tensor([KEYS[row]]), step), 1))) == token
    assert len({tuple(tokens) for tokens in ours.tokens.tolist()}) == len(PROMPTS)


def test_another_key_gives_another_completion_and_greedy_reads_no_key(causal):
    keys = [make_key("other", i) for i in range(len(PROMPTS))]
    assert not torch.equal(causal.decode(PROMPTS, WARM, keys).tokens, causal.decode(PROMPTS, WARM, KEYS).tokens)
    greedy = Decoding(length=14)
    same(causal.decode(PROMPTS, greedy, keys), causal.decode(PROMPTS, greedy, KEYS))


def test_neither_the_batch_nor_the_order_changes_a_row(both):
    whole, order = both.decode(PROMPTS, WARM, KEYS), [3, 0, 5, 1, 4, 2]
    prompts, keys = [PROMPTS[i] for i in order], [KEYS[i] for i in order]
    for batch_size in (1, 2, 5):
        shuffled = both.decode(prompts, replace(WARM, batch_size=batch_size), keys)
        same(shuffled.select(torch.tensor(order).argsort()), whole)
    same(both.decode(PROMPTS, replace(WARM, batch_size=4), KEYS), whole)
    same(both.decode(PROMPTS[2:3], WARM, KEYS[2:3]), whole.select(torch.tensor([2])))


@sampling("temperature", "greedy")
def test_log_probabilities_are_those_of_the_whole_vocabulary_at_the_temperature(both, name):
    settings = SAMPLING.get(name, Decoding(length=14))
    done = both.decode(PROMPTS, settings, KEYS)
    assert done.logp is not None
    for row, prompt in enumerate(PROMPTS):
        tokens = written(done, row)
        logits = plain_logits(both, [*prompt, *tokens])[len(prompt) - 1 : -1] / (settings.temperature or 1.0)
        expected = logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
        torch.testing.assert_close(done.logp[row, : len(tokens)].double(), expected, atol=1e-5, rtol=0)
        assert done.logp[row, len(tokens) :].isnan().all()


def test_log_probabilities_are_those_of_the_students_logits_at_the_same_sites(both):
    settings = replace(WARM, temperature=0.8)
    done = both.decode(PROMPTS, settings, KEYS)
    sites = done.reveal_step != NEVER
    ids, mask = torch.cat([done.prompt_ids, done.tokens], 1), torch.cat([done.prompt_mask, sites], 1)
    logits = both.site_logits(View(ids, mask, torch.cat([torch.zeros_like(done.prompt_mask), sites], 1)))
    logp = (logits / 0.8).log_softmax(-1).gather(-1, done.tokens[sites][:, None])[:, 0]
    assert done.logp is not None
    torch.testing.assert_close(done.logp[sites].double(), logp, atol=1e-5, rtol=0)


def view_of(rows: Sequence[Sequence[int]], first: int, side: str, extra: int = 3) -> View:
    """Rows of unequal length, padded on a side, all positions from ``first`` on graded."""
    width = max(map(len, rows)) + extra
    ids, mask, sites = torch.full((len(rows), width), PAD), *torch.zeros((2, len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(list(row))
        mask[i, start : start + len(row)] = True
        sites[i, start + first : start + len(row)] = True
    return View(ids, mask, sites)


LORA = {"lora": Lora(rank=4, alpha=8)}


def disturb(policy: Autoregressive) -> None:
    """Adapters start at zero, where they show nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in policy.module.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=generator, dtype=value.dtype))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_logits_of_a_site_are_the_plain_ones_of_the_position_before(
    make, policy_shape, side, options, architecture
):
    policy = make(shape=replace(policy_shape, architecture=architecture), **options)
    disturb(policy)
    plain: Any = network(policy)
    if options:
        plain = deepcopy(policy.module.model).merge_and_unload()
    rows = [[*prompt, 9, 10, 11] for prompt in PROMPTS]
    ours = policy.site_logits(view_of(rows, 1, side))
    theirs = [plain(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1] for row in rows]
    torch.testing.assert_close(ours, torch.cat(theirs), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, LORA], ids=["full", "lora"])
def test_the_gradient_of_a_site_is_the_plain_one(make, side, options):
    policy = make(**options)
    disturb(policy)
    rows = [[*prompt, 9, 10, 11] for prompt in PROMPTS]
    live = {name: value for name, value in policy.module.named_parameters() if value.requires_grad}
    targets = torch.tensor([token for row in rows for token in row[1:]])

    def gradient(logits: Tensor) -> tuple[Tensor, ...]:
        loss = torch.nn.functional.cross_entropy(logits, targets)
        return torch.autograd.grad(loss, list(live.values()), allow_unused=True)

    ours = gradient(policy.site_logits(view_of(rows, 1, side)))
    plain = [network(policy)(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1] for row in rows]
    for name, one, other in zip(live, ours, gradient(torch.cat(plain)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-9, msg=name)
        assert other.abs().max() > 0


def test_what_stands_behind_a_site_or_in_its_place_changes_nothing(causal):
    view = view_of([[4, 5, 6, 7, 8, 9]], 3, "left", extra=0)
    sites = view.sites.clone()
    sites[:, 4:] = False
    changed = view.ids.clone()
    changed[:, 3:] = 20
    plain = causal.site_logits(View(view.ids, view.mask, sites))
    torch.testing.assert_close(causal.site_logits(View(changed, view.mask, sites)), plain, atol=1e-12, rtol=0)
    changed[:, 2] = 20
    assert (causal.site_logits(View(changed, view.mask, sites)) - plain).abs().max() > 1e-3


def test_the_end_token_ends_a_row(causal):
    done = causal.decode(PROMPTS * 4, replace(WARM, length=30), [make_key("ends", i) for i in range(24)])
    assert done.causal
    assert (done.block_length, done.mask_id) == (1, NO_MASK)
    assert done.logp is not None
    assert {bool(x) for x in done.ended} == {True, False}
    for row in range(done.size):
        tokens = done.tokens[row].tolist()
        length = tokens.index(END) + 1 if END in tokens else 30
        assert bool(done.ended[row]) == (END in tokens)
        assert int(done.length[row]) == int(done.written[row]) == int(done.num_steps[row]) == length
        assert tokens[length:] == [PAD] * (30 - length)
        assert done.reveal_step[row].tolist() == [*range(length), *[NEVER] * (30 - length)]
        assert done.logp[row].isnan().tolist() == [False] * length + [True] * (30 - length)


def test_a_row_ends_with_any_of_the_end_tokens(causal):
    both_end = Autoregressive(causal.module.model, causal.chat, end_ids=(1, 7, 9), pad_id=9)
    done = both_end.decode(PROMPTS, WARM, KEYS)
    whole = causal.decode(PROMPTS, WARM, KEYS)
    found = set()
    for row in range(done.size):
        tokens = written(done, row)
        assert not {1, 7, 9} & set(tokens[:-1])
        assert tokens == whole.tokens[row, : len(tokens)].tolist()
        assert len(tokens) == int(done.length[row])
        found |= {tokens[-1]} & {1, 7, 9}
    assert len(found) > 1


@pytest.mark.parametrize("temperature", [1.0, *later(0.0)])
def test_suppressed_tokens_are_never_chosen(make, temperature):
    free = make()
    settings = Decoding(length=16, temperature=temperature)
    usual = {token for row in range(6) for token in written(free.decode(PROMPTS, settings, KEYS), row)}
    banned = tuple(sorted(usual - {END}))[::2]
    by_settings = free.decode(PROMPTS, replace(settings, suppress=banned), KEYS)
    by_policy = Autoregressive(free.module.model, free.chat, end_ids=(END,), pad_id=PAD, suppress=banned)
    same(by_policy.decode(PROMPTS, settings, KEYS), by_settings)
    assert len(banned) > 3
    for row in range(6):
        tokens = written(by_settings, row)
        assert not set(banned) & set(tokens)
        logits = plain_logits(free, [*PROMPTS[row], *tokens])[len(PROMPTS[row]) - 1 : -1] / (temperature or 1)
        logp = logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
        assert by_settings.logp is not None
        torch.testing.assert_close(by_settings.logp[row, : len(tokens)].double(), logp, atol=1e-5, rtol=0)


def test_rows_of_the_head_without_a_token_are_never_written(make, policy_shape):
    policy = make(shape=replace(policy_shape, vocab_size=64))
    assert policy.suppress == tuple(range(25, 64))
    done = policy.decode(PROMPTS, replace(WARM, temperature=3.0, length=30), KEYS)
    assert int(done.tokens.max()) < 25


@pytest.mark.parametrize(("count", "unit"), crossed([1, 5, 13, 14, 99], ["blocks", "steps"]))
def test_a_horizon_is_the_start_of_the_whole_and_the_rest_is_never_generated(causal, unit, count):
    whole = causal.decode(PROMPTS, WARM, KEYS)
    meter = Meter()
    with counted(causal) as passes:
        cut = causal.decode(PROMPTS, WARM, KEYS, meter=meter, stop_after=StopAfter(unit, count))
    same(cut, whole.within(StopAfter(unit, count)))
    assert len(passes) == meter.forwards == min(count, int(whole.num_steps.max()))
    assert cut.written.tolist() == [min(count, n) for n in whole.written.tolist()]
    assert set(cut.length[~cut.ended].tolist()) <= {14}


def test_the_meter_counts_passes_and_the_rows_that_still_wrote(causal):
    meter, finished = Meter(), []
    with counted(causal) as passes:
        done = causal.decode(
            *(PROMPTS, replace(WARM, batch_size=4), KEYS),
            meter=meter,
            finished=lambda rows, part: finished.append((rows.tolist(), part)),
        )
    assert meter.forwards == len(passes)
    assert meter.slots == sum(passes)
    assert meter.rows == int(done.written.sum()) < meter.slots
    assert sorted(row for rows, _ in finished for row in rows) == list(range(len(PROMPTS)))
    for rows, part in finished:
        same(part, done.select(torch.tensor(rows)))


def test_each_batch_holds_prompts_of_like_length(causal):
    seen: list[list[int]] = []
    causal.decode(PROMPTS, replace(WARM, batch_size=2), KEYS, finished=lambda rows, _: seen.append([*map(int, rows)]))
    lengths = [len(PROMPTS[row]) for rows in seen for row in rows]
    assert lengths == sorted(lengths, reverse=True)


def test_what_is_watched_is_the_completion_before_each_token(causal):
    seen: list[Tensor] = []
    done = causal.decode(PROMPTS, WARM, KEYS, watch=lambda canvas: seen.append(canvas.clone()))
    assert len(seen) == int(done.num_steps.max()) + 1
    for step, canvas in enumerate(seen):
        assert canvas.shape == (len(PROMPTS), 14)
        assert (canvas[:, step:] == NO_MASK).all()
    for step, canvas in enumerate(seen[:-1]):
        assert torch.equal(canvas[:, :step], done.tokens[:, :step])
    assert torch.equal(seen[-1], done.tokens.masked_fill(done.reveal_step == NEVER, NO_MASK))


def test_a_demonstration_is_written_from_left_to_right(causal):
    one = causal.demonstration([7, 8], [9, 10, END], Decoding(length=6))
    assert one.prompt_ids.tolist() == [[7, 8]]
    assert one.tokens.tolist() == [[9, 10, END, PAD, PAD, PAD]]
    assert one.reveal_step.tolist() == [[0, 1, 2, NEVER, NEVER, NEVER]]
    assert one.length.tolist() == one.written.tolist() == [3]
    assert one.logp is None
    assert (one.causal, one.mask_id, one.block_length) == (True, NO_MASK, 1)
    full = causal.demonstration([7, 8], [9, 10, 11], Decoding(length=3))
    assert full.length.tolist() == [3]
    assert full.ended.tolist() == [False]


def test_every_token_is_a_block_and_a_step(causal):
    for unit in ("blocks", "steps"):
        assert causal.extent(unit, Decoding(length=48, block_length=7, steps=3)) == 48


def test_keys_of_denoisers_change_nothing(causal):
    odd = replace(WARM, block_length=5, steps=1, order="random", tokens_per_step=3, early_end=False)
    same(causal.decode(PROMPTS, odd, KEYS), causal.decode(PROMPTS, WARM, KEYS))


def test_decoding_leaves_modes_gradients_and_random_numbers_alone(make):
    policy = make(lora=Lora(rank=4, alpha=8, dropout=0.5))
    policy.module.train()
    next(iter(policy.module.children())).eval()
    modes = [part.training for part in policy.module.modules()]
    torch.manual_seed(11)
    random.seed(11)
    state, other = torch.get_rng_state(), random.getstate()
    one, again = (policy.decode(PROMPTS, WARM, KEYS) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == other
    assert [part.training for part in policy.module.modules()] == modes
    same(one, again)  # without dropout
    assert torch.is_grad_enabled()
    assert not any(value.grad is not None for value in policy.module.parameters())


def test_merged_adapters_write_the_same_and_come_back_bit_for_bit(make):
    plain, folded = make(**LORA), make(lora=Lora(rank=4, alpha=8, merge_rollouts=True))
    bare = make()
    for policy in (plain, folded):
        disturb(policy)
    before = {name: value.clone() for name, value in folded.module.state_dict().items()}
    done = folded.decode(PROMPTS, WARM, KEYS)
    same(done, plain.decode(PROMPTS, WARM, KEYS))
    assert not torch.equal(done.tokens, bare.decode(PROMPTS, WARM, KEYS).tokens)
    assert all(torch.equal(value, before[name]) for name, value in folded.module.state_dict().items())


@pytest.fixture
def folder(causal: Autoregressive, tmp_path: Path) -> Path:
    """What transformers writes of a causal model and its tokenizer."""
    network(causal).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_of_transformers_is_loaded_as_what_it_is(causal, folder):
    again = load_policy(str(folder), dtype="float64")
    assert isinstance(again, Autoregressive)
    assert (again.end_ids, again.pad_id) == (causal.end_ids, causal.pad_id)
    same(again.decode(PROMPTS, WARM, KEYS), causal.decode(PROMPTS, WARM, KEYS))
    named = load_policy(str(folder), dtype="float64", as_="autoregressive")
    same(named.decode(PROMPTS, WARM, KEYS), causal.decode(PROMPTS, WARM, KEYS))


def test_the_same_folder_denoises_where_it_is_to_be_a_diffusion_model(folder):
    policy = load_policy(str(folder), dtype="float64", as_="diffusion")
    assert isinstance(policy, MaskedDiffusion)
    assert not policy.causal
    done = policy.decode(PROMPTS, Decoding(length=8, block_length=4), KEYS)
    assert not done.causal
    assert (done.tokens != policy.mask_id).all()


@pytest.mark.parametrize(
    "changes",
    [
        *({"repetition_penalty": 5.0}, {"max_new_tokens": 2}),
        {"do_sample": True, "temperature": 0.2, "top_k": 1, "top_p": 0.1},
        *later({"min_new_tokens": 10}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": [7, 12, 20]}, {"num_beams": 3}),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_the_checkpoint_says_of_generation_changes_nothing(causal, folder, changes):
    settings = replace(WARM, temperature=1.3)
    again = load_policy(str(folder), dtype="float64")
    own = network(again).generation_config
    assert own is not None
    own.update(**changes)
    same(again.decode(PROMPTS, settings, KEYS), causal.decode(PROMPTS, settings, KEYS))
    assert all(getattr(network(again).generation_config, name) == value for name, value in changes.items())


def test_a_masked_diffusion_checkpoint_is_refused_as_autoregressive(policy, tmp_path):
    policy.module.network.save_pretrained(tmp_path / "model")
    for path, tokenizer in ((str(tmp_path / "model"), "tiny"), ("tiny", None)):
        with pytest.raises(InputError, match="is a masked-diffusion model and cannot write from left to right"):
            build_policy(Model(path=path, tokenizer=tokenizer, as_="autoregressive"))


def test_blocks_of_an_autoregressive_model_are_refused(folder):
    with pytest.raises(InputError, match=r"^model\.block_length is of block-causal models; leave it out"):
        load_policy(str(folder), as_="autoregressive", block_length=4)


def test_a_network_that_sees_later_positions_is_refused(folder, monkeypatch):
    load: Any = AutoModelForCausalLM.from_pretrained

    def secretly(*arguments: Any, **options: Any) -> Any:
        found, report = load(*arguments, **options)
        found.config.is_causal = False
        for part in found.modules():
            if hasattr(part, "is_causal"):
                part.is_causal = False
        return found, report

    load_policy(str(folder))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", secretly)
    with pytest.raises(InputError, match="the model sees later positions; it is not autoregressive"):
        load_policy(str(folder))
