"""Losses: the parts of the objective, one file for each slot, and the pure functions that they call.

``sites -> support -> target -> divergence [t m] x trust [t m]``. Inputs and outputs are log-probabilities, and
computations are in float32 (float64 stays float64). No function here sums over the sites ``m``; the objective does this
once."""

from dllm_sd.losses.divergences import (
    DIVERGENCES,
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
from dllm_sd.losses.gap import GatedGap, drawn_gap, gate, local_support
from dllm_sd.losses.measured import Divergence, DivergenceDefaults, Measured
from dllm_sd.losses.numerics import at_least_float32, floor_logp
from dllm_sd.losses.policy_gradient import PolicyGradient, clipped_surrogate, log_ratio_advantage
from dllm_sd.losses.supports import (
    SUPPORTS,
    FullVocabulary,
    Support,
    TopK,
    append_tail,
    gather_top_k,
    log_tail,
    renormalise,
    top_k_index,
    top_k_overlap,
)
from dllm_sd.losses.targets import TARGETS, Barycenter, Each, Plain, PurifiedPMI, Sampled, Target
from dllm_sd.losses.trust import (
    TRUSTS,
    Drawn,
    Equal,
    GroupAdvantage,
    ImportanceCap,
    OutcomeValidated,
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
    "Barycenter",
    "Divergence",
    "DivergenceDefaults",
    "Drawn",
    "Each",
    "Equal",
    "ForwardKL",
    "FullVocabulary",
    "GatedGap",
    "GeneralisedJSD",
    "GroupAdvantage",
    "ImportanceCap",
    "Measured",
    "OutcomeValidated",
    "Plain",
    "PolicyGradient",
    "PurifiedPMI",
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
    "clipped_surrogate",
    "drawn_gap",
    "floor_logp",
    "gate",
    "gather_top_k",
    "group_advantage",
    "jsd_entries",
    "k3_factor",
    "kl_entries",
    "local_support",
    "log_ratio_advantage",
    "log_tail",
    "renormalise",
    "surrogate_factor",
    "token_nll",
    "top_k_index",
    "top_k_overlap",
]
