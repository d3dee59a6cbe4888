"""Sampling completions from a policy: in batches, and the same whatever else is in a batch.

A prompt is computed once, whatever number of completions hang on it. Each completion has a stream of random numbers of
its own, named by the seed, its prompt and its number: what is sampled does not depend on the size of a batch, on who
else is in it, or on where a run was broken off and went on.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor
from transformers import DynamicCache

from worker.trainer.model import Policy

COMPACT = 0.5
"""Compact the KV cache once this share of the batch has finished: a smaller batch is worth the copy."""


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` 0 takes the likeliest token; `top_p` keeps the fewest tokens that have that much
    probability together (Holtzman et al. 2020)."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    seed: int = 0


@dataclass(frozen=True)
class CompletionRequest:
    """A completion to sample: number `sample` of the prompt `prompt` (token ids), which the caller calls `row`."""

    row: int
    sample: int
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Completion:
    """The answer to a `CompletionRequest`.

    `ids` are the answer's tokens, the end-of-sequence token with them where `ended`. `logp` is the log-probability
    of `ids` under the distribution that they were drawn from, tempered and cut: 0 for temperature 0.
    """

    temperature: float
    row: int
    sample: int
    ids: tuple[int, ...]
    ended: bool
    logp: float

    @property
    def key(self) -> tuple[float, int, int]:
        """The completion's name among all those of one model."""
        return self.temperature, self.row, self.sample


def stream(seed: int, row: int, sample: int, count: int) -> "numpy.ndarray[tuple[int], numpy.dtype[numpy.float64]]":
    """The random numbers of one completion, in [0, 1): `count` of them, one a token."""
    name = hashlib.sha256(f"{seed} {row} {sample}".encode()).digest()
    return numpy.random.Generator(numpy.random.Philox(int.from_bytes(name[:8], "big"))).random(count)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(token ids [n], their log-probs [n]) from `logits` [n, V] and a number in [0, 1) for each, `uniform` [n].

    The token is the one at which the sum of the probabilities, in the vocabulary's order, passes `uniform`.
    """
    if sampling.temperature == 0:
        best = logits.argmax(-1)
        return best, torch.zeros_like(best, dtype=torch.float64)
    logps = torch.log_softmax(logits.double() / sampling.temperature, -1)
    if sampling.top_p < 1:
        ordered, tokens = logps.sort(stable=True, dim=-1, descending=True)
        probabilities = ordered.exp()
        outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        outside[:, 0] = False
        logps = logps.masked_fill(outside.scatter(-1, tokens, outside), -torch.inf).log_softmax(-1)
    sums = logps.exp().cumsum(-1)
    drawn = (sums <= uniform[:, None] * sums[:, -1:]).sum(-1).clamp(max=logits.shape[-1] - 1)
    return drawn, logps.gather(-1, drawn[:, None]).squeeze(-1)


def batches(
    requests: Sequence[CompletionRequest], tokens: int, max_tokens: int, largest: int
) -> list[list[CompletionRequest]]:
    """Group `requests` into batches of at most `largest`, short prompts first.

    A batch grows to at most `tokens`, prompts and answers together.
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
    tick: Callable[[], None] = _nothing,
) -> Iterator[Completion]:
    """Make the completions of one batch, each when it ends. `ends` are the tokens that end one; no prompt is empty.

    `tick` is called before each token. A model whose positions depend on the longest text must have batches of one.
    """
    with policy.own_attention_in_use():
        yield from _sample(policy, batch, sampling, ends, tick)


def _sample(
    policy: Policy,
    batch: Sequence[CompletionRequest],
    sampling: Sampling,
    ends: Collection[int],
    tick: Callable[[], None],
) -> Iterator[Completion]:
    device, model = policy.device, policy.causal
    prompts = list(dict.fromkeys(request.prompt for request in batch))
    which = torch.tensor([prompts.index(request.prompt) for request in batch], device=device)
    width = max(map(len, prompts))
    # Before a prompt stands any token: the mask hides it.
    ids = torch.tensor([[p[0]] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    uniform = torch.tensor(
        numpy.stack([stream(sampling.seed, request.row, request.sample, sampling.max_tokens) for request in batch]),
        device=device,
    )
    cache = DynamicCache(config=model.config.get_text_config())
    with policy.autocast():
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
    cache.batch_select_indices(which)
    logits, mask, at = out.logits[which, -1], mask[which], positions[which, -1:]
    alive, made, logps = list(range(len(batch))), [list[int]() for _ in batch], [0.0] * len(batch)
    for step in range(sampling.max_tokens):
        tick()
        tokens, found = draw(logits, uniform[:, step], sampling)
        kept = []
        for place, (token, logp) in enumerate(zip(tokens.tolist(), found.tolist(), strict=True)):
            number = alive[place]
            if number < 0:
                continue
            made[number].append(token)
            logps[number] += logp
            if token in ends or step + 1 == sampling.max_tokens:
                request = batch[number]
                yield Completion(
                    sampling.temperature, request.row, request.sample, tuple(made[number]), token in ends, logps[number]
                )
                alive[place] = -1
            else:
                kept.append(place)
        if not kept:
            return
        if len(kept) <= COMPACT * len(alive):
            rows = torch.tensor(kept, device=device)
            cache.batch_select_indices(rows)
            tokens, mask, at, uniform = tokens[rows], mask[rows], at[rows], uniform[rows]
            alive = [alive[place] for place in kept]
        mask, at = torch.cat([mask, torch.ones_like(mask[:, :1])], -1), at + 1
        with policy.autocast():
            out = model(
                input_ids=tokens[:, None], attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=True
            )
        logits = out.logits[:, -1]
