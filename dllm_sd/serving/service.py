"""What is served: a policy, its scheduler, the limits of a request, and `/generate`, which a trainer can trust."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any

from dllm_sd.config import build_decoding
from dllm_sd.decoding.denoising import check_denoising
from dllm_sd.decoding.generating import check_generating
from dllm_sd.decoding.settings import Decoding
from dllm_sd.decoding.wire import SETTINGS, stop_after_from_json
from dllm_sd.errors import InputError, shown
from dllm_sd.files.typed_json import build
from dllm_sd.policies.loading import AnyPolicy
from dllm_sd.pretrained.model import Model
from dllm_sd.ranges import Count, Range, Ranged, Size
from dllm_sd.serving.refusal import Refusal
from dllm_sd.serving.scheduler import Completion, ExclusiveWork, RequestKind, Scheduler
from dllm_sd.serving.weights import ServedWeights
from dllm_sd.trajectory import Trajectory
from dllm_sd.trajectory_json import trajectory_to_json


@dataclass(frozen=True)
class Limits(Ranged, key="serve"):
    """What a request may ask for, and how many may wait."""

    prompt: Size = 512
    """Tokens of a prompt (`max_prompt`)."""
    completion: Size = 4096
    """Positions of a completion."""
    waiting: Count = 1024
    """Completions that wait for a slot; one more is refused, to be asked for again."""
    body: Count = 2**22
    """Bytes of a request."""
    requests: Annotated[int, Range(least=1, most=2**16)] = 256
    """Requests in work at once; one more is refused, to be made again."""

    @property
    def connections(self) -> int:
        """Connections that may be open at once: those of requests in work, as many others, and some to ask how it is.

        With the default fewer than 1024, the number of files that systems let a process open.
        """
        return 2 * self.requests + 64


class Service:
    """A policy that serves requests. All methods are called on the thread of the event loop."""

    def __init__(
        self,
        policy: AnyPolicy,
        model: Model,
        decode: Decoding,
        *,
        name: str,
        limits: Limits | None = None,
        thinking: bool | None = None,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """Serve a policy, and start the thread that decodes.

        Args:
            policy: what is served.
            model: the keys of `model` that it was built from.
            decode: what a request leaves open.
            name: what clients call its weights.
            limits: of requests.
            thinking: the thinking switch of chats.
            around: see `Scheduler`.
        """
        self.policy, self.decode, self.thinking = policy, decode, thinking
        self.limits = limits or Limits()
        self.weights = ServedWeights(policy, model, name)
        self.scheduler = Scheduler(
            policy,
            self.weights.applied,
            longest=self.limits.prompt,
            most_waiting=self.limits.waiting,
            around=around,
        )

    async def generate(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Answer ``POST /generate``, whose body `wire.request_to_json` writes.

        Raises:
            Refusal: if it is not what the model can do.
        """
        known = ("prompt_ids", "key", "settings", "stop_after", "model")
        if unknown := [name for name in tree if name not in known]:
            raise Refusal(422, f"unknown key {shown(unknown[0])}; known keys: {', '.join(known)}")
        with refusing():
            prompt = build(tuple[int, ...], tree.get("prompt_ids"), "prompt_ids")
            key = build(int, tree.get("key"), "key")
            settings = build(dict[str, Any] | None, tree.get("settings"), "settings") or {}
            stop_after = stop_after_from_json(tree.get("stop_after"))
            model = build(str | None, tree.get("model"), "model")
        if key < 0:
            raise Refusal(422, f"key must be from 0 to 2^63 - 1, not {key}")
        kind = RequestKind(self.weights.check(model), self.settings(settings), stop_after)
        completion = Completion(self.check_prompt(prompt), key, kind)
        self.scheduler.submit([completion])
        trajectory = await self.result(completion)
        return {**trajectory_to_json(trajectory), "model": kind.weights}

    async def result(self, completion: Completion) -> Trajectory:
        """Wait for a completion; its slot is freed if the caller is cancelled."""
        try:
            return await asyncio.wrap_future(completion.result)
        finally:
            completion.result.cancel()

    async def run_exclusively(self, work: Callable[[], Any]) -> Any:
        """Let the decoding thread do something while it decodes nothing, and wait for what it returns."""
        item = ExclusiveWork(work)
        self.scheduler.submit([item])
        try:
            return await asyncio.wrap_future(item.result)
        finally:
            item.result.cancel()

    def settings(self, tree: Mapping[str, Any], key: str = "settings") -> Decoding:
        """Return the server's own settings with what a request changes, after checking that the model has them.

        Raises:
            Refusal: naming the key.
        """
        if other := [name for name in tree if name not in SETTINGS]:
            raise Refusal(422, f"{key}.{other[0]:.60} is not a client's to choose; choose from {', '.join(SETTINGS)}")
        for name, value in tree.items():
            if isinstance(value, str) and not isinstance(getattr(self.decode, name), str):
                raise Refusal(422, f"{key}.{name} must be a number, not text; leave out the quotation marks")
        with refusing():
            settings = build_decoding(tree, self.decode, key)
            if settings.length > self.limits.completion:
                raise Refusal(422, f"{key}.length is {settings.length}; give at most {self.limits.completion}")
            settings.check_suppressed(self.policy.vocabulary, key)
            if self.policy.causal:
                check_generating(settings, key)
            else:
                check_denoising(self.policy.block_length, settings, key)
        return settings

    def check_prompt(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """Return a prompt that the model can read.

        Raises:
            Refusal: if it is too long, or holds something other than token ids.
        """
        if len(prompt) > self.limits.prompt:
            raise Refusal(413, f"the prompt has {len(prompt)} tokens; give at most {self.limits.prompt} (max_prompt)")
        if not prompt and self.policy.causal:
            raise Refusal(422, "the prompt is empty and an autoregressive model cannot begin; give it a token")
        if wrong := [token for token in prompt if not 0 <= token < self.policy.vocabulary]:
            raise Refusal(422, f"the prompt holds {wrong[0]}; give token ids from 0 to {self.policy.vocabulary - 1}")
        return tuple(prompt)

    @contextlib.asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """Let the decoding thread stand still inside.

        A chat template runs with little memory left to the process (`limits.limited`), which must not hit a step of the
        decoder. Continuous batching of transformers has no step at which it could be held.
        """
        if self.decode.continuous:
            yield
            return
        with self.scheduler.pause() as still:
            await asyncio.wrap_future(still)
            yield

    def close(self, seconds: float) -> None:
        """Refuse what is not decoded yet, and after some seconds what is not decoded to its end."""
        self.scheduler.close(seconds)

    def stop(self, seconds: float) -> None:
        """End the decoding thread; wait some seconds for the step that it computes."""
        self.scheduler.stop(seconds)


@contextlib.contextmanager
def refusing() -> Any:
    """Turn what is wrong with a value into a refusal."""
    try:
        yield
    except (InputError, ValueError) as error:
        raise Refusal(422, str(error)) from error
