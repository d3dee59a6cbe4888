"""DPO and its kin: a loss over the log-probs of whole responses, or over rewards."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from app.spec.datasets.example import Kind
from app.spec.hyperparameters import DPOHyperparameters, Hyperparameters
from worker.trainer.averages import Averages
from worker.trainer.dataset import Rows
from worker.trainer.methods.method import Method, Totals, ValidatedRow, Work, split_by_row
from worker.trainer.methods.metrics import report
from worker.trainer.methods.mismatches import with_mismatches
from worker.trainer.model import Policy, per_response
from worker.trainer.objectives import losses_of
from worker.trainer.objectives.batch import Batch
from worker.trainer.packing import Pack, columns
from worker.trainer.reference import Reference, References


class Responses(NamedTuple):
    """Everything that is computed of the R responses of a pack's rows, each [R]."""

    rows: tuple[int, ...]
    """The numbers of the rows, as many as the pack has."""
    row_of: Tensor
    """Which of `rows` each response belongs to."""
    lengths: Tensor
    """Scored tokens."""
    values: Tensor
    """The policy as the loss sees it: log π(y|x), or the reward of a reward model."""
    logps: Tensor
    """log π(y|x) as the model says it, or the reward."""
    alignment: Tensor | None
    """How likely the policy is to write each response (WPO), where the job asks for it."""
    reference: Tensor
    """The reference as the loss sees it; zero where it has none."""
    reference_logps: Tensor
    """log π_ref(y|x) as the model says it."""


class Preference(Method):
    """The loss of a step is the mean over its rows.

    `anchor` holds the weights of a reference that follows the policy (TR-DPO), by name. Once it has `moved`, what was
    computed at the start is of no use.
    """

    def __init__(self, policy: Policy, settings: DPOHyperparameters, train: Rows, validation: Rows) -> None:
        super().__init__(policy, settings, train, validation)
        self.settings = settings
        self.references: References | None = None
        self.anchor: dict[str, Tensor] | None = None
        self.moved = False
        if settings.sync_reference is not None:
            self.anchor = {name: p.detach().clone() for name, p in policy.trainable().items()}

    @staticmethod
    def arranged(rows: Rows, settings: Hyperparameters, max_length: int) -> Rows:
        """KTO compares each answer with one to another prompt."""
        return with_mismatches(rows, max_length) if settings.data == Kind.LABELLED else rows

    @staticmethod
    def groups(rows: Rows, batch_size: int) -> list[list[int]]:
        """Rows of one prompt stand together, so that it is computed once for them: at most a quarter of a batch."""
        most, groups = max(1, batch_size // 4), list[list[int]]()
        open_groups: dict[bytes, list[int]] = {}
        for number, prompt in enumerate(rows.prompts()):
            group = open_groups.get(prompt)
            if group is None or len(group) == most:
                group = open_groups[prompt] = []
                groups.append(group)
            group.append(number)
        return groups

    def begin(self, references: Callable[[float | None], References]) -> None:
        if self.settings.needs_reference:
            self.references = references(self.settings.ld_alpha)

    # -- a step --------------------------------------------------------------------------------------------------

    def totals(self, batch: Sequence[int], averages: Averages, *, divided: bool = False) -> Totals:
        """Where rows depend on each other, the metrics of the whole batch go to `averages` here, once."""
        counts = Totals.of(self.train, batch)
        packs = list(self._packs(self.train, batch)) if self.settings.couples else []
        if len(packs) <= 1 and not (packs and divided):
            return counts
        # ∂L/∂θ = Σ_r ∂L/∂log π(y_r) · ∂log π(y_r)/∂θ, so that one graph at a time is enough (as in GradCache, Gao et
        # al. 2021). All log-probs come first, without a graph; the price is a second forward pass.
        known = None if self.references is None else self.references.train
        with torch.no_grad():
            parts = [self._responses(pack, known) for pack in packs]
        leaves = [part._replace(values=part.values.requires_grad_()) for part in parts]
        table = self._batch(leaves, counts.chosen_length, self.train)
        losses = losses_of(table, self.settings)
        report(table, losses, self.settings, averages)
        shares = torch.autograd.grad(losses.sum() / counts.rows, [part.values for part in leaves])
        return Totals(counts.rows, counts.scored_tokens, counts.chosen_tokens, _by_row(parts, shares))

    def backward(self, rows: Sequence[int], totals: Totals, averages: Averages) -> Work:
        packs = list(self._packs(self.train, rows))
        known = None if self.references is None else self.references.train
        for pack in packs:
            if totals.shares is not None:
                share = torch.cat([totals.shares[number] for number in pack.rows])
                self._values(pack)[0].backward(self.policy.loss_scale * share)  # type: ignore[no-untyped-call]
                continue
            part = self._responses(pack, known)
            batch = self._batch([part], totals.chosen_length, self.train)
            losses = losses_of(batch, self.settings)
            report(batch, losses, self.settings, averages)
            (self.policy.loss_scale * losses.sum() / totals.rows).backward()  # type: ignore[no-untyped-call]
        return Work.of(packs)

    def after_step(self, step: int) -> None:
        sync = self.settings.sync_reference
        if sync is None or step % sync.steps:
            return
        trained = self.policy.trainable()
        for name, weights in (self.anchor or {}).items():
            weights.lerp_(trained[name].detach(), sync.alpha)
        self.moved = True

    # -- a validation --------------------------------------------------------------------------------------------

    def validate(self, averages: Averages, tick: Callable[[], None]) -> list[ValidatedRow]:
        """A loss that couples rows is taken over all validation rows at once."""
        parts, everything = list[Responses](), range(len(self.validation))
        known = None if self.references is None else self.references.validation
        with torch.no_grad():
            for pack in self._packs(self.validation, everything):
                parts.append(self._responses(pack, known))
                tick()
            chosen_length = Totals.of(self.validation, everything).chosen_length
            batch = self._batch(parts, chosen_length, self.validation)
            report(batch, losses_of(batch, self.settings), self.settings, averages)
        validated: list[ValidatedRow] = []
        for part in parts:
            logps = split_by_row(part.logps.cpu(), part.row_of, len(part.rows))
            theirs: Sequence[Tensor | None] = [None] * len(part.rows)
            if self.settings.needs_reference:
                theirs = split_by_row(part.reference_logps.cpu(), part.row_of, len(part.rows))
            validated += map(ValidatedRow, part.rows, logps, theirs)
        return validated

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        state = {}
        if self.references is not None:
            parts = {"train": self.references.train, "validation": self.references.validation}
            state["reference"] = {
                f"{part}/{name}": v for part, known in parts.items() for name, v in vars(known).items()
            }
        if self.anchor is not None:
            state["anchor"] = self.anchor
        return state

    def load_state_dict(self, state: Mapping[str, dict[str, Tensor]], step: int) -> None:
        if "reference" in state:
            flat, names = state["reference"], ("logps", "first", "seen")
            train, validation = (
                Reference(*(flat[f"{part}/{name}"] for name in names)) for part in ("train", "validation")
            )
            self.references = References(train, validation)
        if "anchor" in state:
            sync = self.settings.sync_reference
            self.anchor = {name: weights.to(self.policy.device) for name, weights in state["anchor"].items()}
            self.moved = sync is not None and step >= sync.steps

    # -- log-probs -----------------------------------------------------------------------------------------------

    def _packs(self, rows: Rows, numbers: Sequence[int]) -> Iterator[Pack]:
        """LD-DPO compares the lengths of a row's responses, so that its rows are not merged."""
        return self.policy.packs(rows, numbers, merge=self.settings.ld_alpha is None)

    def _responses(self, pack: Pack, known: Reference | None) -> Responses:
        """Everything that is computed of the responses of a pack's rows; `known` has their reference log-probs."""
        reference, reference_logps = self._reference(pack, known)
        values, logps, alignment = self._values(pack)
        lengths = pack.lengths[pack.leaves]
        return Responses(pack.rows, pack.row_of, lengths, values, logps, alignment, reference, reference_logps)

    def _values(self, pack: Pack) -> tuple[Tensor, Tensor, Tensor | None]:
        """(what the loss sees, log-probs or rewards, WPO's alignment) of each response of `pack`, [R]."""
        if self.policy.reward_head is not None:
            rewards = self.policy.rewards(pack)
            return rewards, rewards.detach(), None
        weighing = bool(self.settings.use_weighting)
        scores = self.policy.score(pack, alignment=weighing, tail_weight=self.settings.ld_alpha)
        alignment = scores.tokens.alignment
        if alignment is not None:
            alignment = per_response(pack, alignment) / pack.lengths[pack.leaves]
        return scores.responses, per_response(pack, scores.tokens.logps.detach()), alignment

    def _reference(self, pack: Pack, known: Reference | None) -> tuple[Tensor, Tensor]:
        """The reference's values for each response of `pack` as the loss sees them, and its log-probs, each [R]."""
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

    def _batch(self, parts: Sequence[Responses], chosen_length: float, rows: Rows) -> Batch:
        """The flat values [R] of the rows of `parts` as tables [B, K]."""
        ends = torch.tensor([len(part.rows) for part in parts]).cumsum(0).tolist()
        row_of = torch.cat([part.row_of + (end - len(part.rows)) for part, end in zip(parts, ends, strict=True)])
        column = columns(row_of)
        shape = (ends[-1], max(rows.responses(number) for part in parts for number in part.rows))

        def table(flat: Sequence[Tensor]) -> Tensor:
            joined = torch.cat(list(flat))
            return joined.new_zeros(shape).index_put((row_of, column), joined)

        policy = table([part.values for part in parts])
        reference = table([part.reference for part in parts]).to(policy.dtype)
        reference_logps = table([part.reference_logps for part in parts]).to(policy.dtype)
        desirable = rows.desirable([number for part in parts for number in part.rows])
        alignment = [part.alignment for part in parts if part.alignment is not None]
        return Batch(
            policy,
            reference,
            table([part.lengths for part in parts]),
            table([torch.ones_like(row_of, dtype=torch.bool)]),
            torch.tensor(desirable, device=policy.device),
            chosen_length,
            table(alignment) if alignment else None,
            None if self.settings.ld_alpha is None else (table([part.logps for part in parts]), reference_logps),
        )


def _by_row(parts: Sequence[Responses], shares: Sequence[Tensor]) -> dict[int, Tensor]:
    """∂L/∂log π of each row's responses, [K], on the policy's device; of a row that the batch has twice, the mean."""
    found: dict[int, list[Tensor]] = {}
    for part, share in zip(parts, shares, strict=True):
        for number, values in zip(part.rows, split_by_row(share, part.row_of, len(part.rows)), strict=True):
            found.setdefault(number, []).append(values)
    return {number: values[0] if len(values) == 1 else torch.stack(values).mean(0) for number, values in found.items()}
