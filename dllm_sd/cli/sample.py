"""``dllm-sd sample``: shows the decoding of a prompt: a canvas that fills, or a text that grows."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, cast

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dllm_sd.cli.run_or_model import load, quiet_libraries, warn, warn_unknown_text
from dllm_sd.errors import InputError
from dllm_sd.randomness import make_key
from dllm_sd.tasks.datafile import fields_of
from dllm_sd.tasks.sources import about_tests, final_split
from dllm_sd.tasks.task import Problem, Split, Task
from dllm_sd.trajectory import Trajectory

SEARCHED = 500
"""Problems of the test and dev split in which a prompt is looked for, to grade the answer."""
NEW_LINE = "\u23ce"
"""Stands for a line break, which would break a canvas."""
END = "\u220e"
"""Stands for an end token."""


def run(options: argparse.Namespace) -> int:
    """Decode one prompt, show how, and print the text, the probabilities of its tokens, and a verdict."""
    quiet_libraries()
    config, policy, _ = load("sample", options.model, options.overrides, options.task)
    problem, graded = _problem(config.task, options.prompt, options.raw)
    messages = config.task.messages(problem) if problem else [{"role": "user", "content": options.prompt}]
    settings = replace(config.held_out(), temperature=config.eval.temperature)
    prompt = policy.encode(messages, config.eval.thinking)
    warn_unknown_text(policy, [messages], "the prompt")
    console, frames = Console(highlight=False), []
    key = make_key(config.seed, "sample")
    screen = not policy.causal  # the alternate screen, on which a canvas is drawn in place
    if console.is_terminal:
        with Live(console=console, refresh_per_second=30, transient=True, screen=screen) as live:

            def watch(canvas: Any) -> None:
                frames.append(canvas[0].tolist())
                live.update(_frame(policy, frames) + _status(policy, frames), refresh=True)

            trajectory = policy.decode([prompt], settings, [key], watch)
    else:
        trajectory = policy.decode([prompt], settings, [key], lambda canvas: frames.append(canvas[0].tolist()))
        for step, frame in enumerate(frames if screen else ()):
            line = Text(f"{step:>4} ") + _frame(policy, [*frames[max(0, step - 1) : step], frame])
            console.print(line, soft_wrap=True)
    text = policy.text(trajectory.tokens[0, : int(trajectory.length)].tolist())
    console.print(Text(text, style="bold") if text else Text("(no text)", style="dim"), soft_wrap=True)
    console.print(_probabilities(policy, trajectory), markup=False, soft_wrap=True)
    if graded and problem:
        grade = config.task.grade(problem, text)
        read = "no answer was read" if grade.parsed is None else f"answer read: {_visible(str(grade.parsed))}"
        console.print(f"{'right' if grade.correct else 'wrong'} ({problem.id}; {read})", markup=False, soft_wrap=True)
    return 0


def _problem(task: Task, prompt: str, raw: bool) -> tuple[Problem | None, bool]:
    """The problem that a prompt asks, and whether the task knows its answer.

    ``test:3`` is a problem of the data. Other text is looked for in the data; if it is not there, it fills the template
    of the task's prompt, if that has one field.

    Raises:
        InputError: if the split has no such problem.
    """
    if raw:
        return None, False
    if place := re.fullmatch(r"(train|dev|test):([0-9]{1,9})", prompt):
        split = final_split(task) if place[1] == "test" else cast(Split, place[1])
        if split != place[1] and (sentence := about_tests(task)):
            warn(sentence)
        problems = task.problems(split)
        if int(place[2]) >= len(problems):
            raise InputError(f"{prompt} does not exist; the {split} split holds {len(problems)} problems, from 0 on")
        return problems[int(place[2])], True
    for split in ("test", "dev"):
        try:
            known = task.problems(split)
        except InputError:
            continue  # the data may be absent; the prompt needs none
        for problem in islice(known, SEARCHED):
            if any(isinstance(value, str) and value.strip() == prompt.strip() for value in problem.fields.values()):
                return problem, True
    fields = list(dict.fromkeys(fields_of(str(getattr(task, "prompt", "")))))
    if len(fields) == 1:
        return Problem("sample", {fields[0]: prompt}), False
    warn("the prompt is used as it is, since the task's template has not one field to put it in; try test:0")
    return None, False


def _probabilities(policy: Any, trajectory: Trajectory) -> str:
    """How probable the tokens were when they were chosen: the mean, and the least probable ones."""
    written = trajectory.is_written[0]
    tokens, steps = trajectory.tokens[0][written].tolist(), trajectory.reveal_step[0][written].tolist()
    if trajectory.logp is None or not tokens:
        return "no token was written"
    shares = trajectory.logp[0][written].exp().tolist()
    least = sorted(zip(shares, tokens, steps, strict=True))[:3]
    lowest = ", ".join(f"{share:.3f} of {_name(policy, token)} at step {step}" for share, token, step in least)
    return f"probability of its {len(tokens)} tokens: mean {sum(shares) / len(shares):.3f}; lowest {lowest}"


def _frame(policy: Any, frames: Sequence[Sequence[int]]) -> Text:
    """Render the last canvas: masks as dots (nothing in a growing text), tokens since the previous canvas in colour."""
    current, previous = frames[-1], frames[-2] if len(frames) > 1 else frames[-1]
    text = Text()
    for token, previous_token in zip(current, previous, strict=True):
        if token == policy.mask_id:
            text.append("" if policy.causal else "\u00b7", style="dim")
        else:
            text.append(_piece(policy, token), style="bold green" if token != previous_token else "")
    return text


def _status(policy: Any, frames: Sequence[Sequence[int]]) -> Text:
    """A line below a canvas: the step, and how many positions are filled; nothing below a growing text."""
    if policy.causal:
        return Text()
    filled = sum(token != policy.mask_id for token in frames[-1])
    return Text(f"\n\nstep {len(frames) - 1}: {filled} of {len(frames[-1])} positions", style="dim")


def _piece(policy: Any, token: int) -> str:
    return END if token in policy.end_ids else _visible(policy.text([token])) or "\u25a1"


def _name(policy: Any, token: int) -> str:
    """A token within a sentence: its text in quotes, or the name of one without a text."""
    known = token in policy.end_ids or policy.text([token])
    return repr(_piece(policy, token)) if known else str(policy.chat.tokenizer.convert_ids_to_tokens(token))


def _visible(text: str) -> str:
    """A text on one line; line breaks are a sign."""
    return "".join(_SIGNS.get(letter, letter if letter.isprintable() else "\u25a1") for letter in text)


_SIGNS: Mapping[str, str] = {"\n": NEW_LINE, "\t": "\u21e5", "\r": ""}
