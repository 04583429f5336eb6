"""Observes the file operations of this process before they happen, by audit events and a wrapper of safetensors."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from safetensors import torch as safetensors

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
SAVE = "attacks.save_file"
"""Audit event for writes of safetensors, which are made in Rust and raise none."""
PATH_ARGUMENTS = {
    "os.rename": (1, 3),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.mkdir": (0, 2),
    "os.truncate": (0, None),
}
PATH_ARGUMENTS |= {"os.link": (1, 3), "os.symlink": (1, 2), "os.chmod": (0, 2), "open": (0, None), SAVE: (0, None)}
"""By event: the indices of the changed path and of its folder descriptor among the arguments."""
CREATING = ("open", "os.mkdir", "os.rename", "os.link", "os.symlink", SAVE)
"""Events that need free space on the disk."""


@dataclass(frozen=True)
class Operation:
    """A file operation that is about to happen."""

    number: int
    """From 0, in the order of this process."""
    event: str
    path: str
    """Relative to the watched folder."""

    def __str__(self) -> str:
        return f"{self.number} {self.event} {self.path}"


class Watch:
    """Calls ``act`` before every operation under ``root``, for the rest of the process; ``act`` may raise, or exit."""

    def __init__(self, root: Path, act: Callable[[Operation], None]) -> None:
        self.root, self.act, self.count, self.inside = os.path.realpath(root), act, 0, False
        _announce_saving()
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in PATH_ARGUMENTS or self.inside:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITING):
            return
        self.inside = True  # operations of `act` are not observed
        try:
            place, start = PATH_ARGUMENTS[event]
            path = self._relative(arguments[place], arguments[start] if start is not None else -1)
            if path is not None:
                operation, self.count = Operation(self.count, event, path), self.count + 1
                self.act(operation)
        finally:
            self.inside = False

    def _relative(self, path: Any, start: int) -> str | None:
        if isinstance(path, int):
            return None
        base = os.readlink(f"/proc/self/fd/{start}") if start >= 0 else os.getcwd()
        whole = os.path.normpath(os.path.join(base, os.fsdecode(path)))
        folder = os.path.join(os.path.realpath(os.path.dirname(whole)), os.path.basename(whole))
        return os.path.relpath(folder, self.root) if folder.startswith(self.root + os.sep) else None


def _announce_saving() -> None:
    original = safetensors.save_file
    if hasattr(original, "__wrapped__"):
        return

    @wraps(original)
    def save_file(tensors: Any, filename: Any, *rest: Any, **options: Any) -> None:
        sys.audit(SAVE, filename)
        original(tensors, filename, *rest, **options)

    for module in [*sys.modules.values()]:
        if getattr(module, "save_file", None) is original:
            vars(module)["save_file"] = save_file
