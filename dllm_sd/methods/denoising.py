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
        "Vetted default: pass@8, correct rollouts, every decoding step, later blocks at 25 %, the student's own sites, "
        "full vocabulary, reverse KL without clip, base weights, mean over all sites.",
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
        "Suffix drawn from all masked positions, sites chosen by the teacher's probability (behind the end too, since "
        "the sizes of K_t sum to the canvas's length), each entry of the vocabulary clipped at 0.05. That is no "
        "divergence: it can be negative, its minimum is not at the teacher, and at 3e-4 it collapses on the tiny "
        "model. method.divergence.clip=token, a variant of ours, bounds each site's divergence instead; a site beyond "
        "the bound then has no gradient.",
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
        "The released code with its quirks: teacher's top-20 renormalised, clip per vocabulary entry (not a "
        "divergence), two sites by raw logit, later blocks with the end rule, last block never graded, temporal "
        "chunks as separate updates, failures in the denominator, padding behind the end graded.",
    ),
    "later_step": NamedMethod(
        Method(gate=All(), rollout=PassAtK(attempts=1), contexts=(LaterStep(),)),
        "after arXiv 2607.04428",
        "The teacher reads a later step of the same trajectory; no label is used.",
    ),
    "d_opsd_prompt": NamedMethod(
        Method(contexts=(Reference(),)),
        "the prompt-conditioned comparison of arXiv 2606.18195",
        "d_opsd with the data's reference in the teacher's prompt instead of an answer on the canvas.",
    ),
    "d_opsd_pmi": NamedMethod(
        Method(
            contexts=(Suffix(), Suffix(prompt=NoQuestion()), Nothing()),
            target=PurifiedPMI(),
            divergence=GeneralisedJSD(beta=0.5),
        ),
        "d_opsd with the target of arXiv 2607.02234, Eq. 5 to 8; unpublished",
        "Purified suffix teacher: what the suffix says only together with the question, added to the base.",
    ),
    "d_demo_psd": NamedMethod(
        Method(contexts=(Suffix(), Nothing()), teacher=(EmaWeights(0.95),), target=Barycenter()),
        "d_opsd with the target of arXiv 2607.02502, Eq. 7 to 9; unpublished",
        "Barycenter of the suffix teacher and the plain student, both with averaged weights.",
    ),
    "d_rcsd": NamedMethod(
        Method(contexts=(Suffix(prompt=Rubric(source="data")),)),
        "d_opsd with the context of arXiv 2606.19327; unpublished",
        "The data's rubric in the teacher's prompt, together with the suffix.",
    ),
    "d_step_align": NamedMethod(
        Method(gate=All(), contexts=(Critique(),)),
        "d_opsd with the context of arXiv 2606.11173; unpublished",
        "A critique of the rollout in the teacher's prompt instead of a suffix, on right and wrong rollouts.",
    ),
}
