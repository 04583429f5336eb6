"""The interface of OpenAI's servers: texts, choices, stops, streams, log-probabilities, and what is refused."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dllm_sd.network.view import View
from dllm_sd.policies.loading import AnyPolicy, build_policy
from dllm_sd.pretrained.model import Model
from dllm_sd.randomness import make_key
from dllm_sd.serving.growth import MASKED, Final, Growth
from tests.serving.conftest import DECODE, service_of
from tests.tiers import later

served = pytest.importorskip("tests.serving.served", exc_type=ImportError)

PUZZLE = "1200000000000000"
CHAT = {"messages": [{"role": "user", "content": PUZZLE}], "seed": 7}


@pytest.fixture(params=["diffusion", "causal"])
def server(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def local(server: Any, prompt: list[int], number: int = 0, seed: int = 7, **settings: Any) -> tuple[list[int], str]:
    """The tokens and the text that the policy decodes without a server."""
    policy: AnyPolicy = server.service.policy
    chosen = server.service.settings(settings)
    found = policy.decode([prompt], chosen, [make_key("completion", seed, number)])
    tokens = found.tokens[0, : int(found.length)].tolist()
    return tokens, policy.text(tokens)


def test_a_chat_is_answered_with_what_the_policy_decodes(server: Any):
    prompt = server.service.policy.encode(CHAT["messages"])
    status, tree = server.post("/v1/chat/completions", {**CHAT, "n": 2})
    assert status == 200
    for number, choice in enumerate(tree["choices"]):
        tokens, text = local(server, prompt, number)
        assert choice["message"] == {"role": "assistant", "content": text}
        assert choice["index"] == number
        assert choice["finish_reason"] == ("stop" if tokens[-1] in server.service.policy.end_ids else "length")
    assert tree["model"] == server.service.weights.base
    usage = tree["usage"]
    assert usage["prompt_tokens"] == len(prompt)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_text_and_its_tokens_are_the_same_prompt(server: Any):
    tokens = server.service.policy.encode_completion(PUZZLE, ended=False)
    body = {"max_tokens": 8, "seed": 7, "logprobs": 1}
    _, one = server.post("/v1/completions", {**body, "prompt": PUZZLE})
    _, other = server.post("/v1/completions", {**body, "prompt": tokens})
    _, both = server.post("/v1/completions", {**body, "prompt": [tokens, tokens]})
    assert one["choices"] == other["choices"]
    assert one["choices"][0]["text"] == local(server, tokens, length=8)[1]
    assert [(choice["index"], choice["text"]) for choice in both["choices"]] == [
        (place, one["choices"][0]["text"]) for place in (0, 1)
    ]


def test_max_tokens_cuts_what_a_whole_block_holds(diffusion: Any):
    _, tree = diffusion.post("/v1/completions", {"prompt": PUZZLE, "max_tokens": 6, "seed": 7})
    tokens, _ = local(diffusion, diffusion.service.policy.encode_completion(PUZZLE, ended=False), length=8)
    assert tree["choices"][0]["text"] == diffusion.service.policy.text(tokens[:6])
    assert tree["usage"]["completion_tokens"] == 6
    assert tree["choices"][0]["finish_reason"] == "length"


def test_blocks_that_do_not_fit_are_refused_in_the_words_of_the_request(diffusion: Any):
    limit = diffusion.service.limits.completion
    status, tree = diffusion.post("/v1/completions", {"prompt": PUZZLE, "max_tokens": limit, "block_length": limit - 1})
    assert status == 400
    assert tree["error"]["message"] == (
        f"{limit} tokens take whole blocks of {limit - 1}, and so {2 * limit - 2} positions of at most {limit}; lower "
        "max_tokens or block_length"
    )


def test_more_positions_take_more_steps_and_keys_of_decode_may_be_given(diffusion: Any):
    prompt = diffusion.service.policy.encode_completion(PUZZLE, ended=False)
    for extra in ({"tokens_per_step": 4}, {"order": "random", "top_k": 3}, {"block_length": 8, "threshold": 0.4}):
        body = {"prompt": prompt, "max_tokens": 24, "seed": 7, **extra}
        _, tree = diffusion.post("/v1/completions", body)
        assert tree["choices"][0]["text"] == local(diffusion, prompt, length=24, **extra)[1]


def test_a_stop_text_ends_the_text_before_it(server: Any):
    _, whole = server.post("/v1/chat/completions", CHAT)
    text = whole["choices"][0]["message"]["content"]
    stop = text[5:7]
    for stops in (stop, [stop, "never"]):
        body = {**CHAT, "stop": stops}
        _, tree = server.post("/v1/chat/completions", body)
        choice = tree["choices"][0]
        assert choice["message"]["content"] == text[: text.index(stop)]
        assert tree["usage"]["completion_tokens"] == text.index(stop) + 2  # a token is a letter here
        assert choice["finish_reason"] == "stop"
        streamed = server.events("/v1/chat/completions", body)
        assert "".join(event["choices"][0]["delta"]["content"] for event in streamed) == text[: text.index(stop)]


def test_a_stream_says_piece_by_piece_what_the_whole_answer_says(server: Any):
    _, whole = server.post("/v1/chat/completions", {**CHAT, "n": 2})
    body = {**CHAT, "n": 2, "stream_options": {"include_usage": True}}
    *events, last = server.events("/v1/chat/completions", body)
    assert last["usage"] == whole["usage"]
    assert last["choices"] == []
    assert {event["id"] for event in events} == {last["id"]}
    for choice in whole["choices"]:
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(one["delta"]["content"] for one in mine) == choice["message"]["content"]
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
        canvases = [one["canvas"] for one in mine if "canvas" in one]
        assert bool(canvases) != server.service.policy.causal
        if canvases:
            assert canvases[-1] == choice["message"]["content"]
            masked = [canvas.count(MASKED) for canvas in canvases]
            assert masked == sorted(masked, reverse=True)
    texts = server.events("/v1/completions", {"prompt": PUZZLE, "seed": 7})
    assert (
        "".join(event["choices"][0]["text"] for event in texts)
        == local(server, server.service.policy.encode_completion(PUZZLE, ended=False))[1]
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, *later({"as_": "autoregressive"})], ids=["diffusion", "causal"])
def test_a_long_stream_grows_while_it_is_decoded(make_policy: Callable[..., Any], options: dict[str, Any]):
    model = Model(random_init=True, tokenizer="tiny")
    policy = make_policy(**options)
    body = {"prompt": [5], "max_tokens": 64, "seed": 1, "tokens_per_step": 2, "suppress": sorted(policy.non_text_ids)}
    with served.serving(service_of(policy, model)) as server:
        pieces = [event["choices"][0]["text"] for event in server.events("/v1/completions", body)]
        _, whole = server.post("/v1/completions", body)
        assert "".join(pieces) == whole["choices"][0]["text"]
        assert sum(map(bool, pieces)) > 1


def test_given_text_is_scored_token_by_token(causal: Any):
    policy = causal.service.policy
    prompts = [[5, 6, 7, 8], [9, 10, 5]]
    body = {"prompt": prompts, "max_tokens": 1, "temperature": 0, "logprobs": 2, "echo": True, "seed": 1}
    status, tree = causal.post("/v1/completions", body)
    assert status == 200
    for prompt, choice in zip(prompts, tree["choices"], strict=True):
        ids = torch.tensor([prompt])
        sites = torch.ones_like(ids, dtype=torch.bool)
        sites[:, 0] = False
        with torch.no_grad():
            logp = policy.site_logits(View(ids, torch.ones_like(sites), sites)).float().log_softmax(-1)
        wanted = logp.gather(1, ids[0, 1:, None])[:, 0]
        found = choice["logprobs"]
        assert found["token_logprobs"][0] is None
        assert found["top_logprobs"][0] is None
        torch.testing.assert_close(torch.tensor(found["token_logprobs"][1 : len(prompt)]), wanted, atol=1e-5, rtol=0)
        best = [max(top.values()) for top in found["top_logprobs"][1:]]
        torch.testing.assert_close(torch.tensor(best[: len(wanted)]), logp.amax(1), atol=1e-5, rtol=0)
        assert found["token_logprobs"][-1] == best[-1]  # the greedy token
        assert choice["text"].startswith(policy.text(prompt))
        assert len(found["tokens"]) == len(found["text_offset"]) == len(prompt) + 1
    _, alone = causal.post("/v1/completions", {**body, "max_tokens": 0, "prompt": prompts[0]})
    assert alone["choices"][0]["text"] == policy.text(prompts[0])
    assert len(alone["choices"][0]["logprobs"]["tokens"]) == len(prompts[0])


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"n": 0}, 400, "n is 0"),
    ({"n": 1000}, 400, "n is 1000"),
    ({"n": 100}, 400, "too many at once"),
    ({"max_tokens": -1}, 400, "max_tokens is -1"),
    ({"max_tokens": 10**6}, 400, "max_tokens is 1000000"),
    ({"max_tokens": "5"}, 400, "max_tokens"),
    ({"temperature": "hot"}, 400, r"decode\.temperature"),
    ({"temperature": -1}, 400, r"decode\.temperature"),
    ({"top_p": 0}, 400, r"decode\.top_p"),
    ({"stop": [""]}, 400, "stop"),
    ({"stop": ["x"] * 17}, 400, "stop"),
    ({"stream": 1}, 400, "stream"),
    ({"seed": "x"}, 400, "seed"),
    ({"model": "gpt"}, 404, "'gpt'"),
    ({"temprature": 1}, 400, "'temprature' is not offered"),
    ({"temperature": "0.7"}, 400, r"decode\.temperature must be a number, not text"),
    ({"temperature": 1e-320}, 400, r"decode\.temperature is 1e-320; give a number from 0\.001 to 1000, or 0"),
    ({"max_tokens": 1.5}, 400, "max_tokens must be a whole number"),
    ({"max_tokens": 0}, 400, "max_tokens is 0"),
    ({"max_completion_tokens": 0}, 400, "max_completion_tokens is 0"),
    ({"max_completion_tokens": 4, "max_tokens": 0}, 400, "max_tokens is 0"),
    ({"modalities": ["text", "audio"]}, 400, "modalities is not offered"),
    ({"stream_options": {"continuous_usage_stats": True}}, 400, r"stream_options\.continuous_usage_stats is not"),
    ({"tools": [{"type": "function"}]}, 400, "tools is not offered"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty is not offered"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format is not offered"),
]
OF_TEXTS = [
    ({"prompt": None}, 400, "prompt must be"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": {"a": 1}}, 400, "prompt must be"),
    ({"prompt": [5, "x"]}, 400, "prompt"),
    ({"prompt": [5, 10**6]}, 400, "token ids"),
    ({"prompt": "1" * 100}, 413, "at most 64"),
    ({"prompt": "1" * 20000}, 413, "characters"),
    ({"prompt": "\ud800"}, 400, "surrogate"),
    ({"logprobs": 100, "stream": False}, 400, "logprobs is 100"),
    ({"logprobs": 1, "stream": True}, 400, "not streamed"),
    ({"echo": True, "stream": True}, 400, "not streamed"),
]
OF_CHATS = [
    ({"messages": None}, 400, "messages"),
    ({"messages": []}, 400, "messages"),
    ({"messages": ["hello"]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "messages, message 0"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages, message 0"),
    ({"messages": [{"role": "user", "content": "x", "name": 5}]}, 400, "message 0: name must be text"),
    ({"messages": [{"role": "user", "content": "x", "audio": {"id": "a"}}]}, 400, "'audio', which is not read"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "developer", "content": "y"}]}, 400, "put it first"),
    ({"logprobs": True}, 400, "/v1/completions"),
    ({"logprobs": True, "top_logprobs": 2}, 400, "/v1/completions"),
    ({"top_logprobs": 2}, 400, "/v1/completions"),
    ({"reasoning_effort": "high"}, 400, "reasoning_effort is offered as none only"),
    ({"chat_template_kwargs": {"documents": []}}, 400, r"chat_template_kwargs\.documents is not offered"),
    ({"chat_template_kwargs": {"enable_thinking": "no"}}, 400, r"enable_thinking must be true or false"),
    ({"chat_template_kwargs": {"enable_thinking": True}}, 400, "no thinking switch"),
    ({"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "none"}, 400, "leave out one"),
]


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_refused_in_a_sentence(server: Any, stream: bool):
    bodies = {"/v1/completions": {"prompt": PUZZLE}, "/v1/chat/completions": CHAT}
    for path, body in bodies.items():
        for change, status, reason in [*WRONG, *(OF_CHATS if "chat" in path else OF_TEXTS)]:
            sent = {**body, "stream": stream, **change}
            found, tree = server.post(path, sent)
            message = tree["error"]["message"]
            assert found == status, (change, message)
            assert len(message) <= 400
            with pytest.raises(AssertionError, match=reason):
                raise AssertionError(message)
    assert server.idle


def test_a_diffusion_model_does_not_pretend_to_score_text(diffusion: Any):
    status, tree = diffusion.post("/v1/completions", {"prompt": "1", "echo": True, "logprobs": 1, "max_tokens": 0})
    assert (status, "diffusion model" in tree["error"]["message"]) == (400, True)


def test_what_asks_for_nothing_changes_nothing(server: Any):
    idle = {"user": "me", "frequency_penalty": 0, "tools": [], "logit_bias": None, "response_format": {"type": "text"}}
    _, plain = server.post("/v1/chat/completions", CHAT)
    _, other = server.post("/v1/chat/completions", {**CHAT, **idle, "presence_penalty": 0.0, "store": False})
    assert plain["choices"] == other["choices"]


REAL: list[dict[str, Any]] = [
    {"max_tokens": 8, "max_completion_tokens": 6},
    {"max_tokens": 6, "max_completion_tokens": 8},
    {"max_tokens": 6.0},
    {"max_tokens": 6, "seed": 7.0, "n": 1.0},
    {"max_tokens": 6, "modalities": ["text"], "top_logprobs": 0, "logprobs": False},
    {"max_tokens": 6, "reasoning_effort": "none"},
    {"max_tokens": 6, "chat_template_kwargs": {"enable_thinking": False}},
    {"max_tokens": 6, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    {"max_tokens": 6, "parallel_tool_calls": True, "tool_choice": "auto", "function_call": "none"},
    {"max_tokens": 6, "user": "u", "metadata": {"a": "b"}, "store": True, "prompt_cache_retention": "24h"},
    {"max_tokens": 6, "messages": [{"role": "user", "content": PUZZLE, "name": "ann"}]},
    {"max_tokens": 6, "messages": [{"role": "user", "content": [{"type": "text", "text": PUZZLE}]}]},
]


def test_what_real_clients_send_is_read(server: Any):
    _, plain = server.post("/v1/chat/completions", {**CHAT, "max_tokens": 6})
    assert plain["usage"]["completion_tokens"] == 6
    for change in REAL:
        status, tree = server.post("/v1/chat/completions", {**CHAT, **change})
        assert (status, tree.get("choices")) == (200, plain["choices"]), (change, tree)
    body = json.dumps({**CHAT, "max_tokens": 6}).encode()
    status, content, _ = server.raw("POST", "/v1/chat/completions", b"\xef\xbb\xbf" + body)
    assert (status, json.loads(content)["choices"]) == (200, plain["choices"])


def test_a_developer_is_read_as_the_system_is(server: Any):
    answers = [
        server.post("/v1/chat/completions", {**CHAT, "messages": [{"role": role, "content": "2"}, *CHAT["messages"]]})
        for role in ("system", "developer")
    ]
    assert [status for status, _ in answers] in ([200, 200], [400, 400])
    assert answers[0][1].get("choices") == answers[1][1].get("choices")
    if answers[0][0] == 400:
        assert answers[0][1] == answers[1][1]


def test_a_chat_chooses_whether_the_model_thinks(causal: Any, monkeypatch: pytest.MonkeyPatch):
    seen: list[bool | None] = []
    policy = causal.service.policy
    encode = policy.encode

    def note(messages: Any, thinking: bool | None = None) -> list[int]:
        seen.append(thinking)
        return encode(messages)

    monkeypatch.setattr(policy, "encode", note)
    monkeypatch.setattr(type(policy.chat), "has_switch", True)
    for change in ({}, {"chat_template_kwargs": {"enable_thinking": True}}, {"reasoning_effort": "none"}):
        assert causal.post("/v1/chat/completions", {**CHAT, **change})[0] == 200
    assert seen == [None, True, False]


def test_the_models_are_listed(server: Any):
    status, tree = server.get("/v1/models")
    assert status == 200
    assert [model["id"] for model in tree["data"]] == [server.service.weights.base]


def test_a_key_is_asked_for_where_there_is_one(policy: Any):
    model = Model(random_init=True, tokenizer="tiny")
    with served.serving(service_of(policy, model), key="sesame") as server:
        body = json.dumps(CHAT).encode()
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}, {"Authorization": ""}):
            status, content, answer = server.raw("POST", "/v1/chat/completions", body, **headers)
            assert (status, answer["www-authenticate"]) == (401, "Bearer")
            assert b"Authorization: Bearer" in content
            assert b"sesame" not in content
        assert server.raw("POST", "/v1/chat/completions", body, Authorization="Bearer sesame")[0] == 200
        assert server.raw("GET", "/v1/models")[0] == 401
        assert server.raw("GET", "/health")[0] == 200


class Letters:
    """A policy whose tokens are the letters of a text; -1 stands for a masked position."""

    causal, mask_id = False, -1
    non_text_ids = byte_ids = frozenset[int]()

    def text(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


def growth(*stops: str, most: int = 100) -> Growth:
    policy: Any = Letters()
    return Growth(policy, (0,), most, stops)


def test_text_is_sent_once_no_later_step_can_change_it():
    canvases = ["________", "__l_____", "h_l_____", "hel_____", "hel_o___", "hello___", "hello\0__"]
    one = growth()
    pieces = [one.piece([-1 if letter == "_" else ord(letter) for letter in canvas]) for canvas in canvases]
    assert [piece and piece.text for piece in pieces] == ["", "", "h", "el", "", "lo", ""]
    assert pieces[1] is not None
    assert pieces[1].canvas == f"{MASKED * 2}l{MASKED * 5}"
    assert one.piece([*b"hello\0", -1, -1]) is None


def test_half_a_character_and_half_a_stop_text_are_held_back():
    one = growth("END", "EX")
    sent = []
    for canvas in (b"ab\xc3", b"ab\xc3\xa9E", "abéEN".encode(), "abéENE".encode(), "abéENEX".encode()):
        if (final := one.stopped([*canvas])) is not None:
            sent.append(one.rest(final).text)
            assert (final.text, final.reason) == ("abéEN", "stop")
        elif (piece := one.piece([*canvas])) is not None:
            sent.append(piece.text)
    assert [*filter(None, sent)] == ["ab", "é", "EN"]


class Bytes(Letters):
    """A policy that spells some characters in bytes (-256 to -511), as sentencepiece does: one invalid byte spoils
    the whole run."""

    byte_ids = frozenset(range(-511, -255))

    def text(self, tokens: list[int]) -> str:
        text, run = "", list[int]()
        for token in [*tokens, ord(" ")]:
            if token in self.byte_ids:
                run.append(-256 - token)
                continue
            try:
                text += bytes(run).decode()
            except UnicodeDecodeError:
                text += "\ufffd" * len(run)
            text, run = text + chr(token), []
        return text[:-1]


@pytest.mark.parametrize("stop", [(), ("é",)])
def test_a_run_of_byte_tokens_is_sent_when_no_later_byte_can_spoil_it(stop: tuple[str, ...]):
    spelled = {letter: [-256 - byte for byte in letter.encode()] for letter in "éè"}
    tokens = [ord("a"), *spelled["é"], *spelled["è"][:1], *map(ord, "bc"), *spelled["è"], ord("d")]
    policy: Any = Bytes()
    one = Growth(policy, (0,), 100, stop)
    sent = list[str]()
    for count in range(1, len(tokens) + 1):
        canvas = tokens[:count] + [-1] * (len(tokens) - count)
        assert one.stopped(canvas) is None
        sent.append(((piece := one.piece(canvas)) and piece.text) or "")
    assert "".join(sent) == policy.text(tokens) == "a\ufffd\ufffd\ufffdbcèd"
    assert [*filter(None, sent)] == ["a", "\ufffd\ufffd\ufffdb", "c", "èd"]


def test_a_stop_text_is_counted_alike_while_and_after_it_grows(server: Any):
    """A completion with log-probabilities is decoded to its end, and cut then."""
    body = {"prompt": PUZZLE, "seed": 7}
    _, whole = server.post("/v1/completions", body)
    stop = whole["choices"][0]["text"][6:8]
    (_, early), (_, late) = (
        server.post("/v1/completions", {**body, "stop": stop, **more}) for more in ({}, {"logprobs": 1})
    )
    assert early["usage"] == late["usage"]
    assert early["choices"][0]["text"] == late["choices"][0]["text"]
    found = late["choices"][0]["logprobs"]
    assert len(found["token_logprobs"]) == late["usage"]["completion_tokens"]
    assert None not in found["token_logprobs"]
    assert "".join(found["tokens"]) == early["choices"][0]["text"] + stop


def test_the_end_of_a_completion_is_counted_and_cut():
    trajectory = build_policy(Model(path="tiny")).decode([[5]], DECODE, [1])
    one = Growth(build_policy(Model(path="tiny")), (1,), 3, ())
    final = one.final(trajectory)
    assert isinstance(final, Final)
    assert (len(final.tokens), len(final.logp), final.reason) == (3, 3, "length")
