"""`python -m bench.activations [--keep FILE]`: bytes that a layer keeps for its backward pass, a token.

The layers have the sizes of Llama 3.1 8B, in NF4, with an adapter of rank 16 on all of them, in bfloat16. Autograd says
which tensors it keeps, so the bytes are those on any device. A layer's share is the difference between two layers and
one. Nothing is timed, and the model has random weights.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention import flex_attention as flex
from transformers import LlamaConfig, LlamaForCausalLM

from app.spec.json_types import JsonObject
from bench.gpu.roofline import HIDDEN, KEYS, LAYERS, RANK, WIDE
from bench.machine import describe_machine
from tests.helpers.tiny_model import make_tiny_model
from tests.helpers.trainer import load, make_row
from worker.trainer import attention, hardware
from worker.trainer.memory import activation_bytes
from worker.trainer.model import Policy

HEAD = 128
"""The width of an attention head."""


def make_model(folder: Path, layers: int) -> Path:
    """A model of so many layers, with the tokenizer and the vocabulary of the tests' model."""
    make_tiny_model(folder)
    tiny = json.loads((folder / "config.json").read_text())
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_attention_heads": HIDDEN // HEAD,
        "num_key_value_heads": KEYS // HEAD,
        "head_dim": HEAD,
        "num_hidden_layers": layers,
        "max_position_embeddings": 8192,
    }
    LlamaForCausalLM(LlamaConfig(**tiny | sizes)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def kept(policy: Policy) -> tuple[int, int]:
    """(bytes that a pass keeps, slots of its pack)."""
    rows = [make_row(number, 128, 64, 64) for number in range(4)]
    pack = next(policy.packs(rows, range(len(rows))))
    return activation_bytes(policy, pack), pack.slots


def measure(compiled: bool, recompute: bool) -> float:
    """Bytes a token of one layer."""
    sizes = []
    for layers in (1, 2):
        torch._dynamo.reset()
        with tempfile.TemporaryDirectory(prefix="dpo-activations-") as name:
            policy = load(make_model(Path(name), layers), quantization="nf4", adapter={"r": RANK})
        # The compiler's own choice of what to keep, without its kernels, which would be those of a CPU.
        with patch.object(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition")):
            policy.compiled = compiled
            policy.recompute_activations(recompute)
            bytes_, slots = kept(policy)
        sizes.append(bytes_ / slots)
    return sizes[1] - sizes[0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.activations", description=__doc__)
    parser.add_argument("--keep", type=Path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    ways = {
        "uncompiled": (False, False),
        "compiled": (True, False),
        "uncompiled, recomputed": (False, True),
        "compiled, recomputed": (True, True),
    }
    with (
        patch.dict(hardware.BY_KIND, cpu=hardware.GPU),
        patch.object(attention, "_compiled_flex", lambda: flex.flex_attention),
        patch.object(flex, "_validate_device", lambda query, key, value: None),  # on a CPU, it refuses gradients
    ):
        figures: JsonObject = {name: round(measure(*way)) for name, way in ways.items()}
    table = Table("layers", "bytes a token and layer", "MB a token")
    for name, size in figures.items():
        table.add_row(name, f"{size:,}", f"{LAYERS * size / 1e6:.2f}")
    Console().print(table)
    if arguments.keep is not None:
        results = {"machine": describe_machine(), "bytes_per_token_and_layer": figures}
        arguments.keep.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
