"""The training loop: SFT, then another method, on one policy. Read it from top to bottom.

for each stage:
    compute the reference log-probs once, before the first update        (if the loss has a reference)
    for each optimizer step:
        rows of the batch → packs → log-probs → loss → backward pass
        clip the gradient, set the learning rate, update the weights
        every `eval_every` steps: validate
        every `checkpoint_every` steps: write a checkpoint
"""

import shutil
import time
from hashlib import sha256

import torch
from transformers import AutoConfig

from app.spec.hyperparameters import DEFAULT_MAX_LENGTH
from app.spec.job import Adapter
from worker.model_files import context_length
from worker.trainer import artifact, checkpoint, exactness, plan, reward, stage_run
from worker.trainer.alike import require_alike, require_same_rows
from worker.trainer.checkpoint import State
from worker.trainer.dataset import require_embedded
from worker.trainer.embeddings import untrained_control_tokens
from worker.trainer.errors import UserError
from worker.trainer.events import TrainingDone
from worker.trainer.journal import last_metrics
from worker.trainer.loading import load_policy, shards_for
from worker.trainer.model import Policy, fingerprint
from worker.trainer.optimizer import NEED_GPU
from worker.trainer.plan import Stage
from worker.trainer.reference_pass import other_model_references
from worker.trainer.room import require_disk
from worker.trainer.run import TrainingRun
from worker.trainer.stage_run import StageRun
from worker.trainer.tokenizer import load_tokenizer


def train(run: TrainingRun) -> None:
    """Train as the job spec of `run` says, and write the artifact to `output/`. Raises `UserError` or `Stopped`."""
    try:
        _train(run)
    except torch.OutOfMemoryError as error:  # outside of a step; a step retries with smaller packs
        message = "The model, its optimizer or one row does not fit into the GPU's memory."
        raise UserError("out_of_memory", f"{message} Lower 'max_length', or quantise the base.", "model") from error


def _train(run: TrainingRun) -> None:
    began = time.monotonic()
    if run.ranks.local_rank == 0:
        shutil.rmtree(run.folder / "rows", ignore_errors=True)
    stages = run.ranks.first_then_others(lambda: stages_of(run))  # the first rank of a machine tokenises
    require_same_rows(run.ranks, [rows for stage in stages for rows in (stage.train, stage.validation)])
    run.check_stop()
    state = State(stages[0].name) if run.resume is None else checkpoint.load_state(run.resume)
    first_stage = [stage.name for stage in stages].index(state.stage)
    # A checkpoint of the last stage already holds the reference log-probs.
    has_references = run.resume is not None and first_stage == len(stages) - 1
    # Another reference model is loaded, evaluated and freed before the policy takes its memory.
    run.events.working("loading")
    other_references = None if has_references else other_model_references(run, stages[-1])
    run.events.working("loading")
    start = run.resume / "model" if run.resume else run.start
    policy = load_policy(run.spec, run.base, start, run.events, shards_for(run.spec, run.base, run.ranks))
    run.check_stop()
    check_policy(run, stages, policy)
    require_same(run, policy)
    threads = torch.get_num_threads()
    devices = f"{policy.device.type} ({threads} thread{'s' if threads > 1 else ''})"
    run.events.message(
        f"Model and {sum(len(stage.train) for stage in stages)} rows ready after {time.monotonic() - began:.1f} s "
        f"on {devices if run.ranks.size == 1 else f'{run.ranks.size} × {devices}'}."
    )
    ready, resume = time.monotonic(), run.resume
    counted_from, tokens_before, step_before = ready, state.trained_tokens, state.step
    planned_steps = sum(stage.steps for stage in stages)
    for stage in stages[first_stage:]:
        if stage.exercise is not None:  # much of its time goes into writing answers: the pace is that of this stage
            counted_from, tokens_before, step_before = time.monotonic(), state.trained_tokens, state.step
        running = stage_run.begin(run, stage, policy, state, planned_steps, resume=resume, references=other_references)
        final_metrics = run_stage(running)
        resume = None
    weights = policy.gathered(run.ranks, artifact.dtype_of(run.base.folder))
    if not run.ranks.is_first:
        return
    trained = time.monotonic()
    run.events.working("saving")
    results = artifact.Results(run, state.history, stages[-1], running.validated_rows, final_metrics)
    artifact.write(run.folder / "output", policy, results, weights)
    pace = {
        "tokens": state.trained_tokens - tokens_before,
        "steps": state.step - step_before,
        "seconds": trained - counted_from,
        "overhead_seconds": ready - began,
        "writes": stages[-1].exercise is not None,
    }
    metrics = last_metrics(state.history, state.stage) | final_metrics
    run.events.emit(TrainingDone(state.trained_tokens, metrics, pace))


def run_stage(running: StageRun) -> dict[str, float]:
    """Train a stage from its current step to its end. Raises `UserError` or `Stopped`.

    Returns the validation metrics of the weights that the stage keeps. They are empty if the last step has already
    validated these weights.
    """
    state, began, first_step = running.state, time.monotonic(), running.state.stage_step
    validated = state.stage_step == 0  # whether the current weights have been validated
    if validated:
        running.validate_at_start()
    while state.pending is not None or not running.ended:
        # 1. Update the weights. After a stop during a validation, this step is done and only its metrics are pending.
        if state.pending is None:
            running.stop_if_asked()
            state.pending = running.step()
        metrics = state.pending
        # 2. Validate the new weights.
        validated = running.validation_is_due
        if validated:
            metrics |= running.validate_after_step()
        state.pending = None
        # 3. Record the metrics of the step and of its validation.
        seconds_per_step = (time.monotonic() - began) / max(1, state.stage_step - first_step)
        total_steps = running.total_steps
        running.journal.write(state.step, metrics, total_steps, seconds_per_step * (total_steps - state.step))
        # 4. Write a checkpoint. The last one of a stage holds the weights that the stage keeps.
        if running.ended:
            running.restore_best()
        if running.checkpoint_is_due:
            running.checkpoint()
    # 5. With early stopping, keep the best weights.
    early_stopping = running.stage.hyperparameters.early_stopping
    if early_stopping is not None and running.restore_best():
        best = running.state.best
        running.run.events.message(
            f"Stage {running.stage.name} keeps step {best.step}: {early_stopping.metric} {best.value:.6g}."
        )
        validated = False
    return {} if validated else running.validate()


def stages_of(run: TrainingRun) -> list[Stage]:
    """The stages of the job, with tokenised rows. Raises `UserError`."""
    model = run.start or run.base.folder
    try:
        tokenizer = load_tokenizer(model)
        config = AutoConfig.from_pretrained(run.base.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        message = f"The model '{run.spec.model}' cannot be loaded: {error}"
        raise UserError("model_not_loadable", message, "model") from error
    context = context_length(config.to_dict()) or DEFAULT_MAX_LENGTH  # tokens
    renderings = run.about.get("renderings", [])
    stages = plan.stages(run.spec, run.folder, tokenizer, context, run.cache, run.events, renderings)
    for rows in (part for stage in stages for part in (stage.train, stage.validation)):
        require_embedded(rows, tokenizer, config, run.spec.model)
    for stage in stages:
        stage.prepare()
    return stages


def check_policy(run: TrainingRun, stages: list[Stage], policy: Policy) -> None:
    """Refuse a job that this machine or these rows cannot run, before its first step. Warn of untrained tokens.

    Raises `UserError`, or `NoRoom` if the disk is too full.
    """
    exactness.check(policy, stages[-1].train, run.events, run.ranks)
    _warn_of_untrained_tokens(run, stages, policy)
    for stage in stages:
        if stage.exercise is not None:
            stage.exercise.grading.load()
        require_possible(stage, policy)
        require_disk(run.folder, policy, stage.hyperparameters.optimizer)
    if policy.reward_head is not None:
        reward.require_classifier(policy)


def require_same(run: TrainingRun, policy: Policy) -> None:
    """Raise `UserError` unless all ranks have the same engine and the same policy, on devices of the same kind."""
    settings = (policy.packing, policy.joins, policy.one_by_one, policy.own_logits, policy.autocast_dtype)
    if policy.device.type == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = f"{torch.backends.cpu.get_cpu_capability()} ({torch.get_num_threads()} threads)"
    weights = sha256()
    for name, parameter in policy.trainable().items() if not policy.full else ():
        weights.update(name.encode() + fingerprint(parameter))
    parts = {"kind of device": device, "way to compute log-probs": str(settings), "adapter": weights.hexdigest()}
    require_alike(run.ranks, parts)


def require_possible(stage: Stage, policy: Policy) -> None:
    """Raise `UserError` for early stopping without validation rows, and for a GPU optimizer without a GPU."""
    settings = stage.hyperparameters
    if settings.early_stopping is not None and not stage.validation:
        message = "'early_stopping' needs validation rows, and none were held out. Give a 'validation_file'."
        raise UserError("no_validation_rows", message, f"{stage.param}.early_stopping")
    if policy.value_head is not None and policy.own_logits:
        message = f"'{policy.name}' has no hidden states for PPO's value head. Take the algorithm 'rloo'."
        raise UserError("unsupported_model", message, f"{stage.param}.algorithm")
    if settings.optimizer in NEED_GPU and policy.device.type != "cuda":
        message = f"The optimizer '{settings.optimizer}' needs a GPU. Use 'adamw'."
        raise UserError("optimizer_needs_gpu", message, f"{stage.param}.optimizer")


def _warn_of_untrained_tokens(run: TrainingRun, stages: list[Stage], policy: Policy) -> None:
    """Warn of control tokens that the base never learned. A LoRA adapter does not train the embeddings."""
    adapter = run.spec.adapter
    if not isinstance(adapter, Adapter) or adapter.modules_to_save:
        return
    policy.shards.gather(policy.causal.get_input_embeddings())
    used = {token for stage in stages for token in stage.train.vocabulary}
    names = untrained_control_tokens(policy.tokenizer, used, policy.causal.get_input_embeddings().weight)
    if names:
        run.events.message(
            f"The texts contain control tokens that the base never learned: {', '.join(names[:5])}. Their embeddings "
            "are untrained, and the adapter does not change them. Start from the model's instruct version, write "
            "texts without them ('chat_template': false), or train them: 'adapter': "
            '{"modules_to_save": ["embed_tokens", "lm_head"]}.',
            level="warn",
            data={"code": "untrained_control_tokens", "tokens": names},
        )
