"""Lets a file operation of a command fail, then runs the command again without the fault.

From one operation on the disk is full (nothing can be created) or read-only (nothing can be changed); or only this
operation is denied, or fails on the device; or a file cannot grow beyond half of its size. Outcomes: sentence, the
command ends with status 1 or 2 and one sentence, keeps every complete checkpoint, and ends like the undisturbed one
when it is run again; ok, it ends like the undisturbed one despite the fault.
"""

import errno
import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.attacks import child
from tools.attacks.contents import contents, differences
from tools.attacks.findings import Finding, spread
from tools.attacks.kills import Course, again
from tools.attacks.watch import CREATING, Operation, Watch

FAULTS = {"full disk": errno.ENOSPC, "read-only": errno.EROFS, "denied": errno.EACCES, "broken": errno.EIO}
LASTING = ("full disk", "read-only")
HALF = "no room for half of it"


class Fault:
    """Raises an error at operation ``number`` of a process and, for `LASTING` faults, at later ones."""

    def __init__(self, number: int, fault: str, size: int, saved: Path, root: Path) -> None:
        self.number, self.fault, self.size, self.saved, self.root = number, fault, size, saved, root

    def __call__(self, operation: Operation) -> None:
        """Called before each operation."""
        if operation.number == self.number:
            self.saved.write_text("\n".join(whole_checkpoints(self.root)))
        if self.fault == HALF:
            if operation.number == self.number:
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return
        code = FAULTS[self.fault]
        fails = operation.number == self.number or (operation.number > self.number and self.fault in LASTING)
        if fails and (self.fault != "full disk" or operation.event in CREATING):
            raise OSError(code, os.strerror(code), operation.path)


def whole_checkpoints(folder: Path) -> list[str]:
    """The complete checkpoints under a folder."""
    folders = [path.parent for path in folder.rglob("state.json")]
    return sorted(str(path.relative_to(folder)) for path in folders if path.name.isdigit())


def _lost(saved: Sequence[str], remaining: Sequence[str]) -> list[str]:
    """Saved checkpoints of which neither they nor later ones of the same run remain."""
    later = [(Path(path).parent, path) for path in remaining]
    return [path for path in saved if not any(run == Path(path).parent and path <= other for run, other in later)]


def attack(course: Course, points: int | None = None) -> Iterator[Finding]:
    """Let each operation fail, with alternating faults; then let each written file be too large for the disk."""
    wanted = contents(course.state(len(course.operations)))
    for i, number in enumerate(spread(len(course.operations), points)):
        yield _fail(course, number, [*FAULTS][i % len(FAULTS)], 0, wanted)
    halves = [(number, size) for number in range(len(course.operations)) if (size := _half(course, number)) is not None]
    for i in spread(len(halves), points):
        yield _fail(course, halves[i][0], HALF, halves[i][1], wanted)


def _half(course: Course, number: int) -> int | None:
    """Size of a file after half of the write of an operation; None if the operation writes nothing that stays."""
    _, event, name = course.operations[number].split(maxsplit=2)
    old, new = course.state(number) / name, course.state(number + 1) / name
    if event not in ("open", "attacks.save_file") or not new.is_file():
        return None
    before = old.stat().st_size if old.is_file() else 0
    grown = new.stat().st_size - before
    return before + grown // 2 if grown > 0 else new.stat().st_size // 2


def _fail(course: Course, number: int, fault: str, size: int, wanted: dict[str, object]) -> Finding:
    work, saved, case = course.folder / "work", course.folder / "saved", course.case
    shutil.copytree(course.folder / "before", work, symlinks=True)
    fault_at = Fault(number, fault, size, saved, work)
    try:
        ended = child.run(case.command, work, lambda: Watch(work, fault_at))
        name = f"{fault} at {course.operations[number]}"
        if ended.status == 0:
            wrong = differences(wanted, contents(work))
            return Finding("writes", case.name, name, "FAULT" if wrong else "ok", "; ".join(wrong[:3]))
        if ended.sentence is None:
            return Finding("writes", case.name, name, "FAULT", str(ended))
        if lost := _lost(saved.read_text().splitlines(), whole_checkpoints(work)):
            return Finding("writes", case.name, name, "FAULT", f"lost checkpoint {lost[0]}: {ended.sentence}")
        repeated = again(case, work, wanted, "writes", name)
        return (
            repeated if repeated.outcome == "FAULT" else Finding("writes", case.name, name, "sentence", ended.sentence)
        )
    finally:
        shutil.rmtree(work)
