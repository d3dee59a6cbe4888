"""Early stopping: the best validation of a stage, and the number of validations since."""

from dataclasses import dataclass

from app.spec.hyperparameters import EarlyStopping
from app.spec.metrics import VALIDATION


@dataclass
class Best:
    """The best validation of a stage so far. Checkpoints store it as JSON."""

    value: float | None = None
    """Its value of the watched metric; None before the first validation."""
    step: int = 0
    validations_since: int = 0
    """Number of validations since then, none of which improved it."""

    def improves(self, settings: EarlyStopping, metrics: dict[str, float], step: int) -> bool:
        """Record the validation after `step`. Returns whether it is the best so far, by more than `min_delta`."""
        value = metrics[settings.metric]
        gain = 0.0 if self.value is None else value - self.value
        if VALIDATION[settings.metric].better == "lower":
            gain = -gain  # positive: better
        if self.value is None or gain > settings.min_delta:
            self.value, self.step, self.validations_since = value, step, 0
            return True
        self.validations_since += 1
        return False
