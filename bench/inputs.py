"""The input that all entrants of a benchmark share: model, tokenizer and rows. Also the FLOPs that the schemes need."""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.spec.datasets.check import examples
from app.spec.datasets.example import Example
from worker.trainer.data import prompt_text

VOCABULARY = 32_000
Pairs = list[dict[str, str]]
Lengths = tuple[int, int, int]
"""Numbers of words: of the prompt, the chosen and the rejected answer. A word is one token for `make_tokenizer`."""
SPREAD = 1.0
"""Standard deviation of the logarithms of synthetic lengths. For HH and UltraFeedback it is 1.0 to 1.6."""
SHARED = Path(os.environ.get("DPO_SHARED", "../shared"))
HH = SHARED / "data/preference/hh-rlhf/helpful-base.test.jsonl.gz"
ULTRAFEEDBACK = SHARED / "data/preference/ultrafeedback/clean.jsonl"


def lengths_of(file: Path, count: int, medians: Lengths) -> tuple[list[Lengths], str]:
    """(`count` lengths, their source). They are drawn from the pairs of `file`, or from a log-normal distribution."""
    generator = random.Random(0)
    if file.exists():
        with file.open("rb") as stream:
            pairs = list(examples(stream))
        sample = generator.sample(pairs, count) if count <= len(pairs) else generator.choices(pairs, k=count)
        return [_words(example) for example in sample], f"lengths of {file.parent.name}/{file.name}"
    logs = [torch.tensor(float(median)).log().item() for median in medians]
    drawn = [tuple(int(generator.lognormvariate(mu, SPREAD)) + 1 for mu in logs) for _ in range(count)]
    lengths = [(prompt, chosen, rejected) for prompt, chosen, rejected in drawn]
    return lengths, f"synthetic lengths, log-normal, medians {medians}"


def _words(example: Example) -> Lengths:
    chosen, rejected = map(str, example.responses)
    prompt = prompt_text(example)
    return len(prompt.split()), max(1, len(chosen.split())), max(1, len(rejected.split()))


def make_pairs(lengths: Sequence[Lengths], max_length: int, vocabulary: int = VOCABULARY) -> Pairs:
    """Pairs of random words with these lengths. A prompt or an answer takes at most half of `max_length` tokens."""
    generator = random.Random(1)

    def text(words: int) -> str:
        return " ".join(f"w{generator.randrange(vocabulary - 10)}" for _ in range(min(words, max_length // 2 - 1)))

    return [
        {"prompt": text(prompt), "chosen": " " + text(chosen), "rejected": " " + text(rejected)}
        for prompt, chosen, rejected in lengths
    ]


def make_tokenizer(folder: Path, size: int = VOCABULARY) -> None:
    """Write a tokenizer with a token for each of the words w0, w1, …"""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(size - 3)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(folder)


def make_model(folder: Path, max_length: int) -> int:
    """Write a Llama of about 20 million parameters with a vocabulary of 32,000. Returns the number of parameters."""
    make_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=max_length,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Arithmetic:
    """The FLOPs that DPO needs with LoRA. Each weight and token takes 2 forward and 2 for the activations' gradient.

    No padding is counted. Only the answers' tokens need the head.
    """

    layers: int
    """Number of weights in the layers."""
    head: int
    """Number of weights in the head."""
    tokens: int
    """Tokens of the rows, with each prompt counted for both of its answers."""
    shared: int
    """Tokens of the rows, with each prompt counted once."""
    scored: int
    """Tokens of the answers."""

    @classmethod
    def of(cls, pairs: Pairs, layers: int, head: int) -> "Arithmetic":
        sizes = [tuple(len(pair[part].split()) for part in ("prompt", "chosen", "rejected")) for pair in pairs]
        scored = sum(chosen + rejected + 2 for _, chosen, rejected in sizes)  # an end token each
        return cls(
            layers,
            head,
            sum(2 * (prompt + 1) for prompt, _, _ in sizes) + scored,  # BOS is one more
            sum(prompt + 1 for prompt, _, _ in sizes) + scored,
            scored,
        )

    def passes(self, count: float, *, shared: bool) -> float:
        """FLOPs of `count` forward passes over all rows. A backward pass costs as much as a forward pass."""
        return 2 * count * (self.layers * (self.shared if shared else self.tokens) + self.head * self.scored)

    def bound(self, epochs: int, *, reference_each_step: bool, recompute: bool) -> float:
        """FLOPs of a scheme without shared prompts, divided by those of this engine, each with its reference pass."""
        step = 2 + recompute + reference_each_step  # passes: forward, backward, and up to two more
        theirs = self.passes(epochs * step + (0 if reference_each_step else 1), shared=False)
        return theirs / self.passes(2 * epochs + 1, shared=True)
