"""The interface of OpenAI's servers: what `/v1/completions` and `/v1/chat/completions` ask, and how it is answered."""

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dllm_sd.decoding.settings import Decoding
from dllm_sd.decoding.wire import SETTINGS
from dllm_sd.errors import shown
from dllm_sd.files.typed_json import build
from dllm_sd.policies.policy import offsets
from dllm_sd.randomness import make_key
from dllm_sd.serving.growth import Canvas, Final, Growth, Piece
from dllm_sd.serving.refusal import Refusal
from dllm_sd.serving.scheduler import Completion, RequestKind
from dllm_sd.serving.scoring import TokenScores, score
from dllm_sd.serving.service import Service, refusing
from dllm_sd.tasks.conversations import read_conversation

IGNORED = {
    *("user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention"),
    *("safety_identifier", "parallel_tool_calls"),
}
"""Keys that change no text."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p"), (0,)),
    **dict.fromkeys(("repetition_penalty", "best_of"), (1,)),
    **dict.fromkeys(("tools", "functions", "logit_bias"), ([], {})),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
}
"""Keys of what is not offered, and the values that ask for nothing."""
STREAMED = ("include_usage", "include_obfuscation")
"""Keys of `stream_options`; the second is about the size of chunks, which OpenAI pads."""
MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS = 128, 16, 20
LOCAL = tuple(name for name in SETTINGS if name != "length")
"""Keys of `decode` that may stand beside those of OpenAI."""


@dataclass(frozen=True)
class Asked:
    """A request, read and checked."""

    prompts: tuple[tuple[int, ...], ...]
    kind: RequestKind
    most: int
    """Tokens of a completion (`max_tokens`); the canvas may have more positions, to fill its last block."""
    n: int
    seed: int
    stops: tuple[str, ...]
    stream: bool
    counts: bool
    """Whether a stream ends with the counts of tokens."""
    logprobs: int | None
    echo: bool
    chat: bool

    @property
    def growing(self) -> bool:
        """Whether the text is looked at while it grows: to send it, or to end where a stop text stands."""
        return self.stream or (bool(self.stops) and self.logprobs is None)


async def read_asked(service: Service, tree: Mapping[str, Any], chat: bool) -> Asked:
    """Read the body of a request.

    Raises:
        Refusal: naming a key that is wrong, or asks for what this server does not do.
    """
    body = dict(tree)
    for name, values in NEUTRAL.items():
        if (value := body.pop(name, None)) is not None and value not in values:
            raise Refusal(422, f"{name} is not offered here, and would change the text; leave it out")

    def take(name: str, kind: Any, otherwise: Any = None) -> Any:
        value = body.pop(name, None)
        if kind is int and isinstance(value, float) and value.is_integer():  # as some languages write whole numbers
            value = int(value)
        with refusing():
            return otherwise if value is None else build(kind, value, name)

    if chat:
        thinking = _thinking(service, take("chat_template_kwargs", dict[str, Any], {}), take("reasoning_effort", str))
        if take("logprobs", bool, False) or take("top_logprobs", int, 0):
            raise Refusal(422, "logprobs are given by /v1/completions and not for chats; leave out logprobs")
        prompts, logprobs, echo = await _messages(service, take("messages", Any), thinking), None, False
    else:
        echo, logprobs = take("echo", bool, False), take("logprobs", int)
        prompts = _prompts(service, body.pop("prompt", None))
    most = _most(service, {name: take(name, int) for name in ("max_completion_tokens", "max_tokens")}, echo)
    n, stop = take("n", int, 1), take("stop", str | tuple[str, ...], ())
    stream, options = take("stream", bool, False), take("stream_options", dict[str, Any], {})
    model, seed = take("model", str), take("seed", int, secrets.randbits(62))
    settings = {name: body.pop(name) for name in LOCAL if body.get(name) is not None}
    if unknown := sorted(body.keys() - IGNORED - set(LOCAL)):
        raise Refusal(422, f"{shown(unknown[0])} is not offered here; leave it out")
    if unknown := [name for name in options if name not in STREAMED]:
        raise Refusal(422, f"stream_options.{unknown[0]:.60} is not offered here; leave it out")
    if stream and (echo or logprobs is not None):
        raise Refusal(422, "echo and logprobs are not streamed; leave them out, or set stream to false")
    stops = (stop,) if isinstance(stop, str) else stop
    _check_numbers(service, n, len(prompts), stops, logprobs, echo)
    kind = RequestKind(service.weights.check(model), _settings(service, settings, max(1, most)))
    counts = bool(options.get("include_usage"))
    return Asked(prompts, kind, most, n, seed, stops, stream, counts, logprobs, echo, chat)


def _most(service: Service, given: Mapping[str, int | None], echo: bool) -> int:
    """Return how many tokens a completion may have: the smaller of two limits where both are given."""
    limit = service.limits.completion
    for name, most in given.items():
        if most is not None and not (0 if echo else 1) <= most <= limit:
            raise Refusal(422, f"{name} is {most}; give a number from 1 to {limit}")
    return min((most for most in given.values() if most is not None), default=service.decode.length)


def _thinking(service: Service, template: Mapping[str, Any], effort: str | None) -> bool | None:
    """Return the thinking switch that a request asks for, None if it asks for none."""
    if unknown := [name for name in template if name != "enable_thinking"]:
        raise Refusal(422, f"chat_template_kwargs.{unknown[0]:.60} is not offered here; leave it out")
    if effort not in (None, "none"):
        raise Refusal(422, "reasoning_effort is offered as none only, which turns thinking off; leave it out")
    with refusing():
        thinking = build(bool | None, template.get("enable_thinking"), "chat_template_kwargs.enable_thinking")
    if thinking and effort == "none":
        raise Refusal(422, "reasoning_effort is none, but chat_template_kwargs.enable_thinking is true; leave out one")
    thinking = False if effort == "none" else thinking
    if thinking and not (service.policy.chat and service.policy.chat.has_switch):
        raise Refusal(422, "the model has no thinking switch; leave out chat_template_kwargs.enable_thinking")
    return thinking


def _check_numbers(
    service: Service, n: int, prompts: int, stops: Sequence[str], logprobs: int | None, echo: bool
) -> None:
    if not 1 <= n <= MOST_CHOICES:
        raise Refusal(422, f"n is {n}; give a number from 1 to {MOST_CHOICES}")
    if prompts * n > service.limits.waiting:
        raise Refusal(422, f"{prompts} prompts with n = {n} are too many at once; ask for {service.limits.waiting}")
    if len(stops) > MOST_STOPS or not all(stops):
        raise Refusal(422, f"stop must be a text, or a list of at most {MOST_STOPS} texts, none of them empty")
    if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
        raise Refusal(422, f"logprobs is {logprobs}; give a number from 0 to {MOST_LOGPROBS}")
    if echo and not service.policy.causal:
        raise Refusal(
            422,
            "echo asks how probable given text is, which a diffusion model answers by sampling masks only; leave it "
            "out, or evaluate with the lm-eval model of dllm-sd",
        )


def _settings(service: Service, given: Mapping[str, Any], most: int) -> Decoding:
    """Return the settings of a completion of ``most`` tokens: whole blocks, as many tokens a step as the server's."""
    base = service.decode
    tree = {**given, "length": most}
    block = given.get("block_length", base.block_length)
    if not service.policy.causal and type(block) is int and block >= 1:
        blocks = -(-most // block)
        if (length := blocks * block) > (limit := service.limits.completion):
            raise Refusal(
                422,
                f"{most} tokens take whole blocks of {block}, and so {length} positions of at most {limit}; lower "
                "max_tokens or block_length",
            )
        tree["length"] = length
        if base.steps is not None and "steps" not in given:
            steps = max(blocks, base.steps * blocks * block // base.length)
            tree["steps"] = None if "tokens_per_step" in given else steps
    return service.settings(tree, "decode")


def _prompts(service: Service, prompt: Any) -> tuple[tuple[int, ...], ...]:
    """Read texts or token ids, one or several."""
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and type(prompt[0]) is int):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise Refusal(422, "prompt must be a text, a list of token ids, or a list of either")
    with refusing():
        every = [
            _encode(service, one) if isinstance(one, str) else build(tuple[int, ...], one, "prompt") for one in prompt
        ]
    return tuple(service.check_prompt(one) for one in every)


def _encode(service: Service, text: str) -> list[int]:
    """Return the tokens of a text, behind what the tokenizer begins a text with."""
    _check_size(service, len(text))
    tokens = service.policy.encode_completion(text, ended=False)
    opening = service.policy.chat.opening if service.policy.chat else []
    return tokens if tokens[: len(opening)] == opening else [*opening, *tokens]


async def _messages(service: Service, messages: Any, thinking: bool | None) -> tuple[tuple[int, ...], ...]:
    """Read a conversation. A developer speaks as the system does; names of speakers stand in no chat template."""
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise Refusal(422, "messages must be a list of messages, each with a role and a content")
    for number, message in enumerate(messages):
        with refusing():
            build(str | None, message.get("name"), f"messages, message {number}: name")
    read = [{key: value for key, value in message.items() if key != "name"} for message in messages]
    read = [{**message, "role": "system"} if message.get("role") == "developer" else message for message in read]
    with refusing():
        conversation = read_conversation(read, "messages")
        _check_size(service, sum(len(message["content"]) for message in conversation))
        async with service.quiet():
            prompt = service.policy.encode(conversation, service.thinking if thinking is None else thinking)
    return (service.check_prompt(prompt),)


def _check_size(service: Service, characters: int) -> None:
    """Refuse a text that no tokenizer makes short enough, before it takes the time of all."""
    if characters > 256 * service.limits.prompt:
        raise Refusal(413, f"the prompt has {characters} characters; give at most {service.limits.prompt} tokens")


@dataclass
class ApiChoice:
    """One completion of a request."""

    index: int
    prompt: tuple[int, ...]
    completion: Completion | None
    growth: Growth
    canvas: Canvas | None

    async def follow(self, tell: Callable[[int, Piece], Awaitable[None]]) -> Final:
        """Tell of each piece of text as soon as no later step can change it, and return the end."""
        if self.completion is None:
            return Final("", (), (), "length")
        result = asyncio.wrap_future(self.completion.result)
        try:
            final = None
            while self.canvas is not None and final is None and await _changed(self.canvas, result):
                canvas = self.canvas.latest
                final = self.growth.stopped(canvas)
                if final is None and (piece := self.growth.piece(canvas)) is not None:
                    await tell(self.index, piece)
            final = final or self.growth.final(await result)
        finally:
            result.cancel()
            self.completion.result.cancel()
        await tell(self.index, self.growth.rest(final))
        return final


async def _changed(canvas: Canvas, result: "asyncio.Future[Any]") -> bool:
    """Wait for another canvas; False once the result is there."""
    change = asyncio.create_task(canvas.changed.wait())
    try:
        await asyncio.wait({change, result}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        change.cancel()
    canvas.changed.clear()
    return not result.done()


class ApiResponse:
    """The answer to a request, as a whole or as a stream."""

    def __init__(self, service: Service, asked: Asked) -> None:
        """Let the completions of a request wait for their turn.

        Raises:
            Refusal: if too many requests wait.
        """
        self.service, self.asked = service, asked
        self.id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.created = int(time.time())
        kinds = [(prompt, choice) for prompt in asked.prompts for choice in range(asked.n)]
        self.choices = [self._choice(index, *kind) for index, kind in enumerate(kinds)]
        service.scheduler.submit([one.completion for one in self.choices if one.completion is not None])

    def _choice(self, index: int, prompt: tuple[int, ...], number: int) -> ApiChoice:
        asked, policy = self.asked, self.service.policy
        canvas = Canvas() if asked.growing and not asked.kind.settings.continuous else None
        completion = None
        if asked.most:
            completion = Completion(prompt, make_key("completion", asked.seed, number), asked.kind, canvas)
        return ApiChoice(index, prompt, completion, Growth(policy, policy.end_ids, asked.most, asked.stops), canvas)

    async def whole(self) -> dict[str, Any]:
        """Return the answer once all completions have ended."""

        async def forget(index: int, piece: Piece) -> None:
            pass

        finals, scores = await self._ended(forget)
        choices = [
            self._shown(choice, final, scores.get(choice.prompt))
            for choice, final in zip(self.choices, finals, strict=True)
        ]
        kind = "chat.completion" if self.asked.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self._usage(finals)}

    async def stream(self, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        """Send the answer piece by piece.

        Each piece of a diffusion model also holds the whole canvas as text, under ``canvas``.
        """
        kind = "chat.completion.chunk" if self.asked.chat else "text_completion"

        async def tell(index: int, piece: Piece, reason: str | None = None, role: bool = False) -> None:
            delta = {**({"role": "assistant"} if role else {}), "content": piece.text}
            shown: dict[str, Any] = {"delta": delta} if self.asked.chat else {"text": piece.text}
            canvas = {} if piece.canvas is None else {"canvas": piece.canvas}
            choice = {"index": index, **shown, "logprobs": None, "finish_reason": reason, **canvas}
            await send({**self._head(kind), "choices": [choice]})

        for choice in self.choices if self.asked.chat else ():
            await tell(choice.index, Piece(""), role=True)
        finals, _ = await self._ended(tell)
        for choice, final in zip(self.choices, finals, strict=True):
            await tell(choice.index, Piece(""), final.reason)
        if self.asked.counts:
            await send({**self._head(kind), "choices": [], "usage": self._usage(finals)})

    async def _ended(
        self, tell: Callable[[int, Piece], Awaitable[None]]
    ) -> tuple[list[Final], dict[tuple[int, ...], TokenScores]]:
        follow = [choice.follow(tell) for choice in self.choices]
        *finals, scores = await all_of([*follow, self._scores()])
        return finals, scores

    async def _scores(self) -> dict[tuple[int, ...], TokenScores]:
        """Score the prompts where their log-probabilities are asked for."""
        asked, service = self.asked, self.service
        if not asked.echo or asked.logprobs is None:
            return {}
        prompts = [*dict.fromkeys(asked.prompts)]

        def work() -> list[TokenScores]:
            with service.weights.applied(asked.kind.weights):
                return score(service.policy, prompts, asked.logprobs or 1)

        return dict(zip(prompts, await service.run_exclusively(work), strict=True))

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.asked.kind.weights}

    def _usage(self, finals: Sequence[Final]) -> dict[str, int]:
        prompt, written = sum(map(len, self.asked.prompts)), sum(len(final.tokens) for final in finals)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def _shown(self, choice: ApiChoice, final: Final, scores: TokenScores | None) -> dict[str, Any]:
        """Return a choice of a whole answer."""
        if self.asked.chat:
            message = {"role": "assistant", "content": final.text}
            return {"index": choice.index, "message": message, "logprobs": None, "finish_reason": final.reason}
        text = self.service.policy.text(choice.prompt) + final.text if self.asked.echo else final.text
        logprobs = None if self.asked.logprobs is None else self._logprobs(choice, final, scores)
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": final.reason}

    def _logprobs(self, choice: ApiChoice, final: Final, scores: TokenScores | None) -> dict[str, Any]:
        """Return log-probabilities token by token: of the prompt if echoed, and of what was drawn."""
        tokens = [*(choice.prompt if self.asked.echo else ()), *final.tokens]
        logp: list[float | None] = [None, *scores.logp] if scores is not None else []
        tops: list[dict[int, float] | None] = [None, *scores.top] if scores is not None else []
        drawn = [None if math.isnan(value) else value for value in final.logp or [math.nan] * len(final.tokens)]
        logp += drawn
        tops += [None if value is None else {token: value} for token, value in zip(final.tokens, drawn, strict=True)]
        return {
            "tokens": [self._word(token) for token in tokens],
            "token_logprobs": logp,
            "top_logprobs": [None if top is None else self._words(top) for top in tops]
            if self.asked.logprobs
            else None,
            "text_offset": offsets(self.service.policy, tokens)[:-1],
        }

    def _word(self, token: int) -> str:
        return self.service.policy.text([token]) or f"token_id:{token}"

    def _words(self, top: Mapping[int, float]) -> dict[str, float]:
        """Return tokens as text; one that reads like another is named by its id."""
        words: dict[str, float] = {}
        for token, value in top.items():
            word = self._word(token)
            words[f"token_id:{token}" if word in words else word] = value
        return words


async def all_of(work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Await all of some coroutines; the first that fails, or being cancelled, ends the others."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
