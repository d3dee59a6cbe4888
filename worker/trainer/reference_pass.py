"""The reference pass: the log-probs of a stage's rows under its reference, before the first update."""

import gc
import time

from app.spec.hyperparameters import DPOHyperparameters
from worker.trainer import exactness, memory, reference
from worker.trainer.dataset import Rows
from worker.trainer.errors import UserError
from worker.trainer.loading import load_policy
from worker.trainer.model import Base, Policy
from worker.trainer.plan import Stage
from worker.trainer.reference import Reference, References
from worker.trainer.run import TrainingRun
from worker.trainer.tokenizer import load_tokenizer


def references_by(policy: Policy, stage: Stage, tail_weight: float | None, run: TrainingRun) -> References:
    """The log-probs of the rows of `stage` under `policy` as it is. `tail_weight` is LD-DPO's."""
    began, hits, digest = time.monotonic(), len(run.cache.hits), policy.digest()

    def find(rows: Rows) -> Reference:
        return memory.with_smaller_packs(
            policy,
            stage,
            run.events,
            lambda: reference.find(policy, digest, rows, tail_weight, run.cache, run.tick),
        )

    found = References(find(stage.train), find(stage.validation))
    wanted = bool(stage.train) + bool(stage.validation)
    how = "found in the cache" if len(run.cache.hits) == hits + wanted else "computed"
    run.events.message(f"Reference log-probs {how} in {time.monotonic() - began:.1f} s.")
    return found


def references_of_another(run: TrainingRun, stage: Stage) -> References | None:
    """The log-probs of the model in `reference/`, which is loaded, asked, and let go before the policy is.

    None where the job names no other model.
    """
    name, settings, folder = run.spec.reference_model, stage.hyperparameters, run.folder / "reference"
    if name is None or not isinstance(settings, DPOHyperparameters):
        return None
    start = folder / "start" if (folder / "start").exists() else None
    # A fresh adapter changes nothing: it stands for the bare base model.
    spec = run.spec.model_copy(update={"adapter": None, "model": name}).resolved()
    other = load_policy(spec, Base(name, None, None, folder / "base"), start, run.events, trainable=False)
    if other.tokenizer.get_vocab() != load_tokenizer(run.base.folder).get_vocab():
        message = f"'{name}' has another tokenizer than '{run.spec.model}'."
        raise UserError("invalid_value", message, f"{stage.param}.reference_model")
    exactness.check(other, stage.train, run.events)
    found = references_by(other, stage, settings.ld_alpha, run)
    del other
    gc.collect()
    return found
