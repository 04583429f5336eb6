"""What a person sees, and what Ctrl-C does."""

import os
import signal
from collections.abc import Iterator

import pytest

from dllm_sd.training.progress import Interrupt, Progress


def silent() -> Progress:
    return Progress("run", 10, 0, shown=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops(number: signal.Signals):
    with Interrupt(silent()) as interrupt:
        assert not interrupt.asked
        os.kill(os.getpid(), number)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _hangups_count() -> Iterator[None]:
    """A test run under ``nohup`` ignores SIGHUP, and its processes with it."""
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, former)


def test_a_closed_terminal_asks_however_often_it_says_so():
    with Interrupt(silent()) as interrupt:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.asked


def test_a_closed_terminal_is_nothing_to_a_run_that_ignores_it():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt(silent()) as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.asked
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_terminal_that_is_gone_does_not_stop_a_run(monkeypatch: pytest.MonkeyPatch):
    def gone(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with Progress("run", 10, 0, shown=True) as progress, Interrupt(progress) as interrupt:
        monkeypatch.setattr(progress.console, "print", gone)
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupt.asked
        assert progress.console.quiet


def test_the_former_handlers_come_back():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with Interrupt(silent()):
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before
    with pytest.raises(RuntimeError), Interrupt(silent()):
        raise RuntimeError
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_run_without_a_signal_is_not_asked_to_stop():
    with Interrupt(silent()) as interrupt:
        pass
    assert not interrupt.asked


def test_the_first_signal_says_what_happens_next(capsys: pytest.CaptureFixture[str]):
    with Progress("run", 10, 0, shown=True) as progress, Interrupt(progress):
        os.kill(os.getpid(), signal.SIGINT)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "finishing this update, then saving; press Ctrl-C again to stop at once" in " ".join(captured.err.split())


def test_an_evaluation_stays_on_the_screen_as_a_line(capsys: pytest.CaptureFixture[str]):
    with Progress("run", 10, 3, shown=True) as progress:
        progress.phase("learning")
        metrics = {"update": 4, "loss": None, "rollouts/pass_rate": 0.25, "lr": 1.0, "updates_skipped": 0}
        progress.finished(metrics)
        progress.line(metrics | {"eval/accuracy": 0.5})
        progress.line({"update": 5, "loss": 4.2125e-4, "eval/accuracy": 0.5859, "updates_skipped": 2})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "update    4/10  dev accuracy 50.00 %  pass rate 25.00 %\n" in captured.err
    assert "update    5/10  dev accuracy 58.59 %  loss 0.0004213  skipped 2\n" in captured.err


def test_nothing_is_shown_unless_asked_for(capsys: pytest.CaptureFixture[str]):
    with silent() as progress:
        progress.phase("learning")
        progress.finished({"update": 4, "loss": 1.0})
        progress.line({"update": 4, "loss": 1.0, "eval/accuracy": 0.5})
        progress.say("something")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_the_bar_shows_loss_pass_rate_and_skipped_updates_between_evaluations():
    with Progress("run", 10, 3, shown=False) as progress:
        progress.finished({"update": 4, "loss": 4.2125e-4, "rollouts/pass_rate": 0.25, "updates_skipped": 2})
        (task,) = progress.bar.tasks
        assert (task.completed, task.fields["state"]) == (4, "loss 0.0004213  pass rate 25.00 %  skipped 2")
        progress.finished({"update": 5, "loss": None, "updates_skipped": 3})
        assert (task.completed, task.fields["state"]) == (5, "skipped 3")
