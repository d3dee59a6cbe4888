"""Loading of a policy: the base model, quantised or not, its adapter, and what has to be switched off in it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.base import get_keys_to_not_convert

from app.spec.job import Adapter, JobSpec
from app.spec.prequantized import refusal
from worker.model_files import config_of, prequantized, weight_files, why_no_weights
from worker.trainer.attention import why_not_batched, why_not_shared
from worker.trainer.data import Tokenizer
from worker.trainer.errors import UserError, first_line
from worker.trainer.events import Events
from worker.trainer.linears import adaptable, has_experts, is_ordinary, not_quantised, short_names
from worker.trainer.lora import with_fast_layers
from worker.trainer.model import HALVES, REWARD_HEAD, Base, Policy
from worker.trainer.naming import without_weights
from worker.trainer.packing import Packing
from worker.trainer.rendering import Renderer
from worker.trainer.tokenizer import load_tokenizer

CPU_BUDGET, CUDA_BUDGET = 2048, 8192
"""Tokens of a pack: long ones spread over more tokens what a pass costs whatever its length, on a GPU the unpacking
of quantised weights above all."""
_DROPOUT = re.compile(r"dropout|drop_prob|drop_rate|layerdrop|drop_path")
"""Attributes of a layer by which it draws at random while it trains."""


def load_policy(spec: JobSpec, base: Base, start: Path | None, events: Events, *, trainable: bool = True) -> Policy:
    """Load the policy of `spec`.

    `start` is the folder of an adapter (or, for full-parameter training, of a
    model) to go on from, None for a fresh one, which `spec.seed` initialises.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    full = spec.adapter == "none"
    folder = start if full and start is not None else base.folder
    try:
        tokenizer = load_tokenizer(start or base.folder)
        method = prequantized(config_of(folder))
        if trainable and method is not None:
            _require_possible(spec, base, method)
        if not weight_files(folder):
            raise ValueError(why_no_weights(folder))
        model = _load_base(folder, spec, device, method)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        message = f"The model '{spec.model}' cannot be loaded: {first_line(error)}."
        raise UserError("model_not_loadable", message, "model") from error
    if has_experts(model) and (spec.quantization or "none") != "none":
        events.message("The experts that a router chooses from are not quantised: they are one tensor, not layers.")
    return wrap(model, tokenizer, spec, base, start, events, trainable=trainable)


def _require_possible(spec: JobSpec, base: Base, method: str) -> None:
    found = refusal(
        base.name, method, quantization=spec.quantization or "none", full=spec.adapter == "none",
        rewards=spec.trains_rewards,
    )  # fmt: skip
    if found is not None:
        raise UserError("unsupported_model", found[1], found[0])


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
    _make_deterministic(model)
    if not full:
        torch.manual_seed(spec.seed or 0)
        model.requires_grad_(False)
        model = _with_adapter(model, spec, start, trainable)
        _make_deterministic(model)  # peft changes the mode
    cuda = device.type == "cuda"
    packing = Packing(CUDA_BUDGET if cuda else CPU_BUDGET, fixed=cuda)
    ends = Renderer(tokenizer, spec.rendering).ends
    policy = Policy(model, tokenizer, base.name, base.revision, full, device, packing, own, base.folder, ends)
    if cuda:
        policy.computed_in = HALVES[spec.compute_dtype or "bf16"]
    elif spec.compute_dtype is not None:
        events.message("'compute_dtype' is for GPUs: this worker computes in float32.", level="warn")
    policy._dropout = [m for name, m in model.named_modules() if "lora_dropout" in name and isinstance(m, nn.Dropout)]
    policy.set_dropout(False)
    if spec.method.dpo is not None and spec.method.dpo.hyperparameters.rewards:
        policy.reward_head = _reward_head(policy, spec, start)
    not_shared, not_batched = why_not_shared(policy.causal), why_not_batched(policy.causal)
    policy.shared, policy.one_by_one = not_shared is None, not_batched is not None
    if not_shared is not None:
        events.message(f"Prompts are not shared between responses: {not_shared}.", level="warn")
    if not_batched is not None:
        events.message(f"Texts are not batched: {not_batched}.", level="warn")
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


def _load_base(folder: Path, spec: JobSpec, device: torch.device, method: str | None) -> Any:
    """The model in `folder`. `method`: how its weights are quantised on the disk already, which stays as it is."""
    dtype = torch.float32
    if device.type == "cuda" and spec.adapter != "none":
        dtype = HALVES[spec.compute_dtype or "bf16"]
    own, double = spec.quantization or "none", spec.double_quantization is not False
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        device_map={"": device},
        **({} if method is not None else quantisation(own, dtype, folder, double=double)),
    )
    for module in model.modules():
        if method is not None and isinstance(module, Linear4bit):  # its file says what its makers computed in
            module.compute_dtype, module.compute_type_is_set = dtype, True
    return model


def quantisation(name: str, dtype: torch.dtype, folder: Path, *, double: bool = True) -> dict[str, Any]:
    """transformers' options for `nf4`, `int8` or `none` of the model in `folder`; `dtype` is what is computed in.

    `double`: whether the scales of `nf4` are quantised too.
    """
    if name == "none":
        return {}
    empty = without_weights(folder)
    skipped = not_quantised(empty)
    # A list of our own takes the place of transformers', which has the head in it.
    skip = [*get_keys_to_not_convert(empty), *skipped] if skipped else None
    if name == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skip,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return {"quantization_config": config}


def _make_deterministic(model: Any) -> None:
    """Evaluation mode, in which nothing draws at random, wherever training mode is not needed for something else.

    Layers that can recompute their activations do so in training mode only; their own dropouts are attributes. On some
    CPUs a quantised layer that has run once in evaluation mode keeps other weights and loses its gradient.
    """
    model.eval()
    for module in model.modules():
        recomputes = hasattr(module, "gradient_checkpointing")
        module.training = recomputes or isinstance(module, (Linear4bit, Linear8bitLt))
        for name in [name for name in vars(module) if recomputes and _DROPOUT.search(name)]:
            if isinstance(getattr(module, name), float):
                setattr(module, name, 0.0)


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


def _widen(model: Any) -> None:
    """Embeddings and head in float32, in which they are trained where they are trained whole; what the embeddings give
    stays in the model's own precision.
    """
    dtype, embeddings = model.dtype, model.get_input_embeddings()
    for module in (embeddings, model.get_output_embeddings()):
        module.float()
    embeddings.register_forward_hook(lambda module, args, output: output.to(dtype))


def _saved(model: Any, asked: Sequence[str]) -> list[str]:
    """The model's own names of its embeddings and its head, of those that are `asked` for."""
    meant = {"embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
    return [name for name, module in model.named_modules() if any(module is meant[one] for one in asked)]


def _with_adapter(model: Any, spec: JobSpec, start: Path | None, trainable: bool) -> Any:
    if start is not None:
        config = with_fast_layers(LoraConfig.from_pretrained(start))
        if config.modules_to_save:
            _widen(model)
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
        modules_to_save=_saved(model, adapter.modules_to_save or []) or None,
        # Where embeddings and head are one tensor, they stay one.
        ensure_weight_tying=bool(adapter.modules_to_save and model.config.get_text_config().tie_word_embeddings),
    )
    if config.modules_to_save:
        _widen(model)
    try:
        return get_peft_model(model, with_fast_layers(config))
    except ValueError as error:
        raise UserError(
            "invalid_value", f"The adapter does not fit the model: {error}", "adapter.target_modules"
        ) from error
