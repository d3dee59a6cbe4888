"""The demo's base model: a small Llama that the engine itself trains from scratch."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.settings import Settings
from demo import world
from worker.standalone import train

NAME = "demo-base"
UNTRAINED = "demo-untrained"
STORIES = 4000


def ensure(settings: Settings, console: Console) -> None:
    """Make the model in the models folder, unless an earlier demo made it."""
    folder = settings.models_dir / NAME
    if (folder / "model.safetensors").exists():
        console.print(f"1. The base model exists: {folder}", highlight=False)
        return
    console.print("1. Training a base model from scratch, with the engine: a small Llama on generated stories")
    corpus = world.corpus(STORIES, seed=1)
    untrained = settings.models_dir / UNTRAINED
    _write_untrained(untrained, [row["text"] for row in corpus])
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "stories.jsonl").write_text("\n".join(json.dumps(row) for row in corpus))
        spec = {
            "model": UNTRAINED,
            "training_file": "stories.jsonl",
            "adapter": "none",
            "seed": 1,
            "method": {
                "type": "supervised",
                "supervised": {
                    "hyperparameters": {"learning_rate": 3e-3, "n_epochs": 1, "batch_size": 32, "eval_every": 40}
                },
            },
        }
        (work / "spec.json").write_text(json.dumps(spec))
        output = work / "made"
        if train(work / "spec.json", output, settings, console) != 0:
            raise SystemExit("The base model could not be trained; the lines above say why.")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(output, folder.with_name(f".{NAME}"), dirs_exist_ok=True)
        folder.with_name(f".{NAME}").rename(folder)
    shutil.rmtree(untrained)


def _write_untrained(folder: Path, texts: list[str]) -> None:
    """A tokenizer trained on `texts`, and random weights."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
