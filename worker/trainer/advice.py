"""What someone who has trained such models before would say while one trains: what is seen, and what to do.

An `Advisor` reads the history of a stage as it is written, and says each thing once. It is a function of the history
alone: a run that is resumed reads what was there again, and does not repeat itself.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from worker.trainer.plan import Stage

WINDOW = 10
"""Steps whose mean stands for the training batches of now."""
FALL = 0.05
"""Of what the chosen answers' log-prob was, is more than noise."""
EXPLODED = 10.0
"""A mean margin at which σ(−margin), the gradient's weight, is below 5e-5."""
SATURATED = 0.995
EARLY = 0.75
"""The share of the steps before which saturated means that the others are for nothing."""
LENGTH_DRIFT = 0.15
"""How much more often than in the data the longer answer has the higher reward."""
WORSE = 0.02
"""Of the validation loss at the start."""
MOST_ROWS = 10_000
"""Rows that are looked at for identical sides."""


@dataclass(frozen=True)
class Advice:
    """`code` names it for programs; `figures` are what it was seen by."""

    code: str
    message: str
    figures: dict[str, float]


class Advisor:
    """Of one stage; `look` at each entry of its history, in order."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.compares = stage.hyperparameters.data.compares
        self._window: deque[dict[str, Any]] = deque(maxlen=WINDOW)
        self._first: dict[str, float] = {}
        """What each metric was when it was measured first."""
        self._said: set[str] = set()
        self._steps = 0

    def before(self) -> Iterator[Advice]:
        """What the rows say before the first step."""
        if not self.compares:
            return
        looked = min(len(self.stage.train), MOST_ROWS)
        same = sum(
            len({response.ids for response in self.stage.train[number].responses}) == 1 for number in range(looked)
        )
        if same:
            yield Advice(
                "identical_sides",
                f"{same} of {looked} rows have the same tokens on both sides, after truncation to 'max_length': they "
                "teach nothing. Raise 'max_length', or look at what the chat template does to the answers.",
                {"rows": float(same), "looked_at": float(looked)},
            )

    def look(self, entry: dict[str, Any]) -> Iterator[Advice]:
        """What is new to say after `entry`, a step or the validation before the first one."""
        metrics = {name: value for name, value in entry.items() if isinstance(value, float)}
        for name, value in metrics.items():
            self._first.setdefault(name, value)
        if "loss" in metrics:
            self._steps += 1
            self._window.append(metrics)
        for advice in self._seen(metrics):
            if advice.code not in self._said:
                self._said.add(advice.code)
                yield advice

    def _seen(self, metrics: dict[str, float]) -> Iterable[Advice]:
        yield from self._validation(metrics)
        if not self.compares:
            return
        yield from self._displacement(metrics)
        yield from self._length(metrics)
        if len(self._window) < WINDOW:
            return
        yield from self._margins()
        yield from self._nothing()

    def _mean(self, name: str) -> float | None:
        values = [metrics[name] for metrics in self._window if name in metrics]
        return sum(values) / len(values) if values else None

    def _validation(self, metrics: dict[str, float]) -> Iterator[Advice]:
        now, before = metrics.get("eval/loss"), self._first.get("eval/loss")
        if now is not None and before is not None and now > before + WORSE * abs(before):
            yield Advice(
                "validation_worse_than_at_start",
                f"The validation loss is {now:.4g}; before the first step it was {before:.4g}. The training does harm "
                "to what it was not trained on: lower 'learning_rate' or 'n_epochs', raise 'beta', or set "
                "'early_stopping'.",
                {"eval/loss": now, "eval/loss/start": before},
            )

    def _displacement(self, metrics: dict[str, float]) -> Iterator[Advice]:
        """Likelihood displacement (Razin et al. 2024): on the same rows, or beside the reference, both sides fall."""
        if "eval/logps/chosen" in metrics and self._steps:
            start = self._first["eval/logps/chosen"], self._first["eval/logps/rejected"]
            change = metrics["eval/logps/chosen"] - start[0], metrics["eval/logps/rejected"] - start[1]
            level = abs(start[0])
        else:
            chosen, rejected, logps = (
                self._mean(name) for name in ("logratios/chosen", "logratios/rejected", "logps/chosen")
            )
            if chosen is None or rejected is None or logps is None or len(self._window) < WINDOW:
                return
            change, level = (chosen, rejected), abs(logps - chosen)
        if max(change) < 0 and change[0] < -max(1.0, FALL * level):
            yield Advice(
                "likelihood_displacement",
                f"The log-probs of chosen and rejected answers both fall, by {-change[0]:.1f} and {-change[1]:.1f} "
                "nats: what gains is neither. Lower 'learning_rate', raise 'beta', or add the loss 'sft' "
                '([{"name": "sigmoid"}, {"name": "sft", "weight": 0.1}]); \'apo_zero\' keeps the chosen ones up by '
                "itself.",
                {"chosen": change[0], "rejected": change[1]},
            )

    def _length(self, metrics: dict[str, float]) -> Iterator[Advice]:
        now, rows = metrics.get("eval/rewards/longer_preferred"), self.stage.validation
        if now is None or not self._steps or len(rows) < 50:
            return
        sides = [(row.responses[0].ids, row.responses[-1].ids) for row in rows]
        data = sum((len(chosen) > len(rejected)) + (len(chosen) == len(rejected)) / 2 for chosen, rejected in sides)
        if now > data / len(sides) + LENGTH_DRIFT:
            yield Advice(
                "length_drift",
                f"The longer answer has the higher reward in {now:.0%} of the validation pairs; people preferred it "
                f"in {data / len(sides):.0%}. The model learns length: try the loss 'simpo' or 'sigmoid_norm', or "
                "'ld_alpha', or balance the lengths of the data.",
                {"longer_preferred": now, "longer_chosen": data / len(sides)},
            )

    def _margins(self) -> Iterator[Advice]:
        margin, accuracy = self._mean("rewards/margins"), self._mean("rewards/accuracies")
        if margin is not None and margin > EXPLODED:
            yield Advice(
                "margins_exploding",
                f"The mean margin is {margin:.1f}: the pairs teach nothing more, and the model still moves away from "
                "its reference. Lower 'learning_rate' or 'n_epochs'; the losses 'ipo' and 'robust' bound the margin.",
                {"rewards/margins": margin},
            )
        done = self._steps / self.stage.steps
        if accuracy is not None and accuracy >= SATURATED and done < EARLY:
            yield Advice(
                "accuracy_saturated",
                f"{accuracy:.1%} of the pairs are ranked right after {done:.0%} of the steps: what follows overfits. "
                "Train for fewer steps or set 'early_stopping'; and see whether something simple, such as length, "
                "tells the sides apart.",
                {"rewards/accuracies": accuracy},
            )

    def _nothing(self) -> Iterator[Advice]:
        if all(metrics.get("grad_norm") == 0.0 for metrics in self._window):
            yield Advice(
                "nothing_is_learned",
                f"The gradient was zero for {WINDOW} steps: the two sides of the pairs are the same for the model, or "
                "the loss is flat here. Look at the data's report, and at 'max_length'.",
                {"grad_norm": 0.0},
            )
