"""Extraction: how a model's own attempts become skills and mistakes, at the start and while it trains.

Nothing here calls a model: the caller gives ``write``, which answers a list of chats, and None where it has no answer.
What cannot be used of the answers is left out and counted (`answers.py`).
Source: SGSD (arXiv 2605.28791), sections on the cold start and the online update; released code walawalagoose/SGSD,
commit f296a91, `skill/generate_math_skills.py` (`compress_memory`), `skill/merge_math_skills.py` (`merge_collection`)
and `skill/skill_updater.py` (`MathSkillUpdater`). The prompts are our own.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

from dllm_sd.errors import InputError
from dllm_sd.ranges import Count, Natural, Range, Ranged, Share
from dllm_sd.skills.answers import MAX_TEXT, parse_items
from dllm_sd.skills.bank import DYNAMIC, Bank, Item, Mistake, Skill, distinct, is_dynamic, numbered, text_names, texts
from dllm_sd.tasks.datafile import chat, render
from dllm_sd.texts.thinking import without_thinking

Write = Callable[[list[list[dict[str, str]]]], Sequence[str | None]]
"""``write(chats)``: one answer for each chat, in order; None where there is none."""
Counts = dict[str, int]
"""How often what happened; the names are those of the metrics."""

SUCCESS = """\
Somebody solved the problem below, and the answer is right.

Problem: {problem}

The steps:
{steps}

From the solution as it was written:
{excerpt}

Answer: {answer}

What made this work that would also help with other problems? Name one, two or three such skills. Leave out everything \
that belongs to this problem alone: its numbers, its names, its answer.

Answer with a JSON list and nothing else. Each entry is an object with three short texts: "title", a name of a few \
words; "principle", what to do and why it works; "when_to_apply", how to tell that a problem calls for it."""

FAILURE = """\
Somebody tried to solve the problem below and went wrong.

Problem: {problem}

From the attempt as it was written:
{excerpt}

Answer given: {answer}
Right answer: {truth}

Where did it go wrong, and what kind of mistake is that? Name one, two or three mistakes that could happen with other \
problems too. Leave out everything that belongs to this problem alone: its numbers, its names, its answer.

Answer with a JSON list and nothing else. Each entry is an object with three short texts: "description", what is done \
wrongly; "why_it_happens", what leads to it; "how_to_avoid", what to do or to check instead."""

MERGE_SKILLS = """\
Here is a list of problem-solving skills. Some of them say the same, or nearly so.

{items}

Write a shorter list: join those with one meaning into one entry that keeps what is useful in each, drop those that \
fit a single problem only, and keep the others as they are. Answer with a JSON list and nothing else. Each entry is an \
object with the texts "title", "principle" and "when_to_apply"."""

MERGE_MISTAKES = """\
Here is a list of mistakes made in solving problems. Some of them are the same, or nearly so.

{items}

Write a shorter list: join those with one cause and one cure into one entry that keeps what is useful in each, drop \
those that fit a single problem only, and keep the others as they are. Answer with a JSON list and nothing else. Each \
entry is an object with the texts "description", "why_it_happens" and "how_to_avoid"."""

_NUMBERED = re.compile(r"(?:[0-9]{1,3}[.)]|[-*])\s|(?i:step) [0-9]")


@dataclass(frozen=True)
class Memory:
    """One attempt at one problem, graded."""

    problem: str
    text: str
    correct: bool
    answer: str | None = None
    """What was read as its answer; None if nothing could be."""
    truth: str | None = None
    """The right answer, where the data has one."""


@dataclass(frozen=True, kw_only=True)
class Extraction(Ranged, key="extraction"):
    """How attempts become skills and mistakes; the figures are those of SGSD but for `longest`."""

    success: str = SUCCESS
    """Asks for skills: `{problem}`, `{steps}`, `{excerpt}`, `{answer}`, `{truth}`."""
    failure: str = FAILURE
    """Asks for mistakes, with the same slots."""
    merge_skills: str = MERGE_SKILLS
    """Asks for fewer skills: `{items}`, as JSON."""
    merge_mistakes: str = MERGE_MISTAKES
    steps: Natural = 6
    """Most steps of a success that are shown."""
    step_length: Count = 280
    """Characters of a step that are shown."""
    success_length: Annotated[int, Range(least=40)] = 1600
    """Characters of a success that are shown, half of them from its start and half from its end."""
    failure_length: Annotated[int, Range(least=40)] = 2200
    most: Count = 3
    """Most entries that are taken from one attempt."""
    longest: Count = 1000
    """Longest text of an entry in characters; an entry with a longer one is left out."""
    group: Annotated[int, Range(least=2)] = 32
    """Entries that are merged at once."""
    patience: Count = 3
    """Merging stops after so many layers in a row that shorten nothing."""
    threshold: Share = 0.8
    """The bank is updated only while the share of right attempts is below this."""
    growth: Natural = 5
    """Most entries by which an update may lengthen the added skills, and the added mistakes."""
    capacity: Count = 30
    """Most added skills, and most added mistakes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        attempt = ("problem", "steps", "excerpt", "answer", "truth")
        slots = {"success": attempt, "failure": attempt, "merge_skills": ("items",), "merge_mistakes": ("items",)}
        for name, known in slots.items():
            key = f"extraction.{name}"
            one, other = (render(getattr(self, name), dict.fromkeys(known, text), key) for text in "12")
            if one == other:
                raise InputError(f"{key} shows nothing; give it some of {', '.join(f'{{{slot}}}' for slot in known)}.")


def cold_start(memories: Sequence[Memory], write: Write, settings: Extraction) -> tuple[Bank, Counts]:
    """A bank from attempts: skills of the right ones, mistakes of the wrong ones, each asked for, then merged.

    Either may be empty if nothing usable was written; the counts say why.
    """
    counts = Counter[str]()
    skills, mistakes = _extract(memories, write, settings, counts)
    bank = Bank(
        numbered(_merge(skills, Skill, write, settings, counts)),
        numbered(_merge(mistakes, Mistake, write, settings, counts)),
    )
    counts.update({"skills": len(bank.skills), "mistakes": len(bank.mistakes)})
    return Bank(bank.skills, bank.mistakes, {"source": "cold start", "counts": dict(counts)}), dict(counts)


def update(
    bank: Bank, memories: Sequence[Memory], success_rate: float, write: Write, settings: Extraction
) -> tuple[Bank, Counts]:
    """The bank with what recent attempts add to it, or the bank itself where they succeed often enough.

    New entries are merged among themselves, then with those that earlier updates added (ids ``dyn_###``). All others
    stay as they are and come first. Source: SGSD, released code, `analyze_trajectories` and `_prune_dynamic_items`.
    """
    counts = Counter[str]()
    if not success_rate < settings.threshold or not memories:
        return bank, {"updated": 0}
    skills, mistakes = _extract(memories, write, settings, counts)
    new = Bank(
        _renewed(bank.skills, skills, Skill, write, settings, counts),
        _renewed(bank.mistakes, mistakes, Mistake, write, settings, counts),
        bank.metadata,
    )
    counts.update({"updated": int(new != bank), "skills": len(new.skills), "mistakes": len(new.mistakes)})
    return new, dict(counts)


def steps_of(text: str, most: int, length: int) -> list[str]:
    """The first steps of a solution, each cut to ``length``: its paragraphs, list entries and numbered steps."""
    steps: list[list[str]] = [[]]
    for line in without_thinking(text)[:MAX_TEXT].splitlines():
        if not line.strip() or _NUMBERED.match(line.lstrip()):
            steps.append([])
        steps[-1].append(line)
    squeezed = (" ".join(" ".join(lines).split()) for lines in steps)
    return [step[:length].rstrip() for step in squeezed if step][:most]


def excerpt_of(text: str, length: int) -> str:
    """A text on one line, at most ``length`` characters of it: its start and its end."""
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    gap = " [...] "
    head = length // 2
    return f"{text[:head].rstrip()}{gap}{text[len(text) - (length - head - len(gap)) :].lstrip()}"


def _extract(
    memories: Sequence[Memory], write: Write, settings: Extraction, counts: Counter[str]
) -> tuple[list[Skill], list[Mistake]]:
    asked = [_request(memory, settings) for memory in memories]
    skills: list[Skill] = []
    mistakes: list[Mistake] = []
    for memory, answer in zip(memories, _answers(write, asked), strict=True):
        if memory.correct:
            found, reason = parse_items(answer, Skill, settings.longest, counts)
            skills += _most(found, settings.most, "many", counts)
        else:
            found, reason = parse_items(answer, Mistake, settings.longest, counts)
            mistakes += _most(found, settings.most, "many", counts)
        if reason is not None:
            counts[f"skipped/{reason}"] += 1
    right = sum(memory.correct for memory in memories)
    counts.update({"successes": right, "failures": len(memories) - right})
    counts.update({"candidates/skills": len(skills), "candidates/mistakes": len(mistakes)})
    return skills, mistakes


def _most(items: Sequence[Item], most: int, reason: str, counts: Counter[str]) -> Sequence[Item]:
    """The first ``most`` entries; what is left out is counted."""
    if len(items) > most:
        counts[f"left_out/{reason}"] += len(items) - most
    return items[:most]


def _single(items: Sequence[Item], counts: Counter[str]) -> tuple[Item, ...]:
    """The entries without repetitions, which are counted."""
    found = distinct(items)
    if len(found) < len(items):
        counts["left_out/repeated"] += len(items) - len(found)
    return found


def _answers(write: Write, chats: list[list[dict[str, str]]]) -> Sequence[str | None]:
    answers = write(chats) if chats else []
    if len(answers) != len(chats):
        raise ValueError(f"the writer gave {len(answers)} answers to {len(chats)} chats")
    return answers


def _request(memory: Memory, settings: Extraction) -> list[dict[str, str]]:
    steps = steps_of(memory.text, settings.steps, settings.step_length)
    fields = {
        "problem": memory.problem,
        "steps": "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1)),
        "excerpt": excerpt_of(memory.text, settings.success_length if memory.correct else settings.failure_length),
        "answer": "none that could be read" if memory.answer is None else memory.answer,
        "truth": "not known" if memory.truth is None else memory.truth,
    }
    name = "success" if memory.correct else "failure"
    return chat(None, render(getattr(settings, name), fields, f"extraction.{name}"))


def _merge(
    items: Sequence[Item], kind: type[Item], write: Write, settings: Extraction, counts: Counter[str]
) -> tuple[Item, ...]:
    """Merge in layers, group by group, until one group is left or several layers in a row shortened nothing.

    A group stays as it is where the answer cannot be used or has more entries than the group; so no layer grows, and
    there is an end. (The released code lets groups grow.)
    """
    name = "skills" if kind is Skill else "mistakes"
    template = settings.merge_skills if kind is Skill else settings.merge_mistakes
    items, idle, last = _single(items, counts), 0, not items
    while not last and idle < settings.patience:
        groups = [items[start : start + settings.group] for start in range(0, len(items), settings.group)]
        asked = [_merge_request(group, template, name) for group in groups if len(group) > 1]
        answers = iter(_answers(write, asked))
        merged: list[Item] = []
        for group in groups:
            if len(group) == 1:
                merged += group
                continue
            found, reason = parse_items(next(answers), kind, settings.longest, counts, alone=False)
            reason = "longer" if len(found) > len(group) else reason
            if reason is not None:
                counts[f"unmerged/{reason}"] += 1
            merged += group if reason is not None else found
        idle = 0 if len(merged) < len(items) else idle + 1
        items, last = tuple(merged), len(groups) == 1
        counts[f"layers/{name}"] += 1
    return _single(items, counts)


def _merge_request(group: Sequence[Item], template: str, name: str) -> list[dict[str, str]]:
    rows = [dict(zip(text_names(type(item)), texts(item), strict=True)) for item in group]
    shown = json.dumps(rows, ensure_ascii=False, indent=1)
    return chat(None, render(template, {"items": shown}, f"extraction.merge_{name}"))


def _renewed(
    items: tuple[Item, ...],
    found: Sequence[Item],
    kind: type[Item],
    write: Write,
    settings: Extraction,
    counts: Counter[str],
) -> tuple[Item, ...]:
    new = _merge(found, kind, write, settings, counts)
    if not new:
        return items
    fixed = [item for item in items if not is_dynamic(item)]
    added = [item for item in items if is_dynamic(item)]
    merged = _merge([*added, *new], kind, write, settings, counts)
    fresh = _single([*fixed, *merged], counts)[len(distinct(fixed)) :]  # what a fixed entry says already is not added
    limit = min(len(added) + settings.growth, settings.capacity)
    return (*fixed, *numbered(_most(fresh, limit, "full", counts), DYNAMIC))
