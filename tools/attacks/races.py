"""Runs the same command twice at the same time.

The first command waits before one of its operations until the second has ended, or both run without waiting. One of
them must succeed; the other ends with one sentence, or finds a finished run. The folder must then be as after a single
command. Outcomes: ok, both succeeded; sentence, one was refused.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tools.attacks import child
from tools.attacks.cases import Words
from tools.attacks.contents import contents, differences
from tools.attacks.findings import Finding, spread
from tools.attacks.kills import Course
from tools.attacks.watch import Operation, Watch

RACES: tuple[tuple[str, Words], ...] = (
    *(("plain", ()), ("plain", ("resume=fresh",)), ("fresh", ()), ("texts", ()), ("peers", ()), ("eval", ())),
)
"""Cases, and overrides that only the second command has."""


def attack(course: Course, overrides: Words = (), points: int | None = None, times: int = 3) -> Iterator[Finding]:
    """Let the commands meet at every operation, or at ``points`` of them, and ``times`` times without waiting."""
    for number in [*spread(len(course.operations), points), *[None] * times]:
        yield _judge(course, overrides, number)


def _judge(course: Course, overrides: Words, number: int | None) -> Finding:
    """Run both commands; the first one waits before operation ``number``, unless it is None."""
    work, case = course.folder / "work", course.case
    shutil.copytree(course.folder / "before", work, symlinks=True)
    name = "both at once" if number is None else f"the second before {course.operations[number]}"
    try:
        both = _meet(case.command, (*case.command, *overrides), work, number)
        actual = contents(work)
    finally:
        shutil.rmtree(work)
    bad = [ended for ended in both if ended.status != 0 and ended.sentence is None]
    wrong = differences(contents(course.state(len(course.operations))), actual)
    wrong = [phrase for phrase in wrong if not (overrides and "resume" in phrase)]  # the config shows which one ran
    title = " and ".join([case.name, *overrides])
    if bad or wrong or all(ended.status for ended in both):
        endings = "; ".join(f"{which}: {ended}" for which, ended in zip(("first", "second"), both, strict=True))
        return Finding("races", title, name, "FAULT", f"{'; '.join(wrong[:3])} | {endings}")
    refused = [ended.sentence for ended in both if ended.sentence]
    return Finding("races", title, name, "sentence" if refused else "ok", refused[0] if refused else "")


def _meet(first_words: Words, second_words: Words, work: Path, number: int | None) -> tuple[child.Ended, child.Ended]:
    if number is None:
        pair = [child.Child(child.command(words), work) for words in (first_words, second_words)]
        return pair[0].wait(), pair[1].wait()
    arrived, resume = os.pipe(), os.pipe()

    def wait(operation: Operation) -> None:
        if operation.number == number:
            os.write(arrived[1], b"!")
            os.close(resume[1])
            os.read(resume[0], 1)

    first = child.Child(child.command(first_words, lambda: Watch(work, wait)), work)
    os.close(arrived[1])  # the read below ends also if the first command never gets to this operation
    os.close(resume[0])
    os.read(arrived[0], 1)
    second = child.run(second_words, work, seconds=30)
    os.close(arrived[0])
    os.close(resume[1])  # the first command goes on
    return first.wait(), second
