"""Methods whose teacher reads another prompt, or is another model: OPSD, SDPO, DemoPSD, OPD and their horizons."""

from dataclasses import replace

from dllm_sd.losses.divergences import GeneralisedJSD, PolicyGradient, ReverseKL
from dllm_sd.losses.supports import FullVocabulary
from dllm_sd.losses.targets import Barycenter, PurifiedPMI
from dllm_sd.losses.trust import Equal
from dllm_sd.methods.named_method import GROUP, OPD, OPSD, SDPO, NamedMethod
from dllm_sd.policies.weights import LiveWeights
from dllm_sd.rollouts.horizons import Progressive, Truncated
from dllm_sd.teachers import (
    Nothing,
    Reference,
    Sibling,
)
from dllm_sd.teachers.hints import AFRESH, OWN_WORDS

PROMPTED: dict[str, NamedMethod] = {
    "opsd": NamedMethod(
        OPSD,
        "OPSD, arXiv 2601.18734 v3, Table 3, and its script",
        "Reference in the prompt, initial weights, forward KL clipped per vocabulary entry at 0.05 (not a divergence: "
        "the clipped sum may be negative). One temperature of 1.1 for rollouts, student and teacher, as in the code.",
    ),
    "opsd_paper": NamedMethod(
        replace(OPSD, contexts=(Reference(template=OWN_WORDS),), divergence=ReverseKL(), temperature=1.0),
        "OPSD, arXiv 2601.18734, the text's reverse KL",
        "Reverse KL over the whole vocabulary without a clip.",
        parent="opsd",
    ),
    "opsd_reference": NamedMethod(
        replace(OPSD, contexts=(Reference(template=OWN_WORDS),), divergence=GeneralisedJSD(beta=0.5)),
        "github.com/siyan-zhao/OPSD, commit 590ec26",
        "The released snapshot, older than v3: JSD 0.5 without a clip.",
        parent="opsd",
    ),
    "opsd_pmi": NamedMethod(
        replace(
            OPSD,
            contexts=(Reference(), Reference(question=False), Nothing()),
            target=PurifiedPMI(),
            divergence=GeneralisedJSD(beta=0.5),
        ),
        "Purified OPSD, arXiv 2607.02234, Eq. 5 to 18",
        "Three frozen views: informed, reference without question, plain. Not stated by the paper and taken from OPSD: "
        "sampling, one temperature of 1.1, prompts; the weight 0.5 of the JSD comes from a re-implementation.",
        parent="opsd",
    ),
    "sdpo": NamedMethod(
        SDPO,
        "github.com/lasgroup/SDPO, commit 0e6d510, its science settings; arXiv 2601.20802",
        "First successful sibling in the prompt, never the rollout itself; EMA 0.05; student's top-100 with a tail "
        "bucket; JSD 0.5; importance cap 2. Rollouts without a successful sibling are left out. No environment "
        "feedback.",
    ),
    "sdpo_paper": NamedMethod(
        replace(
            SDPO,
            contexts=(Sibling(overflow="cut", template=AFRESH),),
            teacher=(LiveWeights(),),
            support=FullVocabulary(),
            divergence=ReverseKL(),
            trust=Equal(),
        ),
        "SDPO, arXiv 2601.20802, its objective",
        "KL(student || the same weights with the hint) over the whole vocabulary.",
        parent="sdpo",
    ),
    "demo_psd": NamedMethod(
        replace(
            SDPO,
            rollout=replace(GROUP, problems=64),
            contexts=(Sibling(own=True, choice="random", overflow="cut"), Nothing()),
            target=Barycenter(),
            divergence=ReverseKL(),
        ),
        "DemoPSD, arXiv 2607.02502, Eq. 7 to 12, App. B",
        "Barycenter of the informed and the plain EMA student on the student's top-100 and a bucket. The paper tunes "
        "beta for each domain (25 to 100); 50 is the re-implementations'. Whether a lone success may be its own "
        "demonstration is not stated; here it may.",
        parent="sdpo",
    ),
    "opd": NamedMethod(
        OPD,
        "on-policy distillation as in arXiv 2605.31490, Eq. 6, and github.com/thunlp/OPD, commit 0a44395",
        "Another checkpoint (method.teacher.0.path) as teacher; policy gradient on the student's 16 most probable "
        "tokens. The logged loss is that of the surrogate.",
    ),
    "opd_sampled": NamedMethod(
        replace(OPD, support=FullVocabulary(), divergence=PolicyGradient(tokens="sampled")),
        "on-policy distillation, arXiv 2605.31490, Eq. 6",
        "The same with the sampled token alone.",
        parent="opd",
    ),
    "topd": NamedMethod(
        replace(OPD, rollout=replace(OPD.rollout, horizon=Truncated(ratio=0.1))),
        "TOPD, arXiv 2605.31490, Eq. 12",
        "opd on the first tenth of each completion; the other tenths are never generated.",
        parent="opd",
    ),
    "popd": NamedMethod(
        replace(OPD, rollout=replace(OPD.rollout, horizon=Progressive(initial_ratio=0.09, ratio_step=9 / 15360))),
        "POPD, arXiv 2605.31490, Eq. 10 and 11, App. B",
        "opd with 9 of 15,360 tokens more at every update. The start is not stated; 9 % of the length (1,382 tokens) "
        "is inferred from the paper's times.",
        parent="opd",
    ),
}
