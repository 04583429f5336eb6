"""Methods whose teacher reads a written text: rubrics, critiques, skills, feedback."""

from dataclasses import replace

from dllm_sd.canvases import AllMaskedCanvas
from dllm_sd.losses.divergences import ForwardKL
from dllm_sd.losses.gap import GatedGap
from dllm_sd.losses.sites import AllMaskedSites
from dllm_sd.losses.supports import TopK
from dllm_sd.losses.targets import Each
from dllm_sd.losses.trust import OutcomeValidated
from dllm_sd.methods.method import Method
from dllm_sd.methods.named_method import OPSD, RCSD, SDPO, NamedMethod
from dllm_sd.policies.weights import LiveWeights, PeerWeights
from dllm_sd.rollouts.gates import All
from dllm_sd.rollouts.rules import PassAtK
from dllm_sd.teachers import (
    Critique,
    Feedback,
    Reasoning,
    Reference,
    Rubric,
    SkillBankConfig,
    Skills,
)
from dllm_sd.teachers.writing import Writing
from dllm_sd.texts.rubric import RUBRIC_GOLD, RUBRIC_TEACHER_REFERENCE
from dllm_sd.writers import Sampling

WRITTEN: dict[str, NamedMethod] = {
    "rcsd_writer": NamedMethod(
        replace(RCSD, contexts=(Reference(template=RUBRIC_GOLD),)),
        "RCSD, arXiv 2606.19327, Eq. 4, and github.com/carriegu0818/RCSD, commit 521b538",
        "Stage I: the model learns to write rubrics, from a teacher that reads the rubric of the data. The "
        "task asks for a rubric and has one as its reference. Whether the student reads the reference answer "
        "is set by task.prompt: in the paper it does not, in the code it does.",
        parent="opsd",
    ),
    "rcsd": NamedMethod(
        replace(RCSD, contexts=(Rubric(writing=Writing(sampling=Sampling(temperature=0.7, top_p=0.95))),)),
        "RCSD, arXiv 2606.19327, Eq. 5",
        "Stage II: the teacher reads a rubric that a writer makes from the question alone; name the "
        "checkpoint of Stage I in method.contexts.0.writing.writer. The loss is the forward KL divergence to "
        "the initial weights.",
        parent="rcsd_writer",
    ),
    "rcsd_reference": NamedMethod(
        replace(
            RCSD,
            contexts=(
                Rubric(
                    source="data",
                    reference=True,
                    template=RUBRIC_TEACHER_REFERENCE,
                    reasoning=Reasoning(length=4096, temperature=1.2),
                ),
            ),
            support=TopK(k=20),
            divergence=ForwardKL(clip="entry"),
        ),
        "github.com/carriegu0818/RCSD, commit f2035f8",
        "The released Stage II: the teacher reads the rubric of the data and the reference answer, and writes "
        "an analysis first; the teacher's top 20, with a clip per entry. Here the teacher writes the "
        "analysis; in the code, with vLLM, the student's weights do.",
        parent="rcsd_writer",
    ),
    "step_align": NamedMethod(
        replace(OPSD, contexts=(Critique(),), divergence=ForwardKL()),
        "step-aligned critique, arXiv 2606.11173, Eq. 3",
        "The teacher reads the steps of the rollout, corrected from the first wrong step on. A critic writes "
        "this correction; it has 32B weights in the paper, which does not publish its prompts. Sampling is as "
        "in OPSD.",
        parent="opsd",
    ),
    "sgsd": NamedMethod(
        Method(
            rollout=PassAtK(problems=16, attempts=1, temperature=1.1, top_k=20, top_p=0.95),
            gate=All(),
            canvases=AllMaskedCanvas(prompt_mask_ratio=0.0),
            contexts=tuple(Skills(rank=rank) for rank in range(8)),
            teacher=(LiveWeights(),),
            sites=AllMaskedSites(content=True),
            target=Each(),
            divergence=GatedGap(),
            trust=OutcomeValidated(),
            average="rollouts",
            skill_bank=SkillBankConfig(writing=Writing(sampling=Sampling(length=4096)), renewal=Sampling(length=2048)),
        ),
        "SGSD, arXiv 2605.28791, and github.com/walawalagoose/SGSD, commit f296a91",
        "Eight teachers, each with one skill and one mistake from a bank in its prompt; the outcome of a "
        "rollout sets the sign of each teacher's weight. Retrieval reads the whole prompt; in the code it "
        "reads the problem alone (set method.skill_bank.problem). On masked diffusion the gap is computed on "
        "the fully masked canvas.",
    ),
    "op_co_distill": NamedMethod(
        replace(
            SDPO,
            contexts=(
                Feedback(
                    at_least=0.5,
                    overflow="cut",
                    writing=Writing(
                        writer=PeerWeights(), sampling=Sampling(length=1024, temperature=1.0), tolerance=1.0
                    ),
                ),
            ),
        ),
        "OPCoD, arXiv 2606.14368, Eq. 1 and 2, Algorithm 1, on the loss of SDPO",
        "Two students that take turns (peers). Each is its own teacher, which reads a successful sibling and "
        "the feedback of the other, frozen student on the rollout. Where feedback is dropped, the sibling is "
        "left.",
        parent="sdpo",
    ),
}
