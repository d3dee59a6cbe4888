"""Everything that a run has measured so far: kept for the artifact, told as events, and read by the advisor."""

from collections.abc import Iterable
from typing import Any

from worker.trainer.advice import Advice, Advisor
from worker.trainer.events import Events, Metrics
from worker.trainer.plan import Stage

Entry = dict[str, Any]
"""`step`, `stage`, and the metrics of that step or validation."""


class Journal:
    """The journal of one stage. `history` has the entries of all stages, and goes on growing here."""

    def __init__(self, stage: Stage, history: list[Entry], events: Events) -> None:
        self.stage, self.history, self.events = stage, history, events
        self._advisor = Advisor(stage)
        for entry in history:
            if entry["stage"] == stage.name:
                for _ in self._advisor.look(entry):
                    pass  # it was said when it was written

    def before(self, step: int) -> None:
        """Say what the rows tell before the first step; `step` counts those of earlier stages."""
        self._advise(self._advisor.before(), step)

    def write(self, step: int, metrics: dict[str, float], total_steps: int, seconds_remaining: float | None) -> None:
        """Keep and tell the metrics of a step or of a validation, and what is to be said of them."""
        self.history.append({"step": step, "stage": self.stage.name, **metrics})
        self._advise(self._advisor.look(self.history[-1]), step)
        self.events.emit(Metrics(self.stage.name, step, total_steps, seconds_remaining, metrics))

    def _advise(self, advice: Iterable[Advice], step: int) -> None:
        for one in advice:
            data = {"code": one.code, "step": step, "figures": one.figures}
            self.events.message(one.message, level="warn", data=data)


def last_metrics(history: list[Entry], stage: str) -> dict[str, float]:
    """The last value of each metric of `stage`."""
    merged: Entry = {}
    for entry in history:
        if entry["stage"] == stage:
            merged |= entry
    return {name: value for name, value in merged.items() if isinstance(value, float)}
