"""Kills a command before each of its file operations and in the middle of each write, then runs it again.

One run serves all points: before every operation the working folder is copied, which is what a kill would leave. For a
file that grew between two operations there is also a copy with half of the addition. Outcomes: ok, the repeated command
ends like the undisturbed one, bit for bit; sentence, it says that its result exists already; anything else is a fault.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tools.attacks import child
from tools.attacks.cases import Case
from tools.attacks.contents import contents, differences
from tools.attacks.findings import Finding, spread
from tools.attacks.watch import Operation, Watch

KILLED = 137


@dataclass(frozen=True)
class Course:
    """An undisturbed run of a case, seen before each of its operations."""

    case: Case
    folder: Path
    """Holds `before` (the working folder before the command), `after`, and the states, by number."""
    operations: tuple[str, ...]

    def state(self, number: int) -> Path:
        """The working folder before an operation; the last one is that after all operations."""
        return self.folder / (f"{number:04d}" if number < len(self.operations) else "after")


def follow(case: Case, folder: Path, url: str) -> Course:
    """Run a case undisturbed and copy the working folder before each operation."""
    before, after, log = folder / "before", folder / "after", folder / "operations"
    case.prepare(before, url)
    for words in case.before:
        done(child.run(words, before))
    shutil.copytree(before, after, symlinks=True)

    def keep(operation: Operation) -> None:
        shutil.copytree(after, folder / f"{operation.number:04d}", symlinks=True)
        with log.open("a") as file:
            file.write(f"{operation}\n")

    done(child.run(case.command, after, lambda: Watch(after, keep), seconds=300))
    return Course(case, folder, tuple(log.read_text().splitlines()))


def done(ended: child.Ended) -> None:
    """Make sure that an undisturbed command worked.

    Raises:
        RuntimeError: if it did not.
    """
    if ended.status != 0:
        raise RuntimeError(f"an undisturbed command failed: {ended}\n{ended.err}")


def states(course: Course) -> Iterator[tuple[str, Path]]:
    """Yield the distinct folders that a kill may leave: before every operation, and with each write half done."""
    seen: set[str] = set()
    for number in range(len(course.operations) + 1):
        state = course.state(number)
        if number:
            for name in _grown(course.state(number - 1), state):
                half = course.folder / "half" / f"{number:04d} {name.replace('/', ' ')}"
                shutil.copytree(state, half, symlinks=True)
                _halve(half / name, course.state(number - 1) / name)
                yield f"in the middle of {name}, before {_label(course, number)}", half
        if (key := _digest(state)) not in seen:
            seen.add(key)
            yield f"before {_label(course, number)}", state


def _label(course: Course, number: int) -> str:
    return course.operations[number] if number < len(course.operations) else "its end"


def _grown(old: Path, new: Path) -> list[str]:
    """Files whose content no file had before."""
    files = [path for path in new.rglob("*") if path.is_file() and "tb" not in path.parts]
    known = {path.read_bytes() for path in old.rglob("*") if path.is_file()}
    return sorted(str(path.relative_to(new)) for path in files if path.read_bytes() not in known)


def _halve(file: Path, former: Path) -> None:
    data = file.read_bytes()
    start = former.read_bytes() if former.is_file() else b""
    start = start if data.startswith(start) else b""
    file.write_bytes(data[: len(start) + (len(data) - len(start)) // 2])


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b"folder"
        digest.update(f"{path.relative_to(folder)} {len(content)} ".encode() + content)
    return digest.hexdigest()


def attack(course: Course, points: int | None = None) -> Iterator[Finding]:
    """Run the command again from every state, or from ``points`` of them."""
    wanted, points_of_kill = contents(course.state(len(course.operations))), list(states(course))
    for number in spread(len(points_of_kill), points):
        name, folder = points_of_kill[number]
        work = course.folder / "work"
        shutil.copytree(folder, work, symlinks=True)
        yield again(course.case, work, wanted, "kills", name)
        shutil.rmtree(work)


def again(case: Case, work: Path, wanted: dict[str, object], kind: str, name: str) -> Finding:
    """Run the command of a case in a folder where it was stopped, and compare the result with the wanted contents."""
    ended = child.run(case.command, work)
    wrong = differences(wanted, contents(work))
    if ended.sentence and not wrong:  # such as an export that exists already
        return Finding(kind, case.name, name, "sentence", ended.sentence)
    if ended.status != 0:
        return Finding(kind, case.name, name, "FAULT", f"run again: {ended}")
    return Finding(kind, case.name, name, "FAULT" if wrong else "ok", "; ".join(wrong[:3]))


def check(course: Course, points: int) -> Iterator[Finding]:
    """Really kill the command before a few operations, and check that it leaves the state that was copied."""
    for number in spread(len(course.operations), points):
        work = course.folder / "work"
        shutil.copytree(course.folder / "before", work, symlinks=True)
        ended = child.run(course.case.command, work, partial(Watch, work, partial(_stop, number)))
        wrong = differences(contents(course.state(number)), contents(work))
        wrong += [] if ended.status == KILLED else [str(ended)]
        name = f"really killed before {course.operations[number]}"
        yield Finding("kills", course.case.name, name, "FAULT" if wrong else "ok", "; ".join(wrong[:3]))
        shutil.rmtree(work)


def _stop(number: int, operation: Operation) -> None:
    if operation.number == number:
        os._exit(KILLED)
