"""Tiny random models of each family, and rows to compare them on."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from app.spec.job import JobSpec
from tests.helpers.tiny_model import make_tokenizer
from tests.helpers.trainer import disturb, make_row
from worker.trainer.events import Events
from worker.trainer.loading import wrap
from worker.trainer.model import Base, Policy
from worker.trainer.shards import Shards

WINDOW = 6
"""Shorter than prompt plus response of every row below."""


FIRST, SECOND = make_row(1, 12, 5, 9), make_row(2, 9, 7, 2)
ROWS = [
    FIRST,
    SECOND,
    make_row(3, 20, 4, 6),
    replace(FIRST, line=4, responses=(SECOND.responses[0], FIRST.responses[1])),
]


SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


WINDOWS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "llama with yarn": {
        "rope_parameters": {
            "rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 32,
        },
    },
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, **WINDOWS},
    "qwen3": {"head_dim": 8},
    "gemma2": {**GEMMA, **WINDOWS, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**GEMMA, **WINDOWS},
    "phi3": {"sliding_window": WINDOW},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "gpt2": {},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **WINDOWS},
}  # fmt: skip


SPEC = {"model": "tiny", "training_file": "x", "adapter": {"r": 4}, "quantization": "none", "seed": 1}


def make_policy(
    family: str, settings: dict[str, Any], stream: io.StringIO, shards: Shards | None = None, **spec: Any
) -> Policy:
    """A tiny random model of `family` in float64, with disturbed trainable weights. `shards` take its base."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.split(" ")[0], **{**SMALL, **settings}))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernels have no float64
    body = JobSpec.model_validate({**SPEC, **spec}).resolved()
    model.double()
    if shards is not None:
        shards.finish(model, ends=True)
    policy = wrap(model, make_tokenizer(), body, Base("tiny", None, None, Path()), None, Events(stream))
    policy.shards = shards or policy.shards
    return disturb(policy)
