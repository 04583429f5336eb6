"""`POST /generate` over a socket: what comes back is what the policy decodes here, bit for bit."""

import json
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from dllm_sd.decoding.settings import Decoding
from dllm_sd.decoding.wire import request_to_json
from dllm_sd.policies.loading import build_policy
from dllm_sd.pretrained.model import Model, Shape
from dllm_sd.randomness import make_key
from dllm_sd.serving.scheduler import ExclusiveWork
from dllm_sd.trajectory import StopAfter, Trajectory
from dllm_sd.trajectory_json import trajectory_from_json
from tests.serving.conftest import DECODE, LIMITS, service_of
from tests.tiers import later

served = pytest.importorskip("tests.serving.served", exc_type=ImportError)

PROMPTS = [[5, 6, 7, 8], [9], [3, 4, 5, 6, 7, 8, 9, 10, 11]]
SETTINGS = {
    "sampled": DECODE,
    "greedy": replace(DECODE, temperature=0.0),
    "filtered": replace(DECODE, top_k=6, top_p=0.9, temperature=1.3),
    "shorter": replace(DECODE, length=8, suppress=(5, 6)),
    "no early end": replace(DECODE, early_end=False),
}
DIFFUSION = {
    "random": replace(DECODE, order="random"),
    "threshold": replace(DECODE, threshold=0.7),
    "guidance": replace(DECODE, guidance=1.0, tokens_per_step=4),
    "idle steps": replace(DECODE, steps=27),
}
STOPS = [None, StopAfter("blocks", 2), StopAfter("steps", 3)]


def ask(
    server: Any, prompt: list[int], key: int, settings: Decoding, stop_after: StopAfter | None = None
) -> Trajectory:
    """What a client gets and checks."""
    status, tree = server.post("/generate", request_to_json(prompt, key, settings, stop_after))
    assert status == 200, tree
    assert tree["model"] == server.service.weights.base
    return trajectory_from_json(tree, prompt, settings.length, server.service.policy.vocabulary)


def bits(trajectory: Trajectory) -> dict[str, Any]:
    assert trajectory.logp is not None
    whole = {**vars(trajectory), "logp": trajectory.logp.view(torch.int32)}
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in whole.items()}


@pytest.mark.parametrize("backbone", ["diffusion", "causal"])
def test_a_served_rollout_equals_a_local_one_bit_for_bit(backbone: str, request: pytest.FixtureRequest):
    server = request.getfixturevalue(backbone)
    policy = build_policy(Model(path="tiny" if backbone == "diffusion" else "tiny_ar"))
    cases = {**SETTINGS, **(DIFFUSION if backbone == "diffusion" else {})}
    for number, (name, settings) in enumerate(cases.items()):
        prompt, stop_after, key = PROMPTS[number % 3], STOPS[number // 2 % 3], make_key(name)
        there = ask(server, prompt, key, settings, stop_after)
        assert bits(there) == bits(policy.decode([prompt], settings, [key], stop_after=stop_after)), name


def test_a_block_causal_model_with_its_cache_is_served_bit_for_bit(policy_shape: Shape):
    model = Model(random_init=True, tokenizer="tiny", shape=policy_shape, block_length=4)
    policy = build_policy(model)
    with served.serving(service_of(policy, model)) as server:
        for number, prompt in enumerate(PROMPTS):
            here = policy.decode([prompt], DECODE, [number], stop_after=STOPS[number])
            there = ask(server, prompt, number, DECODE, STOPS[number])
            assert there.blocks_of_prompt
            assert bits(there) == bits(here)


@pytest.mark.parametrize("options", [{}, *later({"as_": "autoregressive"})], ids=["diffusion", "causal"])
def test_many_clients_at_once_get_what_each_would_get_alone(make_policy: Callable[..., Any], options: dict[str, Any]):
    policy, rng = make_policy(**options), random.Random(0)
    model = Model(random_init=True, tokenizer="tiny")
    kinds = [DECODE, replace(DECODE, length=8), replace(DECODE, temperature=0.5)]
    asked = [
        (
            [rng.randrange(3, 20) for _ in range(rng.randrange(1, 30))],
            make_key(i),
            rng.choice(kinds),
            rng.choice(STOPS),
        )
        for i in range(20)
    ]
    with served.serving(service_of(policy, model)) as server, ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda one: ask(server, *one), asked))
        assert server.idle
    for (prompt, key, settings, stop_after), there in zip(asked, found, strict=True):
        here = policy.decode([prompt], settings, [key], stop_after=stop_after)
        for name in ("prompt_ids", "tokens", "reveal_step", "length"):
            assert torch.equal(getattr(here, name), getattr(there, name))
        torch.testing.assert_close(here.logp, there.logp, atol=1e-5, rtol=0, equal_nan=True)


GOOD = {"prompt_ids": [5, 6], "key": 3, "settings": {"temperature": 1}, "stop_after": None, "model": None}
WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"prompt_ids": None}, 422, "prompt_ids"),
    ({"prompt_ids": "text"}, 422, "prompt_ids"),
    ({"prompt_ids": [5, True]}, 422, r"prompt_ids\[1\]"),
    ({"prompt_ids": [5, -1]}, 422, "token ids from 0 to"),
    ({"prompt_ids": [5, 10**6]}, 422, "token ids from 0 to"),
    ({"prompt_ids": [5] * 65}, 413, "at most 64"),
    ({"key": None}, 422, "key"),
    ({"key": -1}, 422, "key"),
    ({"key": 2**63}, 422, "key"),
    ({"key": 1.0}, 422, "key"),
    ({"settings": []}, 422, "settings"),
    ({"settings": {"length": 0}}, 422, r"settings\.length"),
    ({"settings": {"length": 1024}}, 422, "at most 512"),
    ({"settings": {"length": "8"}}, 422, r"settings\.length"),
    ({"settings": {"length": 10**400}}, 422, r"settings\.length"),
    ({"settings": {"temperature": -1}}, 422, r"settings\.temperature"),
    ({"settings": {"temperature": "0.7"}}, 422, r"settings\.temperature must be a number, not text"),
    ({"settings": {"temperature": 1e-320}}, 422, r"settings\.temperature is 1e-320; give a number from 0\.001 to 1000"),
    ({"settings": {"order": "backwards"}}, 422, r"settings\.order"),
    ({"settings": {"suppress": [10**9]}}, 422, r"settings\.suppress"),
    ({"settings": {"batch_size": 4}}, 422, "not a client's to choose"),
    ({"settings": {"compile": "default"}}, 422, "not a client's to choose"),
    ({"stop_after": {"unit": "days", "count": 1}}, 422, "stop_after"),
    ({"model": "other"}, 404, "no weights are loaded under the name 'other'"),
    ({"model": 3}, 422, "model"),
    ({"modle": "tiny"}, 422, "unknown key 'modle'"),
]
OF_DIFFUSION = [({"settings": {"block_length": 5}}, 422, "does not divide"), ({"settings": {"steps": 1}}, 422, "steps")]
OF_CAUSAL = [
    ({"prompt_ids": []}, 422, "empty"),
    ({"settings": {"threshold": 0.5}}, 422, "threshold"),
    ({"settings": {"guidance": 1}}, 422, "guidance"),
]


@pytest.mark.parametrize("backbone", ["diffusion", "causal"])
def test_what_the_model_cannot_do_is_refused_in_a_sentence(backbone: str, request: pytest.FixtureRequest):
    server = request.getfixturevalue(backbone)
    assert server.post("/generate", GOOD)[0] == 200
    for change, status, reason in [*WRONG, *(OF_DIFFUSION if backbone == "diffusion" else OF_CAUSAL)]:
        found, tree = server.post("/generate", {**GOOD, **change})
        message = tree["error"]["message"]
        assert (found, tree["error"]["code"]) == (status, status), (change, message)
        assert message == message.strip()
        assert len(message) <= 400
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(message)
    assert server.idle


def test_bodies_that_are_no_requests_are_refused(diffusion: Any):
    deep = b'{"prompt_ids":' + b"[" * 5000 + b"]" * 5000 + b"}"
    for body, status in ((b"", 400), (b"{", 400), (b"[]", 400), (b"\xff", 400), (b'{"key":NaN}', 400), (deep, 400)):
        found, content, _ = diffusion.raw("POST", "/generate", body)
        assert found == status
        assert json.loads(content)["error"]["message"]
    found, content, _ = diffusion.raw("POST", "/generate", b" " * (2**16 + 1))
    assert (found, "larger than 65536 bytes" in json.loads(content)["error"]["message"]) == (413, True)
    assert diffusion.get("/generate")[0] == 405
    assert diffusion.get("/nothing")[0] == 404
    assert diffusion.get("/health") == (200, {"status": "ok", "running": 0, "waiting": 0})


def test_who_hangs_up_frees_the_slot(make_policy: Callable[..., Any]):
    model = Model(random_init=True, tokenizer="tiny")
    for options in ({}, {"as_": "autoregressive"}):
        long = {"length": 512, "early_end": False}
        with served.serving(service_of(make_policy(**options), model)) as server:
            scheduler = server.service.scheduler
            for path in ("/generate", "/v1/completions"):
                tree = {"prompt_ids": [5], "key": 1, "settings": long}
                if path != "/generate":
                    tree = {"prompt": [5], "max_tokens": 512, "stream": True, "early_end": False}
                server.hang_up(path, tree, lambda: len(scheduler.running) == 1)  # noqa: B023
                served.until(lambda: server.idle)
            assert server.post("/generate", GOOD)[0] == 200


def test_a_full_server_asks_to_come_back_later(make_policy: Callable[..., Any]):
    model, gate = Model(random_init=True, tokenizer="tiny"), threading.Event()
    service = service_of(make_policy(), model, limits=replace(LIMITS, waiting=1))
    with served.serving(service) as server, ThreadPoolExecutor(1) as pool:
        service.scheduler.submit([ExclusiveWork(gate.wait)])
        served.until(lambda: not service.scheduler.waiting)
        first = pool.submit(server.post, "/generate", GOOD)
        served.until(lambda: len(service.scheduler.waiting) == 1)
        status, content, headers = server.raw("POST", "/generate", json.dumps(GOOD).encode())
        assert (status, headers["retry-after"]) == (503, "1")
        assert "ask again later" in json.loads(content)["error"]["message"]
        gate.set()
        assert first.result()[0] == 200


def test_a_server_that_closes_ends_what_runs_and_refuses_what_waits(make_policy: Callable[..., Any]):
    model, slow = Model(random_init=True, tokenizer="tiny"), {"length": 64, "early_end": False}
    service = service_of(make_policy(), model, decode=replace(DECODE, batch_size=1))
    with ThreadPoolExecutor(2) as pool:
        with served.serving(service) as server:
            running = pool.submit(server.post, "/generate", {**GOOD, "settings": slow})
            served.until(lambda: len(service.scheduler.running) == 1)
            waiting = pool.submit(server.post, "/generate", GOOD)
            served.until(lambda: len(service.scheduler.waiting) == 1)
        assert running.result()[0] == 200
        assert waiting.result()[0] == 503


def test_a_failure_that_nobody_expected_is_told_to_whoever_runs_the_server(
    diffusion: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def broken(*_: Any) -> None:
        raise RuntimeError("the secret of the house")

    monkeypatch.setattr(diffusion.service, "settings", broken)
    status, tree = diffusion.post("/generate", GOOD)
    assert (status, tree["error"]["type"]) == (500, "server_error")
    assert "secret" not in tree["error"]["message"]
    assert capfd.readouterr().err.count("RuntimeError: the secret of the house") == 1
