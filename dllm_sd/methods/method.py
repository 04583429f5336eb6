"""A method: one choice of part for every slot, and which choices have a meaning together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from dllm_sd.canvases import CANVASES, AllMasked, DecoderSteps, RandomMasks
from dllm_sd.errors import InputError
from dllm_sd.losses.divergences import (
    DIVERGENCES,
    ForwardKL,
    GatedGap,
    GeneralisedJSD,
    PolicyGradient,
    ReverseKL,
    TokenNLL,
)
from dllm_sd.losses.roles import ReadsPolicies, Role
from dllm_sd.losses.sites import SITES, Revealed, TeacherTop
from dllm_sd.losses.sites import AllMasked as AllMaskedSites
from dllm_sd.losses.supports import SUPPORTS, FullVocabulary, TopK
from dllm_sd.losses.targets import TARGETS, Barycenter, Each, Plain, PurifiedPMI, Sampled
from dllm_sd.losses.trust import TRUSTS, Equal, GroupAdvantage, ImportanceCap, OutcomeValidated
from dllm_sd.policies.weights import WEIGHTS, Base, Weights
from dllm_sd.ranges import Range, Ranged
from dllm_sd.rollouts.rules import GATES, ROLLOUTS, All, Correct, Demonstrations, Mixed, PassAtK, Score
from dllm_sd.teachers import CONTEXTS, AnyContext, LaterStep, SkillBankConfig, Skills, Suffix
from dllm_sd.teachers.writing import Writing
from dllm_sd.writers import Server

Average = Literal["sites", "canvases", "steps", "step_sums", "rollouts"]


def _slot(table: Mapping[str, type], default: Callable[[], Any]) -> Any:
    """A field whose value is a part of ``table`` (or a tuple of such parts)."""
    return field(default_factory=default, metadata={"parts": table})


@dataclass(frozen=True)
class Method(Ranged, key="method"):
    """One part per slot (see docs/concepts.md for the question that each slot answers)."""

    rollout: PassAtK | Demonstrations = _slot(ROLLOUTS, PassAtK)
    gate: All | Correct | Score | Mixed = _slot(GATES, Correct)
    canvases: DecoderSteps | RandomMasks | AllMasked = _slot(CANVASES, DecoderSteps)
    contexts: tuple[AnyContext, ...] = _slot(CONTEXTS, lambda: (Suffix(),))
    teacher: tuple[Weights, ...] = _slot(WEIGHTS, lambda: (Base(),))
    """One for all contexts, or one for each."""
    sites: Revealed | AllMaskedSites | TeacherTop = _slot(SITES, Revealed)
    support: FullVocabulary | TopK = _slot(SUPPORTS, FullVocabulary)
    target: Plain | PurifiedPMI | Barycenter | Each | Sampled = _slot(TARGETS, Plain)
    divergence: ForwardKL | ReverseKL | GeneralisedJSD | TokenNLL | PolicyGradient | GatedGap = _slot(
        DIVERGENCES, ReverseKL
    )
    trust: Equal | GroupAdvantage | ImportanceCap | OutcomeValidated = _slot(TRUSTS, Equal)
    library: SkillBankConfig | None = None
    """The bank that `skills` contexts draw on."""
    temperature: Annotated[float, Range(least=0.001, most=1000)] = 1.0
    """Softmax temperature of student and teachers in the loss."""
    average: Average = "sites"
    """What the loss is a mean over, counted over the whole update and all processes: `sites`; `canvases`, the
    sum over a canvas's sites (whose random masks weigh 1/t and the answer's length); `steps`, Eq. 12 of arXiv
    2606.18195 (sites of a step, steps of a rollout, rollouts); `step_sums`, the same without the mean over a step's
    sites (released d-OPSD, "batchmean"); `rollouts` (sites of a rollout, rollouts)."""

    def __post_init__(self) -> None:
        """Refuse combinations that have no meaning."""
        super().__post_init__()
        checks = (
            _check_contexts,
            _check_library,
            _check_sites,
            _check_prompt,
            _check_target,
            _check_divergence,
            _check_gap,
        )
        for check in (*checks, _check_outcome, _check_group, _check_cap, _check_roles, _check_student):
            check(self)

    @property
    def measured(self) -> tuple[str, ...]:
        """What target and trust log about themselves, by name."""
        return (*self.target.measured, *self.trust.measured)

    def weights(self) -> tuple[Weights, ...]:
        """One set of teacher weights for each context."""
        return self.teacher * len(self.contexts) if len(self.teacher) == 1 else self.teacher

    def models(self) -> tuple[Weights, ...]:
        """All weights that the run needs beside the student's: those of teachers, then of writers; each once."""
        local: list[Weights] = [one.writer for one in self.writings if not isinstance(one.writer, Server)]
        rolling = [] if self.rolling is None else [self.rolling]
        return tuple(dict.fromkeys([*self.weights(), *local, *rolling]))

    @property
    def rolling(self) -> Base | None:
        """The weights that make rollouts in the place of the student's; those of a subspace are the initial ones."""
        return None if isinstance(self.rollout, Demonstrations) else self.rollout.rolling

    @property
    def writings(self) -> list[Writing]:
        """What is written for hints and for the bank of skills."""
        found = [context.hint.writing for context in self.contexts if context.hint is not None]
        found += [self.library.writing] if self.library is not None and self.library.needs_writer else []
        return [writing for writing in found if writing is not None]


def _check_contexts(method: Method) -> None:
    contexts = method.contexts
    if len(method.teacher) not in (1, len(contexts)):
        raise InputError(
            f"method.teacher lists {len(method.teacher)} weights for {len(contexts)} contexts; "
            f"give one for all{', or one for each' if contexts else ''}"
        )
    if not isinstance(method.canvases, DecoderSteps) and any(context.needs_steps for context in contexts):
        raise InputError("method.contexts needs canvases that the decoder saw; set method.canvases to decoder_steps")
    grouped = any(context.hint is not None and context.hint.needs_group for context in contexts)
    if grouped and not method.rollout.keeps_groups:
        raise InputError(
            "method.contexts sibling looks at the other attempts: set rollout.keep to all, attempts to 2 or more"
        )


def _check_library(method: Method) -> None:
    ranks = sorted(context.hint.rank for context in method.contexts if isinstance(context.hint, Skills))
    if ranks and (method.library is None or ranks != list(range(method.library.count))):
        raise InputError(
            "method.contexts must list a skills context for each rank from 0 on, as many as method.library.count says; "
            "set method.library, or list as many"
        )
    if not ranks and method.library is not None:
        raise InputError("method.library serves skills contexts, but there is none; list some, or set it to null")
    if ranks and not method.target.keeps_contexts:
        raise InputError("method.contexts skills are teachers of different weight; set method.target to each")


def _check_sites(method: Method) -> None:
    if method.sites.score is None:
        return
    if not method.contexts:
        raise InputError("method.sites asks a teacher, but method.contexts is empty; add a context or use revealed")
    for context in method.contexts:
        everything = isinstance(context, Suffix) and context.scope != "later_blocks" and context.ratio == 1
        everything |= isinstance(context, LaterStep) and context.ahead is None
        if everything:
            raise InputError("method.contexts reveals the whole active block, so the teacher can choose no site there")


def _check_prompt(method: Method) -> None:
    if not method.sites.prompt:
        return
    plain = isinstance(method.divergence, TokenNLL) and isinstance(method.trust, Equal) and not method.contexts
    if not plain or not isinstance(method.canvases, DecoderSteps):
        raise InputError(
            "method.sites.prompt trains on the prompt as on the text, which is for cross-entropy alone; set "
            "method.divergence to token_nll, contexts to [], trust to equal and canvases to decoder_steps, or leave it "
            "out"
        )


def _check_target(method: Method) -> None:
    target, count = method.target, len(method.contexts)
    if isinstance(target, Each) and not count:
        raise InputError("method.target each distils every teacher, but method.contexts is empty; add a context")
    if target.contexts is not None and count != target.contexts:
        name = _name(TARGETS, target)
        raise InputError(
            f"method.target {name} is made of {target.contexts} teachers, but method.contexts lists {count}; list "
            f"{target.contexts}, or use target each, or sampled for likelihood losses"
        )
    if isinstance(target, PurifiedPMI) and not isinstance(method.support, FullVocabulary):
        raise InputError("method.target pmi centres over the whole vocabulary; set method.support to full")
    if isinstance(method.support, TopK) and method.support.of == "rollout" and count < 2:
        raise InputError("method.support.of rollout reads the last of several contexts; add a snapshot context")


def _check_divergence(method: Method) -> None:
    divergence, support, target = method.divergence, method.support, method.target
    full, kept = isinstance(support, FullVocabulary), isinstance(support, TopK) and support.rest == "keep"
    if isinstance(divergence, TokenNLL) and not full:
        raise InputError("method.divergence token_nll reads one token of the vocabulary; set method.support to full")
    if isinstance(divergence, TokenNLL) != isinstance(target, Sampled):
        raise InputError("method.target sampled and method.divergence token_nll belong together; set both or neither")
    if isinstance(target, Sampled) and not isinstance(method.trust, GroupAdvantage) and method.contexts:
        raise InputError("method.target sampled without group advantage asks no teacher; set method.contexts to []")
    if kept != (isinstance(divergence, PolicyGradient) and divergence.tokens == "support" and not full):
        raise InputError(
            "method.support.rest keep leaves no distribution and is for divergence policy_gradient, which needs it; "
            "set both or neither"
        )
    if isinstance(divergence, PolicyGradient):
        if divergence.tokens == "sampled" and not full:
            raise InputError("method.divergence.tokens sampled reads any token; set method.support to full")
        if len(method.contexts) > 2 or isinstance(target, PurifiedPMI | Barycenter):
            raise InputError(
                "method.divergence policy_gradient reads the teacher, and the rollouts' policy if there is a second "
                "context; set method.target to plain or each"
            )


def _check_gap(method: Method) -> None:
    divergence, trust = method.divergence, method.trust
    if not isinstance(divergence, GatedGap) and not isinstance(trust, OutcomeValidated):
        return
    if not isinstance(method.support, FullVocabulary) or not method.target.keeps_contexts or not method.contexts:
        raise InputError(
            "method.divergence gated_gap and method.trust outcome_validated read one token of each teacher; set "
            "method.support to full, and method.target to each (plain for one context)"
        )
    if isinstance(divergence, GatedGap) and isinstance(trust, OutcomeValidated) and divergence.local != trust.local:
        raise InputError("method.divergence.local and method.trust.local differ; set both to the same")


def _check_outcome(method: Method) -> None:
    """Refuse parts that ask whether a rollout is right where a horizon cuts it: nearly none would be."""
    if not method.rollout.cuts:
        return
    gate, trust, hints = method.gate, method.trust, [context.hint for context in method.contexts]
    cut = "whose outcome nobody knows under a horizon that cuts it"
    whole = "or method.rollout.horizon to complete"
    if gate.needs_outcome:
        raise InputError(
            f"method.gate {_name(GATES, gate)} asks for the outcome of a rollout, {cut}: every update would be "
            f"skipped; set method.gate to all, {whole}"
        )
    if method.rollout.needs_outcome:
        raise InputError(
            f"method.rollout tries or chooses by the outcome of a rollout, {cut}; set method.rollout.attempts to 1, "
            f"{whole}"
        )
    if trust.needs_outcome:
        raise InputError(
            f"method.trust {_name(TRUSTS, trust)} weights by the outcome of a rollout, {cut}; set method.trust to "
            f"equal, {whole}"
        )
    if any(hint is not None and hint.needs_outcome for hint in hints):
        raise InputError(
            f"method.contexts shows a successful sibling of a rollout, {cut}; set method.contexts to one that does "
            f"not, such as reference, {whole}"
        )


def _check_group(method: Method) -> None:
    trust, rollout, contexts = method.trust, method.rollout, method.contexts
    if isinstance(method.canvases, DecoderSteps) and isinstance(rollout, Demonstrations):
        raise InputError("demonstrations were never decoded step by step; set method.canvases to random_masks")
    if method.gate.count_rejected and method.average in ("sites", "canvases"):
        raise InputError(
            f"method.gate.count_rejected has no meaning under average {method.average}, which counts no rollouts; "
            "set method.average to steps, step_sums or rollouts"
        )
    if isinstance(trust, GroupAdvantage) and not isinstance(method.divergence, TokenNLL):
        raise InputError("method.trust group_advantage weights token likelihoods; use divergence token_nll")
    for slot, table in (("gate", GATES), ("trust", TRUSTS)):
        part = getattr(method, slot)
        if part.needs_group and not rollout.keeps_groups:
            raise InputError(
                f"method.{slot} {_name(table, part)} compares a group: rollout.keep all, attempts 2 or more"
            )
    if trust.needs_group and not method.gate.mixes:
        raise InputError(
            f"method.trust {_name(TRUSTS, trust)} compares good and bad rollouts; set method.gate to all or mixed"
        )
    if not isinstance(trust, GroupAdvantage):
        return
    wanted = (trust.kl > 0) + (rollout.passes > 1)
    if len(contexts) != wanted:
        raise InputError(
            f"method.trust group_advantage needs {wanted} contexts here (base weights if kl > 0, a snapshot "
            f"every {rollout.passes} updates if rollouts serve several passes), not {len(contexts)}"
        )


def _check_cap(method: Method) -> None:
    if not method.trust.needs_old_logp:
        return
    rollout = method.rollout
    if not isinstance(rollout, PassAtK) or rollout.temperature != method.temperature:
        raise InputError(
            "method.trust importance_cap compares with the probabilities of the rollouts: set "
            "method.rollout.temperature and method.temperature to the same value"
        )
    if not isinstance(method.canvases, DecoderSteps) or not isinstance(method.sites, Revealed):
        raise InputError(
            "method.trust importance_cap compares each token where the decoder chose it; set method.canvases to "
            "decoder_steps and method.sites to revealed"
        )


def _other_policies(method: Method) -> list[tuple[str, int, Role]]:
    """The contexts that a part of the loss takes for no teacher: the part's slot, the number, the role."""
    found: list[tuple[str, int, Role]] = []
    for slot in ("support", "divergence", "trust"):
        part = getattr(method, slot)
        if isinstance(part, ReadsPolicies):
            for i, role in enumerate(part.roles(len(method.contexts), method.rollout.passes)):
                if role != "teacher":
                    found.append((slot, i, role))
    return found


def _check_roles(method: Method) -> None:
    """Refuse contexts that cannot be what a part of the loss takes them for."""
    rollout, teachers = method.rollout, method.weights()
    for slot, i, role in _other_policies(method):
        what = "the reference policy" if role == "reference" else "the policy that made the rollouts"
        if not method.contexts[i].same_view(method.sites.covers):
            raise InputError(
                f"method.{slot} takes context {i} for {what}, which reads what the student reads; set "
                f"method.contexts.{i} to nothing"
            )
        if role == "reference" and teachers[i].is_student:
            raise InputError(
                f"method.{slot} takes teacher {i} for {what}, but it is the student; set method.teacher.{i} to base"
            )
        if role == "rollouts" and not teachers[i].is_rollout_policy(rollout.policy, rollout.passes):
            remedy = "nobody made demonstrations, so leave that context out"
            if rollout.decodes:
                other = "" if method.rolling is None else " and method.rollout.policy to live"
                remedy = f"set method.teacher.{i} to a snapshot with every {rollout.passes}{other}"
            raise InputError(f"method.{slot} takes teacher {i} for {what}, which it is not; {remedy}")


def _check_student(method: Method) -> None:
    """Refuse teachers from which nothing can be learnt, since they say what the student says."""
    support, others = method.support, {i for _, i, _ in _other_policies(method)}
    if isinstance(support, TopK) and support.k == 1 and support.rest == "renormalise":
        raise InputError(
            "method.support.k 1 with rest renormalise keeps one entry, which all then give the probability 1; set k to "
            "2 or more, or rest to bucket"
        )
    teachers = [x for i, x in enumerate(zip(method.contexts, method.weights(), strict=True)) if i not in others]
    if teachers and all(weights.is_student and context.same_view(method.sites.covers) for context, weights in teachers):
        raise InputError(
            "method.teacher is the student itself and method.contexts shows it nothing more, so there is nothing to "
            "learn; set method.contexts to one that adds something, or method.teacher to base"
        )


def _name(table: Mapping[str, type], part: object) -> str:
    """The name of a part in its table."""
    return next(name for name, kind in table.items() if kind is type(part))
