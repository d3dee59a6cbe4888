"""The training loop: SFT, then a preference method, on one policy. It reads top to bottom.

for each stage:
    reference log-probs, once, before the first update        (where the loss has a reference)
    for each step:
        rows of the step → packs → log-probs → loss → backward
        clip, set the learning rate, update
        validate and write checkpoints now and then
"""

import gc
import json
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig

from app.spec.hyperparameters import DEFAULT_MAX_LENGTH, DPOHyperparameters
from app.spec.job import Adapter, JobSpec
from worker.model_files import context_length
from worker.trainer import artifact, best, checkpoint, exactness, memory, plan, reference, reward, throughput
from worker.trainer.advice import Advice, Advisor
from worker.trainer.averages import Averages
from worker.trainer.best import Best
from worker.trainer.cache import Cache
from worker.trainer.checkpoint import State
from worker.trainer.dataset import Rows, require_embedded
from worker.trainer.embeddings import untrained
from worker.trainer.events import Events, Stopped, UserError
from worker.trainer.linears import has_experts
from worker.trainer.loading import load_policy
from worker.trainer.methods import Found, Method, Preference, References, Supervised, Work
from worker.trainer.model import Base, Policy
from worker.trainer.optimizer import NEED_GPU, make_optimizer
from worker.trainer.packing import trees
from worker.trainer.plan import Stage
from worker.trainer.reference import Reference
from worker.trainer.tokenizer import load_tokenizer

Result = TypeVar("Result")


class Trainer:
    """One run over a work folder: `spec.json`, `run.json`, `base/`, the data; maybe `start/`, `reference/`, `resume/`.

    `cache` finds what other runs computed; without one, what is in the work folder.
    """

    def __init__(self, folder: Path, events: Events, stopping: threading.Event, cache: Cache | None = None) -> None:
        self.folder, self.events, self.stopping = folder, events, stopping
        self.cache = cache or Cache(folder / "cache", events)
        self.spec = JobSpec.model_validate_json((folder / "spec.json").read_text()).resolved()
        run = json.loads((folder / "run.json").read_text())
        self.base = Base(run["base_model"], run["revision"], run["version"], folder / "base")
        self.public_spec: dict[str, Any] = run["spec"]
        resume = folder / "resume"
        self.resume = resume if resume.exists() else None
        self.best_weights = folder / "best" / "weights.safetensors"
        self._saved_step = -1
        self._last_good: dict[str, Tensor] | None = None
        self._final: dict[str, float] = {}
        """The validation of the weights that are kept, where they are not those of the last step."""

    def run(self) -> None:
        """Train, and leave the artifact in `output/`. Raises `UserError` or `Stopped`."""
        try:
            self._run()
        except torch.OutOfMemoryError as error:  # not in a step, which is tried with smaller packs
            message = "The model, its optimizer or one row do not fit into the GPU's memory."
            raise UserError("out_of_memory", f"{message} Lower 'max_length', or quantise the base.", "model") from error

    def _run(self) -> None:
        began = time.monotonic()
        start = self.folder / "start" if (self.folder / "start").exists() else None
        self.stages = self._stages(start or self.base.folder)
        self._tick()
        self.state = State(self.stages[0].name)
        if self.resume is not None:
            self.state = checkpoint.load_state(self.resume)
            self._saved_step = self.state.step
        done = self.resume is not None and self.state.stage == self.stages[-1].name
        others = None if done else self._other_reference()
        self.policy = load_policy(self.spec, self.base, self.resume / "model" if self.resume else start, self.events)
        self._tick()
        exactness.check(self.policy, self.stages[-1].train, self.events)
        self._warn_of_untrained_tokens()
        for stage in self.stages:
            require_possible(stage, self.policy)
        if self.policy.reward_head is not None:
            reward.require_classifier(self.policy)
        self.events.message(
            f"Model and {sum(len(s.train) for s in self.stages)} rows ready after {time.monotonic() - began:.1f} s "
            f"on {self.policy.device.type} ({torch.get_num_threads()} threads)."
        )
        resumed = [stage.name for stage in self.stages].index(self.state.stage)
        ready, tokens_before = time.monotonic(), self.state.trained_tokens
        for stage in self.stages[resumed:]:
            self._run_stage(stage, others)
            self.resume = None
        trained = time.monotonic()
        history, found, kept = self.state.history, self.validation_logps, self._final
        results = artifact.Results(self.spec, self.public_spec, self.base, history, self.stages[-1], found, kept)
        artifact.write(self.folder / "output", self.policy, results, self.events)
        self.events.emit(
            "done",
            trained_tokens=self.state.trained_tokens,
            metrics=self._last_metrics() | self._final,
            pace={
                "tokens": self.state.trained_tokens - tokens_before,
                "seconds": trained - ready,
                "overhead_seconds": ready - began,
            },
        )

    def _warn_of_untrained_tokens(self) -> None:
        """An adapter inside the model does not reach the embeddings."""
        adapter = self.spec.adapter
        if not isinstance(adapter, Adapter) or adapter.modules_to_save:
            return
        used = {token for stage in self.stages for token in stage.train.vocabulary}
        names = untrained(self.policy.tokenizer, used, self.policy.causal.get_input_embeddings().weight)
        if names:
            self.events.message(
                f"The base never learned {', '.join(names[:5])}, which the texts have: their embeddings are as they "
                "were before it was trained, and an adapter does not change them. Start from the model's instruct "
                "version, write texts without them ('chat_template': false), or train them: 'adapter': "
                '{"modules_to_save": ["embed_tokens", "lm_head"]}.',
                level="warn",
                data={"code": "untrained_control_tokens", "tokens": names},
            )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, as far as it is known."""
        return sum(stage.steps for stage in self.stages) - self.state.skipped

    @cached_property
    def _layer_weights(self) -> int | None:
        """The weights that each token passes; None where it passes some of the experts only."""
        return None if has_experts(self.policy.causal) else throughput.layer_weights(self.policy.causal)

    def _stages(self, model: Path) -> list[Stage]:
        try:
            tokenizer = load_tokenizer(model)
            config = AutoConfig.from_pretrained(self.base.folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            message = f"The model '{self.spec.model}' cannot be loaded: {error}"
            raise UserError("model_not_loadable", message, "model") from error
        context = context_length(config.to_dict()) or DEFAULT_MAX_LENGTH
        stages = plan.stages(self.spec, self.folder, tokenizer, context, self.cache, self.events)
        for rows in (part for stage in stages for part in (stage.train, stage.validation)):
            require_embedded(rows, tokenizer, config, self.spec.model)
        return stages

    def _run_stage(self, stage: Stage, others: References | None) -> None:
        policy, state, settings = self.policy, self.state, stage.hyperparameters
        optimizer = make_optimizer(settings, policy.trainable().values())
        policy.set_dropout(False)
        self._choose_checkpointing(stage)
        if settings.compile:
            policy.compile()
        if self.resume is not None and state.stage == stage.name:
            method = self._method(stage, checkpoint.load_references(self.resume))
            checkpoint.restore(self.resume, policy, optimizer, method, self.best_weights)
            self.events.message(f"Resumed stage {stage.name} after step {state.stage_step} of {stage.steps}.")
        else:
            state.stage, state.stage_step, state.ended, state.best = stage.name, 0, False, Best()
            self.best_weights.unlink(missing_ok=True)
            method = self._method(stage, self._references(stage, others))
            torch.manual_seed(stage.seed)
        if stage.name == "dpo" and policy.has_dropout:
            self.events.message("The adapter's dropout acts in SFT only; the DPO stage runs without it.", level="warn")
        if stage.batch_size != settings.batch_size:
            self.events.message(f"Only {stage.batch_size} rows: the batch size is that.", level="warn")
        advisor = self.advisor = Advisor(stage)
        if state.stage_step == 0:
            self._advise(advisor.before())
        for entry in state.history:
            if entry["stage"] == stage.name:
                for _ in advisor.look(entry):
                    pass  # it was said when it was written
        self.events.emit("stage", stage=stage.name, rows=len(stage.train), validation_rows=len(stage.validation))
        if state.stage_step == 0:
            self._judge(stage, self._validate(stage, method, record=True))
        began, first, validated = time.monotonic(), state.stage_step, state.stage_step == 0
        self._last_good = None
        while state.pending is not None or (state.stage_step < stage.steps and not state.ended):
            if state.pending is None:
                if self.stopping.is_set():
                    self._checkpoint(stage, optimizer, method)
                    raise Stopped
                state.pending = self._step(stage, optimizer, method)
                state.step, state.stage_step = state.step + 1, state.stage_step + 1
                method.after_step(state.stage_step)
            metrics = state.pending
            validated = state.stage_step == stage.steps or state.stage_step % stage.eval_every == 0
            if validated:
                metrics |= self._validate_step(stage, optimizer, method)
            state.pending = None
            self._record(stage, metrics)
            each = (time.monotonic() - began) / max(1, state.stage_step - first)
            self._report(stage, metrics, seconds_remaining=each * (self.total_steps - state.step))
            last = state.ended or state.stage_step == stage.steps
            if last and self._bring_back(stage):  # the last checkpoint of a stage is what the stage leaves
                self._saved_step = -1
            if last or state.stage_step % stage.checkpoint_every == 0:
                self._checkpoint(stage, optimizer, method)
        self._finish_stage(stage, method, validated=validated)

    def _validate_step(self, stage: Stage, optimizer: torch.optim.Optimizer, method: Method) -> dict[str, float]:
        """Validate after a step. Asked to stop meanwhile, the run goes on from here: the step is not lost."""
        try:
            found = self._validate(stage, method, record=False)
        except Stopped:
            self._checkpoint(stage, optimizer, method)
            raise
        if not math.isfinite(found.get("eval/loss", 0.0)):
            self._keep_last_good(stage, optimizer, method)
        self._require_finite(found, "eval/loss")
        self._judge(stage, found)
        return found

    def _bring_back(self, stage: Stage) -> bool:
        """Go back to the best weights where the job asked for it; whether there were better ones than the last."""
        better = stage.hyperparameters.early_stopping is not None and self.state.best.step != self.state.step
        if better:
            best.bring_back(self.policy, self.best_weights)
        return better

    def _finish_stage(self, stage: Stage, method: Method, *, validated: bool) -> None:
        """Say which weights are kept, and know their validation log-probs."""
        state, settings = self.state, stage.hyperparameters.early_stopping
        if self._bring_back(stage) and settings is not None:
            self.events.message(
                f"Stage {stage.name} keeps step {state.best.step}: {settings.metric} {state.best.value:.6g}."
            )
            validated = False
        self._final = {} if validated else self._validate(stage, method, record=False)

    def _judge(self, stage: Stage, metrics: dict[str, float]) -> None:
        """Early stopping: keep the weights of the best validation, and end the stage when it is too long ago."""
        settings, state = stage.hyperparameters.early_stopping, self.state
        if settings is None:
            return
        if state.best.improves(settings, metrics, state.step):
            best.keep(self.policy, self.best_weights)
        elif state.best.without >= settings.patience and state.stage_step < stage.steps:
            state.ended, state.skipped = True, state.skipped + stage.steps - state.stage_step
            self.events.message(
                f"Stage {stage.name} stops early, after step {state.stage_step} of {stage.steps}: {settings.metric} "
                f"has not improved in {state.best.without} validations."
            )

    def _method(self, stage: Stage, references: References | None) -> Method:
        settings = stage.hyperparameters
        if isinstance(settings, DPOHyperparameters):
            return Preference(self.policy, settings, stage.train, stage.validation, references)
        return Supervised(self.policy, settings, stage.train, stage.validation)

    def _references(self, stage: Stage, others: References | None) -> References | None:
        settings = stage.hyperparameters
        if not isinstance(settings, DPOHyperparameters) or not settings.needs_reference:
            return None
        return others or self._reference_by(self.policy, stage, settings)

    def _other_reference(self) -> References | None:
        """The log-probs of the model in `reference/`, which is loaded, asked, and let go before the policy is."""
        stage, folder = self.stages[-1], self.folder / "reference"
        settings = stage.hyperparameters
        if not isinstance(settings, DPOHyperparameters) or settings.reference_model is None:
            return None
        start = folder / "start" if (folder / "start").exists() else None
        base = Base(settings.reference_model, None, None, folder / "base")
        # A fresh adapter changes nothing: it stands for the bare base model.
        spec = self.spec.model_copy(update={"adapter": None, "model": settings.reference_model})
        other = load_policy(spec.resolved(), base, start, self.events, trainable=False)
        ours = load_tokenizer(self.base.folder).get_vocab()
        if other.tokenizer.get_vocab() != ours:
            message = f"'{settings.reference_model}' has another tokenizer than '{self.spec.model}'."
            raise UserError("invalid_value", message, f"{stage.param}.reference_model")
        self.policy = other
        exactness.check(other, stage.train, self.events)
        found = self._reference_by(other, stage, settings)
        del self.policy, other
        gc.collect()
        return found

    def _reference_by(self, policy: Policy, stage: Stage, settings: DPOHyperparameters) -> References:
        began, hits, digest = time.monotonic(), len(self.cache.hits), policy.digest()

        def find(rows: Rows) -> Reference:
            return self._in_memory(
                lambda: reference.find(policy, digest, rows, settings.ld_alpha, self.cache, self._tick), stage
            )

        found = References(find(stage.train), find(stage.validation))
        wanted = bool(stage.train) + bool(stage.validation)
        how = "found in the cache" if len(self.cache.hits) == hits + wanted else "computed"
        self.events.message(f"Reference log-probs {how} in {time.monotonic() - began:.1f} s.")
        return found

    def _choose_checkpointing(self, stage: Stage) -> None:
        """Recompute activations where the job says so, or where they would not fit."""
        asked = stage.hyperparameters.activation_checkpointing
        if asked is None:
            pack = self.policy.packing.build(trees(stage.train, [0], 0)).to(self.policy.device)
            asked = not self._in_memory(lambda: memory.fits(self.policy, pack, stage.train.longest), stage)
            if asked:
                self.events.message("Activations are recomputed in the backward pass: they would not fit into memory.")
        self.policy.recompute_activations(asked)

    def _in_memory(self, work: Callable[[], Result], stage: Stage) -> Result:
        """Run `work`; where the GPU's memory is not enough, with half the budget, again and again."""
        longest = max(stage.train.longest, stage.validation.longest)
        while True:
            generator = torch.get_rng_state()
            try:
                return work()
            except torch.OutOfMemoryError as error:
                packing = self.policy.packing
                if packing.budget <= longest:
                    message = f"The longest row ({longest} tokens) does not fit into the GPU's memory."
                    raise UserError(
                        "out_of_memory", f"{message} Lower 'max_length'.", f"{stage.param}.max_length"
                    ) from error
                self.policy.packing = replace(packing, budget=packing.budget // 2)
            self.events.message(
                f"Out of memory: packs of {self.policy.packing.budget} tokens from now on.", level="warn"
            )
            for parameter in self.policy.trainable().values():
                parameter.grad = None
            torch.set_rng_state(generator)
            gc.collect()
            torch.cuda.empty_cache()

    def _step(self, stage: Stage, optimizer: torch.optim.Optimizer, method: Method) -> dict[str, float]:
        """One optimizer step over exactly `stage.batch_size` rows."""
        began, policy, step = time.monotonic(), self.policy, self.state.stage_step
        numbers = stage.batch(step)
        policy.set_dropout(stage.name == "sft")
        work, averages = self._backward(stage, method, numbers)
        parameters = list(policy.trainable().values())
        norm = torch.nn.utils.clip_grad_norm_(parameters, stage.hyperparameters.max_grad_norm)
        averages.add("grad_norm", norm)
        metrics = averages.means()
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
            self._keep_last_good(stage, optimizer, method)
        self._require_finite(metrics, "loss", "grad_norm")
        if not policy.full:  # of an adapter a copy costs little
            self._remember()
        rate = stage.learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        policy.set_dropout(False)
        tokens = sum(stage.train[number].tokens for number in numbers)
        self.state.trained_tokens += tokens
        seconds = time.monotonic() - began
        metrics |= {
            "learning_rate": rate,
            "fill_rate": work.tokens / work.places,
            "tokens_per_second": tokens / seconds,
            "peak_memory_bytes": float(memory.peak_bytes(policy.device)),
        }
        if self._layer_weights is not None:
            needed = throughput.needed_flops(policy, self._layer_weights, work.tokens, work.scored)
            metrics["mfu"] = needed / (seconds * throughput.peak_flops(policy.device))
        return metrics

    def _backward(self, stage: Stage, method: Method, numbers: list[int]) -> tuple[Work, Averages]:
        """The gradient of a step, by the largest scale of the loss that is finite: from step to step anew, so that a
        run that is resumed comes to the same.
        """
        policy = self.policy
        for scale in policy.loss_scales:
            policy.loss_scale = scale
            found = self._in_memory(lambda: _with_averages(method, numbers), stage)
            gradients = [p.grad for p in policy.trainable().values() if p.grad is not None]
            if scale == policy.loss_scales[-1] or all(bool(g.isfinite().all()) for g in gradients):
                break
            for parameter in policy.trainable().values():
                parameter.grad = None
        for gradient in gradients if scale != 1 else ():
            gradient.div_(scale)
        policy.loss_scale = 1.0
        return found

    def _remember(self) -> None:
        """Keep a copy of what trains, in the place of the one before."""
        if self._last_good is None:
            self._last_good = {name: p.detach().clone() for name, p in self.policy.trainable().items()}
        for name, parameter in self.policy.trainable().items():
            self._last_good[name].copy_(parameter.detach())

    def _keep_last_good(self, stage: Stage, optimizer: torch.optim.Optimizer, method: Method) -> None:
        """Write a checkpoint of the weights of the last finite loss: one step back, since the last update broke it.

        It is for those who want to train on from there; its optimizer state is the one after that update.
        """
        if self._last_good is None or self.state.stage_step < 2:
            return
        with torch.no_grad():
            for name, parameter in self.policy.trainable().items():
                parameter.copy_(self._last_good[name])
        self.state.step, self.state.stage_step = self.state.step - 1, self.state.stage_step - 1
        if not (self.folder / "checkpoints" / f"step-{self.state.step}").exists():
            self._checkpoint(stage, optimizer, method)

    def _require_finite(self, metrics: dict[str, float], *names: str) -> None:
        for name in names:
            if not math.isfinite(metrics.get(name, 0.0)):
                raise UserError(
                    "loss_not_finite",
                    f"{name} became {metrics[name]}. Try a lower learning rate. Step {self.state.step} is the last "
                    "one known to be good; checkpoints up to it are kept.",
                    "method",
                )

    def _validate(self, stage: Stage, method: Method, *, record: bool) -> dict[str, float]:
        """The metrics of the validation rows, under `eval/`."""
        self.validation_logps: Found = []
        if not stage.validation:
            return {}

        def work() -> tuple[Found, Averages]:
            averages = Averages()
            return method.evaluate(averages, self._tick), averages

        self.validation_logps, averages = self._in_memory(work, stage)
        metrics = {f"eval/{name}": value for name, value in averages.means().items()}
        if record:
            self._require_finite(metrics, "eval/loss")
            self._record(stage, metrics)
            self._report(stage, metrics, seconds_remaining=None)
        return metrics

    def _record(self, stage: Stage, metrics: dict[str, float]) -> None:
        self.state.history.append({"step": self.state.step, "stage": stage.name, **metrics})
        self._advise(self.advisor.look(self.state.history[-1]))

    def _advise(self, told: Iterable[Advice]) -> None:
        for advice in told:
            data = {"code": advice.code, "step": self.state.step, "figures": advice.figures}
            self.events.message(advice.message, level="warn", data=data)

    def _report(self, stage: Stage, metrics: dict[str, float], seconds_remaining: float | None) -> None:
        self.events.emit(
            "metrics",
            stage=stage.name,
            step=self.state.step,
            total_steps=self.total_steps,
            seconds_remaining=seconds_remaining,
            metrics=metrics,
        )

    def _checkpoint(self, stage: Stage, optimizer: torch.optim.Optimizer, method: Method) -> None:
        """Write a checkpoint, unless this step has one. Whoever hears of it removes it when it is safe."""
        if self.state.stage_step == 0 or self.state.step == self._saved_step:
            return
        self._saved_step = self.state.step
        folder = self.folder / "checkpoints" / f"step-{self.state.step}"
        checkpoint.save(folder, self.policy, optimizer, method, self.state, self.best_weights)
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


def require_possible(stage: Stage, policy: Policy) -> None:
    """Refuse before any step what this machine or these rows cannot do."""
    settings = stage.hyperparameters
    if settings.early_stopping is not None and not stage.validation:
        message = "'early_stopping' needs validation rows, and none was held out."
        raise UserError("no_validation_rows", message, f"{stage.param}.early_stopping")
    if settings.optimizer in NEED_GPU and policy.device.type != "cuda":
        message = f"'{settings.optimizer}' needs a GPU; use 'adamw'."
        raise UserError("optimizer_needs_gpu", message, f"{stage.param}.optimizer")


def _with_averages(method: Method, numbers: list[int]) -> tuple[Any, Averages]:
    averages = Averages()
    return method.backward(numbers, averages), averages
