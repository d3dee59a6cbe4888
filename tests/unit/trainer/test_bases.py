"""Base models as they are published: quantised, with learned positions, or with a tokenizer larger than the model."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config

from tests.helpers.causal_types import tiny_config
from tests.helpers.tiny_model import make_tiny_model
from tests.helpers.trainer import (
    ROWS,
    disturb,
    dpo_method,
    load,
    make_pairs,
    make_run,
    make_work_folder,
    of_kind,
    pack_of,
    plain_logps,
    run_in_process,
    sft_method,
)
from worker.trainer.errors import UserError
from worker.trainer.events import Events
from worker.trainer.exactness import check
from worker.trainer.loop import stages_of, train
from worker.trainer.merge import merge

PAIRS = make_pairs(8)
SHORT: dict[str, Any] = {"adapter": {"r": 4}, "seed": 1, "validation_split": 0.25}
STEPS = {"max_steps": 2, "batch_size": 4, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def four_bits(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as it is shared on hubs in four bits."""
    folder = tmp_path_factory.mktemp("bnb-4bit")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    AutoModelForCausalLM.from_pretrained(llama, quantization_config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


def test_a_base_in_four_bits_is_trained_on_as_it_is(four_bits: Path, tmp_path: Path) -> None:
    policy, stream = disturb(load(four_bits, quantization="nf4")), io.StringIO()
    check(policy, ROWS, Events(stream))
    assert policy.shared and stream.getvalue() == ""
    pack = pack_of(policy, ROWS, [0, 1, 2])
    expected = torch.cat([plain_logps(policy, ROWS[number]) for number in pack.rows])
    torch.testing.assert_close(policy.score(pack).responses, expected, rtol=1e-4, atol=1e-4)

    spec = {**SHORT, "quantization": "nf4", "method": dpo_method(**STEPS)}
    folder = make_work_folder(tmp_path, four_bits, spec, train=PAIRS)
    assert of_kind(run_in_process(folder), "done")
    card = (folder / "output" / "README.md").read_text()
    assert "the base's own (bnb-4bit)" in card
    with pytest.raises(UserError, match="quantised") as caught:
        merge(four_bits, folder / "output", tmp_path / "merged", torch.bfloat16)
    assert caught.value.code == "not_mergeable"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"quantization": "none"}, "quantization", "'nf4'"),
        ({"quantization": "int8"}, "quantization", "'nf4'"),
        ({"adapter": "none", "quantization": "none"}, "adapter", "only an adapter can be trained"),
        ({"quantization": "nf4", "method": dpo_method(loss="reward_model")}, "model", "the original"),
    ],
)
def test_a_spec_that_a_base_in_four_bits_cannot_serve_is_refused(
    four_bits: Path, fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load(four_bits, **fields)
    assert (caught.value.code, caught.value.param) == ("unsupported_model", param)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors"])
def test_other_quantised_bases_are_refused_with_advice(llama: Path, tmp_path: Path, method: str) -> None:
    base = copy_of(llama, tmp_path / "base", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UserError, match="Train on the original model") as caught:
        load(base, quantization="nf4")
    assert caught.value.param == "model"


def copy_of(base: Path, folder: Path, **changes: Any) -> Path:
    """The model in `base` with another configuration."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_folder_without_safetensors_is_refused_and_its_weights_are_named(llama: Path, tmp_path: Path) -> None:
    base = copy_of(llama, tmp_path / "base")
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: convert them to safetensors") as caught:
        load(base)
    assert caught.value.code == "model_not_loadable"


def test_no_row_is_longer_than_the_positions_that_a_model_learned(tmp_path: Path) -> None:
    """GPT-2 calls them `n_positions`. A position beyond them is an index error or noise."""
    base = make_tiny_model(tmp_path / "base")
    config = GPT2Config(
        vocab_size=len(AutoTokenizer.from_pretrained(base)), n_embd=32, n_layer=2, n_head=4, n_positions=16
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    spec = {**SHORT, "quantization": "none", "method": sft_method(**STEPS)}
    run = make_run(make_work_folder(tmp_path / "job", base, spec, train=PAIRS))
    train(run)
    lengths = [row.tokens for stage in stages_of(run) for row in (*stage.train, *stage.validation)]
    assert max(lengths) == 16


def test_a_token_that_the_model_has_no_embedding_for_is_refused_and_named(llama: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["the cat"])
    tokenizer.save_pretrained(base)
    spec = {**SHORT, "quantization": "none", "method": dpo_method(**STEPS)}
    rows = [*PAIRS, {"prompt": "Who? ", "chosen": "the cat.", "rejected": "a dog."}]
    with pytest.raises(UserError, match="'the cat'") as caught:
        run_in_process(make_work_folder(tmp_path / "job", base, spec, train=rows))
    assert caught.value.code == "unsupported_model"
    # A tokenizer may know more than the model, as long as no row has it.
    assert run_in_process(make_work_folder(tmp_path / "other", base, spec, train=PAIRS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_fully_trained_model_has_the_dtype_of_its_base(llama: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    AutoModelForCausalLM.from_pretrained(llama, dtype=dtype).save_pretrained(base)
    spec = {"adapter": "none", "method": sft_method(**STEPS), "seed": 1}
    output = make_work_folder(tmp_path / "job", base, spec, train=PAIRS)
    run_in_process(output)
    with safe_open(output / "output" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {dtype}  # noqa: SIM118
    assert json.loads((output / "output" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(output / "output").dtype == dtype


RANDOM_OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "gpt_bigcode": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "seed_oss": {"residual_dropout": 0.5, "attention_dropout": 0.5},
    "mixtral": {"router_jitter_noise": 0.5, "attention_dropout": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "phimoe": {"router_jitter_noise": 0.5, "input_jitter_noise": 0.5, "attention_dropout": 0.5},
}


@pytest.mark.parametrize("kind", RANDOM_OPTIONS)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_scores_are_deterministic_whatever_a_model_calls_its_dropout(
    tmp_path: Path, kind: str, recompute: bool
) -> None:
    config = tiny_config(kind)
    for name, value in RANDOM_OPTIONS[kind].items():
        setattr(config, name, value)
    base = make_tiny_model(tmp_path / "base")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    policy = load(base)
    policy.recompute_activations(recompute)
    model: Any = AutoModelForCausalLM.from_pretrained(base).eval()
    for row in ROWS:
        responses, repeated = (policy.score(pack_of(policy, [row], [0])).responses for _ in range(2))
        assert torch.equal(responses, repeated)
        ids = torch.tensor([row.prompt + row.responses[1].ids])
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(row.prompt) - 1 :]
        torch.testing.assert_close(responses[1], logps.sum(), rtol=1e-4, atol=1e-4)
