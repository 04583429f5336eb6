"""Methods whose teacher reads another prompt, or is another model: OPSD, SDPO, DemoPSD, OPD and their horizons."""

from dataclasses import replace

from dllm_sd.losses.divergences import ForwardKL, GeneralisedJSD, PolicyGradient, ReverseKL
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
        "OPSD, arXiv 2601.18734; divergence and template by measurement",
        "The teacher has the initial weights and reads the reference in its prompt. The loss is the JSD with weight "
        "0.5, without a clip, which gained most in the laboratory. Rollouts, student and teacher share one "
        "temperature of 1.1, as in the code.",
    ),
    "opsd_v3": NamedMethod(
        replace(OPSD, divergence=ForwardKL(clip="entry")),
        "OPSD, arXiv 2601.18734 v3, Table 3, and its script",
        "The forward KL divergence with each vocabulary entry clipped at 0.05, which is not a divergence: the clipped "
        "sum may be negative.",
        parent="opsd",
    ),
    "opsd_paper": NamedMethod(
        replace(OPSD, contexts=(Reference(template=OWN_WORDS),), divergence=ReverseKL(), temperature=1.0),
        "OPSD, arXiv 2601.18734, the text's reverse KL",
        "The reverse KL divergence over the whole vocabulary, without a clip.",
        parent="opsd",
    ),
    "opsd_reference": NamedMethod(
        replace(OPSD, contexts=(Reference(template=OWN_WORDS),), divergence=GeneralisedJSD(beta=0.5)),
        "github.com/siyan-zhao/OPSD, commit 590ec26",
        "The released snapshot, which is older than v3: JSD with weight 0.5, without a clip.",
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
        "Three frozen views: with the reference, with the reference but without the question, and plain. The "
        "paper does not state sampling, temperature and prompts; they are taken from OPSD (one temperature of "
        "1.1). The weight 0.5 of the JSD comes from a re-implementation.",
        parent="opsd",
    ),
    "sdpo": NamedMethod(
        SDPO,
        "github.com/lasgroup/SDPO, commit 0e6d510, its science settings; arXiv 2601.20802",
        "The teacher reads the first successful sibling (another attempt at the same problem), never the "
        "rollout itself. Its weights are an EMA with rate 0.05. The loss is the JSD with weight 0.5 on the "
        "student's top 100 and a tail bucket, with importance ratios capped at 2. Rollouts without a "
        "successful sibling are left out. There is no feedback of an environment.",
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
        "The target is the barycenter of the EMA student with the hint and without it, on the student's top "
        "100 and a tail bucket. The paper tunes beta for each domain (25 to 100); 50 is the value of re- "
        "implementations. The paper does not state whether the only success of a group may be its own "
        "demonstration; here it may.",
        parent="sdpo",
    ),
    "opd": NamedMethod(
        OPD,
        "on-policy distillation as in arXiv 2605.31490, Eq. 6, and github.com/thunlp/OPD, commit 0a44395",
        "The teacher is another checkpoint (method.teacher.0.path). The loss is a policy gradient on the "
        "student's 16 most probable tokens, and the logged loss is that of the surrogate objective.",
    ),
    "opd_sampled": NamedMethod(
        replace(OPD, support=FullVocabulary(), divergence=PolicyGradient(tokens="sampled")),
        "on-policy distillation, arXiv 2605.31490, Eq. 6",
        "opd on the sampled token alone.",
        parent="opd",
    ),
    "topd": NamedMethod(
        replace(OPD, rollout=replace(OPD.rollout, horizon=Truncated(ratio=0.1))),
        "TOPD, arXiv 2605.31490, Eq. 12",
        "opd on the first tenth of each completion; the rest is never generated.",
        parent="opd",
    ),
    "popd": NamedMethod(
        replace(OPD, rollout=replace(OPD.rollout, horizon=Progressive(initial_ratio=0.09, ratio_step=9 / 15360))),
        "POPD, arXiv 2605.31490, Eq. 10 and 11, App. B",
        "opd on a prefix that grows by 9 of 15,360 tokens with every update. The paper does not state its "
        "initial length; 9 % (1,382 tokens) is inferred from the paper's times.",
        parent="opd",
    ),
}
