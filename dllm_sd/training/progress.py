"""What a person sees while a run goes on, and how Ctrl-C ends it."""

import signal
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """A progress bar on stderr; evaluations stay on screen as lines. Silent unless ``shown``."""

    def __init__(self, name: str, updates: int, done: int, shown: bool) -> None:
        self.console = Console(stderr=True, quiet=not shown)
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self.task = self.bar.add_task(name, total=updates, completed=done, note="")
        self.updates = updates

    def __enter__(self) -> "Progress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # the terminal is gone
            self.bar.stop()

    def phase(self, text: str) -> None:
        """What is going on."""
        self.bar.update(self.task, note=text)

    def finished(self, update: int) -> None:
        """An update is done."""
        self.bar.update(self.task, completed=update)

    def line(self, metrics: Mapping[str, Any]) -> None:
        """Leave the result of an evaluation on the screen."""
        words = [f"update {metrics['update']:>4}/{self.updates}"]
        names = {"eval/accuracy": "dev accuracy", "loss": "loss", "rollouts/pass_rate": "pass rate"}
        words += [f"{label} {metrics[key]:.4f}" for key, label in names.items() if metrics.get(key) is not None]
        self.say("  ".join(words))

    def say(self, text: str) -> None:
        """One line; where the terminal is gone, this and all that follows is for nobody."""
        try:
            self.console.print(text, highlight=False)
        except OSError:
            self.console.quiet = True


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C; what a scheduler sends; what a terminal sends that is closed, often twice."""


class Interrupt:
    """Inside, the first of `SIGNALS` only asks: the update is finished and saved. A second one stops at once.

    SIGHUP never does more than ask, and nothing where it is ignored, as by ``nohup``.
    """

    def __init__(self, progress: Progress) -> None:
        self.asked = False
        self.progress = progress
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in SIGNALS:
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
