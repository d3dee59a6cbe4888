"""Preference methods (DPO and others): a loss on the log-probs of whole responses, or on rewards."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from app.spec.datasets.example import Kind
from app.spec.hyperparameters import DPOHyperparameters, Hyperparameters
from worker.trainer import weights
from worker.trainer.arrays import Shelf
from worker.trainer.averages import Averages
from worker.trainer.dataset import Groups, Rows
from worker.trainer.hardware import upload
from worker.trainer.launcher import Launcher, TokenCounts, Values, joined
from worker.trainer.methods.method import Method, Totals, ValidatedRow
from worker.trainer.methods.metrics import report
from worker.trainer.methods.mismatches import with_mismatches
from worker.trainer.model import per_response
from worker.trainer.objectives import losses_of
from worker.trainer.objectives.batch import Batch
from worker.trainer.packing import Pack, columns
from worker.trainer.reference import Reference, References
from worker.trainer.segments import StepPlan


class Preference(Method):
    """A preference method. The loss of a step is the mean over its rows.

    The values of a response, by name: `values`, which the loss compares: log π(y|x), with LD-DPO's weights if any, or
    the reward of a reward model; `logps`, log π(y|x) without these weights, or the reward; `reference` and
    `reference_logps`, the reference's counterparts, zero without a reference; `lengths`, the number of scored tokens;
    with WPO, `alignment`, log w(x, y): the likelihood of the response under the policy, per token.

    `references` are the reference log-probs computed before the first step. With TR-DPO, `anchor` holds the trained
    weights of the reference, by name. Once the anchor has `moved`, `references` are out of date and the reference is
    evaluated in each step.
    """

    def __init__(self, launcher: Launcher, settings: DPOHyperparameters, train: Rows, validation: Rows) -> None:
        super().__init__(launcher, settings, train, validation)
        self.settings = settings
        self.merges = settings.ld_alpha is None  # LD-DPO compares the responses of a row
        self.references: References | None = None
        self.anchor: dict[str, Tensor] | None = None
        self.moved = False
        launcher.rewards = settings.rewards
        if settings.sync_reference is not None:
            self.anchor = weights.copied(self.policy)

    @staticmethod
    def prepare_rows(rows: Rows, settings: Hyperparameters, max_length: int, shelf: Shelf) -> Rows:
        """For KTO, add to each row an answer to another prompt."""
        return with_mismatches(rows, max_length, shelf) if settings.data == Kind.LABELLED else rows

    @staticmethod
    def groups(rows: Rows, batch_size: int) -> Groups:
        """Groups of rows with the same prompt, which a batch then computes once. At most a quarter of a batch each."""
        return Groups.of(rows.prompts(), max(1, batch_size // 4))

    def begin(self, references: Callable[[float | None], References]) -> None:
        if self.settings.needs_reference:
            self.references = references(self.settings.ld_alpha)

    # -- a step --------------------------------------------------------------------------------------------------

    def gradient(self, numbers: Sequence[int], averages: Averages, draw: str | None = None) -> TokenCounts:
        totals = Totals.of(self.train, numbers)
        references = None if self.references is None else self.references.train
        plan = self.plan(numbers)
        slopes = self._slopes(plan, totals, references) if self.settings.couples else None

        def loss(pack: Pack, places: Sequence[int]) -> tuple[Tensor, Values]:
            if slopes is not None:  # chain rule: Σ_r ∂L/∂log π(y_r) · log π(y_r) has the gradient of L
                values = self._scores(pack)
                slope = upload(torch.cat([slopes[place] for place in places]), self.policy.device)  # [R]
                return (slope * values["values"]).sum(), values | self._references(pack, references)
            values = self._scores(pack) | self._references(pack, references)
            batch = self._batch(values, pack.row_of, pack.rows, self.train, totals)
            return losses_of(batch, self.settings).sum() / totals.rows, values

        values, counts = self.launcher.backward(plan, loss, draw)
        self._report(values, plan.rows, self.train, totals, averages)
        return counts

    def _slopes(self, plan: StepPlan, totals: Totals, references: Reference | None) -> list[Tensor]:
        """For a loss that couples rows: ∂L/∂log π(y) of the responses of each segment of `plan`, on the CPU.

        All log-probs are computed first, without a graph. The price is a second forward pass (as in GradCache, Gao et
        al. 2021).
        """

        def score(pack: Pack) -> Values:
            return self._scores(pack) | self._references(pack, references)

        values = joined([part for _, part in self.launcher.forward(plan.segments, score)])
        values["values"].requires_grad_()
        batch = self._batch(values, _row_of(plan.rows, self.train), plan.rows, self.train, totals)
        loss = losses_of(batch, self.settings).sum() / totals.rows
        (gradient,) = torch.autograd.grad(loss, values["values"])  # [R]
        return list(torch.split(gradient, [segment.responses for segment in plan.segments]))

    def after_step(self, step: int) -> None:
        """TR-DPO (Gorbatovski et al. 2024): every `steps` steps, π_ref ← α π + (1 − α) π_ref, on the weights."""
        sync = self.settings.sync_reference
        if sync is None or step % sync.steps:
            return
        trained = self.policy.trainable()
        for name, values in (self.anchor or {}).items():
            values.lerp_(trained[name].detach(), sync.alpha)
        self._move()

    def _move(self) -> None:
        """From now on, compute the log-probs of the reference, which has moved, beside those of the policy."""
        self.moved, self.launcher.forward_passes = True, 2

    # -- a validation --------------------------------------------------------------------------------------------

    def validate(self, averages: Averages, check_stop: Callable[[], None]) -> list[ValidatedRow]:
        """The loss is computed over all validation rows at once, because it may couple rows."""
        references = None if self.references is None else self.references.validation
        parts, rows = list[Values](), list[int]()

        def score(pack: Pack) -> Values:
            return self._scores(pack) | self._references(pack, references)

        for segments, part in self.launcher.forward(self.segments(self.validation, range(len(self.validation))), score):
            parts.append(part)
            rows += [number for segment in segments for number in segment.rows]
            check_stop()
        values, totals = joined(parts), Totals.of(self.validation, rows)
        self._report(values, rows, self.validation, totals, averages)
        counts = [self.validation.responses(number) for number in rows]
        logps = torch.split(values["logps"], counts)
        reference_logps: Sequence[Tensor | None] = [None] * len(rows)
        if self.settings.needs_reference:
            reference_logps = torch.split(values["reference_logps"], counts)
        return list(map(ValidatedRow, rows, logps, reference_logps))

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
            self.anchor = {name: values.to(self.policy.device) for name, values in state["anchor"].items()}
            if sync is not None and step >= sync.steps:
                self._move()

    # -- log-probs -----------------------------------------------------------------------------------------------

    def _scores(self, pack: Pack) -> Values:
        """The policy's values of the responses of a pack: one forward pass. [R] each."""
        lengths = pack.lengths[pack.leaves]
        if self.policy.reward_head is not None:
            rewards = self.policy.rewards(pack)
            return {"values": rewards, "logps": rewards.detach(), "lengths": lengths}
        wpo = bool(self.settings.use_weighting)
        scores = self.policy.score(pack, alignment=wpo, tail_weight=self.settings.ld_alpha)
        logps = per_response(pack, scores.tokens.logps.detach())
        values = {"values": scores.responses, "logps": logps, "lengths": lengths}
        if scores.tokens.alignment is not None:  # mean over the tokens of each response
            values["alignment"] = per_response(pack, scores.tokens.alignment) / lengths
        return values

    def _references(self, pack: Pack, references: Reference | None) -> Values:
        """The reference's values of the responses of a pack, [R] each. `references`: those computed before."""
        if self.moved and self.anchor is not None:
            with torch.no_grad(), weights.swapped(self.policy, self.anchor):
                values = self._scores(pack)
            return {"reference": values["values"], "reference_logps": values["logps"]}
        if references is None:
            zeros = torch.zeros(len(pack.leaves), device=self.policy.device)
            return {"reference": zeros, "reference_logps": zeros}
        seen, logps = references.look_up(*torch.from_numpy(pack.places).unbind(1))
        return {
            "reference": upload(seen, self.policy.device), "reference_logps": upload(logps, self.policy.device)
        }  # fmt: skip

    def _report(self, values: Values, numbers: Sequence[int], rows: Rows, totals: Totals, averages: Averages) -> None:
        """Add the metrics of the rows `numbers` to `averages`. `values` are those of their responses, row after row."""
        batch = self._batch(values, _row_of(numbers, rows), numbers, rows, totals)
        report(batch, losses_of(batch, self.settings), self.settings, averages)

    def _batch(self, values: Values, row_of: Tensor, numbers: Sequence[int], rows: Rows, totals: Totals) -> Batch:
        """Arrange flat `values` [R] as tables [B, K]: the responses of each row in order, then zeros.

        `numbers` are those of the rows; `row_of` [R] is the index in them of each response's row.
        """
        shape, place = (len(numbers), totals.most_responses), (row_of, columns(row_of))  # (B, K)

        def table(flat: Tensor) -> Tensor:
            return flat.new_zeros(shape).index_put(place, flat)

        policy = table(values["values"])
        reference, reference_logps = (table(values[name]).to(policy.dtype) for name in ("reference", "reference_logps"))
        alignment = values.get("alignment")
        return Batch(
            policy,
            reference,
            table(values["lengths"]),
            table(torch.ones_like(row_of, dtype=torch.bool)),
            upload(torch.tensor(rows.desirable(list(numbers))), policy.device),
            totals.chosen_length,
            None if alignment is None else table(alignment),
            None if self.settings.ld_alpha is None else (table(values["logps"]), reference_logps),
        )


def _row_of(numbers: Sequence[int], rows: Rows) -> Tensor:
    """The index in `numbers` of the row of each response, [R]."""
    counts = torch.tensor([rows.responses(number) for number in numbers], dtype=torch.long)
    return torch.repeat_interleave(counts)
