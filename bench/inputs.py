"""What every entrant of a benchmark gets: the same model, rows and batches; and what the arithmetic alone would say."""

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
from worker.trainer.data import written

VOCABULARY = 32_000
Pairs = list[dict[str, str]]
Lengths = tuple[int, int, int]
"""Words of prompt, chosen and rejected answer. The benchmarks' tokenizer makes a token of each word."""
SPREAD = 1.0
"""The standard deviation of the logarithms of synthetic lengths; those of HH and UltraFeedback are 1.0 to 1.6."""
SHARED = Path(os.environ.get("DPO_SHARED", "../shared"))
HH = SHARED / "data/preference/hh-rlhf/helpful-base.test.jsonl.gz"
ULTRAFEEDBACK = SHARED / "data/preference/ultrafeedback/clean.jsonl"


def lengths_of(file: Path, count: int, medians: Lengths) -> tuple[list[Lengths], str]:
    """(`count` lengths drawn from the pairs of `file`, where they are from); without it, from a log-normal."""
    generator = random.Random(0)
    if file.exists():
        with file.open("rb") as stream:
            found = list(examples(stream))
        chosen = generator.sample(found, count) if count <= len(found) else generator.choices(found, k=count)
        return [_words(example) for example in chosen], f"lengths of {file.parent.name}/{file.name}"
    logs = [torch.tensor(float(median)).log().item() for median in medians]
    drawn = [tuple(int(generator.lognormvariate(mu, SPREAD)) + 1 for mu in logs) for _ in range(count)]
    return [(p, c, r) for p, c, r in drawn], f"synthetic lengths, log-normal, medians {medians}"


def _words(example: Example) -> Lengths:
    chosen, rejected = map(str, example.responses)
    prompt = written(example)
    return len(prompt.split()), max(1, len(chosen.split())), max(1, len(rejected.split()))


def make_pairs(lengths: Sequence[Lengths], max_length: int) -> Pairs:
    """Rows of random words with these lengths; a prompt or an answer takes half of `max_length` at most."""
    generator = random.Random(1)

    def text(words: int) -> str:
        return " ".join(f"w{generator.randrange(VOCABULARY - 10)}" for _ in range(min(words, max_length // 2 - 1)))

    return [{"prompt": text(p), "chosen": " " + text(c), "rejected": " " + text(r)} for p, c, r in lengths]


def make_tokenizer(folder: Path) -> None:
    """Write a tokenizer with a token for each of the words w0, w1, …"""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(VOCABULARY - 3)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    ).save_pretrained(folder)


def make_model(folder: Path, max_length: int) -> int:
    """A Llama of about 20 million parameters with a vocabulary of 32,000; returns its parameters."""
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
    """FLOPs that DPO needs, with LoRA: 2 for each weight and token forward, 2 for the gradient to the activations.

    `layers` and `head` are weights; `tokens` and `shared` the rows' tokens, prompts computed twice or once; `scored`
    the answers' tokens, at which alone the head is needed. No padding is counted.
    """

    layers: int
    head: int
    tokens: int
    shared: int
    scored: int

    @classmethod
    def of(cls, pairs: Pairs, layers: int, head: int) -> "Arithmetic":
        sizes = [tuple(len(pair[part].split()) for part in ("prompt", "chosen", "rejected")) for pair in pairs]
        scored = sum(c + r + 2 for _, c, r in sizes)
        return cls(
            layers,
            head,
            sum(2 * (p + 1) for p, _, _ in sizes) + scored,
            sum(p + 1 for p, _, _ in sizes) + scored,
            scored,
        )

    def passes(self, count: float, *, shared: bool) -> float:
        """FLOPs of `count` forward passes, or what costs as much, over all rows."""
        return 2 * count * (self.layers * (self.shared if shared else self.tokens) + self.head * self.scored)

    def bound(self, epochs: int, *, reference_each_step: bool, recompute: bool) -> float:
        """How many times the FLOPs of this engine a scheme without shared prompts needs, reference counted."""
        step = 2 + recompute + reference_each_step
        theirs = self.passes(epochs * step + (0 if reference_each_step else 1), shared=False)
        return theirs / self.passes(2 * epochs + 1, shared=True)
