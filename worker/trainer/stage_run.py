"""A stage while it runs: what it is made of, where it is, and the few things that can be done with it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from worker.trainer import checkpoint, memory, throughput, weights
from worker.trainer.averages import Averages
from worker.trainer.checkpoint import State
from worker.trainer.early_stopping import Best
from worker.trainer.errors import Stopped, UserError
from worker.trainer.events import CheckpointWritten, StageBegan
from worker.trainer.journal import Journal, last_metrics
from worker.trainer.linears import has_experts
from worker.trainer.methods import METHODS
from worker.trainer.methods.method import Method, ValidatedRow, Work
from worker.trainer.model import Policy
from worker.trainer.optimizer import make_optimizer
from worker.trainer.packing import trees
from worker.trainer.plan import Stage
from worker.trainer.reference import References
from worker.trainer.reference_pass import references_by
from worker.trainer.run import TrainingRun

Result = TypeVar("Result")


@dataclass
class StageRun:
    """`state` counts the steps, `planned_steps` are those of the whole run as far as it is known."""

    run: TrainingRun
    stage: Stage
    policy: Policy
    method: Method
    optimizer: torch.optim.Optimizer
    state: State
    planned_steps: int
    journal: Journal
    last_good: weights.LastGood = field(default_factory=weights.LastGood)
    validated_rows: list[ValidatedRow] = field(default_factory=list)
    """The rows of the last validation."""
    saved_step: int = -1
    """The step of the last checkpoint."""

    # -- a step --------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """One optimizer step over exactly `stage.batch_size` rows; its metrics."""
        began, policy, state = time.monotonic(), self.policy, self.state
        rows = self.stage.batch(state.stage_step)
        policy.set_dropout(self.method.DROPOUT)
        work, averages = self._gradient(rows)
        parameters = list(policy.trainable().values())
        averages.add("grad_norm", torch.nn.utils.clip_grad_norm_(parameters, self.stage.hyperparameters.max_grad_norm))
        metrics = averages.means()
        self._require_finite(metrics, "loss", "grad_norm")
        self.last_good.remember(policy)
        rate = self.stage.learning_rate(state.stage_step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        policy.set_dropout(False)
        tokens = self.stage.train.tokens(rows)
        metrics |= {"learning_rate": rate} | self._pace(work, tokens, time.monotonic() - began)
        state.trained_tokens += tokens
        state.step, state.stage_step = state.step + 1, state.stage_step + 1
        self.method.after_step(state.stage_step)
        return metrics

    def _gradient(self, rows: list[int]) -> tuple[Work, Averages]:
        """The gradient of a step, by the largest scale of the loss that is finite.

        The scale is found from step to step anew, so that a run that is resumed comes to the same.
        """
        policy = self.policy
        for scale in policy.loss_scales:
            policy.loss_scale = scale
            work, averages = self._in_memory(lambda: self._backward(rows))
            gradients = [p.grad for p in policy.trainable().values() if p.grad is not None]
            if scale == policy.loss_scales[-1] or all(bool(g.isfinite().all()) for g in gradients):
                break
            for parameter in policy.trainable().values():
                parameter.grad = None
        for gradient in gradients if scale != 1 else ():
            gradient.div_(scale)
        policy.loss_scale = 1.0
        return work, averages

    def _backward(self, rows: list[int]) -> tuple[Work, Averages]:
        averages = Averages()
        totals = self.method.totals(rows, averages)
        return self.method.backward(rows, totals, averages), averages

    def _pace(self, work: Work, tokens: int, seconds: float) -> dict[str, float]:
        """How fast the step was and what it took."""
        found = {
            "fill_rate": work.tokens / work.places,
            "tokens_per_second": tokens / seconds,
            "peak_memory_bytes": float(memory.peak_bytes(self.policy.device)),
        }
        if self._layer_weights is not None:
            needed = throughput.needed_flops(self.policy, self._layer_weights, work.tokens, work.scored)
            found["mfu"] = needed / (seconds * throughput.peak_flops(self.policy.device))
        return found

    @cached_property
    def _layer_weights(self) -> int | None:
        """The weights that each token passes; None where it passes some of the experts only."""
        return None if has_experts(self.policy.causal) else throughput.layer_weights(self.policy.causal)

    # -- a validation --------------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """The metrics of the validation rows, under `eval/`; none where no row was held out."""
        self.validated_rows = []
        if not self.stage.validation:
            return {}

        def validate() -> tuple[list[ValidatedRow], Averages]:
            averages = Averages()
            return self.method.validate(averages, self.run.tick), averages

        self.validated_rows, averages = self._in_memory(validate)
        return {f"eval/{name}": value for name, value in averages.means().items()}

    def validate_at_start(self) -> None:
        """Measure the stage before its first step."""
        metrics = self.validate()
        self._require_finite(metrics, "eval/loss")
        if metrics:
            self.journal.write(self.state.step, metrics, self.total_steps, None)
        self._judge(metrics)

    def validate_after_step(self) -> dict[str, float]:
        """Validate the weights of the last step. Asked to stop meanwhile, the run goes on from here."""
        try:
            metrics = self.validate()
        except Stopped:
            self.checkpoint()  # the step is not lost
            raise
        self._require_finite(metrics, "eval/loss")
        self._judge(metrics)
        return metrics

    def _judge(self, metrics: dict[str, float]) -> None:
        """Early stopping: keep the weights of the best validation, and end the stage when it is too long ago."""
        settings, state, stage = self.stage.hyperparameters.early_stopping, self.state, self.stage
        if settings is None:
            return
        if state.best.improves(settings, metrics, state.step):
            weights.write(self.policy, self.run.best_weights)
        elif state.best.without >= settings.patience and state.stage_step < stage.steps:
            state.ended, state.skipped = True, state.skipped + stage.steps - state.stage_step
            self.run.events.message(
                f"Stage {stage.name} stops early, after step {state.stage_step} of {stage.steps}: {settings.metric} "
                f"has not improved in {state.best.without} validations."
            )

    def _require_finite(self, metrics: dict[str, float], *names: str) -> None:
        """Fail where a metric is not a finite number, and leave a checkpoint of the last weights that were good."""
        broken = [name for name in names if not math.isfinite(metrics.get(name, 0.0))]
        if broken:
            self._keep_last_good()
            raise UserError(
                "loss_not_finite",
                f"{broken[0]} became {metrics[broken[0]]}. Try a lower learning rate. Step {self.state.step} is the "
                "last one known to be good; checkpoints up to it are kept.",
                "method",
            )

    def _keep_last_good(self) -> None:
        """Write a checkpoint of the weights of the last finite loss: one step back, since the last update broke it.

        It is for those who want to train on from there; its optimizer state is the one after that update.
        """
        state = self.state
        if state.stage_step < 2 or not self.last_good.bring_back(self.policy):
            return
        state.step, state.stage_step = state.step - 1, state.stage_step - 1
        if not (self.run.folder / "checkpoints" / f"step-{state.step}").exists():
            self.checkpoint()

    # -- where it is ---------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether all steps are done, or early stopping has ended the stage."""
        return self.state.ended or self.state.stage_step >= self.stage.steps

    @property
    def validation_is_due(self) -> bool:
        step = self.state.stage_step
        return step == self.stage.steps or step % self.stage.eval_every == 0

    @property
    def checkpoint_is_due(self) -> bool:
        return self.ended or self.state.stage_step % self.stage.checkpoint_every == 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, those left out that early stopping has saved."""
        return self.planned_steps - self.state.skipped

    def stop_if_asked(self) -> None:
        """Between two steps: write a checkpoint and raise `Stopped` where the run was asked to stop."""
        if self.run.stopping.is_set():
            self.checkpoint()
            raise Stopped

    def bring_back_best(self) -> bool:
        """Go back to the best weights where the job asked for it; whether there were better ones than the last."""
        better = self.stage.hyperparameters.early_stopping is not None and self.state.best.step != self.state.step
        if better:
            weights.bring_back(self.policy, self.run.best_weights)
            self.saved_step = -1  # what a checkpoint of this step holds is not what the stage leaves
        return better

    def checkpoint(self) -> None:
        """Write a checkpoint, unless this step has one. Whoever hears of it removes it when it is safe."""
        state = self.state
        if state.stage_step == 0 or state.step == self.saved_step:
            return
        self.saved_step = state.step
        folder = self.run.folder / "checkpoints" / f"step-{state.step}"
        checkpoint.save(folder, self.policy, self.optimizer, self.method, state, self.run.best_weights)
        path, metrics = f"checkpoints/{folder.name}", last_metrics(state.history, state.stage)
        self.run.events.emit(CheckpointWritten(self.stage.name, state.step, path, metrics))

    def _in_memory(self, work: Callable[[], Result]) -> Result:
        return memory.with_smaller_packs(self.policy, self.stage, self.run.events, work)


def begin(
    run: TrainingRun,
    stage: Stage,
    policy: Policy,
    state: State,
    planned_steps: int,
    *,
    resume: Path | None = None,
    others: References | None = None,
) -> StageRun:
    """A stage at its beginning, or where the checkpoint `resume` of it left off.

    `others` are the log-probs of a reference that is not the policy at step 0.
    """
    settings = stage.hyperparameters
    optimizer = make_optimizer(settings, policy.trainable().values())
    policy.set_dropout(False)
    _choose_checkpointing(run, stage, policy)
    if settings.compile:
        policy.compile()
    method = METHODS[stage.name](policy, settings, stage.train, stage.validation)
    if resume is not None:
        checkpoint.restore(resume, policy, optimizer, method, run.best_weights)
        run.events.message(f"Resumed stage {stage.name} after step {state.stage_step} of {stage.steps}.")
    else:
        state.stage, state.stage_step, state.ended, state.best = stage.name, 0, False, Best()
        run.best_weights.unlink(missing_ok=True)
        method.begin(lambda tail_weight: others or references_by(policy, stage, tail_weight, run))
        torch.manual_seed(stage.seed)
    if policy.has_dropout and not method.DROPOUT:
        message = f"The adapter's dropout acts in SFT only; the {stage.name.upper()} stage runs without it."
        run.events.message(message, level="warn")
    if stage.batch_size != settings.batch_size:
        run.events.message(f"Only {stage.batch_size} rows: the batch size is that.", level="warn")
    journal = Journal(stage, state.history, run.events)
    if state.stage_step == 0:
        journal.before(state.step)
    run.events.emit(StageBegan(stage.name, len(stage.train), len(stage.validation)))
    saved_step = -1 if resume is None else state.step
    return StageRun(run, stage, policy, method, optimizer, state, planned_steps, journal, saved_step=saved_step)


def _choose_checkpointing(run: TrainingRun, stage: Stage, policy: Policy) -> None:
    """Recompute activations where the job says so, or where they would not fit."""
    recompute = stage.hyperparameters.activation_checkpointing
    if recompute is None:
        pack = policy.packing.build(trees(stage.train, [0], 0)).to(policy.device)
        recompute = not memory.with_smaller_packs(
            policy, stage, run.events, lambda: memory.fits(policy, pack, stage.train.longest)
        )
        if recompute:
            run.events.message("Activations are recomputed in the backward pass: they would not fit into memory.")
    policy.recompute_activations(recompute)
