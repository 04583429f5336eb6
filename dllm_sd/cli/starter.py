"""The config that ``dllm-sd init`` writes: settings that fit a model and the user's data, with comments."""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dllm_sd.decoding.settings import Decoding
from dllm_sd.keys import schema_file
from dllm_sd.methods import METHODS
from dllm_sd.pretrained.blueprint import Blueprint
from dllm_sd.pretrained.model import Model
from dllm_sd.rollouts.rules import needed_length
from dllm_sd.tasks.columns import Columns
from dllm_sd.tasks.conversations import is_conversation, read_conversation
from dllm_sd.tasks.datafile import render
from dllm_sd.tasks.formats import Row

MEASURED = 1000
"""Rows whose lengths are measured."""
SMALL, LARGE = 50_000_000, 1_500_000_000
"""Weights below which a model is a toy, and above which it is trained through adapters."""
_GRADED = {
    "number": "the number that a completion ends with equals the answer",
    "math": "the LaTeX answer of a completion equals the answer",
    "exact": "the last <answer> of a completion, or the whole of it, is the answer up to white space",
    "choice": "a completion gives the right letter",
}


@dataclass(frozen=True)
class Starter:
    """What the config is made from."""

    out: str
    """Name of the config's file."""
    stem: str
    """Name of the run."""
    model: Model
    data: str
    rows: Sequence[Row]
    columns: Columns
    blueprint: Blueprint
    weights: int
    """Number of the model's weights."""
    method: str

    @property
    def imitates(self) -> bool:
        """Whether the method trains on the data's references and decodes nothing."""
        return not METHODS[self.method].method.rollout.decodes

    def text(self) -> str:
        """The document."""
        kind = "autoregressive" if self.blueprint.causal else "masked diffusion"
        config, family = shlex.quote(self.out), self.blueprint.family.name
        lines = [
            f"# dllm-sd train {config}",
            f"# {self.method} on {self.columns.rows} rows. Model: {family}, {kind}, {self.weights:,} weights.",
            f"# dllm-sd show {config} prints all keys with their defaults, dllm-sd explain KEY says what a key means.",
            f"# yaml-language-server: $schema={schema_file()}",
            f"run: {_said(f'runs/{self.stem}')}  # folder of the run; the same command continues it",
            "seed: 1",
            *self._training(),
            *self._model(),
            *self._task(),
            *self._decoding(),
        ]
        return "\n".join(lines) + "\n"

    def _training(self) -> list[str]:
        problems = max(1, min(16, self.columns.rows // 2))
        updates = max(20, min(500, math.ceil(3 * self.columns.rows / problems)))
        every = max(5, updates // 5)
        named = METHODS[self.method]
        rate = "3.0e-4" if self.weights < SMALL else "5.0e-6"
        return [
            f"updates: {updates}  # of {problems} problems each; three passes over the rows, but 20 to 500 updates",
            "method:",
            f"  name: {self.method}  # {named.source}; others: dllm-sd list methods",
            f"  rollout: {{problems: {problems}}}  # problems of an update",
            f"optim: {{lr: {rate}, warmup: 5}}  # try a third and three times this rate, too",
            f"eval: {{every: {every}}}  # updates between evaluations on the dev split",
            f"checkpoint: {{every: {every}}}",
        ]

    def _model(self) -> list[str]:
        lines = ["model:", f"  path: {_said(self.model.path)}"]
        lines += [f"  as: {self.model.as_}"] if self.model.as_ else []
        if self.weights >= LARGE:
            lines += [
                "  dtype: bfloat16",
                "  gradient_checkpointing: true  # less memory, more time",
                "  lora: {rank: 64, alpha: 128}  # trains adapters; without it all weights, in float32",
            ]
        return lines

    def _task(self) -> list[str]:
        found = self.columns
        lines = ["task:", f"  name: {found.task}", f"  data: {_said(self.data)}"]
        lines += ["  # data_test: TEST_FILE  # without it models are tested on the dev split, a tenth of the rows"]
        if found.task == "choice":
            return lines
        lines += [f"  prompt: {_said(self._prompt())}"]
        lines += [f"  answer_field: {_said(found.answer)}"] if found.answer else []
        if found.reference:
            lines += [f"  reference_field: {_said(found.reference)}  # what sft imitates, and hints show"]
        right = _GRADED.get(found.grader)
        means = f"correct: {right}" if right else "dllm-sd explain task.grader"
        return [*lines, f"  grader: {_said(found.grader)}  # {means}"]

    def _prompt(self) -> str:
        """The template; completions that the model writes itself are asked for in the form that the grader reads."""
        asked, chat = self.columns.instruction, self.blueprint.chat
        if asked is None or self.imitates or (chat is not None and chat.warn_of_lost([asked], "it")):
            return f"{{{self.columns.question}}}"
        return f"{{{self.columns.question}}}\n\n{asked}"

    def _decoding(self) -> list[str]:
        prompt, reference = self._lengths()
        length = _power(reference, 16) if self.imitates else _power(2 * reference, 32 if self.weights < SMALL else 256)
        keys = f"length: {length}"
        if not self.blueprint.causal:
            block = self.blueprint.block_length or min(32, length)
            length = math.ceil(length / block) * block
            keys = f"length: {length}, block_length: {block}, tokens_per_step: {min(Decoding().tokens_per_step, block)}"
        measured = (
            f"the longest reference has {reference}" if self.blueprint.chat else "not measured without a tokenizer"
        )
        return [
            f"decode: {{{keys}}}  # tokens of a completion; {measured}",
            f"max_prompt: {_power(prompt, 128)}  # tokens; longer prompts are left out and counted",
        ]

    def _lengths(self) -> tuple[int, int]:
        """Tokens of the longest prompt and of the longest reference; usual ones without a tokenizer."""
        chat, found = self.blueprint.chat, self.columns
        if chat is None:
            return 512, 256
        prompts, references = [1], [1]
        for row in self.rows[:MEASURED]:
            turns, reference = row.fields[found.question], row.fields.get(found.reference or "")
            if is_conversation(turns):
                messages = read_conversation(turns, row.where)
                reference = messages[-1]["content"] if found.reference == found.question else reference
            else:
                text = render(f"{{{found.question}}}", row.fields, f"--question (for {row.where})")
                messages = [{"role": "user", "content": f"{text}\n\n{found.instruction or ''}"}]
            prompts.append(len(chat.encode(messages)))
            references.append(needed_length(chat.encode_completion(str(reference or ""))))
        return max(prompts), max(references)


def fitting_method(columns: Columns, causal: bool) -> str:
    """The named method to begin with, as docs/which_method.md says it."""
    if columns.free:
        return "sft"
    if not causal:
        return "d_opsd"
    return "opsd" if columns.worked else "sdpo"


def _power(count: int, least: int) -> int:
    """The least power of two that is at least ``count`` and ``least``."""
    return 1 << (max(count, least) - 1).bit_length()


def _said(value: Any) -> str:
    """A text as YAML reads it back: a JSON string is one."""
    return json.dumps(value, ensure_ascii=False)
