"""Decoding: the logits of the next token for a batch of completions, one token after the other, with a KV cache.

Each distinct prompt of a batch is computed once. There are two decoders:

- `SharedPrompts`, for models whose responses share their prompt in training: all completions of a prompt read one copy
  of its keys and values. The cache has fixed places, so a GPU records the kernels of a step once and repeats them.
- `CopiedPrompts`, for all others: the model's own attention over a copy of the prompt's cache for each completion.

Shapes: n slots, one for each completion, of P prompts with K completions each. Prompts have T slots, answers have S.
H heads of queries and G of keys, of size D.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import isnan
from typing import NamedTuple, Protocol

import torch
from bitsandbytes.nn import Linear8bitLt
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from worker.trainer.distributed import is_peer_loss
from worker.trainer.errors import UserError, first_line
from worker.trainer.events import Events
from worker.trainer.hardware import recorded, without_collisions
from worker.trainer.linears import has_experts
from worker.trainer.logps import Head
from worker.trainer.model import Policy
from worker.trainer.ranks import Ranks

Prompt = tuple[int, ...]
"""The ids of a prompt's tokens."""
ANSWER_TOKENS = 128
"""The cache of the answers grows by so many tokens at a time."""
ERROR, ERROR_IN_16_BITS = 1e-4, 0.015
"""Allowed norm of the difference to the model's own log-probs, relative to their norm. A right one has half of it."""
GROSS_ERROR = 0.2
"""The error from which on answers are not those of the model."""
CHECKED_TOKENS, CHECKED_ANSWER = 4096, 3
"""Longer prompts are not checked, nor more tokens of an answer."""


class Decoder(Protocol):
    """Computes the logits of a batch token by token.

    `active` [n]: the number of each slot's completion in the batch; −1 for a slot without one. `logits` [n, V]: of the
    next token.
    """

    active: list[int]
    logits: Tensor

    def step(self, tokens: Tensor) -> None:
        """Append `tokens` [n], one to each slot, and compute the next logits."""

    def keep(self, slots: Sequence[int]) -> Tensor:
        """Keep these slots alone. Returns the old slot of each new one, [n]. The logits become stale."""


def begin(policy: Policy, prompts: Sequence[Prompt]) -> Decoder:
    """The fastest decoder that `policy` allows. `prompts`: that of each completion of the batch."""
    shared = policy.shared and not policy.own_logits
    return SharedPrompts(policy, prompts) if shared else CopiedPrompts(policy, prompts)


class CopiedPrompts:
    """The decoder with the model's own attention, over a copy of its prompt's cache for each completion."""

    def __init__(self, policy: Policy, prompts: Sequence[Prompt]) -> None:
        self._policy = policy
        policy.groups.use(False)
        distinct = list(dict.fromkeys(prompts))
        cache = DynamicCache(config=policy.causal.config.get_text_config())
        # The prompts are padded on the left to T tokens. The mask hides the padding, so its token is arbitrary.
        padding = [max(map(len, distinct)) - len(prompt) for prompt in distinct]
        padded = [[prompt[0]] * count + list(prompt) for prompt, count in zip(distinct, padding, strict=True)]
        ids = torch.tensor(padded, device=policy.device)  # (P, T)
        mask = (torch.arange(ids.shape[1]) >= torch.tensor(padding)[:, None]).long().to(policy.device)  # (P, T)
        with policy.own_attention_in_use(), policy.autocast():
            output = policy.causal(
                input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                past_key_values=cache, use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        logits = output.logits[:, -1]
        index = torch.tensor([distinct.index(prompt) for prompt in prompts], device=policy.device)  # (n,)
        cache.batch_select_indices(index)
        self._cache, self.logits, self._mask = cache, logits[index], mask[index]  # mask (n, T + answer)
        self._position = self._mask.sum(-1, keepdim=True) - 1  # of the last token, (n, 1)
        self.active = list(range(len(prompts)))

    def step(self, tokens: Tensor) -> None:
        """Append `tokens` [n], and compute the next logits."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], -1)
        self._position = self._position + 1
        with self._policy.own_attention_in_use(), self._policy.autocast():
            output = self._policy.causal(
                input_ids=tokens[:, None], attention_mask=self._mask, position_ids=self._position,
                past_key_values=self._cache, use_cache=True,
            )  # fmt: skip
        self.logits = output.logits[:, -1]

    def keep(self, slots: Sequence[int]) -> Tensor:
        """Keep these slots alone. Returns them."""
        kept = torch.tensor(slots, device=self._policy.device)
        self._cache.batch_select_indices(kept)
        self._mask, self._position = self._mask[kept], self._position[kept]
        self.active = [self.active[slot] for slot in slots]
        return kept


class SharedPrompts:
    """The decoder with one copy of each prompt's keys and values.

    Slot p · K + k belongs to prompt p. A query of it sees the prompt and its own answer, in one softmax over both.
    """

    def __init__(self, policy: Policy, prompts: Sequence[Prompt]) -> None:
        self._policy = policy
        distinct = list(dict.fromkeys(prompts))
        # 1. Compute the prompts, with the model's own attention. They are padded on the right: no token sees what is
        # behind it. Without a configuration, layers with a sliding window keep all tokens too.
        cache = DynamicCache()
        policy.groups.use(False)
        lengths = torch.tensor([len(prompt) for prompt in distinct], device=policy.device)
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in distinct], batch_first=True)
        with policy.own_attention_in_use(), policy.autocast():
            hidden = policy.body(input_ids=ids.to(policy.device), past_key_values=cache, use_cache=True)[0]  # (P, T, H)
        logits = _logits(policy, hidden[torch.arange(len(distinct)), lengths - 1])
        # 2. Arrange the completions.
        groups = [[number for number, prompt in enumerate(prompts) if prompt == other] for other in distinct]
        rows, self.active = _arrange(groups)
        index = torch.tensor(rows, device=policy.device)  # (P,)
        self._lengths = lengths[index]  # (P,)
        self.logits = logits[index].repeat_interleave(len(self.active) // len(rows), 0)
        # 3. The cache: the prompts', and an empty one for the answers.
        self._place = _Place(torch.zeros(1, dtype=torch.long, device=policy.device))
        if rows != list(range(len(distinct))):
            cache.batch_select_indices(index)  # layer by layer
        self._layers = [_Layer(self._place, layer.keys, layer.values) for layer in cache.layers]
        self._cache = Cache(layers=list(self._layers))
        self._hidden = dict[int | None, Tensor]()
        # Experts and int8 choose their kernels by the numbers that they compute with.
        waits = has_experts(policy.causal) or any(isinstance(part, Linear8bitLt) for part in policy.causal.modules())
        self._can_be_recorded = not waits
        self._tokens, self._run = self._inputs()

    def step(self, tokens: Tensor) -> None:
        """Append `tokens` [n], and compute the next logits."""
        if self._place.steps == self._place.room:
            self._place.room += ANSWER_TOKENS
            for layer in self._layers:
                layer.grow()
            self._tokens, self._run = self._inputs()
        self._tokens.copy_(tokens)
        self.logits = self._run(self._compute)
        self._place.steps += 1

    def _inputs(self) -> tuple[Tensor, "_Run"]:
        """A new tensor for the tokens [n] of a step, and the run that reads it. The shapes of all tensors are new."""
        tokens = torch.zeros(len(self.active), dtype=torch.long, device=self._policy.device)
        return tokens, _Run(self._policy.device, can_be_recorded=self._can_be_recorded)

    def _compute(self) -> Tensor:
        """The logits [n, V] after `_tokens`. It must not depend on anything but tensors that keep their place."""
        self._hidden = {}
        self._place.returned.clear()
        samples = len(self.active) // len(self._lengths)  # K
        position = (self._lengths + self._place.index).repeat_interleave(samples)  # (n,)
        with self._policy.autocast():
            hidden = self._policy.body(
                input_ids=self._tokens[:, None],
                position_ids=position[:, None],
                attention_mask=None,
                past_key_values=self._cache,
                use_cache=True,
                tree=self,
            )[0]  # (n, 1, H)
        self._place.index += 1
        return _logits(self._policy, hidden[:, 0])

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        sliding_window: int | None,
        scaling: float | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """The attention of the queries [n, H, 1, D] of a layer: [n, H, 1, D].

        `key` is the tensor that a layer's cache has returned in this step. It says whose keys and values are meant,
        because some layers read those of another one. Raises `ValueError` for a layer that computes others from it.
        """
        if id(key) not in self._place.returned:
            raise ValueError("its attention reads other keys than it keeps")
        (_, layer), prompts = self._place.returned[id(key)], len(self._lengths)
        _, groups, room, width = layer.keys.shape
        samples, repeats = len(self.active) // prompts, query.shape[1] // groups  # K, R
        query = query.to(layer.keys.dtype).view(prompts, samples, groups, repeats, width)
        together = query.transpose(1, 2).flatten(2, 3)  # (P, G, K · R, D)
        # 1. Scores of the prompt's tokens and of the answer's own.
        ours = query.reshape(-1, groups, repeats, width) @ layer.keys.mT  # (n, G, R, S)
        shape = (prompts, groups, samples, repeats, -1)
        scores = torch.cat(
            [
                (together @ layer.prompt_keys.mT).view(shape),
                ours.view(prompts, samples, groups, repeats, room).transpose(1, 2),
            ],
            -1,
        )  # (P, G, K, R, T + S)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores * (width**-0.5 if scaling is None else scaling)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(self._hidden_keys(sliding_window), -torch.inf)
        if sinks is not None:  # one more key, without a value
            sink = sinks.to(scores.dtype).view(1, groups, 1, repeats, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sink], -1)
        weights = scores.softmax(-1).to(layer.values.dtype)
        # 2. The sum of values, of both parts.
        slots = layer.prompt_keys.shape[2]  # T
        of_prompt = weights[..., :slots].flatten(2, 3) @ layer.prompt_values  # (P, G, K · R, D)
        of_answer = weights[..., slots : slots + room].transpose(1, 2).reshape(-1, groups, repeats, room) @ layer.values
        attended = of_prompt.view(shape).transpose(1, 2) + of_answer.view(prompts, samples, groups, repeats, -1)
        return attended.reshape(len(self.active), groups * repeats, 1, -1)

    def _hidden_keys(self, sliding_window: int | None) -> Tensor:
        """Whether a query does not see a key, [P, 1, 1, 1, T + S]. All completions of a prompt are equally long."""
        if sliding_window not in self._hidden:
            lengths, slots = self._lengths[:, None], self._layers[0].prompt_keys.shape[2]
            prompt, answer = (torch.arange(size, device=lengths.device) for size in (slots, self._place.room))
            is_none = [prompt >= lengths, (answer > self._place.index).expand(len(lengths), -1)]
            hidden = torch.cat(is_none, 1)  # (P, T + S)
            if sliding_window is not None:
                positions = torch.cat([prompt.expand(len(lengths), -1), lengths + answer], 1)
                hidden = hidden | (positions <= lengths + self._place.index - sliding_window)
            self._hidden[sliding_window] = hidden[:, None, None, None]
        return self._hidden[sliding_window]

    def keep(self, slots: Sequence[int]) -> Tensor:
        """Keep these slots. Returns the old slot of each new one; some of the new ones may have no completion."""
        samples = len(self.active) // len(self._lengths)
        rows, places = _arrange(
            [[slot for slot in slots if slot // samples == row] for row in range(len(self._lengths))]
        )
        device = self._policy.device
        kept, index = torch.tensor(places, device=device).clamp(min=0), torch.tensor(rows, device=device)
        self.active = [-1 if place < 0 else self.active[place] for place in places]
        self._lengths = self._lengths[index]
        for layer in self._layers:
            layer.keep(kept, index)
        self._tokens, self._run = self._inputs()
        return kept


class _Run:
    """A computation with tensors of the same shapes. A GPU records it the second time, and then repeats its kernels.

    The first time makes what is made only once.
    """

    def __init__(self, device: torch.device, *, can_be_recorded: bool) -> None:
        self._device, self._can_be_recorded, self._times = device, can_be_recorded, 0
        self._recorded: Callable[[], Tensor] | None = None

    def __call__(self, compute: Callable[[], Tensor]) -> Tensor:
        if self._times == 1 and self._can_be_recorded:
            with suppress(RuntimeError):  # what cannot be recorded is computed each time
                self._recorded = recorded(compute, self._device)
        self._times += 1
        return compute() if self._recorded is None else self._recorded()


@dataclass
class _Place:
    """Where a step writes. The layers share it, and not the decoder, so that nothing refers to itself."""

    index: Tensor
    """The number of the step's token within the answers, [1]."""
    steps: int = 0
    """The same number, on the CPU."""
    room: int = field(default_factory=lambda: ANSWER_TOKENS)
    """S: the tokens of an answer that have a place now."""
    returned: dict[int, tuple[Tensor, "_Layer"]] = field(default_factory=dict)
    """The keys that layers have returned in this step, and the layers, by the ids of the keys."""


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """The keys and values of a layer: of the prompts [P, G, T, D], and of the answers [n, G, S, D]."""

    is_sliding = is_compileable = False

    def __init__(self, place: _Place, prompt_keys: Tensor, prompt_values: Tensor) -> None:
        super().__init__()
        self._place = place
        self.prompt_keys, self.prompt_values = prompt_keys, prompt_values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make an empty cache for answers."""
        self.keys, self.values = (
            part.new_zeros(*part.shape[:2], self._place.room, part.shape[3]) for part in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Take the keys and values [n, G, 1, D] of a step. `SharedPrompts.attend` reads them here."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        with without_collisions():
            self.keys.index_copy_(2, self._place.index, key_states)
            self.values.index_copy_(2, self._place.index, value_states)
        self._place.returned[id(key_states)] = key_states, self
        return key_states, value_states

    def grow(self) -> None:
        """Make place for longer answers."""
        self.keys, self.values = (
            torch.cat([part, part.new_zeros(*part.shape[:2], ANSWER_TOKENS, part.shape[3])], 2)
            for part in (self.keys, self.values)
        )

    def keep(self, slots: Tensor, prompts: Tensor) -> None:
        """Keep these slots [n] and these prompts [P]."""
        self.prompt_keys, self.prompt_values = self.prompt_keys[prompts], self.prompt_values[prompts]
        if self.is_initialized:
            self.keys, self.values = self.keys[slots], self.values[slots]

    def get_seq_length(self) -> int:
        """Number of the answers' tokens. Models ask for it where they get no positions."""
        return self._place.steps

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Not used: the mask is `SharedPrompts._hidden_keys`."""
        raise NotImplementedError

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1


def _arrange(groups: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """`groups` as the rows of a table with few rows and few empty places. A large group may take several rows.

    Returns the group of each row, and the places of all rows, −1 for an empty one.
    """
    sizes = [len(group) for group in groups if group]

    def cost(width: int) -> int:  # a place computes a token, and a row reads a prompt
        return sum(-(-size // width) * (width + 1) for size in sizes)

    width = min(sorted(set(sizes), reverse=True), key=cost)
    rows, table = list[int](), list[int]()
    for number, group in enumerate(groups):
        for start in range(0, len(group), width):
            part = group[start : start + width]
            rows.append(number)
            table += [*part, *[-1] * (width - len(part))]
    return rows, table


def _logits(policy: Policy, hidden: Tensor) -> Tensor:
    """The logits [n, V] of the last hidden states [n, H], as training computes them."""
    return Head.of(policy.causal).logits(hidden, torch.promote_types(hidden.dtype, torch.float32))


@torch.no_grad()
def check(policy: Policy, prompts: Sequence[Prompt], max_tokens: int, events: Events | None, ranks: Ranks) -> None:
    """Let `policy` copy its prompts, with a warning, if shared ones give other logits than the model's own pass.

    Raises `UserError` if copied ones do too.

    Compares the logits behind the shortest and the longest of `prompts`, each alone and followed by some tokens.
    """
    if not policy.shared or policy.own_logits:
        _require_copies(policy, prompts, max_tokens, events, ranks)
        return
    own = ERROR if policy.autocast_dtype is None else ERROR_IN_16_BITS
    error = _worst(policy, prompts, max_tokens, ranks)
    reason = error.reason or ("" if error.size <= own else f"its log-probs have an error of {error.size:.2g}")
    if reason:
        policy.shared = False
        _require_copies(policy, prompts, max_tokens, events, ranks)
        if events is not None:
            events.message(f"The completions of a prompt do not share its cache: {reason}.", level="warn")


def _require_copies(
    policy: Policy, prompts: Sequence[Prompt], max_tokens: int, events: Events | None, ranks: Ranks
) -> None:
    """Raise `UserError` if copied prompts give other logits: then the cache of the model is of an unknown kind.

    Warn of smaller errors. Models whose rows depend on each other, such as those in int8, have some.
    """
    error = _worst(policy, prompts, max_tokens, ranks)
    if error.reason or not error.size <= GROSS_ERROR:
        reason = error.reason or f"the log-probs of its cache have an error of {error.size:.2g}"
        raise UserError("unsupported_model", f"'{policy.name}' cannot write answers here: {reason}.", "model")
    if error.size > ERROR_IN_16_BITS and events is not None:
        message = f"The log-probs of written answers differ by {error.size:.2g} from those of the model's own pass."
        events.message(message, level="warn")


class _Error(NamedTuple):
    """How wrong a decoder is: the relative error of its log-probs, or the `reason` why it has none."""

    size: float
    reason: str = ""


def _worst(policy: Policy, prompts: Sequence[Prompt], max_tokens: int, ranks: Ranks) -> _Error:
    """The worst error of the decoder of `policy` on any of the `ranks`."""
    errors = ranks.gather(_error(policy, prompts, min(CHECKED_ANSWER, max_tokens)))
    return max(errors, key=lambda error: (bool(error.reason), isnan(error.size), error.size))


def _error(policy: Policy, prompts: Sequence[Prompt], count: int) -> _Error:
    """The error of the decoder of `policy` behind some prompts, and behind answers of `count` tokens.

    A model that takes one text decodes one.
    """
    shortest = min(prompts, key=len)
    longest = max((prompt for prompt in prompts if len(prompt) <= CHECKED_TOKENS), key=len, default=shortest)
    texts = [shortest, shortest, longest]
    ids = [texts[0][:1] * count, texts[1][-1:] * count, texts[2][-1:] * count]
    answers = torch.tensor(ids, device=policy.device)  # (3, count)
    try:
        if policy.one_by_one:
            parts = zip(texts, answers, strict=True)
            ours = torch.cat([_logps(begin(policy, [text]), answer[None]) for text, answer in parts])
        else:
            ours = _logps(begin(policy, texts), answers)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if is_peer_loss(error):
            raise
        return _Error(0.0, first_line(error))
    own = list[Tensor]()
    with policy.own_attention_in_use():
        for text, answer in zip(texts, answers.tolist(), strict=True):
            logits = policy.logits(torch.tensor([*text, *answer], device=policy.device))
            own.append(logits[len(text) - 1 :].double().log_softmax(-1))  # (count + 1, V)
    theirs = torch.stack(own)  # (3, count + 1, V)
    return _Error(float((ours - theirs).norm() / theirs.norm()))


def _logps(decoder: Decoder, answers: Tensor) -> Tensor:
    """The log-probs of all tokens behind each prompt, and behind each token of its answer [n, c]: [n, c + 1, V]."""
    slots = torch.tensor([decoder.active.index(number) for number in range(len(answers))], device=answers.device)
    numbers = torch.tensor(decoder.active, device=answers.device).clamp(min=0)
    logits = [decoder.logits[slots]]
    for step in range(answers.shape[1]):
        decoder.step(answers[numbers, step])
        logits.append(decoder.logits[slots])
    return torch.stack(logits, 1).double().log_softmax(-1)
