"""Teacher prompts: from hints to tokens, once for each batch of rollouts."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dllm_sd.errors import Stopped
from dllm_sd.policies.policy import Policy
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.rollout import Rollout, Rollouts, TeacherBrief
from dllm_sd.skills.retrieval import SkillPair
from dllm_sd.tasks.datafile import render
from dllm_sd.tasks.task import Problem, Task
from dllm_sd.teachers.context import Context, Hint, HintInputs, Reasoning, TeacherPrompt, no_pairs
from dllm_sd.teachers.writing import Writing
from dllm_sd.writers import Request, Written

Analyse = Callable[[int, Sequence[Sequence[int]], Reasoning, Sequence[int]], list[str]]
"""``analyse(context, prompts, reasoning, keys)``: the analysis that the context's teacher writes for each prompt."""
WriteTexts = Callable[[Writing, Sequence[Request]], list[Written]]
"""``write(writing, requests)``: the writer's answer to each request, or why there is none."""


def nobody_writes(writing: Writing, requests: Sequence[Request]) -> list[Written]:
    """The default of `Sources.write`, for methods whose hints have no writer."""
    raise NotImplementedError(f"there is nobody to write {len(requests)} texts for {writing}")


@dataclass(frozen=True)
class Sources:
    """What hints use besides the rollouts."""

    problems: Sequence[Problem] = ()
    """The training problems."""
    write: WriteTexts = nobody_writes
    pairs: Callable[[Problem, int], Sequence[SkillPair]] = no_pairs
    """``pairs(problem, key)``: the pairs of the run's skill bank for a problem, best first."""


def build_teacher_prompts(
    rollouts: Rollouts,
    contexts: Sequence[Context],
    task: Task,
    policy: Policy,
    analyse: Analyse,
    batch: tuple[int, int],
    sources: Sources = Sources(),
) -> Rollouts:
    """The same rollouts with `Rollout.briefs`; those without a hint, or with one too long, are left out.

    Args:
        rollouts: of all processes, in one order.
        contexts: of the method.
        task: builds the student's messages.
        policy: its tokenizer and chat template make the prompts.
        analyse: writes the analysis of a teacher whose hint has `reasoning`.
        batch: seed of the run and number of this batch of rollouts, for keys.
        sources: what else hints use.

    Raises:
        Stopped: if a writer failed more often than its hint tolerates.
    """
    hints = [context.hint for context in contexts]
    if not any(hints):
        return rollouts
    counts = {"cut_hint": 0.0, **rollouts.counts}
    plain = _hint_inputs(rollouts, task, batch, sources)
    inputs: dict[Hint, list[HintInputs]] = {
        hint: _written(hint, hint.writing, plain, sources.write, batch, counts) if hint.writing else plain
        for hint in dict.fromkeys(filter(None, hints))
    }
    kept: list[Rollout] = []
    for place, rollout in enumerate(rollouts.kept):
        given = [
            (hint, inputs[hint][place]) if hint else context.weight
            for hint, context in zip(hints, contexts, strict=True)
        ]
        briefs = _briefs(given, policy, counts)
        if briefs is not None:
            kept.append(replace(rollout, briefs=briefs))
    for context, hint in enumerate(hints):
        if hint and hint.reasoning and kept:
            kept = _with_analysis(kept, context, hint.reasoning, policy, analyse, batch)
    return replace(rollouts, kept=tuple(kept), counts=counts)


def _hint_inputs(rollouts: Rollouts, task: Task, batch: tuple[int, int], sources: Sources) -> list[HintInputs]:
    """The hint inputs of every kept rollout."""
    groups: dict[tuple[str, ...], list[Rollout]] = {}
    for rollout in rollouts.chosen:
        groups.setdefault(rollout.key_parts, []).append(rollout)
    return [
        HintInputs(
            *(rollout, groups[rollout.key_parts], task),
            make_key(*batch, *rollout.key_parts, "hint"),
            sources.problems,
            sources.pairs,
        )
        for rollout in rollouts.kept
    ]


def _briefs(
    given: Sequence[tuple[Hint, HintInputs] | float], policy: Policy, counts: dict[str, float]
) -> tuple[TeacherBrief, ...] | None:
    """The briefs of a rollout, one for each context, from its hint and inputs or, without a hint, from its weight.

    None, and counted, where a context has no usable hint.
    """
    briefs: list[TeacherBrief] = []
    cut_any = False
    for one in given:
        if not isinstance(one, tuple):
            briefs.append(TeacherBrief(weight=one))
            continue
        hint, inputs = one
        prompt = hint.prompt_for(inputs)
        tokens, cut = encode_teacher_prompt(prompt, hint, policy) if prompt else (None, False)
        if prompt is None or tokens is None:
            counts["no_hint" if prompt is None else "long_hint"] += 1
            counts["kept"] -= 1
            return None
        cut_any |= cut
        briefs.append(TeacherBrief(tokens, prompt.weight, prompt.text))
    counts["cut_hint"] += cut_any
    return tuple(briefs)


def _with_analysis(
    kept: Sequence[Rollout],
    context: int,
    reasoning: Reasoning,
    policy: Policy,
    analyse: Analyse,
    batch: tuple[int, int],
) -> list[Rollout]:
    """The rollouts with the analysis of a context's teacher at the start of its turn."""
    prompts = [rollout.briefs[context].prompt or () for rollout in kept]
    keys = [make_key(*batch, *rollout.key_parts, rollout.attempt, "analysis", context) for rollout in kept]
    texts = analyse(context, prompts, reasoning, keys)
    openings = [policy.encode_completion(f"{text.strip()}{reasoning.transition}", False) for text in texts]
    return [_opened(rollout, context, opening) for rollout, opening in zip(kept, openings, strict=True)]


def _written(
    hint: Hint,
    writing: Writing,
    inputs_of_hints: Sequence[HintInputs],
    write: WriteTexts,
    batch: tuple[int, int],
    counts: dict[str, float],
) -> list[HintInputs]:
    """The hint inputs with the text that the hint's writer wrote; dropped texts are counted by reason."""
    requests = {
        i: messages for i, inputs in enumerate(inputs_of_hints) if (messages := hint.request(inputs)) is not None
    }
    keys = [_key(hint, inputs_of_hints[i].rollout, batch) for i in requests]
    texts = (
        write(writing, [Request(requests[i], key) for i, key in zip(requests, keys, strict=True)]) if requests else []
    )
    inputs_with_text, dropped = list(inputs_of_hints), Counter[str]()
    for i, answer in zip(requests, texts, strict=True):
        text, reason = (None, answer.failure or "no_text")
        if answer.text is not None:
            text, reason = hint.accept(inputs_of_hints[i], answer.text)
        inputs_with_text[i] = replace(inputs_of_hints[i], text=text)
        if text is None:
            dropped[reason] += 1
    counts["written"] = counts.get("written", 0.0) + len(requests)
    counts["cached"] = counts.get("cached", 0.0) + sum(answer.cached for answer in texts)
    for reason, count in dropped.items():
        counts[f"dropped/{reason}"] = counts.get(f"dropped/{reason}", 0.0) + count
    if dropped.total() > writing.tolerance * len(requests):
        reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.most_common())
        raise Stopped(
            f"{dropped.total()} of {len(requests)} written texts had to be dropped ({reasons}), more than the share of "
            f"{writing.tolerance:g} that method.contexts tolerates; fix the writer, or raise writing.tolerance"
        )
    return inputs_with_text


def _key(hint: Hint, rollout: Rollout, batch: tuple[int, int]) -> int:
    """Random key of a text: one for each rollout, or one for each problem in all updates."""
    if hint.per_problem:
        return make_key(batch[0], rollout.problem.id, "writing")
    return make_key(*batch, *rollout.key_parts, rollout.attempt, "writing")


def encode_teacher_prompt(
    teacher_prompt: TeacherPrompt, hint: Hint, policy: Policy
) -> tuple[tuple[int, ...] | None, bool]:
    """The prompt of one teacher, None if it exceeds `Hint.longest`; and whether its hint was cut to fit."""
    prompt = policy.encode(_messages(teacher_prompt, hint), hint.thinking)
    hint_ids: list[int] = []
    cut = len(prompt) > hint.longest
    if len(prompt) > hint.longest and hint.overflow == "cut":
        hint_ids = policy.encode_completion(teacher_prompt.text, ended=False)
    while len(prompt) > hint.longest and hint_ids:
        hint_ids = (
            hint_ids[: len(hint_ids) - (len(prompt) - hint.longest)]
            if len(prompt) - hint.longest < len(hint_ids)
            else []
        )
        prompt = policy.encode(_messages(replace(teacher_prompt, text=policy.text(hint_ids)), hint), hint.thinking)
    return (tuple(prompt), cut) if len(prompt) <= hint.longest else (None, False)


def _messages(teacher_prompt: TeacherPrompt, hint: Hint) -> list[dict[str, str]]:
    """The task's messages, the last of them with the hint."""
    *before, last = teacher_prompt.messages
    slots = {**teacher_prompt.more, "question": last["content"], "hint": teacher_prompt.text}
    content = render(teacher_prompt.template, slots, "the context's template")
    content = content if last["content"] else content.lstrip()
    if hint.reasoning is not None:
        content = f"{content}\n\n{hint.reasoning.instruction}".strip()
    return [*before, {**last, "content": content}]


def _opened(rollout: Rollout, context: int, opening: Sequence[int]) -> Rollout:
    """The rollout with ``opening`` appended to the prompt of one context."""
    briefs = list(rollout.briefs)
    if (prompt := briefs[context].prompt) is not None:
        briefs[context] = replace(briefs[context], prompt=(*prompt, *opening))
    return replace(rollout, briefs=tuple(briefs))
