"""How a token is drawn from logits: greedily, or by inverse CDF at one uniform number, in float32."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError

ENTRIES_PER_RUN = 256
"""Vocabulary entries per run: the inverse CDF searches the runs first, then the entries of one run."""
TINY = torch.finfo(torch.float32).tiny
MAX_LISTED_IDS = 1024
"""More banned ids than this are stored as a mask; a few are faster as a list of ids."""


@dataclass(frozen=True)
class Draw:
    """One token at each of ``m`` sites."""

    token: Tensor
    """int64 ``[m]``."""
    logp: Tensor
    """`Trajectory.logp` ``[m]``: log-probability at the temperature (1 if greedy), over the whole vocabulary."""
    own: Tensor
    """``[m]``: log-probability at temperature 1."""
    normaliser: Tensor
    """``[m]``: log-sum-exp of the given logits."""


def draw(logits: Tensor, settings: Decoding, banned: Tensor, u: Tensor) -> Draw:
    """Draw one token a site, without ``banned``. Overwrites ``logits``.

    Args:
        logits: float32 ``[m v]``.
        settings: temperature, top-k and top-p.
        banned: token ids that must not be drawn (`banned_ids`): ids int64, or a mask bool ``[w]``, true at these
            ids, that ends after the last id that may be drawn.
        u: uniform numbers ``[m]`` in (0, 1); not read if greedy.
    """
    log_total = _log_total_of(logits, banned, settings.temperature)
    if banned.dtype == torch.bool:
        logits = logits[:, : len(banned)].masked_fill_(banned, -torch.inf)
    else:
        logits.index_fill_(-1, banned, -torch.inf)
    top = logits.amax(-1, keepdim=True)
    gap = logits.sub_(top)  # everything below is relative to the best token that is allowed
    weight = gap.exp()
    normaliser = log_total(weight, top, 1.0)
    if settings.temperature == 0:
        token = first_largest(gap)
        own = gap.gather(-1, token[:, None])[:, 0] - normaliser
        return Draw(token, own, own, normaliser + top[:, 0])
    temperature, of_logp = settings.temperature, normaliser
    if temperature != 1:
        weight = torch.div(gap, temperature, out=weight).exp_()
        of_logp = log_total(weight, top, temperature)
    if 0 < settings.top_k < logits.shape[-1] or settings.top_p < 1:
        weight = apply_filters(gap, settings).exp_()
    token = sample_inverse_cdf(weight, u)
    token_gap = gap.gather(-1, token[:, None])[:, 0]
    return Draw(token, token_gap / temperature - of_logp, token_gap - normaliser, normaliser + top[:, 0])


def _log_total_of(logits: Tensor, banned: Tensor, temperature: float) -> Callable[[Tensor, Tensor, float], Tensor]:
    """``log_total(weight, top, t)``: log-sum-exp of all ``(logits - top) / t``, ``[m]``, banned ones included.

    To be called before the banned ones are overwritten; ``weight [m v]`` is exp of the allowed ones. Few banned logits
    are kept, of many the sums.
    """
    if banned.dtype == torch.bool:
        sums = {t: (logits / t if t != 1 else logits).logsumexp(-1) for t in {1.0, temperature or 1.0}}
        return lambda weight, top, t: sums[t] - top[:, 0] / t
    banned_logits = logits[:, banned]

    def log_total(weight: Tensor, top: Tensor, t: float) -> Tensor:
        allowed = weight.sum(-1).log()
        return (
            torch.logaddexp(allowed, ((banned_logits - top) / t).logsumexp(-1)) if banned_logits.shape[-1] else allowed
        )

    return log_total


def apply_filters(logits: Tensor, settings: Decoding) -> Tensor:
    """Apply temperature, top-k and top-p to logits ``[m v]``, in this order, with the warpers of transformers."""
    unused: Any = None
    logits = TemperatureLogitsWarper(settings.temperature)(unused, logits)
    if 0 < settings.top_k < logits.shape[-1]:
        logits = TopKLogitsWarper(settings.top_k)(unused, logits)
    return TopPLogitsWarper(settings.top_p)(unused, logits) if settings.top_p < 1 else logits


def sample_inverse_cdf(weight: Tensor, u: Tensor) -> Tensor:
    """Tokens int64 ``[m]`` drawn in proportion to ``weight [m v]``, by inverse CDF at ``u [m]`` in (0, 1)."""
    runs = _runs(weight, 0.0)
    until = runs.sum(-1).cumsum(-1)
    target = u[:, None] * until[:, -1:]
    run = _search(until, target)
    inside = runs.gather(1, run[..., None].expand(-1, -1, ENTRIES_PER_RUN))[:, 0].cumsum(-1)
    before = torch.where(run > 0, until.gather(1, (run - 1).clamp(min=0)), 0)
    rest = torch.minimum((target - before).clamp(min=TINY), inside[:, -1:])  # a token of weight 0 is never hit
    return (run * ENTRIES_PER_RUN + _search(inside, rest))[:, 0]


def first_largest(values: Tensor) -> Tensor:
    """int64 ``[m]``: the first of the largest entries of ``values [m v]`` (argmax, but faster)."""
    runs = _runs(values, -torch.inf)
    run = runs.amax(-1).argmax(-1, keepdim=True)
    return (run * ENTRIES_PER_RUN)[:, 0] + runs.gather(1, run[..., None].expand(-1, -1, ENTRIES_PER_RUN))[:, 0].argmax(
        -1
    )


def _runs(values: Tensor, filler: float) -> Tensor:
    """``[m v] -> [m r ENTRIES_PER_RUN]``."""
    short = -values.shape[-1] % ENTRIES_PER_RUN
    values = pad(values, (0, short), value=filler) if short else values
    return values.unflatten(-1, (-1, ENTRIES_PER_RUN))


def _search(until: Tensor, target: Tensor) -> Tensor:
    """The first entry of ``until [m r]`` that is at least ``target [m 1]``, ``[m 1]``."""
    return torch.searchsorted(until, target.contiguous()).clamp(max=until.shape[-1] - 1)


def banned_ids(
    settings: Decoding, suppress: Sequence[int], device: torch.device, vocabulary: int | None = None
) -> Tensor:
    """Return the ids that ``settings`` or ``suppress`` ban, for `draw`.

    They are int64 ids, or a mask where there are more than `MAX_LISTED_IDS`.

    A mask needs the size of the ``vocabulary``; without it the ids are returned.

    Raises:
        InputError: if the settings name a token beyond the vocabulary, or all of it.
    """
    if vocabulary is not None:
        settings.check_suppressed(vocabulary)
    ids = torch.tensor(sorted({*suppress, *settings.suppress}), dtype=torch.int64)
    if vocabulary is None or len(ids) <= MAX_LISTED_IDS:
        return ids.to(device)
    mask = torch.zeros(vocabulary, dtype=torch.bool).index_fill(0, ids, True)
    if bool(mask.all()):
        raise InputError("decode.suppress leaves no token to draw; list fewer")
    return mask[: int((~mask).nonzero()[-1]) + 1].to(device)


def force(scores: Tensor, settings: Decoding, banned: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row at ``u [m]`` from ``scores [m v]`` without ``banned``; for logits processors.

    Returns the processed scores ``[m v]``, 0 at the drawn token and -inf elsewhere, and its `Trajectory.logp` ``[m]``.
    """
    drawn = draw(scores.float().clone(), settings, banned, u)
    return torch.full_like(scores, -torch.inf).scatter(-1, drawn.token[:, None], 0.0), drawn.logp
