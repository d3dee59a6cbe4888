"""Base models are found by name, and no name leads out of the models folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from app.settings import Settings
from app.spec.json_types import JsonObject
from tests.helpers.tiny_model import make_tiny_model
from worker.base_models import BaseModels
from worker.hub import ModelUnavailable
from worker.model_files import context_length


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "outside" / "secret")
    root = tmp_path / "home" / "models"
    make_tiny_model(root / "tiny")
    make_tiny_model(root / "org" / "tiny-chat", chat_template="{{ messages }}")
    (root / "link").symlink_to(tmp_path / "outside" / "secret")
    (root / "no-weights").mkdir()
    (root / "no-weights" / "config.json").write_text("{}")
    return root


def base_models(root: Path, hub_models: tuple[str, ...] = ()) -> BaseModels:
    return BaseModels(Settings(home=root.parent, hub_models=hub_models))


def test_local_models_are_named_by_their_path(root: Path) -> None:
    models = base_models(root, ("meta-llama/*",))
    models_by_name = {model.name: model for model in models.local()}
    assert set(models_by_name) == {"tiny", "org/tiny-chat"}
    assert models_by_name["tiny"].details["architecture"] == "LlamaForCausalLM"
    assert models_by_name["tiny"].details["context_length"] == 512
    assert [models_by_name[name].details["chat_template"] for name in ("tiny", "org/tiny-chat")] == [False, True]
    assert models.served() == ["tiny", "org/tiny-chat", "meta-llama/*"]
    assert models.locate("tiny") == (root / "tiny", None)


@pytest.mark.parametrize(
    "name", ["../outside/secret", "link", "/etc", ".", "", "tiny/../../outside/secret", "no-weights", "org", "a/b"]
)
def test_a_name_outside_the_folder_or_of_no_model_is_refused(root: Path, name: str) -> None:
    with pytest.raises(ModelUnavailable):
        base_models(root, ("meta-llama/*",)).locate(name)


def test_a_broken_folder_does_not_hide_the_others(root: Path) -> None:
    for name, config in (("half", '{"architectures": ['), ("list", "[]"), ("null", '{"text_config": null}')):
        make_tiny_model(root / name)
        (root / name / "config.json").write_text(config)
    assert {model.name for model in base_models(root).local()} == {"tiny", "org/tiny-chat"}


@pytest.mark.parametrize("pattern", ["*", "org", "a/b/c", "or*/x", "org/?", "../x"])
def test_a_pattern_that_allows_too_many_hub_models_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="hub id"):
        Settings(hub_models=(pattern,))


def test_the_revision_changes_with_the_contents(root: Path) -> None:
    (before,) = (model.revision for model in base_models(root).local() if model.name == "tiny")
    config = root / "tiny" / "config.json"
    config.write_text(config.read_text().replace('"vocab_size"', '"vocab_size" '))
    (after,) = (model.revision for model in base_models(root).local() if model.name == "tiny")
    assert before != after


def details_of(root: Path, name: str) -> JsonObject:
    (details,) = (model.details for model in base_models(root).local() if model.name == name)
    return details


def test_a_second_copy_of_the_weights_is_not_counted(root: Path) -> None:
    """Some repositories hold the same weights again, in the layout of their makers."""
    before = details_of(root, "tiny")
    shutil.copyfile(root / "tiny" / "model.safetensors", root / "tiny" / "consolidated.safetensors")
    assert details_of(root, "tiny") == before


def test_an_index_names_the_weight_files_and_all_must_exist(root: Path) -> None:
    tiny = root / "tiny"
    before = details_of(root, "tiny")["bytes"]
    (tiny / "model.safetensors").rename(tiny / "part-1.safetensors")
    shutil.copyfile(tiny / "part-1.safetensors", tiny / "consolidated.safetensors")
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "part-1.safetensors"}}))
    assert details_of(root, "tiny")["bytes"] == before
    index = {"weight_map": {"x": "part-1.safetensors", "y": "part-2.safetensors"}}
    (tiny / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "tiny" not in {model.name for model in base_models(root).local()}


def test_weights_in_an_unsupported_file_are_given_as_the_reason(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: dict[str, str] = {}
    monkeypatch.setattr(BaseModels, "_ignore", lambda _, folder, reason: reasons.update({folder.name: reason}))
    (root / "tiny" / "model.safetensors").rename(root / "tiny" / "pytorch_model.bin")
    assert "tiny" not in base_models(root).folders()
    assert reasons["tiny"] == "its weights are in pytorch_model.bin: convert them to safetensors"
    assert reasons["no-weights"] == "it has no model.safetensors and no model.safetensors.index.json"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 77}, 77),
        ({"n_positions": 77}, 77),  # GPT-2
        ({"max_seq_len": 77}, 77),  # MPT
        ({"text_config": {"max_position_embeddings": 77}, "max_position_embeddings": 5}, 77),
        ({"llm_config": {"n_positions": 77}}, 77),
        ({}, None),
    ],
)
def test_the_context_length_is_read_under_each_known_name(config: JsonObject, expected: int | None) -> None:
    assert context_length(config) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb-4bit"),
        ({"load_in_8bit": True}, "bnb-8bit"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "fp8"}, "fp8"),
        ({}, "an unknown method"),
        (None, None),
    ],
)
def test_existing_quantization_of_the_weights_is_recorded(
    root: Path, config: JsonObject | None, expected: str | None
) -> None:
    path = root / "tiny" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    assert details_of(root, "tiny")["prequantized"] == expected


def test_experts_are_counted_among_the_parameters_that_are_not_quantised(root: Path) -> None:
    """Most checkpoints store the matrices of each expert separately."""
    tiny = root / "tiny"
    before = details_of(root, "tiny")["shape"]
    tensors = load_file(tiny / "model.safetensors")
    save_file(tensors | {"model.layers.0.mlp.experts.3.up_proj.weight": torch.zeros(8, 4)}, tiny / "model.safetensors")
    after = details_of(root, "tiny")["shape"]
    assert after["linears"] == before["linears"]
    assert after["others"] == before["others"] + 32


def test_the_shape_of_gpt_2_is_read_from_its_own_names_of_sizes(root: Path) -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    model.save_pretrained(root / "tiny")
    details = details_of(root, "tiny")
    assert details["context_length"] == 64
    assert (details["shape"]["hidden"], details["shape"]["layers"]) == (32, 2)
    assert ["c_attn", 32, 96, 2] in details["shape"]["linears"]


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2,
        ),
        Qwen3Config(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=1, head_dim=16,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_the_keys_and_values_of_a_token_are_those_that_the_model_caches(root: Path, config: PretrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(root / "tiny")
    cache = model(torch.tensor([[1, 2, 3]]), use_cache=True).past_key_values
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert 3 * details_of(root, "tiny")["shape"]["cached"] == cached
