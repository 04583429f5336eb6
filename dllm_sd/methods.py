"""The table of named methods: each is one choice of part for every slot, and nothing else.

A new paper is a new part and a new row. The trainer never sees a name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dllm_sd.canvases import CANVASES, AllMasked, DecoderSteps, RandomMasks
from dllm_sd.errors import InputError
from dllm_sd.losses.divergences import DIVERGENCES, ForwardKL, GeneralisedJSD, ReverseKL, TokenNLL
from dllm_sd.losses.sites import SITES, Revealed, TeacherTop
from dllm_sd.losses.sites import AllMasked as AllMaskedSites
from dllm_sd.losses.supports import SUPPORTS, FullVocabulary, TopK
from dllm_sd.losses.targets import TARGETS, Each, Plain, Sampled
from dllm_sd.losses.trust import TRUSTS, Equal, GroupAdvantage
from dllm_sd.policies.weights import WEIGHTS, Base, Ema, Live, Snapshot
from dllm_sd.rollouts import GATES, ROLLOUTS, All, Correct, Demonstrations, Mixed, PassAtK, Score
from dllm_sd.teachers import CONTEXTS, LaterStep, Nothing, Suffix

Average = Literal["sites", "canvases", "steps", "step_sums", "rollouts"]


def _slot(table: Mapping[str, type], default: Callable[[], Any]) -> Any:
    """A field whose value is a part of ``table`` (or a tuple of such parts)."""
    return field(default_factory=default, metadata={"parts": table})


@dataclass(frozen=True)
class Method:
    """One part per slot (see docs/concepts.md for the question that each slot answers)."""

    rollout: PassAtK | Demonstrations = _slot(ROLLOUTS, PassAtK)
    gate: All | Correct | Score | Mixed = _slot(GATES, Correct)
    canvases: DecoderSteps | RandomMasks | AllMasked = _slot(CANVASES, DecoderSteps)
    contexts: tuple[Nothing | Suffix | LaterStep, ...] = _slot(CONTEXTS, lambda: (Suffix(),))
    teacher: tuple[Live | Base | Ema | Snapshot, ...] = _slot(WEIGHTS, lambda: (Base(),))
    """One for all contexts, or one for each."""
    sites: Revealed | AllMaskedSites | TeacherTop = _slot(SITES, Revealed)
    support: FullVocabulary | TopK = _slot(SUPPORTS, FullVocabulary)
    target: Plain | Each | Sampled = _slot(TARGETS, Plain)
    divergence: ForwardKL | ReverseKL | GeneralisedJSD | TokenNLL = _slot(DIVERGENCES, ReverseKL)
    trust: Equal | GroupAdvantage = _slot(TRUSTS, Equal)
    average: Average = "sites"
    """What the loss is a mean over, counted over the whole update and all processes: `sites`; `canvases`, the
    sum over a canvas's sites (whose random masks weigh 1/t and the answer's length); `steps`, Eq. 12 of arXiv
    2606.18195 (sites of a step, steps of a rollout, rollouts); `step_sums`, the same without the mean over a step's
    sites (released d-OPSD, "batchmean"); `rollouts` (sites of a rollout, rollouts)."""

    def __post_init__(self) -> None:
        """Refuse combinations that have no meaning."""
        if len(self.teacher) not in (1, len(self.contexts)) and self.contexts:
            raise InputError(
                f"method.teacher lists {len(self.teacher)} weights for {len(self.contexts)} contexts; "
                "give one for all, or one for each"
            )
        if not isinstance(self.canvases, DecoderSteps):
            for context in self.contexts:
                if context.needs_steps:
                    raise InputError(
                        "method.contexts needs canvases that the decoder saw; set method.canvases to decoder_steps"
                    )
        if isinstance(self.canvases, DecoderSteps) and isinstance(self.rollout, Demonstrations):
            raise InputError("demonstrations were never decoded step by step; set method.canvases to random_masks")
        if self.sites.score is not None and not self.contexts:
            raise InputError("method.sites asks a teacher, but method.contexts is empty; add a context or use revealed")
        if isinstance(self.target, Each) and not self.contexts:
            raise InputError("method.target each distils every teacher, but method.contexts is empty; add a context")
        if isinstance(self.target, Plain) and len(self.contexts) != 1:
            raise InputError(
                f"method.target plain distils one teacher, but method.contexts lists {len(self.contexts)}; "
                "use target each, or sampled for likelihood losses"
            )
        if isinstance(self.divergence, TokenNLL) and not isinstance(self.support, FullVocabulary):
            raise InputError(
                "method.divergence token_nll reads one token of the vocabulary; set method.support to full"
            )
        if isinstance(self.divergence, TokenNLL) != isinstance(self.target, Sampled):
            raise InputError(
                "method.target sampled and method.divergence token_nll belong together; set both or neither"
            )
        if isinstance(self.target, Sampled) and isinstance(self.trust, Equal) and self.contexts:
            raise InputError("method.target sampled with equal trust asks no teacher; set method.contexts to []")
        if self.gate.count_rejected and self.average in ("sites", "canvases"):
            raise InputError(
                f"method.gate.count_rejected has no meaning under average {self.average}, which counts no rollouts; "
                "set method.average to steps, step_sums or rollouts"
            )
        if isinstance(self.trust, GroupAdvantage):
            if not isinstance(self.divergence, TokenNLL):
                raise InputError("method.trust group_advantage weights token likelihoods; use divergence token_nll")
            if not isinstance(self.rollout, PassAtK) or self.rollout.keep != "all" or self.rollout.attempts < 2:
                raise InputError("method.trust group_advantage compares a group: rollout.keep all, attempts 2 or more")
            if isinstance(self.gate, Correct | Score):
                raise InputError("method.trust group_advantage compares good and bad rollouts; use gate all or mixed")
            wanted = (self.trust.kl > 0) + (self.rollout.passes > 1)
            if len(self.contexts) != wanted:
                raise InputError(
                    f"method.trust group_advantage needs {wanted} contexts here (base weights if kl > 0, a snapshot "
                    f"every {self.rollout.passes} updates if rollouts serve several passes), not {len(self.contexts)}"
                )
        for context in self.contexts:
            everything = isinstance(context, Suffix) and context.scope != "later_blocks" and context.ratio == 1
            everything |= isinstance(context, LaterStep) and context.ahead is None
            if everything and self.sites.score is not None:
                raise InputError(
                    "method.contexts reveals the whole active block, so the teacher can choose no site there"
                )

    def weights(self) -> tuple[Live | Base | Ema | Snapshot, ...]:
        """One set of teacher weights for each context."""
        return self.teacher * len(self.contexts) if len(self.teacher) == 1 else self.teacher


@dataclass(frozen=True)
class Row:
    """A named method: its parts, where it comes from, what to know."""

    method: Method
    source: str
    note: str


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
}
