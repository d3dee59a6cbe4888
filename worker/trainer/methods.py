"""The two methods: what a step's gradient is, and what a validation finds.

A method takes rows by number, packs them, and asks the policy for scores. The loss of a step is a mean over its
rows (for SFT: over its scored tokens), whatever packs they are in.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from app.spec.datasets.example import Kind
from app.spec.hyperparameters import DPOHyperparameters, SupervisedHyperparameters
from worker.trainer.averages import Averages
from worker.trainer.data import Row
from worker.trainer.model import Policy, per_response
from worker.trainer.objectives import losses_of, rewards_of
from worker.trainer.objectives.batch import Batch
from worker.trainer.objectives.supervised import LOSSES
from worker.trainer.packing import Pack, columns
from worker.trainer.reference import Reference

Found = list[tuple[int, Tensor, Tensor | None]]
"""(number of the row, log-probs of its responses, the reference's) of validated rows."""


@dataclass(frozen=True)
class Work:
    """What the packs of a step held: distinct tokens, places (with padding), and scored tokens."""

    tokens: int
    places: int
    scored: int

    @classmethod
    def of(cls, packs: Sequence[Pack]) -> "Work":
        sums = (sum(values) for values in zip(*((p.tokens, p.places, len(p.targets)) for p in packs), strict=True))
        return cls(*sums)


class Part(NamedTuple):
    """What a batch needs to know of a pack: its rows, and of each of their responses the row and the scored tokens."""

    rows: tuple[int, ...]
    row_of: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, pack: Pack) -> "Part":
        return cls(pack.rows, pack.row_of, pack.lengths[pack.leaves])


class Values(NamedTuple):
    """Values of each response of a pack, [R]: those that the loss sees, the log-probs (a reward model's rewards), and
    WPO's alignment.
    """

    seen: Tensor
    logps: Tensor
    alignment: Tensor | None


class Method(Protocol):
    """SFT or a preference method, on the rows of one stage."""

    def backward(self, numbers: list[int], averages: Averages) -> Work:
        """Add the gradient of the step's loss over the training rows `numbers`, times the policy's scale, to what
        trains.
        """
        ...

    def evaluate(self, averages: Averages, tick: Callable[[], None]) -> Found:
        """Validate: metrics go to `averages`; `tick` is called after each pack."""
        ...

    def after_step(self, step: int) -> None:
        """Optimizer step `step` (from 1) is done."""
        ...


@dataclass
class Supervised:
    """Maximum likelihood of the answers."""

    policy: Policy
    settings: SupervisedHyperparameters
    train: Sequence[Row]
    validation: Sequence[Row]

    def backward(self, numbers: list[int], averages: Averages) -> Work:
        # Rows are not merged: two that are the same count twice.
        packs = list(self.policy.packs(self.train, numbers, merge=False))
        count = sum(len(pack.targets) for pack in packs)
        for pack in packs:
            scores = self.policy.score(pack).tokens
            losses = LOSSES[self.settings.loss](scores.logps)
            averages.add("loss", losses)
            averages.add("mean_token_accuracy", scores.correct)
            (self.policy.loss_scale * losses.sum() / count).backward()  # type: ignore[no-untyped-call]
        return Work.of(packs)

    def evaluate(self, averages: Averages, tick: Callable[[], None]) -> Found:
        found: Found = []
        with torch.no_grad():
            for pack in self.policy.packs(self.validation, range(len(self.validation)), merge=False):
                scores = self.policy.score(pack, entropy=True)
                averages.add("loss", LOSSES[self.settings.loss](scores.tokens.logps))
                averages.add("mean_token_accuracy", scores.tokens.correct)
                if scores.tokens.entropy is not None:
                    averages.add("entropy", scores.tokens.entropy)
                found += [
                    (n, v, None) for n, v in zip(pack.rows, _by_row(Part.of(pack), scores.responses), strict=True)
                ]
                tick()
        return found

    def after_step(self, step: int) -> None:
        pass


@dataclass
class References:
    """The reference log-probs of the rows to train on and to validate on."""

    train: Reference
    validation: Reference


@dataclass
class Preference:
    """A loss over the log-probs of whole responses, or over rewards.

    `anchor` holds the weights of a reference that follows the policy (TR-DPO), by name; once it has `moved`, what
    was computed at the start is of no use.
    """

    policy: Policy
    settings: DPOHyperparameters
    train: Sequence[Row]
    validation: Sequence[Row]
    references: References | None
    anchor: dict[str, Tensor] | None = None
    moved: bool = False

    def __post_init__(self) -> None:
        if self.settings.sync_reference is not None and self.anchor is None:
            self.anchor = {name: p.detach().clone() for name, p in self.policy.trainable().items()}

    def backward(self, numbers: list[int], averages: Averages) -> Work:
        packs = list(self.policy.packs(self.train, numbers, merge=self.settings.ld_alpha is None))
        chosen = sum(self.train[number].scored for number in numbers) / len(numbers)
        known = None if self.references is None else self.references.train
        references = [self._reference(pack, known) for pack in packs]
        if self.settings.couples and len(packs) > 1:
            self._backward_coupled(packs, references, chosen, averages)
        else:
            for pack, reference in zip(packs, references, strict=True):
                batch = self._batch([Part.of(pack)], [self._values(pack)], [reference], chosen, self.train)
                losses = losses_of(batch, self.settings)
                report(batch, losses, self.settings, averages)
                (self.policy.loss_scale * losses.sum() / len(numbers)).backward()  # type: ignore[no-untyped-call]
        return Work.of(packs)

    def _backward_coupled(
        self, packs: list[Pack], references: list[tuple[Tensor, Tensor]], chosen: float, averages: Averages
    ) -> None:
        """Where rows depend on each other: all log-probs first, then the gradient of each pack with its share.

        ∂L/∂θ = Σ_r ∂L/∂log π(y_r) · ∂log π(y_r)/∂θ, so that one graph at a time is enough (as in GradCache, Gao et
        al. 2021); the price is a second forward pass.
        """
        with torch.no_grad():
            values = [self._values(pack) for pack in packs]
        leaves = [one._replace(seen=one.seen.requires_grad_()) for one in values]
        batch = self._batch([Part.of(pack) for pack in packs], leaves, references, chosen, self.train)
        losses = losses_of(batch, self.settings)
        report(batch, losses, self.settings, averages)
        shares = torch.autograd.grad(losses.mean(), [one.seen for one in leaves])
        for pack, share in zip(packs, shares, strict=True):
            self._values(pack).seen.backward(self.policy.loss_scale * share)  # type: ignore[no-untyped-call]

    def evaluate(self, averages: Averages, tick: Callable[[], None]) -> Found:
        """A loss that couples rows is taken over all validation rows at once."""
        merge = self.settings.ld_alpha is None
        known = None if self.references is None else self.references.validation
        parts, values, references = list[Part](), list[Values](), list[tuple[Tensor, Tensor]]()
        with torch.no_grad():
            for pack in self.policy.packs(self.validation, range(len(self.validation)), merge=merge):
                parts.append(Part.of(pack))
                values.append(self._values(pack))
                references.append(self._reference(pack, known))
                tick()
            mean = sum(row.scored for row in self.validation) / len(self.validation)
            batch = self._batch(parts, values, references, mean, self.validation)
            report(batch, losses_of(batch, self.settings), self.settings, averages)
        rows: Found = []
        for part, mine, (_, theirs) in zip(parts, values, references, strict=True):
            split: list[Tensor | None] = [None] * len(part.rows)
            if self.settings.needs_reference:
                split = list(_by_row(part, theirs))
            rows += list(zip(part.rows, _by_row(part, mine.logps), split, strict=True))
        return rows

    def after_step(self, step: int) -> None:
        sync = self.settings.sync_reference
        if sync is None or step % sync.steps:
            return
        trained = self.policy.trainable()
        for name, weights in (self.anchor or {}).items():
            weights.lerp_(trained[name].detach(), sync.alpha)
        self.moved = True

    def _values(self, pack: Pack) -> Values:
        if self.policy.reward_head is not None:
            rewards = self.policy.rewards(pack)
            return Values(rewards, rewards.detach(), None)
        weighing = bool(self.settings.use_weighting)
        scores = self.policy.score(pack, alignment=weighing, tail_weight=self.settings.ld_alpha)
        alignment = scores.tokens.alignment
        if alignment is not None:
            alignment = per_response(pack, alignment) / pack.lengths[pack.leaves]
        return Values(scores.responses, per_response(pack, scores.tokens.logps.detach()), alignment)

    def _reference(self, pack: Pack, known: Reference | None) -> tuple[Tensor, Tensor]:
        """The reference's values for each response of each row of `pack`, as the loss sees them, and its log-probs.

        Each is [R], and zero where the loss has no reference.
        """
        if self.moved and self.anchor is not None:
            with torch.no_grad(), self._reference_weights(self.anchor):
                return self._values(pack)[:2]
        if known is None:
            none = torch.zeros(len(pack.leaves), device=self.policy.device)
            return none, none
        row = pack.row_of.cpu()
        seen, logps = known.of(torch.tensor(pack.rows)[row], columns(row))
        return seen.to(self.policy.device), logps.to(self.policy.device)

    @contextmanager
    def _reference_weights(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """The policy with the reference's weights in the place of its own."""
        trained = self.policy.trainable()
        own = {name: parameter.data for name, parameter in trained.items()}
        try:
            for name, parameter in trained.items():
                parameter.data = weights[name]
            yield
        finally:
            for name, parameter in trained.items():
                parameter.data = own[name]

    def _batch(
        self,
        parts: list[Part],
        values: list[Values],
        references: list[tuple[Tensor, Tensor]],
        mean_length: float,
        rows: Sequence[Row],
    ) -> Batch:
        """Flat values [R] of the rows of `parts` as a table [B, K]."""
        counts = torch.tensor([len(part.rows) for part in parts]).cumsum(0).tolist()
        row_of = torch.cat([part.row_of + (end - len(part.rows)) for part, end in zip(parts, counts, strict=True)])
        column = columns(row_of)
        shape = (counts[-1], max(len(rows[number].responses) for part in parts for number in part.rows))

        def table(flat: Sequence[Tensor]) -> Tensor:
            joined = torch.cat(list(flat))
            return joined.new_zeros(shape).index_put((row_of, column), joined)

        policy = table([one.seen for one in values])
        reference, plain = (table([one[k] for one in references]).to(policy.dtype) for k in range(2))
        desirable = [rows[number].desirable for part in parts for number in part.rows]
        alignment = [one.alignment for one in values if one.alignment is not None]
        return Batch(
            policy,
            reference,
            table([part.lengths for part in parts]),
            table([torch.ones_like(row_of, dtype=torch.bool)]),
            torch.tensor(desirable, device=policy.device),
            mean_length,
            table(alignment) if alignment else None,
            None if self.settings.ld_alpha is None else (table([one.logps for one in values]), plain),
        )


def _by_row(part: Part, values: Tensor) -> list[Tensor]:
    """`values` [R] of the rows of `part`, one tensor a row, on the CPU."""
    counts = torch.bincount(part.row_of, minlength=len(part.rows)).tolist()
    return list(torch.split(values.cpu(), counts))


def report(batch: Batch, losses: Tensor, settings: DPOHyperparameters, averages: Averages) -> None:
    """The metrics of some rows: TRL's names, and where it has none, ours."""
    averages.add("loss", losses.detach())
    weights = gradient_weights(batch, settings)
    with torch.no_grad():
        rewards, (logps, reference) = rewards_of(batch, settings), batch.logps
        logratios = logps - reference
        if settings.data == Kind.LABELLED:
            _report_labelled(batch, rewards, weights, averages)
            return
        averages.add("gradient_weight", weights)
        last = batch.present.sum(1, keepdim=True) - 1
        sides = {"chosen": torch.zeros_like(last), "rejected": last}
        for side, column in sides.items():
            averages.add(f"rewards/{side}", rewards.gather(1, column))
            if not settings.rewards:
                averages.add(f"logps/{side}", logps.gather(1, column))
            if settings.needs_reference:
                averages.add(f"logratios/{side}", logratios.gather(1, column))
        margins = rewards[:, :1] - rewards.gather(1, last)
        better = rewards[:, :, None] > rewards[:, None, :]
        ordered = (batch.present[:, :, None] & batch.present[:, None, :]).triu(1)
        averages.add("rewards/margins", margins)
        longer = (batch.lengths[:, :1] - batch.lengths.gather(1, last)) * margins
        averages.add("rewards/longer_preferred", (longer.sign() + 1) / 2)
        averages.add("rewards/accuracies", better[ordered].float())


def gradient_weights(batch: Batch, settings: DPOHyperparameters) -> Tensor:
    """How strongly each row still teaches, [B]: the fall of its loss for a rise of its reward margin, −∂L/∂(r_w − r_l).

    For DPO it is σ(r̂_l − r̂_w), the weight in the gradient of its loss (Rafailov et al. 2023, Sec. 4), less ε with
    label smoothing. Found from the loss itself: half of what the best and the worst response get, each by its reward's
    slope. A labelled row has one response, whose reward is to rise or to fall.
    """
    with torch.enable_grad():
        policy = batch.policy.detach().requires_grad_()
        seen = replace(batch, policy=policy)
        (slopes,) = torch.autograd.grad(rewards_of(seen, settings).sum(), policy)
        (gradient,) = torch.autograd.grad(losses_of(seen, settings).sum(), policy)
    by_reward = torch.where(slopes != 0, gradient / slopes, 0.0)
    if settings.data == Kind.LABELLED:
        return torch.where(batch.desirable, -by_reward[:, 0], by_reward[:, 0])
    last = batch.present.sum(1, keepdim=True) - 1
    return (by_reward.gather(1, last)[:, 0] - by_reward[:, 0]) / 2


def _report_labelled(batch: Batch, rewards: Tensor, weights: Tensor, averages: Averages) -> None:
    divergence = batch.rejected.mean().clamp(min=0)
    averages.add("kl", divergence)
    averages.add("gradient_weight", weights)
    for side, rows in (("chosen", batch.desirable), ("rejected", ~batch.desirable)):
        averages.add(f"rewards/{side}", rewards[rows, 0])
        averages.add(f"logps/{side}", batch.policy[rows, 0])
        averages.add(f"logratios/{side}", batch.chosen[rows])
    averages.add("rewards/accuracies", ((batch.chosen > divergence) == batch.desirable).float())
