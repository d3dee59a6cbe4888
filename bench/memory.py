"""`python -m bench.memory [NUMBER …]`: compare the memory model of estimates with measured peaks of whole runs.

Each spec is a run of the real trainer in a process of its own, with a model made for it. On a CPU, the peak is the
process's largest resident set. On a GPU, it is the most memory that torch allocated, so the estimate leaves out its
`runtime`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from app.estimates.memory import MemorySettings, Shape, estimate
from app.spec.job import JobSpec
from app.spec.json_types import JsonObject
from bench.machine import describe_machine
from tests.helpers.tiny_model import make_tokenizer
from worker.base_models import describe
from worker.processes import answer_cache, trainer_environment
from worker.trainer.events import CacheWanted, Event, Metrics, TrainingDone, read

RESULT = Path(__file__).parent / "results" / "memory.json"
VOCABULARY, STEPS = 8192, 2


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Llama."""

    hidden: int
    intermediate: int
    heads: int
    pairs: int
    """Number of key-value heads."""
    layers: int


@dataclass(frozen=True)
class Spec:
    """A run. `words` is the length of a prompt and of each of its two answers. `batch` is the batch size in pairs."""

    sizes: Sizes
    adapter: JsonObject | str
    quantization: str
    words: int
    batch: int
    hyperparameters: JsonObject = field(default_factory=dict)


SMALL, MEDIUM = Sizes(512, 1376, 8, 8, 8), Sizes(768, 2048, 12, 12, 10)
WIDE, DEEP, GROUPED = Sizes(1024, 4096, 8, 8, 6), Sizes(384, 1024, 6, 6, 24), Sizes(1024, 2816, 16, 4, 8)
LORA, WIDE_LORA = {"r": 16}, {"r": 64}
ATTENTION = {"r": 16, "target_modules": ["q_proj", "v_proj"]}
RECOMPUTE = {"activation_checkpointing": True}
SPECS = [
    Spec(SMALL, LORA, "none", 30, 8),
    Spec(SMALL, LORA, "nf4", 30, 8),
    Spec(SMALL, LORA, "int8", 30, 8),
    Spec(SMALL, WIDE_LORA, "none", 30, 8),
    Spec(SMALL, ATTENTION, "none", 30, 8),
    Spec(SMALL, LORA, "none", 30, 8, RECOMPUTE),
    Spec(SMALL, "none", "none", 30, 8),
    Spec(SMALL, "none", "none", 30, 8, RECOMPUTE),
    Spec(SMALL, LORA, "none", 30, 2),
    Spec(MEDIUM, LORA, "none", 30, 8),
    Spec(MEDIUM, LORA, "nf4", 30, 8),
    Spec(MEDIUM, LORA, "none", 30, 8, RECOMPUTE),
    Spec(MEDIUM, LORA, "none", 15, 4),
    Spec(MEDIUM, "none", "none", 15, 4),
    Spec(MEDIUM, "none", "none", 15, 4, {"optimizer": "rmsprop"}),
    Spec(WIDE, LORA, "none", 30, 4),
    Spec(WIDE, LORA, "nf4", 30, 4),
    Spec(WIDE, WIDE_LORA, "none", 15, 4),
    Spec(DEEP, LORA, "none", 30, 4),
    Spec(DEEP, LORA, "nf4", 30, 4, RECOMPUTE),
    Spec(GROUPED, LORA, "none", 30, 4),
    Spec(GROUPED, LORA, "nf4", 15, 8),
]


def make_model(folder: Path, sizes: Sizes) -> None:
    """Write a Llama with random weights, and its tokenizer."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.pairs,
        num_hidden_layers=sizes.layers,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(spec: Spec) -> JsonObject:
    """Run a spec. Returns the measured and the expected figures."""
    with tempfile.TemporaryDirectory(prefix="dpo-memory-") as name:
        folder = Path(name)
        make_model(folder / "base", spec.sizes)
        texts = ["cat " * spec.words, "dog " * spec.words, "sun " * spec.words]
        rows = [
            dict(zip(("prompt", "chosen", "rejected"), (f"{k} {texts[0]}", *texts[1:]), strict=True)) for k in range(32)
        ]
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        hyperparameters = {"batch_size": spec.batch, "max_steps": STEPS, "max_length": 1024} | spec.hyperparameters
        body = {
            "model": "made",
            "training_file": "train.jsonl",
            "adapter": spec.adapter,
            "quantization": spec.quantization,
            "seed": 0,
            "validation_split": 0.0,
            "method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
        }
        job = JobSpec.model_validate(body).resolved()
        (folder / "spec.json").write_text(job.model_dump_json())
        run = {"base_model": "made", "revision": None, "version": None, "spec": body}
        (folder / "run.json").write_text(json.dumps(run))
        events = _run(folder)
        peak = max(event.metrics.get("peak_memory_bytes", 0) for event in events if isinstance(event, Metrics))
        tokens = next(event for event in events if isinstance(event, TrainingDone)).trained_tokens / STEPS
        shape = Shape.of(describe("made", folder / "base").details)
    assert shape is not None
    return compared(spec, shape, job, peak, tokens)


def compared(spec: Spec, shape: Shape, job: JobSpec, peak: float, tokens: float) -> JsonObject:
    """The figures of a spec. `peak` is in bytes, and a batch had `tokens` tokens."""
    cuda = torch.cuda.is_available()
    settings = MemorySettings.of(job, job.method.hyperparameters, tokens / spec.batch, round(tokens / spec.batch))
    memory = estimate(shape, settings, "cuda" if cuda else "cpu", None)
    expected = memory.total - (memory.runtime if cuda else 0)
    return {
        **asdict(spec),
        "shape": asdict(shape),
        "job": job.model_dump(mode="json"),
        "batch_tokens": tokens,
        "measured": peak,
        "expected": expected,
        "ratio": round(expected / peak, 3),
        "parts": {name: value for name, value in vars(memory).items() if name != "recompute"},
    }


def _run(folder: Path) -> list[Event]:
    """The events of a run of the trainer. Its standard input stays open, because the trainer ends when it closes."""
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "worker.trainer", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=trainer_environment() | {"OMP_NUM_THREADS": "2"},
        )
    assert process.stdin is not None
    assert process.stdout is not None
    events = []
    for line in process.stdout:
        events.append(read(line))
        if isinstance(events[-1], CacheWanted):
            answer_cache(process.stdin, events[-1].key)
    if process.wait() != 0:
        raise RuntimeError((folder / "log").read_text()[-2000:] + str(events[-1:]))
    return events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, help="the specs to measure; all of them if none is named")
    numbers = parser.parse_args().numbers or range(len(SPECS))
    results = []
    for number in numbers:
        result = measure(SPECS[number])
        results.append(result)
        megabytes = {name: round(value / 1e6) for name, value in result["parts"].items()}
        print(f"{number:2} measured {result['measured'] / 1e6:7.0f} MB, expected {result['expected'] / 1e6:7.0f} MB, "
              f"ratio {result['ratio']:.3f}  {megabytes}", flush=True)  # fmt: skip
    worst = max(results, key=lambda result: abs(result["ratio"] - 1))
    print(f"{len(results)} specs, worst ratio {worst['ratio']}")
    if len(results) == len(SPECS):
        RESULT.write_text(json.dumps({"machine": describe_machine(), "specs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
