"""Models that write for hints: whose words they are, and what is not written twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dllm_sd.errors import InputError
from dllm_sd.policies.decoding import Decoding
from dllm_sd.policies.loading import AnyPolicy
from dllm_sd.policies.model import Lora
from dllm_sd.policies.weights import Base, Live, Peer, Teacher, trained
from dllm_sd.randomness import make_key
from dllm_sd.teachers.writing import Writing
from dllm_sd.training.scribe import Scribe
from dllm_sd.training.sharding import start_accelerator
from dllm_sd.writers import Cache, Request, Sampling

DECODE = Decoding(length=8, block_length=4, tokens_per_step=1)
SAMPLING = Sampling(length=12, temperature=1.0)
REQUESTS = [Request(({"role": "user", "content": text},), i) for i, text in enumerate(("1+2=", "3*4", "1+2="))]
LORA = {"lora": Lora(rank=2, alpha=8)}
KINDS = pytest.mark.parametrize("kind", [{}, LORA], ids=["full", "lora"])


def move(policy: AnyPolicy, seed: int) -> None:
    """Something like an update."""
    with torch.no_grad():
        for value in trained(policy).values():
            value.add_(0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=value.dtype))


def texts(policy: AnyPolicy) -> list[str]:
    """What a policy as it is now answers, by plain decoding."""
    settings = Decoding(length=12, block_length=4, tokens_per_step=1, temperature=1.0)
    prompts = [policy.encode(request.messages) for request in REQUESTS]
    done = policy.decode(prompts, settings, [make_key("writer", request.key) for request in REQUESTS])
    return [policy.text(row[:end].tolist()) for row, end in zip(done.tokens, done.length.tolist(), strict=True)]


def scribe(models: dict[Any, Teacher], folder: Path, longest: int = 100) -> Scribe:
    return Scribe([], DECODE, start_accelerator(False), models, Cache(folder), longest)


@KINDS
def test_live_weights_write_anew_and_initial_ones_from_the_disk(make_policy, kind, tmp_path, monkeypatch):
    policy = make_policy(**kind)
    before = texts(policy)
    models: dict[Any, Teacher] = {Base(): Teacher(Base(), policy), Live(): Teacher(Live(), policy)}
    move(policy, 1)
    after, writer = texts(policy), scribe(models, tmp_path)
    assert after != before
    for part, expected in ((Base(), before), (Live(), after)):
        first = writer.write(Writing(part, SAMPLING), REQUESTS)
        assert [one.text for one in first] == [text if text.strip() else None for text in expected]
        assert not any(one.cached for one in first)
        again = scribe(models, tmp_path).write(Writing(part, SAMPLING), REQUESTS)
        assert [one.text for one in again] == [one.text for one in first]
        assert [one.cached for one in again] == [isinstance(part, Base) and one.text is not None for one in first]
    assert texts(policy) == after


@KINDS
def test_a_peer_writes_with_what_another_run_trained(make_policy, kind, tmp_path):
    other, policy = make_policy(**kind), make_policy(**kind)
    move(other, 2)
    save_file({name: value.detach() for name, value in trained(other).items()}, tmp_path / "model.safetensors")
    peer, before = Peer(str(tmp_path)), texts(policy)
    written = scribe({peer: Teacher(peer, policy)}, tmp_path / "cache").write(Writing(peer, SAMPLING), REQUESTS)
    assert [one.text for one in written] == [text if text.strip() else None for text in texts(other)]
    assert texts(policy) == before


def test_a_peers_exported_adapter_is_the_same_peer(make_policy, tmp_path):
    other, policy = make_policy(**LORA), make_policy(**LORA)
    move(other, 2)
    other.module.model.save_pretrained(tmp_path)
    found = Peer(str(tmp_path)).read(trained(policy))
    assert found.keys() == trained(policy).keys()
    assert all(torch.equal(value, trained(other)[name]) for name, value in found.items())
    begun = make_policy(lora=Lora(rank=2, alpha=8, start=str(tmp_path)))
    assert texts(begun) == texts(other)


def test_a_peer_of_another_shape_or_none_is_refused_in_one_sentence(make_policy, tmp_path):
    other, policy = make_policy(**LORA), make_policy(lora=Lora(rank=3, alpha=8))
    for folder, says in ((tmp_path / "none", "there is no usable peer"), (tmp_path, "of the student's shape")):
        if folder == tmp_path:
            other.module.model.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=says) as refusal:
            Peer(str(folder)).read(trained(policy))
        assert "\n" not in str(refusal.value)


def test_a_request_that_is_too_long_is_not_written(make_policy, tmp_path):
    policy = make_policy()
    models: dict[Any, Teacher] = {Base(): Teacher(Base(), policy)}
    written = scribe(models, tmp_path, longest=3).write(Writing(Base(), SAMPLING), REQUESTS)
    assert [one.failure for one in written] == ["long_request", None, "long_request"]
