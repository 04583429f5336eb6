"""Sums over sites in chunks: logits of a few sites at a time, and their gradient at once.

A loss that is a sum over sites can be differentiated chunk by chunk while it is computed: what stays for the backward
pass is the gradient of the hidden states ``[m h]`` and of the output head, and no tensor ``[m v]`` ever lives.

Axes: ``m`` graded sites, ``i`` sites of a chunk, ``h`` width of the hidden states, ``v`` vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dllm_sd.losses.supports import at_least_float32

#: Logits of a chunk, as many numbers at most: 16 MiB in float32, or eight times that on an accelerator.
CHUNK = {"cpu": 2**22, "cuda": 2**25}


def at_once(vocabulary: int, device: str) -> int:
    """Sites of a chunk."""
    return max(1, CHUNK.get(device, CHUNK["cuda"]) // vocabulary)


@dataclass(frozen=True)
class Spoken:
    """What a model says at the sites: hidden states, and how to turn some of them into logits, whenever asked."""

    hidden: Tensor
    """``[m h]``."""
    head: Callable[[Tensor], Tensor] = lambda hidden: hidden
    """``[i h] -> [i v]``; by default the states are logits already."""
    autocast: torch.dtype | None = None
    """Compute type of the head."""

    @staticmethod
    def now(hidden: Tensor, head: Callable[[Tensor], Tensor]) -> "Spoken":
        """With the compute type that is in force."""
        device = hidden.device.type
        return Spoken(hidden, head, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[i h] -> [i v]``."""
        device, dtype = hidden.device.type, self.autocast
        # A cast of the head that was made without gradient must not be found again where one is needed.
        with torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False):
            return self.head(hidden)

    def at(self, rows: slice) -> Tensor:
        """Logits ``[i v]`` of some sites."""
        return self.logits(self.hidden[rows])

    def select(self, kept: Tensor) -> "Spoken":
        """At the sites that are true in bool ``[m]``."""
        return replace(self, hidden=self.hidden[kept])

    def chunks(self) -> list[slice]:
        """All sites, so many at a time as one may hold the logits of."""
        with torch.no_grad():
            vocabulary = self.logits(self.hidden[:0]).shape[-1]
        size = at_once(vocabulary, self.hidden.device.type)
        return [slice(start, start + size) for start in range(0, max(1, len(self.hidden)), size)]


Equation = Callable[[Callable[[], Tensor], slice], Mapping[str, Tensor]]
"""Gets a maker of logits ``[i v]`` (so that nobody else holds them) and the sites; gives columns ``[i]``."""


def swept(
    spoken: Spoken, trained: Sequence[Tensor], equation: Equation, term: str = "term"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of one column over all sites, with gradient if one is asked for, and all columns ``[m]`` without.

    Args:
        spoken: the student.
        trained: parameters of its head that want a gradient.
        equation: what is computed at a chunk of sites, each for itself.
        term: the column to sum.
    """
    sweep = _Sweep(spoken, trained, equation, term)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (spoken.hidden, *trained)):
        total: Any = _GradientAtOnce.apply(sweep, spoken.hidden, *trained)
    else:
        total, _ = sweep([False] * (1 + len(trained)))
    return total, sweep.columns


@dataclass
class _Sweep:
    spoken: Spoken
    trained: Sequence[Tensor]
    equation: Equation
    term: str
    columns: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """The sum, and its gradient to hidden states and parameters where wanted."""
        gradients: list[Tensor | None] = [torch.zeros_like(self.spoken.hidden) if wanted[0] else None]
        gradients += [None] * len(self.trained)
        for rows in self.spoken.chunks():
            self._chunk(rows, wanted, gradients)
        return self.columns[self.term].sum(), gradients

    def _chunk(self, rows: slice, wanted: Sequence[bool], gradients: list[Tensor | None]) -> None:
        with torch.set_grad_enabled(any(wanted)):
            hidden = self.spoken.hidden[rows].detach().requires_grad_(wanted[0])
            found = self.equation(lambda: self.spoken.logits(hidden), rows)
            if any(wanted):
                leaves = {i: x for i, x in enumerate((hidden, *self.trained)) if wanted[i]}
                values = torch.autograd.grad(found[self.term].sum(), [*leaves.values()], allow_unused=True)
                for i, value in zip(leaves, values, strict=True):
                    _add(gradients, i, value, rows)
        for name, value in found.items():  # into columns made once: small ones between chunks would break up the heap
            if name not in self.columns:
                self.columns[name] = value.new_empty(len(self.spoken.hidden))
            self.columns[name][rows] = value.detach()


def _add(gradients: list[Tensor | None], i: int, value: Tensor | None, rows: slice) -> None:
    """Add what a chunk found; sums over chunks have at least float32's digits."""
    former = gradients[i]
    if value is None:
        return
    if i == 0 and former is not None:
        former[rows] = value
    else:
        gradients[i] = value if former is None else at_least_float32(former).add_(value)


class _GradientAtOnce(torch.autograd.Function):
    """The gradient is there when the sum is; the backward pass only scales it, once."""

    @staticmethod
    def forward(ctx: Any, sweep: _Sweep, *inputs: Tensor) -> Tensor:
        total, ctx.gradients = sweep(ctx.needs_input_grad[1:])
        ctx.types = [x.dtype for x in inputs]
        return total

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (x if x is None else x.mul_(scale[0]) for x in gradients)
        return None, *(x if x is None else x.to(dtype) for x, dtype in zip(scaled, ctx.types, strict=True))
