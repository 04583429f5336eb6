"""The module that every process wraps: a causal-LM class of transformers that computes logits at the sites only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel


class SiteHead(nn.Module):
    """A causal-LM class of transformers, run without its causal mask, that computes logits at the sites only.

    The gather stands before the output head and inside ``forward``, so that DDP and FSDP wrap it correctly.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, sites: Tensor) -> Tensor:
        """Logits ``[m v]`` from ids int64 ``[n s]``, attention mask and sites bool ``[n s]``."""
        model: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        body, head = model.base_model, model.get_output_embeddings()
        position = (mask.long().cumsum(1) - 1).clamp(min=0)  # counted from the first real token, whatever the padding
        hidden = body(input_ids=ids, attention_mask=mask, position_ids=position, use_cache=False).last_hidden_state
        return head(hidden[sites])


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
