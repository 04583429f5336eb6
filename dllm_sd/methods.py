"""The table of named methods: each is one choice of part for every slot, and nothing else.

A new paper is a new part and a new row. The trainer never sees a name.
"""

from dataclasses import dataclass, replace

from dllm_sd.canvases import AllMasked, DecoderSteps, RandomMasks
from dllm_sd.horizons import Progressive, Truncated
from dllm_sd.losses.divergences import ForwardKL, GeneralisedJSD, PolicyGradient, ReverseKL, TokenNLL
from dllm_sd.losses.sites import AllMasked as AllMaskedSites
from dllm_sd.losses.sites import Revealed, TeacherTop
from dllm_sd.losses.supports import FullVocabulary, TopK
from dllm_sd.losses.targets import Barycenter, PurifiedPMI, Sampled
from dllm_sd.losses.trust import Equal, GroupAdvantage, ImportanceCap
from dllm_sd.method import Method
from dllm_sd.policies.weights import Checkpoint, Ema, Live
from dllm_sd.rollouts import All, Correct, Demonstrations, PassAtK
from dllm_sd.teachers import LaterStep, NoQuestion, Nothing, Reference, Sibling, Suffix


@dataclass(frozen=True)
class Row:
    """A named method: its parts, where it comes from, what to know."""

    method: Method
    source: str
    note: str


_GROUP = PassAtK(problems=32, attempts=8, keep="all", until_solved=False, temperature=1.0)
_OPSD = Method(
    rollout=PassAtK(problems=32, attempts=1, temperature=1.1, top_k=20, top_p=0.95),
    gate=All(),
    contexts=(Reference(),),
    divergence=ForwardKL(clip="entry"),
    temperature=1.1,
)
_SDPO = Method(
    rollout=_GROUP,
    gate=All(),
    contexts=(Sibling(overflow="cut"),),
    teacher=(Ema(0.95),),
    support=TopK(k=100, of="student", rest="bucket"),
    divergence=GeneralisedJSD(beta=0.5),
    trust=ImportanceCap(),
)
_OPD = Method(
    rollout=replace(_GROUP, problems=64, attempts=4),
    gate=All(),
    contexts=(Nothing(),),
    teacher=(Checkpoint(),),
    support=TopK(k=16, of="student", rest="keep"),
    divergence=PolicyGradient(),
)


METHODS: dict[str, Row] = {
    "d_opsd": Row(
        Method(contexts=(Suffix(),), sites=Revealed(), divergence=ReverseKL()),
        "arXiv 2606.18195, with the parts that its ablations and our tests support",
        "Vetted default: pass@8, correct rollouts, every decoding step, later blocks at 25 %, the student's own sites, "
        "full vocabulary, reverse KL without clip, base weights, mean over all sites.",
    ),
    "d_opsd_paper": Row(
        Method(
            contexts=(Suffix(scope="all_masked"),),
            sites=TeacherTop(),
            divergence=ReverseKL(clip="token"),
            average="steps",
        ),
        "arXiv 2606.18195, Eq. 8 and 12, App. C",
        "Suffix drawn from all masked positions, sites chosen by the teacher's probability, pointwise clip 0.05 read "
        "as a bound on each site's divergence.",
    ),
    "d_opsd_reference": Row(
        Method(
            rollout=PassAtK(problems=4, passes=4),
            gate=Correct(count_rejected=True),
            canvases=DecoderSteps(last_block=False, last_state=False, remainder=False, prompt_ends=True),
            contexts=(Suffix(stop_at_end=True),),
            sites=TeacherTop(count=2, by="logit"),
            support=TopK(k=20),
            divergence=ReverseKL(clip="entry"),
            average="step_sums",
        ),
        "github.com/xingzhejun/d-OPSD, commit 1b55cf3",
        "The released code with its quirks: teacher's top-20 renormalised, clip per vocabulary entry (not a "
        "divergence), two sites by raw logit, later blocks with the end rule, last block never graded, temporal "
        "chunks as separate updates, failures in the denominator.",
    ),
    "later_step": Row(
        Method(gate=All(), rollout=PassAtK(attempts=1), contexts=(LaterStep(),)),
        "after arXiv 2607.04428",
        "The teacher reads a later step of the same trajectory; no label is used.",
    ),
    "sft": Row(
        Method(
            rollout=Demonstrations(),
            gate=All(),
            canvases=RandomMasks(),
            contexts=(),
            sites=AllMaskedSites(),
            target=Sampled(),
            divergence=TokenNLL(),
            average="canvases",
        ),
        "LLaDA, arXiv 2502.09992, Eq. 3 and Alg. 2",
        "Masked-diffusion cross-entropy with 1/t weights on the data set's references.",
    ),
    "rft": Row(
        Method(
            canvases=RandomMasks(draws=8),
            contexts=(),
            sites=AllMaskedSites(),
            target=Sampled(),
            divergence=TokenNLL(),
            average="canvases",
        ),
        "rejection fine-tuning (arXiv 2308.01825) with the loss of LLaDA",
        "Random masks on the model's own correct rollouts.",
    ),
    "rft_trajectory": Row(
        Method(contexts=(), target=Sampled(), divergence=TokenNLL()),
        "rejection fine-tuning on the decoder's canvases",
        "Hard labels on exactly the canvases and sites of d_opsd: the strong baseline.",
    ),
    "diffu_grpo": Row(
        Method(
            rollout=PassAtK(keep="all", until_solved=False),
            gate=All(),
            canvases=AllMasked(),
            contexts=(Nothing(),),
            sites=AllMaskedSites(),
            target=Sampled(),
            divergence=TokenNLL(),
            trust=GroupAdvantage(normalise=False, kl=0.04),
        ),
        "d1, arXiv 2504.12216, Sec. 3.2 and github.com/dllm-reasoning/d1",
        "Group advantage (not divided by its deviation, as the code does), one-step likelihood with 15 % of the prompt "
        "masked, KL to the base. Set rollout.passes above 1 for d1's reuse of rollouts (add a snapshot context).",
    ),
    "d_opsd_prompt": Row(
        Method(contexts=(Reference(),)),
        "the prompt-conditioned comparison of arXiv 2606.18195",
        "d_opsd with the data's reference in the teacher's prompt instead of an answer on the canvas.",
    ),
    "d_opsd_pmi": Row(
        Method(
            contexts=(Suffix(), Suffix(prompt=NoQuestion()), Nothing()),
            target=PurifiedPMI(),
            divergence=GeneralisedJSD(beta=0.5),
        ),
        "d_opsd with the target of arXiv 2607.02234, Eq. 5 to 8; unpublished",
        "Purified suffix teacher: what the suffix says only together with the question, added to the base.",
    ),
    "d_demo_psd": Row(
        Method(contexts=(Suffix(), Nothing()), teacher=(Ema(0.95),), target=Barycenter()),
        "d_opsd with the target of arXiv 2607.02502, Eq. 7 to 9; unpublished",
        "Barycenter of the suffix teacher and the plain student, both with averaged weights.",
    ),
    "opsd": Row(
        _OPSD,
        "OPSD, arXiv 2601.18734 v3, Table 3, and its script",
        "Reference in the prompt, initial weights, forward KL clipped per vocabulary entry at 0.05 (not a divergence: "
        "the clipped sum may be negative). One temperature of 1.1 for rollouts, student and teacher, as in the code.",
    ),
    "opsd_paper": Row(
        replace(_OPSD, divergence=ReverseKL(), temperature=1.0),
        "OPSD, arXiv 2601.18734, the text's reverse KL",
        "Reverse KL over the whole vocabulary without a clip.",
    ),
    "opsd_reference": Row(
        replace(_OPSD, divergence=GeneralisedJSD(beta=0.5)),
        "github.com/siyan-zhao/OPSD, commit 590ec26",
        "The released snapshot, older than v3: JSD 0.5 without a clip.",
    ),
    "opsd_pmi": Row(
        replace(
            _OPSD,
            contexts=(Reference(), Reference(question=False), Nothing()),
            target=PurifiedPMI(),
            divergence=GeneralisedJSD(beta=0.5),
        ),
        "Purified OPSD, arXiv 2607.02234, Eq. 5 to 18",
        "Three frozen views: informed, reference without question, plain. Not stated by the paper and taken from OPSD: "
        "sampling, one temperature of 1.1, prompts; the weight 0.5 of the JSD comes from a re-implementation.",
    ),
    "sdpo": Row(
        _SDPO,
        "github.com/lasgroup/SDPO, commit 0e6d510, its science settings; arXiv 2601.20802",
        "First successful sibling in the prompt, never the rollout itself; EMA 0.05; student's top-100 with a tail "
        "bucket; JSD 0.5; importance cap 2. Rollouts without a successful sibling are left out. No environment "
        "feedback.",
    ),
    "sdpo_paper": Row(
        replace(_SDPO, teacher=(Live(),), support=FullVocabulary(), divergence=ReverseKL(), trust=Equal()),
        "SDPO, arXiv 2601.20802, its objective",
        "KL(student || the same weights with the hint) over the whole vocabulary.",
    ),
    "demo_psd": Row(
        replace(
            _SDPO,
            rollout=replace(_GROUP, problems=64),
            contexts=(Sibling(own=True, choice="random", overflow="cut"), Nothing()),
            target=Barycenter(),
            divergence=ReverseKL(),
        ),
        "DemoPSD, arXiv 2607.02502, Eq. 7 to 12, App. B",
        "Barycenter of the informed and the plain EMA student on the student's top-100 and a bucket. The paper tunes "
        "beta for each domain (25 to 100); 50 is the re-implementations'. Whether a lone success may be its own "
        "demonstration is not stated; here it may.",
    ),
    "opd": Row(
        _OPD,
        "on-policy distillation as in arXiv 2605.31490, Eq. 6, and github.com/thunlp/OPD, commit 0a44395",
        "Another checkpoint (method.teacher.0.path) as teacher; policy gradient on the student's 16 most probable "
        "tokens. The logged loss is that of the surrogate.",
    ),
    "opd_sampled": Row(
        replace(_OPD, support=FullVocabulary(), divergence=PolicyGradient(tokens="sampled")),
        "on-policy distillation, arXiv 2605.31490, Eq. 6",
        "The same with the sampled token alone.",
    ),
    "topd": Row(
        replace(_OPD, rollout=replace(_OPD.rollout, horizon=Truncated(ratio=0.1))),
        "TOPD, arXiv 2605.31490, Eq. 12",
        "opd on the first tenth of each completion; the other tenths are never generated.",
    ),
    "popd": Row(
        replace(_OPD, rollout=replace(_OPD.rollout, horizon=Progressive(start=1382, step=9))),
        "POPD, arXiv 2605.31490, Eq. 10 and 11, App. B",
        "opd with 9 tokens more at every update. The start is not stated; 1382 of 15360 tokens is inferred from the "
        "paper's times.",
    ),
    "grpo": Row(
        Method(
            rollout=_GROUP,
            gate=All(),
            contexts=(Nothing(),),
            target=Sampled(),
            divergence=TokenNLL(),
            trust=GroupAdvantage(ratio_clip=0.2, kl=0.04),
        ),
        "GRPO, arXiv 2402.03300",
        "Group advantage on the likelihood of each token where it was chosen, KL to the base. On masked diffusion that "
        "is the likelihood along the decoder's own path.",
    ),
}
