"""How the reference implementations turn the values of tokens into a loss."""

from einops import rearrange
from torch import Tensor


def flat_logp(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits ``[n l v]`` to log-probabilities ``[m v]``."""
    return rearrange(logits / temperature, "n l v -> (n l) v").log_softmax(-1)


def aggregate(per_token: Tensor, mask: Tensor, mode: str) -> Tensor:
    """``[n l]``, ``[n l]`` to the loss; sequences without a token do not count."""
    if mode == "token-mean":
        return (per_token * mask).sum() / mask.sum().clamp(min=1)
    rows = (per_token * mask).sum(-1)
    if mode == "seq-mean-token-mean":
        rows = rows / (mask.sum(-1) + 1e-8)
    return rows[mask.sum(-1) > 0].mean()
