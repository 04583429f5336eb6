"""Counts the tokens of hints, prompts and completions that the tokenizer does not know."""

import sys
from collections.abc import Collection, Sequence

from torch import Tensor

from dllm_sd.errors import shown
from dllm_sd.methods.method import Method
from dllm_sd.pretrained.chat import Chat
from dllm_sd.rollouts.rollout import Rollouts


class Unknown:
    """Counts unknown tokens in the rollouts of an update, and prints a warning at the first of each kind."""

    def __init__(self, chat: Chat | None, decodes: bool, told: Collection[str] = ()) -> None:
        """Prepare the count.

        Args:
            chat: the chat format of the policy; None if it has no tokenizer.
            decodes: whether the policy generates the completions, which are then not counted.
            told: kinds of text (prompts, completions, hints) that a warning was printed about already.
        """
        self.chat, self.id = chat, chat.unknown_id if chat is not None else None
        self.decodes = decodes
        self.told = set(told)

    def __call__(self, rollouts: Rollouts, warn: bool = False) -> dict[str, float]:
        """The shares of unknown tokens in prompts, demonstrations and teachers' prompts, by metric.

        Empty for a tokenizer without an unknown token, such as a byte-level one. With ``warn`` a warning is printed
        when a share is above 0 for the first time.
        """
        if self.id is None:
            return {}
        counted = rollouts.chosen or rollouts.kept
        prompts = [brief.prompt for rollout in rollouts.kept for brief in rollout.briefs if brief.prompt is not None]
        tokens = [(rollout.trajectory.prompt_ids, rollout.trajectory.prompt_mask) for rollout in counted]
        kinds = {
            "prompts": [self._count(prompt_ids[mask]) for prompt_ids, mask in tokens],
            "completions": [self._count(rollout.trajectory.tokens[0]) for rollout in ([] if self.decodes else counted)],
            "hints": [(prompt.count(self.id), len(prompt)) for prompt in prompts],
        }
        shares = {kind: _share(counts) for kind, counts in kinds.items() if counts}
        for kind in [kind for kind, share in shares.items() if share and kind not in self.told and warn]:
            self.told.add(kind)
            texts = "the teachers' prompts" if kind == "hints" else f"the {kind}"
            print(
                f"{max(shares[kind], 0.001):.1%} of the tokens of {texts} are unknown to the tokenizer"
                f"{self._example(rollouts) if kind == 'hints' else ''}; the model cannot read them "
                f"(rollouts/unknown_{kind} counts them)",
                file=sys.stderr,
            )
        return {f"rollouts/unknown_{kind}": share for kind, share in shares.items()}

    def _count(self, tokens: Tensor) -> tuple[int, int]:
        """The number of unknown tokens, and of all tokens."""
        return int((tokens == self.id).sum()), tokens.numel()

    def _example(self, rollouts: Rollouts) -> str:
        """Unknown characters of the first hint that has some; empty if they are in the text around the hints."""
        assert self.chat is not None
        for hint in (brief.text for rollout in rollouts.kept for brief in rollout.briefs if brief.text):
            if lost := self.chat.lost(hint):
                return f", such as {shown(lost[:20])} of the hint {shown(hint)}"
        return ""


def told_of(method: Method, warnings: Collection[str]) -> set[str]:
    """The kinds of text that ``warnings`` before the run say enough about: not of hints that are yet to be written."""
    return {kind for kind in warnings if kind != "hints" or not method.writings}


def _share(counts: Sequence[tuple[int, int]]) -> float:
    return sum(unknown for unknown, _ in counts) / max(1, sum(total for _, total in counts))
