"""The module that every process wraps: a causal-LM class of transformers that computes logits at the sites only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from dllm_sd.policies.prefix_cache import Window, block_causal

Head = Callable[[Tensor], Tensor]
"""Hidden states ``[i h]`` to logits ``[i v]``."""


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
        read: Callable[[Tensor, Head], Any] | None = None,
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
        """
        network = self.network
        body = network.base_model
        if window is not None:
            position, attention = window.position, window.attention(mask)
        else:
            position = (mask.long().cumsum(1) - 1).clamp(min=0)  # counted from the first real token
            attention = mask if self.block_length is None else block_causal(position, mask, self.block_length)
        if attention.dim() == 4 and network.config._attn_implementation == "eager":  # it adds what it is given
            attention = torch.zeros_like(attention, dtype=torch.float32).masked_fill(~attention, -1e30)
        hidden = body(
            input_ids=ids, attention_mask=attention, position_ids=position, past_key_values=window, use_cache=False
        ).last_hidden_state
        hidden = self._spoken(hidden, sites, mask)
        return self.logits(hidden) if read is None else read(hidden, self.logits)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[m v]`` of hidden states ``[m h]``; only inside ``forward`` where weights lie in pieces."""
        logits = self.network.get_output_embeddings()(hidden)
        if self.rows is None or logits.shape[-1] == self.rows:
            return logits
        return nn.functional.pad(logits, (0, self.rows - logits.shape[-1]), value=-torch.inf)  # a negative width cuts

    def _spoken(self, hidden: Tensor, sites: Tensor, mask: Tensor) -> Tensor:
        """The states ``[m h]`` that speak about the sites: those at the sites, or one real token before them."""
        if sites.dtype == torch.bool:
            if not self.shift:
                return hidden[sites]
            rows, columns = sites.nonzero(as_tuple=True)
        else:
            rows, columns = torch.arange(len(sites), device=sites.device)[:, None], sites
        if self.shift:
            before = (columns - 1).clamp(min=0)
            columns = torch.where(mask[rows, before], before, columns)
        return hidden[rows, columns].reshape(-1, hidden.shape[-1])


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
