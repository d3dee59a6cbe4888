"""Loads a policy: the base model, quantised or not, and its adapter. Switches off all randomness in it."""

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.quantizers.base import get_keys_to_not_convert

from app.spec.job import Adapter, JobSpec
from app.spec.prequantized import refusal
from app.spec.resources import SHARDED_FROM
from worker.model_files import config_of, prequantized, weight_bytes, weight_files, why_no_weights
from worker.trainer import extended, fp8
from worker.trainer.attention import why_not_batched, why_not_shared
from worker.trainer.errors import UserError, first_line
from worker.trainer.events import Events
from worker.trainer.fully_sharded import FullShards
from worker.trainer.hardware import hardware, own_device
from worker.trainer.layers import layer_names, on_load
from worker.trainer.linears import adaptable, has_experts, is_ordinary, not_quantised, short_names
from worker.trainer.lora import AddsDelta, RewardHead, with_fast_layers
from worker.trainer.memory import free_bytes
from worker.trainer.model import HALF_DTYPES, REWARD_HEAD, Base, Policy
from worker.trainer.naming import meta_model
from worker.trainer.packing import Packing
from worker.trainer.ranks import Ranks
from worker.trainer.rendering import Renderer
from worker.trainer.room import LEAST_SHARE, require_memory
from worker.trainer.shards import Shards
from worker.trainer.tokenizer import load_tokenizer

FULL_SHARE = 8.0
"""The memory that full-parameter training takes, as a share of 16-bit files: 16 bytes for each parameter."""
_DROPOUT = re.compile(r"dropout|drop_prob|drop_rate|layerdrop|drop_path")
"""Attributes of a layer that make it random in training mode."""


def load_policy(
    spec: JobSpec,
    base: Base,
    start: Path | None,
    events: Events,
    shards: Shards | FullShards | None = None,
    *,
    trainable: bool = True,
) -> Policy:
    """Load the policy of `spec`.

    `start` is the folder of an adapter to continue from; for full-parameter training, the folder of a model. None
    makes a new adapter, initialised with `spec.seed`. `shards` take the base; by default it is whole. Raises
    `UserError`, or `NoRoom` without memory for the weights.
    """
    device = own_device()
    full = spec.adapter == "none"
    folder = start if full and start is not None else base.folder
    try:
        tokenizer = load_tokenizer(start or base.folder)
        method = prequantized(config_of(folder))
        if trainable and method is not None:
            _require_trainable(spec, base, method)
        if not weight_files(folder):
            raise ValueError(why_no_weights(folder))
        if device.type == "cpu":
            require_memory(folder, (spec.quantization or "none") if method is None else "none")
        in_fp8 = method is None and _computes_in_fp8(spec, start, device, events, trainable=trainable)
        model = _load_base(folder, spec, device, method, shards, in_fp8=in_fp8)
        if isinstance(shards, Shards):
            shards.finish(model, ends=not _trains_ends(spec, start))
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        message = f"The model '{spec.model}' cannot be loaded: {first_line(error)}."
        raise UserError("model_not_loadable", message, "model") from error
    if in_fp8 and not fp8.is_used(model):
        message = f"'{spec.model}' has no layers that can compute in FP8. Leave 'compute_dtype' out."
        raise UserError("unsupported_model", message, "compute_dtype")
    if has_experts(model) and (in_fp8 or (spec.quantization or "none") != "none"):
        events.message("The experts that a router chooses from are not quantised: they are one tensor, not layers.")
    policy = wrap(model, tokenizer, spec, base, start, events, trainable=trainable)
    if isinstance(shards, Shards):
        policy.shards = shards
    elif shards is not None:
        heads = [] if policy.reward_head is None else [policy.reward_head]
        policy.root = shards.finish(policy.causal, *heads)
    if shards is not None:
        events.message(f"Each of the {shards.ranks.size} devices keeps a part of the model.")
    return policy


def shards_for(spec: JobSpec, base: Base, ranks: Ranks) -> Shards | FullShards | None:
    """Where each of several `ranks` keeps its part of the model; None if each holds the whole. All decide the same."""
    full, shard = spec.adapter == "none", spec.parallel.shard
    device = own_device()
    if ranks.size == 1 or shard is False:
        return None
    if shard is None:
        free = free_bytes(device) / (ranks.size if device.type == "cpu" else 1)  # the ranks share a machine's memory
        if not ranks.any(_fills(spec, base, free)):
            return None
    return FullShards(ranks, device) if full else Shards(ranks)


def _fills(spec: JobSpec, base: Base, free: float) -> bool:
    """Whether the model of a job takes much of `free` bytes, and can be divided."""
    try:
        model = meta_model(base.folder)
    except Exception:  # loading the model will say what is wrong with it
        return False
    if spec.why_not_sharded() is not None or why_not_batched(model) is not None:
        return False
    as_stored = prequantized(config_of(base.folder)) is not None or has_experts(model)
    share = LEAST_SHARE["none" if as_stored else spec.weights]
    return (FULL_SHARE if spec.adapter == "none" else share) * weight_bytes(base.folder) > SHARDED_FROM * free


def _trains_ends(spec: JobSpec, start: Path | None) -> bool:
    """Whether the job trains the embeddings or the head in full."""
    if start is not None:
        return bool(LoraConfig.from_pretrained(start).modules_to_save)
    return isinstance(spec.adapter, Adapter) and bool(spec.adapter.modules_to_save)


def _require_trainable(spec: JobSpec, base: Base, method: str) -> None:
    """Refuse what cannot be trained on weights that are stored quantised with `method`."""
    refused = refusal(
        base.name, method, quantization=spec.quantization or "none", full=spec.adapter == "none",
        rewards=spec.trains_rewards,
    )  # fmt: skip
    if refused is not None:
        raise UserError("unsupported_model", refused[1], refused[0])


def wrap(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    spec: JobSpec,
    base: Base,
    start: Path | None,
    events: Events,
    *,
    trainable: bool = True,
) -> Policy:
    """The policy of a transformers `model` that is already on its device, with the adapter that `spec` asks for."""
    full, own_attention, device = spec.adapter == "none", model.config._attn_implementation, model.device
    # 1. Switch off all randomness, and add the adapter.
    _make_deterministic(model)
    if not full:
        torch.manual_seed(spec.seed or 0)
        model.requires_grad_(False)
        model = _with_adapter(model, spec, start, trainable)
        _make_deterministic(model)  # PEFT changes the training mode
    # 2. The policy and its precision.
    chosen = hardware(device)
    packing = Packing(chosen.pack_tokens)
    ends = Renderer(tokenizer, spec.rendering).ends
    policy = Policy(model, tokenizer, base.name, base.revision, full, device, packing, own_attention, base.folder, ends)
    if chosen.half:
        policy.autocast_dtype = half_dtype(spec)
    elif spec.compute_dtype is not None:
        events.message("'compute_dtype' is for GPUs: this worker computes in float32.", level="warn")
    policy._dropout = [
        module for name, module in model.named_modules() if "lora_dropout" in name and isinstance(module, nn.Dropout)
    ]
    policy.set_dropout(False)
    if spec.method.dpo is not None and spec.method.dpo.hyperparameters.rewards:
        policy.reward_head = _reward_head(policy, spec, start)
    if spec.method.reinforcement is not None and spec.method.reinforcement.hyperparameters.algorithm == "ppo":
        policy.value_head = RewardHead(model.config.get_text_config().hidden_size, device)
        nn.init.zeros_(policy.value_head.weight)
    covered = _keep_segments_apart(policy)
    layers: list[Any] = [layer for layer in policy.model.modules() if isinstance(layer, AddsDelta)]
    with policy.autocast():
        policy.groups = extended.join(policy.causal, layers, chosen.extended_share)
    policy.joins = full or (covered and not has_experts(policy.causal))
    # 3. The fastest way to compute log-probs that the model allows.
    not_shared, not_batched = why_not_shared(policy.causal), why_not_batched(policy.causal)
    policy.blocks = chosen.blocks
    policy.shared, policy.one_by_one = not_shared is None, not_batched is not None
    if not_shared is not None:
        events.message(f"Prompts are not shared between responses: {not_shared}.", level="warn")
    if not_batched is not None:
        events.message(f"Texts are not batched: {not_batched}.", level="warn")
    return policy


def _keep_segments_apart(policy: Policy) -> bool:
    """Let the LoRA layers and the reward head keep the gradients of segments apart.

    Returns whether they hold all trained parameters. DoRA and layers that are trained in full do not keep them apart.
    """
    trained, apart = set(policy.trainable().values()), set[nn.Parameter]()
    for layer in policy.model.modules():
        weights = layer.plain_weights() if isinstance(layer, AddsDelta) else ()
        if weights and trained.issuperset(weights):
            policy.segment_gradients.keep_apart(layer, weights)
            apart.update(weights)
    if (head := policy.reward_head) is not None:
        weight = policy.trainable()["reward_head.weight"]
        policy.segment_gradients.keep_apart(head, [weight], "responses")
        apart.add(weight)
    if policy.value_head is not None:
        weight = policy.trainable()["value_head.weight"]
        policy.segment_gradients.keep_apart(policy.value_head, [weight])
        apart.add(weight)
    return apart >= trained


def _reward_head(policy: Policy, spec: JobSpec, start: Path | None) -> RewardHead:
    """The linear layer [1, hidden size] over the last hidden state.

    Its weights come from `start`; else they are small random numbers drawn with the seed.
    """
    config = policy.causal.config.get_text_config()
    generator = torch.Generator().manual_seed(spec.seed or 0)
    weight = torch.randn(1, config.hidden_size, generator=generator) * getattr(config, "initializer_range", 0.02)
    if start is not None and (start / REWARD_HEAD).exists():
        weight = load_file(start / REWARD_HEAD)["weight"]
    head = RewardHead(config.hidden_size, policy.device)
    head.weight.data.copy_(weight)
    return head


def _load_base(
    folder: Path,
    spec: JobSpec,
    device: torch.device,
    method: str | None,
    shards: Shards | FullShards | None,
    *,
    in_fp8: bool,
) -> PreTrainedModel:
    """The model in `folder`. `method`: how its stored weights are quantised; these stay as they are.

    `shards` take its layers while they are read. `in_fp8`: whether its products are in FP8.
    """
    dtype = torch.float32
    if hardware(device).half and spec.adapter != "none":
        dtype = half_dtype(spec)
    quantization, double = spec.quantization or "none", spec.double_quantization is not False
    with (
        fp8_on_load(folder) if in_fp8 else nullcontext(),
        nullcontext() if shards is None else shards.on_load(),
    ):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            local_files_only=True,
            use_safetensors=True,
            device_map={"": device},
            **({} if method is not None else quantisation(quantization, dtype, folder, double=double)),
        )
    if method is not None:  # the file names its makers' compute precision; use ours
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.compute_dtype, module.compute_type_is_set = dtype, True
    return model


def half_dtype(spec: JobSpec) -> torch.dtype:
    """The dtype of 16 bits in which a GPU computes the job. With FP8 it is that of all but the base's products."""
    return HALF_DTYPES["fp16" if spec.compute_dtype == "fp16" else "bf16"]


def _computes_in_fp8(
    spec: JobSpec, start: Path | None, device: torch.device, events: Events, *, trainable: bool
) -> bool:
    """Whether the base computes in FP8. If the job asks for it in vain, an evaluation gets a warning instead.

    Raises `UserError` for a training that cannot have it.
    """
    if spec.compute_dtype != "fp8" or not hardware(device).half:
        return False
    reason = fp8.why_unusable(device)
    if start is not None and LoraConfig.from_pretrained(start).use_dora:
        reason = f"the adapter of '{spec.model}' has DoRA, which needs the base's own weights"
    if reason is None:
        return True
    message = f"'compute_dtype': 'fp8' is not possible: {reason}."
    if trainable:
        raise UserError("invalid_value", message, "compute_dtype")
    events.message(f"{message} '{spec.model}' computes in 16 bits.", level="warn")
    return False


def fp8_on_load(folder: Path) -> AbstractContextManager[None]:
    """Within this context the loader converts the linear layers of the model in `folder` to FP8, layer by layer."""
    model = meta_model(folder)
    kept, names = set(not_quantised(model)), layer_names(model)
    return on_load(lambda layer, number: fp8.convert(layer, names[number], kept))


def quantisation(name: str, dtype: torch.dtype, folder: Path, *, double: bool = True) -> dict[str, BitsAndBytesConfig]:
    """transformers' options that load the model in `folder` as `nf4`, `int8` or `none`.

    `dtype` is the precision of the computation. `double`: whether the scales of `nf4` are quantised too.
    """
    if name == "none":
        return {}
    model = meta_model(folder)
    unquantised = not_quantised(model)
    # Our list replaces transformers' own list, which contains the head, so add that list.
    skip_modules = [*get_keys_to_not_convert(model), *unquantised] if unquantised else None
    if name == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skip_modules,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip_modules)
    return {"quantization_config": config}


def _make_deterministic(model: nn.Module) -> None:
    """Put the model into evaluation mode, where nothing is random, except for modules that need training mode.

    Layers with gradient checkpointing recompute activations only in training mode; their dropout attributes are set to
    0. Quantised layers stay in training mode too. On some CPUs, a layer that ran once in evaluation mode keeps other
    weights and loses its gradient.
    """
    model.eval()
    for module in model.modules():
        recomputes = hasattr(module, "gradient_checkpointing")
        module.training = recomputes or isinstance(module, (Linear4bit, Linear8bitLt))
        for name in [name for name in vars(module) if recomputes and _DROPOUT.search(name)]:
            if isinstance(getattr(module, name), float):
                setattr(module, name, 0.0)


def _targets(model: PreTrainedModel, requested: str | list[str]) -> list[str]:
    """Names by which PEFT finds the layers that get an adapter. Raises `UserError` for a layer that cannot have one."""
    modules = dict(model.named_modules())
    if isinstance(requested, list):
        for name, module in modules.items():
            target = next((ending for ending in requested if name == ending or name.endswith(f".{ending}")), None)
            if target is not None and isinstance(module, nn.Linear) and not is_ordinary(module):
                message = f"'{target}' ({type(module).__name__}) computes more than W x + b. LoRA cannot adapt it."
                raise UserError("invalid_value", message, "adapter.target_modules")
        return requested
    layers = adaptable(model)
    if not layers:
        message = (
            "The model has no linear layers that an adapter could sit on; train all parameters: 'adapter': 'none'."
        )
        raise UserError("unsupported_model", message, "adapter")
    return short_names(layers, modules)


def _widen(model: PreTrainedModel) -> None:
    """Convert embeddings and head to float32, for training them in full.

    The output of the embeddings stays in the model's own precision.
    """
    dtype, embeddings = model.dtype, model.get_input_embeddings()
    for module in (embeddings, model.get_output_embeddings()):
        module.float()
    embeddings.register_forward_hook(lambda module, args, output: output.to(dtype))


def _names_to_save(model: PreTrainedModel, requested: Sequence[str]) -> list[str]:
    """The model's own names of the `requested` modules that it has: `embed_tokens` and `lm_head`."""
    modules = {"embed_tokens": model.get_input_embeddings(), "lm_head": model.get_output_embeddings()}
    return [
        name
        for name, module in model.named_modules()
        if any(module is modules[standard_name] for standard_name in requested)
    ]


def _with_adapter(model: PreTrainedModel, spec: JobSpec, start: Path | None, trainable: bool) -> PeftModel:
    """`model` with the adapter from `start`, or with a new adapter as `spec` describes it."""
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
        # GPT-2's linear layers store their weights transposed, [inputs, outputs].
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in model.modules()),
        bias="none",
        task_type="CAUSAL_LM",
        modules_to_save=_names_to_save(model, adapter.modules_to_save or []) or None,
        # If embeddings and head share one tensor, they go on sharing it.
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
