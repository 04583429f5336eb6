"""One process at a time writes in a folder; the kernel gives the lock back when a process ends, however it ends."""

import errno
import fcntl
import json
import os
import socket
import sys
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dllm_sd.errors import InputError

LOCK = ".lock"
"""The file that is locked. It is there while the folder is in use; one that a killed process left says nothing."""
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass
class _Held:
    """A lock of this process, which may have taken it several times."""

    handle: int
    path: Path
    times: int = 0


_held: dict[Path, _Held] = {}
"""By the real path of the file."""


class FolderLock:
    """The right of this process to write in a folder. Two of them in one process do not exclude each other."""

    def __init__(self, folder: Path, name: str, remedy: str) -> None:
        """Take nothing yet; ``name`` ("run folder") and ``remedy`` ("give another run=...") are for the refusal."""
        self.folder, self.name, self.remedy = folder, name, remedy
        self._made: list[Path] = []
        self._release: weakref.finalize[..., FolderLock] | None = None

    def acquire(self) -> None:
        """Take the folder, which is made if need be; nothing happens where this object has it already.

        Raises:
            InputError: if another process has it.
            OSError: if nothing can be written there.
        """
        if self._release is not None and self._release.alive:
            return
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder.resolve() / LOCK
            held = _held.get(path)
            if held is None or not _is_current(held.handle, path):
                held = _held[path] = _Held(self._lock(path), path)
            held.times += 1
            self._release = weakref.finalize(self, _release, held)
        except BaseException:
            self._remove_empty()
            raise

    def release(self) -> None:
        """Give the folder back, if this object has it; folders that were made in vain are removed."""
        if self._release is not None:
            self._release()
        self._remove_empty()

    def _remove_empty(self) -> None:
        for path in self._made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()

    def _lock(self, path: Path) -> int:
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            try:
                self._lock_file(handle)
            except BaseException:
                os.close(handle)
                raise
            if _is_current(handle, path):
                os.ftruncate(handle, 0)
                os.write(handle, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode())
                return handle
            os.close(handle)  # the former holder removed the file meanwhile

    def _lock_file(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.name} {str(self.folder)!r:.200} is in use by another process{_holder(handle)}; wait until it "
                f"ends, or {self.remedy}"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print(
                f"dllm-sd: files cannot be locked in {self.name} {str(self.folder)!r:.200} ({error.strerror}); make "
                "sure that no second command uses it",
                file=sys.stderr,
            )


def _is_current(handle: int, path: Path) -> bool:
    """Whether the open file still is what stands at ``path``."""
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _holder(handle: int) -> str:
    """Who has the lock, as far as its file says."""
    try:
        who = json.loads(os.pread(handle, 1000, 0))
        return f" (pid {int(who['pid'])} on {who['host']!s:.80})"
    except (ValueError, LookupError, TypeError, RecursionError):  # it has just been made
        return ""


def _release(held: _Held) -> None:
    held.times -= 1
    if not held.times:
        if _held.get(held.path) is held:
            del _held[held.path]
        with suppress(OSError):  # a file that stays says nothing once it is not locked
            if _is_current(held.handle, held.path):
                held.path.unlink()
        os.close(held.handle)
