"""The policy: a base model, quantised or not, with a LoRA adapter or all its parameters to train."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.base import get_keys_to_not_convert

from app.jobs.spec import Adapter, JobSpec
from worker.trainer.attention import (
    NAME,
    SHAREABLE_ROPE,
    TreeMask,
    padding_mask,
    rope_kinds,
    why_not_shared,
    window_sizes,
    windows,
)
from worker.trainer.data import Row, Tokenizer
from worker.trainer.events import Events, UserError
from worker.trainer.linears import adaptable, is_ordinary, not_quantised, short_names
from worker.trainer.logps import Head, TokenScores, score_tokens
from worker.trainer.lora import with_fast_layers
from worker.trainer.packing import Pack, Packing, tree_pack, trees
from worker.trainer.tokenizer import load_tokenizer

CPU_BUDGET, CUDA_BUDGET = 2048, 8192
"""Tokens of a pack: long ones spread over more tokens what a pass costs whatever its length, on a GPU the unpacking
of quantised weights above all."""
REWARD_HEAD = "reward_head.safetensors"
_RANDOM = re.compile(r"dropout|drop_prob|drop_rate|layerdrop|drop_path|jitter|noise")
"""Numbers of modules and of configurations by which a model draws at random while it trains."""


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

    The model stays in training mode, always: on some CPUs a quantised layer that has run once in evaluation mode
    keeps other weights and loses its gradient. Dropout is switched by its own hands instead. `reward_head` is there
    where a reward model is trained; `one_by_one` where even the longest text of a padded batch would change the others.
    """

    model: Any
    tokenizer: Tokenizer
    name: str
    revision: str | None
    full: bool
    device: torch.device
    packing: Packing
    own_attention: str
    one_by_one: bool = False
    compiled: bool = False
    reward_head: nn.Linear | None = None
    _dropout: dict[nn.Dropout, float] = field(default_factory=dict)
    _silenced: list[tuple[Any, str, float]] = field(default_factory=list)
    """What the base model's configuration says of its own dropout: (configuration, name, value)."""

    @property
    def causal(self) -> Any:
        """The transformers model inside, head included."""
        return self.model if self.full else self.model.get_base_model()

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
        for module, probability in self._dropout.items():
            module.p = probability if on else 0.0

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
        lists = [m for m in self.causal.base_model.modules() if isinstance(m, nn.ModuleList)]
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
            return self._forward(pack.ids, pack.positions, attention_mask=None, tree=mask)
        padding = padding_mask(pack)
        if not self.one_by_one:
            return self._forward(pack.ids, pack.positions, attention_mask=padding)
        texts = zip(pack.ids, pack.positions, padding.sum(1).tolist(), strict=True)
        return torch.cat(
            [
                nn.functional.pad(self._forward(ids[None, :n], at[None, :n]), (0, 0, 0, len(ids) - n))
                for ids, at, n in texts
            ]
        )

    def _forward(self, ids: Tensor, positions: Tensor, **options: Any) -> Tensor:
        with self.autocast():
            states: Tensor = self.causal.base_model(
                input_ids=ids, position_ids=positions, use_cache=False, **options
            ).last_hidden_state
        return states

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def check(self, rows: Sequence[Row], events: Events) -> None:
        """Hold this engine's log-probs of some of the first rows against the model's own logits, one response a row.

        A tree that is off falls back to one response a row, with an event. A head that is off ends the job:
        wrong log-probs must not train anything.
        """
        numbers = self._to_check(rows)
        scored = torch.tensor([sum(r.scored) for number in numbers for r in rows[number].responses])
        with torch.no_grad():
            expected = torch.cat([self._own_logps(rows[number]) for number in numbers])
            tolerance = 1e-4 * expected.abs().clamp(min=1)
            if self.device.type == "cuda":  # the model's own logits are bfloat16: an eighth apart at 16 and above
                tolerance = 0.02 * expected.abs() + 0.15 * scored.to(self.device)
            if not expected.isfinite().all():
                raise UserError(
                    "loss_not_finite", f"The log-probs of '{self.name}' are not finite before any training.", "model"
                )
            reason = self._why_off(rows, numbers, expected, tolerance) if self.shared else None
            if reason is not None:
                self.shared = False
                events.message(f"Prompts are not shared: {reason}.", level="warn")
            if self.shared or _close(self._checked_logps(rows, numbers), expected, tolerance):
                return
            again = torch.cat([self._own_logps(rows[number]) for number in numbers])
        if not _close(again, expected, tolerance):
            message = f"'{self.name}' gives other log-probs each time: something in it draws at random while it trains."
            raise UserError("unsupported_model", message, "model")
        message = f"The output head of '{self.name}' does more to its logits than this engine knows of."
        raise UserError("unsupported_model", message, "model")

    def _to_check(self, rows: Sequence[Row]) -> list[int]:
        """The rows that the check looks at: the shortest few of the first ones, and where the model has a window, one
        that is longer, since shorter ones do not show it.
        """
        numbers = sorted(range(min(len(rows), CHECKED_FROM)), key=lambda n: rows[n].tokens)
        chosen, widest = numbers[:CHECKED_ROWS], max(window_sizes(self.causal), default=None)
        if widest is not None and numbers:
            longer = (n for n in numbers if len(rows[n].prompt) + len(rows[n].responses[0].ids) > widest)
            chosen.append(next(longer, numbers[-1]))
        return list(dict.fromkeys(chosen))

    def _why_off(self, rows: Sequence[Row], numbers: list[int], expected: Tensor, tolerance: Tensor) -> str | None:
        """What is wrong with the log-probs of shared prompts; None where nothing is."""
        try:
            found = self._checked_logps(rows, numbers)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if self.device.type == "cpu":
                raise
            return f"the GPU's attention kernel cannot be compiled ({type(error).__name__}: {str(error)[:200]})"
        return None if _close(found, expected, tolerance) else "the first pack's log-probs would differ"

    def _checked_logps(self, rows: Sequence[Row], numbers: list[int]) -> Tensor:
        packing = replace(self.packing, merge=False)
        pack = packing.build(trees(rows, numbers, packing.budget, merge=False)).to(self.device)
        return self.score(pack).responses

    def _own_logps(self, row: Row) -> Tensor:
        """What the model's own forward pass says of each response of `row`, one at a time."""
        found = []
        with self.own_attention_in_use():
            for response in row.responses:
                alone = tree_pack(trees([replace(row, responses=(response,))], [0], 0)).to(self.device)
                with self.autocast():
                    logits = self.causal(input_ids=alone.ids, use_cache=False).logits
                logps = logits[0, alone.predictors].float().log_softmax(-1)
                found.append(logps.gather(1, alone.targets[:, None]).sum())
        return torch.stack(found)

    @contextmanager
    def own_attention_in_use(self) -> Iterator[None]:
        """The model with its own attention."""
        current = self.causal.config._attn_implementation
        self.causal.set_attn_implementation(self.own_attention)
        try:
            yield
        finally:
            self.causal.set_attn_implementation(current)

    @contextmanager
    def _own_configuration(self) -> Iterator[None]:
        """The model with the configuration that it came with."""
        for config, name, value in self._silenced:
            setattr(config, name, value)
        try:
            yield
        finally:
            for config, name, _ in self._silenced:
                setattr(config, name, 0.0)

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
        """Write the adapter (PEFT) or the whole model (transformers), and the tokenizer, into `folder`."""
        if self.full:
            with self.own_attention_in_use(), self._own_configuration():
                self.model.save_pretrained(folder)
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
        self.tokenizer.save_pretrained(folder)


CHECKED_FROM, CHECKED_ROWS = 256, 3
"""The check before training takes the shortest few of so many first rows."""


def shortest(pack: Pack) -> Tensor:
    """For each response of a pack without merged rows, the scored tokens of its row's shortest one, [L]."""
    least = torch.full((len(pack.rows),), torch.iinfo(torch.int64).max, device=pack.lengths.device)
    least = least.scatter_reduce(0, pack.row_of, pack.lengths[pack.leaves], "amin")
    return torch.zeros_like(pack.lengths).index_copy(0, pack.leaves, least[pack.row_of])


def per_response(pack: Pack, values: Tensor) -> Tensor:
    """Sums of tokens' `values` [N] for each response of each row of `pack`, [R]."""
    sums = torch.zeros(len(pack.lengths), dtype=values.dtype, device=values.device)
    return sums.index_add(0, pack.leaf, values)[pack.leaves]


def _close(values: Tensor, expected: Tensor, tolerance: Tensor) -> bool:
    return bool(((values.float() - expected).abs() <= tolerance).all())


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


def load_policy(spec: JobSpec, base: Base, start: Path | None, events: Events, *, trainable: bool = True) -> Policy:
    """Load the policy of `spec`.

    `start` is the folder of an adapter (or, for full-parameter training, of a
    model) to go on from, None for a fresh one, which `spec.seed` initialises.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    full = spec.adapter == "none"
    try:
        tokenizer = load_tokenizer(start or base.folder)
        model = _load_base(
            start if full and start is not None else base.folder, spec.quantization or "none", device, full
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError("model_not_loadable", f"The model '{spec.model}' cannot be loaded: {error}", "model") from error
    return wrap(model, tokenizer, spec, base, start, events, trainable=trainable)


def wrap(
    model: Any,
    tokenizer: Tokenizer,
    spec: JobSpec,
    base: Base,
    start: Path | None,
    events: Events,
    *,
    trainable: bool = True,
) -> Policy:
    """A policy of a transformers `model` that is on its device already, with the adapter that `spec` asks for."""
    full, own, device = spec.adapter == "none", model.config._attn_implementation, model.device
    silenced = _silence(model)
    if not full:
        torch.manual_seed(spec.seed or 0)
        model.requires_grad_(False)
        model = _with_adapter(model, spec, start, trainable)
    model.train()
    cuda = device.type == "cuda"
    packing = Packing(CUDA_BUDGET if cuda else CPU_BUDGET, fixed=cuda)
    policy = Policy(model, tokenizer, base.name, base.revision, full, device, packing, own)
    policy._silenced = silenced
    policy._dropout = {m: m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0}
    policy.set_dropout(False)
    if spec.method.dpo is not None and spec.method.dpo.hyperparameters.rewards:
        policy.reward_head = _reward_head(policy, spec, start)
    policy.one_by_one = not rope_kinds(policy.causal) <= SHAREABLE_ROPE
    reason = why_not_shared(policy.causal)
    policy.shared = reason is None
    if reason is not None:
        events.message(f"Prompts are not shared between responses: {reason}.", level="warn")
    return policy


def _reward_head(policy: Policy, spec: JobSpec, start: Path | None) -> nn.Linear:
    """The linear layer over the last hidden state: as it was saved, or small random weights that the seed draws."""
    config = policy.causal.config.get_text_config()
    generator = torch.Generator().manual_seed(spec.seed or 0)
    weight = torch.randn(1, config.hidden_size, generator=generator) * getattr(config, "initializer_range", 0.02)
    if start is not None and (start / REWARD_HEAD).exists():
        weight = load_file(start / REWARD_HEAD)["weight"]
    head = nn.Linear(config.hidden_size, 1, bias=False, device=policy.device, dtype=torch.float32)
    head.weight.data.copy_(weight)
    return head


def _load_base(folder: Path, quantization: str, device: torch.device, full: bool) -> Any:
    dtype = torch.bfloat16 if device.type == "cuda" and not full else torch.float32
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        device_map={"": device},
        **quantisation(quantization, dtype, folder),
    )


def quantisation(name: str, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """transformers' options for `nf4`, `int8` or `none` of the model in `folder`; `dtype` is what is computed in."""
    if name == "none":
        return {}
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    skipped = not_quantised(empty)
    # A list of our own takes the place of transformers', which has the head in it.
    skip = [*get_keys_to_not_convert(empty), *skipped] if skipped else None
    if name == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skip,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return {"quantization_config": config}


def _silence(model: Any) -> list[tuple[Any, str, float]]:
    """Switch off whatever the base model draws at random in training: dropout of every kind, and jitter.

    It is in modules, in attributes that their code reads, and in the configuration. Returns what the configuration
    said, for the artifact.
    """
    configs: dict[int, Any] = {}
    for module in model.modules():
        if "Dropout" in type(module).__name__:
            for name in ("p", "drop_prob"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        for name in [name for name in vars(module) if _RANDOM.search(name)]:
            if isinstance(getattr(module, name), float):
                setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        if config is not None:
            configs[id(config)] = config
    said = [
        (config, name, value)
        for config in configs.values()
        for name, value in vars(config).items()
        if _RANDOM.search(name) and isinstance(value, float) and value != 0.0
    ]
    for config, name, _ in said:
        setattr(config, name, 0.0)
    return said


def _targets(model: Any, named: str | list[str]) -> list[str]:
    """Names by which PEFT finds the layers that get an adapter. Raises `UserError` for those that cannot have one."""
    modules = dict(model.named_modules())
    if isinstance(named, list):
        for name, module in modules.items():
            asked = next((one for one in named if name == one or name.endswith(f".{one}")), None)
            if asked is not None and isinstance(module, nn.Linear) and not is_ordinary(module):
                message = f"'{asked}' ({type(module).__name__}) gives more than its product, which LoRA cannot add to."
                raise UserError("invalid_value", message, "adapter.target_modules")
        return named
    found = adaptable(model)
    if not found:
        message = (
            "The model has no linear layers that an adapter could sit on; train all parameters: 'adapter': 'none'."
        )
        raise UserError("unsupported_model", message, "adapter")
    return short_names(found, modules)


def _with_adapter(model: Any, spec: JobSpec, start: Path | None, trainable: bool) -> Any:
    if start is not None:
        config = with_fast_layers(LoraConfig.from_pretrained(start))
        return PeftModel.from_pretrained(model, start, is_trainable=trainable, config=config)
    adapter = spec.adapter if isinstance(spec.adapter, Adapter) else Adapter()
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=_targets(model, adapter.target_modules),
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        # GPT-2's linear layers keep their weights transposed.
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, with_fast_layers(config))
    except ValueError as error:
        raise UserError(
            "invalid_value", f"The adapter does not fit the model: {error}", "adapter.target_modules"
        ) from error
