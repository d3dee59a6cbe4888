"""The model that all parts share: the shape of Llama 3.1 8B, with random weights, its body quantised to NF4.

A dry run has a tiny model.
"""

import atexit
import gc
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bench.inputs import VOCABULARY, make_tokenizer
from worker.trainer import fp8

dry = False
"""Whether the shapes are tiny."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
}


def vocabulary() -> int:
    """Number of words of the tokenizer."""
    return 1000 if dry else VOCABULARY


@cache
def folder() -> Path:
    """A folder with the model's tokenizer and configuration."""
    path = Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    make_tokenizer(path, vocabulary())
    _config().save_pretrained(path)
    return path


def tokenizer() -> Tokenizer:
    """The model's tokenizer: a token for each word."""
    loaded: Tokenizer = AutoTokenizer.from_pretrained(folder())
    return loaded


def _config() -> LlamaConfig:
    return LlamaConfig(**(TINY if dry else LLAMA_8B), bos_token_id=0, eos_token_id=1, pad_token_id=None)


def dtype() -> torch.dtype:
    """The dtype of the model before it is quantised."""
    return torch.float32 if dry else torch.bfloat16  # a CPU is slow in 16 bits


def random_model() -> PreTrainedModel:
    """The model before it is quantised, on the device."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        torch.set_default_dtype(dtype())
        made = LlamaForCausalLM(_config())
        torch.set_default_dtype(torch.float32)
    return made


@cache
def model() -> PreTrainedModel:
    """The frozen model with random weights, made and quantised on the device."""
    made = random_model()
    _quantise(made)
    return made.requires_grad_(False)


@cache
def model_in_fp8() -> PreTrainedModel:
    """The same model with a body in FP8."""
    made = random_model()
    for number, layer in enumerate(made.model.layers):
        fp8.convert(layer, f"model.layers.{number}", ())
    free()
    return made.requires_grad_(False)


def _quantise(made: PreTrainedModel) -> None:
    """Replace the linear layers of the body by NF4 layers, one at a time."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import BitsAndBytesConfig

    for path in [name for name, _ in made.model.named_modules()]:
        module = made.model.get_submodule(path)
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                quantised = Linear4bit(
                    child.in_features, child.out_features, bias=False, compute_dtype=dtype(),
                    compress_statistics=True, quant_type="nf4", device="meta",
                )  # fmt: skip
                weight = Params4bit(child.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
                quantised.weight = weight.to(DEVICE)  # quantises
                setattr(module, name, quantised)
    made.is_loaded_in_4bit = True  # `is_quantized` would mean transformers' own quantiser
    made.config.quantization_config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype(),
    )  # fmt: skip
    free()


# -- measuring -------------------------------------------------------------------------------------------------------


def synchronize() -> None:
    """Wait until the device has computed everything."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def free() -> None:
    """Give memory that nothing uses back to the device."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def allocated() -> int:
    """Bytes that torch has allocated on the card now; 0 on a CPU."""
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def measured(run: Callable[[], object]) -> dict[str, float]:
    """The `seconds` of `run`, and its peak memory minus the memory before it, as `activation_bytes`."""
    gc.collect()  # the memory stays with torch, which would ask the driver for it again
    before = allocated()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    began = time.perf_counter()
    run()
    synchronize()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else before
    return {"seconds": seconds, "activation_bytes": float(peak - before)}


def seconds_of(run: Callable[[], object], times: int = 5) -> float:
    """The shortest of some `times` of `run`, after one that compiles."""
    run()
    synchronize()
    best = float("inf")
    for _ in range(1 if dry else times):
        began = time.perf_counter()
        run()
        synchronize()
        best = min(best, time.perf_counter() - began)
    return best
