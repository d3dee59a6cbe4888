"""Which linear layers of a model an adapter sits on, and which are quantised: by what they are, not by their names.

An ordinary linear layer takes one tensor and gives one, W x + b, and nobody else reads W. Some look so and are not:
routers of mixtures of experts that give scores and indices, and layers whose parent clamps or multiplies their
weights. Some text never reaches: the towers of models that also see or hear.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ORDINARY = (nn.Linear, Conv1D, Linear4bit, Linear8bitLt)
_READ = re.compile(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size))")
_PROBED = 16
"""Tokens of the text that shows which layers text passes."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
"""Names that configurations have for the number of experts."""


def adaptable(model: Any) -> list[str]:
    """Names of the layers of a causal `model` that "all-linear" means.

    They are the ordinary linear layers through which text passes: attention, dense and shared feed-forward layers. Not
    the head, not routers, not the experts that a router chooses from, and not what has no gradient: the parts of a
    model that see, hear or read another text, and those that choose what a token attends to.
    """
    head, routers = model.get_output_embeddings(), _routers(model)
    found = {
        name: module
        for name, module in model.named_modules()
        if is_ordinary(module)
        and module is not head
        and id(module) not in routers
        and not _of_experts(name)
        and not _is_read(model, name)
        and not _means_experts(model, name.rpartition(".")[2])
    }
    return _with_gradient(model, found)


def _means_experts(model: Any, name: str) -> bool:
    """Whether PEFT takes the `name` of a layer for that of experts, as they were called before they were one tensor.

    A dense or shared layer of that name gets no adapter from PEFT, neither here nor where the adapter is loaded.
    """
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # it asks for the names of the other experts' tensors too
        return True
    return name not in (config.target_modules or ())


def _with_gradient(model: Any, layers: dict[str, nn.Module]) -> list[str]:
    """Names of those of `layers` that the logits of a short text depend on, smoothly: a zero is added to what each of
    them gives, and has a gradient or not. All, where the model cannot compute such a text.
    """
    probes = {name: torch.zeros((), device=model.device, requires_grad=True) for name in layers}

    def add(probe: Tensor) -> Callable[..., Tensor]:
        return lambda layer, args, output: output + probe

    hooks = [layer.register_forward_hook(add(probes[name])) for name, layer in layers.items()]
    ids = torch.arange(_PROBED, device=model.device)[None] % model.config.get_text_config().vocab_size
    try:
        with torch.enable_grad():
            loss = model(input_ids=ids, use_cache=False).logits.float().sum()
        if not loss.requires_grad:
            return []
        gradients = torch.autograd.grad(loss, list(probes.values()), allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # the check before training says what is wrong with the model
        return list(layers)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, gradient in zip(probes, gradients, strict=True) if gradient is not None]


def body(model: Any) -> Any:
    """A causal model without its head."""
    return model.model if model.base_model is model else model.base_model


def short_names(chosen: Sequence[str], modules: Iterable[str]) -> list[str]:
    """The shortest ends of names by which the modules `chosen` are told from all others of `modules`, sorted."""
    others = {end for name in set(modules) - set(chosen) for end in _ends(name)}
    return sorted({next((end for end in _ends(name) if end not in others), name) for name in chosen})


def _ends(name: str) -> list[str]:
    """`a.b.c` → c, b.c, a.b.c"""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


def not_quantised(model: Any) -> list[str]:
    """Names of the linear layers of `model` that packed weights would change.

    Those whose weights somebody else reads, and those that give more than their product.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, ORDINARY) and (not is_ordinary(module) or _is_read(model, name))
    ]


def has_experts(model: Any) -> bool:
    """Whether `model` chooses from experts: its configuration counts them, or it has modules of that name."""
    config = model.config.get_text_config()
    counted = any(getattr(config, name, None) for name in _EXPERTS)
    return counted or any(_of_experts(name) for name, _ in model.named_modules())


def is_ordinary(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing else."""
    kind = type(module)
    return kind in ORDINARY or (isinstance(module, nn.Linear) and _multiplies(kind))  # type: ignore[arg-type]


@cache
def _multiplies(kind: type[nn.Linear]) -> bool:
    """Whether layers of a class made from `nn.Linear` give x Wᵀ + b, as a layer of that class, all else unset, does."""
    with torch.random.fork_rng(devices=[]):  # the seed is for what trains
        layer, x = nn.Linear(8, 4), torch.randn(3, 8)
    expected = layer(x)
    layer.__class__ = kind
    try:
        found = layer(x)
    except Exception:  # it needs what only its model gives it
        return False
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected)


def _of_experts(name: str) -> bool:
    return "experts" in name.split(".")


def _routers(model: Any) -> set[int]:
    """The layers that choose experts, or weigh one that all tokens pass.

    They stand beside experts, and give a number for each of them, or one.
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
    """The ordinary linear layers of a module, those of its experts apart."""
    for name, child in module.named_children():
        if is_ordinary(child):
            yield child
        elif name != "experts":
            yield from _linears(child)


def _outputs(layer: Any) -> int:
    return int(layer.nf if isinstance(layer, Conv1D) else layer.out_features)


def _is_read(model: Any, name: str) -> bool:
    """Whether the code of the module around the layer `name` reads the layer's weights itself."""
    parent, _, child = name.rpartition(".")
    kind: type[nn.Module] = type(model.get_submodule(parent))
    return child in _weights_read_by(kind)  # type: ignore[arg-type]


@cache
def _weights_read_by(kind: type[nn.Module]) -> frozenset[str]:
    """The members of modules of a class whose weights the class's own code reads."""
    # Function by function: to find a class in its file, `inspect` parses all of it.
    functions = (
        inspect.unwrap(member)
        for base in kind.__mro__
        if not base.__module__.startswith(("torch.", "builtins"))
        for member in vars(base).values()
        if inspect.isfunction(member)
    )
    return frozenset(name for function in functions for name in _READ.findall(_source_of(function)))


def _source_of(function: Callable[..., Any]) -> str:
    """The source of a function; nothing of one that was made at run time."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""
