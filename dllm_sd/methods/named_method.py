"""An entry of the table of methods, and the parts that several entries share."""

from dataclasses import dataclass, replace

from dllm_sd.losses.divergences import ForwardKL, GeneralisedJSD, PolicyGradient, TokenNLL
from dllm_sd.losses.supports import TopK
from dllm_sd.losses.targets import Sampled
from dllm_sd.losses.trust import ImportanceCap
from dllm_sd.methods.method import Method
from dllm_sd.network.subspace import Subspace
from dllm_sd.policies.weights import CheckpointWeights, EmaWeights
from dllm_sd.rollouts.gates import All
from dllm_sd.rollouts.rules import PassAtK
from dllm_sd.teachers import Nothing, Reference, Sibling


@dataclass(frozen=True)
class NamedMethod:
    """A named method: its parts, its source, and a note."""

    method: Method
    source: str
    note: str
    parent: str | None = "d_opsd"
    """The named method relative to which the documentation describes this one; None describes all of its parts."""


GROUP = PassAtK(problems=32, attempts=8, keep="all", until_solved=False, temperature=1.0)
OPSD = Method(
    rollout=PassAtK(problems=32, attempts=1, temperature=1.1, top_k=20, top_p=0.95),
    gate=All(),
    contexts=(Reference(),),
    divergence=GeneralisedJSD(beta=0.5),
    temperature=1.1,
)
SDPO = Method(
    rollout=GROUP,
    gate=All(),
    contexts=(Sibling(overflow="cut"),),
    teacher=(EmaWeights(0.95),),
    support=TopK(k=100, of="student", rest="bucket"),
    divergence=GeneralisedJSD(beta=0.5),
    trust=ImportanceCap(),
)
OPD = Method(
    rollout=replace(GROUP, problems=64, attempts=4),
    gate=All(),
    contexts=(Nothing(),),
    teacher=(CheckpointWeights(),),
    support=TopK(k=16, of="student", rest="keep"),
    divergence=PolicyGradient(),
)
RCSD = Method(
    rollout=PassAtK(problems=32, attempts=1, temperature=1.2, top_k=20, top_p=0.95),
    gate=All(),
    divergence=ForwardKL(),
    temperature=1.2,
)
SELF_TRAINING = Method(
    rollout=PassAtK(problems=4, attempts=1, temperature=0.7, top_p=0.9, policy=Subspace(), draw="fixed"),
    gate=All(),
    contexts=(),
    target=Sampled(),
    divergence=TokenNLL(),
)
