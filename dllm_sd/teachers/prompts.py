"""Teacher prompts: from hints to tokens, once for each batch of rollouts."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dllm_sd.errors import Stopped
from dllm_sd.policies.policy import Policy
from dllm_sd.randomness import make_key
from dllm_sd.rollouts.rollout import Rollout, Rollouts
from dllm_sd.skills.retrieval import Pair
from dllm_sd.tasks.datafile import render
from dllm_sd.tasks.task import Problem, Task
from dllm_sd.teachers.context import Context, Hint, HintInputs, Reasoning, TeacherPrompt, no_pairs
from dllm_sd.teachers.writing import Writing
from dllm_sd.writers import Request, Written

Analyse = Callable[[int, Sequence[Sequence[int]], Reasoning, Sequence[int]], list[str]]
"""``analyse(context, prompts, reasoning, keys)``: what the weights of that context's teacher answer to each prompt."""
Write = Callable[[Writing, Sequence[Request]], list[Written]]
"""``write(writing, requests)``: what the writer answers to each request, or why there is nothing."""


def nobody_writes(writing: Writing, requests: Sequence[Request]) -> list[Written]:
    """Where no hint has a writer."""
    raise NotImplementedError(f"there is nobody to write {len(requests)} texts for {writing}")


@dataclass(frozen=True)
class Sources:
    """What hints draw on beside the rollouts."""

    problems: Sequence[Problem] = ()
    """The training problems."""
    write: Write = nobody_writes
    pairs: Callable[[Problem, int], Sequence[Pair]] = no_pairs
    """What the run's bank of skills holds for a problem."""


def build_teacher_prompts(
    rollouts: Rollouts,
    contexts: Sequence[Context],
    task: Task,
    policy: Policy,
    analyse: Analyse,
    batch: tuple[int, int],
    sources: Sources = Sources(),
) -> Rollouts:
    """The same rollouts with `Rollout.teacher_prompts`; those without a hint, or with one too long, are left out.

    Args:
        rollouts: of all processes, in one order.
        contexts: of the method.
        task: asks the questions.
        policy: renders and reads them.
        analyse: asks a teacher, where a hint wants it to reason first.
        batch: seed of the run and number of this batch of rollouts, for keys.
        sources: what else hints draw on.

    Raises:
        Stopped: if a writer failed more often than its hint tolerates.
    """
    hints = [context.hint for context in contexts]
    if not any(hints):
        return rollouts
    groups: dict[tuple[str, ...], list[Rollout]] = {}
    for rollout in rollouts.chosen:
        groups.setdefault(rollout.key_parts, []).append(rollout)
    inputs_of_hints = [
        HintInputs(
            *(rollout, groups[rollout.key_parts], task),
            make_key(*batch, *rollout.key_parts, "hint"),
            sources.problems,
            sources.pairs,
        )
        for rollout in rollouts.kept
    ]
    counts = {"cut_hint": 0.0, **rollouts.counts}
    written: dict[Hint, list[HintInputs]] = {
        hint: _written(hint, hint.writing, inputs_of_hints, sources.write, batch, counts)
        if hint.writing
        else inputs_of_hints
        for hint in dict.fromkeys(filter(None, hints))
    }
    kept: list[Rollout] = []
    for place, rollout in enumerate(rollouts.kept):
        asks = [hint.prompt_for(written[hint][place]) if hint else None for hint in hints]
        read = [
            prompt_tokens(ask, hint, policy) if hint and ask else (None, False)
            for hint, ask in zip(hints, asks, strict=True)
        ]
        prompts = [prompt for prompt, _ in read]
        missing = [
            "no_hint" if ask is None else "long_hint"
            for hint, ask, prompt in zip(hints, asks, prompts, strict=True)
            if hint and prompt is None
        ]
        if missing:
            counts[missing[0]] += 1
            counts["kept"] -= 1
        else:
            weights = tuple(ask.weight if ask else 1.0 for ask in asks)
            notes = tuple(ask.text if ask else None for ask in asks)
            counts["cut_hint"] += any(cut for _, cut in read)
            kept.append(replace(rollout, teacher_prompts=tuple(prompts), teacher_weights=weights, notes=notes))
    for context, hint in enumerate(hints):
        if hint and hint.reasoning and kept:
            read = [rollout.teacher_prompts[context] or () for rollout in kept]
            keys = [make_key(*batch, *rollout.key_parts, rollout.attempt, "analysis", context) for rollout in kept]
            texts = analyse(context, read, hint.reasoning, keys)
            openings = [policy.encode_completion(f"{text.strip()}{hint.reasoning.transition}", False) for text in texts]
            kept = [_opened(rollout, context, opening) for rollout, opening in zip(kept, openings, strict=True)]
    return replace(rollouts, kept=tuple(kept), counts=counts)


def _written(
    hint: Hint,
    writing: Writing,
    inputs_of_hints: Sequence[HintInputs],
    write: Write,
    batch: tuple[int, int],
    counts: dict[str, float],
) -> list[HintInputs]:
    """The occasions with what the hint's writer wrote for each; what was dropped is counted by reason."""
    asked = {i: messages for i, one in enumerate(inputs_of_hints) if (messages := hint.request(one)) is not None}
    keys = [_key(hint, inputs_of_hints[i].rollout, batch) for i in asked]
    texts = write(writing, [Request(asked[i], key) for i, key in zip(asked, keys, strict=True)]) if asked else []
    found, dropped = list(inputs_of_hints), Counter[str]()
    for i, answer in zip(asked, texts, strict=True):
        text, reason = (None, answer.failure or "no_text")
        if answer.text is not None:
            text, reason = hint.accept(inputs_of_hints[i], answer.text)
        found[i] = replace(inputs_of_hints[i], text=text)
        if text is None:
            dropped[reason] += 1
    counts["written"] = counts.get("written", 0.0) + len(asked)
    counts["cached"] = counts.get("cached", 0.0) + sum(answer.cached for answer in texts)
    for reason, count in dropped.items():
        counts[f"dropped/{reason}"] = counts.get(f"dropped/{reason}", 0.0) + count
    if dropped.total() > writing.tolerance * len(asked):
        reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.most_common())
        raise Stopped(
            f"{dropped.total()} of {len(asked)} written texts had to be dropped ({reasons}), more than the share of "
            f"{writing.tolerance:g} that method.contexts tolerates; mend the writer, or raise writing.tolerance"
        )
    return found


def _key(hint: Hint, rollout: Rollout, batch: tuple[int, int]) -> int:
    """Of a text: one for each rollout, or for each problem whenever it is met."""
    if hint.per_problem:
        return make_key(batch[0], rollout.problem.id, "writing")
    return make_key(*batch, *rollout.key_parts, rollout.attempt, "writing")


def prompt_tokens(ask: TeacherPrompt, hint: Hint, policy: Policy) -> tuple[tuple[int, ...] | None, bool]:
    """The prompt of one teacher, None if it is longer than it may be; and whether its hint was cut to fit."""
    prompt = policy.encode(_messages(ask, hint), hint.thinking)
    words: list[int] = []
    cut = len(prompt) > hint.longest
    if len(prompt) > hint.longest and hint.overflow == "cut":
        words = policy.encode_completion(ask.text, ended=False)
    while len(prompt) > hint.longest and words:
        words = words[: len(words) - (len(prompt) - hint.longest)] if len(prompt) - hint.longest < len(words) else []
        prompt = policy.encode(_messages(replace(ask, text=policy.text(words)), hint), hint.thinking)
    return (tuple(prompt), cut) if len(prompt) <= hint.longest else (None, False)


def _messages(ask: TeacherPrompt, hint: Hint) -> list[dict[str, str]]:
    """The task's messages, the last of them with the hint."""
    *before, last = ask.messages
    slots = {**ask.more, "question": last["content"], "hint": ask.text}
    content = render(ask.template, slots, "the context's template")
    content = content if last["content"] else content.lstrip()
    if hint.reasoning is not None:
        content = f"{content}\n\n{hint.reasoning.instruction}".strip()
    return [*before, {**last, "content": content}]


def _opened(rollout: Rollout, context: int, opening: Sequence[int]) -> Rollout:
    """The rollout with the start of a teacher's turn behind the prompt of one context."""
    prompts = [
        (*prompt, *opening) if place == context and prompt is not None else prompt
        for place, prompt in enumerate(rollout.teacher_prompts)
    ]
    return replace(rollout, teacher_prompts=tuple(prompts))
