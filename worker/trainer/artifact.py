"""The artifact of a run: weights, tokenizer, model card, metrics and spec, in a folder that other programs can load."""

import csv
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from app.spec.job import Adapter, JobSpec
from app.spec.json_types import JsonObject
from worker.model_files import config_of, prequantized, weight_files
from worker.trainer import fp8, reward
from worker.trainer.loading import load_policy
from worker.trainer.memory import fits_as_float32
from worker.trainer.methods.method import ValidatedRow
from worker.trainer.model import Base, Policy
from worker.trainer.naming import write_for_servers
from worker.trainer.plan import Stage
from worker.trainer.run import TrainingRun

DRIFT_ROWS = 32
"""Number of validation rows on which the drift on the unquantised base is measured."""
RESULT_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")
"""Columns of `result.csv`."""


@dataclass(frozen=True)
class Results:
    """A finished run. `validation` has the rows of the last stage, scored with the kept weights."""

    run: TrainingRun
    history: list[JsonObject]
    stage: Stage
    validation: list[ValidatedRow]
    final: dict[str, float] = field(default_factory=dict)
    """Validation metrics of the kept weights; empty if these are the weights of the last step."""

    @property
    def spec(self) -> JobSpec:
        return self.run.spec

    @property
    def public_spec(self) -> JsonObject:
        """The job's spec as its user wrote it."""
        spec: JsonObject = self.run.about["spec"]
        return spec

    @property
    def base(self) -> Base:
        return self.run.base


def write(folder: Path, policy: Policy, results: Results, weights: dict[str, Tensor] | None = None) -> None:
    """Write the artifact of `policy` into `folder`. Frees the policy's model on the way.

    `weights`: those of a divided model, gathered in the base's own precision.
    """
    held = "fp8" if fp8.is_used(policy.causal) else results.spec.quantization or "none"
    # 1. The weights and the tokenizer.
    if policy.reward_head is not None:
        reward.save(folder, policy, results.base, results.stage.train, weights)
    else:
        if policy.full and weights is None:
            policy.model.to(dtype_of(results.base.folder))  # the base's own precision; training was in float32
        policy.save(folder, weights)
        # From a base that also takes images or sound, possibly only the text part was loaded. Its names differ then.
        if not policy.full and policy.causal.config.model_type != config_of(results.base.folder)["model_type"]:
            write_for_servers(results.base.folder, folder)
    # 2. The metrics and the spec.
    _write_csv(folder / "metrics.csv", _columns(results.history), results.history)
    accuracies = {stage.name: stage.settings.ACCURACY for stage in results.spec.stages()}
    _write_csv(folder.parent / "result.csv", list(RESULT_COLUMNS), _result_rows(results.history, accuracies))
    (folder / "spec.json").write_text(json.dumps(results.public_spec, indent=2, sort_keys=True) + "\n")
    # 3. One line for each validation row: its place in the data, and the log-probs [K] (or rewards) of its responses.
    with (folder / "validation_logps.jsonl").open("w") as file:
        validation = results.stage.validation
        places, files = list(zip(validation.files, validation.lines, strict=True)), training_files(results.public_spec)
        names_files = len(files) > 1 and results.public_spec["validation_file"] is None
        for number, logps, reference, answers in sorted(
            results.validation, key=lambda entry: (places[entry.number], entry.number)
        ):
            reference_logps = None if reference is None else reference.tolist()
            values = {"logps": logps.tolist(), "reference_logps": reference_logps}
            if policy.reward_head is not None:
                values = {"rewards": logps.tolist()}
            if answers:
                values["answers"] = [{"text": answer.text, "reward": answer.reward} for answer in answers]
            source, line = places[number]
            place = {"file": files[source]} if names_files else {}
            file.write(json.dumps(place | {"line": line} | values) + "\n")
    # 4. The model card.
    kind = "reward" if policy.reward_head is not None else "full" if policy.full else "adapter"
    drift = _drift(folder, policy, results, held) + (_mean(folder) if kind == "reward" else "")
    (folder / "README.md").write_text(_card(results, kind, f"{held}. {drift}"))


def training_files(spec: JsonObject) -> list[str]:
    """The training files of a job, in order. `spec` is the job as its user wrote it."""
    return [spec["training_file"], *(spec.get("more_training_files") or [])]


DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""torch's names of the precisions of safetensors files."""


def dtype_of(base: Path) -> torch.dtype:
    """The most frequent precision among the stored weights of the model in `base`."""
    counts: Counter[str] = Counter()
    for path in weight_files(base):
        with safe_open(path, framework="pt") as file:
            counts.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118 - not a dict
    return next((DTYPES[name] for name, _ in counts.most_common() if name in DTYPES), torch.float32)


def _columns(history: list[JsonObject]) -> list[str]:
    """The columns of `metrics.csv`: step, stage, then all metrics by name."""
    names = {name for entry in history for name in entry} - {"step", "stage"}
    return ["step", "stage", *sorted(names)]


def _write_csv(path: Path, columns: list[str], rows: list[JsonObject]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _result_rows(history: list[JsonObject], accuracies: dict[str, str]) -> list[JsonObject]:
    """The rows of `result.csv`. `accuracies` maps each stage to the name of its accuracy metric."""
    rows = []
    for entry in history:
        accuracy = accuracies[entry["stage"]]
        values = (
            entry["step"],
            entry.get("loss"),
            entry.get(accuracy),
            entry.get("eval/loss"),
            entry.get(f"eval/{accuracy}"),
        )
        rows.append(dict(zip(RESULT_COLUMNS, values, strict=True)))
    return rows


def _drift(folder: Path, policy: Policy, results: Results, held: str) -> str:
    """A sentence for the model card: how far the log-probs move when the adapter is put on the unquantised base.

    The figure is the mean of |Δ log-prob of a response| per target token, in nats. For preferences, it also says how
    many rows have their answers in the same order. `held`: how the base was held.
    """
    if held == "none":
        return "The base was not quantised."
    if policy.reward_head is not None:
        return "The adapter was merged into the unquantised base; its rewards differ slightly from those in training."
    method = prequantized(config_of(results.base.folder))
    if method is not None:
        return f"It is the base's own ({method}): use the adapter with exactly these weights."
    if policy.shards:
        return "Not measured: the base was sharded."
    chosen = results.validation[:DRIFT_ROWS]
    if not chosen:
        return "Not measured: the job had no validation rows."
    if chosen[0].answers:
        return "Not measured: the model wrote the answers itself."
    name, device, shared = policy.name, policy.device, policy.shared
    one_by_one, own_logits = policy.one_by_one, policy.own_logits
    if device.type == "cpu" and not fits_as_float32(results.base.folder):
        return f"Not measured: the unquantised '{name}' does not fit into the worker's memory."
    policy.free_model()  # makes room for the unquantised base
    changes = {"quantization": "none"} | ({"compute_dtype": None} if held == "fp8" else {})
    plain = results.spec.model_copy(update=changes)
    rows = [results.stage.validation[row.number] for row in chosen]
    total, tokens, alike = 0.0, 0, 0  # Σ |Δ log-prob| in nats, target tokens, rows with the same order
    try:
        unquantised = load_policy(plain, results.base, folder, results.run.events, trainable=False)
        unquantised.shared, unquantised.one_by_one, unquantised.own_logits = shared, one_by_one, own_logits
        with torch.no_grad():
            for number, logps in enumerate(row.logps for row in chosen):
                (pack,) = unquantised.packs(rows, [number], merge=False)
                unquantised_logps = unquantised.score(pack).responses.cpu()
                total += (unquantised_logps - logps).abs().sum().item()
                alike += torch.equal(unquantised_logps.argsort(), logps.argsort())
                tokens += len(pack.targets)
    except Exception as error:  # the job is done: a missing figure must not fail it
        return f"Not measured: {type(error).__name__} with the unquantised '{name}'."
    order = f" The answers of {alike} rows have the same order by log-prob." if len(rows[0].responses) > 1 else ""
    return (
        f"On the unquantised base the adapter's log-probs differ by {total / tokens:.4f} nats a token on average "
        f"({len(rows)} validation rows, {tokens} tokens).{order} To compare adapters, quantise the base as here."
    )


def _mean(folder: Path) -> str:
    """A sentence for the model card: the mean reward, and over how many answers it was taken."""
    config = json.loads((folder / "config.json").read_text())
    return (
        f" r − reward_mean ({config['reward_mean']:.6g}) has mean 0 over {config['reward_mean_answers']} answers of "
        "the training rows."
    )


def _card(results: Results, kind: str, quantisation: str) -> str:
    """The text of the model card, `README.md`. `quantisation`: how the base was held, and how much that changes."""
    spec, base = results.spec, results.base
    last: JsonObject = {}
    for entry in results.history:
        last |= entry if entry["stage"] == results.stage.name else {}
    last |= results.final
    metrics = "\n".join(f"| {name} | {value:.6g} |" for name, value in sorted(last.items()) if isinstance(value, float))
    adapter = "none: all parameters were trained"
    if isinstance(spec.adapter, Adapter):
        adapter = ", ".join(f"{name} {value}" for name, value in spec.adapter.model_dump().items())
    settings = "\n".join(
        f"| {name} | {value} |"
        for name, value in results.stage.hyperparameters.model_dump().items()
        if value is not None
    )
    rows, validation_rows = len(results.stage.train), len(results.validation)
    data = f"{', '.join(training_files(results.public_spec))}, {rows} rows; {validation_rows} validation rows"
    data += "".join(f". {note.rstrip('.')}" for note in results.stage.notes)
    if results.stage.repeated:
        data += f". {results.stage.repeated} of the validation rows ask the same as a training row"
    library = "peft" if kind == "adapter" else "transformers"
    front = f"base_model: {base.name}\nlibrary_name: {library}\ntags: [dpo-service, {results.stage.name}]"
    stage = results.stage.name
    method = "reward model" if kind == "reward" else stage if stage == "reinforcement" else stage.upper()
    return f"""---
{front}
---

# {spec.suffix or base.name}: {f"SFT, then {method}" if spec.sft else method} by dpo-service

- **Base model**: {base.name}, revision {base.revision or base.version or "unknown"}, started from {spec.model}
- **Data**: {data}
- **Adapter**: {adapter}
- **Quantisation of the base in training**: {quantisation}
- **Seed**: {spec.seed}
- **Licence**: the base model's licence and the terms of the data apply to this model too; dpo-service adds none.

| hyperparameter ({results.stage.name}) | value |
|---|---|
{settings}

| metric at the end | value |
|---|---|
{metrics}

`metrics.csv` has every step, `spec.json` the whole job, `validation_logps.jsonl` the log-probs of each validation row.
"""
