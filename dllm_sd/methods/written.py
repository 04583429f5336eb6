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
        "Stage I: the model learns to write rubrics; the teacher reads the data's. The task asks for a rubric and has "
        "one as reference. Whether the student reads the reference answer is a matter of task.prompt: not in the "
        "paper, in the code it does.",
        parent="opsd",
    ),
    "rcsd": NamedMethod(
        replace(RCSD, contexts=(Rubric(writing=Writing(sampling=Sampling(temperature=0.7, top_p=0.95))),)),
        "RCSD, arXiv 2606.19327, Eq. 5",
        "Stage II: the teacher reads a rubric that a writer makes of the question alone; name Stage I's checkpoint in "
        "method.contexts.0.writing.writer. Forward KL to the initial weights.",
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
        "The released Stage II: the data's rubric and the reference answer, an analysis first, teacher's top-20, clip "
        "per entry. Here the teacher writes its own analysis; there, with vLLM, the student's weights did.",
        parent="rcsd_writer",
    ),
    "step_align": NamedMethod(
        replace(OPSD, contexts=(Critique(),), divergence=ForwardKL()),
        "step-aligned critique, arXiv 2606.11173, Eq. 3",
        "The teacher reads the rollout's own steps, corrected from the first wrong one on; a critic writes them (32B "
        "in the paper, which left its prompts unpublished). Sampling as in OPSD.",
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
        "Eight teachers, each with a skill and a mistake from a bank in its prompt; the outcome of a rollout sets "
        "the sign of each teacher's weight. Retrieval reads the whole prompt, in the code the bare problem "
        "(set method.skill_bank.problem). On masked diffusion the gap is that of the all-masked canvas.",
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
        "Two students in rounds (peers): each is its own teacher, which reads a successful sibling and what the other "
        "student, frozen, says of the rollout. Dropped feedback leaves the sibling.",
        parent="sdpo",
    ),
}
