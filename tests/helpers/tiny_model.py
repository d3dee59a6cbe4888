"""A tiny random language model with its own tokenizer, written to disk like a real one."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 300
SLIDING_WINDOW = 8
CORPUS = [
    "the cat and the dog went to the house of the other cat, and then the dog slept there.",
    "there is another house; the mother of the cat lives in it with the father of the dog.",
    "what is the answer? the answer is that the weather is better than the other day.",
]
"""The training text of the tokenizer. "the" becomes one token, with and without a space before it."""

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHATML_WITH_BOS = "{{ bos_token }}" + CHATML


def make_tiny_model(
    folder: Path, *, architecture: str = "llama", chat_template: str | None = None, layers: int = 2, seed: int = 0
) -> Path:
    """Write a model and its tokenizer into `folder`, the same bits each time, and return `folder`.

    `architecture` is llama, qwen3, or mistral, whose sliding window is shorter than most texts. The tokenizer
    puts <s> before every text by itself.
    """
    tokenizer = make_tokenizer(chat_template)
    sizes: dict[str, object] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        # Ten times the usual value, so that attention shows in the logits.
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if architecture == "llama":
            model = LlamaForCausalLM(LlamaConfig(**sizes))
        elif architecture == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16))
        elif architecture == "mistral":
            model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=SLIDING_WINDOW))
        else:
            raise ValueError(architecture)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on `CORPUS`, which knows every byte and a few words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )
