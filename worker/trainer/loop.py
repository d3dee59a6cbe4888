"""The training loop: SFT, then DPO, on one policy. It reads top to bottom.

for each stage:
    reference log-probs, once, before the first update        (DPO)
    for each step:
        rows of the step → packs → log-probs → loss → backward
        clip, set the learning rate, update
        validate and write checkpoints now and then
"""

import json
import math
import resource
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.jobs.spec import DPOHyperparameters, JobSpec
from worker.trainer import artifact, checkpoint, plan, reference
from worker.trainer.checkpoint import State
from worker.trainer.data import Row
from worker.trainer.events import Events, UserError
from worker.trainer.model import Base, Policy, Scores, load_policy
from worker.trainer.objectives.preference import implicit_rewards, sigmoid_loss
from worker.trainer.objectives.supervised import negative_log_likelihood
from worker.trainer.packing import Pack
from worker.trainer.plan import Stage


class Stopped(Exception):
    """The run was asked to stop, and has written a checkpoint where it could."""


class Averages:
    """Weighted means, by name."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Count each element of `values`, once."""
        self._sums[name] = self._sums.get(name, 0.0) + values.detach().double().sum().item()
        self._weights[name] = self._weights.get(name, 0.0) + values.numel()

    def means(self) -> dict[str, float]:
        return {name: total / self._weights[name] for name, total in self._sums.items() if self._weights[name]}


def sft_losses(scores: Scores, averages: Averages) -> Tensor:
    """Losses of a pack, one for each scored token: [N]."""
    losses = negative_log_likelihood(scores.tokens)
    averages.add("loss", losses)
    averages.add("mean_token_accuracy", scores.correct)
    return losses


def dpo_losses(scores: Scores, pack: Pack, logps: Tensor, beta: float, averages: Averages) -> Tensor:
    """Losses of a pack, one for each pair: [B]. `logps` [rows, 2] are the reference's, of all rows."""
    policy = scores.responses.view(-1, 2)
    theirs = logps[list(pack.rows)].to(policy.device)
    ratios, rewards = policy - theirs, implicit_rewards(policy, theirs, beta)
    losses = sigmoid_loss(rewards)
    margins = rewards[:, 0] - rewards[:, 1]
    averages.add("loss", losses)
    for k, side in enumerate(("chosen", "rejected")):
        averages.add(f"rewards/{side}", rewards[:, k])
        averages.add(f"logps/{side}", policy[:, k])
        averages.add(f"logratios/{side}", ratios[:, k])
    averages.add("rewards/margins", margins)
    averages.add("rewards/accuracies", (margins > 0).float())
    averages.add("gradient_weight", torch.sigmoid(-margins))
    return losses


class Trainer:
    """One run over a work folder: `spec.json`, `run.json`, `base/`, the data; maybe `start/` or `resume/`."""

    def __init__(self, folder: Path, events: Events, stopping: threading.Event) -> None:
        self.folder, self.events, self.stopping = folder, events, stopping
        self.spec = JobSpec.model_validate_json((folder / "spec.json").read_text()).resolved()
        run = json.loads((folder / "run.json").read_text())
        self.base = Base(run["base_model"], run["revision"], run["version"], folder / "base")
        self.public_spec: dict[str, Any] = run["spec"]
        resume = folder / "resume"
        self.resume = resume if resume.exists() else None
        self._saved_step = -1

    def run(self) -> None:
        """Train, and leave the artifact in `output/`. Raises `UserError` or `Stopped`."""
        began = time.monotonic()
        start = self.folder / "start" if (self.folder / "start").exists() else None
        self.policy = load_policy(self.spec, self.base, self.resume / "model" if self.resume else start, self.events)
        self._tick()
        context = getattr(self.policy.causal.config.get_text_config(), "max_position_embeddings", 2048)
        self.stages = plan.stages(self.spec, self.folder, self.policy.tokenizer, context, self.events)
        self._tick()
        self.policy.check(self.stages[-1].train, self.events)
        self.events.message(
            f"Model and {sum(len(s.train) for s in self.stages)} rows ready after {time.monotonic() - began:.1f} s "
            f"on {self.policy.device.type} ({torch.get_num_threads()} threads)."
        )
        self.total_steps = sum(stage.steps for stage in self.stages)
        self.state = State(self.stages[0].name)
        if self.resume is not None:
            self.state = checkpoint.load_state(self.resume)
            self._saved_step = self.state.step
        resumed = [stage.name for stage in self.stages].index(self.state.stage)
        for stage in self.stages[resumed:]:
            self._run_stage(stage)
            self.resume = None
        results = artifact.Results(
            self.spec, self.public_spec, self.base, self.state.history, self.stages[-1], self.validation_logps
        )
        artifact.write(self.folder / "output", self.policy, results, self.events)
        self.events.emit("done", trained_tokens=self.state.trained_tokens, metrics=self._last_metrics())

    def _run_stage(self, stage: Stage) -> None:
        policy, state, settings = self.policy, self.state, stage.hyperparameters
        optimizer = torch.optim.AdamW(
            policy.trainable().values(),
            lr=0.0,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=settings.weight_decay,
        )
        policy.set_dropout(False)
        if self.resume is not None and state.stage == stage.name:
            logps = checkpoint.load_reference(self.resume)
            checkpoint.restore(self.resume, policy, optimizer)
            self.events.message(f"Resumed stage {stage.name} after step {state.stage_step} of {stage.steps}.")
        else:
            state.stage, state.stage_step = stage.name, 0
            logps = self._reference(stage)
            torch.manual_seed(stage.seed)
        if stage.name == "dpo" and policy.has_dropout:
            self.events.message("The adapter's dropout acts in SFT only; the DPO stage runs without it.", level="warn")
        if stage.batch_size != settings.batch_size:
            self.events.message(f"Only {stage.batch_size} rows: the batch size is that.", level="warn")
        self.events.emit("stage", stage=stage.name, rows=len(stage.train), validation_rows=len(stage.validation))
        if state.stage_step == 0:
            self._validate(stage, logps, record=True)
        began, first = time.monotonic(), state.stage_step
        for step in range(state.stage_step, stage.steps):
            if self.stopping.is_set():
                self._checkpoint(stage, optimizer, logps)
                raise Stopped
            metrics = self._step(stage, optimizer, step, logps)
            state.step, state.stage_step = state.step + 1, step + 1
            last = state.stage_step == stage.steps
            if last or state.stage_step % stage.eval_every == 0:
                metrics |= self._validate(stage, logps, record=False)
            self._record(stage, metrics)
            each = (time.monotonic() - began) / (state.stage_step - first)
            self._report(stage, metrics, seconds_remaining=each * (self.total_steps - state.step))
            if last or state.stage_step % stage.checkpoint_every == 0:
                self._checkpoint(stage, optimizer, logps)
        if first == stage.steps:  # interrupted between the last step of this stage and what follows it
            self._validate(stage, logps, record=False)

    def _step(
        self, stage: Stage, optimizer: torch.optim.Optimizer, step: int, logps: tuple[Tensor, Tensor] | None
    ) -> dict[str, float]:
        """One optimizer step over exactly `stage.batch_size` rows."""
        began, policy, averages = time.monotonic(), self.policy, Averages()
        numbers = stage.batch(step)
        batch = [stage.train[number] for number in numbers]
        policy.set_dropout(stage.name == "sft")
        packs = list(policy.packs(batch, list(range(len(batch)))))
        count = len(batch) if stage.name == "dpo" else sum(len(pack.targets) for pack in packs)
        of_batch = None if logps is None else logps[0][numbers]
        for pack in packs:
            losses = self._losses(stage, policy.score(pack), pack, of_batch, averages)
            (losses.sum() / count).backward()  # type: ignore[no-untyped-call]
        parameters = list(policy.trainable().values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, stage.hyperparameters.max_grad_norm).item()
        means = averages.means()
        self._require_finite(means | {"grad_norm": norm}, "loss", "grad_norm")
        rate = stage.learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        policy.set_dropout(False)
        tokens = sum(row.tokens for row in batch)
        self.state.trained_tokens += tokens
        return means | {
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens_per_second": tokens / (time.monotonic() - began),
            "peak_memory_bytes": float(_peak_memory(policy)),
        }

    def _require_finite(self, metrics: dict[str, float], *names: str) -> None:
        for name in names:
            if not math.isfinite(metrics[name]):
                raise UserError(
                    "loss_not_finite",
                    f"{name} became {metrics[name]} after {self.state.step} steps. Try a lower learning rate; "
                    "the checkpoints before it are kept.",
                    "method",
                )

    def _losses(self, stage: Stage, scores: Scores, pack: Pack, logps: Tensor | None, averages: Averages) -> Tensor:
        """Losses of a pack, to be summed; `averages` gets the metrics."""
        if stage.name == "sft":
            return sft_losses(scores, averages)
        assert isinstance(stage.hyperparameters, DPOHyperparameters) and logps is not None
        return dpo_losses(scores, pack, logps, stage.hyperparameters.beta or 0.1, averages)

    def _reference(self, stage: Stage) -> tuple[Tensor, Tensor] | None:
        if stage.name != "dpo":
            return None
        began = time.monotonic()
        found = tuple(reference.compute(self.policy, rows, self._tick) for rows in (stage.train, stage.validation))
        self.events.message(f"Reference log-probs computed in {time.monotonic() - began:.1f} s.")
        return found[0], found[1]

    def _validate(self, stage: Stage, logps: tuple[Tensor, Tensor] | None, *, record: bool) -> dict[str, float]:
        """The metrics of the validation rows, under `eval/`."""
        self.validation_logps: list[tuple[Row, Tensor, Tensor | None]] = []
        if not stage.validation:
            return {}
        averages = Averages()
        reference_logps = None if logps is None else logps[1]
        with torch.no_grad():
            for pack in self.policy.packs(stage.validation, list(range(len(stage.validation)))):
                scores = self.policy.score(pack)
                self._losses(stage, scores, pack, reference_logps, averages)
                by_row = scores.responses.cpu().view(len(pack.rows), -1)
                for number, values in zip(pack.rows, by_row, strict=True):
                    theirs = None if reference_logps is None else reference_logps[number]
                    self.validation_logps.append((stage.validation[number], values, theirs))
                self._tick()
        metrics = {f"eval/{name}": value for name, value in averages.means().items()}
        self._require_finite(metrics, "eval/loss")
        if record:
            self._record(stage, metrics)
            self._report(stage, metrics, seconds_remaining=None)
        return metrics

    def _record(self, stage: Stage, metrics: dict[str, float]) -> None:
        self.state.history.append({"step": self.state.step, "stage": stage.name, **metrics})

    def _report(self, stage: Stage, metrics: dict[str, float], seconds_remaining: float | None) -> None:
        self.events.emit(
            "metrics",
            stage=stage.name,
            step=self.state.step,
            total_steps=self.total_steps,
            seconds_remaining=seconds_remaining,
            metrics=metrics,
        )

    def _checkpoint(self, stage: Stage, optimizer: torch.optim.Optimizer, logps: tuple[Tensor, Tensor] | None) -> None:
        """Write a checkpoint, unless this step has one. Whoever hears of it removes it when it is safe."""
        if self.state.stage_step == 0 or self.state.step == self._saved_step:
            return
        self._saved_step = self.state.step
        folder = self.folder / "checkpoints" / f"step-{self.state.step}"
        checkpoint.save(folder, self.policy, optimizer, self.state, logps)
        self.events.emit(
            "checkpoint",
            stage=stage.name,
            step=self.state.step,
            path=f"checkpoints/{folder.name}",
            metrics=self._last_metrics(),
        )

    def _last_metrics(self) -> dict[str, float]:
        merged: dict[str, Any] = {}
        for entry in self.state.history:
            if entry["stage"] == self.state.stage:
                merged |= entry
        return {name: value for name, value in merged.items() if isinstance(value, float)}

    def _tick(self) -> None:
        """Between two pieces of work that are not a step: stop here if asked to."""
        if self.stopping.is_set():
            raise Stopped


def _peak_memory(policy: Policy) -> int:
    if policy.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
