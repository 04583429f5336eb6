"""Texts for hints: analyses by teachers and texts by writers, shared by the processes."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from dllm_sd.config import to_tree
from dllm_sd.decoding.settings import Decoding
from dllm_sd.parallel.processes import together
from dllm_sd.parallel.sharding import gathered, whole
from dllm_sd.policies.weights import WEIGHTS, TeacherModel, Weights
from dllm_sd.randomness import make_key
from dllm_sd.teachers.context import Reasoning
from dllm_sd.teachers.writing import Writing
from dllm_sd.writers import Cache, Request, Sampling, Written, ask_once

_FREE = ("length", "temperature", "top_p", "top_k", "batch_size", "continuous", "engine")
"""Keys of `decode` that do not change a writer's text: `Sampling` replaces them, or they affect memory or rollouts."""


class TextGenerator:
    """Lets models and servers write; all processes call it together, with the same arguments."""

    def __init__(
        self,
        teachers: Sequence[TeacherModel],
        decode: Decoding,
        accelerator: Accelerator,
        models: Mapping[Weights, TeacherModel] | None = None,
        cache: Cache | None = None,
        longest: int = 10240,
    ) -> None:
        """Make a generator.

        Args:
            teachers: of the contexts, in their order.
            decode: how the run decodes; a text has its own length and temperature.
            accelerator: of the processes.
            models: the models that may write, by their weights.
            cache: stored texts of weights that do not change.
            longest: longest prompt of a writer, in tokens.
        """
        self.teachers, self.models, self.cache, self.longest = teachers, models or {}, cache, longest
        self.decode, self.accelerator = decode, accelerator
        self._identities: dict[Weights, dict[str, Any]] = {}
        self._damaged = 0

    def __call__(
        self, context: int, prompts: Sequence[Sequence[int]], reasoning: Reasoning, keys: Sequence[int]
    ) -> list[str]:
        """The analyses of the teacher of a context, one for each prompt."""
        settings = replace(self.decode, length=reasoning.length, temperature=reasoning.temperature)
        mine = self._mine(len(prompts))
        texts = self._decode(self.teachers[context], [prompts[i] for i in mine], settings, [keys[i] for i in mine])
        return self._together(mine, texts)

    def write(self, writing: Writing, requests: Sequence[Request]) -> list[Written]:
        """A writer's answer to each request, or why there is none; from the cache where it has the text."""
        mine = self._mine(len(requests))
        asked = [requests[i] for i in mine]
        if (remote := writing.writer.remote) is not None:
            with together():
                answers = remote.write(asked, writing.sampling, self.cache)
            return self._together(mine, answers)
        weights = writing.writer.weights
        assert weights is not None
        model, constant = self.models[weights], not weights.moves
        identity = self._identity(weights, model) if constant else {}
        entered = False

        def ask(missing: Sequence[Request]) -> Generator[tuple[int, Written]]:
            nonlocal entered
            entered = True
            yield from enumerate(self._answers(model, missing, writing.sampling))

        with together():  # texts are stored after the gathering, and storing may fail on one process
            answers = ask_once(identity, asked, writing.sampling, self.cache if constant else None, ask)
            if not entered:  # sharded weights are gathered by all processes together
                self._answers(model, [], writing.sampling)
        return self._together(mine, answers)

    def damaged_texts(self) -> int:
        """Number of damaged stored texts that were generated again, on this process since the last call."""
        before, self._damaged = self._damaged, self.cache.corrupt if self.cache else 0
        return self._damaged - before

    def _answers(self, model: TeacherModel, requests: Sequence[Request], sampling: Sampling) -> list[Written]:
        policy = model.policy
        prompts = [policy.encode(request.messages, sampling.thinking) for request in requests]
        short = [i for i, prompt in enumerate(prompts) if len(prompt) <= self.longest]
        changes = {"length": sampling.length, "temperature": sampling.temperature, "top_p": sampling.top_p}
        changes["top_k"] = sampling.top_k
        settings = replace(self.decode, **changes)
        keys = [make_key("writer", requests[i].key) for i in short]
        texts = self._decode(model, [prompts[i] for i in short], settings, keys)
        answers = [Written(None, "long_request")] * len(requests)
        for i, text in zip(short, texts, strict=True):
            answers[i] = Written(text, None) if text.strip() else Written(None, "no_text")
        return answers

    def _decode(
        self, model: TeacherModel, prompts: Sequence[Sequence[int]], settings: Decoding, keys: Sequence[int]
    ) -> list[str]:
        """The texts of this process; all processes enter, also those without prompts."""
        with model.applied(), gathered(self.accelerator, model.policy.module):
            if not prompts:
                return []
            written = model.policy.decode(prompts, settings, keys)
            rows = zip(written.tokens, written.length.tolist(), strict=True)
            return [model.policy.text(tokens[:length].tolist()) for tokens, length in rows]

    def _identity(self, weights: Weights, model: TeacherModel) -> dict[str, Any]:
        """Identity of a writer in the cache: a digest of the sums of its tensors, without other adapters."""
        if weights not in self._identities:
            digest = sha256()
            adapters = getattr(model.policy.module.model, "peft_config", {}).keys() if weights.stored else set()
            with model.applied():
                parameters = dict(model.policy.module.named_parameters())
                tensors = {name: value for name, value in parameters.items() if adapters.isdisjoint(name.split("."))}
                for name, value in sorted((tensors | (model.copy if adapters else {})).items()):
                    digest.update(
                        f"{name} {tuple(value.shape)} {float(whole(value).detach().double().sum())!r}".encode()
                    )
            decoding = {key: value for key, value in to_tree(self.decode).items() if key not in _FREE}
            self._identities[weights] = {**to_tree(weights, WEIGHTS), "sum": digest.hexdigest(), "decode": decoding}
        return self._identities[weights]

    def _mine(self, count: int) -> range:
        return range(self.accelerator.process_index, count, self.accelerator.num_processes)

    def _together(self, mine: range, values: Sequence[Any]) -> list[Any]:
        """The values of all processes, in order."""
        pairs = [*zip(mine, values, strict=True)]
        if self.accelerator.num_processes > 1:
            pairs = sorted(gather_object(pairs), key=lambda pair: pair[0])
        return [value for _, value in pairs]
