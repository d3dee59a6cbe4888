"""A stage in progress: its parts, its position, and the operations that the loop is made of."""

import math
import time
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from worker.trainer import checkpoint, compilation, memory, throughput, weights
from worker.trainer.averages import Averages
from worker.trainer.checkpoint import State
from worker.trainer.early_stopping import Best
from worker.trainer.errors import Stopped, UserError
from worker.trainer.events import CheckpointWritten, StageBegan
from worker.trainer.journal import Journal, last_metrics
from worker.trainer.launcher import Launcher, TokenCounts, nothing
from worker.trainer.linears import has_experts
from worker.trainer.methods import METHODS
from worker.trainer.methods.method import Method, ValidatedRow
from worker.trainer.model import Policy
from worker.trainer.optimizer import make_optimizer
from worker.trainer.packing import Segment, trees
from worker.trainer.plan import Stage
from worker.trainer.reference import References
from worker.trainer.reference_pass import policy_references
from worker.trainer.run import TrainingRun


@dataclass
class StageRun:
    """A stage in progress. `state` is the position of the run.

    `planned_steps` are the optimizer steps of all stages, before early stopping skips any.
    """

    run: TrainingRun
    stage: Stage
    launcher: Launcher
    method: Method
    optimizer: torch.optim.Optimizer
    state: State
    planned_steps: int
    journal: Journal
    last_good: weights.LastGood = field(default_factory=weights.LastGood)
    validated_rows: list[ValidatedRow] = field(default_factory=list)
    """The rows of the last validation."""
    saved_step: int = -1
    """The step of the last checkpoint; −1 if the next checkpoint must be written in any case."""

    @property
    def policy(self) -> Policy:
        """The policy in training."""
        return self.launcher.policy

    # -- a step --------------------------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """One optimizer step over exactly `stage.batch_size` rows. Returns its metrics."""
        began, policy, state, owned = time.monotonic(), self.policy, self.state, self.launcher.owned
        rows = self.stage.batch(state.stage_step)
        policy.set_dropout(self.method.DROPOUT)
        self.launcher.meanwhile = partial(self._prepare, state.stage_step + 1)
        # Forward and backward pass, then clip the gradient to a norm of `max_grad_norm`.
        try:
            counts, averages = self._gradient(rows)
        except Stopped:  # while answers were written
            self.launcher.meanwhile = nothing
            self.checkpoint()
            raise
        self.launcher.meanwhile = nothing
        averages.add("grad_norm", owned.clip(self.stage.hyperparameters.max_grad_norm))
        metrics = averages.means()
        self._require_finite(metrics, "loss", "grad_norm")
        # The loss of these weights is finite: keep a copy, because the update may break them.
        self.last_good.remember(policy)
        learning_rate = self.stage.learning_rate(state.stage_step)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        owned.share()
        policy.set_dropout(False)
        tokens = self.method.tokens(rows)
        metrics |= {"learning_rate": learning_rate} | self._pace(counts, tokens, time.monotonic() - began)
        state.trained_tokens += tokens
        state.step, state.stage_step = state.step + 1, state.stage_step + 1
        self.method.after_step(state.stage_step)
        return metrics

    def _prepare(self, step: int) -> None:
        """Build the first pack of `step` while the devices still compute the step before."""
        if step < self.stage.steps:
            self.method.prepare(self.stage.batch(step))

    def _gradient(self, rows: list[int]) -> tuple[TokenCounts, Averages]:
        """The gradient of a step, by the first loss scale that keeps it finite. The last scale counts in any case.

        Each step tries the scales anew, from the largest on. A resumed run therefore computes the same gradients.
        """
        policy, draw = self.policy, f"{self.stage.seed} {self.stage.name} {self.state.stage_step}"
        for scale in policy.loss_scales:  # descending
            policy.loss_scale, averages = scale, Averages()
            counts = self.method.gradient(rows, averages, draw if _draws(self.method) else None)
            overflowed = scale != policy.loss_scales[-1] and self.run.ranks.any(
                not bool(self.launcher.owned.norms.isfinite().all())
            )
            if not overflowed:
                break
        if scale != 1:  # undo it
            self.launcher.owned.scale(1 / scale)
        policy.loss_scale = 1.0
        return counts, averages

    def _pace(self, counts: TokenCounts, tokens: int, seconds: float) -> dict[str, float]:
        """Speed and resource use of a step. `tokens`: the distinct tokens of its rows."""
        peak = max(self.run.ranks.gather(memory.peak_bytes(self.policy.device)))
        metrics = {
            "fill_rate": counts.tokens / counts.slots,
            "tokens_per_second": tokens / seconds,
            "peak_memory_bytes": float(peak),
        }
        if self._layer_weights is not None:
            flops = throughput.needed_flops(self.policy, self._layer_weights, counts.tokens, counts.scored)
            metrics["mfu"] = flops / (seconds * throughput.peak_flops(self.policy.device) * self.run.ranks.size)
        return metrics

    @cached_property
    def _layer_weights(self) -> int | None:
        """Number of weights that each token passes. None if a router sends each token to a few experts only."""
        return None if has_experts(self.policy.causal) else throughput.layer_weights(self.policy.causal)

    # -- a validation --------------------------------------------------------------------------------------------

    def validate(self) -> dict[str, float]:
        """The metrics of the validation rows, named `eval/…`. Empty without validation rows."""
        self.validated_rows = []
        if not self.stage.validation:
            return {}
        self.run.events.working("validating")
        averages = Averages()
        self.validated_rows = self.method.validate(averages, self.run.check_stop)
        return {f"eval/{name}": value for name, value in averages.means().items()}

    def validate_at_start(self) -> None:
        """Validate the weights before the first step of the stage, and record the metrics."""
        metrics = self.validate()
        self._require_finite(metrics, "eval/loss")
        if metrics:
            self.journal.write(self.state.step, metrics, self.total_steps, None)
        self._update_best(metrics)

    def validate_after_step(self) -> dict[str, float]:
        """Validate the weights of the last step. If the run is stopped meanwhile, it resumes with this validation."""
        try:
            metrics = self.validate()
        except Stopped:
            self.checkpoint()  # keeps the step, whose metrics are pending
            raise
        self._require_finite(metrics, "eval/loss")
        self._update_best(metrics)
        return metrics

    def _update_best(self, metrics: dict[str, float]) -> None:
        """Early stopping: keep the weights of the best validation, and end the stage when `patience` is exhausted."""
        settings, state, stage = self.stage.hyperparameters.early_stopping, self.state, self.stage
        if settings is None:
            return
        if state.best.improves(settings, metrics, state.step):
            weights.save(self.policy, self.run.best_weights, self.run.ranks)
        elif state.best.validations_since >= settings.patience and state.stage_step < stage.steps:
            state.ended, state.skipped = True, state.skipped + stage.steps - state.stage_step
            self.run.events.message(
                f"Stage {stage.name} stops early, after step {state.stage_step} of {stage.steps}: {settings.metric} "
                f"has not improved in {state.best.validations_since} validations."
            )

    def _require_finite(self, metrics: dict[str, float], *names: str) -> None:
        """Raise `UserError` if one of the metrics `names` is not finite. Writes the last good weights first."""
        broken = [name for name in names if not math.isfinite(metrics.get(name, 0.0))]
        if broken:
            self._keep_last_good()
            raise UserError(
                "loss_not_finite",
                f"{broken[0]} became {metrics[broken[0]]}. Try a lower learning rate. Step {self.state.step} is the "
                "last one known to be good. Checkpoints up to it are kept.",
                "method",
            )

    def _keep_last_good(self) -> None:
        """Go back to the weights of the last finite loss, one step ago, and write a checkpoint of them.

        Another job can train on from it. Its optimizer state is the one after the update that broke the weights.
        """
        state = self.state
        if state.stage_step < 2 or not self.last_good.restore():
            return
        state.step, state.stage_step = state.step - 1, state.stage_step - 1
        checkpoint_folder = self.run.folder / "checkpoints" / f"step-{state.step}"
        if not self.run.ranks.of_first(checkpoint_folder.exists):
            self.checkpoint()

    # -- its position --------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether all steps are done, or early stopping has ended the stage."""
        return self.state.ended or self.state.stage_step >= self.stage.steps

    @property
    def validation_is_due(self) -> bool:
        """Whether to validate after the current step: every `eval_every` steps, and after the last one."""
        step = self.state.stage_step
        return step == self.stage.steps or step % self.stage.eval_every == 0

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether to write a checkpoint after the current step: every `checkpoint_every` steps, and at the end."""
        return self.ended or self.state.stage_step % self.stage.checkpoint_every == 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all stages, without those that early stopping has skipped."""
        return self.planned_steps - self.state.skipped

    def stop_if_asked(self) -> None:
        """If the run was asked to stop, write a checkpoint and raise `Stopped`. To be called between two steps."""
        if self.run.must_stop():
            self.checkpoint()
            raise Stopped

    def restore_best(self) -> bool:
        """With early stopping, give the policy its best weights. Returns whether they are of an earlier step."""
        better = self.stage.hyperparameters.early_stopping is not None and self.state.best.step != self.state.step
        if better:
            weights.restore(self.policy, self.run.best_weights, self.run.ranks)
            self.saved_step = -1  # a checkpoint of this step may hold other weights: write it again
        return better

    def checkpoint(self) -> None:
        """Write a checkpoint, unless this step already has one. The runner removes the folder once it is uploaded."""
        state = self.state
        if state.stage_step == 0 or state.step == self.saved_step:
            return
        self.saved_step = state.step
        folder = self.run.folder / "checkpoints" / f"step-{state.step}"
        best, ranks = self.run.best_weights, self.run.ranks
        checkpoint.save(folder, self.policy, self.optimizer, self.method, state, best, ranks)
        path, metrics = f"checkpoints/{folder.name}", last_metrics(state.history, state.stage)
        self.run.events.emit(CheckpointWritten(self.stage.name, state.step, path, metrics))


def begin(
    run: TrainingRun,
    stage: Stage,
    policy: Policy,
    state: State,
    planned_steps: int,
    *,
    resume: Path | None = None,
    references: References | None = None,
) -> StageRun:
    """Begin a stage, or continue it from its checkpoint `resume`.

    `references`: log-probs of a reference model other than the policy at step 0. Without them, the policy at step 0 is
    the reference.
    """
    settings = stage.hyperparameters
    policy.set_dropout(False)
    _choose_checkpointing(run, stage, policy)
    may_recompute = settings.activation_checkpointing is not False
    virtual_ranks = run.spec.parallel.virtual_ranks
    launcher = Launcher(policy, run.ranks, run.events, stage.param, virtual_ranks, may_recompute)
    optimizer = make_optimizer(settings, launcher.owned.own)
    method = METHODS[stage.name].of(launcher, stage)
    method.check_stop = run.check_own_stop
    # Random numbers are drawn for one segment at a time.
    policy.packing = replace(policy.packing, joined=policy.joins and not _draws(method))
    if resume is not None:
        checkpoint.restore(resume, policy, optimizer, method, run.best_weights, run.ranks)
        run.events.message(f"Resumed stage {stage.name} after step {state.stage_step} of {stage.steps}.")
    else:
        state.stage, state.stage_step, state.ended, state.best = stage.name, 0, False, Best()
        if run.ranks.is_first:
            run.best_weights.unlink(missing_ok=True)
        method.begin(lambda tail_weight: references or policy_references(launcher, stage, tail_weight, run))
    if policy.has_dropout and not method.DROPOUT:
        message = f"The adapter's dropout acts in SFT only. The {stage.name.upper()} stage runs without it."
        run.events.message(message, level="warn")
    if stage.batch_size != settings.batch_size:
        run.events.message(f"The stage has only {stage.batch_size} rows. This is its batch size.", level="warn")
    journal = Journal(stage, state.history, run.events)
    if state.stage_step == 0:
        journal.before(state.step)
    run.events.emit(StageBegan(stage.name, len(stage.train), len(stage.validation)))
    saved_step = -1 if resume is None else state.step
    return StageRun(run, stage, launcher, method, optimizer, state, planned_steps, journal, saved_step=saved_step)


def _draws(method: Method) -> bool:
    """Whether the steps of `method` draw random numbers: with dropout."""
    return method.DROPOUT and method.policy.has_dropout


def _choose_checkpointing(run: TrainingRun, stage: Stage, policy: Policy) -> None:
    """Switch activation checkpointing as the job says; without a setting, only if the activations would not fit.

    Layers are compiled before these are measured, because compiled ones keep less. To recompute them compiles anew. So
    would dequantised weights that are kept later.
    """
    if not policy.groups.kept and (gigabytes := memory.keep_weights(policy)):
        run.events.message(f"Memory is free: {gigabytes:.1f} GB of weights in NF4 stay dequantised.")
    asked = stage.hyperparameters.activation_checkpointing
    if asked is None and policy.root is not None:
        asked = True  # memory is short, and the ranks could not repeat a pass without room
    if asked and not policy.can_recompute:
        run.events.message("This model has no layers that can be recomputed: it keeps its activations.", level="warn")
    policy.recompute_activations(bool(asked))
    compilation.choose(policy, stage, run.events, run.ranks)
    if asked is not None or not policy.can_recompute or _fits(policy, stage):
        return
    if policy.groups.release() and _fits(policy, stage):
        run.events.message("Weights do not stay dequantised: the activations need their memory.")
        return
    run.events.message("Activations are recomputed in the backward pass: they would not fit into memory.")
    policy.recompute_activations(True)
    policy.room = None  # what did not fit before may fit now
    if policy.compiled:
        compilation.check(policy, stage, run.events, run.ranks)


def _fits(policy: Policy, stage: Stage) -> bool:
    """Whether the activations of a step fit into memory, judged by the first row."""
    sample = Segment(tuple(trees(stage.train, [0], 0)))
    try:
        pack = policy.packing.build([sample]).to(policy.device)
        return memory.activations_fit(policy, pack, stage.longest)
    except torch.OutOfMemoryError:
        return False
