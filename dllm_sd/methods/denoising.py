"""Methods whose teacher reads another canvas: d-OPSD and its variants, on masked diffusion."""

from dllm_sd.canvases import DecoderSteps
from dllm_sd.losses.divergences import GeneralisedJSD, ReverseKL
from dllm_sd.losses.sites import Revealed, TeacherTop
from dllm_sd.losses.supports import TopK
from dllm_sd.losses.targets import Barycenter, PurifiedPMI
from dllm_sd.methods.method import Method
from dllm_sd.methods.named_method import NamedMethod
from dllm_sd.policies.weights import EmaWeights
from dllm_sd.rollouts.gates import All, Correct
from dllm_sd.rollouts.rules import PassAtK
from dllm_sd.teachers import (
    Critique,
    LaterStep,
    NoQuestion,
    Nothing,
    Reference,
    Rubric,
    Suffix,
)

DENOISING: dict[str, NamedMethod] = {
    "d_opsd": NamedMethod(
        Method(contexts=(Suffix(),), sites=Revealed(), divergence=ReverseKL()),
        "arXiv 2606.18195, with the parts that its ablations and our tests support",
        "The recommended default. It makes up to eight attempts at a problem and trains on correct rollouts, "
        "at every decoding step. The teacher sees 25 % of the positions of later blocks. The loss is the "
        "reverse KL divergence on the full vocabulary, without a clip, at the positions that the student "
        "revealed, as a mean over all sites; the teacher has the initial weights.",
        parent=None,
    ),
    "d_opsd_paper": NamedMethod(
        Method(
            canvases=DecoderSteps(end_padding=True),
            contexts=(Suffix(scope="all_masked"),),
            sites=TeacherTop(),
            divergence=ReverseKL(clip="entry"),
            average="steps",
        ),
        "arXiv 2606.18195, Eq. 8 and 12, App. C",
        "The suffix is drawn from all masked positions, and sites are chosen by the teacher's probability, "
        "also behind the end of the answer, since the sizes of K_t sum to the length of the canvas. Each "
        "entry of the vocabulary is clipped at 0.05. The clipped sum is not a divergence: it can be negative, "
        "and its minimum is not at the teacher; at a learning rate of 3e-4 it collapses on the tiny model. "
        "method.divergence.clip=token, which is not in the paper, clips the divergence of each site instead; "
        "a site above the limit then has no gradient.",
    ),
    "d_opsd_reference": NamedMethod(
        Method(
            rollout=PassAtK(problems=4, passes=4),
            gate=Correct(count_rejected=True),
            canvases=DecoderSteps(
                last_block=False, last_state=False, remainder=False, prompt_ends=True, end_padding=True
            ),
            contexts=(Suffix(stop_at_end=True),),
            sites=TeacherTop(count=2, by="logit"),
            support=TopK(k=20),
            divergence=ReverseKL(clip="entry"),
            average="step_sums",
        ),
        "github.com/xingzhejun/d-OPSD, commit 1b55cf3",
        "The released code with its quirks: the teacher's top 20 renormalised; a clip per vocabulary entry, "
        "which is not a divergence; two sites a step, by raw logit; later blocks with the end rule; the last "
        "block is never graded; temporal chunks are separate updates; failures count in the denominator; "
        "padding behind the end is graded.",
    ),
    "later_step": NamedMethod(
        Method(gate=All(), rollout=PassAtK(attempts=1), contexts=(LaterStep(),)),
        "after arXiv 2607.04428",
        "The teacher reads a later step of the same trajectory. No label is used.",
    ),
    "d_opsd_prompt": NamedMethod(
        Method(contexts=(Reference(),)),
        "the prompt-conditioned comparison of arXiv 2606.18195",
        "d_opsd, where the teacher reads the reference of the data in its prompt instead of a part of the "
        "answer on the canvas.",
    ),
    "d_opsd_pmi": NamedMethod(
        Method(
            contexts=(Suffix(), Suffix(prompt=NoQuestion()), Nothing()),
            target=PurifiedPMI(),
            divergence=GeneralisedJSD(beta=0.5),
        ),
        "d_opsd with the target of arXiv 2607.02234, Eq. 5 to 8; unpublished",
        "A purified suffix teacher: what the suffix adds only together with the question is added to the base "
        "distribution.",
    ),
    "d_demo_psd": NamedMethod(
        Method(contexts=(Suffix(), Nothing()), teacher=(EmaWeights(0.95),), target=Barycenter()),
        "d_opsd with the target of arXiv 2607.02502, Eq. 7 to 9; unpublished",
        "The target is the barycenter of the suffix teacher and the plain student, both with EMA weights.",
    ),
    "d_rcsd": NamedMethod(
        Method(contexts=(Suffix(prompt=Rubric(source="data")),)),
        "d_opsd with the context of arXiv 2606.19327; unpublished",
        "The teacher reads the rubric of the data in its prompt, together with the suffix.",
    ),
    "d_step_align": NamedMethod(
        Method(gate=All(), contexts=(Critique(),)),
        "d_opsd with the context of arXiv 2606.11173; unpublished",
        "The teacher reads a critique of the rollout in its prompt instead of a suffix, for correct and wrong "
        "rollouts.",
    ),
}
