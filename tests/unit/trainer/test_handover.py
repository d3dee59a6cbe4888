"""Other programs load what a job makes: transformers alone, transformers 4, with one text or many at a time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from app.spec.job import JobSpec
from tests.helpers.model_table import written
from tests.helpers.tiny_model import CORPUS
from tests.helpers.trainer import BASE_NAME, dpo_method, make_pairs, make_work_folder, run_in_process
from worker.trainer.loading import _with_adapter
from worker.trainer.merge import merge
from worker.trainer.tokenizer import padding_token

PAIRS = make_pairs(12)
TRANSFORMERS_4 = Path(sys.prefix) / "transformers-4"
"""Where the Makefile installs transformers 4."""
TOKENIZERS: dict[str, tuple[str, list[str], dict[str, str]]] = {
    "one token for everything": ("gpt2", ["<|end|>"], {"bos_token": "<|end|>", "unk_token": "<|end|>"}),
    "padding is the end": ("gpt_neox", ["<|end|>"], {"pad_token": "<|end|>"}),
    "no padding": ("llama", ["<|end|>", "<s>"], {"bos_token": "<s>"}),
    "padding of its own": ("llama", ["<|end|>", "<pad>"], {"pad_token": "<pad>"}),
    "an unknown token": ("llama", ["<|end|>", "<unk>"], {"unk_token": "<unk>", "pad_token": "<|end|>"}),
}
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_base(
    folder: Path, architecture: str, special: list[str], named: dict[str, str], *, template: str | None = None
) -> Path:
    """A tiny model as transformers 4 would have written it. Its end token is `<|end|>`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", **named)
    config = AutoConfig.for_model(
        architecture, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, initializer_range=0.2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    fields = json.loads((folder / "config.json").read_text())
    if fields.pop("rope_parameters", None):
        fields["rope_theta"] = 300.0
    fields["torch_dtype"] = fields.pop("dtype")
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def run_job(folder: Path, base: Path, **spec: Any) -> Path:
    """Train a DPO job on `base` and return its output folder. Its events are in the file `events` beside it."""
    settings = {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01}
    method = dpo_method(**settings, **({"loss": spec.pop("loss")} if "loss" in spec else {}))
    body = {"quantization": "none", "adapter": {"r": 4}, "seed": 1, "validation_split": 0.3, "method": method, **spec}
    events = run_in_process(make_work_folder(folder, base, body, train=PAIRS))
    (folder / "events").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder / "output"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_reward_model_gives_the_same_rewards_outside_as_in_training(tmp_path: Path, kind: str) -> None:
    """The score is read at the last token that is not padding, so the padding token must not be the end token."""
    architecture, special, named = TOKENIZERS[kind]
    base = make_base(tmp_path / "base", architecture, special, named)
    output = run_job(tmp_path / "job", base, loss="reward_model")
    model: Any = AutoModelForSequenceClassification.from_pretrained(output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    texts, expected = [], []
    for entry in map(json.loads, (output / "validation_logps.jsonl").read_text().splitlines()):
        pair = PAIRS[entry["line"] - 1]
        texts += [f"{pair['prompt']}{pair[side]}<|end|>" for side in ("chosen", "rejected")]
        expected += entry["rewards"]

    def rewards(batch: list[str]) -> list[float]:
        with torch.no_grad():
            scores = model(**tokenizer(batch, return_tensors="pt", padding=len(batch) > 1)).logits[:, 0].tolist()
        return list(scores)

    assert len({len(tokenizer(text).input_ids) for text in texts}) > 1
    assert rewards(texts) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert [rewards([text])[0] for text in texts] == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_mean_reward_is_that_of_the_model_that_is_handed_over(tmp_path: Path) -> None:
    architecture, special, named = TOKENIZERS["padding of its own"]
    base = make_base(tmp_path / "base", architecture, special, named)
    output = run_job(tmp_path / "job", base, loss="reward_model", quantization="nf4")
    model: Any = AutoModelForSequenceClassification.from_pretrained(output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    lines = {json.loads(line)["line"] for line in (output / "validation_logps.jsonl").read_text().splitlines()}
    trained = [pair for line, pair in enumerate(PAIRS, 1) if line not in lines]
    texts = [f"{pair['prompt']}{pair[side]}<|end|>" for pair in trained for side in ("chosen", "rejected")]
    with torch.no_grad():
        rewards = [float(model(**tokenizer(text, return_tensors="pt")).logits) for text in texts]
    assert sum(rewards) / len(rewards) - model.config.reward_mean == pytest.approx(0, abs=1e-5)
    assert f"mean 0 over {len(texts)} answers" in (output / "README.md").read_text()


def test_a_word_of_the_vocabulary_pads_where_every_special_token_ends_a_text() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<|end|>": 0, "Ā": 1, "Ġcat": 2, "Ġdog": 3, "Ġcow": 4}, "<|end|>")),
        eos_token="<|end|>", bos_token="<|end|>", unk_token="<|end|>", pad_token="<|end|>",
    )  # fmt: skip
    assert padding_token(tokenizer, (0,), 4) == "Ġdog"


def test_the_token_that_ends_a_turn_is_an_eos_of_every_model_that_is_made(tmp_path: Path) -> None:
    """Like Qwen's bases: the template ends turns with one token, and the tokenizer ends texts with another."""
    special = ["<|end|>", "<|im_start|>", "<|im_end|>"]
    base = make_base(tmp_path / "base", "llama", special, {}, template=TURNS)
    end, turn = (AutoTokenizer.from_pretrained(base).convert_tokens_to_ids(name) for name in ("<|end|>", "<|im_end|>"))
    for name, spec in {"adapter": {}, "full": {"adapter": "none"}}.items():
        output = run_job(tmp_path / name, base, **spec)
        assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == [turn, end]
    merge(base, tmp_path / "adapter/output", tmp_path / "merged", torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.generation_config.eos_token_id == [turn, end]
    plain = run_job(tmp_path / "plain", base, chat_template=False)
    assert json.loads((plain / "generation_config.json").read_text())["eos_token_id"] == end


def test_every_model_that_is_made_has_the_bases_own_tokenizer_files(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", ["<|end|>", "<pad>"], {"pad_token": "<pad>"})
    names = [path.name for path in base.iterdir() if "token" in path.name]
    folders = {
        "adapter": run_job(tmp_path / "adapter", base),
        "full": run_job(tmp_path / "full", base, adapter="none"),
        "checkpoint": next((tmp_path / "adapter/checkpoints").glob("*/model")),
    }
    merge(base, folders["adapter"], tmp_path / "merged", torch.float32)
    for folder in (*folders.values(), tmp_path / "merged"):
        for name in names:
            assert (folder / name).read_bytes() == (base / name).read_bytes(), (folder, name)


LOAD_AND_SCORE = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
assert transformers.__version__.startswith("4.57"), transformers.__version__
request = json.loads(sys.stdin.read())
outputs = {}
for name, folder in request["folders"].items():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(request["text"], return_tensors="pt").input_ids
    model = None
    if name == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(folder, torch_dtype=torch.float32)
    elif name == "adapter":
        from peft import PeftModel
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(request["base"]), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    with torch.no_grad():
        outputs[name] = [ids[0].tolist(), model.eval()(ids).logits.double().flatten().tolist()]
print(json.dumps(outputs))
"""


@pytest.mark.skipif(
    not TRANSFORMERS_4.exists(), reason="no transformers 4 beside the environment: make test installs it"
)
def test_transformers_4_loads_every_model_that_is_made(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", ["<|end|>", "<pad>"], {"pad_token": "<pad>"})
    folders = {
        "adapter": run_job(tmp_path / "adapter", base),
        "full": run_job(tmp_path / "full", base, adapter="none"),
        "reward": run_job(tmp_path / "reward", base, loss="reward_model"),
        "merged": tmp_path / "merged",
    }
    merge(base, folders["adapter"], folders["merged"], torch.float32)
    text = PAIRS[0]["prompt"] + PAIRS[0]["chosen"]
    request = {"text": text, "base": str(base), "folders": {name: str(folder) for name, folder in folders.items()}}
    process = subprocess.run(
        [sys.executable, "-c", LOAD_AND_SCORE], input=json.dumps(request), capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(TRANSFORMERS_4)},
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    theirs = json.loads(process.stdout.splitlines()[-1])
    ids = AutoTokenizer.from_pretrained(base)(text, return_tensors="pt").input_ids
    ours: dict[str, Any] = {
        "adapter": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders["adapter"]),
        "full": AutoModelForCausalLM.from_pretrained(folders["full"]),
        "reward": AutoModelForSequenceClassification.from_pretrained(folders["reward"]),
        "merged": AutoModelForCausalLM.from_pretrained(folders["merged"]),
    }
    for name, model in ours.items():
        with torch.no_grad():
            expected = model.eval()(ids).logits.double().flatten()
        assert theirs[name][0] == ids[0].tolist()
        torch.testing.assert_close(torch.tensor(theirs[name][1], dtype=torch.float64), expected, rtol=1e-4, atol=1e-4)
    assert BASE_NAME in (folders["adapter"] / "adapter_config.json").read_text()


SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(params=[False, True], ids=["apart", "tied"])
def unlearned(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A base whose control tokens were never trained. Its embeddings and its head are two tensors or one."""
    base = make_base(tmp_path / "base", "llama", SPECIAL, {}, template=TURNS)
    config = AutoConfig.from_pretrained(base, tie_word_embeddings=request.param)
    model: Any = AutoModelForCausalLM.from_pretrained(base, config=config)
    model.get_input_embeddings().weight.data[1:3] = model.get_input_embeddings().weight.data.mean(0)
    model.save_pretrained(base)
    return base


def untrained_tokens(folder: Path) -> list[str]:
    """The control tokens that the job reported as untrained."""
    events = [json.loads(line) for line in (folder / "events").read_text().splitlines()]
    warnings = [
        event["data"]["tokens"]
        for event in events
        if (event.get("data") or {}).get("code") == "untrained_control_tokens"
    ]
    return warnings[0] if warnings else []


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_control_tokens_that_were_never_trained_are_reported_and_can_be_trained(
    tmp_path: Path, unlearned: Path, quantization: str
) -> None:
    reported = run_job(tmp_path / "told", unlearned, quantization=quantization)
    assert untrained_tokens(reported.parent) == ["<|im_start|>", "<|im_end|>"]
    assert untrained_tokens(run_job(tmp_path / "plain", unlearned, chat_template=False).parent) == []

    modules_to_save = ["embed_tokens", "lm_head"]
    output = run_job(
        tmp_path / "job", unlearned, quantization=quantization, adapter={"r": 4, "modules_to_save": modules_to_save}
    )
    assert untrained_tokens(output.parent) == []
    base: Any = AutoModelForCausalLM.from_pretrained(unlearned)
    before = base.get_input_embeddings().weight.detach().clone()
    adapted: Any = PeftModel.from_pretrained(base, output).merge_and_unload()
    after = adapted.get_input_embeddings().weight
    assert (after[1:3] - before[1:3]).abs().max() > 1e-3
    assert (after is adapted.get_output_embeddings().weight) == base.config.tie_word_embeddings
    merge(unlearned, output, tmp_path / "merged", torch.float32)
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(ids).logits, adapted.eval()(ids).logits, rtol=1e-5, atol=1e-5)
    if quantization == "nf4":
        return  # the job's log-probs are those of the quantised weights
    tokenizer = AutoTokenizer.from_pretrained(output)
    for entry in map(json.loads, (output / "validation_logps.jsonl").read_text().splitlines()):
        pair = PAIRS[entry["line"] - 1]
        turns = [{"role": "user", "content": pair["prompt"]}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        full_text = tokenizer.apply_chat_template(
            [*turns, {"role": "assistant", "content": pair["chosen"]}], tokenize=False
        )
        length = len(tokenizer(prompt).input_ids)
        ids = tokenizer(full_text, return_tensors="pt").input_ids
        with torch.no_grad():
            logps = merged(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[length - 1 :]
        assert entry["logps"][0] == pytest.approx(logps.sum().item(), rel=1e-4)


def test_modules_that_are_trained_whole_stay_in_float32_on_a_base_in_bfloat16(tmp_path: Path) -> None:
    """As on a GPU: the base is in bfloat16. A module that was trained in float32 is resumed in float32."""
    base = make_base(tmp_path / "base", "llama", SPECIAL, {})
    spec = JobSpec.model_validate(
        {"model": "m", "training_file": "f", "adapter": {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}}
    )

    def load_base() -> Any:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)

    adapted = _with_adapter(load_base(), spec, None, trainable=True)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                assert parameter.dtype == torch.float32, name
                parameter.add_(torch.randn_like(parameter) * 1e-3)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    resumed_model = _with_adapter(load_base(), spec, tmp_path / "adapter", trainable=True)
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    resumed = {name: parameter for name, parameter in resumed_model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == resumed.keys()
    for name, parameter in trained.items():
        assert torch.equal(parameter, resumed[name]), name
    with torch.autocast("cpu", torch.bfloat16):
        states = resumed_model.get_base_model().model(input_ids=torch.arange(3, 20)[None]).last_hidden_state
    assert states.dtype == torch.bfloat16, "activations stay in the base's precision"


def test_the_adapter_of_a_vision_model_is_also_written_under_the_names_of_its_files(tmp_path: Path) -> None:
    """Like Qwen3.5: only its text part is loaded here. A server loads all of it by the names in its files."""
    base = tmp_path / "base"
    make_base(base, "llama", ["<|end|>"], {})
    with written("qwen3_5") as tiny:
        assert tiny.unmakeable is None
        shutil.copyfile(tiny.folder / "config.json", base / "config.json")
        tensors = load_file(tiny.folder / "model.safetensors")
    published = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()}
    published["model.visual.patch_embed.proj.weight"] = torch.ones(4, 4)
    save_file(published, base / "model.safetensors", metadata={"format": "pt"})
    output = run_job(tmp_path / "job", base)
    ours = load_file(output / "adapter_model.safetensors")
    theirs = load_file(output / "vllm/adapter_model.safetensors")
    text_prefix, file_prefix = "base_model.model.model.", "base_model.model.model.language_model."
    assert {name.replace(text_prefix, file_prefix): value.sum().item() for name, value in ours.items()} == {
        name: value.sum().item() for name, value in theirs.items()
    }
    # vLLM's own rule for this model: model.language_model. → language_model.model.
    served_names = {name.replace("model.model.language_model.", "model.language_model.model.") for name in theirs}
    assert all(name.startswith("base_model.model.language_model.model.layers.") for name in served_names)
    merge(base, output, tmp_path / "merged", torch.float32)
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert merged.keys() == published.keys(), "the merged model has all tensors of the base, under their names"
    changed = {name for name, value in merged.items() if not torch.equal(value, published[name].float())}
    assert changed == {f"{name.removeprefix('base_model.model.').removesuffix('.lora_A.weight')}.weight"
                       for name in theirs if name.endswith(".lora_A.weight")}  # fmt: skip
    assert not (run_job(tmp_path / "plain", make_base(tmp_path / "text", "llama", ["<|end|>"], {})) / "vllm").exists()
