"""The progress bar of a run, and how Ctrl-C ends the run."""

import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dllm_sd.evaluation.estimates import in_percent


class Progress:
    """A progress bar on stderr, with a line for every evaluation. Prints nothing unless ``shown``."""

    def __init__(self, name: str, updates: int, done: int, shown: bool) -> None:
        self.console = Console(stderr=True, quiet=not shown)
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self.task = self.bar.add_task(name, total=updates, completed=done, state="", note="")
        self.updates = updates

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # the terminal is gone
            self.bar.stop()

    def phase(self, text: str) -> None:
        """Show what the run is doing."""
        self.bar.update(self.task, note=text)

    def finished(self, metrics: Mapping[str, Any]) -> None:
        """Advance the bar after an update, and show its loss, its pass rate, and how many were skipped so far."""
        self.bar.update(self.task, completed=metrics["update"], state="  ".join(_fields(metrics)))

    def line(self, metrics: Mapping[str, Any]) -> None:
        """Print the result of an evaluation as a line that stays on the screen."""
        accuracy = f"dev accuracy {in_percent(metrics['eval/accuracy'])}"
        self.say("  ".join([f"update {metrics['update']:>4}/{self.updates}", accuracy, *_fields(metrics)]))

    def say(self, text: str) -> None:
        """Print one line; if the terminal is gone, print nothing from now on."""
        try:
            self.console.print(text, highlight=False)
        except OSError:
            self.console.quiet = True


def _fields(metrics: Mapping[str, Any]) -> list[str]:
    """Loss, pass rate and skipped updates, as far as an update has them."""
    loss, rate = metrics.get("loss"), metrics.get("rollouts/pass_rate")
    fields = [f"loss {loss:.4g}"] if loss is not None else []
    fields += [f"pass rate {in_percent(rate)}"] if rate is not None else []
    return fields + ([f"skipped {skipped}"] if (skipped := metrics.get("updates_skipped")) else [])


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Sent by Ctrl-C, by schedulers, and by a terminal that is closed (often twice)."""


class Interrupt:
    """Context in which the first of `SIGNALS` sets ``asked``, so that the update is finished and saved first.

    A second signal stops at once. A second SIGHUP does not, and SIGHUP is left alone where it is ignored, as by
    ``nohup``.
    """

    def __init__(self, progress: Progress) -> None:
        self.asked = False
        self.progress = progress
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        on_main_thread = threading.current_thread() is threading.main_thread()  # no other can handle signals
        for number in SIGNALS if on_main_thread else ():
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGHUP:
            return
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.progress.say("finishing this update, then saving; press Ctrl-C again to stop at once")
