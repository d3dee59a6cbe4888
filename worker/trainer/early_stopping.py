"""Early stopping: which validation of a stage was the best, and when it is too long ago."""

from dataclasses import dataclass

from app.spec.hyperparameters import EarlyStopping
from app.spec.metrics import VALIDATION


@dataclass
class Best:
    """The best validation of a stage so far; kept in checkpoints."""

    value: float | None = None
    step: int = 0
    without: int = 0
    """Validations since then."""

    def improves(self, settings: EarlyStopping, metrics: dict[str, float], step: int) -> bool:
        """Take the validation of `step` into account; whether it is the best so far."""
        value = metrics[settings.metric]
        gain = 0.0 if self.value is None else value - self.value
        if VALIDATION[settings.metric].better == "lower":
            gain = -gain
        if self.value is None or gain > settings.min_delta:
            self.value, self.step, self.without = value, step, 0
            return True
        self.without += 1
        return False
