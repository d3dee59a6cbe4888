"""A tiny random model of every causal type that transformers has."""

import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
WINDOW = 6
LIMITS = (
    (r"^vocab_size$|vocab_size$", 320),
    (r"max_position_embeddings|^n_positions$|^max_seq_len$|^seq_length$|^n_ctx$", 64),
    (r"^(sliding_window|sliding_window_size|attention_chunk_size|window_size|attention_window_size)$", WINDOW),
    (r"experts_per_tok|top_k(_experts)?$|moe_topk|moe_k$|num_experts_per_token", 2),
    (r"num_(local_|routed_|dense_)?experts$|n_routed_experts|moe_num_experts|n_experts|expert_num", 4),
    (r"^n_group$|num_expert_group|^topk_group$|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"intermediate_size|ffn_dim|ffn_hidden|^n_inner$|inner_dim|ff_size|mlp_hidden|expert_hidden_size|d_ff", 48),
    (r"lora_rank|index_topk|rank$", 8),
    (r"layers$|^n_layer$|num_blocks|^depth$", 2),
    (r"key_value_heads$|kv_heads$|n_kv_head", 2),
    (r"heads$|^n_head$", 4),
    (r"head_dim$|head_size$|qk_nope|qk_rope|v_head|dim_head|^d_kv$|head_width", 8),
    (r"state_size|^d_state$|ssm_state", 4),
    (r"^(mamba_)?chunk_size$", 8),
    (
        r"^(hidden_size|hidden_size_global|d_model|n_embd|embed_dim|embedding_size|word_embed_proj_dim|dim|cross_attention_hidden_size)$",
        32,
    ),
)
"""Patterns of a configuration's names, each with the largest number that is allowed."""
FIXED: dict[str, float] = {"initializer_range": 0.2, "init_std": 0.2, "use_cache": False}


TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
UNSAID = {"head_dim": 8, "num_key_value_heads": 2, "num_experts_per_tok": 2}
"""Values for a configuration that leaves them open."""


def small(values: dict[str, Any]) -> dict[str, Any]:
    """The changes that make a configuration small, nested configurations included."""
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name.endswith("config") and name != "per_layer_config":
            changes[name] = {k: nested for k, nested in value.items() if nested is not None} | small(value)
        elif name.endswith("token_id"):
            changes[name] = TOKENS.get(name, 3) if isinstance(value, int) else value
        elif name.endswith("token_ids"):
            changes[name] = None
        elif name == "is_decoder":
            changes[name] = True
        elif type(value) is int:
            for pattern, limit in LIMITS:
                if re.search(pattern, name):
                    changes[name] = min(value, limit)
                    break
        elif value is None and name in UNSAID:
            changes[name] = UNSAID[name]
        elif name in FIXED:
            changes[name] = FIXED[name]
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(value, list):
            changes[name] = value[:1] + value[-1:]
        elif name == "per_layer_config":
            changes[name] = {}
    if "kv_lora_rank" in changes:  # latent attention has one key head for each query head
        changes |= {"num_key_value_heads": changes["num_attention_heads"], "qk_head_dim": 16}
    return changes


def tiny_config(kind: str, **changes: Any) -> PretrainedConfig:
    """A configuration of the causal type `kind`, for a model of some ten thousand parameters."""
    cls = CONFIG_MAPPING[kind]
    settings = {} if kind in NO_DEFAULT else small(cls().to_dict())
    for name, value in OVERRIDES.get(kind, {}).items():
        settings[name] = (
            settings.get(name, {}) | value if isinstance(value, dict) and name.endswith("config") else value
        )
    return cls(**{name: value for name, value in (settings | changes).items() if value is not DELETE})


NO_DEFAULT = {"gemma4_assistant"}
"""Types whose default configuration is not valid."""
DELETE = object()
"""Marks a value that keeps the default of the configuration."""
_ROPE = {"rope_theta": 1e4, "rope_type": "default"}
_GEMMA = {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8}
_ASSISTANT = {
    "backbone_hidden_size": 32,
    "text_config": {
        "model_type": "gemma4_text",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
_QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"], "num_experts": 4, "num_experts_per_tok": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "ngram_vocab_size_base": 320, "hc_lowrank": 8,
    "ple_embed_dim": 32, "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2, "index_topk": 8,
    "indexer_n_heads": 2, "indexer_head_dim": 8, "indexer_kv_heads": 1, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "cpmant": {"dim_ff": 48},
    "ctrl": {"dff": 48},
    "dbrx": {"attn_config": DELETE, "ffn_config": DELETE, "n_heads": 4, "n_layers": 2, "d_model": 32},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots3_note": {"num_key_value_heads": 4, "rope_parameters": DELETE,
                   "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
                   "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32}},
    "dots3_note_text": {"num_key_value_heads": 4, "rope_parameters": DELETE},
    "gemma3n": {"text_config": {"intermediate_size": [48, 48], "activation_sparsity_pattern": [0.0, 0.0], **_GEMMA}},
    "gemma3n_text": {"intermediate_size": [48, 48], "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 8,
                     "layer_types": ["sliding_attention", "full_attention"], **_GEMMA},
    "gemma4": {"text_config": _GEMMA},
    "gemma4_text": _GEMMA,
    "gemma4_assistant": _ASSISTANT,
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "nemotron_h": {"mamba_n_groups": 2, "n_groups": 2, "layers_block_type": ["linear_attention", "full_attention"]},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"], "feed_forward_size": 48,
                 "attention_head_size": 8, "local_attn_chunk_length": 8},
    "xlm": {"emb_dim": 32, "causal": True},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip
"""Values that the rules above cannot find, by type."""


def tiny_model(kind: str, **changes: Any) -> PreTrainedModel:
    """A random model of the type with random biases, the same bits each time. `changes` override its configuration."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and not parameter.any():  # zero at initialisation, as if the model had no bias
            torch.nn.init.normal_(parameter, std=0.1)
    return model
