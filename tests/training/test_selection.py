"""Which weights are the best, by dev accuracy or by the training loss, and when a run stops early."""

import json
from pathlib import Path

import pytest

from dllm_sd.config import build_config
from dllm_sd.settings import Evaluation
from dllm_sd.training.checkpoint import ADDED, State, latest_checkpoint, state_of, write_checkpoint
from dllm_sd.training.selection import add_loss, judge
from dllm_sd.training.trainer import Trainer
from tests.training.test_outcome import tree_at


def followed(
    settings: Evaluation, epochs: list[list[float | None]], accuracies: list[float]
) -> tuple[State, list[int]]:
    """The state after evaluations, the first of them before any update, and the updates that were the best then."""
    state, best = State(), []
    for losses, accuracy in zip([[], *epochs], accuracies, strict=True):
        for loss in losses:
            state.update += 1
            add_loss(state, loss)
        if judge(state, settings, accuracy):
            best.append(state.update)
        if state.stopped:
            break
    return state, best


def test_the_epoch_of_the_lowest_training_loss_is_the_best_whatever_the_accuracy():
    state, best = followed(Evaluation(best_by="loss"), [[3.0, 1.0], [1.0, 1.0], [2.0, 1.0]], [0.9, 0.8, 0.1, 0.9])
    assert best == [2, 4]
    assert (state.best_update, state.best_loss, state.best_accuracy, state.since_best) == (4, 1.0, 0.1, 1)


def test_a_run_stops_after_an_epoch_that_lowers_the_loss_by_less_than_it_must():
    """Patience 1 and 1e-4, as the code of arXiv 2605.22675 has it."""
    settings = Evaluation(best_by="loss", min_delta=1e-4, patience=1)
    state, best = followed(settings, [[1.0], [0.9], [0.89995], [0.1]], [0.0] * 5)
    assert best == [1, 2]
    assert (state.update, state.best_update) == (3, 2)
    assert state.stopped == "no lower training loss in 1 evaluations"


def test_epochs_without_a_loss_count_neither_way():
    settings = Evaluation(best_by="loss", patience=1)
    state, best = followed(settings, [[2.0], [None, None], [1.0, None]], [0.0] * 4)
    assert best == [1, 5]
    assert (state.stopped, state.best_loss) == (None, 1.0)


def test_losses_below_zero_are_losses_too():
    state, best = followed(Evaluation(best_by="loss"), [[-1.0], [-2.0], [0.5]], [0.0] * 4)
    assert (best, state.best_loss) == ([1, 2], -2.0)


def test_by_accuracy_the_later_of_equals_is_the_best_and_no_progress():
    state, best = followed(Evaluation(patience=2), [[1.0], [1.0], [1.0]], [0.5, 0.5, 0.5, 0.6])
    assert best == [0, 1, 2]
    assert state.stopped == "no better dev accuracy in 2 evaluations"


def test_a_state_of_before_there_were_losses_is_read(tmp_path: Path):
    write_checkpoint(tmp_path / "one", {}, {name: value for name, value in vars(State()).items() if name not in ADDED})
    assert state_of(tmp_path / "one") == State()


def test_a_stopped_run_compares_the_same_losses_when_it_goes_on(tmp_path: Path):
    found = []
    for name, stop in (("whole", None), ("broken", 3)):
        tree = tree_at(tmp_path, eval={"every": 2, "problems": 2, "best_by": "loss"}, run=str(tmp_path / name))
        if stop:
            Trainer(build_config(tree)).train(stop)
        Trainer(build_config(tree)).train()
        last = latest_checkpoint(tmp_path / name)
        assert last is not None
        state = state_of(last)
        found.append((state.best_loss, state.best_update, state.losses))
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses = [line["loss"] for line in lines if line["update"]]
        means = {2: sum(losses[:2]) / 2, 4: sum(losses[2:]) / 2}
        assert state.best_update == min(means, key=lambda update: means[update])
        assert state.best_loss == pytest.approx(min(means.values()))
    assert found[0] == found[1]
