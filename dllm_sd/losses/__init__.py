"""Losses: the parts that make the equation, one file per slot, and the pure functions that they call.

``sites -> support -> target -> divergence [t m] x trust [t m]``. Everything is log-space in, log-space out and
float32 inside (float64 stays float64); nothing here sums over the sites ``m``: the objective does, once.
"""

from dllm_sd.losses.divergences import (
    DIVERGENCES,
    Divergence,
    ForwardKL,
    GeneralisedJSD,
    ReverseKL,
    TokenNLL,
    clip_share,
    clipped_sum,
    jsd_entries,
    kl_entries,
    token_nll,
)
from dllm_sd.losses.supports import (
    SUPPORTS,
    FullVocabulary,
    Support,
    TopK,
    append_tail,
    at_least_float32,
    floor_logp,
    gather_top_k,
    log_tail,
    renormalise,
    top_k_index,
    top_k_overlap,
)
from dllm_sd.losses.targets import TARGETS, Each, Plain, Sampled, Target
from dllm_sd.losses.trust import (
    TRUSTS,
    Equal,
    GroupAdvantage,
    Trust,
    group_advantage,
    k3_factor,
    surrogate_factor,
)

__all__ = [
    "DIVERGENCES",
    "SUPPORTS",
    "TARGETS",
    "TRUSTS",
    "Divergence",
    "Each",
    "Equal",
    "ForwardKL",
    "FullVocabulary",
    "GeneralisedJSD",
    "GroupAdvantage",
    "Plain",
    "ReverseKL",
    "Sampled",
    "Support",
    "Target",
    "TokenNLL",
    "TopK",
    "Trust",
    "append_tail",
    "at_least_float32",
    "clip_share",
    "clipped_sum",
    "floor_logp",
    "gather_top_k",
    "group_advantage",
    "jsd_entries",
    "k3_factor",
    "kl_entries",
    "log_tail",
    "renormalise",
    "surrogate_factor",
    "token_nll",
    "top_k_index",
    "top_k_overlap",
]
