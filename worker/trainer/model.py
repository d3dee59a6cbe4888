"""The policy: a base model, quantised or not, with a LoRA adapter or all its parameters to train."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from worker.trainer.attention import NAME, TreeMask, padding_mask, windows
from worker.trainer.data import Row, Tokenizer
from worker.trainer.linears import body
from worker.trainer.logps import Head, TokenScores, score_logits, score_tokens
from worker.trainer.packing import Pack, Packing
from worker.trainer.tokenizer import copy_tokenizer, write_ends

REWARD_HEAD = "reward_head.safetensors"
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The precisions of 16 bits by the names that a job and a merge have for them."""


@dataclass(frozen=True)
class Base:
    """A base model: the name that artifacts carry, its revision where a hub has one (peft loads by it), the version
    that the worker registered, and its folder here."""

    name: str
    revision: str | None
    version: str | None
    folder: Path


@dataclass(frozen=True)
class Scores:
    """Of one pack: its N scored tokens, and for each of its rows' R responses the sums over the tokens, [R]."""

    tokens: TokenScores
    responses: Tensor


@dataclass
class Policy:
    """The model in training, and how to ask it for log-probabilities.

    The model's mode stays as it was loaded (see `loading`): only the adapter's dropout is switched. `reward_head` is
    there where a reward model is trained; `one_by_one` where even the longest text of a padded batch would change the
    others; `own_head` where the model does more to its logits than `Head` knows of, so that it makes them all itself.
    """

    model: Any
    tokenizer: Tokenizer
    name: str
    revision: str | None
    full: bool
    device: torch.device
    packing: Packing
    own_attention: str
    folder: Path
    """Where the base model is: its own files go with what is made of it."""
    ends: tuple[int, ...]
    """The tokens that end an answer, as the job's texts are written."""
    one_by_one: bool = False
    own_head: bool = False
    compiled: bool = False
    computed_in: torch.dtype | None = None
    """The precision of autocast; None: everything is in the weights' own."""
    loss_scale: float = 1.0
    reward_head: nn.Linear | None = None
    _dropout: list[nn.Dropout] = field(default_factory=list)

    @property
    def causal(self) -> Any:
        """The transformers model inside, head included."""
        return self.model if self.full else self.model.get_base_model()

    @property
    def body(self) -> Any:
        """The transformers model without its head."""
        return body(self.causal)

    @property
    def shared(self) -> bool:
        """Whether responses share their prompt."""
        return self.packing.shared

    @shared.setter
    def shared(self, shared: bool) -> None:
        self.packing = replace(self.packing, shared=shared)
        self.causal.set_attn_implementation(NAME if shared else self.own_attention)

    def trainable(self) -> dict[str, nn.Parameter]:
        found = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return found if self.reward_head is None else found | {"reward_head.weight": self.reward_head.weight}

    @property
    def has_dropout(self) -> bool:
        """Whether the adapter was made with dropout."""
        return bool(self._dropout)

    def set_dropout(self, on: bool) -> None:
        """Switch the adapter's dropout; the base model's own is always off."""
        for module in self._dropout:
            module.train(on)

    def recompute_activations(self, on: bool) -> None:
        """Activation checkpointing: keep each layer's input only, and run the layer again in the backward pass."""
        if on == bool(self.causal.is_activation_checkpointing):
            return
        if on:
            self.causal.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.causal.activation_checkpointing_disable()
        if getattr(self.causal, "_require_grads_hooks", None):
            self.causal.disable_input_require_grads()  # the reentrant kind needs them, this one does not

    def compile(self) -> None:
        """Compile each layer of the model when it first runs. On a CPU every pack has another width."""
        if self.compiled:
            return
        self.compiled = True
        lists = [m for m in self.body.modules() if isinstance(m, nn.ModuleList)]
        for layer in max(lists, key=len, default=nn.ModuleList()):
            layer.compile(dynamic=self.device.type == "cpu")

    def packs(self, rows: Sequence[Row], numbers: Sequence[int], *, merge: bool = True) -> Iterator[Pack]:
        """The rows `numbers`, in packs of at most the budget's tokens, one at a time, on the policy's device."""
        return (pack.to(self.device) for pack in replace(self.packing, merge=merge).packs(rows, numbers))

    def score(
        self, pack: Pack, *, entropy: bool = False, alignment: bool = False, tail_weight: float | None = None
    ) -> Scores:
        """One forward pass: the log-probs of everything that is scored in `pack`, which is on the policy's device.

        With `tail_weight` a response's tokens beyond the length of its row's shortest response count that much
        (LD-DPO); the pack must not have merged rows then.
        """
        if self.own_head:
            tokens = score_logits(self._own_logits(pack), pack.targets, entropy=entropy, alignment=alignment)
        else:
            hidden = self._hidden(pack).flatten(0, 1).index_select(0, pack.predictors)
            tokens = score_tokens(hidden, Head.of(self.causal), pack.targets, entropy=entropy, alignment=alignment)
        logps = tokens.logps
        if tail_weight is not None:
            logps = torch.where(pack.order < shortest(pack)[pack.leaf], logps, tail_weight * logps)
        return Scores(tokens, per_response(pack, logps))

    def rewards(self, pack: Pack) -> Tensor:
        """The reward model's scalar for each response of each row of `pack`, [R], float32 or wider."""
        assert self.reward_head is not None
        last = self._hidden(pack).flatten(0, 1).index_select(0, pack.last)
        return self.reward_head(last.to(self.reward_head.weight.dtype)).squeeze(1)[pack.leaves]  # type: ignore[no-any-return]

    def _hidden(self, pack: Pack) -> Tensor:
        """The last hidden states, [B, T, H]."""
        if self.shared:
            mask = TreeMask(pack)
            mask.prepare(windows(self.causal))
            return self._forward(pack.ids, position_ids=pack.positions, attention_mask=None, tree=mask)
        padding = padding_mask(pack)
        if not self.one_by_one:
            return self._forward(pack.ids, attention_mask=padding)
        width = pack.ids.shape[1]
        states = [self._forward(ids[None, :n]) for ids, n in zip(pack.ids, padding.sum(1).tolist(), strict=True)]
        return torch.cat([nn.functional.pad(each, (0, 0, 0, width - each.shape[1])) for each in states])

    def _forward(self, ids: Tensor, **options: Any) -> Tensor:
        with self.autocast():
            states: Tensor = self.body(input_ids=ids, use_cache=False, **options).last_hidden_state
        return states

    def _own_logits(self, pack: Pack) -> Tensor:
        """The model's own logits where a scored token is predicted, [N, V], one text at a time."""
        width, found, places = pack.ids.shape[1], [], []
        for number, (ids, length) in enumerate(zip(pack.ids, padding_mask(pack).sum(1).tolist(), strict=True)):
            (chosen,) = torch.where(pack.predictors // width == number)
            found.append(self.logits(ids[:length])[pack.predictors[chosen] % width])
            places.append(chosen)
        return torch.cat(found)[torch.cat(places).argsort()]

    def logits(self, ids: Tensor) -> Tensor:
        """The logits of the model as it is for one text's tokens `ids` [T]: [T, V]."""
        with self.autocast():
            logits: Tensor = self.causal(input_ids=ids[None], use_cache=False).logits
        return logits[0]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.computed_in, enabled=self.computed_in is not None)

    @property
    def loss_scales(self) -> tuple[float, ...]:
        """Factors of a loss for its backward pass, the first that overflows nothing counts (Micikevicius et al. 2018).

        Gradients of half precision vanish below 6e-8.
        """
        return (2.0**14, 2.0**9, 2.0**4, 1.0) if self.computed_in == torch.float16 else (1.0,)

    @contextmanager
    def own_attention_in_use(self) -> Iterator[None]:
        """The model with its own attention."""
        current = self.causal.config._attn_implementation
        self.causal.set_attn_implementation(self.own_attention)
        try:
            yield
        finally:
            self.causal.set_attn_implementation(current)

    def digest(self) -> str:
        """A hash of all weights and of the configuration, to name what was computed from them.

        An adapter that changes nothing yet is left out: jobs of other ranks and seeds have the same reference.
        """
        config = self.causal.config.to_dict() | {"_attn_implementation": self.own_attention, "_name_or_path": None}
        found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        blank = not self.full and self._adapter_is_blank()
        if not self.full and not blank:
            adapter = self.model.peft_config["default"].to_dict() | {"base_model_name_or_path": None}
            found.update(json.dumps(adapter, sort_keys=True, default=sorted).encode())
        for name, tensor in _all_weights(self.model):
            if not (blank and "lora_" in name):
                found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + fingerprint(tensor))
        return found.hexdigest()

    def _adapter_is_blank(self) -> bool:
        """Whether the adapter is a fresh LoRA: B is zero, and x + 0 is x to the bit. DoRA rescales even then."""
        named = dict(self.model.named_parameters())
        dora = any("lora_magnitude_vector" in name for name in named)
        return not dora and not any(
            p.any() for name, p in named.items() if "lora_B" in name or "lora_embedding_B" in name
        )

    def save(self, folder: Path) -> None:
        """Write the adapter (PEFT) or the whole model (transformers) into `folder`, with the base's tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.full:
            with self.own_attention_in_use():
                self.model.save_pretrained(folder)
            # Another version of transformers may read it, which writes other names: it stays as its makers wrote it.
            written, own = (json.loads((place / "config.json").read_text()) for place in (folder, self.folder))
            own.pop("torch_dtype", None)
            if written["model_type"] == own["model_type"]:  # of a model that also sees the text's part may be all
                (folder / "config.json").write_text(json.dumps(own | {"dtype": written["dtype"]}, indent=2) + "\n")
        else:
            # "auto" would look the base model up on the hub; the head and the embeddings are frozen anyway.
            self.model.save_pretrained(folder, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)
            config = folder / "adapter_config.json"
            settings = json.loads(config.read_text())
            settings |= {"base_model_name_or_path": self.name, "revision": self.revision}
            if isinstance(settings["target_modules"], list):  # peft keeps a set, whose order changes from run to run
                settings["target_modules"].sort()
            config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        if self.reward_head is not None:
            save_file({"weight": self.reward_head.weight.detach()}, folder / REWARD_HEAD)
        copy_tokenizer(self.folder, folder)
        write_ends(self.folder, folder, self.ends)


def shortest(pack: Pack) -> Tensor:
    """For each response of a pack without merged rows, the scored tokens of its row's shortest one, [L]."""
    least = torch.full((len(pack.rows),), torch.iinfo(torch.int64).max, device=pack.lengths.device)
    least = least.scatter_reduce(0, pack.row_of, pack.lengths[pack.leaves], "amin")
    return torch.zeros_like(pack.lengths).index_copy(0, pack.leaves, least[pack.row_of])


def per_response(pack: Pack, values: Tensor) -> Tensor:
    """Sums of tokens' `values` [N] for each response of each row of `pack`, [R]."""
    sums = torch.zeros(len(pack.lengths), dtype=values.dtype, device=values.device)
    return sums.index_add(0, pack.leaf, values)[pack.leaves]


def _all_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, and the scales that quantised layers keep beside them."""
    yield from model.named_parameters()
    yield from model.named_buffers()
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        scales = dict(weight.quant_state.as_dict(packed=True)) if getattr(weight, "quant_state", None) else {}
        for holder in (weight, getattr(module, "state", None)):  # int8 keeps them here, then there
            if isinstance(getattr(holder, "SCB", None), Tensor):
                scales["SCB"] = holder.SCB  # type: ignore[union-attr]
        yield from ((f"{name}.{key}", value) for key, value in scales.items() if isinstance(value, Tensor))


def fingerprint(tensor: Tensor) -> bytes:
    """What tells the bits of `tensor` from others: on a CPU the bits, on a GPU two sums over them, one by place."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    if data.device.type == "cpu":
        return data.numpy().tobytes()
    sums = torch.zeros(2, dtype=torch.int64, device=data.device)  # they wrap around, exactly
    for number, start in enumerate(range(0, len(data), 1 << 26)):
        part = data[start : start + (1 << 26)]
        part = nn.functional.pad(part, (0, -len(part) % 4)).view(torch.int32).long()
        places = torch.arange(1, len(part) + 1, device=part.device)
        sums += (number + 1) * torch.stack([part.sum(), (part * places).sum()])
    return str(sums.tolist()).encode()
