"""The module that DDP or FSDP wraps: a causal-LM class of transformers that computes logits at the sites only."""

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
    """Its parameters that require a gradient."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[i h]`` to logits ``[i v]``."""
        return self.logits(hidden)


SiteReader = Callable[[Tensor, Head], Any]
"""A function of hidden states ``[m h]`` and the output head that runs inside ``forward``."""


class SiteHead(nn.Module):
    """A causal-LM class of transformers that computes logits at the sites only.

    The network (`is_causal` of its config) and `block_length` decide whether positions attend to later ones.
    The sites are gathered before the output head and inside ``forward``, so that DDP and FSDP wrap both correctly.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, block_length: int | None = None, shift: bool = False
    ) -> None:
        """Wrap ``model``.

        Args:
            model: the network.
            block_length: positions of an attention block; None lets every position attend to all others.
            shift: whether the network's logits at position i predict position i + 1.
        """
        super().__init__()
        self.model = model
        self.block_length, self.shift = block_length, shift
        self.body: Callable[..., Any] | None = None
        """Runs in the place of the network's layers while the module is `compiled`."""
        self._compiled: dict[str, Callable[..., Any]] = {}
        self.rows: int | None = None
        """Vocabulary rows of the logits, for a teacher whose head has more or fewer rows than its student's."""

    @property
    def _no_split_modules(self) -> Any:
        """Layer classes that are not split when the module is sharded (read by accelerate)."""
        return self.network._no_split_modules

    @property
    def network(self) -> Any:
        """The network itself; adapters are in its layers."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def vocabulary(self) -> int:
        """``v``, rows of the output head."""
        return self.network.get_output_embeddings().weight.shape[0]

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
            sites: bool ``[n s]``; or int64 ``[n w]``, ``w`` columns of every row, whose number the host knows.
            window: a KV cache; the ids are then some positions of longer sequences, and ``mask`` is true at the real
                ones.
            read: called with the hidden states ``[m h]`` at the sites and the output head; its result is returned
                instead of logits, so that not all logits must exist at once. Inside ``forward`` the head's weights
                are unsharded, and DDP and FSDP reduce its gradient.
            rows: int64 ``[k]``, with boolean sites ``[k s]``: the row of ``ids`` that each row of sites belongs to.
        """
        network = self.network
        body = network.base_model if self.body is None or window is not None else self.body
        if window is not None:
            position, attention = window.position, window.attention(mask)
        else:
            position = (mask.long().cumsum(1) - 1).clamp(min=0)  # counted from the first real token
            attention = mask if self.block_length is None else block_causal(position, mask, self.block_length)
        if attention.dim() == 2 and sites.dtype != torch.bool and "flash" not in network.config._attn_implementation:
            attention = attention[:, None, None].expand(
                -1, 1, ids.shape[1], -1
            )  # avoids a check for padding that waits for the device
        if attention.dim() == 4 and network.config._attn_implementation == "eager":  # eager attention adds the mask
            attention = torch.zeros_like(attention, dtype=torch.float32).masked_fill(~attention, -1e30)
        hidden = body(
            input_ids=ids, attention_mask=attention, position_ids=position, past_key_values=window, use_cache=False
        ).last_hidden_state
        hidden = self._states_at(hidden, sites, mask, rows)
        return self.logits(hidden) if read is None else read(hidden, self.head)

    @property
    def head(self) -> Head:
        """The output head; sharded weights are gathered only inside ``forward``."""
        part = self.network.get_output_embeddings()
        return Head(self.logits, tuple(value for value in part.parameters() if value.requires_grad))

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits ``[m v]`` of hidden states ``[m h]``; call it inside ``forward`` if weights are sharded."""
        logits = self.network.get_output_embeddings()(hidden)
        if self.rows is None or logits.shape[-1] == self.rows:
            return logits
        return nn.functional.pad(logits, (0, self.rows - logits.shape[-1]), value=-torch.inf)  # a negative width cuts

    @contextmanager
    def compiled(self, mode: str | None) -> Iterator[None]:
        """Run the layers through `torch.compile` inside, for static shapes; the compiled function is reused."""
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
        """Return the states ``[m h]`` that predict the sites: at the sites or, with a shift, one real token before."""
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
    """Run ``module`` (a `SiteHead`, wrapped or not) on a view and call ``read``; equal rows are computed only once.

    Where dropout is active every row is computed, since equal rows have different dropout masks.
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
    """Set eval mode inside; afterwards every sub-module has its former mode again."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
