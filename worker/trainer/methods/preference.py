"""Preference methods (DPO and others): a loss on the log-probs of whole responses, or on rewards."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from app.spec.datasets.example import Kind
from app.spec.hyperparameters import DPOHyperparameters, Hyperparameters
from worker.trainer.averages import Averages
from worker.trainer.dataset import Rows
from worker.trainer.methods.method import Method, TokenCounts, Totals, ValidatedRow, split_by_row
from worker.trainer.methods.metrics import report
from worker.trainer.methods.mismatches import with_mismatches
from worker.trainer.model import Policy, per_response
from worker.trainer.objectives import losses_of
from worker.trainer.objectives.batch import Batch
from worker.trainer.packing import Pack, columns
from worker.trainer.reference import Reference, References


class Responses(NamedTuple):
    """Scores of the R responses of a pack's rows, row by row. All tensors are [R]."""

    rows: tuple[int, ...]
    """The numbers of the pack's rows."""
    row_of: Tensor
    """The index in `rows` of each response's row."""
    lengths: Tensor
    """Number of scored tokens."""
    values: Tensor
    """The values that the loss compares: log π(y|x), with LD-DPO's weights if any; or the reward of a reward model."""
    logps: Tensor
    """log π(y|x) without LD-DPO's weights, or the reward. Without gradient."""
    alignment: Tensor | None
    """log w(x, y) of WPO: the likelihood of each response under the policy, per token. None without WPO."""
    reference: Tensor
    """The reference's counterpart of `values`; zero without a reference."""
    reference_logps: Tensor
    """log π_ref(y|x) without LD-DPO's weights; zero without a reference."""


class Preference(Method):
    """A preference method. The loss of a step is the mean over its rows.

    `references` are the reference log-probs computed before the first step. With TR-DPO, `anchor` holds the trained
    weights of the reference, by name. Once the anchor has `moved`, `references` are out of date and the reference is
    evaluated in each step.
    """

    def __init__(self, policy: Policy, settings: DPOHyperparameters, train: Rows, validation: Rows) -> None:
        super().__init__(policy, settings, train, validation)
        self.settings = settings
        self.references: References | None = None
        self.anchor: dict[str, Tensor] | None = None
        self.moved = False
        if settings.sync_reference is not None:
            trained = policy.trainable()
            self.anchor = {name: parameter.detach().clone() for name, parameter in trained.items()}

    @staticmethod
    def prepare_rows(rows: Rows, settings: Hyperparameters, max_length: int) -> Rows:
        """For KTO, add to each row an answer to another prompt."""
        return with_mismatches(rows, max_length) if settings.data == Kind.LABELLED else rows

    @staticmethod
    def groups(rows: Rows, batch_size: int) -> list[list[int]]:
        """Groups of rows with the same prompt, which a batch then computes once. At most a quarter of a batch each."""
        largest, groups = max(1, batch_size // 4), list[list[int]]()
        open_groups: dict[bytes, list[int]] = {}
        for number, prompt in enumerate(rows.prompts()):
            group = open_groups.get(prompt)
            if group is None or len(group) == largest:
                group = open_groups[prompt] = []
                groups.append(group)
            group.append(number)
        return groups

    def begin(self, references: Callable[[float | None], References]) -> None:
        if self.settings.needs_reference:
            self.references = references(self.settings.ld_alpha)

    # -- a step --------------------------------------------------------------------------------------------------

    def totals(self, numbers: Sequence[int], averages: Averages, *, divided: bool = False) -> Totals:
        """The totals of a batch. A loss that couples rows of several packs or parts is computed and reported here."""
        counts = Totals.of(self.train, numbers)
        packs = list(self._packs(self.train, numbers)) if self.settings.couples else []
        if len(packs) <= 1 and not (packs and divided):
            return counts
        # Chain rule: ∂L/∂θ = Σ_r ∂L/∂log π(y_r) · ∂log π(y_r)/∂θ. First compute all log-probs without a graph, and from
        # them the first factors. `backward` then builds the graph of one pack at a time for the second factors. The
        # price is a second forward pass (as in GradCache, Gao et al. 2021).
        references = None if self.references is None else self.references.train
        with torch.no_grad():
            parts = [self._responses(pack, references) for pack in packs]
        leaf_parts = [part._replace(values=part.values.requires_grad_()) for part in parts]
        batch = self._batch(leaf_parts, counts.chosen_length, self.train)
        losses = losses_of(batch, self.settings)
        report(batch, losses, self.settings, averages)
        gradients = torch.autograd.grad(losses.sum() / counts.rows, [part.values for part in leaf_parts])  # [R] each
        return Totals(counts.rows, counts.scored_tokens, counts.chosen_tokens, _by_row(parts, gradients))

    def backward(self, numbers: Sequence[int], totals: Totals, averages: Averages) -> TokenCounts:
        packs = list(self._packs(self.train, numbers))
        references = None if self.references is None else self.references.train
        for pack in packs:
            if totals.logp_gradients is not None:  # `totals` has computed the loss and ∂L/∂log π
                gradient = torch.cat([totals.logp_gradients[number] for number in pack.rows])  # [R]
                self._values(pack)[0].backward(self.policy.loss_scale * gradient)  # type: ignore[no-untyped-call]
                continue
            part = self._responses(pack, references)
            batch = self._batch([part], totals.chosen_length, self.train)
            losses = losses_of(batch, self.settings)  # [B]
            report(batch, losses, self.settings, averages)
            (self.policy.loss_scale * losses.sum() / totals.rows).backward()  # type: ignore[no-untyped-call]
        return TokenCounts.of(packs)

    def after_step(self, step: int) -> None:
        """TR-DPO (Gorbatovski et al. 2024): every `steps` steps, π_ref ← α π + (1 − α) π_ref, on the weights."""
        sync = self.settings.sync_reference
        if sync is None or step % sync.steps:
            return
        trained = self.policy.trainable()
        for name, weights in (self.anchor or {}).items():
            weights.lerp_(trained[name].detach(), sync.alpha)
        self.moved = True

    # -- a validation --------------------------------------------------------------------------------------------

    def validate(self, averages: Averages, check_stop: Callable[[], None]) -> list[ValidatedRow]:
        """The loss is computed over all validation rows at once, because it may couple rows."""
        parts, numbers = list[Responses](), range(len(self.validation))
        references = None if self.references is None else self.references.validation
        with torch.no_grad():
            for pack in self._packs(self.validation, numbers):
                parts.append(self._responses(pack, references))
                check_stop()
            chosen_length = Totals.of(self.validation, numbers).chosen_length
            batch = self._batch(parts, chosen_length, self.validation)
            report(batch, losses_of(batch, self.settings), self.settings, averages)
        validated: list[ValidatedRow] = []
        for part in parts:
            logps = split_by_row(part.logps.cpu(), part.row_of, len(part.rows))
            reference_logps: Sequence[Tensor | None] = [None] * len(part.rows)
            if self.settings.needs_reference:
                reference_logps = split_by_row(part.reference_logps.cpu(), part.row_of, len(part.rows))
            validated += map(ValidatedRow, part.rows, logps, reference_logps)
        return validated

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        state = {}
        if self.references is not None:
            parts = {"train": self.references.train, "validation": self.references.validation}
            state["reference"] = {
                f"{part}/{name}": tensor for part, rows in parts.items() for name, tensor in vars(rows).items()
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
        """The rows `numbers` in packs. LD-DPO compares the responses of a row, so its rows are not merged."""
        return self.policy.packs(rows, numbers, merge=self.settings.ld_alpha is None)

    def _responses(self, pack: Pack, references: Reference | None) -> Responses:
        """The scores of the responses of a pack's rows. `references`: the precomputed reference log-probs."""
        reference, reference_logps = self._reference(pack, references)
        values, logps, alignment = self._values(pack)
        lengths = pack.lengths[pack.leaves]  # [R]
        return Responses(pack.rows, pack.row_of, lengths, values, logps, alignment, reference, reference_logps)

    def _values(self, pack: Pack) -> tuple[Tensor, Tensor, Tensor | None]:
        """The fields `values`, `logps` and `alignment` of `Responses`: one forward pass of `pack`. [R] each."""
        if self.policy.reward_head is not None:
            rewards = self.policy.rewards(pack)
            return rewards, rewards.detach(), None
        wpo = bool(self.settings.use_weighting)
        scores = self.policy.score(pack, alignment=wpo, tail_weight=self.settings.ld_alpha)
        alignment = scores.tokens.alignment
        if alignment is not None:  # mean over the tokens of each response
            alignment = per_response(pack, alignment) / pack.lengths[pack.leaves]
        return scores.responses, per_response(pack, scores.tokens.logps.detach()), alignment

    def _reference(self, pack: Pack, references: Reference | None) -> tuple[Tensor, Tensor]:
        """The fields `reference` and `reference_logps` of `Responses`. [R] each."""
        if self.moved and self.anchor is not None:
            with torch.no_grad(), self._reference_weights(self.anchor):
                return self._values(pack)[:2]
        if references is None:
            zeros = torch.zeros(len(pack.leaves), device=self.policy.device)
            return zeros, zeros
        row = pack.row_of.cpu()  # `references` are on the CPU
        values, logps = references.look_up(torch.tensor(pack.rows)[row], columns(row))
        return values.to(self.policy.device), logps.to(self.policy.device)

    @contextmanager
    def _reference_weights(self, weights: dict[str, Tensor]) -> Iterator[None]:
        """Temporarily replace the policy's trained weights by the reference's."""
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
        """Arrange the flat scores [R] of `parts` as tables [B, K]: each row's responses in order, then zeros."""
        ends = torch.tensor([len(part.rows) for part in parts]).cumsum(0).tolist()  # end of each part in the B rows
        # The row of each response, [R], counted over all parts.
        row_of = torch.cat([part.row_of + (end - len(part.rows)) for part, end in zip(parts, ends, strict=True)])
        column = columns(row_of)  # [R]
        shape = (ends[-1], max(rows.responses(number) for part in parts for number in part.rows))  # (B, K)

        def table(flat: Sequence[Tensor]) -> Tensor:
            joined = torch.cat(list(flat))  # [R] of all parts
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


def _by_row(parts: Sequence[Responses], gradients: Sequence[Tensor]) -> dict[int, Tensor]:
    """∂L/∂log π of the responses of each row number, [K]. A row that the batch has twice gets the mean, used twice."""
    by_row: dict[int, list[Tensor]] = {}
    for part, gradient in zip(parts, gradients, strict=True):
        for number, values in zip(part.rows, split_by_row(gradient, part.row_of, len(part.rows)), strict=True):
            by_row.setdefault(number, []).append(values)
    return {number: values[0] if len(values) == 1 else torch.stack(values).mean(0) for number, values in by_row.items()}
