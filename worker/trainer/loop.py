"""The training loop: SFT, then a preference method, on one policy. It reads top to bottom.

for each stage:
    reference log-probs, once, before the first update        (where the loss has a reference)
    for each step:
        rows of the step → packs → log-probs → loss → backward
        clip, set the learning rate, update
        validate and write checkpoints now and then
"""

import time

import torch
from transformers import AutoConfig

from app.spec.hyperparameters import DEFAULT_MAX_LENGTH
from app.spec.job import Adapter
from worker.model_files import context_length
from worker.trainer import artifact, checkpoint, exactness, plan, reward, stage_run
from worker.trainer.checkpoint import State
from worker.trainer.dataset import require_embedded
from worker.trainer.embeddings import untrained
from worker.trainer.errors import UserError
from worker.trainer.events import TrainingDone
from worker.trainer.journal import last_metrics
from worker.trainer.loading import load_policy
from worker.trainer.model import Policy
from worker.trainer.optimizer import NEED_GPU
from worker.trainer.plan import Stage
from worker.trainer.reference_pass import references_of_another
from worker.trainer.run import TrainingRun
from worker.trainer.stage_run import StageRun
from worker.trainer.tokenizer import load_tokenizer


def train(run: TrainingRun) -> None:
    """Train as the job of `run` says, and leave the artifact in `output/`. Raises `UserError` or `Stopped`."""
    try:
        _train(run)
    except torch.OutOfMemoryError as error:  # not in a step, which is tried with smaller packs
        message = "The model, its optimizer or one row do not fit into the GPU's memory."
        raise UserError("out_of_memory", f"{message} Lower 'max_length', or quantise the base.", "model") from error


def _train(run: TrainingRun) -> None:
    began = time.monotonic()
    stages = stages_of(run)
    run.tick()
    state = State(stages[0].name) if run.resume is None else checkpoint.load_state(run.resume)
    resumed = [stage.name for stage in stages].index(state.stage)
    others = None if run.resume is not None and resumed == len(stages) - 1 else references_of_another(run, stages[-1])
    policy = load_policy(run.spec, run.base, run.resume / "model" if run.resume else run.start, run.events)
    run.tick()
    check_policy(run, stages, policy)
    run.events.message(
        f"Model and {sum(len(stage.train) for stage in stages)} rows ready after {time.monotonic() - began:.1f} s "
        f"on {policy.device.type} ({torch.get_num_threads()} threads)."
    )
    ready, tokens_before, resume = time.monotonic(), state.trained_tokens, run.resume
    planned = sum(stage.steps for stage in stages)
    for stage in stages[resumed:]:
        last = stage_run.begin(run, stage, policy, state, planned, resume=resume, others=others)
        kept = run_stage(last)
        resume = None
    trained = time.monotonic()
    results = artifact.Results(run, state.history, stages[-1], last.validated_rows, kept)
    artifact.write(run.folder / "output", policy, results)
    pace = {
        "tokens": state.trained_tokens - tokens_before,
        "seconds": trained - ready,
        "overhead_seconds": ready - began,
    }
    metrics = last_metrics(state.history, state.stage) | kept
    run.events.emit(TrainingDone(state.trained_tokens, metrics, pace))


def run_stage(running: StageRun) -> dict[str, float]:
    """Train a stage from where it is to its end. Raises `UserError` or `Stopped`.

    Returns the validation of the weights that are kept, where they are not those that the last step has validated.
    """
    state, began, first = running.state, time.monotonic(), running.state.stage_step
    validated = state.stage_step == 0
    if validated:
        running.validate_at_start()
    while state.pending is not None or not running.ended:
        if state.pending is None:
            running.stop_if_asked()
            state.pending = running.step()
        metrics = state.pending
        validated = running.validation_is_due
        if validated:
            metrics |= running.validate_after_step()
        state.pending = None
        seconds_a_step, total = (time.monotonic() - began) / max(1, state.stage_step - first), running.total_steps
        running.journal.write(state.step, metrics, total, seconds_a_step * (total - state.step))
        if running.ended:
            running.bring_back_best()  # the last checkpoint of a stage is what the stage leaves
        if running.checkpoint_is_due:
            running.checkpoint()
    stopping = running.stage.hyperparameters.early_stopping
    if stopping is not None and running.bring_back_best():
        best = running.state.best
        running.run.events.message(
            f"Stage {running.stage.name} keeps step {best.step}: {stopping.metric} {best.value:.6g}."
        )
        validated = False
    return {} if validated else running.validate()


def stages_of(run: TrainingRun) -> list[Stage]:
    """The stages of the job, with their rows as the model reads them. Raises `UserError`."""
    model = run.start or run.base.folder
    try:
        tokenizer = load_tokenizer(model)
        config = AutoConfig.from_pretrained(run.base.folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        message = f"The model '{run.spec.model}' cannot be loaded: {error}"
        raise UserError("model_not_loadable", message, "model") from error
    context = context_length(config.to_dict()) or DEFAULT_MAX_LENGTH
    stages = plan.stages(run.spec, run.folder, tokenizer, context, run.cache, run.events)
    for rows in (part for stage in stages for part in (stage.train, stage.validation)):
        require_embedded(rows, tokenizer, config, run.spec.model)
    return stages


def check_policy(run: TrainingRun, stages: list[Stage], policy: Policy) -> None:
    """Refuse before any step what this machine or these rows cannot do, and warn of what they will not learn."""
    exactness.check(policy, stages[-1].train, run.events)
    _warn_of_untrained_tokens(run, stages, policy)
    for stage in stages:
        require_possible(stage, policy)
    if policy.reward_head is not None:
        reward.require_classifier(policy)


def require_possible(stage: Stage, policy: Policy) -> None:
    """Refuse settings that need what is not there: validation rows, or a GPU."""
    settings = stage.hyperparameters
    if settings.early_stopping is not None and not stage.validation:
        message = "'early_stopping' needs validation rows, and none was held out."
        raise UserError("no_validation_rows", message, f"{stage.param}.early_stopping")
    if settings.optimizer in NEED_GPU and policy.device.type != "cuda":
        message = f"'{settings.optimizer}' needs a GPU; use 'adamw'."
        raise UserError("optimizer_needs_gpu", message, f"{stage.param}.optimizer")


def _warn_of_untrained_tokens(run: TrainingRun, stages: list[Stage], policy: Policy) -> None:
    """An adapter inside the model does not reach the embeddings."""
    adapter = run.spec.adapter
    if not isinstance(adapter, Adapter) or adapter.modules_to_save:
        return
    used = {token for stage in stages for token in stage.train.vocabulary}
    names = untrained(policy.tokenizer, used, policy.causal.get_input_embeddings().weight)
    if names:
        run.events.message(
            f"The base never learned {', '.join(names[:5])}, which the texts have: their embeddings are as they "
            "were before it was trained, and an adapter does not change them. Start from the model's instruct "
            "version, write texts without them ('chat_template': false), or train them: 'adapter': "
            '{"modules_to_save": ["embed_tokens", "lm_head"]}.',
            level="warn",
            data={"code": "untrained_control_tokens", "tokens": names},
        )
