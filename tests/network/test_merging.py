"""Adapters folded into the weights for a while."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_sd.decoding.settings import Decoding
from dllm_sd.network.merging import merged
from dllm_sd.network.view import View
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.pretrained.model import Lora

IDS = torch.tensor([[4, 5, 0, 0, 0], [6, 7, 8, 0, 0]])
VIEW = View(IDS, torch.ones_like(IDS, dtype=torch.bool), IDS == 0)


@pytest.fixture
def policy(make_policy: Any) -> MaskedDiffusion:
    return with_adapters(make_policy)


def with_adapters(make_policy: Any, **options: Any) -> MaskedDiffusion:
    """A policy whose adapters do something."""
    made = make_policy(lora=Lora(rank=4, alpha=8, **options.pop("lora", {})), **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in made.module.named_parameters():
            if "lora_B" in name:
                value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return made


def logits(policy: MaskedDiffusion) -> Tensor:
    with torch.no_grad():
        return policy.site_logits(VIEW)


def state(policy: MaskedDiffusion) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in policy.module.state_dict().items()}


def assert_untouched(policy: MaskedDiffusion, before: dict[str, Tensor], spoken: Tensor) -> None:
    assert state(policy).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in state(policy).items())
    assert torch.equal(logits(policy), spoken)


def without_adapters(policy: MaskedDiffusion) -> Tensor:
    model: Any = policy.module.model
    with model.disable_adapter():
        return logits(policy)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("float64", 1e-12)])
def test_folded_adapters_speak_like_adapters(make_policy: Any, dtype: str, close: float):
    policy = with_adapters(make_policy, dtype=dtype)
    before, spoken = state(policy), logits(policy)
    assert (without_adapters(policy) - spoken).abs().max() > 0.1
    with merged(policy.module.model):  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(logits(policy), spoken, atol=close, rtol=0)
        torch.testing.assert_close(without_adapters(policy), spoken, atol=close, rtol=0)  # in the weights themselves
    assert_untouched(policy, before, spoken)


def test_weights_and_adapters_come_back_after_an_exception(policy: MaskedDiffusion, monkeypatch: pytest.MonkeyPatch):
    before, spoken = state(policy), logits(policy)
    with pytest.raises(KeyboardInterrupt), merged(policy.module.model):  # pyright: ignore[reportArgumentType]
        raise KeyboardInterrupt
    assert_untouched(policy, before, spoken)
    layer: Any = policy.module.get_submodule("model.base_model.model.model.layers.1.mlp.down_proj")
    monkeypatch.setattr(layer, "get_delta_weight", lambda adapter: 1 / 0)  # in the midst of folding
    with pytest.raises(ZeroDivisionError), merged(policy.module.model):  # pyright: ignore[reportArgumentType]
        pass
    assert_untouched(policy, before, spoken)


def test_gradients_flow_to_the_adapters_alone_as_before(policy: MaskedDiffusion):
    wanted = {name for name, value in policy.module.named_parameters() if value.requires_grad}
    with merged(policy.module.model):  # pyright: ignore[reportArgumentType]
        pass
    assert {name for name, value in policy.module.named_parameters() if value.requires_grad} == wanted
    policy.site_logits(VIEW).square().mean().backward()
    assert {name for name, value in policy.module.named_parameters() if value.grad is not None} == wanted


def test_decoding_with_folded_adapters_decodes_the_same_and_restores_them(make_policy: Any):
    plain, folding = (with_adapters(make_policy, lora={"merge_rollouts": fold}) for fold in (False, True))
    settings = Decoding(length=12, block_length=6, temperature=0.7)
    prompts = [[4, 5, 14, 6], [7], [8, 9, 10]]
    before, spoken, switched = state(folding), logits(folding), []
    layer: Any = folding.module.get_submodule("model.base_model.model.model.layers.0.self_attn.q_proj")
    layer.register_forward_hook(lambda module, args, out: switched.append(module.disable_adapters))
    ours, theirs = (policy.decode(prompts, settings, [1, 2, 3]) for policy in (folding, plain))
    assert torch.equal(ours.tokens, theirs.tokens)
    assert torch.equal(ours.reveal_step, theirs.reveal_step)
    assert set(switched) == {True}
    assert_untouched(folding, before, spoken)
