"""Extraction: a model's attempts become skills and mistakes, in a cold start and by updates during training.

This module runs no model: the caller passes ``write``, which answers a list of chats, with None for a missing answer.
Answers, or parts of them, that cannot be used are left out and counted (`answers.py`).

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
from dllm_sd.skills.answers import MAX_ANSWER_TEXT, parse_items
from dllm_sd.skills.bank import DYNAMIC, Bank, EntryT, Mistake, Skill, distinct, is_dynamic, numbered, text_names, texts
from dllm_sd.tasks.datafile import chat, render
from dllm_sd.texts.thinking import without_thinking

WriteChats = Callable[[list[list[dict[str, str]]]], Sequence[str | None]]
"""``write(chats)`` returns one answer for each chat, in order; None for a missing answer."""
ExtractionCounts = dict[str, int]
"""Numbers of events, by the names of the metrics."""

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
class Attempt:
    """One graded attempt at one problem."""

    problem: str
    text: str
    correct: bool
    answer: str | None = None
    """The parsed answer; None if there is none."""
    truth: str | None = None
    """The gold answer, if the data has one."""


@dataclass(frozen=True, kw_only=True)
class Extraction(Ranged, key="extraction"):
    """How skills and mistakes are extracted from attempts; the defaults are those of SGSD, except for `longest`."""

    success: str = SUCCESS
    """The prompt for skills: `{problem}`, `{steps}`, `{excerpt}`, `{answer}`, `{truth}`."""
    failure: str = FAILURE
    """The prompt for mistakes, with the same placeholders."""
    merge_skills: str = MERGE_SKILLS
    """The prompt that merges skills: `{items}`, as JSON."""
    merge_mistakes: str = MERGE_MISTAKES
    """The prompt that merges mistakes, with the same placeholder."""
    steps: Natural = 6
    """Most steps of a correct attempt in the prompt."""
    step_length: Count = 280
    """Most characters of a step in the prompt."""
    success_length: Annotated[int, Range(least=40)] = 1600
    """Most characters of a correct attempt in the prompt, half from its start and half from its end."""
    failure_length: Annotated[int, Range(least=40)] = 2200
    """Most characters of a wrong attempt in the prompt."""
    most: Count = 3
    """Most entries that are taken from one attempt."""
    longest: Count = 1000
    """Most characters of a text of an entry; an entry with a longer text is left out."""
    group: Annotated[int, Range(least=2)] = 32
    """Entries per merge prompt."""
    patience: Count = 3
    """Merging stops after this number of layers in a row that do not shorten the list."""
    threshold: Share = 0.8
    """The bank is updated only while the share of correct attempts is below this."""
    growth: Natural = 5
    """Largest increase of the number of added skills, and of added mistakes, by one update."""
    capacity: Count = 30
    """Most added skills, and most added mistakes, in the bank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        attempt = ("problem", "steps", "excerpt", "answer", "truth")
        slots = {"success": attempt, "failure": attempt, "merge_skills": ("items",), "merge_mistakes": ("items",)}
        for name, known in slots.items():
            key = f"extraction.{name}"
            with_1, with_2 = (render(getattr(self, name), dict.fromkeys(known, text), key) for text in "12")
            if with_1 == with_2:
                raise InputError(
                    f"{key} uses no placeholder; give it some of {', '.join(f'{{{slot}}}' for slot in known)}."
                )


def cold_start(memories: Sequence[Attempt], write: WriteChats, settings: Extraction) -> tuple[Bank, ExtractionCounts]:
    """Build a bank from attempts: skills from correct ones and mistakes from wrong ones, extracted, then merged.

    Either list may be empty if no usable entry was written; the counts give the reasons.
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
    bank: Bank, memories: Sequence[Attempt], success_rate: float, write: WriteChats, settings: Extraction
) -> tuple[Bank, ExtractionCounts]:
    """Return the bank with the entries of recent attempts, or the same bank if enough attempts succeed.

    New entries are merged with each other, then with those of earlier updates (ids ``dyn_###``). All remaining entries
    stay unchanged and come first. Source: SGSD, released code, `analyze_trajectories` and `_prune_dynamic_items`.
    """
    counts = Counter[str]()
    if not success_rate < settings.threshold or not memories:
        return bank, {"updated": 0}
    skills, mistakes = _extract(memories, write, settings, counts)
    new = Bank(
        _updated(bank.skills, skills, Skill, write, settings, counts),
        _updated(bank.mistakes, mistakes, Mistake, write, settings, counts),
        bank.metadata,
    )
    counts.update({"updated": int(new != bank), "skills": len(new.skills), "mistakes": len(new.mistakes)})
    return new, dict(counts)


def steps_of(text: str, most: int, length: int) -> list[str]:
    """Return the first steps of a solution (paragraphs, list items, numbered steps), each cut to ``length``."""
    steps: list[list[str]] = [[]]
    for line in without_thinking(text)[:MAX_ANSWER_TEXT].splitlines():
        if not line.strip() or _NUMBERED.match(line.lstrip()):
            steps.append([])
        steps[-1].append(line)
    squeezed = (" ".join(" ".join(lines).split()) for lines in steps)
    return [step[:length].rstrip() for step in squeezed if step][:most]


def excerpt_of(text: str, length: int) -> str:
    """Return the start and the end of a text on one line, at most ``length`` characters in total."""
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    gap = " [...] "
    head = length // 2
    return f"{text[:head].rstrip()}{gap}{text[len(text) - (length - head - len(gap)) :].lstrip()}"


def _extract(
    memories: Sequence[Attempt], write: WriteChats, settings: Extraction, counts: Counter[str]
) -> tuple[list[Skill], list[Mistake]]:
    chats = [_request(memory, settings) for memory in memories]
    skills: list[Skill] = []
    mistakes: list[Mistake] = []
    for memory, answer in zip(memories, _answers(write, chats), strict=True):
        if memory.correct:
            items, reason = parse_items(answer, Skill, settings.longest, counts)
            skills += _limited(items, settings.most, "many", counts)
        else:
            items, reason = parse_items(answer, Mistake, settings.longest, counts)
            mistakes += _limited(items, settings.most, "many", counts)
        if reason is not None:
            counts[f"skipped/{reason}"] += 1
    successes = sum(memory.correct for memory in memories)
    counts.update({"successes": successes, "failures": len(memories) - successes})
    counts.update({"candidates/skills": len(skills), "candidates/mistakes": len(mistakes)})
    return skills, mistakes


def _limited(items: Sequence[EntryT], most: int, reason: str, counts: Counter[str]) -> Sequence[EntryT]:
    """Return the first ``most`` entries and count those that are left out."""
    if len(items) > most:
        counts[f"left_out/{reason}"] += len(items) - most
    return items[:most]


def _without_duplicates(items: Sequence[EntryT], counts: Counter[str]) -> tuple[EntryT, ...]:
    """Return the entries without duplicates and count the duplicates."""
    unique = distinct(items)
    if len(unique) < len(items):
        counts["left_out/repeated"] += len(items) - len(unique)
    return unique


def _answers(write: WriteChats, chats: list[list[dict[str, str]]]) -> Sequence[str | None]:
    answers = write(chats) if chats else []
    if len(answers) != len(chats):
        raise ValueError(f"the writer gave {len(answers)} answers to {len(chats)} chats")
    return answers


def _request(memory: Attempt, settings: Extraction) -> list[dict[str, str]]:
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
    items: Sequence[EntryT], kind: type[EntryT], write: WriteChats, settings: Extraction, counts: Counter[str]
) -> tuple[EntryT, ...]:
    """Merge in layers, group by group, until a single group is left or several layers in a row do not shorten it.

    A group stays unchanged if the answer cannot be used or has more entries than the group, so no layer grows and the
    loop terminates. (In the released code groups may grow.)
    """
    name = "skills" if kind is Skill else "mistakes"
    template = settings.merge_skills if kind is Skill else settings.merge_mistakes
    items, idle, last = _without_duplicates(items, counts), 0, not items
    while not last and idle < settings.patience:
        groups = [items[start : start + settings.group] for start in range(0, len(items), settings.group)]
        chats = [_merge_request(group, template, name) for group in groups if len(group) > 1]
        answers = iter(_answers(write, chats))
        merged: list[EntryT] = []
        for group in groups:
            if len(group) == 1:
                merged += group
                continue
            shorter, reason = parse_items(next(answers), kind, settings.longest, counts, alone=False)
            reason = "longer" if len(shorter) > len(group) else reason
            if reason is not None:
                counts[f"unmerged/{reason}"] += 1
            merged += group if reason is not None else shorter
        idle = 0 if len(merged) < len(items) else idle + 1
        items, last = tuple(merged), len(groups) == 1
        counts[f"layers/{name}"] += 1
    return _without_duplicates(items, counts)


def _merge_request(group: Sequence[EntryT], template: str, name: str) -> list[dict[str, str]]:
    rows = [dict(zip(text_names(type(item)), texts(item), strict=True)) for item in group]
    listing = json.dumps(rows, ensure_ascii=False, indent=1)
    return chat(None, render(template, {"items": listing}, f"extraction.merge_{name}"))


def _updated(
    items: tuple[EntryT, ...],
    extracted: Sequence[EntryT],
    kind: type[EntryT],
    write: WriteChats,
    settings: Extraction,
    counts: Counter[str],
) -> tuple[EntryT, ...]:
    new = _merge(extracted, kind, write, settings, counts)
    if not new:
        return items
    fixed = [item for item in items if not is_dynamic(item)]
    added = [item for item in items if is_dynamic(item)]
    merged = _merge([*added, *new], kind, write, settings, counts)
    unique = _without_duplicates([*fixed, *merged], counts)
    fresh = unique[len(distinct(fixed)) :]  # duplicates of fixed entries are not added
    limit = min(len(added) + settings.growth, settings.capacity)
    return (*fixed, *numbered(_limited(fresh, limit, "full", counts), DYNAMIC))
