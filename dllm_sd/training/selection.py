"""Chooses the best weights of a run, and stops training early."""

from dllm_sd.evaluation.estimates import in_percent
from dllm_sd.settings import Evaluation
from dllm_sd.training.checkpoint import State

COLLAPSED = "dev accuracy fell"
"""How `State.stopped` begins if `eval.collapse` stopped the run."""


def add_loss(state: State, loss: float | None) -> None:
    """Add the loss of an update, if it has one, to the mean that `eval.best_by: loss` compares."""
    if loss is not None:
        state.loss_sum = (state.loss_sum or 0.0) + loss
        state.losses += 1


def judge(state: State, settings: Evaluation, accuracy: float) -> bool:
    """Record an evaluation in the state of the run: best accuracy, patience, and whether training stops early.

    Args:
        state: the state of the run, which is changed.
        settings: the settings of `eval`.
        accuracy: accuracy on the dev split.

    Returns:
        Whether these weights are the best ones now. Of equally accurate weights the later ones are the best.
    """
    if settings.best_by == "loss":
        better, best = _judge_loss(state, settings.min_delta)
    else:
        better, best = accuracy > state.best_accuracy, accuracy >= state.best_accuracy
    state.since_best = 0 if better else state.since_best + 1
    if best:
        state.best_accuracy, state.best_update = accuracy, state.update
    improvement = "lower training loss" if settings.best_by == "loss" else "better dev accuracy"
    if settings.patience and state.since_best >= settings.patience:
        state.stopped = f"no {improvement} in {state.since_best} evaluations"
    if settings.collapse and accuracy < state.best_accuracy - settings.collapse:
        state.stopped = f"{COLLAPSED} from {in_percent(state.best_accuracy)} to {in_percent(accuracy)}"
    return best


def _judge_loss(state: State, min_delta: float) -> tuple[bool, bool]:
    """Whether patience starts again, and whether these weights are the best ones by training loss.

    Without a loss since the last evaluation, patience starts again and the best weights stay.
    """
    if state.loss_sum is None:
        return True, False
    loss = state.loss_sum / state.losses
    state.loss_sum, state.losses = None, 0
    best = state.best_loss is None or loss < state.best_loss - min_delta
    if best:
        state.best_loss = loss
    return best, best
