"""The policy: a base model, quantised or not, of which a LoRA adapter or all parameters are trained.

Shapes: B sequences of T tokens, hidden size H, vocabulary V. A pack has N scored tokens, L distinct responses and R
responses of rows (see `packing.Pack`).
"""

import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from worker.trainer.attention import TREE_ATTENTION, keep_trees_uncompiled, padding_mask, sliding_windows
from worker.trainer.data import Row
from worker.trainer.extended import Groups
from worker.trainer.fully_sharded import Root, whole
from worker.trainer.gradients import SegmentGradients
from worker.trainer.hardware import configure_compiler
from worker.trainer.layers import layer_names
from worker.trainer.linears import body
from worker.trainer.logps import Head, TokenScores, score_logits, score_tokens
from worker.trainer.lora import RewardHead
from worker.trainer.masks import TreeMask
from worker.trainer.packing import Pack, Packing, Segment
from worker.trainer.progress import progress
from worker.trainer.ranks import Ranks
from worker.trainer.shards import Shards
from worker.trainer.tokenizer import copy_tokenizer, write_ends

Result = TypeVar("Result")
REWARD_HEAD = "reward_head.safetensors"
HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The 16-bit dtypes by their names in jobs and merges."""


@dataclass(frozen=True)
class Base:
    """A base model.

    `name`: as written into artifacts. `revision`: on a hub, for PEFT to load; None elsewhere. `version`: as registered
    by the worker. `folder`: where its files are.
    """

    name: str
    revision: str | None
    version: str | None
    folder: Path


@dataclass(frozen=True)
class Scores:
    """Scores of one pack: of its N scored tokens, and their sums for each response of its rows, [R]."""

    tokens: TokenScores
    responses: Tensor


@dataclass
class Policy:
    """The model in training, and how it computes log-probabilities.

    The model keeps the training mode that `loading` sets. Only the adapter's dropout is switched. `packing` and the
    fields from `one_by_one` to `autocast_dtype` say how log-probs are computed.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: Tokenizer
    name: str
    revision: str | None
    full: bool
    device: torch.device
    packing: Packing
    own_attention: str
    """The name of the attention implementation that the model was loaded with."""
    folder: Path
    """The folder of the base model. Its tokenizer and configuration are copied into artifacts."""
    ends: tuple[int, ...]
    """The ids of the tokens that end an answer in the job's texts."""
    one_by_one: bool = False
    """Without shared prompts, run one text at a time: in a padded batch the texts would change each other."""
    own_logits: bool = False
    """Use the logits of the model's own `forward`: it does more to them than `Head` knows."""
    room: int | None = None
    """The most tokens of a launch on this device, once it has run out of memory."""
    joins: bool = True
    """Whether a pack of a step may hold several segments: joined, they must have the gradients that they have alone."""
    autocast_dtype: torch.dtype | None = None
    """The dtype of autocast; None computes in the dtypes of the weights."""
    loss_scale: float = 1.0
    """The factor of the current loss, one of `loss_scales`."""
    reward_head: RewardHead | None = None
    """The head of a reward model."""
    value_head: RewardHead | None = None
    """Estimates what is still to come of an answer's reward (PPO). It is no part of the artifact."""
    segment_gradients: SegmentGradients = field(default_factory=SegmentGradients)
    """Keeps the gradients of a pack's segments apart."""
    groups: Groups = field(default_factory=Groups)
    """The layers that compute their adapters within their products, in packs."""
    shards: Shards = field(default_factory=Shards)
    """The shards of a frozen base of which each rank has only a part."""
    root: Root | None = None
    """Computes for a model that is trained in full, if each rank has only a part of it."""
    _dropout: list[nn.Dropout] = field(default_factory=list)

    @property
    def causal(self) -> PreTrainedModel:
        """The transformers model inside PEFT's, with its head."""
        return self.model if self.full else self.model.get_base_model()

    @property
    def body(self) -> PreTrainedModel:
        """The transformers model without its head."""
        return body(self.causal)

    @property
    def launch_tokens(self) -> int:
        """The size in tokens that a launch should not exceed. It may differ between ranks; the packing must not."""
        return min(self.room or self.packing.budget, self.packing.budget)

    @property
    def shared(self) -> bool:
        """Whether responses share their prompt. Setting it also switches the attention implementation."""
        return self.packing.shared

    @shared.setter
    def shared(self, shared: bool) -> None:
        self.packing = replace(self.packing, shared=shared)
        self.causal.set_attn_implementation(TREE_ATTENTION if shared else self.own_attention)

    @property
    def blocks(self) -> bool:
        """Whether a kernel computes the attention of a whole pack, with masks in blocks; else tree by tree."""
        return bool(self.packing.windows)

    @blocks.setter
    def blocks(self, blocks: bool) -> None:
        windows = sliding_windows(self.causal) if blocks else set()
        self.packing = replace(self.packing, windows=tuple(sorted(windows, key=lambda window: window or 0)))

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name, the weights of heads included."""
        parameters = self.model.named_parameters()
        trained = {name: parameter for name, parameter in parameters if parameter.requires_grad}
        heads = {"reward_head.weight": self.reward_head, "value_head.weight": self.value_head}
        return trained | {name: head.weight for name, head in heads.items() if head is not None}

    @property
    def has_dropout(self) -> bool:
        """Whether the adapter has dropout layers."""
        return bool(self._dropout)

    def set_dropout(self, on: bool) -> None:
        """Switch the adapter's dropout. The base model's own dropout is always off."""
        for module in self._dropout:
            module.train(on)

    @property
    def recomputes_activations(self) -> bool:
        """Whether the backward pass recomputes the activations of each layer."""
        return any(module.gradient_checkpointing for module in self._recomputable)

    @property
    def can_recompute(self) -> bool:
        """Whether the model has layers that can be recomputed."""
        return bool(self.causal.supports_gradient_checkpointing and self._recomputable)

    def recompute_activations(self, on: bool) -> None:
        """Switch activation checkpointing: keep only the input of each layer and recompute it in the backward pass.

        It sets what transformers' layers read in all versions. The methods of models that set it change their names.
        """
        for module in self._recomputable if self.can_recompute else ():
            module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
            module.gradient_checkpointing = on

    @property
    def _recomputable(self) -> list[Any]:
        return [module for module in self.causal.modules() if hasattr(module, "gradient_checkpointing")]

    @property
    def compiled(self) -> bool:
        """Whether layers are compiled. Setting it compiles each when it first runs, or lets them run uncompiled.

        Shapes are dynamic, because packs have many widths.
        """
        return any(layer._compiled_call_impl is not None for layer in self._layers)

    @compiled.setter
    def compiled(self, compiled: bool) -> None:
        if compiled:
            configure_compiler()
            keep_trees_uncompiled()
        for layer in self._layers:
            layer._compiled_call_impl = None
            if compiled:
                layer.compile(dynamic=True)

    @contextmanager
    def plain_layers(self) -> Iterator[None]:
        """Within this context layers can sample: they neither recompute activations, without a cache, nor are compiled.

        Their compiled functions are kept.
        """
        recomputes, compiled = self.recomputes_activations, [layer._compiled_call_impl for layer in self._layers]
        self.recompute_activations(False)
        self.compiled = False
        try:
            yield
        finally:
            self.recompute_activations(recomputes)
            for layer, function in zip(self._layers, compiled, strict=True):
                layer._compiled_call_impl = function

    @property
    def _layers(self) -> list[nn.Module]:
        return [self.causal.get_submodule(name) for name in layer_names(self.causal)]

    def segments(self, rows: Sequence[Row], numbers: Sequence[int], *, merge: bool = True) -> Iterator[Segment]:
        """The rows `numbers` as segments. `merge`: rows with the same prompt may share it."""
        return replace(self.packing, merge=merge).segments(rows, numbers)

    def packs(self, rows: Sequence[Row], numbers: Sequence[int], *, merge: bool = True) -> Iterator[Pack]:
        """The rows `numbers` in packs of the budget's tokens, built one at a time, on the policy's device."""
        for pack in replace(self.packing, merge=merge).packs(rows, numbers):
            progress.mark()
            yield pack.to(self.device)

    def score(
        self,
        pack: Pack,
        *,
        entropy: bool = False,
        alignment: bool = False,
        values: bool = False,
        tail_weight: float | None = None,
    ) -> Scores:
        """The log-probs of all scored tokens of `pack`, which is on the policy's device, in one forward pass.

        With `tail_weight` (LD-DPO) the tokens of a response beyond the length of its row's shortest response count
        with this weight in `Scores.responses`. The pack must then have no merged rows. `values`: also compute those of
        the value head.
        """
        # FSDP looks for tensors in tuples and dictionaries.
        tokens = TokenScores(**self._compute(lambda: vars(self._token_scores(pack, entropy, alignment, values))))
        logps = tokens.logps
        if tail_weight is not None:
            # The tokens of the tail, by their number within the response.
            logps = torch.where(pack.order < shortest_lengths(pack)[pack.leaf], logps, tail_weight * logps)
        return Scores(tokens, per_response(pack, logps))

    def outcome(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """(log-probs or rewards of the responses of `pack` [R], a sum whose gradient reaches all that is trained)."""
        if self.reward_head is not None:
            rewards = self.rewards(pack)
            return rewards, rewards.sum()
        scores = self.score(pack, values=self.value_head is not None)
        total = scores.responses.sum()
        return scores.responses, total if scores.tokens.values is None else total + scores.tokens.values.sum()

    def rewards(self, pack: Pack) -> Tensor:
        """The reward of each response of each row of `pack`, [R], float32 or wider: the head at its last token."""
        return self._compute(lambda: self._rewards(pack))

    def _compute(self, compute: Callable[[], Result]) -> Result:
        """The result of `compute`, which uses the model's weights."""
        result: Result = compute() if self.root is None else self.root(compute)
        return result

    def _token_scores(self, pack: Pack, entropy: bool, alignment: bool, values: bool) -> TokenScores:
        if self.own_logits:
            return score_logits(self._own_logits(pack), pack.targets, entropy=entropy, alignment=alignment)
        states = self._hidden(pack).flatten(0, 1)  # (B · T, H)
        hidden = states.index_select(0, pack.predictors)  # (N, H)
        self.shards.gather_head()
        scores = score_tokens(hidden, Head.of(self.causal), pack.targets, entropy=entropy, alignment=alignment)
        if not values:
            return scores
        assert self.value_head is not None
        values_of_slots = self.value_head(states)  # of all slots: by them its gradients of segments are kept apart
        return replace(scores, values=values_of_slots.index_select(0, pack.predictors))

    def _rewards(self, pack: Pack) -> Tensor:
        assert self.reward_head is not None
        last = self._hidden(pack).flatten(0, 1).index_select(0, pack.last[pack.leaves])  # (R, H)
        self.shards.gather_head()  # unused, but so every pass has the same order
        rewards: Tensor = self.reward_head(last)
        return rewards

    def _hidden(self, pack: Pack) -> Tensor:
        """The last hidden states, [B, T, H]."""
        if self.shared:
            return self._forward(pack.ids, position_ids=pack.positions, attention_mask=None, tree=pack.mask)
        padding = padding_mask(pack)
        if not self.one_by_one:
            return self._forward(pack.ids, attention_mask=padding)
        width = pack.ids.shape[1]
        lengths = padding.sum(1).tolist()  # tokens of each text, [B]
        states = [self._forward(ids[None, :length]) for ids, length in zip(pack.ids, lengths, strict=True)]
        return torch.cat([nn.functional.pad(state, (0, 0, 0, width - state.shape[1])) for state in states])

    def _forward(self, ids: Tensor, **options: Tensor | TreeMask | None) -> Tensor:
        """The last hidden states of `ids` [B, T]: [B, T, H]."""
        self.groups.use(self.shared)
        with self.autocast():
            states: Tensor = self.body(input_ids=ids, use_cache=False, **options).last_hidden_state
        return states

    def _own_logits(self, pack: Pack) -> Tensor:
        """The model's own logits for each scored token, [N, V], computed one text at a time."""
        width, logits, indices = pack.ids.shape[1], [], []
        for number, (ids, length) in enumerate(zip(pack.ids, padding_mask(pack).sum(1).tolist(), strict=True)):
            (scored,) = torch.where(pack.predictors // width == number)  # the scored tokens of this text
            logits.append(self._logits(ids[:length])[pack.predictors[scored] % width])
            indices.append(scored)
        return torch.cat(logits)[torch.cat(indices).argsort()]  # in the order of the pack

    def logits(self, ids: Tensor) -> Tensor:
        """The logits of the model's own `forward` for the tokens `ids` [T] of one text: [T, V]."""
        return self._compute(lambda: self._logits(ids))

    def _logits(self, ids: Tensor) -> Tensor:
        self.groups.use(False)
        with self.autocast():
            logits: Tensor = self.causal(input_ids=ids[None], use_cache=False).logits
        return logits[0]

    def autocast(self) -> torch.autocast:
        """The autocast context of all forward passes."""
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    @property
    def loss_scales(self) -> tuple[float, ...]:
        """Factors for the loss, to be tried until no gradient overflows (loss scaling, Micikevicius et al. 2018).

        Without a factor, float16 gradients below 6e-8 would become zero.
        """
        return (2.0**14, 2.0**9, 2.0**4, 1.0) if self.autocast_dtype == torch.float16 else (1.0,)

    @contextmanager
    def own_attention_in_use(self) -> Iterator[None]:
        """Within this context the model uses its own attention implementation."""
        current = self.causal.config._attn_implementation
        if current == self.own_attention:
            yield
            return
        self.causal.set_attn_implementation(self.own_attention)
        try:
            yield
        finally:
            self.causal.set_attn_implementation(current)

    def digest(self) -> str:
        """A hash of the configuration and of all weights, as a cache key for results computed from them.

        A fresh adapter changes nothing and is left out: jobs with other ranks and seeds share their reference. To be
        called by all ranks if the model is divided among them.
        """
        config = self.causal.config.to_dict() | {"_attn_implementation": self.own_attention, "_name_or_path": None}
        digest = hashlib.sha256(json.dumps([config, self.groups.columns], sort_keys=True, default=str).encode())
        blank = not self.full and self._adapter_is_blank()
        if not self.full and not blank:
            adapter = self.model.peft_config["default"].to_dict() | {"base_model_name_or_path": None}
            digest.update(json.dumps(adapter, sort_keys=True, default=sorted).encode())
        for name, tensor in _all_weights(self.model, self.shards):
            if not (blank and "lora_" in name):
                tensor = whole(tensor)
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + fingerprint(tensor))
        return digest.hexdigest()

    def _adapter_is_blank(self) -> bool:
        """Whether the adapter is a fresh LoRA: B is zero, which adds nothing. DoRA rescales even with zero B."""
        parameters = dict(self.model.named_parameters())
        dora = any("lora_magnitude_vector" in name for name in parameters)
        return not dora and not any(
            weight.any() for name, weight in parameters.items() if "lora_B" in name or "lora_embedding_B" in name
        )

    def free_model(self) -> None:
        """Free the memory of the model. Only the other fields can be used afterwards."""
        del self.model
        self.root, self.shards, self.segment_gradients, self.groups = None, Shards(), SegmentGradients(), Groups()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def is_divided(self) -> bool:
        """Whether ranks must compute together, because each has only a part of the model."""
        return bool(self.shards) or self.root is not None

    def gathered(self, ranks: Ranks, dtype: torch.dtype | None = None) -> dict[str, Tensor] | None:
        """The whole weights of a divided model that is trained in full, for `save`, on the CPU; else None.

        All `ranks` must call it. Only the first one gets values. `dtype`: that of the weights, by default their own.
        """
        if self.root is None:
            return None
        weights = self.causal.state_dict(keep_vars=True)
        if self.reward_head is not None:
            weights["reward_head.weight"] = self.reward_head.weight
        gathered: dict[int, Tensor] = {}  # by the id of a parameter, because tied weights are one
        for parameter in weights.values():
            if id(parameter) not in gathered:
                values = whole(parameter.detach())
                values = values.cpu() if ranks.is_first else values[:0].clone()
                gathered[id(parameter)] = values.to(dtype) if values.is_floating_point() else values
        return {name: gathered[id(parameter)] for name, parameter in weights.items()}

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write the adapter (PEFT) or the whole model (transformers) into `folder`, with the base's tokenizer.

        `weights`: those of a divided model, which was gathered.
        """
        folder.mkdir(parents=True, exist_ok=True)
        head = None if self.reward_head is None else self.reward_head.weight.detach()
        if weights is not None:
            head = weights.pop("reward_head.weight", None)
        if self.full:
            with self.own_attention_in_use():
                self.model.save_pretrained(folder, state_dict=weights)
            # Keep the base's config.json: another version of transformers may not know the names that this one writes.
            written, own = (json.loads((path / "config.json").read_text()) for path in (folder, self.folder))
            own.pop("torch_dtype", None)
            if weights is not None:  # the model in memory has another dtype
                dtypes = {values.dtype for values in weights.values() if values.is_floating_point()}
                written["dtype"] = str(max(dtypes, key=str)).removeprefix("torch.")
                (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
            # The types differ if only the text part of a multimodal base was loaded. Its config.json does not fit then.
            if written["model_type"] == own["model_type"]:
                (folder / "config.json").write_text(json.dumps(own | {"dtype": written["dtype"]}, indent=2) + "\n")
        else:
            # The default, "auto", would look up the base model on the hub. Head and embeddings are frozen anyway.
            self.model.save_pretrained(folder, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)
            config = folder / "adapter_config.json"
            settings = json.loads(config.read_text())
            settings |= {"base_model_name_or_path": self.name, "revision": self.revision}
            if isinstance(settings["target_modules"], list):  # PEFT keeps a set, whose order varies
                settings["target_modules"].sort()
            config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        if head is not None:
            save_file({"weight": head}, folder / REWARD_HEAD)
        copy_tokenizer(self.folder, folder)
        write_ends(self.folder, folder, self.ends)


def shortest_lengths(pack: Pack) -> Tensor:
    """For each response of a pack, the number of scored tokens of its row's shortest response, [L].

    The pack must have no merged rows: then each response belongs to one row, and L = R.
    """
    least = torch.full((len(pack.rows),), torch.iinfo(torch.int64).max, device=pack.lengths.device)
    least = least.scatter_reduce(0, pack.row_of, pack.lengths[pack.leaves], "amin")  # (rows,)
    return torch.zeros_like(pack.lengths).index_copy(0, pack.leaves, least[pack.row_of])


def per_response(pack: Pack, values: Tensor) -> Tensor:
    """The sum of the tokens' `values` [N] for each response of each row of `pack`, [R]."""
    sums = torch.zeros(len(pack.lengths), dtype=values.dtype, device=values.device)  # (L,)
    return sums.index_add(0, pack.leaf, values)[pack.leaves]


def _all_weights(model: nn.Module, shards: Shards) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and the scales that quantised layers keep outside of both. `shards` gather them."""
    for name, parameter in model.named_parameters():
        shards.gather_parameter(parameter)
        yield name, parameter
    yield from model.named_buffers()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        quant_state = getattr(weight, "quant_state", None)  # of a 4-bit weight
        if quant_state is not None:
            shards.gather(module)
        scales = dict(quant_state.as_dict(packed=True)) if quant_state else {}
        for holder in (weight, getattr(module, "state", None)):  # int8 scales move to `state` in the first pass
            int8_scales = getattr(holder, "SCB", None)
            if isinstance(int8_scales, Tensor):
                scales["SCB"] = int8_scales
        yield from ((f"{name}.{key}", value) for key, value in scales.items() if isinstance(value, Tensor))


def fingerprint(tensor: Tensor) -> bytes:
    """A fingerprint of the bits of `tensor`: the bytes themselves on a CPU, a checksum on a GPU.

    The checksum is two sums over 32-bit words, one of them weighted by their index. It avoids a copy to the CPU.
    """
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    if data.device.type == "cpu":
        return data.numpy().tobytes()
    sums = torch.zeros(2, dtype=torch.int64, device=data.device)  # integer overflow wraps, exactly
    for number, start in enumerate(range(0, len(data), 1 << 26)):
        words = data[start : start + (1 << 26)]
        words = nn.functional.pad(words, (0, -len(words) % 4)).view(torch.int32).long()
        indices = torch.arange(1, len(words) + 1, device=words.device)
        sums += (number + 1) * torch.stack([words.sum(), (words * indices).sum()])
    return str(sums.tolist()).encode()
