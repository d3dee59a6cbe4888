"""Unsloth's DPO at the lengths of HH, if it is installed. It changes transformers and TRL, so it comes last.

The figures of this engine for the same pairs are those of the part "hh".
"""

import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec

from app.spec.json_types import JsonObject
from bench.gpu import shapes
from bench.gpu.compare import WORKLOADS, trl_settings
from bench.gpu.shapes import MAX_LENGTH, measured
from bench.inputs import Pairs

MICRO = 4
"""Pairs that are computed at once, as in TRL's best options."""


def hh() -> Iterator[JsonObject]:
    """One epoch, after one batch that compiles."""
    if find_spec("unsloth") is None:
        yield {"installed": False}
        return
    unsloth = import_module("unsloth")
    with tempfile.TemporaryDirectory() as name:
        shapes.random_model().save_pretrained(name)  # it loads models from files only
        shapes.tokenizer().save_pretrained(name)
        model, _ = unsloth.FastLanguageModel.from_pretrained(name, max_seq_length=MAX_LENGTH, load_in_4bit=True)
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, bias="none", use_gradient_checkpointing=False,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )  # fmt: skip
    pairs, source = WORKLOADS["hh"].pairs()
    batch = WORKLOADS["hh"].batch
    _train(model, pairs[:batch], batch)
    run = _train(model, pairs, batch)
    yield {"source": source, "run": run, "pairs_per_second": len(pairs) / run["seconds"]}


def _train(model: object, pairs: Pairs, batch: int) -> dict[str, float]:
    """Seconds and memory of an epoch over `pairs`, with the reference computed once."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    with tempfile.TemporaryDirectory() as output:
        settings = trl_settings(output, batch, MICRO, 1) | {"precompute_ref_log_probs": True}
        trainer = DPOTrainer(
            model=model, args=DPOConfig(**settings), train_dataset=Dataset.from_list(pairs),
            processing_class=shapes.tokenizer(),
        )  # fmt: skip
        return measured(trainer.train)
