"""Chunked (fused linear) loss: the logits of a few sites at a time, and their gradient in the same pass.

A loss that is a sum over sites can be differentiated chunk by chunk while it is computed: what is kept for the backward
pass is the gradient of the hidden states ``[m h]`` and of the output head, and no tensor ``[m v]`` is ever held.

Axes: ``m`` graded sites, ``i`` sites of a chunk, ``h`` width of the hidden states, ``v`` vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from dllm_sd.losses.numerics import at_least_float32
from dllm_sd.network.lazy_logits import LazyLogits

Equation = Callable[[Callable[[], Tensor], slice], Mapping[str, Tensor]]
"""``equation(logits, rows)``: columns ``[i]`` at the sites ``rows``; ``logits()`` computes their logits ``[i v]``, so
that the caller holds no reference to them."""


def chunked_loss(
    lazy: LazyLogits, trained: Sequence[Tensor], equation: Equation, term: str = "term"
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of one column over all sites, with gradient where autograd is on, and all columns ``[m]`` without.

    Args:
        lazy: the student's hidden states and output head.
        trained: parameters of the head that need a gradient.
        equation: computes the columns of a chunk; a site may not depend on other sites.
        term: the column to sum.
    """
    chunked = _ChunkedLoss(lazy, trained, equation, term)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (lazy.hidden, *trained)):
        total: Any = _EagerGradient.apply(chunked, lazy.hidden, *trained)
    else:
        total, _ = chunked([False] * (1 + len(trained)))
    return total, chunked.columns


@dataclass
class _ChunkedLoss:
    lazy: LazyLogits
    trained: Sequence[Tensor]
    equation: Equation
    term: str
    columns: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """The sum, and its gradient to hidden states and parameters where wanted."""
        gradients: list[Tensor | None] = [torch.zeros_like(self.lazy.hidden) if wanted[0] else None]
        gradients += [None] * len(self.trained)
        chunks = self.lazy.chunks()
        several = len(chunks) > 1
        sums = _WeightSums([x for x, want in zip(self.trained, wanted[1:], strict=True) if want and several])
        for rows in chunks:
            self._chunk(rows, wanted, gradients, sums)
        for i, x in enumerate(self.trained, 1):
            _add(gradients, i, sums.totals.get(id(x)), slice(None))
        return self.columns[self.term].sum(), gradients

    def _chunk(self, rows: slice, wanted: Sequence[bool], gradients: list[Tensor | None], sums: "_WeightSums") -> None:
        def logits() -> Tensor:
            with sums:
                return self.lazy.apply_head(hidden)

        with torch.set_grad_enabled(any(wanted)):
            hidden = self.lazy.hidden[rows].detach().requires_grad_(wanted[0])
            columns = self.equation(logits, rows)
            if any(wanted):
                leaves = {i: x for i, x in enumerate((hidden, *self.trained)) if wanted[i]}
                values = torch.autograd.grad(columns[self.term].sum(), [*leaves.values()], allow_unused=True)
                for i, value in zip(leaves, values, strict=True):
                    _add(gradients, i, value, rows)
        for name, value in columns.items():  # allocated once: small tensors between chunks would fragment memory
            if name not in self.columns:
                self.columns[name] = value.new_empty(len(self.lazy.hidden))
            self.columns[name][rows] = value.detach()


def _add(gradients: list[Tensor | None], i: int, value: Tensor | None, rows: slice) -> None:
    """Add the gradient of a chunk; sums over chunks are kept in float32 at least."""
    former = gradients[i]
    if value is None:
        return
    if i == 0 and former is not None:
        former[rows] = value
    else:
        gradients[i] = value if former is None else at_least_float32(former).add_(value)


class _WeightSums(TorchFunctionMode):
    """A context in which `linear` adds the gradient of its weight to a sum, without a new tensor ``[v h]`` per chunk.

    It works for any head, a module (with bias, adapter, gathered weights) or a function. All calls but `linear` of a
    matrix of hidden states and one of the weights are left to autograd.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.weights = {id(x) for x in weights}
        self.totals: dict[int, Tensor] = {}
        """The summed gradient of each weight, by its `id`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace `linear`; called for every function of torch."""
        if func is not linear or kwargs or args[0].dim() != 2 or id(args[1]) not in self.weights:
            return func(*args, **(kwargs or {}))
        if id(args[1]) not in self.totals:
            weight = args[1].detach()
            self.totals[id(args[1])] = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        return _Linear.apply(self.totals[id(args[1])], *args)


class _Linear(torch.autograd.Function):
    """`linear`, ``[i h] -> [i v]``; the gradient of the weight goes to a sum ``[v h]``, and autograd gets none."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.total, ctx.hidden, ctx.weight = total, hidden, weight.detach()
        return linear(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), total, hidden = gradients, ctx.total, ctx.hidden
        if total.dtype == hidden.dtype == gradient.dtype:
            total.addmm_(gradient.T, hidden)
        else:  # of lower precision than the sum, such as bfloat16
            total.add_(gradient.T @ hidden.to(gradient.dtype))
        to_hidden = (gradient @ ctx.weight.to(gradient.dtype)).to(hidden.dtype) if ctx.needs_input_grad[1] else None
        return None, to_hidden, None, gradient.sum(0) if any(ctx.needs_input_grad[3:]) else None


class _EagerGradient(torch.autograd.Function):
    """The forward pass computes the gradient too; the backward pass only scales it, and can run once."""

    @staticmethod
    def forward(ctx: Any, chunked: _ChunkedLoss, *inputs: Tensor) -> Tensor:
        total, ctx.gradients = chunked(ctx.needs_input_grad[1:])
        ctx.types = [x.dtype for x in inputs]
        return total

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (x if x is None else x.mul_(scale[0]) for x in gradients)
        return None, *(x if x is None else x.to(dtype) for x, dtype in zip(scaled, ctx.types, strict=True))
