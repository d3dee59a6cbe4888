"""The policy: a base model, quantised or not, with a LoRA adapter or all its parameters to train."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from app.jobs.spec import Adapter, JobSpec
from worker.trainer.attention import padding_mask, tree_mask, why_not_shared
from worker.trainer.data import Row, Tokenizer
from worker.trainer.events import Events, UserError
from worker.trainer.logps import token_logps
from worker.trainer.packing import Pack, padded_pack, plan, tree_pack

_DROPOUTS = (
    "attention_dropout",
    "hidden_dropout",
    "activation_dropout",
    "resid_dropout",
    "embd_dropout",
    "dropout",
)


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
    """Of one pack: the log-prob of each scored token [N], whether it was the most likely one [N], and the sums
    over the tokens of each response [R]."""

    tokens: Tensor
    correct: Tensor
    responses: Tensor


@dataclass
class Policy:
    """The model in training, and how to ask it for log-probabilities.

    The model stays in training mode, always: on some CPUs a quantised layer that has run once in evaluation mode
    keeps other weights and loses its gradient. Dropout is switched by its own hands instead.
    """

    model: Any
    tokenizer: Tokenizer
    name: str
    revision: str | None
    full: bool
    device: torch.device
    shared: bool = True
    budget: int = 1024
    _dropout: dict[nn.Dropout, float] = field(default_factory=dict)

    @property
    def causal(self) -> Any:
        """The transformers model inside, head included."""
        return self.model if self.full else self.model.get_base_model()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def has_dropout(self) -> bool:
        """Whether the adapter was made with dropout."""
        return bool(self._dropout)

    def set_dropout(self, on: bool) -> None:
        """Switch the adapter's dropout; the base model's own is always off."""
        for module, probability in self._dropout.items():
            module.p = probability if on else 0.0

    def packs(self, rows: list[Row], numbers: list[int]) -> Iterator[Pack]:
        """The rows `numbers`, in packs of at most `budget` tokens, one at a time."""
        build = tree_pack if self.shared else padded_pack
        return (build(rows, group) for group in plan(rows, numbers, self.budget))

    def score(self, pack: Pack) -> Scores:
        """One forward pass: the log-probs of everything that is scored in `pack`."""
        pack = pack.to(self.device)
        hidden = self._hidden(pack)
        head = self.causal.get_output_embeddings()
        tokens, correct = token_logps(
            hidden.flatten(0, 1)[pack.predictors], head.weight, getattr(head, "bias", None), pack.targets
        )
        sums = torch.zeros(pack.responses, dtype=tokens.dtype, device=self.device)
        return Scores(tokens, correct, sums.index_add(0, pack.response, tokens))

    def _hidden(self, pack: Pack) -> Tensor:
        mask = tree_mask(pack) if self.shared else padding_mask(pack)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            states: Tensor = self.causal.base_model(
                input_ids=pack.ids, position_ids=pack.positions, attention_mask=mask, use_cache=False
            ).last_hidden_state
        return states

    def check(self, rows: list[Row], events: Events) -> None:
        """Hold this engine's log-probs of the two shortest rows against the model's own logits, one response a row.

        A tree that is off falls back to one response a row, with an event. A head that is off ends the job:
        wrong log-probs must not train anything.
        """
        numbers = sorted(range(len(rows)), key=lambda number: rows[number].tokens)[:2]
        with torch.no_grad():
            expected = self._reference_logps(padded_pack(rows, numbers).to(self.device))
            if not expected.isfinite().all():
                raise UserError(
                    "loss_not_finite", f"The log-probs of '{self.name}' are not finite before any training.", "model"
                )
            tolerance = 1e-4 if self.device.type == "cpu" else 5e-2
            if self.shared:
                shared = self.score(tree_pack(rows, numbers)).responses
                if _close(shared, expected, tolerance):
                    return
                self.shared = False
                events.message("Prompts are not shared: the first pack's log-probs would differ.", level="warn")
            if not _close(self.score(padded_pack(rows, numbers)).responses, expected, tolerance):
                raise UserError(
                    "unsupported_model",
                    f"The output head of '{self.name}' does more than a linear layer, which is not supported yet.",
                    "model",
                )

    def _reference_logps(self, pack: Pack) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.causal(input_ids=pack.ids, attention_mask=padding_mask(pack), use_cache=False).logits
        logps = logits.flatten(0, 1)[pack.predictors].float().log_softmax(-1)
        tokens = logps.gather(1, pack.targets[:, None]).squeeze(1)
        return torch.zeros(pack.responses, device=self.device).index_add(0, pack.response, tokens)

    def save(self, folder: Path) -> None:
        """Write the adapter (PEFT) or the whole model (transformers), and the tokenizer, into `folder`."""
        if self.full:
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
        self.tokenizer.save_pretrained(folder)


def _close(values: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool(((values.float() - expected).abs() <= tolerance * expected.abs().clamp(min=1)).all())


def load_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if not tokenizer.is_fast:
        raise UserError("unsupported_model", "The model has no fast tokenizer, which gives character offsets.", "model")
    if tokenizer.eos_token_id is None:
        raise UserError("unsupported_model", "The model's tokenizer has no end-of-sequence token.", "model")
    return tokenizer


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
    _silence_dropout(model)
    if not full:
        torch.manual_seed(spec.seed or 0)
        model = _with_adapter(model, spec, start, trainable)
    model.train()
    if device.type == "cuda" and trainable:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # On a CPU the mask's zeros are computed too, so that short packs are faster.
    budget = 512 if device.type == "cpu" else 8192
    policy = Policy(model, tokenizer, base.name, base.revision, full, device, budget=budget)
    policy._dropout = {m: m.p for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0}
    policy.set_dropout(False)
    reason = why_not_shared(policy.causal)
    if reason is not None:
        policy.shared = False
        events.message(f"Prompts are not shared between responses: {reason}.", level="warn")
    return policy


def _load_base(folder: Path, quantization: str, device: torch.device, full: bool) -> Any:
    dtype = torch.bfloat16 if device.type == "cuda" and not full else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        device_map={"": device},
        **options,
    )
    if not full:
        model.requires_grad_(False)
    return model


def _silence_dropout(model: nn.Module) -> None:
    """Switch off the base model's own dropout, in modules and in the attributes that attention reads."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUTS:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _with_adapter(model: Any, spec: JobSpec, start: Path | None, trainable: bool) -> Any:
    if start is not None:
        return PeftModel.from_pretrained(model, start, is_trainable=trainable)
    adapter = spec.adapter if isinstance(spec.adapter, Adapter) else Adapter()
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        use_rslora=adapter.use_rslora,
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            "invalid_value", f"The adapter does not fit the model: {error}", "adapter.target_modules"
        ) from error
