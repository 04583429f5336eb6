"""Teacher prompts: from hints to tokens, once for each batch of rollouts."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from dllm_sd.policies.policy import Policy
from dllm_sd.randomness import make_key
from dllm_sd.rollouts import Rollout, Rollouts
from dllm_sd.tasks.datafile import render
from dllm_sd.tasks.task import Task
from dllm_sd.teachers import AnyContext
from dllm_sd.teachers.context import Ask, Reasoning
from dllm_sd.teachers.hints import AnyHint

Write = Callable[[int, Sequence[Sequence[int]], Reasoning, Sequence[int]], list[str]]
"""``write(context, prompts, reasoning, keys)``: what the weights of that context's teacher answer to each prompt."""


def inform(
    rollouts: Rollouts,
    contexts: Sequence[AnyContext],
    task: Task,
    policy: Policy,
    write: Write,
    batch: tuple[int, int],
) -> Rollouts:
    """The same rollouts with `Rollout.teacher_prompts`; those without a hint, or with one too long, are left out.

    Args:
        rollouts: of all processes, in one order.
        contexts: of the method.
        task: asks the questions.
        policy: renders and reads them.
        write: asks a teacher, where a hint wants it to reason first.
        batch: seed of the run and number of this batch of rollouts, for keys.
    """
    hints = [context.hint for context in contexts]
    if not any(hints):
        return rollouts
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts.chosen:
        groups.setdefault(rollout.problem.id, []).append(rollout)
    kept: list[Rollout] = []
    counts = {**rollouts.counts}
    for rollout in rollouts.kept:
        prompts: list[tuple[int, ...] | None] = []
        lost, key = None, make_key(*batch, rollout.problem.id, "hint")
        for hint in hints:
            ask = hint.ask(rollout, groups[rollout.problem.id], task, key) if hint else None
            prompt = prompt_tokens(ask, hint, policy) if hint and ask else None
            if hint and prompt is None:
                lost = lost or ("no_hint" if ask is None else "long_hint")
            prompts.append(prompt)
        if lost:
            counts[lost] += 1
            counts["kept"] -= 1
        else:
            kept.append(replace(rollout, teacher_prompts=tuple(prompts)))
    for context, hint in enumerate(hints):
        if hint and hint.reasoning and kept:
            read = [rollout.teacher_prompts[context] or () for rollout in kept]
            keys = [make_key(*batch, rollout.problem.id, rollout.attempt, "analysis", context) for rollout in kept]
            texts = write(context, read, hint.reasoning, keys)
            openings = [policy.encode_completion(f"{text.strip()}{hint.reasoning.transition}", False) for text in texts]
            kept = [_opened(rollout, context, opening) for rollout, opening in zip(kept, openings, strict=True)]
    return replace(rollouts, kept=tuple(kept), counts=counts)


def prompt_tokens(ask: Ask, hint: AnyHint, policy: Policy) -> tuple[int, ...] | None:
    """The prompt of one teacher, None if it is longer than it may be."""
    prompt = policy.encode(_messages(ask, hint), hint.thinking)
    words: list[int] = []
    if len(prompt) > hint.longest and hint.overflow == "cut":
        words = policy.encode_completion(ask.text, ended=False)
    while len(prompt) > hint.longest and words:
        words = words[: len(words) - (len(prompt) - hint.longest)] if len(prompt) - hint.longest < len(words) else []
        prompt = policy.encode(_messages(replace(ask, text=policy.text(words)), hint), hint.thinking)
    return tuple(prompt) if len(prompt) <= hint.longest else None


def _messages(ask: Ask, hint: AnyHint) -> list[dict[str, str]]:
    """The task's messages, the last of them with the hint."""
    *before, last = ask.messages
    content = render(ask.template, {"question": last["content"], "hint": ask.text}, "the context's template")
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
