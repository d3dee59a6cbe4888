"""Every family of models that shares prompts: log-probs and gradients of packs are those of one text at a time."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from app.spec.job import JobSpec
from tests.tiny_model import make_tokenizer
from tests.unit.trainer.work import disturb, gradients, make_row, of_kind, pack_of, parse, plain_logps
from worker.trainer.attention import NAME
from worker.trainer.events import Events
from worker.trainer.exactness import check
from worker.trainer.loading import wrap
from worker.trainer.model import Base, Policy

WINDOW = 6
"""Shorter than prompt and answer of every row below."""
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


def make_policy(family: str, settings: dict[str, Any], stream: io.StringIO, **spec: Any) -> Policy:
    """A tiny random model of `family` in float64, off its starting point."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.split(" ")[0], **{**SMALL, **settings}))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernels have no float64
    body = JobSpec.model_validate({**SPEC, **spec}).resolved()
    policy = wrap(model.double(), make_tokenizer(), body, Base("tiny", None, None, Path()), None, Events(stream))
    return disturb(policy)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_log_probs_and_gradients_are_those_of_one_text_at_a_time(family: str) -> None:
    stream = io.StringIO()
    policy = make_policy(family, FAMILIES[family], stream)
    assert policy.shared, stream.getvalue()
    assert policy.causal.config._attn_implementation == NAME

    pack = pack_of(policy, ROWS, [0, 1, 2, 3])
    assert pack.tokens < sum(row.tokens for row in ROWS)  # two rows have one prompt
    found = policy.score(pack).responses
    expected = torch.cat([plain_logps(policy, ROWS[number]) for number in pack.rows])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)

    weights = torch.arange(1, len(found) + 1, dtype=found.dtype)
    theirs = gradients(policy, (expected * weights).sum())
    for name, gradient in gradients(policy, (found * weights).sum()).items():
        assert theirs[name].any(), name
        tolerance = 1e-6 * theirs[name].abs().max().item()
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=tolerance, msg=name)

    check(policy, ROWS, Events(stream))
    assert policy.shared
    assert stream.getvalue() == ""


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3_text", "phi3"])
def test_the_window_is_shorter_than_the_rows_and_matters(family: str) -> None:
    policy = make_policy(family, FAMILIES[family], io.StringIO())
    found = policy.score(pack_of(policy, ROWS, [0, 1, 2])).responses
    wide = make_policy(family, {**FAMILIES[family], "sliding_window": 64}, io.StringIO())
    wider = wide.score(pack_of(wide, ROWS, [0, 1, 2])).responses
    assert bool(((found - wider).abs() > 1e-4 * found.abs()).all())


LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4,
    "original_max_position_embeddings": 16,
}  # fmt: skip
ALONE: dict[str, tuple[dict[str, Any], str]] = {
    "phi3": ({"rope_parameters": LONGROPE, "original_max_position_embeddings": 16}, "longrope"),
    "llama": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
    "mamba": ({"state_size": 4, "time_step_rank": 2}, "interface"),
    "bloom": ({"n_head": 4, "n_layer": 2}, "interface"),
    "falcon": ({"new_decoder_architecture": True, "num_kv_heads": 2}, "interface"),
}


@pytest.mark.parametrize("family", ALONE)
def test_what_cannot_share_goes_one_response_a_row_and_says_why(family: str) -> None:
    settings, reason = ALONE[family]
    stream = io.StringIO()
    policy = make_policy(family, settings, stream, adapter="none")
    messages = of_kind(parse(stream), "message")
    assert {message["level"] for message in messages} == {"warn"}
    assert reason in messages[0]["message"]
    assert not policy.shared
    check(policy, ROWS, Events(stream))
    for row in ROWS:
        pack = pack_of(policy, [row], [0])
        assert len(pack.ids) == 2
        found, expected = policy.score(pack).responses, plain_logps(policy, row)
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=0)
