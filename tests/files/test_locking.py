"""A folder is one process's at a time; the kernel gives it back."""

import errno
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dllm_sd.errors import InputError
from dllm_sd.files import locking
from dllm_sd.files.locking import LOCK, FolderLock


def lock_of(folder: Path) -> FolderLock:
    return FolderLock(folder, "run folder", "give another run=...")


def locked(folder: Path) -> FolderLock:
    lock = lock_of(folder)
    lock.acquire()
    return lock


@contextmanager
def another_process(action: Callable[[], object]) -> Iterator[int]:
    """A second process that has done this and lives on; its number."""
    done, tell = os.pipe()
    if (child := os.fork()) == 0:
        kept = action()
        os.write(tell, b".")
        signal.pause()
        del kept
    os.close(tell)
    try:
        assert os.read(done, 1) == b"."
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(done)


def test_a_folder_in_use_is_refused_with_the_one_who_has_it(tmp_path: Path):
    folder = tmp_path / "run"
    with another_process(lambda: locked(folder)) as holder:
        before = sorted(folder.iterdir())
        with pytest.raises(InputError) as refused:
            lock_of(folder).acquire()
        assert str(refused.value) == (
            f"run folder {str(folder)!r} is in use by another process (pid {holder} on {socket.gethostname()}); wait "
            "until it ends, or give another run=..."
        )
        assert sorted(folder.iterdir()) == before == [folder / LOCK]
    locked(folder).release()  # the other was killed


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"pid": "x", "host": 1}'])
def test_a_lock_file_that_says_nothing_is_no_reason_to_fail(tmp_path: Path, content: str):
    with another_process(lambda: locked(tmp_path)):
        (tmp_path / LOCK).write_text(content)
        with pytest.raises(InputError, match="in use by another process; wait"):
            lock_of(tmp_path).acquire()
    (tmp_path / LOCK).write_text(content)
    lock = lock_of(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / LOCK).read_text()) == {"host": socket.gethostname(), "pid": os.getpid()}
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_process_may_lock_a_folder_several_times(tmp_path: Path):
    first, second = lock_of(tmp_path), lock_of(tmp_path / "../" / tmp_path.name)
    first.acquire()
    first.acquire()
    second.acquire()
    first.release()
    first.release()
    assert (tmp_path / LOCK).exists()
    second.release()
    assert not list(tmp_path.iterdir())


def test_a_lock_that_nobody_refers_to_any_more_is_given_back(tmp_path: Path):
    lock_of(tmp_path).acquire()
    assert not list(tmp_path.iterdir())


def test_folders_are_made_and_those_made_in_vain_removed(tmp_path: Path):
    lock = lock_of(tmp_path / "a" / "b")
    lock.acquire()
    assert (tmp_path / "a" / "b" / LOCK).is_file()
    lock.release()
    assert not list(tmp_path.iterdir())
    lock.acquire()
    (tmp_path / "a" / "file").touch()
    lock.release()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]


def test_a_folder_that_was_removed_and_made_again_is_locked_anew(tmp_path: Path):
    old = lock_of(tmp_path / "run")
    old.acquire()
    (tmp_path / "run" / LOCK).unlink()
    (tmp_path / "run").rmdir()
    new = lock_of(tmp_path / "run")
    new.acquire()
    assert (tmp_path / "run" / LOCK).is_file()
    old.release()
    assert (tmp_path / "run" / LOCK).is_file()
    new.release()
    assert not list(tmp_path.iterdir())


def test_a_link_in_the_place_of_the_lock_is_not_written_through(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"):
        lock_of(tmp_path / "run").acquire()
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_where_files_cannot_be_locked_a_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
):
    def refuse(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(locking.fcntl, "flock", refuse)
    lock_of(tmp_path).acquire()
    said = capsys.readouterr().err
    assert said.startswith(f"dllm-sd: files cannot be locked in run folder {str(tmp_path)!r} (")
    assert said.endswith("); make sure that no second command uses it\n")
    assert said.count("\n") == 1


def test_other_errors_of_a_lock_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(locking.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output"):
        lock_of(tmp_path / "run").acquire()
