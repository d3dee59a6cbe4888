"""`python -m bench.entrants NAME FOLDER`: one entrant of `make bench`, in a process of its own.

It reads a line of JSON for each run: {"task": "dpo" or "sft", "epochs": n}. It answers with the seconds of the run and
the peak memory of the process, minus the memory after its imports.
"""

import json
import os
import resource
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
warnings.filterwarnings("ignore")

import torch
import transformers

from app.spec.json_types import JsonObject

if TYPE_CHECKING:
    from trl import DPOTrainer, SFTTrainer

THREADS, BATCH, MAX_LENGTH = 2, 8, 512
LORA = {"r": 16, "alpha": 32}


def ours(folder: Path, task: str, epochs: int) -> float:
    """Seconds of a whole run of this engine: loading, tokenising, reference pass, training, writing the artifact."""
    from worker.trainer.events import Events
    from worker.trainer.loop import train
    from worker.trainer.run import TrainingRun

    with tempfile.TemporaryDirectory() as name, Path(os.devnull).open("w") as sink:
        work = Path(name)
        (work / "base").symlink_to(folder / "model")
        (work / "data.jsonl").symlink_to(folder / "pairs.jsonl")
        settings = {"n_epochs": epochs, "batch_size": BATCH, "max_length": MAX_LENGTH, "learning_rate": 1e-4}
        settings["checkpoint_every"] = 10_000
        kind = "supervised" if task == "sft" else "dpo"
        spec = {
            "model": "bench",
            "training_file": "data.jsonl",
            "validation_split": 0.0,
            "quantization": "none",
            "seed": 0,
            "adapter": LORA,
            "method": {"type": kind, kind: {"hyperparameters": settings}},
        }
        (work / "spec.json").write_text(json.dumps(spec))
        (work / "run.json").write_text(
            json.dumps({"base_model": "bench", "revision": None, "version": None, "spec": spec})
        )
        began = time.monotonic()
        train(TrainingRun.of(work, Events(sink), threading.Event()))
        return time.monotonic() - began


def trl_trainer(folder: Path, output: str, task: str, epochs: int, options: JsonObject) -> "DPOTrainer | SFTTrainer":
    """TRL's trainer for the task. `options` override the settings that all of TRL's entrants share."""
    import trl
    from datasets import Dataset
    from peft import LoraConfig

    settings: JsonObject = {
        "output_dir": output,
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": epochs,
        "max_length": MAX_LENGTH,
        "learning_rate": 1e-4,
        "report_to": "none",
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    common: JsonObject = {
        "model": transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        "processing_class": transformers.AutoTokenizer.from_pretrained(folder / "model"),
        "peft_config": LoraConfig(
            r=LORA["r"], lora_alpha=LORA["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    }
    if options.get("train_sampling_strategy") == "sequential":
        rows.sort(key=length)
    if task == "dpo":
        return trl.DPOTrainer(args=trl.DPOConfig(**settings | options), train_dataset=Dataset.from_list(rows), **common)
    answers = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    return trl.SFTTrainer(args=trl.SFTConfig(**settings | options), train_dataset=Dataset.from_list(answers), **common)


def length(pair: dict[str, str]) -> int:
    """Number of words of the longer text: the prompt with its longer answer."""
    return len(pair["prompt"].split()) + max(len(pair[side].split()) for side in ("chosen", "rejected"))


def trl(**options: object) -> Callable[[Path, str, int], float]:
    """An entrant of TRL: the seconds of tokenising, reference pass and training. Loading the model does not count."""

    def run(folder: Path, task: str, epochs: int) -> float:
        with tempfile.TemporaryDirectory() as output:
            load = transformers.AutoModelForCausalLM.from_pretrained
            began = time.monotonic()
            load(folder / "model", dtype=torch.float32)
            loading = time.monotonic() - began
            began = time.monotonic()
            trl_trainer(folder, output, task, epochs, options).train()
            return time.monotonic() - began - loading

    return run


ENTRANTS: dict[str, Callable[[Path, str, int], float]] = {
    "dpo-service": ours,
    "TRL default": trl(),
    "TRL precomputed reference": trl(precompute_ref_log_probs=True),
    # Rows in order of length have the least padding. TRL's own `group_by_length` fails with its DPO data.
    "TRL best options": trl(
        precompute_ref_log_probs=True, gradient_checkpointing=False, train_sampling_strategy="sequential"
    ),
    # Two packed sequences have about as many tokens as a batch of this engine.
    "TRL packed": trl(packing=True, per_device_train_batch_size=2),
    "TRL packed, no checkpointing": trl(packing=True, per_device_train_batch_size=2, gradient_checkpointing=False),
}


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to standard output; it now goes to the log
    torch.set_num_threads(THREADS)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if name != "dpo-service":
        import datasets
        import trl  # noqa: F401

        datasets.disable_progress_bars()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for line in sys.stdin:
        run = json.loads(line)
        seconds = ENTRANTS[name](folder, run["task"], run["epochs"])
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        answers.write(json.dumps({"seconds": seconds, "peak_bytes": peak}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
