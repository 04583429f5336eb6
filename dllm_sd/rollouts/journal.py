"""A journal on disk of the completions that servers made, from which a killed run continues.

Sampling on a server cannot be repeated. With the stored completions since the last checkpoint, a restarted run makes
the same updates.
"""

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from threading import Lock

from dllm_sd.engines import CompletionRequest
from dllm_sd.errors import InputError, on_one_line
from dllm_sd.files.reading import cut_half_line, read_own
from dllm_sd.files.typed_json import own_json
from dllm_sd.trajectory import Trajectory
from dllm_sd.trajectory_json import trajectory_from_json, trajectory_to_json

REMEDY = "remove it, and its completions are made again"
LARGEST = 2**33
"""Bytes of a journal."""


class RolloutJournal:
    """The journal of one process; those of all are read. Safe to use from several threads."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Read what a former process has left in ``folder``; nothing is written before `put`.

        Raises:
            InputError: naming the file and the line that holds no completion.
        """
        self.folder, self._file, self._lock = folder, folder / f"rollouts.{rank}.jsonl", Lock()
        self._stored = {name: tree for file in sorted(folder.glob("rollouts.*.jsonl")) for name, tree in _read(file)}
        self.found = len(self._stored)
        """Completions that were there at the start."""
        self._is_whole = False
        """Whether the folder is there, and the file of this process ends with a whole line."""
        self.used = 0
        """Completions that were not asked for again."""

    def get(self, request: CompletionRequest) -> tuple[Trajectory, str] | None:
        """The completion of an equal request and the server that made it, if it is there.

        Raises:
            InputError: if what is there is not a completion of it.
        """
        tree = self._stored.get(request_digest(request))
        if tree is None:
            return None
        try:
            trajectory = trajectory_from_json(tree, request.prompt, request.decode["length"])
        except ValueError as error:
            raise InputError(
                f"{self.folder} holds a completion that is damaged ({on_one_line(error):.200}); remove the folder, and "
                "the completions are made again"
            ) from error
        with self._lock:
            self.used += 1
        return trajectory, str(tree.get("server", ""))

    def put(self, request: CompletionRequest, trajectory: Trajectory, server: str) -> None:
        """Append a completion, and the server that made it, to the file of this process."""
        entry = {"request": request_digest(request), "server": server, **trajectory_to_json(trajectory)}
        line = json.dumps(entry) + "\n"
        with self._lock:
            if not self._is_whole:
                self.folder.mkdir(parents=True, exist_ok=True)
                cut_half_line(self._file, REMEDY)
                self._is_whole = True
            with self._file.open("ab") as file:
                file.write(line.encode())

    def forget(self) -> None:
        """Remove all files, and what was read at the start: a checkpoint has replaced them, or they are wrong.

        To be called while no process asks for completions.
        """
        with self._lock:
            self._stored = {}
            for file in self.folder.glob("rollouts.*.jsonl"):
                file.unlink(missing_ok=True)


def request_digest(request: CompletionRequest) -> str:
    """A hash of everything that decides a completion, the version of the weights too, but not their name."""
    decisive = {key: value for key, value in asdict(request).items() if key != "model"}
    return sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _read(file: Path) -> list[tuple[str, dict[str, object]]]:
    *lines, _ = read_own(file, REMEDY, LARGEST).split(b"\n")
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            tree = own_json(line)
            entries.append((str(tree.pop("request")), tree))
        except (ValueError, LookupError, AttributeError) as error:
            raise InputError(
                f"{file} line {number} holds no completion ({on_one_line(error):.200}); remove the file, and its "
                "completions are made again"
            ) from error
    return entries
