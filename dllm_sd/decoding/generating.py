"""The decoder of autoregressive models: `generate` of transformers, with each token drawn by the key of its row."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from dllm_sd.decoding.continuous import ContinuousSampler, check_continuous, generate_continuously
from dllm_sd.decoding.decoder import Watch
from dllm_sd.decoding.queue import Job, Queue
from dllm_sd.decoding.sampling import banned_ids, force
from dllm_sd.decoding.settings import Decoding, Meter
from dllm_sd.errors import InputError
from dllm_sd.network.merging import inference
from dllm_sd.network.site_head import SiteHead
from dllm_sd.randomness import fold, key_tensor, uniform
from dllm_sd.trajectory import NO_MASK, StopAfter, Trajectory, left_pad, left_to_right


class Generator:
    """The decoder of a causal language model in this process."""

    def __init__(
        self,
        module: SiteHead,
        end_ids: tuple[int, ...],
        pad_id: int,
        *,
        suppress: tuple[int, ...] = (),
        merge: bool = False,
    ) -> None:
        """Decode with ``module``, in eval mode; see `Denoiser` for ``suppress`` and ``merge``."""
        self.module, self.end_ids, self.pad_id = module, end_ids, pad_id
        self.suppress, self.merge = suppress, merge

    def complete(
        self,
        queue: Queue,
        settings: Decoding,
        *,
        meter: Meter | None = None,
        stop_after: StopAfter | None = None,
        watch: Watch | None = None,
    ) -> None:
        """Complete the jobs of a queue, `settings.batch_size` at a time; all together with continuous batching."""
        if settings.continuous:
            check_continuous(self.module, self.module.network, watch is not None)
        with inference(self.module, self.merge):
            while (jobs := queue.take(queue.most if settings.continuous else settings.batch_size)) is not None:
                if jobs and settings.continuous:
                    self._in_turns(queue, jobs, settings, meter, stop_after)
                elif jobs:
                    self._generate(queue, jobs, settings, meter, stop_after, watch)

    def _generate(
        self,
        queue: Queue,
        jobs: Sequence[Job],
        settings: Decoding,
        meter: Meter | None,
        stop_after: StopAfter | None,
        watch: Watch | None,
    ) -> None:
        """Complete one batch with `generate` of transformers; `KeyedSampler` draws each token."""
        prompt_ids, prompt_mask = left_pad([job.prompt for job in jobs], self.pad_id)
        network: Any = self.module.network
        keys = key_tensor([job.key for job in jobs], self.module.device)
        seen = None if watch is None else partial(watch, jobs)
        chooser = KeyedSampler(settings, keys, self.suppress, prompt_ids.shape[1], seen, self.module.vocabulary)
        wanted = self._wanted(settings, stop_after)
        with _generating_as(network, wanted):
            sequences = network.generate(
                input_ids=prompt_ids.to(self.module.device),
                attention_mask=prompt_mask.to(self.module.device),
                generation_config=wanted,
                logits_processor=LogitsProcessorList([chooser]),
            )
        tokens = sequences[:, prompt_ids.shape[1] :].cpu()
        trajectory = self._trajectory((prompt_ids, prompt_mask), tokens, settings, torch.stack(chooser.logp, 1))
        if meter is not None:
            steps = tokens.shape[1]
            meter.forwards, meter.slots = meter.forwards + steps, meter.slots + steps * len(jobs)
            meter.read += steps * len(jobs)
            meter.rows += int(trajectory.num_steps.sum())
        queue.ended(jobs, trajectory)

    def _in_turns(
        self, queue: Queue, jobs: Sequence[Job], settings: Decoding, meter: Meter | None, stop_after: StopAfter | None
    ) -> None:
        """Complete all jobs with continuous batching of transformers."""
        wanted = self._wanted(settings, stop_after)
        prompts = [job.prompt for job in jobs]
        keys = key_tensor([job.key for job in jobs], self.module.device)
        steps = wanted.max_new_tokens or 0
        choice = ContinuousSampler(settings, keys, self.suppress, prompts, steps, self.module.vocabulary)
        row_steps = 0

        def ended(row: int, tokens: list[int]) -> None:
            nonlocal row_steps
            prompt, logp = left_pad([prompts[row]], self.pad_id), choice.logp_of(row, len(tokens))
            trajectory = self._trajectory(prompt, torch.tensor([tokens]), settings, logp[None])
            row_steps += int(trajectory.num_steps.sum())
            queue.ended([jobs[row]], trajectory)

        generate_continuously(self.module.network, prompts, choice, wanted, ended)
        if meter is not None:
            meter.forwards, meter.slots = meter.forwards + choice.passes, meter.slots + choice.passes * choice.slots
            meter.read += choice.passes * choice.slots
            meter.rows += row_steps

    def _trajectory(
        self, prompt: tuple[Tensor, Tensor], tokens: Tensor, settings: Decoding, logp: Tensor
    ) -> Trajectory:
        return left_to_right(prompt, tokens, settings.length, end_ids=self.end_ids, pad_id=self.pad_id, logp=logp)

    def _wanted(self, settings: Decoding, stop_after: StopAfter | None) -> GenerationConfig:
        """Return the generation config; it is greedy, since a logits processor draws each token."""
        return GenerationConfig(
            max_new_tokens=settings.tokens(stop_after),
            do_sample=False,
            eos_token_id=list(self.end_ids),
            pad_token_id=self.pad_id,
        )


def check_generating(settings: Decoding, key: str = "decode") -> None:
    """Refuse decoding settings that an autoregressive model does not support.

    Raises:
        InputError: naming the key.
    """
    for name, meaning in (("threshold", "commits several tokens a step"), ("guidance", "masks the prompt")):
        if getattr(settings, name):
            raise InputError(f"{key}.{name} {meaning}, which an autoregressive model cannot; leave it out")
    if settings.compile is not None:
        raise InputError(f"{key}.compile is for masked diffusion, and this model is autoregressive; leave it out")


@contextmanager
def _generating_as(network: Any, wanted: GenerationConfig) -> Iterator[None]:
    """Replace the generation config of the checkpoint inside, since `generate` takes missing values from it."""
    former, network.generation_config = network.generation_config, wanted
    try:
        yield
    finally:
        network.generation_config = former


class KeyedSampler(LogitsProcessor):
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
