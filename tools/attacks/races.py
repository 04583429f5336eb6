"""The same command twice at the same time.

The first one waits before one of its operations until the second has ended; or both run at once. One of them must
work; the other ends with one sentence, or finds a finished run. What is left must be what one alone leaves. Outcomes:
ok, both ended well one after the other; sentence, one was refused.
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
"""Cases, and what the second command says beside what the first one does."""


def attack(course: Course, more: Words = (), points: int | None = None, times: int = 3) -> Iterator[Finding]:
    """Meet at every operation, or at ``points`` of them, and ``times`` times without waiting."""
    for number in [*spread(len(course.operations), points), *[None] * times]:
        yield _judge(course, more, number)


def _judge(course: Course, more: Words, number: int | None) -> Finding:
    """Let the two meet at an operation of the first, or anywhere."""
    work, case = course.folder / "work", course.case
    shutil.copytree(course.folder / "before", work, symlinks=True)
    name = "both at once" if number is None else f"the second before {course.operations[number]}"
    try:
        both = _meet(case.command, (*case.command, *more), work, number)
        found = contents(work)
    finally:
        shutil.rmtree(work)
    bad = [ended for ended in both if ended.status != 0 and ended.sentence is None]
    wrong = differences(contents(course.state(len(course.operations))), found)
    wrong = [words for words in wrong if not (more and "resume" in words)]  # the config says which of the two it was
    title = " and ".join([case.name, *more])
    if bad or wrong or all(ended.status for ended in both):
        said = "; ".join(f"{who}: {ended}" for who, ended in zip(("first", "second"), both, strict=True))
        return Finding("races", title, name, "FAULT", f"{'; '.join(wrong[:3])} | {said}")
    refused = [ended.sentence for ended in both if ended.sentence]
    return Finding("races", title, name, "sentence" if refused else "ok", refused[0] if refused else "")


def _meet(one: Words, other: Words, work: Path, number: int | None) -> tuple[child.Ended, child.Ended]:
    if number is None:
        pair = [child.Child(child.command(words), work) for words in (one, other)]
        return pair[0].wait(), pair[1].wait()
    here, go = os.pipe(), os.pipe()

    def wait(operation: Operation) -> None:
        if operation.number == number:
            os.write(here[1], b"!")
            os.close(go[1])
            os.read(go[0], 1)

    first = child.Child(child.command(one, lambda: Watch(work, wait)), work)
    os.close(here[1])  # so that nothing is waited for where the first one never comes there
    os.close(go[0])
    os.read(here[0], 1)
    second = child.run(other, work, seconds=30)
    os.close(here[0])
    os.close(go[1])  # this lets it go on
    return first.wait(), second
