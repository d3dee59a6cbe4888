"""The reference pass: the log-probs of a stage's rows under its reference, before the first update."""

import gc
import time

from app.spec.hyperparameters import DPOHyperparameters
from worker.model_files import folder_at
from worker.trainer import exactness, reference
from worker.trainer.dataset import Rows
from worker.trainer.errors import UserError
from worker.trainer.launcher import Launcher
from worker.trainer.loading import load_policy, shards_for
from worker.trainer.model import Base
from worker.trainer.plan import Stage
from worker.trainer.reference import Reference, References
from worker.trainer.run import TrainingRun
from worker.trainer.tokenizer import load_tokenizer


def policy_references(launcher: Launcher, stage: Stage, tail_weight: float | None, run: TrainingRun) -> References:
    """The log-probs of the rows of `stage` under the launcher's policy with its current weights.

    `tail_weight` is the weight of tail tokens in LD-DPO.
    """
    began, made, policy = time.monotonic(), len(run.cache.made), launcher.policy
    digest = policy.digest() if policy.is_divided else run.ranks.of_first(policy.digest)

    def find(rows: Rows, part: str) -> Reference:
        def report(done: int) -> None:
            run.check_stop()
            if len(rows):
                run.events.working("reference", done, len(rows))

        folder = run.folder / "rows" / f"{stage.name}-reference-{part}"
        return reference.find_or_compute(launcher, digest, rows, tail_weight, run.cache, report, folder)

    references = References(find(stage.train, "train"), find(stage.validation, "validation"))
    how = "found in the cache" if len(run.cache.made) == made else "computed"
    run.events.message(f"Reference log-probs {how} in {time.monotonic() - began:.1f} s.")
    return references


def other_model_references(run: TrainingRun, stage: Stage) -> References | None:
    """The log-probs under the reference model in `reference/`; None if the job names no reference model.

    The model is freed at the end, and the policy is loaded after that. Raises `UserError` for a reference model with
    another tokenizer than the policy's.
    """
    name, settings, folder = run.spec.reference_model, stage.hyperparameters, run.folder / "reference"
    if name is None or not isinstance(settings, DPOHyperparameters):
        return None
    start = folder / "start" if (folder / "start").exists() else None
    # A reference without an adapter gets a fresh one, which changes nothing: it is the bare base model.
    spec = run.spec.model_copy(update={"adapter": None, "model": name}).resolved()
    base = Base(name, None, None, folder_at(folder / "base"))
    shards = shards_for(spec, base, run.ranks)
    reference_policy = load_policy(spec, base, start, run.events, shards, trainable=False)
    if reference_policy.tokenizer.get_vocab() != load_tokenizer(run.base.folder).get_vocab():
        message = f"'{name}' has a different tokenizer than '{run.spec.model}'. Choose another reference model."
        raise UserError("invalid_value", message, f"{stage.param}.reference_model")
    exactness.check(reference_policy, stage.train, run.events, run.ranks)
    launcher = Launcher(reference_policy, run.ranks, run.events, stage.param)
    references = policy_references(launcher, stage, settings.ld_alpha, run)
    del reference_policy, launcher
    gc.collect()
    return references
