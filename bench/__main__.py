"""`make bench`: DPO on the CPU, this engine beside TRL's DPOTrainer, same model, rows and batches, two threads.

The rows have the lengths of Anthropic HH: from `DPO_SHARED` where it is there, else drawn from a log-normal
distribution with HH's medians, which the table says. Each figure is the median of `RUNS` runs, taken in turn, so
that what else the machine does falls on both. The reference pass is counted.
"""

import json
import os
import platform
import random
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
warnings.filterwarnings("ignore")

import torch
import transformers
import trl
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.datasets.check import Report, examples
from app.datasets.example import Example
from worker.trainer.data import plain_prompt
from worker.trainer.events import Events
from worker.trainer.loop import Trainer

THREADS, PAIRS, BATCH, MAX_LENGTH, RUNS = 2, 16, 8, 512, 3
VOCABULARY = 32_000
Pairs = list[dict[str, str]]


def hh_pairs(count: int) -> tuple[Pairs, str]:
    """`count` pairs as rows of word numbers with HH's lengths, and where the lengths are from."""
    shared = Path(os.environ.get("DPO_SHARED", "../shared")) / "data/preference/hh-rlhf/helpful-base.test.jsonl.gz"
    generator = random.Random(0)
    if shared.exists():
        with shared.open("rb") as file:
            found = list(examples(file, Report()))
        lengths = [_words(example) for example in generator.sample(found, count)]
        source = "Anthropic HH helpful-base test"
    else:
        draw = generator.lognormvariate
        lengths = [(int(draw(4.6, 0.8)) + 1, int(draw(4.0, 0.8)) + 1, int(draw(4.0, 0.8)) + 1) for _ in range(count)]
        source = "log-normal, medians 100 / 55 / 55 words"

    def text(words: int) -> str:
        return " ".join(f"w{generator.randrange(VOCABULARY - 10)}" for _ in range(min(words, MAX_LENGTH // 2 - 1)))

    rows = [{"prompt": text(p), "chosen": " " + text(c), "rejected": " " + text(r)} for p, c, r in lengths]
    return rows, source


def _words(example: Example) -> tuple[int, int, int]:
    chosen, rejected = example.responses
    prompt = plain_prompt(example.prompt)
    return len(prompt.split()), max(1, len(chosen.split())), max(1, len(rejected.split()))


def make_model(folder: Path) -> int:
    """A Llama of about 20 million parameters with a vocabulary of 32,000; returns its parameters."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(VOCABULARY - 3)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def ours(model: Path, pairs: Pairs, epochs: int) -> float:
    """Seconds of a whole run of this engine: loading, tokenising, reference pass, training, writing the artifact."""
    with tempfile.TemporaryDirectory() as name, Path(os.devnull).open("w") as sink:
        folder = Path(name)
        (folder / "base").symlink_to(model)
        (folder / "data.jsonl").write_text("\n".join(map(json.dumps, pairs)))
        settings = {"n_epochs": epochs, "batch_size": BATCH, "max_length": MAX_LENGTH, "learning_rate": 1e-4}
        spec = {
            "model": "bench",
            "training_file": "data.jsonl",
            "validation_split": 0.0,
            "quantization": "none",
            "seed": 0,
            "method": {"type": "dpo", "dpo": {"hyperparameters": settings | {"checkpoint_every": 10_000}}},
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        (folder / "run.json").write_text(
            json.dumps({"base_model": "bench", "revision": None, "version": None, "spec": spec})
        )
        began = time.monotonic()
        Trainer(folder, Events(sink), threading.Event()).run()
        return time.monotonic() - began


def peer(model: Path, pairs: Pairs, epochs: int, **options: Any) -> float:
    """Seconds of TRL on the same rows: tokenising, reference pass, training. Loading is not counted."""
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            "output_dir": folder,
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
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model)
        began = time.monotonic()
        trainer = trl.DPOTrainer(
            model=policy,
            args=trl.DPOConfig(**settings | options),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        trainer.train()
        return time.monotonic() - began


def main() -> None:
    torch.set_num_threads(THREADS)
    disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    pairs, source = hh_pairs(PAIRS)
    console = Console(soft_wrap=True)
    with tempfile.TemporaryDirectory() as name:
        model = Path(name)
        parameters = make_model(model)
        entrants: dict[str, Callable[[int], float]] = {
            "dpo-service": lambda epochs: ours(model, pairs, epochs),
            "TRL default": lambda epochs: peer(model, pairs, epochs),
            "TRL precomputed reference": lambda epochs: peer(model, pairs, epochs, precompute_ref_log_probs=True),
        }
        seconds: dict[str, list[float]] = {entrant: [] for entrant in entrants}
        for _ in range(RUNS):
            for entrant, run in entrants.items():
                seconds[entrant].append(run(1))
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "torch": torch.__version__,
        "trl": trl.__version__,
    }
    title = f"DPO, 1 epoch, {PAIRS} pairs ({source}), batch {BATCH}, {parameters / 1e6:.1f} M parameters, fp32, LoRA 16"
    table = Table("engine", "pairs/s (median)", "spread", "dpo-service is", title=title, title_justify="left")
    fastest = statistics.median(seconds["dpo-service"])
    for entrant, values in seconds.items():
        median = statistics.median(values)
        spread = f"{PAIRS / max(values):.3f} to {PAIRS / min(values):.3f}"
        table.add_row(entrant, f"{PAIRS / median:.3f}", spread, f"{median / fastest:.1f} × as fast")
    console.print(table)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    record = {"title": title, "machine": machine, "seconds": seconds}
    (results / "cpu.json").write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"{machine}\nwritten to {results / 'cpu.json'}", highlight=False)


if __name__ == "__main__":
    main()
