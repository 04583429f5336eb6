"""Answers of a `dllm_sd` server: every field of a completion must be what the trainer asked for."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import pytest

from dllm_sd.decoding.remote import RemoteDecoder, TokenIds
from dllm_sd.decoding.settings import Decoding
from dllm_sd.decoding.wire import settings_to_json
from dllm_sd.engines import CompletionRequest, DllmSd
from dllm_sd.policies.loading import AnyPolicy, load_policy
from dllm_sd.trajectory_json import _Row, trajectory_to_json

MODEL = {"tiny": "diffusion", "tiny_ar": "autoregressive"}
FIELDS = [*(entry.name for entry in fields(_Row)), "model"]
Change = Callable[[Any, Mapping[str, Any]], Any]
"""From the value of a field, and all of the answer, to another value."""
OTHER: dict[str, list[Change]] = {
    "prompt_ids": [lambda x, _: x[1:], lambda x, _: [*x, 5]],
    "tokens": [lambda x, _: x[:-1], lambda x, _: [3, *x[1:]], lambda x, _: [10**6, *x[1:]], lambda x, _: [-1, *x[1:]]],
    "reveal_step": [
        *(lambda x, _: x[:-1], lambda x, _: [-1, *x[1:]], lambda x, _: [step + 10**7 for step in x]),
        lambda x, _: x[::-1],
    ],
    "length": [lambda x, _: x - 1, lambda x, _: x + 1],
    "logp": [
        lambda x, _: x[:-1],
        lambda x, _: [None, *x[1:]],
        lambda x, _: [1.0, *x[1:]],
        lambda x, _: [-1e60, *x[1:]],
    ],
    "block_length": [lambda x, _: 2 * x, lambda x, answer: len(answer["tokens"]), lambda x, _: x + 1, lambda *_: 0],
    "mask_id": [lambda x, _: x + 1, lambda *_: -1, lambda *_: 10**6],
    "end_ids": [lambda x, _: [], lambda x, _: [*x, 5], lambda x, _: [5], lambda x, _: [10**6]],
    "pad_id": [lambda x, _: x + 1, lambda *_: -1, lambda *_: 10**6],
    "blocks_of_prompt": [lambda x, _: not x],
    "causal": [lambda x, _: not x],
    "model": [lambda x, _: "another"],
}
ANY: list[Change] = [lambda *_: None, lambda *_: "text", lambda *_: {}, lambda *_: [[1]], lambda *_: 1.5]


class Nothing:
    """A journal that keeps nothing."""

    def get(self, request: CompletionRequest) -> None:
        return None

    def put(self, request: CompletionRequest, trajectory: Any, server: str) -> None:
        return None


Case = tuple[CompletionRequest, dict[str, Any], DllmSd]


def case_of(policy: AnyPolicy) -> Case:
    """A request of the trainer, and the answer of a server that does all as it should."""
    settings = Decoding(length=8, block_length=4, tokens_per_step=2, suppress=(3,), temperature=1.0)
    engine: Any = DllmSd(url=("http://localhost",), model="m")
    ids = TokenIds(
        *(policy.end_ids, policy.pad_id, tuple(policy.suppress), policy.vocabulary, policy.mask_id),
        blocks_of_prompt=policy.block_length is not None,
        causal=policy.causal,
    )
    servers: Any = type("Servers", (), {"engine": engine})
    decoder = RemoteDecoder(servers, ids, lambda: ("m", "0"), Nothing())
    job: Any = type("Job", (), {"prompt": [5, 6, 7], "key": 1})
    request = decoder.request(job, settings, None)
    assert settings_to_json(settings) == request.decode
    keys = range(50)
    done = policy.decode([list(request.prompt)] * len(keys), settings, [*keys])
    unended = [one for one in done.unstack() if not bool(one.ended)]  # every position holds a token that was drawn
    return request, {**trajectory_to_json(unended[0]), "model": "m"}, engine


@pytest.fixture(scope="module", params=MODEL, ids=[*MODEL.values()])
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(load_policy(request.param))


def test_every_field_of_an_answer_is_among_the_cases(case: Case):
    assert {*case[1]} == {*FIELDS} == {*OTHER}


def test_the_answer_as_it_should_be_is_accepted(case: Case):
    request, answer, engine = case
    assert engine.read(answer, request).tokens.tolist() == [answer["tokens"]]


@pytest.mark.parametrize("field", FIELDS)
def test_an_answer_with_another_value_of_a_field_is_refused(case: Case, field: str):
    request, answer, engine = case
    changed = [{**answer, field: change(answer[field], answer)} for change in (*OTHER[field], *ANY)]
    changed.append({name: value for name, value in answer.items() if name != field})
    for other in changed:
        if other.get(field) == answer[field]:
            continue  # it is what this model has
        with pytest.raises(ValueError, match=r"."):
            print(field, other.get(field), engine.read(other, request))
