"""Pictures of the first rollout of an update, for trackers: its trajectory, and the teacher's advantage along it.

Axes, ticks and a legend are drawn into them, and their colours and heights mean the same in every picture. Pillow draws
them: TensorBoard needs it anyway, and it loads in a tenth of the time that a plotting library takes.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dllm_sd.policies.policy import Policy
from dllm_sd.rollouts.rollout import Rollouts
from dllm_sd.training.advantage import REGIONS, GradedPlans
from dllm_sd.training.broken_sites import prompt_columns
from dllm_sd.trajectory import NEVER

LOW, HIGH = 1e-3, 10.0
"""The ends of the colour scale of divergences, in nats; it is logarithmic, and the same in every picture."""
TALLEST = 4.0
"""The advantage, in nats, at which a bar of its picture is cut."""
MOST = 1024
"""Most positions and steps of a picture; what follows is not drawn."""
MASKED, EARLIER, NOW, RED, VIOLET = (191, 191, 191), (255, 255, 255), (140, 178, 255), (214, 30, 30), (130, 40, 170)
BLUE, ERROR, INK = (51, 102, 230), (217, 217, 217), (40, 40, 40)
LEFT, TOP, BOTTOM, RIGHT = 64, 66, 84, 24
"""Margins in pixels."""
BAR_HEIGHT = 160
Colour = tuple[int, int, int]


def divergence_table(parts: GradedPlans, rollouts: Rollouts) -> tuple[Tensor, Tensor] | None:
    """Of the first rollout: `reveal_step` int64 ``[l]`` and the divergence ``[k l]``.

    The divergence is NaN where this process graded no site. None if it graded none of the rollout.
    """
    trajectory = rollouts.kept[0].trajectory
    table = torch.full((int(trajectory.num_steps), trajectory.tokens.shape[1]), torch.nan)
    for plan, graded in parts:
        canvas, position = (x.cpu() for x in graded.sites.nonzero(as_tuple=True))
        rows, steps = plan.rows[canvas], plan.steps[canvas]
        position = position - prompt_columns(graded, rollouts.kept[0])
        in_first = (rows == 0) & (steps >= 0) & (position >= 0)
        table[steps[in_first], position[in_first]] = graded.value.float().cpu()[in_first]
    return None if bool(table.isnan().all()) else (trajectory.reveal_step[0], table)


def advantage_of_first(parts: GradedPlans, length: int) -> Tensor | None:
    """The advantage of the first rollout, float ``[l]``, NaN where it is not graded; None if it is nowhere."""
    value = torch.full((length,), torch.nan)
    for plan, graded in parts:
        canvas, position = (x.cpu() for x in graded.sites.nonzero(as_tuple=True))
        in_first = plan.rows[canvas] == 0
        value[position[in_first]] = graded.advantage.float().cpu()[in_first]
    return None if bool(value.isnan().all()) else value


def pictures(parts: GradedPlans, regions: Tensor | None, rollouts: Rollouts, policy: Policy) -> dict[str, Image.Image]:
    """Pictures of the first rollout by name: its trajectory, and the teacher's advantage if ``regions`` are known."""
    first = rollouts.kept[0]
    tokens = token_texts(policy, first.trajectory.tokens[0].tolist())
    drawn: dict[str, Image.Image] = {}
    if (table := divergence_table(parts, rollouts)) is not None:
        drawn["rollouts/trajectory"] = trajectory_picture(*table, tokens, first.problem.id)
    if regions is not None and (bars := advantage_of_first(parts, regions.shape[1])) is not None:
        drawn["teacher/advantage_by_token"] = advantage_picture(bars, regions[0], tokens, first.problem.id)
    return drawn


def token_texts(policy: Policy, tokens: Sequence[int]) -> list[str]:
    """What to write at each token: its text with visible spaces and line breaks, or its id if it has none."""
    hidden = policy.non_text_ids
    texts = ["" if token in hidden else policy.text([token]) for token in tokens]
    return [
        text.replace("\n", "\\n").replace(" ", "\N{MIDDLE DOT}")[:12] or f"<{token}>"
        for text, token in zip(texts, tokens, strict=True)
    ]


def strength(value: float) -> float:
    """How strong the colour of a divergence is, from 0.1 at `LOW` nats and below to 1 at `HIGH` nats and above."""
    share = math.log(max(abs(value), LOW) / LOW) / math.log(HIGH / LOW)
    return 0.1 + 0.9 * min(share, 1.0)


def trajectory_picture(reveal_step: Tensor, value: Tensor, tokens: Sequence[str], title: str = "") -> Image.Image:
    """Draw one trajectory: decoding steps downwards, positions to the right, the final tokens below.

    Args:
        reveal_step: int64 ``[l]``.
        value: float ``[k l]``, the divergence at graded sites, NaN elsewhere.
        tokens: ``[l]``, a text for each position.
        title: what the picture shows; the rest of the caption follows it.
    """
    value, reveal_step, cut = value[:MOST, :MOST], reveal_step[:MOST], max(value.shape) > MOST
    count, length = value.shape
    steps = torch.arange(count)[:, None]
    grid = np.empty((count, length, 3), dtype=np.uint8)
    grid[:] = EARLIER
    grid[((reveal_step == NEVER) | (reveal_step > steps)).numpy()] = MASKED
    grid[(reveal_step == steps).numpy()] = NOW
    for step, position in (~value.isnan()).nonzero().tolist():
        grid[step, position] = _site_colour(tuple(grid[step, position].tolist()), float(value[step, position]))
    width, height = _cell(length, 14, 3600), _cell(count, 14, 2000)
    caption = f"{title}: divergence at graded sites{f' (the first {MOST} steps and positions)' * cut}"
    plot = _Plot(caption, length * width, count * height)
    plot.image.paste(Image.fromarray(grid.repeat(height, 0).repeat(width, 1)), (LEFT, TOP))
    plot.frame()
    plot.positions(tokens[:length], width)
    for step in _ticks(count, height, 12):
        plot.label_left(TOP + (step + 0.5) * height, str(step))
    plot.draw.text((4, TOP - 14), "decoding step", INK, plot.font)
    plot.legend([(MASKED, "masked"), (EARLIER, "revealed before"), (NOW, "revealed at this step"), (VIOLET, "below 0")])
    plot.scale([(x, _site_colour(EARLIER, x)) for x in (0.001, 0.01, 0.1, 1.0, 10.0)])
    return plot.image


def advantage_picture(value: Tensor, regions: Tensor, tokens: Sequence[str], title: str = "") -> Image.Image:
    """Draw the advantage of one rollout as bars: blue above 0, red below, the first wrong step on grey.

    Args:
        value: float ``[l]``, NaN where no site is graded.
        regions: int64 ``[l]``, the index in `advantage.REGIONS`, -1 where it is unknown.
        tokens: ``[l]``, a text for each position.
        title: what the picture shows.
    """
    length = min(len(value), MOST)
    width, middle = _cell(length, 14, 3600), TOP + BAR_HEIGHT / 2
    plot = _Plot(f"{title}: log teacher - log student at the drawn token, in nats", length * width, BAR_HEIGHT)
    for position in range(length):
        left, right = LEFT + position * width, LEFT + (position + 1) * width - 1
        if int(regions[position]) == REGIONS.index("error"):
            plot.draw.rectangle((left, TOP, right, TOP + BAR_HEIGHT - 1), fill=ERROR)
        nats = float(value[position])
        if not math.isnan(nats):
            end = middle - BAR_HEIGHT / 2 * max(-1.0, min(1.0, nats / TALLEST))
            colour = BLUE if nats > 0 else RED
            plot.draw.rectangle((left, round(min(middle, end)), right, round(max(middle, end))), fill=colour)
    plot.frame()
    plot.positions(tokens[:length], width)
    for nats in (-TALLEST, -TALLEST / 2, 0.0, TALLEST / 2, TALLEST):
        plot.label_left(middle - BAR_HEIGHT / 2 * nats / TALLEST, f"{nats:+g}" if nats else "0")
    legend = [(BLUE, "the teacher finds it more probable"), (RED, "less probable"), (ERROR, "first wrong step")]
    plot.legend([*legend, (EARLIER, f"bars end at {TALLEST:g}")])
    return plot.image


class _Plot:
    """A white picture with a caption and room for axes around a plot of ``width`` times ``height`` pixels."""

    def __init__(self, caption: str, width: int, height: int) -> None:
        self.font, self.width, self.height = _font(), width, height
        self.image = Image.new("RGB", (max(LEFT + width + RIGHT, 640), TOP + height + BOTTOM), EARLIER)
        self.draw: Any = ImageDraw.Draw(self.image)
        self.draw.text((4, 4), caption[:160], INK, self.font)

    def frame(self) -> None:
        """Draw a line around the plot."""
        self.draw.rectangle((LEFT - 1, TOP - 1, LEFT + self.width, TOP + self.height), outline=INK)

    def label_left(self, y: float, text: str) -> None:
        """Write a label beside the plot, with its middle at ``y``."""
        self.draw.text((LEFT - 6 - self.draw.textlength(text, self.font), round(y) - 6), text, INK, self.font)

    def positions(self, tokens: Sequence[str], width: int) -> None:
        """Write numbers of positions below the plot, and the tokens upright below them if there is room."""
        bottom = TOP + self.height
        for position in _ticks(len(tokens), width, 30):
            self.draw.text((LEFT + position * width + 1, bottom + 1), str(position), INK, self.font)
        self.draw.text((4, bottom + 1), "position", INK, self.font)
        if width < 11:
            return
        self.draw.text((4, bottom + 18), "token", INK, self.font)
        for position, token in enumerate(tokens):
            label = Image.new("RGB", (66, 13), EARLIER)
            written: Any = ImageDraw.Draw(label)
            written.text((66 - min(66, written.textlength(token, self.font)), 0), token, INK, self.font)
            self.image.paste(label.rotate(90, expand=True), (LEFT + position * width, bottom + 15))

    def legend(self, entries: Sequence[tuple[Colour, str]]) -> None:
        """Name the colours under the caption."""
        self._swatches(entries, 20)

    def scale(self, entries: Sequence[tuple[float, Colour]]) -> None:
        """Name the colours of values in nats under the legend."""
        labels = [f"{value:g}" for value, _ in entries]
        labels = [f"{labels[0]} and less", *labels[1:-1], f"{labels[-1]} nats and more"]
        self._swatches([(colour, label) for (_, colour), label in zip(entries, labels, strict=True)], 36, "graded:")

    def _swatches(self, entries: Sequence[tuple[Colour, str]], y: int, start: str = "") -> None:
        self.draw.text((4, y), start, INK, self.font)
        x = LEFT
        for colour, label in entries:
            self.draw.rectangle((x, y + 1, x + 10, y + 11), fill=colour, outline=INK)
            self.draw.text((x + 15, y), label, INK, self.font)
            x += 27 + round(self.draw.textlength(label, self.font))


@cache
def _font() -> Any:
    """The font that comes with Pillow."""
    return ImageFont.load_default(10)


def _cell(count: int, most: int, room: int) -> int:
    """Pixels of a cell, so that ``count`` of them fit into ``room``."""
    return max(1, min(most, room // max(1, count)))


def _ticks(count: int, size: int, apart: int) -> range:
    """Places of labels, at least ``apart`` pixels from each other, where a cell has ``size`` pixels."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, MOST) if step * size >= apart or step == MOST)
    return range(0, count, step)


def _site_colour(ground: Colour, value: float) -> Colour:
    """The colour of a graded site over that of its cell: red, or violet where the value is below 0."""
    share, over = strength(value), RED if value >= 0 else VIOLET
    red, green, blue = (round(a * (1 - share) + b * share) for a, b in zip(ground, over, strict=True))
    return red, green, blue
