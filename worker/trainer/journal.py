"""The journal of a run: all metrics so far, for the artifact, for events and for the advisor."""

from collections.abc import Iterable

from app.spec.json_types import JsonObject
from worker.trainer.advice import Advice, Advisor
from worker.trainer.events import Events, Metrics
from worker.trainer.plan import Stage

Entry = JsonObject
"""`step`, `stage`, and the metrics of that step or validation, by name."""


class Journal:
    """The journal of one stage. It appends to `history`, which holds the entries of all stages."""

    def __init__(self, stage: Stage, history: list[Entry], events: Events) -> None:
        self.stage, self.history, self.events = stage, history, events
        self._advisor = Advisor(stage)
        for entry in history:
            if entry["stage"] == stage.name:
                for _ in self._advisor.look(entry):
                    pass  # this advice was given before the run was resumed

    def before(self, step: int) -> None:
        """Give advice on the rows, before the first step. `step`: the number of steps of earlier stages."""
        self._advise(self._advisor.before(), step)

    def write(self, step: int, metrics: dict[str, float], total_steps: int, seconds_remaining: float | None) -> None:
        """Record and report the metrics of a step or of a validation, and give advice on them."""
        self.history.append({"step": step, "stage": self.stage.name, **metrics})
        self._advise(self._advisor.look(self.history[-1]), step)
        self.events.emit(Metrics(self.stage.name, step, total_steps, seconds_remaining, metrics))

    def _advise(self, advice: Iterable[Advice], step: int) -> None:
        for piece in advice:
            data = {"code": piece.code, "step": step, "figures": piece.figures}
            self.events.message(piece.message, level="warn", data=data)


def last_metrics(history: list[Entry], stage: str) -> dict[str, float]:
    """The last recorded value of each metric of `stage`."""
    merged: Entry = {}
    for entry in history:
        if entry["stage"] == stage:
            merged |= entry
    return {name: value for name, value in merged.items() if isinstance(value, float)}
