"""Sample completions from a policy in batches, with the same result in any batch.

A prompt is computed once for all its completions. Each completion has its own stream of random numbers, derived from
the seed, its row and its sample number. The samples therefore do not depend on the batch size, on the other members of
the batch, or on where an interrupted run resumed.
"""

import gc
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from app.spec.datasets.example import Example
from worker.trainer import decoding
from worker.trainer.errors import Stopped
from worker.trainer.model import Policy
from worker.trainer.ranks import Ranks

COMPACT_SHARE = 0.5
"""Compact the KV cache once only this share of its slots is unfinished: a smaller batch is worth the copy."""


@dataclass(frozen=True)
class Sampling:
    """How to sample.

    `temperature` 0 takes the likeliest token. `top_p` keeps the smallest set of tokens with at least this total
    probability (nucleus sampling, Holtzman et al. 2020).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0


class Prompt(NamedTuple):
    """The tokens to which a model generates an answer. `rest`: text at the prompt's end that the answer repeats."""

    ids: tuple[int, ...]
    rest: str


@dataclass(frozen=True)
class CompletionRequest:
    """Completion number `sample` of `prompt` (token ids). `row` is the caller's number of the prompt."""

    row: int
    sample: int
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """The answer to a `CompletionRequest`.

    `ids` are the tokens of the answer. They include the end-of-sequence token if `ended`. `logp` is the log-probability
    of `ids` under the distribution that they were drawn from, after temperature and top-p. It is 0 for temperature 0.
    """

    temperature: float
    row: int
    sample: int
    ids: tuple[int, ...]
    ended: bool
    logp: float

    @property
    def key(self) -> tuple[float, int, int]:
        """The key of the completion among all completions of one model."""
        return self.temperature, self.row, self.sample


def random_stream(
    seed: int, row: int, sample: int, count: int
) -> "numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]]":
    """`count` uniform random numbers in [0, 1) for one completion, one for each token."""
    name = hashlib.sha256(f"{seed} {row} {sample}".encode()).digest()
    return numpy.random.Generator(numpy.random.Philox(int.from_bytes(name[:8], "big"))).random(count)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(token ids [n], their log-probs [n]) drawn from `logits` [n, V] with random numbers `uniform` [n] in [0, 1).

    This is inverse transform sampling: the first token whose cumulative probability exceeds `uniform`.
    """
    if sampling.temperature == 0:
        best = logits.argmax(-1)
        return best, torch.zeros_like(best, dtype=torch.float64)
    probabilities = torch.softmax(logits.double() / sampling.temperature, -1)  # (n, V)
    if sampling.top_p < 1:
        # Nucleus: drop each token once the likelier ones already have `top_p`. The likeliest always stays.
        ordered, tokens = probabilities.sort(stable=True, dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= sampling.top_p
        outside[:, 0] = False
        probabilities = probabilities.masked_fill(outside.scatter(-1, tokens, outside), 0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    sums = probabilities.cumsum(-1)
    # Scaled by the last sum, which rounding keeps from being exactly 1.
    drawn = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    return drawn.squeeze(-1), probabilities.gather(-1, drawn).squeeze(-1).log()


def batches(
    requests: Sequence[CompletionRequest], tokens: int, max_tokens: int, largest: int
) -> list[list[CompletionRequest]]:
    """Group `requests` into batches of at most `largest` requests, short prompts first.

    A batch has at most `tokens` tokens, prompts and answers of `max_tokens` together, unless it is a single request.
    """
    groups: list[list[CompletionRequest]] = []
    for request in sorted(requests, key=lambda request: (len(request.prompt), request.row, request.sample)):
        size = len(groups[-1]) if groups else largest
        if size == largest or (size + 1) * (len(request.prompt) + max_tokens) > tokens:
            groups.append([])
        groups[-1].append(request)
    return groups


def _nothing() -> None:
    pass


@torch.no_grad()
def sample(
    policy: Policy,
    batch: Sequence[CompletionRequest],
    sampling: Sampling,
    ends: Collection[int],
    check_stop: Callable[[], None] = _nothing,
) -> Iterator[Completion]:
    """Sample the completions of one batch, and yield each when it ends. No prompt may be empty.

    `ends` are the ids of end-of-sequence tokens. `check_stop` is called before each token. A policy that is
    `one_by_one` needs batches of one.
    """
    # 1. Compute the prompts. `active` maps a slot of the decoder to the number of its request, or to −1.
    decoder = decoding.begin(policy, [request.prompt for request in batch])
    answers, logps = [list[int]() for _ in batch], [0.0] * len(batch)
    streams = [random_stream(sampling.seed, request.row, request.sample, sampling.max_tokens) for request in batch]
    uniform = torch.tensor(numpy.stack(streams), device=policy.device)  # (requests, max_tokens)
    uniform = uniform[torch.tensor(decoder.active, device=policy.device).clamp(min=0)]  # (n, max_tokens)
    for step in range(sampling.max_tokens):
        # 2. Draw one token for each slot.
        check_stop()
        tokens, token_logps = draw(decoder.logits, uniform[:, step], sampling)
        unfinished = []
        for slot, (token, logp) in enumerate(zip(tokens.tolist(), token_logps.tolist(), strict=True)):
            number = decoder.active[slot]
            if number < 0:
                continue
            answers[number].append(token)
            logps[number] += logp
            if token in ends or step + 1 == sampling.max_tokens:
                request = batch[number]
                yield Completion(
                    sampling.temperature, request.row, request.sample, tuple(answers[number]), token in ends,
                    logps[number],
                )  # fmt: skip
                decoder.active[slot] = -1
            else:
                unfinished.append(slot)
        if not unfinished:
            return
        # 3. Remove finished slots from the batch, once they are many.
        if len(unfinished) <= COMPACT_SHARE * len(decoder.active):
            kept = decoder.keep(unfinished)
            tokens, uniform = tokens[kept], uniform[kept]
        # 4. Compute the logits of the next token.
        decoder.step(tokens)


class Sampled(NamedTuple):
    """The completions of some batches, and whether a rank was asked to stop meanwhile."""

    completions: list[Completion]
    stopped: bool


def sample_together(
    policy: Policy,
    together: list[list[CompletionRequest]],
    sampling: Sampling,
    ends: Collection[int],
    ranks: Ranks,
    check_stop: Callable[[], None],
) -> Sampled:
    """Sample the batches `together`, at most one on each of the `ranks`."""
    own, stopped = list[Completion](), False
    try:
        if ranks.rank < len(together):
            own = _sample_all(policy, together[ranks.rank], sampling, ends, check_stop)
    except Stopped:
        stopped = True
    gathered = ranks.gather((own, stopped))
    return Sampled([completion for part, _ in gathered for completion in part], any(flag for _, flag in gathered))


def _sample_all(
    policy: Policy,
    batch: list[CompletionRequest],
    sampling: Sampling,
    ends: Collection[int],
    check_stop: Callable[[], None],
) -> list[Completion]:
    """The completions of a batch. If it does not fit into the GPU's memory, its halves are sampled one by one.

    Before that, weights give up the memory in which they stay dequantised.
    """
    try:
        return list(sample(policy, batch, sampling, ends, check_stop))
    except torch.OutOfMemoryError:
        if len(batch) == 1 and not policy.groups.kept:
            raise
    released = policy.groups.release()
    gc.collect()
    torch.cuda.empty_cache()
    half = len(batch) if released else len(batch) // 2
    return [
        completion
        for part in (batch[:half], batch[half:])
        if part
        for completion in _sample_all(policy, part, sampling, ends, check_stop)
    ]


def end_tokens(policy: Policy, ends: Iterable[int]) -> set[int]:
    """The tokens that end an answer: `ends`, those of the chat template, and those of the model's generation config."""
    configured = policy.causal.generation_config.eos_token_id  # a list, a number or None
    return {*ends} | ({*(configured if isinstance(configured, list) else [configured])} - {None})


def text_of(policy: Policy, completion: Completion, prompt: Prompt, example: Example) -> str:
    """The text of a completion, without its end token and without the prompt's text that it repeats."""
    ids = completion.ids[:-1] if completion.ended else completion.ids
    text: str = policy.tokenizer.decode(ids, skip_special_tokens=True).removeprefix(prompt.rest)
    plain_text = policy.tokenizer.chat_template is None and isinstance(example.prompt, str)
    return text if plain_text else text.strip()
