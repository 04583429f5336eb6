"""The autoregressive policy: any causal language model of transformers, its chat format, its decoder."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from dllm_sd.decoding.generating import Generator
from dllm_sd.decoding.settings import Decoding
from dllm_sd.policies.language_model import LanguageModel
from dllm_sd.trajectory import NO_MASK, Trajectory, Unit, left_pad, left_to_right


class Autoregressive(LanguageModel):
    """A causal language model behind the `Policy` protocol.

    Its trajectories are revealed one token per step from left to right, in blocks of one token. The network's logits
    predict the next position, and the module shifts them: row ``m`` of `site_logits` is the prediction for site ``m``.
    """

    mask_id = NO_MASK
    block_length = None
    causal: ClassVar[bool] = True

    @property
    def decoder(self) -> Generator:
        """Decodes with the network of this policy."""
        return Generator(self.module, self.end_ids, self.pad_id, suppress=self.suppress, merge=self.merge_rollouts)

    def demonstration(self, prompt: Sequence[int], tokens: Sequence[int], settings: Decoding) -> Trajectory:
        """A given completion as a trajectory of one row."""
        prompt_ids = left_pad([prompt], self.pad_id)
        written = torch.tensor([list(tokens)])
        return left_to_right(prompt_ids, written, settings.length, end_ids=self.end_ids, pad_id=self.pad_id)

    def extent(self, unit: Unit, settings: Decoding) -> int:
        """Return the blocks or steps of a complete decoding; each is one token."""
        return settings.length
