"""The autoregressive policy: any causal language model of transformers, decoded by `generate` of transformers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from dllm_sd.decoding.continuous import TurnChoice, check_continuous, generate_in_turns
from dllm_sd.decoding.queue import Queue, complete_in_batches
from dllm_sd.decoding.sampling import banned_ids, force
from dllm_sd.decoding.settings import Decoding, Meter
from dllm_sd.policies.language_model import LanguageModel
from dllm_sd.randomness import fold, key_tensor, uniform
from dllm_sd.trajectory import NEVER, Reach, Trajectory, Unit, completion_length, concatenate, left_pad

NO_MASK = -1
"""Placeholder id where a masked-diffusion policy has its mask token; the embedding has no row for it."""


class Autoregressive(LanguageModel):
    """A causal language model behind the `Policy` protocol.

    Its trajectories are revealed one token per step from left to right, in blocks of one token. The network's logits
    predict the next position, and the module shifts them: row ``m`` of `site_logits` is the prediction for site ``m``.
    """

    mask_id = NO_MASK
    block_length = None
    causal: ClassVar[bool] = True

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Decoding,
        keys: Sequence[int],
        watch: Callable[[Tensor], None] | None = None,
        finished: Callable[[Tensor, Trajectory], None] | None = None,
        meter: Meter | None = None,
        reach: Reach | None = None,
    ) -> Trajectory:
        """Complete any number of prompts, `settings.batch_size` at a time, prompts of similar length together.

        ``watch`` sees the completion side int64 ``[b l]`` of a batch before each token, `NO_MASK` where nothing is
        written yet. Returns the trajectory on the CPU, in the order of the prompts.
        """
        if settings.continuous:
            check_continuous(self.module, self.module.network, watch is not None)
            with self.decoding():
                return self._in_turns(prompts, settings, keys, finished, meter, reach)
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        parts: list[Trajectory] = []
        with self.decoding():
            for start in range(0, len(order), settings.batch_size):
                rows = order[start : start + settings.batch_size]
                batch = [prompts[row] for row in rows]
                parts.append(self._generate(batch, settings, [keys[row] for row in rows], watch, meter, reach))
                if finished is not None:
                    finished(torch.tensor(rows), parts[-1])
        return concatenate(parts).select(torch.tensor(order).argsort())

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Decoding,
        keys: Sequence[int],
        watch: Callable[[Tensor], None] | None,
        meter: Meter | None,
        reach: Reach | None,
    ) -> Trajectory:
        """Complete one batch with `generate` of transformers; `KeyedChoice` draws each token."""
        prompt_ids, prompt_mask = left_pad(prompts, self.pad_id)
        network: Any = self.module.network
        chooser = KeyedChoice(
            *(settings, key_tensor(keys, self.device), self.suppress, prompt_ids.shape[1], watch),
            vocabulary=self.vocabulary,
        )
        wanted = self._wanted(settings, reach)
        with _generating_as(network, wanted):
            sequences = network.generate(
                input_ids=prompt_ids.to(self.device),
                attention_mask=prompt_mask.to(self.device),
                generation_config=wanted,
                logits_processor=LogitsProcessorList([chooser]),
            )
        written = sequences[:, prompt_ids.shape[1] :].cpu()
        trajectory = self._trajectory(prompt_ids, prompt_mask, written, settings.length, torch.stack(chooser.logp, 1))
        if meter is not None:
            made = written.shape[1]
            meter.forwards, meter.slots = meter.forwards + made, meter.slots + made * len(prompts)
            meter.read += made * len(prompts)
            meter.rows += int(trajectory.num_steps.sum())
        return trajectory

    def complete(
        self, queue: Queue, settings: Decoding, *, meter: Meter | None = None, reach: Reach | None = None
    ) -> None:
        """Complete the jobs of a queue, one batch at a time; with continuous batching all waiting jobs together."""

        def decode(prompts: Sequence[Sequence[int]], keys: Sequence[int]) -> Trajectory:
            return self.decode(prompts, settings, keys, meter=meter, reach=reach)

        complete_in_batches(decode, queue, queue.most if settings.continuous else settings.batch_size)

    def _in_turns(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Decoding,
        keys: Sequence[int],
        finished: Callable[[Tensor, Trajectory], None] | None,
        meter: Meter | None,
        reach: Reach | None,
    ) -> Trajectory:
        """Complete all prompts with continuous batching of transformers."""
        wanted = self._wanted(settings, reach)
        choice = TurnChoice(
            *(settings, key_tensor(keys, self.device), self.suppress, prompts, wanted.max_new_tokens or 0),
            vocabulary=self.vocabulary,
        )
        parts: dict[int, Trajectory] = {}

        def ended(row: int, tokens: list[int]) -> None:
            prompt, logp = left_pad([prompts[row]], self.pad_id), choice.logp_of(row, len(tokens))
            parts[row] = self._trajectory(*prompt, torch.tensor([tokens]), settings.length, logp[None])
            if finished is not None:
                finished(torch.tensor([row]), parts[row])

        generate_in_turns(self.module.network, prompts, choice, wanted, ended)
        trajectory = concatenate([parts[row] for row in range(len(prompts))])
        if meter is not None:
            meter.forwards, meter.slots = meter.forwards + choice.passes, meter.slots + choice.passes * choice.slots
            meter.read += choice.passes * choice.slots
            meter.rows += int(trajectory.num_steps.sum())
        return trajectory

    def _wanted(self, settings: Decoding, reach: Reach | None) -> GenerationConfig:
        """Return the generation config; it is greedy, since a logits processor draws each token."""
        steps = settings.length if reach is None else min(reach.count, settings.length)
        return GenerationConfig(
            max_new_tokens=steps, do_sample=False, eos_token_id=list(self.end_ids), pad_token_id=self.pad_id
        )

    def demonstration(self, prompt: Sequence[int], tokens: Sequence[int], settings: Decoding) -> Trajectory:
        """A given completion as a trajectory of one row."""
        return self._trajectory(*left_pad([prompt], self.pad_id), torch.tensor([list(tokens)]), settings.length, None)

    def _trajectory(
        self, prompt_ids: Tensor, prompt_mask: Tensor, written: Tensor, length: int, logp: Tensor | None
    ) -> Trajectory:
        """The trajectory of ``written`` int64 ``[b w]``, up to the first end token, on ``length`` positions."""
        step = torch.arange(length).expand(len(written), -1)
        known = step < completion_length(written, self.end_ids)[:, None]

        def on_canvas(x: Tensor, value: float) -> Tensor:
            return torch.nn.functional.pad(x, (0, length - x.shape[1]), value=value).masked_fill(~known, value)

        tokens = on_canvas(written, self.pad_id)
        return Trajectory(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            tokens=tokens,
            reveal_step=step.masked_fill(~known, NEVER),
            length=completion_length(tokens, self.end_ids, known),
            block_length=1,
            mask_id=NO_MASK,
            end_ids=self.end_ids,
            pad_id=self.pad_id,
            causal=True,
            logp=None if logp is None else on_canvas(logp.cpu(), torch.nan),
        )

    def extent(self, unit: Unit, settings: Decoding) -> int:
        """Return the blocks or steps of a complete decoding; each is one token."""
        return settings.length


@contextmanager
def _generating_as(network: Any, wanted: GenerationConfig) -> Iterator[None]:
    """Replace the generation config of the checkpoint inside, since `generate` takes missing values from it."""
    former, network.generation_config = network.generation_config, wanted
    try:
        yield
    finally:
        network.generation_config = former


class KeyedChoice(LogitsProcessor):
    """Logits processor that draws each row's next token by the row's key, and masks all other tokens."""

    def __init__(
        self,
        settings: Decoding,
        keys: Tensor,
        suppress: Sequence[int],
        width: int,
        watch: Callable[[Tensor], None] | None = None,
        vocabulary: int | None = None,
    ) -> None:
        """Draw for rows with ``keys [b]`` after prompts of ``width`` columns; ``vocabulary`` may be unknown."""
        self.settings, self.keys, self.width, self.watch = settings, keys, width, watch
        self.banned = banned_ids(settings, suppress, keys.device, vocabulary)
        self.logp: list[Tensor] = []
        """`Trajectory.logp` ``[b]`` of each step so far."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Map ids ``[b s]`` and scores ``[b v]`` to ``[b v]``: 0 at the drawn token, -inf elsewhere."""
        step = input_ids.shape[1] - self.width
        if self.watch is not None:
            canvas = torch.full((len(input_ids), self.settings.length), NO_MASK, device=input_ids.device)
            canvas[:, :step] = input_ids[:, self.width :]
            self.watch(canvas)
        forced, logp = force(scores, self.settings, self.banned, uniform(fold(self.keys, step), 1)[:, 0])
        self.logp.append(logp)
        return forced
