"""Advice during training: each piece names a problem and what to do about it.

An `Advisor` reads the history of a stage as it is written, and gives each piece of advice once. It depends on the
history alone: a resumed run reads the earlier entries again and does not repeat itself.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from app.spec.datasets.example import Kind
from app.spec.json_types import JsonObject
from worker.trainer.plan import Stage

WINDOW = 10
"""Number of latest steps whose mean stands for the current training batches."""
FALL = 0.05
"""Relative drop of the chosen log-prob that counts as displacement; less is noise."""
EXPLODED = 10.0
"""Mean margin that is too large: σ(−margin), the weight of the gradient, is below 5e-5 here."""
SATURATED = 0.995
"""Mean accuracy from which the pairs count as learned."""
EARLY = 0.75
"""Share of the steps. If the accuracy saturates before it, the remaining steps overfit."""
LENGTH_DRIFT = 0.15
"""Tolerated excess of the share of pairs in which the longer answer wins, over that share in the data."""
WORSE = 0.02
"""Relative rise of the validation loss over its start that counts as harm."""
NO_SIGNAL = 0.9
"""Mean share of prompts whose answers all have the same reward, from which answers teach too little."""
COLLAPSED = 0.2
"""Share of its first value below which the entropy of answers counts as collapsed."""
GROWN = 2.0
"""How many times longer than at first answers may become."""
MIN_LENGTH_ROWS = 50
"""Validation rows that are needed to see a drift of the length."""
MOST_ROWS = 10_000
"""Number of rows that are checked for identical sides."""


WARNINGS = {
    "likelihood_displacement": (
        f"The log-probs of chosen and rejected answers both fall, and the chosen ones by more than {FALL:.0%} and 1 nat"
    ),
    "margins_exploding": f"The mean margin of {WINDOW} steps is above {EXPLODED:g}",
    "accuracy_saturated": (
        f"{WINDOW} steps rank {SATURATED:.1%} of the pairs right, before {EARLY:.0%} of the steps are done"
    ),
    "length_drift": (
        f"In validation, the longer answer wins {100 * LENGTH_DRIFT:.0f} points more often than people preferred it. "
        f"Needs {MIN_LENGTH_ROWS} validation rows"
    ),
    "validation_worse_than_at_start": f"The validation loss is {WORSE:.0%} above its value before the first step",
    "identical_sides": (
        f"Some of the first {MOST_ROWS:,} rows have the same tokens on both sides, mostly because `max_length` cut them"
    ),
    "rewards_all_equal": (
        f"In {WINDOW} steps of reinforcement, all answers to {NO_SIGNAL:.0%} of the prompts have the same reward"
    ),
    "entropy_collapsed": f"The entropy of the answers in {WINDOW} steps is below {COLLAPSED:.0%} of its first value",
    "answers_grow": f"The answers of {WINDOW} steps are more than {GROWN:g} times longer than the first ones",
    "nothing_is_learned": f"The gradient was zero for {WINDOW} steps",
    "untrained_control_tokens": "The texts have control tokens whose embeddings the base never learned",
    "template_never_ends": "The chat template writes nothing from which a model could learn to stop",
    "validation_prompts_in_training": "Validation rows have prompts that training rows have too",
}
"""The code of every warning of a training, and when it comes. The docs show this table."""


@dataclass(frozen=True)
class Advice:
    """A piece of advice. `code` names it for programs; `figures` are the measurements behind it."""

    code: str
    message: str
    figures: dict[str, float]


class Advisor:
    """Gives advice on one stage. Call `look` with each entry of the history, in order."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.compares = stage.hyperparameters.data.compares
        self.writes = stage.hyperparameters.data == Kind.PROMPTS
        """Whether the model writes the answers that it learns from."""
        self._window: deque[JsonObject] = deque(maxlen=WINDOW)
        self._first: dict[str, float] = {}
        """First measured value of each metric."""
        self._codes: set[str] = set()
        """Codes of the advice that was already given."""
        self._steps = 0

    def before(self) -> Iterator[Advice]:
        """Advice from the rows alone, before the first step."""
        if not self.compares:
            return
        checked = min(len(self.stage.train), MOST_ROWS)
        identical = sum(
            len({response.ids for response in self.stage.train[number].responses}) == 1 for number in range(checked)
        )
        if identical:
            yield Advice(
                "identical_sides",
                f"{identical} of {checked} rows have the same tokens on both sides, after truncation to 'max_length'. "
                "They teach nothing. Raise 'max_length', or check what the chat template does to the answers.",
                {"rows": float(identical), "looked_at": float(checked)},
            )

    def look(self, entry: JsonObject) -> Iterator[Advice]:
        """New advice after `entry`: a step, or the validation before the first step."""
        metrics = {name: value for name, value in entry.items() if isinstance(value, float)}
        for name, value in metrics.items():
            self._first.setdefault(name, value)
        if "loss" in metrics:
            self._steps += 1
            self._window.append(metrics)
        for advice in self._matching(metrics):
            if advice.code not in self._codes:
                self._codes.add(advice.code)
                yield advice

    def _matching(self, metrics: dict[str, float]) -> Iterable[Advice]:
        """All advice that applies now, whether it was given before or not."""
        if self.writes:
            yield from self._rollouts()
            return
        yield from self._validation(metrics)
        if not self.compares:
            return
        yield from self._displacement(metrics)
        yield from self._length(metrics)
        if len(self._window) < WINDOW:
            return
        yield from self._margins()
        yield from self._zero_gradient()

    def _mean(self, name: str) -> float | None:
        """Mean of a metric over the window; None if no step in it has the metric."""
        values = [metrics[name] for metrics in self._window if name in metrics]
        return sum(values) / len(values) if values else None

    def _rollouts(self) -> Iterator[Advice]:
        """Signs that reinforcement has nothing to learn, or learns something else than was meant."""
        names = ("rollouts/without_signal", "rollouts/entropy", "rollouts/tokens")
        equal, entropy, tokens = (self._mean(name) for name in names)
        if len(self._window) < WINDOW or equal is None or entropy is None or tokens is None:
            return
        first_entropy, first_tokens = self._first["rollouts/entropy"], self._first["rollouts/tokens"]
        if equal >= NO_SIGNAL:
            yield Advice(
                "rewards_all_equal",
                f"In {WINDOW} steps all answers to {equal:.0%} of the prompts have the same reward, so they teach "
                "nothing. If the reward is high, the task is learned: stop. If it is low, take easier prompts, more "
                "'samples', or a grader that gives parts of a reward.",
                {"rollouts/without_signal": equal},
            )
        if entropy < COLLAPSED * first_entropy:
            yield Advice(
                "entropy_collapsed",
                f"The entropy of the answers fell from {first_entropy:.3g} to {entropy:.3g} nats a token. The model "
                "writes nearly the same answer each time, and finds no better one. Raise 'beta', or lower "
                "'learning_rate'.",
                {"rollouts/entropy": entropy, "rollouts/entropy/start": first_entropy},
            )
        if tokens > GROWN * first_tokens:
            yield Advice(
                "answers_grow",
                f"The answers grew from {first_tokens:.0f} to {tokens:.0f} tokens. Check whether the grader prefers "
                "length, or words that long answers are likelier to have.",
                {"rollouts/tokens": tokens, "rollouts/tokens/start": first_tokens},
            )

    def _validation(self, metrics: dict[str, float]) -> Iterator[Advice]:
        loss, first_loss = metrics.get("eval/loss"), self._first.get("eval/loss")
        if loss is not None and first_loss is not None and loss > first_loss + WORSE * abs(first_loss):
            yield Advice(
                "validation_worse_than_at_start",
                f"The validation loss is {loss:.4g}; before the first step it was {first_loss:.4g}. The training harms "
                "the model on data that it does not train on. Lower 'learning_rate' or 'n_epochs', raise 'beta', or "
                "set 'early_stopping'.",
                {"eval/loss": loss, "eval/loss/start": first_loss},
            )

    def _displacement(self, metrics: dict[str, float]) -> Iterator[Advice]:
        """Likelihood displacement (Razin et al. 2024): the log-probs of both sides fall.

        A validation is compared with the first one, on the same rows. Training batches are compared with the reference.
        """
        # `change`: (chosen, rejected), in nats per answer. `level`: |chosen log-prob| at the start.
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
            change, level = (chosen, rejected), abs(logps - chosen)  # logps − logratio = the reference's log-prob
        if max(change) < 0 and change[0] < -max(1.0, FALL * level):
            yield Advice(
                "likelihood_displacement",
                f"The log-probs of chosen and rejected answers both fall, by {-change[0]:.1f} and {-change[1]:.1f} "
                "nats. Other texts gain probability. Lower 'learning_rate', raise 'beta', or add the loss 'sft' "
                '([{"name": "sigmoid"}, {"name": "sft", "weight": 0.1}]). The loss \'apo_zero\' keeps the chosen '
                "log-probs up by itself.",
                {"chosen": change[0], "rejected": change[1]},
            )

    def _length(self, metrics: dict[str, float]) -> Iterator[Advice]:
        """Length bias: in validation the longer answer wins more often than in the data."""
        share, rows = metrics.get("eval/rewards/longer_preferred"), self.stage.validation
        if share is None or not self._steps or len(rows) < MIN_LENGTH_ROWS:
            return
        sides = [(row.responses[0].ids, row.responses[-1].ids) for row in rows]
        # Pairs whose chosen answer is longer; equal lengths count half.
        longer_chosen = sum(
            (len(chosen) > len(rejected)) + (len(chosen) == len(rejected)) / 2 for chosen, rejected in sides
        )
        if share > longer_chosen / len(sides) + LENGTH_DRIFT:
            yield Advice(
                "length_drift",
                f"The longer answer has the higher reward in {share:.0%} of the validation pairs. In the data it is "
                f"preferred in {longer_chosen / len(sides):.0%}. The model learns to prefer length. Try the loss "
                "'simpo' or 'sigmoid_norm', or 'ld_alpha', or balance the lengths in the data.",
                {"longer_preferred": share, "longer_chosen": longer_chosen / len(sides)},
            )

    def _margins(self) -> Iterator[Advice]:
        """The pairs are learned: the margin is very large, or nearly all pairs are ranked right."""
        margin, accuracy = self._mean("rewards/margins"), self._mean("rewards/accuracies")
        if margin is not None and margin > EXPLODED:
            yield Advice(
                "margins_exploding",
                f"The mean margin is {margin:.1f}. The pairs teach nothing more, and the model still moves away from "
                "its reference. Lower 'learning_rate' or 'n_epochs'. The losses 'ipo' and 'robust' bound the margin.",
                {"rewards/margins": margin},
            )
        share = self._steps / self.stage.steps
        if accuracy is not None and accuracy >= SATURATED and share < EARLY:
            yield Advice(
                "accuracy_saturated",
                f"{accuracy:.1%} of the pairs are ranked right after {share:.0%} of the steps. Further steps overfit. "
                "Train for fewer steps or set 'early_stopping'. Check whether something simple, such as length, "
                "distinguishes the two sides.",
                {"rewards/accuracies": accuracy},
            )

    def _zero_gradient(self) -> Iterator[Advice]:
        """The gradient was exactly zero in every step of the window."""
        if all(metrics.get("grad_norm") == 0.0 for metrics in self._window):
            yield Advice(
                "nothing_is_learned",
                f"The gradient was zero for {WINDOW} steps. Either both sides of the pairs are the same for the "
                "model, or the loss is flat here. Check the data's report and 'max_length'.",
                {"grad_norm": 0.0},
            )
