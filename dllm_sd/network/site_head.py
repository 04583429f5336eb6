"""The module that every process wraps: a causal-LM class of transformers that computes logits at the sites only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from dllm_sd.network.prefix_cache import Window, block_causal
from dllm_sd.network.view import View


@dataclass(frozen=True)
class Head:
    """The output head while ``forward`` runs."""

    logits: Callable[[Tensor], Tensor]
    trained: tuple[Parameter, ...] = ()
    """Those of its parameters that want a gradient."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[i h]`` to logits ``[i v]``."""
        return self.logits(hidden)


SiteReader = Callable[[Tensor, Head], Any]
"""What somebody does with hidden states ``[m h]`` and the head, inside ``forward``."""


class SiteHead(nn.Module):
    """A causal-LM class of transformers that computes logits at the sites only.

    Whether positions see later ones is a matter of the network (`is_causal` of its config) and of `block_length`.
    The gather stands before the output head and inside ``forward``, so that DDP and FSDP wrap it correctly.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, block_length: int | None = None, shift: bool = False
    ) -> None:
        """Wrap ``model``.

        Args:
            model: the network.
            block_length: positions of an attention block; None lets every position see all others.
            shift: whether the network's logits at position i speak about position i + 1.
        """
        super().__init__()
        self.model = model
        self.block_length, self.shift = block_length, shift
        self.body: Callable[..., Any] | None = None
        """What runs in the place of the network's layers while it is `compiled`."""
        self._compiled: dict[str, Callable[..., Any]] = {}
        self.rows: int | None = None
        """Rows that the logits shall have, for a teacher whose head has more or fewer of them than its student's."""

    @property
    def _no_split_modules(self) -> Any:
        """Kinds of layers that stay whole when the module is sharded (read by accelerate)."""
        return self.network._no_split_modules

    @property
    def network(self) -> Any:
        """The network itself; adapters are in its layers."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        sites: Tensor,
        window: Window | None = None,
        read: SiteReader | None = None,
        rows: Tensor | None = None,
    ) -> Any:
        """Logits ``[m v]`` at the sites of a view.

        Args:
            ids: int64 ``[n s]``.
            mask: bool ``[n s]``, true where attention may look.
            sites: bool ``[n s]``; or int64 ``[n w]``, ``w`` columns of every row, which is a shape known beforehand.
            window: with it the ids are some positions of longer sequences, whose finished blocks it remembers; ``mask``
                then tells which of them are real.
            read: gets the hidden states ``[m h]`` at the sites and the output head, and its result is returned instead
                of logits: for those who do not want all logits at once. Inside ``forward`` the head's weights are
                whole, and processes see its gradient.
            rows: int64 ``[k]``, with boolean sites ``[k s]``: the row of ``ids`` that each row of them is about.
        """
        network = self.network
        body = network.base_model if self.body is None or window is not None else self.body
        if window is not None:
            position, attention = window.position, window.attention(mask)
        else:
            position = (mask.long().cumsum(1) - 1).clamp(min=0)  # counted from the first real token
            attention = mask if self.block_length is None else block_causal(position, mask, self.block_length)
        if attention.dim() == 2 and sites.dtype != torch.bool and "flash" not in network.config._attn_implementation:
            attention = attention[:, None, None].expand(-1, 1, ids.shape[1], -1)  # else the device is asked for padding
        if attention.dim() == 4 and network.config._attn_implementation == "eager":  # it adds what it is given
            attention = torch.zeros_like(attention, dtype=torch.float32).masked_fill(~attention, -1e30)
        hidden = body(
            input_ids=ids, attention_mask=attention, position_ids=position, past_key_values=window, use_cache=False
        ).last_hidden_state
        hidden = self._states_at(hidden, sites, mask, rows)
        return self.logits(hidden) if read is None else read(hidden, self.head)

    @property
    def head(self) -> Head:
        """The output head; its weights are whole only inside ``forward`` where they lie in pieces."""
        part = self.network.get_output_embeddings()
        return Head(self.logits, tuple(value for value in part.parameters() if value.requires_grad))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[m v]`` of hidden states ``[m h]``; only inside ``forward`` where weights lie in pieces."""
        logits = self.network.get_output_embeddings()(hidden)
        if self.rows is None or logits.shape[-1] == self.rows:
            return logits
        return nn.functional.pad(logits, (0, self.rows - logits.shape[-1]), value=-torch.inf)  # a negative width cuts

    @contextmanager
    def compiled(self, mode: str | None) -> Iterator[None]:
        """The layers through `torch.compile` inside, for static shapes; its result is kept for the next time."""
        if mode is not None:
            layers = self.network.base_model
            if mode not in self._compiled:
                self._compiled[mode] = torch.compile(lambda **inputs: layers(**inputs), mode=mode, dynamic=False)
            self.body = self._compiled[mode]
        try:
            yield
        finally:
            self.body = None

    def _states_at(self, hidden: Tensor, sites: Tensor, mask: Tensor, of: Tensor | None) -> Tensor:
        """The states ``[m h]`` that speak about the sites: those at the sites, or one real token before them."""
        if sites.dtype == torch.bool:
            if not self.shift and of is None:
                return hidden[sites]
            rows, columns = sites.nonzero(as_tuple=True)
            rows = rows if of is None else of[rows]
        else:
            rows, columns = torch.arange(len(sites), device=sites.device)[:, None], sites
        if self.shift:
            before = (columns - 1).clamp(min=0)
            columns = torch.where(mask[rows, before], before, columns)
        return hidden[rows, columns].reshape(-1, hidden.shape[-1])


def run_at_sites(module: nn.Module, view: View, read: SiteReader) -> Any:
    """Let ``module`` (a `SiteHead`, wrapped or not) read a view, equal rows only once.

    Where dropout is active, every row is read: equal ones drop different numbers.
    """
    view = view if _drops(module) else view.distinct()
    return module(view.ids, view.mask, view.sites, read=read, rows=view.rows)


def _drops(module: nn.Module) -> bool:
    return any(
        part.training and ((isinstance(part, _DropoutNd) and part.p > 0) or getattr(part, "attention_dropout", 0))
        for part in module.modules()
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; after it, every sub-module has its former mode again."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
