"""`python -m bench.gpu`: this engine beside TRL on a CUDA card, in one run of less than ten minutes.

The model has the shape of Llama 3.1 8B. Its random weights are quantised to NF4 on the card. It trains in bfloat16 with
LoRA of rank 16 on all linear layers. The rows have the lengths of HH and of UltraFeedback.

- Wall time includes tokenising and the reference pass, for 1 and 3 epochs.
- MFU is the needed FLOP/s over those of a large bfloat16 product on this card. Each weight that a token passes needs 4
  FLOPs. The head counts at scored positions only.
- Activation memory is the peak minus the memory of the model and its adapter.

`--tiny` runs a small model on any device, as a test of this program.
"""

import argparse
import gc
import io
import json
import os
import platform
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
warnings.filterwarnings("ignore")

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from app.spec.hyperparameters import DPOHyperparameters
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from bench.entrants import length
from bench.inputs import (
    HH,
    ULTRAFEEDBACK,
    VOCABULARY,
    Arithmetic,
    Lengths,
    Pairs,
    lengths_of,
    make_pairs,
    make_tokenizer,
)
from worker.trainer import loop, stage_run
from worker.trainer.averages import Averages
from worker.trainer.checkpoint import State
from worker.trainer.data import Response, Row
from worker.trainer.dataset import Rows
from worker.trainer.errors import UserError
from worker.trainer.events import Events, Metrics, read
from worker.trainer.launcher import Launcher
from worker.trainer.loading import wrap
from worker.trainer.methods.method import Method
from worker.trainer.methods.preference import Preference
from worker.trainer.model import Base, Policy
from worker.trainer.reference import References, compute
from worker.trainer.run import TrainingRun
from worker.trainer.throughput import layer_weights, needed_flops, peak_flops

RUNS = 3
"""Runs of each entrant over one epoch. Three epochs run once."""
MAX_LENGTH = 4096
LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
}
WORKLOADS: dict[str, tuple[Path, Lengths, int, int]] = {
    # file of real lengths, medians of synthetic lengths in tokens (words × 1.35), pairs, batch size
    "HH": (HH, (95, 43, 32), 64, 32),
    "UltraFeedback": (ULTRAFEEDBACK, (77, 205, 180), 32, 16),
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
console = Console(soft_wrap=True, width=150)


def make_model(shape: JsonObject) -> PreTrainedModel:
    """A Llama with random weights: in NF4 on the card, unquantised on a CPU."""
    torch.manual_seed(0)
    config = LlamaConfig(**shape, bos_token_id=0, eos_token_id=1, pad_token_id=None)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    with torch.device(DEVICE):
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    if DEVICE.type == "cuda":
        _quantise(model)
    return model.requires_grad_(False)


def _quantise(model: PreTrainedModel) -> None:
    """Replace the linear layers of the body by NF4 layers, one at a time."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import BitsAndBytesConfig

    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                quantised = Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=torch.bfloat16,
                    compress_statistics=True, quant_type="nf4", device="meta",
                )  # fmt: skip
                data = child.weight.data.to("cpu")
                weight = Params4bit(data, requires_grad=False, compress_statistics=True, quant_type="nf4")
                quantised.weight = weight.cuda()
                setattr(module, name, quantised)
    model.is_loaded_in_4bit = True  # `is_quantized` would mean transformers' own quantiser
    model.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    gc.collect()
    torch.cuda.empty_cache()


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def allocated() -> int:
    """Bytes that torch has allocated on the card now; 0 on a CPU."""
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def peak() -> int:
    """The most bytes that torch has allocated since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else 0


def measured(run: Callable[[], None]) -> dict[str, float]:
    """The `seconds` of `run`, and its peak memory minus the memory before it, as `activation_bytes`."""
    gc.collect()
    before = allocated()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    began = time.perf_counter()
    run()
    synchronize()
    return {"seconds": time.perf_counter() - began, "activation_bytes": float(peak() - before)}


def ours(
    model: PreTrainedModel, folder: Path, pairs: Pairs, batch: int, epochs: int, recompute: bool | None
) -> dict[str, float]:
    """This engine's own loop, over the model on the card. The artifact does not count.

    `recompute`: whether activations are recomputed; None lets the engine decide.
    """
    settings = {
        "n_epochs": epochs,
        "batch_size": batch,
        "max_length": MAX_LENGTH,
        "learning_rate": 1e-5,
        "checkpoint_every": 10_000,
    }
    if recompute is not None:
        settings["activation_checkpointing"] = recompute
    spec = {
        "model": "bench",
        "training_file": "pairs.jsonl",
        "validation_split": 0.0,
        "seed": 0,
        "quantization": "nf4" if DEVICE.type == "cuda" else "none",
        "method": {"type": "dpo", "dpo": {"hyperparameters": settings}},
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
        policy = wrap(model, AutoTokenizer.from_pretrained(folder), run.spec, run.base, None, run.events)

        def train() -> None:
            (stage,) = loop.stages_of(run)
            running = stage_run.begin(run, stage, policy, State(stage.name), stage.steps)
            running.saved_step = stage.steps  # no checkpoint at the end
            loop.run_stage(running)

        try:
            figures = measured(train)
        finally:
            release(policy)
        events = map(read, stream.getvalue().splitlines())
        mfu = [event.metrics["mfu"] for event in events if isinstance(event, Metrics) and "mfu" in event.metrics]
        figures["mfu"] = statistics.median(mfu)
        return figures


def release(policy: Policy) -> None:
    """Take the adapter off the model again, and restore its attention."""
    policy.causal.set_attn_implementation(policy.own_attention)
    policy.recompute_activations(False)
    policy.model.unload()


def trl(
    model: PreTrainedModel, folder: Path, pairs: Pairs, batch: int, epochs: int, **options: object
) -> dict[str, float]:
    """TRL's DPOTrainer over the same model."""
    import trl as library
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from peft import LoraConfig

    disable_progress_bar()
    with tempfile.TemporaryDirectory() as output:
        settings: JsonObject = {
            "output_dir": output,
            "bf16": DEVICE.type == "cuda",
            "use_cpu": DEVICE.type == "cpu",
            "per_device_train_batch_size": batch,
            "num_train_epochs": epochs,
            "max_length": MAX_LENGTH,
            "learning_rate": 1e-5,
            "report_to": "none",
            "logging_strategy": "no",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        trainers: list[library.DPOTrainer] = []
        rows = sorted(pairs, key=length) if options.get("train_sampling_strategy") == "sequential" else pairs

        def run() -> None:
            trainers.append(
                library.DPOTrainer(
                    model=model,
                    args=library.DPOConfig(**settings | options),
                    train_dataset=Dataset.from_list(rows),
                    processing_class=AutoTokenizer.from_pretrained(folder),
                    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
                )
            )
            trainers[0].train()

        try:
            return measured(run)
        finally:
            model.activation_checkpointing_disable()
            if trainers:
                trainers[0].model.unload()
            model.requires_grad_(False)


ENTRANTS: dict[str, Callable[..., dict[str, float]]] = {
    "dpo-service": partial(ours, recompute=None),
    "TRL default": trl,
    "TRL best options": partial(
        trl, precompute_ref_log_probs=True, gradient_checkpointing=False, train_sampling_strategy="sequential"
    ),
    "dpo-service, recomputing": partial(ours, recompute=True),
    "TRL precomputed reference": partial(trl, precompute_ref_log_probs=True),
}
SCHEMES = {
    "TRL default": {"reference_each_step": True, "recompute": True},
    "TRL precomputed reference": {"reference_each_step": False, "recompute": True},
    "TRL best options": {"reference_each_step": False, "recompute": False},
}


def compare(model: PreTrainedModel, folder: Path, deadline: float, peers: bool, tiny: bool) -> JsonObject:
    """Every entrant on every workload, first each once, then again until the deadline.

    `peers`: whether TRL is installed and takes part.
    """
    record: JsonObject = {}
    layers, head = layer_weights(model), model.get_output_embeddings().weight.numel()
    for workload, (file, medians, count, batch) in WORKLOADS.items():
        count, batch = (count // 8, batch // 8) if tiny else (count, batch)
        lengths, source = lengths_of(file, count, medians)
        pairs = make_pairs(lengths, MAX_LENGTH)
        arithmetic = Arithmetic.of(pairs, layers, head)
        for epochs in (1, 3):
            measurements: dict[str, list[dict[str, float]]] = {}
            names = [name for name in ENTRANTS if peers or name.startswith("dpo-service")]
            ENTRANTS["dpo-service"](model, folder, pairs, batch, 1)  # kernels compile once
            for turn in range(RUNS if epochs == 1 else 1):
                for name in names:
                    if turn == 0 or time.monotonic() < deadline:
                        try:
                            run = ENTRANTS[name](model, folder, pairs, batch, epochs)
                        except (torch.OutOfMemoryError, UserError):
                            console.print(f"{name}: out of memory on {workload}")
                            continue
                        measurements.setdefault(name, []).append(run)
            bounds = {name: arithmetic.bound(epochs, **scheme) for name, scheme in SCHEMES.items()}
            title = f"{workload}, {epochs} epochs, {count} pairs ({source}), batch {batch}"
            if "dpo-service" not in measurements:
                continue
            show(title, measurements, epochs * count, epochs * arithmetic.shared, bounds)
            record[f"{workload}, {epochs} epochs"] = {"source": source, "runs": measurements, "bounds": bounds}
    return record


def show(
    title: str, measurements: dict[str, list[dict[str, float]]], pairs: int, tokens: int, bounds: dict[str, float]
) -> None:
    """Print a row for each entrant. A run covers `pairs` and `tokens`; `bounds` are the ratios by FLOPs alone."""
    columns = ("engine", "pairs/s", "spread", "tokens/s", "activations", "MFU", "dpo-service is", "by FLOPs alone")
    table = Table(*columns, title=title, title_justify="left")
    fastest = statistics.median(run["seconds"] for run in measurements["dpo-service"])
    for name, runs in measurements.items():
        seconds = sorted(run["seconds"] for run in runs)
        median = statistics.median(seconds)
        table.add_row(
            name,
            f"{pairs / median:.2f}",
            f"{pairs / seconds[-1]:.2f} to {pairs / seconds[0]:.2f} ({len(runs)} runs)",
            f"{tokens / median:,.0f}",
            f"{max(run['activation_bytes'] for run in runs) / 2**30:.1f} GiB",
            f"{runs[0]['mfu']:.1%}" if "mfu" in runs[0] else "",
            f"{median / fastest:.2f} × as fast",
            f"{bounds[name]:.1f} ×" if name in bounds else "",
        )
    console.print(table)


def scaling(model: PreTrainedModel, folder: Path, tiny: bool, deadline: float) -> list[dict[str, float]]:
    """Training steps of this engine alone, for several lengths and pack sizes in tokens."""
    spec_of = {"model": "bench", "training_file": "x", "seed": 0, "quantization": "none"}
    policy = wrap(
        model, AutoTokenizer.from_pretrained(folder), JobSpec.model_validate(spec_of).resolved(),
        Base("bench", None, None, folder), None, Events(io.StringIO()),
    )  # fmt: skip
    table = Table("prompt", "response", "pack", "pairs", "tokens/s", "MFU", "activations", title="Scaling")
    record = []
    for prompt, response in ((64, 32), (128, 64)) if tiny else ((256, 128), (1024, 256), (4096, 512), (128, 1024)):
        for budget in (512, 1024) if tiny else (4096, 8192, 16_384, 32_768):
            size = prompt + 2 * response
            if size > budget or time.monotonic() > deadline:
                continue
            count = max(1, 2 * budget // size)
            rows = Rows.of(_row(number, prompt, response) for number in range(count))
            policy.packing = replace(policy.packing, budget=budget)
            try:
                entry = _step(policy, rows, DPOHyperparameters().resolved(full=False))
            except torch.OutOfMemoryError:
                table.add_row(str(prompt), str(response), str(budget), str(count), "out of memory")
                continue
            entry |= {"prompt": prompt, "response": response, "budget": budget, "pairs": count}
            record.append(entry)
            table.add_row(
                str(prompt), str(response), str(budget), str(count), f"{entry['tokens_per_second']:,.0f}",
                f"{entry['mfu']:.1%}", f"{entry['activation_bytes'] / 2**30:.1f} GiB",
            )  # fmt: skip
    console.print(table)
    release(policy)
    return record


def _row(number: int, prompt: int, response: int) -> Row:
    """A pair of random tokens: `prompt` and `response` are lengths. Its `number` is the seed."""
    generator = torch.Generator().manual_seed(number)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(2, VOCABULARY, (length,), generator=generator).tolist())

    answers = tuple(Response(ids(response), (True,) * response) for _ in range(2))
    return Row(number, ids(prompt), answers)


def _step(policy: Policy, rows: Rows, settings: DPOHyperparameters) -> dict[str, float]:
    """The figures of one gradient over `rows`: the median time of three, after one that compiles."""
    launcher = Launcher(policy)
    no_references = compute(launcher, rows[:0])
    method = Preference(launcher, settings, rows, rows[:0])
    method.references = References(compute(launcher, rows), no_references)
    runs = []
    for _ in range(4):
        averages = Averages()
        runs.append(measured(lambda: _gradient(method, len(rows), averages)))  # noqa: B023
    seconds = statistics.median(run["seconds"] for run in runs[1:])
    tokens = sum(row.tokens for row in rows)
    scored = sum(len(response.ids) for row in rows for response in row.responses)
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": needed_flops(policy, layer_weights(policy.causal), tokens, scored) / seconds / peak_flops(policy.device),
        "activation_bytes": max(run["activation_bytes"] for run in runs),
    }


def _gradient(method: Method, count: int, averages: Averages) -> None:
    rows = list(range(count))
    method.gradient(rows, averages)
    for parameter in method.policy.trainable().values():
        parameter.grad = None


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tiny", action="store_true", help="a small model on any device, as a test of this program")
    parser.add_argument("--minutes", type=float, default=8.0, help="after this time, nothing is measured again")
    arguments = parser.parse_args()
    if DEVICE.type == "cpu" and not arguments.tiny:
        raise SystemExit("There is no CUDA card here. `python -m bench.gpu --tiny` tries the benchmark on the CPU.")
    deadline = time.monotonic() + 60 * arguments.minutes
    transformers.utils.logging.set_verbosity_error()
    packages = ("torch", "transformers", "peft", "bitsandbytes", "trl", "unsloth", "triton")
    device_name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine()
    machine: JsonObject = {"device": device_name} | {package: installed(package) for package in packages}
    machine["peak_tflops"] = peak_flops(DEVICE) / 1e12
    console.print(machine)
    for peer in ("trl", "unsloth"):
        if machine[peer] is None:
            console.print(f"not measured: {peer} is not installed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tokenizer(folder)
        model = make_model(TINY if arguments.tiny else LLAMA_8B)
        model.config.save_pretrained(folder)
        record: JsonObject = {"machine": machine, "tiny": arguments.tiny, "weights_bytes": allocated()}
        record["scaling"] = scaling(model, folder, arguments.tiny, deadline - 60 * arguments.minutes * 0.7)
        record |= compare(model, folder, deadline, machine["trl"] is not None, arguments.tiny)
    if not arguments.tiny:
        results = Path(__file__).parent / "results"
        results.mkdir(exist_ok=True)
        (results / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"written to {results / 'gpu.json'}")


if __name__ == "__main__":
    main()
