"""Supervised fine-tuning (SFT): maximum likelihood of the answers, or Dynamic Fine-Tuning."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from app.spec.hyperparameters import SupervisedHyperparameters
from worker.trainer.averages import Averages
from worker.trainer.dataset import Rows
from worker.trainer.launcher import Launcher, TokenCounts, Values, joined
from worker.trainer.logps import TokenScores
from worker.trainer.methods.method import Method, Totals, ValidatedRow
from worker.trainer.model import per_response
from worker.trainer.objectives.supervised import TOKEN_LOSSES
from worker.trainer.packing import Pack


class Supervised(Method):
    """Supervised fine-tuning. The loss of a step is the mean over its scored tokens."""

    DROPOUT = True

    def __init__(self, launcher: Launcher, settings: SupervisedHyperparameters, train: Rows, validation: Rows) -> None:
        super().__init__(launcher, settings, train, validation)
        self.merges = False  # two identical rows count twice
        self.loss = TOKEN_LOSSES[settings.loss]

    def gradient(self, numbers: Sequence[int], averages: Averages, draw: str | None = None) -> TokenCounts:
        totals = Totals.of(self.train, numbers)

        def loss(pack: Pack, _places: Sequence[int]) -> tuple[Tensor, Values]:
            scores = self.policy.score(pack).tokens
            losses = self.loss(scores.logps)  # one per scored token, [N]
            return losses.sum() / totals.scored_tokens, self._sums(pack, scores, losses)

        values, counts = self.launcher.backward(self.plan(numbers), loss, draw)
        _report(values, averages)
        return counts

    def validate(self, averages: Averages, check_stop: Callable[[], None]) -> list[ValidatedRow]:
        def score(pack: Pack) -> Values:
            scores = self.policy.score(pack, entropy=True)
            sums = self._sums(pack, scores.tokens, self.loss(scores.tokens.logps))
            assert scores.tokens.entropy is not None
            return sums | {"entropy": _sum(pack, scores.tokens.entropy), "logps": scores.responses}

        validated, parts = list[ValidatedRow](), list[Values]()
        for segments, values in self.launcher.forward(
            self.segments(self.validation, range(len(self.validation))), score
        ):
            rows = [number for segment in segments for number in segment.rows]
            logps = torch.split(values.pop("logps"), [self.validation.responses(number) for number in rows])
            validated += [ValidatedRow(number, row, None) for number, row in zip(rows, logps, strict=True)]
            parts.append(values)
            check_stop()
        _report(joined(parts), averages)
        return validated

    def _sums(self, pack: Pack, scores: TokenScores, losses: Tensor) -> Values:
        """For each response: its number of scored tokens, and sums over them, in float64."""
        return {
            "tokens": pack.lengths[pack.leaves],
            "loss": _sum(pack, losses),
            "mean_token_accuracy": _sum(pack, scores.correct),
        }


def _sum(pack: Pack, values: Tensor) -> Tensor:
    """The sum over the scored tokens of each response, [R], in float64."""
    return per_response(pack, values.detach().double())


def _report(values: Values, averages: Averages) -> None:
    """Add the means over all scored tokens to `averages`."""
    for name, sums in values.items():
        if name != "tokens":
            averages.add(name, sums, values["tokens"])
