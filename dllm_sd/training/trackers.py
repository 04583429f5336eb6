"""The trackers of a run: what it logs, grouped and explained, to every tracker that `log.trackers` names.

A tracker that fails while the run trains does not end it: the failure is printed once, its values are counted as
missed, and it is tried again after ever more values. `metrics.jsonl` holds everything.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from PIL.Image import Image

from dllm_sd.config import Config, to_tree
from dllm_sd.errors import InputError, on_one_line, shortened
from dllm_sd.files.typed_json import read_json
from dllm_sd.files.writing import write_file
from dllm_sd.settings import Log
from dllm_sd.training.folder import FREE, TRACKED
from dllm_sd.training.metric_table import Sent, meaning, result_values, shown_name
from dllm_sd.training.tracker_kinds import TRACKERS, TrackedRun, Tracker

RUNS = "runs.json"
"""File in the folder of trackers: the name of the run, and what each tracker knows it by."""
LONGEST_TEXT = 200
"""Characters of a hyperparameter; longer texts, such as prompts, are shortened."""
LONGEST_PAUSE = 64
"""Most values that a tracker which fails again and again is not sent before it is tried again."""
_PASSWORD = re.compile(r"//[^/@\s]*@")


def check_trackers(log: Log) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        InputError: naming the tracker, with the command that installs it.
    """
    for name in log.trackers:
        if find_spec(TRACKERS[name].package) is None:
            raise InputError(
                f"log.trackers names {name}, which is not installed; run pip install 'dllm-sd[{name}]', or leave it out"
            )


def hyperparameters(config: Config) -> dict[str, bool | int | float | str | None]:
    """The config as one value for each dotted key, without keys that may change while a run goes on."""
    flat: dict[str, bool | int | float | str | None] = {}

    def add(value: Any, path: str) -> None:
        if path in FREE:
            return
        if isinstance(value, list) and not any(isinstance(item, Mapping | list) for item in value):
            value = ", ".join(map(str, value))
        if isinstance(value, Mapping | list):
            for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
                add(inner, f"{path}.{key}" if path else str(key))
        else:
            flat[path] = shortened(value, LONGEST_TEXT) if isinstance(value, str) else value

    add(to_tree(config), "")
    return flat


def run_name(run: Path) -> str:
    """The name of a run in trackers: that of its folder, and for one of two peers that of their run before it."""
    run = run.resolve()
    return f"{run.parents[1].name}-{run.name}" if run.parent.name == "students" else run.name


@dataclass(frozen=True)
class _Runs:
    """The content of `RUNS`."""

    name: str
    ids: Mapping[str, str]


@dataclass
class _Line:
    """An open tracker, and how it has fared."""

    name: str
    tracker: Tracker
    asked: int = 0
    missed: int = 0
    waits: int = 0
    """Values that it is not sent before it is tried again."""
    pause: int = 1
    """Values that it will not be sent after its next failure."""


class Trackers:
    """The open trackers of a run; to be used on the main process."""

    def __init__(self, config: Config, update: int, earlier: Iterable[Mapping[str, Any]] = ()) -> None:
        """Open all trackers.

        Args:
            config: the config of the run.
            update: finished updates; -1 before the evaluation of the initial weights.
            earlier: the lines that the run has logged so far.

        Raises:
            InputError: if a tracker cannot be opened for a run that begins, or the file of the ids is damaged. For a
                run that goes on a tracker that cannot be opened is left out, and that is printed.
        """
        self.run, self.sent = Path(config.run), Sent(earlier)
        self.lines: list[_Line] = []
        self.left_out: list[str] = []
        remote = [name for name in config.log.trackers if not TRACKERS[name].writes_beside_log]
        runs = self._read(remote)
        for name in config.log.trackers:
            known = runs.ids.get(name)
            identity = (known or uuid4().hex, known is None, update)
            tracker = self._open(
                name, TrackedRun(self.run, config.log.project, runs.name, *identity), begins=update < 0
            )
            if tracker is None:
                continue
            self.lines.append(_Line(name, tracker))
            if name in remote and known != tracker.id:
                runs = _Runs(runs.name, {**runs.ids, name: tracker.id})
                write_file(self.run / TRACKED / RUNS, json.dumps(vars(runs), indent=1))
            if (known is None and (name in remote or update < 0)) or config.resume == "force":
                self._send(self.lines[-1], lambda tracker=tracker: tracker.settings(hyperparameters(config)))

    def numbers(self, values: Mapping[str, Any]) -> None:
        """Send the metrics of an update, as metrics.jsonl has them."""
        sent = self.sent(values)
        meanings = {shown_name(name): meaning(shown_name(name), name) for name in sent}
        self._numbers({shown_name(name): value for name, value in sent.items()}, meanings, values["update"])

    def results(self, which: str, reports: Mapping[str, Mapping[str, Any]], update: int) -> None:
        """Send test reports by decoding schedule; ``which`` is before, after or best."""
        values = result_values(which, reports)
        self._numbers(values, {name: meaning(name) for name in values}, update)

    def sample(self, sample: Mapping[str, Any], slot: int) -> None:
        """Show one rollout as the text ``samples/{slot}``."""
        text = "\n\n".join(f"**{key}**: {value}" for key, value in sample.items() if key != "update")
        self._each(lambda tracker: tracker.text(f"samples/{slot}", text, sample["update"]))

    def pictures(self, pictures: Mapping[str, Image], update: int) -> None:
        """Show pictures."""
        for name, picture in pictures.items():
            self._each(lambda tracker, name=name, picture=picture: tracker.picture(name, picture, update))

    @property
    def warnings(self) -> list[str]:
        """What trackers have missed, for the report."""
        return [
            *self.left_out,
            *(
                f"the tracker {line.name} missed {line.missed} of {line.asked} writes; metrics.jsonl has all values"
                for line in self.lines
                if line.missed
            ),
        ]

    def close(self) -> None:
        """Close all trackers."""
        for line in self.lines:
            line.waits = 0
            self._send(line, line.tracker.close)

    def _numbers(self, values: Mapping[str, int | float], meanings: Mapping[str, str], update: int) -> None:
        if values:
            self._each(lambda tracker: tracker.numbers(values, meanings, update))

    def _read(self, remote: list[str]) -> _Runs:
        """What trackers know the run by; nothing of a new one."""
        file = self.run / TRACKED / RUNS
        if remote:
            file.parent.mkdir(exist_ok=True)
        if not os.path.lexists(file):
            return _Runs(run_name(self.run), {})
        return read_json(file, _Runs, "remove it to begin new runs in the trackers")

    def _open(self, name: str, run: TrackedRun, begins: bool) -> Tracker | None:
        """Open a tracker; None if that fails for a run that goes on."""
        kind = TRACKERS[name]
        try:
            return kind(run)
        except Exception as error:
            if kind.writes_beside_log:
                raise
            said = f"the tracker {name} cannot be opened ({_reason(error)})"
            if begins:
                raise InputError(f"{said}; log in, choose its offline mode, or take it out of log.trackers") from error
            self._warn(f"{said}; the run continues without it, and metrics.jsonl has all values")
            self.left_out.append(said)
            return None

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for line in self.lines:
            self._send(line, lambda tracker=line.tracker: action(tracker))

    def _send(self, line: _Line, action: Callable[[], None]) -> None:
        """Let a tracker act, unless it failed a short while ago."""
        line.asked += 1
        if line.waits:
            line.waits, line.missed = line.waits - 1, line.missed + 1
            return
        try:
            action()
        except Exception as error:
            if line.tracker.writes_beside_log:
                raise
            if not line.missed:
                self._warn(
                    f"the tracker {line.name} failed ({_reason(error)}); the run continues, tries it again from time "
                    "to time, and counts what it misses"
                )
            line.missed += 1
            line.waits, line.pause = line.pause, min(2 * line.pause, LONGEST_PAUSE)
        else:
            line.pause = 1

    @staticmethod
    def _warn(sentence: str) -> None:
        print(f"dllm-sd: {sentence}", file=sys.stderr)


def _reason(error: Exception) -> str:
    """The kind and the message of a library's error, without a password in an address."""
    return shortened(_PASSWORD.sub("//", f"{type(error).__name__}: {on_one_line(error)}"))
