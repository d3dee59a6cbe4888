"""Which linear layers of a model get an adapter, and which are quantised. The choice depends on what a layer computes,
not on its name.

An ordinary linear layer takes one tensor and returns one, W x + b, and no other code reads W. Some layers look ordinary
but are not. Examples are routers of mixtures of experts, which return scores and indices, and layers whose parent
clamps or multiplies their weights. Text never reaches the vision and audio towers of multimodal models.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from types import CodeType

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from worker.trainer.errors import PeerLost
from worker.trainer.fp8 import Fp8Linear

ORDINARY = (nn.Linear, Conv1D, Linear4bit, Linear8bitLt, Fp8Linear)
_READ = re.compile(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size))")
"""Code that reads the weight of a child module, and not just its precision, device or shape."""
_PROBED = 16
"""Number of tokens of the text that shows which layers text passes."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
"""Names of the number of experts in configurations."""


def adaptable(model: PreTrainedModel) -> list[str]:
    """Names of the layers of a causal `model` that "all-linear" selects.

    They are the ordinary linear layers through which text passes: attention, dense and shared feed-forward layers.
    Excluded are the head, routers, the experts that a router chooses from, and layers without a gradient. Those are the
    parts for images, sound or another text, and the parts that choose what a token attends to.
    """
    head, routers = model.get_output_embeddings(), _routers(model)
    candidates = {
        name: module
        for name, module in model.named_modules()
        if is_ordinary(module)
        and module is not head
        and id(module) not in routers
        and not _is_expert(name)
        and not _parent_reads_weight(model, name)
        and not _means_experts(model, name.rpartition(".")[2])
    }
    return _with_gradient(model, candidates)


def _means_experts(model: PreTrainedModel, name: str) -> bool:
    """Whether PEFT reads the layer name `name` as experts, by the names from before experts became one tensor.

    PEFT gives no adapter to a dense or shared layer of that name, neither here nor where the adapter is loaded.
    """
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # PEFT demands the names of the other experts' tensors too
        return True
    return name not in (config.target_modules or ())


def _with_gradient(model: PreTrainedModel, layers: dict[str, nn.Module]) -> list[str]:
    """Names of those `layers` on which the logits of a short text depend differentiably.

    A zero with a gradient (the probe) is added to the output of each layer. The layer counts if the gradient of the
    logits reaches its probe. Returns all layers if the model cannot compute the text.
    """
    probes = {name: torch.zeros((), device=model.device, requires_grad=True) for name in layers}

    def add(probe: Tensor) -> Callable[..., Tensor]:
        return lambda layer, args, output: output + probe

    hooks = [layer.register_forward_hook(add(probes[name])) for name, layer in layers.items()]
    ids = torch.arange(_PROBED, device=model.device)[None] % model.config.get_text_config().vocab_size  # (1, T)
    try:
        with torch.enable_grad():
            loss = model(input_ids=ids, use_cache=False).logits.float().sum()
        if not loss.requires_grad:
            return []
        gradients = torch.autograd.grad(loss, list(probes.values()), allow_unused=True)
    except (torch.OutOfMemoryError, PeerLost):
        raise
    except Exception:  # the check before training reports what is wrong with the model
        return list(layers)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, gradient in zip(probes, gradients, strict=True) if gradient is not None]


def body(model: PreTrainedModel) -> PreTrainedModel:
    """A causal model without its language-model head."""
    return model.model if model.base_model is model else model.base_model


def short_names(chosen: Sequence[str], modules: Iterable[str]) -> list[str]:
    """The shortest name endings that match the modules `chosen` and no other of `modules`, sorted."""
    others = {end for name in set(modules) - set(chosen) for end in _ends(name)}
    return sorted({next((end for end in _ends(name) if end not in others), name) for name in chosen})


def _ends(name: str) -> list[str]:
    """`a.b.c` → c, b.c, a.b.c"""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


def not_quantised(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers of `model` that must not be quantised.

    Other code reads their weights, or they compute more than W x + b. Packed weights would change the result.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, ORDINARY) and (not is_ordinary(module) or _parent_reads_weight(model, name))
    ]


def has_experts(model: PreTrainedModel) -> bool:
    """Whether `model` is a mixture of experts: its configuration counts experts, or a module has that name."""
    config = model.config.get_text_config()
    configured = any(getattr(config, name, None) for name in _EXPERTS)
    return configured or any(_is_expert(name) for name, _ in model.named_modules())


def is_ordinary(module: nn.Module) -> bool:
    """Whether a module is a linear layer that computes W x + b and nothing else."""
    kind = type(module)
    return kind in ORDINARY or (isinstance(module, nn.Linear) and _multiplies(kind))  # type: ignore[arg-type]


@cache
def _multiplies(kind: type[nn.Linear]) -> bool:
    """Whether layers of a subclass of `nn.Linear` compute x Wᵀ + b.

    Tries it with an `nn.Linear` whose class is changed to `kind`. Other attributes of `kind` stay unset.
    """
    with torch.random.fork_rng(devices=[]):  # leaves the training's random numbers unchanged
        layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    expected = layer(x)
    layer.__class__ = kind
    try:
        output = layer(x)
    except Exception:  # it needs attributes that only its model sets
        return False
    return isinstance(output, Tensor) and output.shape == expected.shape and torch.allclose(output, expected)


def _is_expert(name: str) -> bool:
    """Whether the module `name` is part of experts."""
    return "experts" in name.split(".")


def _routers(model: PreTrainedModel) -> set[int]:
    """Ids (`id()`) of the layers that choose experts or weight a shared expert.

    They are siblings of experts, and have one output for each expert, or a single output.
    """
    config = model.config.get_text_config()
    counts = {1} | {getattr(config, name) for name in _EXPERTS if isinstance(getattr(config, name, None), int)}
    return {
        id(child)
        for module in model.modules()
        if any(name == "experts" for name, _ in module.named_children())
        for child in _linears(module)
        if _outputs(child) in counts
    }


def _linears(module: nn.Module) -> Iterator[nn.Module]:
    """The ordinary linear layers of a module, without those of its experts."""
    for name, child in module.named_children():
        if is_ordinary(child):
            yield child
        elif name != "experts":
            yield from _linears(child)


def _outputs(layer: nn.Linear | Conv1D) -> int:
    """Number of outputs of a linear layer."""
    return int(layer.nf if isinstance(layer, Conv1D) else layer.out_features)


def _parent_reads_weight(model: PreTrainedModel, name: str) -> bool:
    """Whether the parent module of the layer `name` reads the layer's weights in its own code."""
    parent, _, child = name.rpartition(".")
    kind: type[nn.Module] = type(model.get_submodule(parent))
    return child in _weights_read_by(kind)  # type: ignore[arg-type]


@cache
def _weights_read_by(kind: type[nn.Module]) -> frozenset[str]:
    """Names of the child modules whose weights the code of the class `kind` reads."""
    # One function at a time: to find a class, `inspect` would parse its whole file. The names in the compiled code tell
    # in no time that most functions read no weight.
    functions = (
        inspect.unwrap(member)
        for base in kind.__mro__
        if not base.__module__.startswith(("torch.", "builtins"))
        for member in vars(base).values()
        if inspect.isfunction(member)
    )
    readers = (function for function in functions if "weight" in _names_in(function.__code__))
    return frozenset(name for function in readers for name in _READ.findall(_source_of(function)))


def _names_in(code: CodeType) -> Iterator[str]:
    """The names of attributes and globals in a function's code, inner functions included."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _source_of(function: Callable[..., object]) -> str:
    """The source of a function; empty for a function created at run time."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""
