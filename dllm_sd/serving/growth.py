"""A completion while it is decoded: the text that no later step can change, and the canvas with its masks."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from dllm_sd.policies.policy import Policy, offsets
from dllm_sd.trajectory import Trajectory

MASKED = "\u2591"
"""Stands for a masked position in the text of a canvas."""


@dataclass(frozen=True)
class Piece:
    """What has become known of a completion."""

    text: str
    """What follows the texts of earlier pieces."""
    canvas: str | None = None
    """The whole canvas as text, `MASKED` where nothing is known yet; of diffusion models only."""


@dataclass(frozen=True)
class Final:
    """A completion that has ended."""

    text: str
    tokens: tuple[int, ...]
    """All that were counted: up to the end token or the stop text, or as many as were asked for."""
    logp: tuple[float, ...]
    reason: str
    """``stop``: an end token or a stop text; ``length``: neither came."""


class Canvas:
    """The latest canvas of a completion, on its way from the decoding thread to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.changed = asyncio.Event()
        self.latest: list[int] = []

    def __call__(self, tokens: list[int]) -> None:
        """Take a canvas; those that nobody has looked at in the meantime are forgotten."""
        if tokens != self.latest:
            self.latest = tokens
            self._loop.call_soon_threadsafe(self.changed.set)


class Growth:
    """The text of one completion as it grows.

    A canvas is revealed in any order within its blocks; the tokens before the first masked position are settled. Their
    text is held back where it ends in half a character, in a run of byte tokens, which an invalid byte would turn into
    replacement characters as a whole, or as a stop text begins.
    """

    def __init__(self, policy: Policy, end_ids: Sequence[int], most: int, stops: Sequence[str]) -> None:
        """Follow a completion of at most ``most`` tokens, cut before the first of ``stops``."""
        self.policy, self.ends, self.most, self.stops = policy, frozenset(end_ids), most, tuple(stops)
        self.sent = ""
        self.shown: str | None = None

    def piece(self, canvas: Sequence[int]) -> Piece | None:
        """Return what a canvas adds to the pieces before; None if nothing."""
        text = self._final_text(self._settled(canvas))
        shown = None if self.policy.causal else self._canvas(canvas)
        new = self._new(text[: self._held(text)])
        if not new and shown == self.shown:
            return None
        self.shown = shown
        return Piece(new, shown)

    def stopped(self, canvas: Sequence[int]) -> Final | None:
        """Return the end of a completion that holds a stop text already, whatever would follow."""
        settled = self._settled(canvas)
        text = self._final_text(settled)
        if not any(stop in text for stop in self.stops):
            return None
        return Final(self._cut(text), tuple(settled[: self._count(settled, text)]), (), "stop")

    def final(self, trajectory: Trajectory) -> Final:
        """Return the end of a completion."""
        count = min(int(trajectory.length), self.most)
        tokens = trajectory.tokens[0, :count].tolist()
        logp = () if trajectory.logp is None else tuple(trajectory.logp[0, :count].tolist())
        whole = self.policy.text(tokens)
        text = self._cut(whole)
        ended = text != whole or (bool(trajectory.ended) and count == int(trajectory.length))
        count = count if text == whole else self._count(tokens, whole)
        return Final(text, tuple(tokens[:count]), logp[:count], "stop" if ended else "length")

    def rest(self, final: Final) -> Piece:
        """Return what the end adds to the pieces before."""
        return Piece(self._new(final.text), None if self.policy.causal else final.text)

    def _new(self, text: str) -> str:
        """Return what a text adds to what was sent, nothing where it is another text."""
        if not text.startswith(self.sent):
            return ""
        new, self.sent = text[len(self.sent) :], text
        return new

    def _settled(self, canvas: Sequence[int]) -> list[int]:
        tokens: list[int] = []
        for token in canvas[: self.most]:
            if token == self.policy.mask_id or token in self.ends:
                break
            tokens.append(token)
        return tokens

    def _final_text(self, settled: Sequence[int]) -> str:
        """Return the text of settled tokens that no later token can change."""
        count, open_ended = len(settled), self.policy.byte_ids | self.policy.non_text_ids
        while count and settled[count - 1] in open_ended:
            count -= 1
        return self.policy.text(settled[:count]).rstrip("\ufffd")

    def _cut(self, text: str) -> str:
        return text[: min((text.index(stop) for stop in self.stops if stop in text), default=len(text))]

    def _count(self, tokens: Sequence[int], text: str) -> int:
        """Return how many tokens it took until their text held the first stop text."""
        end = min(text.index(stop) + len(stop) for stop in self.stops if stop in text)
        return next(count for count, start in enumerate(offsets(self.policy, tokens)) if start >= end)

    def _held(self, text: str) -> int:
        """Return how many characters are certain to come before any stop text."""
        text = self._cut(text)
        starts = (stop[:size] for stop in self.stops for size in range(1, len(stop)))
        return len(text) - max((len(start) for start in starts if text.endswith(start)), default=0)

    def _canvas(self, canvas: Sequence[int]) -> str:
        """Return a canvas as text, up to its first end token."""
        parts: list[str] = []
        run: list[int] = []
        for token in canvas[: self.most]:
            if token in self.ends:
                break
            if token == self.policy.mask_id:
                parts += [self.policy.text(run), MASKED] if run else [MASKED]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self.policy.text(run) if run else ""])
