"""A method: one part for each slot, and checks that the parts fit together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from dllm_sd.canvases import CANVASES, CanvasRule, DecoderSteps
from dllm_sd.errors import InputError
from dllm_sd.losses.divergences import DIVERGENCES, ReverseKL
from dllm_sd.losses.measured import Divergence
from dllm_sd.losses.roles import Role
from dllm_sd.losses.sites import SITES, Revealed, SiteRule
from dllm_sd.losses.supports import SUPPORTS, FullVocabulary, Support
from dllm_sd.losses.targets import TARGETS, Plain, Target
from dllm_sd.losses.trust import TRUSTS, Equal, Trust
from dllm_sd.parts import name_of, names_with
from dllm_sd.policies.teacher_weights import Weights
from dllm_sd.policies.weights import WEIGHTS, BaseWeights
from dllm_sd.ranges import Range, Ranged
from dllm_sd.rollouts.gates import GATES, Correct, Gate
from dllm_sd.rollouts.rules import ROLLOUTS, PassAtK, RolloutRule
from dllm_sd.teachers import CONTEXTS, Context, SkillBankConfig, Suffix
from dllm_sd.teachers.writing import Writing

Average = Literal["sites", "canvases", "steps", "step_sums", "rollouts"]


def _slot(table: Mapping[str, type], default: Callable[[], Any]) -> Any:
    """A field whose value is a part of ``table`` (or a tuple of such parts)."""
    return field(default_factory=default, metadata={"parts": table})


@dataclass(frozen=True)
class Method(Ranged, key="method"):
    """A method: one part for each slot (docs/concepts.md explains the slots).

    A slot takes any part of its table. The checks rely on what parts declare, never on their classes.
    """

    name: str | None = field(default=None, compare=False)
    """The named method that gives the parts and settings which are not set; None takes the default of each slot."""
    rollout: RolloutRule = _slot(ROLLOUTS, PassAtK)
    """How an update gets its rollouts: how many problems and attempts, and how they are sampled."""
    gate: Gate = _slot(GATES, Correct)
    """Which rollouts are trained on."""
    canvases: CanvasRule = _slot(CANVASES, DecoderSteps)
    """Which states of a rollout the student reads: the decoder's own steps, or random masks."""
    contexts: tuple[Context, ...] = _slot(CONTEXTS, lambda: (Suffix(),))
    """What each teacher sees beyond the student: later tokens of the rollout, or a hint in its prompt."""
    teacher: tuple[Weights, ...] = _slot(WEIGHTS, lambda: (BaseWeights(),))
    """The weights of the teachers: one for all contexts, or one for each."""
    sites: SiteRule = _slot(SITES, Revealed)
    """At which positions of a canvas the loss is computed."""
    support: Support = _slot(SUPPORTS, FullVocabulary)
    """On which entries of the vocabulary student and target are compared."""
    target: Target = _slot(TARGETS, Plain)
    """How the distributions of the teachers become the distribution that the student is to match."""
    divergence: Divergence = _slot(DIVERGENCES, ReverseKL)
    """The divergence between student and target, and its clip."""
    trust: Trust = _slot(TRUSTS, Equal)
    """The weight of each target and rollout in the loss."""
    skill_bank: SkillBankConfig | None = None
    """The bank from which `skills` contexts take their pairs."""
    temperature: Annotated[float, Range(least=0.001, most=1000)] = 1.0
    """Softmax temperature of student and teachers in the loss."""
    average: Average = "sites"
    """What the loss is a mean over, counted over the whole update and all processes: `sites`; `canvases`, the
    sum over a canvas's sites (whose random masks weigh 1/t and the answer's length); `steps`, Eq. 12 of arXiv
    2606.18195 (sites of a step, steps of a rollout, rollouts); `step_sums`, the same without the mean over a step's
    sites (released d-OPSD, "batchmean"); `rollouts` (sites of a rollout, rollouts)."""

    former_keys: ClassVar[Mapping[str, str]] = {"library": "method.skill_bank"}

    def __post_init__(self) -> None:
        """Refuse combinations that make no sense."""
        super().__post_init__()
        checks = (
            _check_contexts,
            _check_skill_bank,
            _check_sites,
            _check_prompt,
            _check_target,
            _check_divergence,
            _check_gap,
            _check_outcome,
            _check_group,
            _check_cap,
            _check_lag,
            _check_roles,
            _check_weights,
            _check_student,
            _check_penalty,
        )
        for check in checks:
            check(self)

    @property
    def measured(self) -> tuple[str, ...]:
        """The names of what target and trust log."""
        return (*self.target.measured, *self.trust.measured)

    def weights(self) -> tuple[Weights, ...]:
        """One set of teacher weights for each context."""
        return self.teacher * len(self.contexts) if len(self.teacher) == 1 else self.teacher

    def models(self) -> tuple[Weights, ...]:
        """All weights that the run needs besides the student's: of teachers, writers and rollouts; each once."""
        local = [weights for writing in self.writings if (weights := writing.writer.weights) is not None]
        rolling = [] if self.rolling is None else [self.rolling]
        return tuple(dict.fromkeys([*self.weights(), *local, *rolling]))

    def roles(self) -> tuple[Role, ...]:
        """The role of each context in the loss; a context that a part uses as another policy is no teacher."""
        others: dict[int, Role] = {i: role for _, i, role in _other_policies(self)}
        return tuple(others.get(i, "teacher") for i in range(len(self.contexts)))

    @property
    def imitates_other_weights(self) -> bool:
        """Whether it learns the tokens of rollouts that other weights than the student's write, as in SPD."""
        likelihood = not self.target.asks_teachers and not self.trust.weights_likelihoods
        return likelihood and self.rolling is not None

    @property
    def rolling(self) -> Weights | None:
        """The weights that decode rollouts instead of the student's (of a subspace, the initial ones)."""
        return self.rollout.rolling

    @property
    def writings(self) -> list[Writing]:
        """The writing settings of all hints and of the skill bank."""
        writings = [context.hint.writing for context in self.contexts if context.hint is not None]
        writings += [self.skill_bank.writing] if self.skill_bank is not None and self.skill_bank.needs_writer else []
        return [writing for writing in writings if writing is not None]


def _check_contexts(method: Method) -> None:
    contexts = method.contexts
    if len(method.teacher) not in (1, len(contexts)):
        raise InputError(
            f"method.teacher lists {len(method.teacher)} weights for {len(contexts)} contexts; "
            f"give one for all{', or one for each' if contexts else ''}"
        )
    if not method.canvases.decoded and any(context.needs_steps for context in contexts):
        raise InputError("method.contexts needs canvases that the decoder saw; set method.canvases to decoder_steps")
    grouped = any(context.hint is not None and context.hint.needs_group for context in contexts)
    if grouped and not method.rollout.keeps_groups:
        raise InputError(
            "method.contexts sibling looks at the other attempts: set rollout.keep to all, attempts to 2 or more"
        )


def _check_skill_bank(method: Method) -> None:
    hints = [context.hint for context in method.contexts if context.hint is not None]
    ranks = sorted(hint.skill_rank for hint in hints if hint.skill_rank is not None)
    if ranks and (method.skill_bank is None or ranks != list(range(method.skill_bank.count))):
        raise InputError(
            "method.contexts must list a skills context for each rank from 0 on, as many as method.skill_bank.count "
            "says; set method.skill_bank, or list as many"
        )
    if not ranks and method.skill_bank is not None:
        raise InputError("method.skill_bank serves skills contexts, but there is none; list some, or set it to null")
    if ranks and not method.target.keeps_contexts:
        raise InputError("method.contexts skills are teachers of different weight; set method.target to each")


def _check_sites(method: Method) -> None:
    if method.sites.score is None:
        return
    if not method.contexts:
        raise InputError("method.sites asks a teacher, but method.contexts is empty; add a context or use revealed")
    for context in method.contexts:
        if context.reveals_whole_block:
            raise InputError("method.contexts reveals the whole active block, so the teacher can choose no site there")


def _check_prompt(method: Method) -> None:
    if not method.sites.prompt:
        return
    trust = method.trust
    plain_trust = not (trust.needs_old_logp or trust.weights_likelihoods or trust.judges_each_teacher)
    if method.divergence.reads_target or method.contexts or not plain_trust or not method.canvases.decoded:
        raise InputError(
            "method.sites.prompt trains on the prompt as on the text, which is for cross-entropy alone; set "
            "method.divergence to token_nll, contexts to [], trust to equal and canvases to decoder_steps, or leave it "
            "out"
        )


def _check_target(method: Method) -> None:
    target, count = method.target, len(method.contexts)
    if target.asks_teachers and not count:
        raise InputError(
            f"method.contexts is empty, but method.target {name_of(TARGETS, target)} learns from a teacher; list a "
            "context, such as method.contexts=[reference], or choose a method without teachers, such as method=rft"
        )
    if target.contexts is not None and count != target.contexts:
        raise InputError(
            f"method.target {name_of(TARGETS, target)} is made of {target.contexts} teachers, but method.contexts "
            f"lists {count}; list {target.contexts}, or use target each, or sampled for likelihood losses"
        )
    if target.needs_full_vocabulary and not method.support.full_vocabulary:
        raise InputError(
            f"method.target {name_of(TARGETS, target)} centres over the whole vocabulary; set method.support to full"
        )
    if method.support.reads_rollout_policy and count < 2:
        raise InputError("method.support.of rollout reads the last of several contexts; add a snapshot context")


def _check_divergence(method: Method) -> None:
    divergence, target, full = method.divergence, method.target, method.support.full_vocabulary
    if not divergence.reads_target and not full:
        raise InputError(
            f"method.divergence {name_of(DIVERGENCES, divergence)} reads one token of the vocabulary; set "
            "method.support to full"
        )
    if divergence.reads_target != target.asks_teachers:
        likelihoods = " or ".join(names_with(DIVERGENCES, "reads_target", False))
        tokens = " or ".join(names_with(TARGETS, "asks_teachers", False))
        raise InputError(
            f"method.target {tokens} and method.divergence {likelihoods} belong together; set both or neither"
        )
    if not target.asks_teachers and not method.trust.weights_likelihoods and method.contexts:
        raise InputError(
            f"method.target {name_of(TARGETS, target)} without group advantage asks no teacher; set method.contexts to "
            "[]"
        )
    if method.support.normalised == (divergence.needs_unnormalised and not full):
        needing = name_of(DIVERGENCES, divergence) if divergence.needs_unnormalised else "policy_gradient"
        raise InputError(
            f"method.support.rest keep leaves no distribution and is for divergence {needing}, which needs it; "
            "set both or neither"
        )
    if divergence.reads_drawn_token and not divergence.judges_each_teacher and not full:
        part = ".tokens sampled" if divergence.reads_rollout_policy else f" {name_of(DIVERGENCES, divergence)}"
        raise InputError(f"method.divergence{part} reads any token; set method.support to full")
    merges = target.asks_teachers and not target.keeps_contexts
    if divergence.reads_rollout_policy and (len(method.contexts) > 2 or merges):
        raise InputError(
            f"method.divergence {name_of(DIVERGENCES, divergence)} reads the teacher, and the rollouts' policy if "
            "there is a second context; set method.target to plain or each"
        )


def _check_gap(method: Method) -> None:
    divergence, trust = method.divergence, method.trust
    if not divergence.judges_each_teacher and not trust.judges_each_teacher:
        return
    if not method.support.full_vocabulary or not method.target.keeps_contexts or not method.contexts:
        tables = {"divergence": DIVERGENCES, "trust": TRUSTS}
        judges = [
            f"method.{slot} {name}"
            for slot, table in tables.items()
            for name in names_with(table, "judges_each_teacher", True)
        ]
        raise InputError(
            f"{' and '.join(judges)} read one token of each teacher; set method.support to full, and method.target to "
            "each (plain for one context)"
        )
    both = divergence.judges_each_teacher and trust.judges_each_teacher
    if both and divergence.gap_entries != trust.gap_entries:
        raise InputError("method.divergence.local and method.trust.local differ; set both to the same")


def _check_outcome(method: Method) -> None:
    """Refuse parts that need the outcome of rollouts which a horizon cuts: nearly none would be correct."""
    if not method.rollout.cuts:
        return
    gate, trust, hints = method.gate, method.trust, [context.hint for context in method.contexts]
    cut = "whose outcome is unknown under a horizon that cuts it"
    whole = "or method.rollout.horizon to complete"
    if gate.needs_outcome:
        raise InputError(
            f"method.gate {name_of(GATES, gate)} asks for the outcome of a rollout, {cut}: every update would be "
            f"skipped; set method.gate to all, {whole}"
        )
    if method.rollout.needs_outcome:
        raise InputError(
            f"method.rollout tries or chooses by the outcome of a rollout, {cut}; set method.rollout.attempts to 1, "
            f"{whole}"
        )
    if trust.needs_outcome:
        raise InputError(
            f"method.trust {name_of(TRUSTS, trust)} weights by the outcome of a rollout, {cut}; set method.trust to "
            f"equal, {whole}"
        )
    if any(hint is not None and hint.needs_outcome for hint in hints):
        raise InputError(
            f"method.contexts shows a successful sibling of a rollout, {cut}; set method.contexts to one that does "
            f"not, such as reference, {whole}"
        )


def _check_group(method: Method) -> None:
    trust, rollout, contexts = method.trust, method.rollout, method.contexts
    if method.canvases.decoded and not rollout.decodes:
        raise InputError("demonstrations were never decoded step by step; set method.canvases to random_masks")
    if method.gate.count_rejected and method.average in ("sites", "canvases"):
        raise InputError(
            f"method.gate.count_rejected has no meaning under average {method.average}, which counts no rollouts; "
            "set method.average to steps, step_sums or rollouts"
        )
    if trust.weights_likelihoods and method.divergence.reads_target:
        likelihoods = " or ".join(names_with(DIVERGENCES, "reads_target", False))
        raise InputError(
            f"method.trust {name_of(TRUSTS, trust)} weights token likelihoods; use divergence {likelihoods}"
        )
    for slot, table in (("gate", GATES), ("trust", TRUSTS)):
        part = getattr(method, slot)
        if part.needs_group and not rollout.keeps_groups:
            raise InputError(
                f"method.{slot} {name_of(table, part)} compares a group: rollout.keep all, attempts 2 or more"
            )
    if trust.needs_group and not method.gate.mixes:
        raise InputError(
            f"method.trust {name_of(TRUSTS, trust)} compares good and bad rollouts; set method.gate to all or mixed"
        )
    if not trust.weights_likelihoods:
        return
    wanted = len(trust.roles(len(contexts), rollout.passes))
    if len(contexts) != wanted:
        raise InputError(
            f"method.trust {name_of(TRUSTS, trust)} needs {wanted} contexts here (base weights if kl > 0, a snapshot "
            f"every {rollout.passes} updates if rollouts serve several passes), not {len(contexts)}"
        )


def _check_cap(method: Method) -> None:
    if not method.trust.needs_old_logp:
        return
    if method.rollout.temperature != method.temperature:
        raise InputError(
            f"method.trust {name_of(TRUSTS, method.trust)} compares with the probabilities of the rollouts: set "
            "method.rollout.temperature and method.temperature to the same value"
        )
    if not method.canvases.decoded or not method.sites.follows_decoder:
        raise InputError(
            f"method.trust {name_of(TRUSTS, method.trust)} compares each token where the decoder chose it; set "
            "method.canvases to decoder_steps and method.sites to revealed"
        )


def _check_lag(method: Method) -> None:
    """Refuse losses that compare with the weights of the rollouts, where these are older than the batch."""
    rollout, trust = method.rollout, method.trust
    if not rollout.lag:
        return
    if method.rolling is not None:
        raise InputError(
            "method.rollout.lag lets rollouts be one batch older than the student, but method.rollout.policy does not "
            "follow it; set method.rollout.lag to 0"
        )
    if trust.weights_likelihoods or any(role == "rollouts" for *_, role in _other_policies(method)):
        part = f"trust {name_of(TRUSTS, trust)}" if trust.weights_likelihoods else "contexts"
        raise InputError(
            f"method.{part} takes its ratios to the weights that made the rollouts, which are one batch older under "
            "method.rollout.lag than those that it asks; set method.rollout.lag to 0"
        )


def _other_policies(method: Method) -> list[tuple[str, int, Role]]:
    """The contexts that a part of the loss uses in another role than teacher: slot, index of the context, role."""
    policies: list[tuple[str, int, Role]] = []
    parts = {"support": method.support, "divergence": method.divergence, "trust": method.trust}
    for slot, part in parts.items():
        for i, role in enumerate(part.roles(len(method.contexts), method.rollout.passes)):
            if role != "teacher":
                policies.append((slot, i, role))
    return policies


def _check_roles(method: Method) -> None:
    """Refuse contexts that cannot have the role in which a part of the loss uses them."""
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
            remedy = "demonstrations were not sampled from a policy, so leave that context out"
            if rollout.decodes:
                other = "" if method.rolling is None else " and method.rollout.policy to live"
                remedy = f"set method.teacher.{i} to a snapshot with every {rollout.passes}{other}"
            raise InputError(f"method.{slot} takes teacher {i} for {what}, which it is not; {remedy}")


def _check_weights(method: Method) -> None:
    """Refuse weights of contexts that do not enter the loss."""
    target = method.target
    for i, (context, role) in enumerate(zip(method.contexts, method.roles(), strict=True)):
        if context.weight == 1:
            continue
        key = f"method.contexts.{i} has the weight {context.weight:g}, but"
        if not target.asks_teachers:
            raise InputError(f"{key} method.target {name_of(TARGETS, target)} asks no teacher; leave the weight out")
        if not target.keeps_contexts:
            raise InputError(
                f"{key} method.target {name_of(TARGETS, target)} does not make a target of each context; leave the "
                "weight out, or set method.target to each"
            )
        if role != "teacher":
            raise InputError(f"{key} the loss uses this context as {role}, not as a teacher; leave the weight out")
        if len(method.contexts) == 1:
            raise InputError(f"{key} there is no other context to weigh it against; leave the weight out")


def _check_penalty(method: Method) -> None:
    """Refuse a plain teacher beside informed ones that does not hold the student near its weights."""
    contexts, covers = method.contexts, method.sites.covers
    plain = [context.same_view(covers) for context in contexts]
    if not method.target.asks_teachers or not method.target.keeps_contexts or all(plain):
        return
    for i, (weights, role) in enumerate(zip(method.weights(), method.roles(), strict=True)):
        if not plain[i] or role != "teacher":
            continue
        penalty = f"method.contexts.{i} shows nothing, so it holds the student near the weights of its teacher, but"
        if weights.is_student:
            raise InputError(f"{penalty} method.teacher.{i} is the student itself; set it to base")
        if not method.divergence.least_at_target:
            raise InputError(
                f"{penalty} method.divergence with a clip per entry is not least there; set method.divergence.clip to "
                "none or token"
            )
        if method.trust.judges_each_teacher:
            raise InputError(
                f"{penalty} method.trust {name_of(TRUSTS, method.trust)} turns its sign by the outcome; leave this "
                "context out, or set method.trust to equal"
            )


def _check_student(method: Method) -> None:
    """Refuse methods whose teachers compute exactly what the student computes, so that there is nothing to learn."""
    support, other_policies = method.support, {i for _, i, _ in _other_policies(method)}
    if support.degenerate:
        raise InputError(
            "method.support.k 1 with rest renormalise keeps one entry, which all then give the probability 1; set k to "
            "2 or more, or rest to bucket"
        )
    teachers = [x for i, x in enumerate(zip(method.contexts, method.weights(), strict=True)) if i not in other_policies]
    if teachers and all(weights.is_student and context.same_view(method.sites.covers) for context, weights in teachers):
        raise InputError(
            "method.teacher is the student itself and method.contexts shows it nothing more, so there is nothing to "
            "learn; set method.contexts to one that adds something, or method.teacher to base"
        )
