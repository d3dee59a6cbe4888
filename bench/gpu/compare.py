"""Whole runs of this engine and its peers over the same pairs, with tokenisation and the reference pass.

Each entrant first trains on one batch, so that nobody's first run compiles kernels or reads files. The needed FLOPs are
those of `bench.inputs.Arithmetic`: 4 for each weight and distinct token, and for the head at scored positions only.
"""

import io
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from transformers import PreTrainedModel

from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from bench.entrants import length
from bench.gpu import card, shapes
from bench.gpu.shapes import DEVICE, MAX_LENGTH, measured, synchronize
from bench.inputs import HH, ULTRAFEEDBACK, Arithmetic, Lengths, Pairs, lengths_of, make_pairs
from worker.trainer import loop, stage_run
from worker.trainer.checkpoint import State
from worker.trainer.events import Events
from worker.trainer.loading import wrap
from worker.trainer.model import Base, Policy
from worker.trainer.run import TrainingRun
from worker.trainer.throughput import layer_weights

RUNS = 3
"""Runs of this engine. Its peers run once, because they take longer."""


@dataclass(frozen=True)
class Workload:
    """Pairs with the lengths of a data set: its file, medians of synthetic lengths in words, pairs, batch size."""

    file: Path
    medians: Lengths
    count: int
    batch: int

    def pairs(self) -> tuple[Pairs, str]:
        """The pairs, and where their lengths come from."""
        lengths, source = lengths_of(self.file, 4 if shapes.dry else self.count, self.medians)
        return make_pairs(lengths, 128 if shapes.dry else MAX_LENGTH, shapes.vocabulary()), source


WORKLOADS = {
    "hh": Workload(HH, (70, 32, 24), 128, 64),
    "ultrafeedback": Workload(ULTRAFEEDBACK, (57, 152, 133), 64, 32),
}


def ours(
    model: PreTrainedModel, folder: Path, pairs: Pairs, batch: int, epochs: int, *, compiled: bool = False
) -> dict[str, float]:
    """This engine's own loop, over the model on the card. The artifact does not count."""
    hyperparameters = {
        "n_epochs": epochs,
        "batch_size": batch,
        "max_length": MAX_LENGTH,
        "learning_rate": 1e-5,
        "checkpoint_every": 10_000,
        "compile": compiled,
    }
    spec = {
        "model": "bench",
        "training_file": "pairs.jsonl",
        "validation_split": 0.0,
        "seed": 0,
        "quantization": "nf4",
        "method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
    }
    with tempfile.TemporaryDirectory() as name:
        work, stream = Path(name), io.StringIO()
        (work / "base").symlink_to(folder)
        (work / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        (work / "spec.json").write_text(json.dumps(spec))
        (work / "run.json").write_text(
            json.dumps({"base_model": "bench", "revision": None, "version": None, "spec": spec})
        )
        run = TrainingRun.of(work, Events(stream), threading.Event())
        policies, check_seconds = list[Policy](), [0.0]

        def train() -> None:
            policy = wrap(model, shapes.tokenizer(), run.spec, run.base, None, run.events)
            policies.append(policy)
            stages = loop.stages_of(run)
            began = time.perf_counter()
            loop.check_policy(run, stages, policy)
            synchronize()
            check_seconds[0] = time.perf_counter() - began
            (stage,) = stages
            running = stage_run.begin(run, stage, policy, State(stage.name), stage.steps)
            running.saved_step = stage.steps  # no checkpoint at the end
            loop.run_stage(running)

        try:
            return measured(train) | {"check_seconds": check_seconds[0]}
        finally:
            for policy in policies:
                release(policy)


def release(policy: Policy) -> None:
    """Take the adapter off the model again, and restore its attention."""
    policy.causal.set_attn_implementation(policy.own_attention)
    policy.recompute_activations(False)
    policy.compiled = False
    policy.model.unload()


def trl(
    model: PreTrainedModel, folder: Path, pairs: Pairs, batch: int, epochs: int, **options: object
) -> dict[str, float]:
    """TRL's DPOTrainer over the same model. `micro` is the batch that it computes at once; the others are TRL's own."""
    import trl as library
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from peft import LoraConfig

    disable_progress_bar()
    micro = min(int(str(options.pop("micro", batch))), batch)
    with tempfile.TemporaryDirectory() as output:
        settings = trl_settings(output, batch, micro, epochs)
        trainers: list[library.DPOTrainer] = []
        rows = sorted(pairs, key=length) if options.get("train_sampling_strategy") == "sequential" else pairs

        def run() -> None:
            trainers.append(
                library.DPOTrainer(
                    model=model,
                    args=library.DPOConfig(**settings | options),
                    train_dataset=Dataset.from_list(rows),
                    processing_class=shapes.tokenizer(),
                    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
                )
            )
            trainers[0].train()

        try:
            return measured(run)
        finally:
            model.activation_checkpointing_disable()
            model.disable_input_require_grads()
            if trainers:
                trainers[0].model.unload()
            model.__dict__.pop("forward", None)  # TRL's fused head
            model.requires_grad_(False)


def trl_settings(output: str, batch: int, micro: int, epochs: int) -> JsonObject:
    """The settings of a `DPOConfig` that all entrants of TRL share. `micro`: the pairs that are computed at once."""
    return {
        "output_dir": output,
        "bf16": DEVICE.type == "cuda",
        "use_cpu": DEVICE.type == "cpu",
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
        "num_train_epochs": epochs,
        "max_length": MAX_LENGTH,
        "learning_rate": 1e-5,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


BEST: JsonObject = {
    "precompute_ref_log_probs": True,
    "gradient_checkpointing": False,
    "train_sampling_strategy": "sequential",
    "micro": 4,
}
"""The settings of an expert: the reference once, rows sorted by length, nothing recomputed, micro-batches that fit."""


OWN, COMPILED = "dpo-service", "dpo-service, compiled layers"


def entrants() -> dict[str, Callable[..., dict[str, float]]]:
    """The entrants by name, the most telling ones first. Liger's kernels take part if they are installed."""
    best = BEST | ({"use_liger_kernel": True} if find_spec("liger_kernel") else {})
    found: dict[str, Callable[..., dict[str, float]]] = {OWN: ours, "TRL default": trl}
    if not shapes.dry:  # a CPU compiles for minutes
        found[COMPILED] = partial(ours, compiled=True)
    found["TRL best options"] = partial(trl, **best)
    return found


def hh() -> Iterator[JsonObject]:
    """One epoch at the lengths of HH."""
    return _compare("hh", 1)


def ultrafeedback() -> Iterator[JsonObject]:
    """One epoch at the lengths of UltraFeedback."""
    return _compare("ultrafeedback", 1)


def hh_3_epochs() -> Iterator[JsonObject]:
    """Three epochs at the lengths of HH, by this engine alone: the reference pass counts less."""
    return _compare("hh", 3, only=OWN)


def _compare(workload: str, epochs: int, only: str | None = None) -> Iterator[JsonObject]:
    """The seconds of the entrants, each with its first run left out, and how they compare.

    The check before training takes as long for 30 pairs as for a million. So a ratio without it is given too.
    """
    chosen, model, folder = WORKLOADS[workload], shapes.model(), shapes.folder()
    pairs, source = chosen.pairs()
    batch = 2 if shapes.dry else chosen.batch
    arithmetic = Arithmetic.of(pairs, layer_weights(model), model.get_output_embeddings().weight.numel())
    peak, needed = card.product_flops(), arithmetic.passes(2 * epochs + 1, shared=True)
    yield {
        "source": source,
        "pairs": len(pairs),
        "batch": batch,
        "epochs": epochs,
        "distinct_tokens": arithmetic.shared,
    }
    seconds, checks = dict[str, float](), dict[str, float]()
    for name, train in entrants().items():
        if only not in (None, name):
            continue
        try:
            train(model, folder, pairs[:batch], batch, 1)  # compiles
            runs = [
                train(model, folder, pairs, batch, epochs)
                for _ in range(1 if shapes.dry or name not in (OWN, COMPILED) else RUNS)
            ]
        except Exception as error:  # one entrant without enough memory, or without a kernel, is a figure too
            shapes.free()
            yield {name: {"error": f"{type(error).__name__}: {error}"[:500]}}
            continue
        seconds[name] = statistics.median(run["seconds"] for run in runs)
        if name in (OWN, COMPILED):
            checks[name] = statistics.median(run["check_seconds"] for run in runs)
        yield {
            name: {
                "runs": runs,
                "pairs_per_second": epochs * len(pairs) / seconds[name],
                "distinct_tokens_per_second": epochs * arithmetic.shared / seconds[name],
                "needed_tflops": needed / seconds[name] / 1e12,
                "of_products": needed / seconds[name] / peak,
            }
        }
        for own, other in product(checks, seconds.keys() - checks):
            if name in (own, other):
                yield {
                    f"{own}, ratio to {other}": seconds[other] / seconds[own],
                    f"{own}, ratio to {other}, without the check": seconds[other] / (seconds[own] - checks[own]),
                }


def adapted(*, in_fp8: bool = False) -> Policy:
    """The policy of a job on the model, with a fresh adapter. `release` it when done. `in_fp8`: on its body in FP8."""
    if in_fp8:
        return wrapped(shapes.model_in_fp8(), {"compute_dtype": "fp8"})
    return wrapped(shapes.model(), {"quantization": "nf4"})


def wrapped(model: PreTrainedModel, settings: JsonObject) -> Policy:
    """The policy of a job with these `settings` on `model`, which has them already."""
    spec = JobSpec.model_validate({"model": "bench", "training_file": "x", "seed": 0, **settings}).resolved()
    base = Base("bench", None, None, shapes.folder())
    return wrap(model, shapes.tokenizer(), spec, base, None, Events(io.StringIO()))
