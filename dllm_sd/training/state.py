"""The numbers of a run that a checkpoint holds beside its tensors."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class State:
    """The state of a run beside its tensors, stored in `state.json`. No number falls below its initial value."""

    update: int = 0
    """Finished updates."""
    skipped: int = 0
    """Updates that had nothing to learn from."""
    cursor: int = 0
    """Position in the stream of training problems."""
    too_long: int = 0
    """Problems left out because their prompt is too long."""
    best_update: int = 0
    best_accuracy: float = -1.0
    since_best: int = 0
    """Evaluations since the best one."""
    stopped: str | None = None
    """Why training ended before its last update."""
    before: dict[str, Any] = field(default_factory=dict)
    """Test reports of the initial weights, by decoding schedule."""
    seconds: float = 0.0
    """Time spent in updates."""
    bank: dict[str, Any] | None = None
    """The skill bank, if the run has one."""
    best_loss: float | None = None
    """Lowest mean training loss so far, if `eval.best_by` is loss."""
    loss_sum: float | None = None
    """Sum of the training losses since the last evaluation; None if there was none."""
    losses: int = 0
    """Number of losses in `loss_sum`."""
    unevaluated: dict[str, Any] | None = None
    """Metrics of the last update where the run stopped in its evaluation, which is made when the run goes on."""

    @property
    def logged(self) -> int:
        """The last update whose metrics are logged; -1 before those of the initial weights."""
        return self.update - (self.unevaluated is not None)

    def without_best(self, why: str) -> str:
        """Forget the best weights, which cannot be used; return a sentence that says so, with the reason ``why``."""
        self.best_update, self.best_accuracy, self.since_best = 0, -1.0, 0
        return f"{why}; the best weights are chosen again"
