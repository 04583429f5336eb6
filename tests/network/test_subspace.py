"""The subspace of keys and values: projectors, gradients at the linear layers, and projection by folding."""

from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Glm4MoeConfig, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from dllm_sd import load_policy
from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError
from dllm_sd.network.merging import merged
from dllm_sd.network.subspace import (
    Gradients,
    Subspace,
    Supervised,
    check_rank,
    collect,
    kv_layers,
    projected,
    projector,
)
from dllm_sd.network.swapping import switched
from dllm_sd.policies.weights import without_peft_warning
from dllm_sd.pretrained.model import Lora
from tests.oracles import subspace as oracle
from tests.tiers import crossed

IDS = torch.tensor([4, 5, 14, 6, 9, 12, 7, 8])
KINDS: dict[str, Any] = {"bidirectional": {}, "causal": {"as_": "autoregressive"}, "block-causal": {"block_length": 4}}
SMALL: dict[str, Any] = {
    **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "head_dim": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0},
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SMALL),
    "llama with biases": LlamaConfig(**SMALL, attention_bias=True),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3 with biases": Qwen3Config(**SMALL, attention_bias=True),
    "glm4_moe": Glm4MoeConfig(**SMALL, use_qk_norm=True, first_k_dense_replace=3),
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def build(config: Any, lora: LoraConfig | None = None) -> Any:
    """A random network in float64, adapted if asked for."""
    with torch.random.fork_rng(devices=[]), without_peft_warning():
        torch.manual_seed(0)
        network: Any = AutoModelForCausalLM.from_config(config).double().eval()
        network = get_peft_model(network, lora).eval() if lora else network
    return stirred(network)


def stirred(module: Any) -> Any:
    """The same module, where biases and adapters that begin at zero do something."""
    with torch.no_grad():
        for seed, (name, value) in enumerate(module.named_parameters()):
            if "lora_B" in name or name.endswith("proj.bias"):
                value.copy_(0.3 * random(*value.shape, seed=seed))
    return module


def outputs(network: Any) -> Tensor:
    return oracle.outputs(network, [part for pair in kv_layers(network) for part in pair], IDS)


def some_projectors(network: Any) -> dict[int, tuple[Tensor | None, Tensor | None]]:
    """Unequal ones for keys and values, of all layers but the first."""
    sizes = [[len(layer(part).weight) for part in pair] for pair in kv_layers(network)]
    return {
        at: (projector(random(30, keys, seed=at), 3), projector(random(30, values, seed=at + 9), 3))
        for at, (keys, values) in enumerate(sizes)
        if at
    }


def layer(part: Any) -> Any:
    return part.get_base_layer() if hasattr(part, "get_base_layer") else part


def hooked(network: Any, projectors: Any) -> Any:
    """What `projected` does, done by hooks."""
    pairs = [(kv_layers(network)[at], pair) for at, pair in projectors.items()]
    return oracle.multiplied([one for parts, pair in pairs for one in zip(parts, pair, strict=True)])


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_as_before(module: nn.Module, before: dict[str, Tensor]) -> None:
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("m", "d", "rank", "energy", "centre"),
    [*product([5, 40], [7, 12], [None], [None], [True, False]), (40, 12, 3, None, True), (9000, 4, 3, None, False)]
    + [(40, 12, None, energy, centre) for energy in (0.3, 0.9) for centre in (True, False)],
)
def test_a_projector_is_that_of_numpy_symmetric_idempotent_and_of_its_rank(m, d, rank, energy, centre):
    rows = random(m, d) * torch.arange(1, d + 1) + 0.5
    found = projector(rows, rank, energy, centre)
    singular = oracle.singular_vectors(rows.numpy(), centre)[0]
    dimensions = rank or (oracle.rank_for_energy(list(singular), energy) if energy else d // 2)
    torch.testing.assert_close(found, found.T, atol=1e-14, rtol=0)
    torch.testing.assert_close(found @ found, found, atol=1e-13, rtol=0)
    assert abs(float(found.trace()) - min(dimensions, m)) < 1e-12
    if dimensions <= m - centre:  # else the last vector is any that is orthogonal to the others
        expected = torch.tensor(oracle.projector(rows.numpy(), rank, energy, centre))
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_a_projector_keeps_no_more_dimensions_than_there_are_rows_or_columns():
    torch.testing.assert_close(projector(random(40, 6), rank=32), torch.eye(6, dtype=torch.float64))
    assert abs(float(projector(random(4, 12), rank=9).trace()) - 4) < 1e-12


@pytest.mark.parametrize("given", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_projector_has_at_least_float32(given: torch.dtype):
    rows = random(30, 8, dtype=given)
    found = projector(rows)
    assert found.dtype == (torch.float64 if given == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), projector(rows.double()), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rank": 0}, "rank is 0; give a whole number of at least 1"),
        ({"rank": 2, "energy": 0.5}, "set one of them to null"),
        ({"energy": 0.0}, "energy is 0; give a number above 0"),
        ({"energy": 1.5}, "at most 1"),
        ({"energy": float("nan")}, "give a number above 0"),
        ({"layers": ()}, "layers is"),
        ({"layers": (0, -1)}, "layers.1 is -1"),
        ({"layers": (1, 1)}, "a layer twice"),
        ({"project": "queries"}, "choose both, keys or values"),
        ({"calibration": 0}, "from 1 to"),
        ({"longest": 0}, "from 1 to"),
    ],
)
def test_settings_without_a_meaning_are_refused(wrong: dict[str, Any], said: str):
    with pytest.raises(InputError, match=r"^method\.rollout\.policy\..*" + said):
        Subspace(**wrong)
    if wrong.keys() <= {"rank", "energy"}:
        with pytest.raises(InputError, match=said):
            projector(random(5, 4), **wrong)


def test_the_model_bounds_rank_and_layers():
    assert Subspace().chosen(24, 128) == (23, 12)
    assert Subspace().chosen(1, 128) == (0,)
    assert Subspace().chosen(2, 128) == (1,)
    assert Subspace(layers=(0, 5), rank=128).chosen(6, 128) == (0, 5)
    check_rank(None, 4)
    with pytest.raises(InputError, match=r"method\.rollout\.policy\.rank is 129.* give at most 128"):
        Subspace(rank=129).chosen(6, 128)
    with pytest.raises(InputError, match=r"method\.rollout\.policy\.layers names 6, but the last layer is 5"):
        Subspace(layers=(0, 6)).chosen(6, 128)


def test_gradients_that_point_nowhere_are_refused():
    for rows in (torch.zeros(5, 4), torch.ones(5, 4), torch.empty(0, 4)):
        with pytest.raises(InputError, match=r"no gradient .* within method\.rollout\.policy\.longest tokens"):
            projector(rows)
    with pytest.raises(InputError, match="not finite"):
        projector(torch.full((5, 4), torch.nan))


@pytest.mark.parametrize("project", ["both", "keys", "values"])
def test_settings_say_what_is_projected(project: Any):
    keys, values = random(20, 6), random(20, 6, seed=1)
    found = Subspace(project=project, rank=2, centre=False)(Gradients({3: (keys, values)}, 4, 0))
    for one, rows, name in zip(found[3], (keys, values), ("keys", "values"), strict=True):
        assert (one is None) == (project not in ("both", name))
        assert one is None or torch.equal(one, projector(rows, 2, centre=False))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("lora", [None, LoraConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj"], bias="all")])
def test_folding_is_hooking_and_leaves_no_trace(config: Any, lora: LoraConfig | None):
    network = build(config, lora)
    before, spoken, projectors = state(network), outputs(network), some_projectors(network)
    flags = [(id(value), value.requires_grad) for value in network.parameters()]
    with hooked(network, projectors):
        expected = outputs(network)
    assert (expected - spoken).abs().max() > 1e-2
    with projected(network, projectors):
        torch.testing.assert_close(outputs(network), expected, atol=1e-12, rtol=0)
    assert_as_before(network, before)
    assert torch.equal(outputs(network), spoken)
    assert flags == [(id(value), value.requires_grad) for value in network.parameters()]
    assert all(value.grad is None for value in network.parameters())


@pytest.mark.parametrize("state_of", ["off", "merged inside", "merged outside", "by PEFT", "two", "bias", "whole"])
def test_adapters_are_projected_in_every_state(state_of: str):
    targets = ["q_proj", "v_proj"] if state_of == "whole" else ["k_proj", "v_proj"]
    settings = LoraConfig(
        r=3, target_modules=targets, lora_bias=state_of == "bias", modules_to_save=["k_proj"] * (state_of == "whole")
    )
    network = build(CONFIGS["qwen3 with biases"], settings)
    if state_of == "two":
        with without_peft_warning():
            network.add_adapter("other", settings)
        network.base_model.set_adapter(["default", "other"])
    if state_of == "whole":
        with torch.no_grad():
            kv_layers(network)[1][0].modules_to_save["default"].weight.mul_(2)  # pyright: ignore
    if state_of == "by PEFT":
        network.merge_adapter()
    around = {"off": switched(network, None), "merged outside": merged(network)}.get(state_of, nullcontext())
    inside = merged(network) if state_of == "merged inside" else nullcontext()
    before, projectors = state(network), some_projectors(network)
    with around:
        with hooked(network, projectors):
            expected = outputs(network)
        with projected(network, projectors), inside:
            torch.testing.assert_close(outputs(network), expected, atol=1e-12, rtol=0)
    assert_as_before(network, before)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_weights_come_back_bit_for_bit_after_an_exception(make_policy: Any, dtype: str, monkeypatch: Any):
    network: Any = make_policy(dtype=dtype, lora=Lora(rank=4, alpha=8)).module.model
    before, projectors = state(network), some_projectors(network)
    with pytest.raises(KeyboardInterrupt), projected(network, projectors):
        raise KeyboardInterrupt
    assert_as_before(network, before)
    broken = {**projectors, 0: (torch.eye(32), torch.eye(32))}
    monkeypatch.setattr(broken[0][1], "to", lambda *_: 1 / 0, raising=False)  # in the midst of folding
    with pytest.raises(ZeroDivisionError), projected(network, broken):
        pass
    assert_as_before(network, before)


def test_what_cannot_be_projected_is_refused_before_anything_changes():
    def refuse(network: Any, projectors: Any, said: str) -> None:
        before = state(network)
        with pytest.raises(InputError, match=said), projected(network, projectors):
            pass
        assert_as_before(network, before)

    network = build(CONFIGS["llama"])
    fits = some_projectors(network)
    refuse(network, {**fits, 0: (torch.eye(4), None)}, r"layer 0 has shape \[4, 4\], but .* have 8 dimensions")
    refuse(network, {**fits, 3: fits[1]}, "projector for layer 3, but the last layer is 2")
    dora = build(CONFIGS["llama"], LoraConfig(r=3, target_modules=["k_proj"], use_dora=True))
    refuse(dora, fits, "use plain LoRA")
    part: Any = kv_layers(network)[2][1]
    part.weight = nn.Parameter(torch.zeros(8, 16, dtype=torch.int8), requires_grad=False)
    refuse(network, fits, "set model.quantization to null")
    fused = build(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=40))
    refuse(fused, {}, "not all layers of GPT2LMHeadModel have")


def example(policy: Any, *positions: int) -> Supervised:
    sites = torch.tensor([at in positions for at in range(len(IDS))])
    return Supervised(IDS if policy.causal else IDS.masked_fill(sites, policy.mask_id), sites, IDS)


@pytest.mark.parametrize(("kind", "trained"), crossed(KINDS, ["whole", "adapted"]))
def test_gradients_are_those_of_moving_one_position_after_the_other(make_policy: Any, kind: str, trained: str):
    policy = make_policy(**KINDS[kind], lora=Lora(rank=4, alpha=8) if trained == "adapted" else None)
    module, some = stirred(policy.module), [example(policy, 2, 5), example(policy, 4)]
    found = collect(module, some, (1, 0))
    assert (found.used, found.skipped, tuple(found.layers)) == (2, 0, (1, 0))
    seen = {"block_length": 1 if policy.causal else policy.block_length, "shift": policy.causal}
    answers = [{at: int(IDS[at]) for at in one.sites.nonzero()[:, 0].tolist()} for one in some]
    for at, pair in found.layers.items():
        for part, ours in zip(kv_layers(module.model)[at], pair, strict=True):
            expected = [
                oracle.gradients(module.network, part, one.ids.tolist(), right, **seen)
                for one, right in zip(some, answers, strict=True)
            ]
            torch.testing.assert_close(ours, torch.cat(expected), atol=1e-13, rtol=1e-9)
            assert (ours.abs().amax(1) > 0).sum() == (5 + 4 if policy.causal else 16)


def test_collecting_changes_nothing_and_needs_no_trained_parameter(make_policy: Any):
    policy = make_policy(gradient_checkpointing=True, lora=Lora(rank=4, alpha=8, dropout=0.5))
    module, some = stirred(policy.module).train(), [example(policy, 3)]
    before, flags = state(module), [value.requires_grad for value in module.parameters()]
    hooks = [len(part._forward_hooks) for part in module.modules()]
    with torch.no_grad():
        found = collect(module, some, (1, 0))
    assert_as_before(module, before)
    assert all(part.training for part in module.modules())
    assert flags == [value.requires_grad for value in module.parameters()]
    assert all(value.grad is None for value in module.parameters())
    frozen = stirred(make_policy(lora=Lora(rank=4, alpha=8)).module).requires_grad_(False)  # the same weights
    again = collect(frozen, some, (1, 0))
    torch.testing.assert_close(dict(found.layers), dict(again.layers), atol=1e-14, rtol=0)
    assert hooks == [len(part._forward_hooks) for part in module.modules()]


@pytest.mark.parametrize("kind", KINDS)
def test_examples_without_a_supervised_token_are_skipped_and_counted(make_policy: Any, kind: str):
    policy = make_policy(**KINDS[kind])
    seen, cut, none, first = (example(policy, *at) for at in ((2, 3), (6, 7), (), (0,)))
    found = collect(policy.module, [none, seen, cut, first], (1,), longest=6)
    assert found.cut == sum(len(one.ids) > 6 for one in (none, seen, cut, first)) > 0
    assert (found.used, found.skipped) == ((1, 3) if policy.causal else (2, 2))  # nothing speaks about a first token
    short = Supervised(*(x[:6] for x in (seen.ids, seen.sites, seen.targets)))
    alone = collect(policy.module, [short], (1,))
    for many, few in zip(found.layers[1], alone.layers[1], strict=True):
        assert many.shape == (6 * found.used, 32)
        assert torch.equal(many[:6], few)
    with pytest.raises(InputError, match=r"none of 2 calibration examples .* within method\.rollout\.policy\.longest"):
        collect(policy.module, [none, cut], (1,), longest=6)


@pytest.mark.parametrize(("name", "merge"), crossed(["tiny", "tiny_ar"], [False, True]))
def test_the_shipped_models_decode_in_their_subspace_as_with_hooks(name: str, merge: bool):
    policy = load_policy(name, dtype="float64", lora=Lora(rank=4, alpha=8, merge_rollouts=merge))
    module: Any = stirred(policy.module)
    count, size = len(kv_layers(module.model)), len(layer(kv_layers(module.model)[0][0]).weight)
    settings = Subspace(rank=size // 8)
    gradients = collect(module, [example(policy, 3, 4), example(policy, 6)], settings.chosen(count, size), 256)
    projectors = settings(gradients)
    prompts, decode, keys = [[4, 5, 14, 6], [7, 8]], Decoding(length=12, block_length=6, temperature=0.0), [1, 2]
    before, plain = state(module), policy.decode(prompts, decode, keys).tokens
    with hooked(module.model, projectors):
        expected = policy.decode(prompts, decode, keys).tokens
    with projected(module.model, projectors):
        found = policy.decode(prompts, decode, keys).tokens
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)
    assert_as_before(module, before)
    assert torch.equal(policy.decode(prompts, decode, keys).tokens, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_rank_changes_nothing(make_policy: Any, kind: str):
    policy = make_policy(**KINDS[kind])
    gradients = collect(policy.module, [example(policy, at) for at in range(1, 8)], (0, 1))
    everything = Subspace(rank=32)(gradients)
    before = outputs(policy.module.network)
    with projected(policy.module.network, everything):
        torch.testing.assert_close(outputs(policy.module.network), before, atol=1e-11, rtol=0)
