"""What the tokenizer does not know of the texts that come up while a run goes on: hints, prompts, completions."""

import sys
from collections.abc import Collection, Sequence

from torch import Tensor

from dllm_sd.errors import shown
from dllm_sd.pretrained.chat import Chat
from dllm_sd.rollouts.rollout import Rollouts


class Unknown:
    """Counts unknown tokens in the rollouts of an update, and says so at the first of each kind."""

    def __init__(self, chat: Chat | None, decodes: bool, told: Collection[str] = ()) -> None:
        """For the tokenizer of the policy, without which there are no texts.

        Args:
            chat: that of the policy.
            decodes: whether completions are the policy's own, which say nothing about the tokenizer.
            told: kinds (prompts, completions, hints) that a sentence was printed about already.
        """
        self.chat, self.id = chat, chat.unknown_id if chat is not None else None
        self.decodes = decodes
        self.told = set(told)

    def __call__(self, rollouts: Rollouts, speak: bool = False) -> dict[str, float]:
        """The share of unknown tokens in prompts, demonstrations and teachers' prompts, by metric; of those there are.

        Nothing for a tokenizer without an unknown token, such as one of bytes. ``speak`` prints a sentence where a
        share is above 0 for the first time.
        """
        if self.id is None:
            return {}
        seen = rollouts.chosen or rollouts.kept
        hints = [brief.prompt for one in rollouts.kept for brief in one.briefs if brief.prompt is not None]
        kinds = {
            "prompts": [self._of(one.trajectory.prompt_ids[one.trajectory.prompt_mask]) for one in seen],
            "completions": [self._of(one.trajectory.tokens[0]) for one in ([] if self.decodes else seen)],
            "hints": [(prompt.count(self.id), len(prompt)) for prompt in hints],
        }
        shares = {kind: _share(counts) for kind, counts in kinds.items() if counts}
        for kind in [kind for kind, share in shares.items() if share and kind not in self.told and speak]:
            self.told.add(kind)
            words = "the teachers' prompts" if kind == "hints" else f"the {kind}"
            print(
                f"{max(shares[kind], 0.001):.1%} of the tokens of {words} are unknown to the tokenizer"
                f"{self._example(rollouts) if kind == 'hints' else ''}; the model cannot read them "
                f"(rollouts/unknown_{kind} counts them)",
                file=sys.stderr,
            )
        return {f"rollouts/unknown_{kind}": share for kind, share in shares.items()}

    def _of(self, tokens: Tensor) -> tuple[int, int]:
        """Unknown tokens, and all."""
        return int((tokens == self.id).sum()), tokens.numel()

    def _example(self, rollouts: Rollouts) -> str:
        """Characters of the first hint that are not known; nothing where it is the words around the hint."""
        assert self.chat is not None
        for note in (brief.text for one in rollouts.kept for brief in one.briefs if brief.text):
            if lost := self.chat.lost(note):
                return f", such as {shown(lost[:20])} of the hint {shown(note)}"
        return ""


def _share(counts: Sequence[tuple[int, int]]) -> float:
    return sum(part for part, _ in counts) / max(1, sum(whole for _, whole in counts))
