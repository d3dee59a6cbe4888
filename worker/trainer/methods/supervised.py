"""Supervised fine-tuning (SFT): maximum likelihood of the answers, or Dynamic Fine-Tuning."""

from collections.abc import Callable, Sequence

import torch

from app.spec.hyperparameters import SupervisedHyperparameters
from worker.trainer.averages import Averages
from worker.trainer.dataset import Rows
from worker.trainer.methods.method import Method, TokenCounts, Totals, ValidatedRow, split_by_row
from worker.trainer.model import Policy
from worker.trainer.objectives.supervised import TOKEN_LOSSES


class Supervised(Method):
    """Supervised fine-tuning. The loss of a step is the mean over its scored tokens."""

    DROPOUT = True

    def __init__(self, policy: Policy, settings: SupervisedHyperparameters, train: Rows, validation: Rows) -> None:
        super().__init__(policy, settings, train, validation)
        self.loss = TOKEN_LOSSES[settings.loss]

    def backward(self, numbers: Sequence[int], totals: Totals, averages: Averages) -> TokenCounts:
        # Rows are not merged: two identical rows count twice.
        packs = list(self.policy.packs(self.train, numbers, merge=False))
        for pack in packs:
            scores = self.policy.score(pack).tokens
            losses = self.loss(scores.logps)  # one per scored token, [N]
            averages.add("loss", losses)
            averages.add("mean_token_accuracy", scores.correct)
            loss = self.policy.loss_scale * losses.sum() / totals.scored_tokens
            loss.backward()  # type: ignore[no-untyped-call]
        return TokenCounts.of(packs)

    def validate(self, averages: Averages, check_stop: Callable[[], None]) -> list[ValidatedRow]:
        validated: list[ValidatedRow] = []
        with torch.no_grad():
            for pack in self.policy.packs(self.validation, range(len(self.validation)), merge=False):
                scores = self.policy.score(pack, entropy=True)
                averages.add("loss", self.loss(scores.tokens.logps))
                averages.add("mean_token_accuracy", scores.tokens.correct)
                if scores.tokens.entropy is not None:
                    averages.add("entropy", scores.tokens.entropy)
                logps = split_by_row(scores.responses.cpu(), pack.row_of, len(pack.rows))
                validated += [ValidatedRow(number, row, None) for number, row in zip(pack.rows, logps, strict=True)]
                check_stop()
        return validated
