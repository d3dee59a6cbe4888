"""Which linear layers of a model an adapter sits on, and which are quantised: by what they are, not by their names.

An ordinary linear layer takes one tensor and gives one, W x + b, and nobody else reads W. Some look so and are not:
routers of mixtures of experts that give scores and indices, layers whose parent clamps or multiplies their weights,
and the towers of models that also see or hear, which text never reaches.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

ORDINARY = (nn.Linear, Conv1D, Linear4bit, Linear8bitLt)
_READ = re.compile(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size))")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
"""What configurations call the number of experts that a router chooses from."""


def adaptable(model: Any) -> list[str]:
    """Names of the layers of a causal `model` that "all-linear" means.

    They are the ordinary linear layers of its text decoder: attention, dense and shared feed-forward layers. Not the
    head, not routers, not the experts that a router chooses from, and nothing that text does not pass.
    """
    head, inside, routers = model.get_output_embeddings(), {id(m) for m in _decoder(model).modules()}, _routers(model)
    return [
        name
        for name, module in model.named_modules()
        if is_ordinary(module)
        and module is not head
        and id(module) in inside
        and id(module) not in routers
        and not _of_experts(name)
        and not _is_read(model, name)
    ]


def body(model: Any) -> Any:
    """A causal model without its head."""
    return model.model if model.base_model is model else model.base_model


def _decoder(model: Any) -> Any:
    """The part of a causal model that text passes, its head apart. Some models call their head a decoder."""
    found = model.get_decoder()
    return body(model) if found is None or found is model or isinstance(found, nn.Linear) else found


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
    """Whether `model` chooses from experts."""
    return any(_of_experts(name) for name, _ in model.named_modules())


def is_ordinary(module: nn.Module) -> bool:
    """Whether a module is a linear layer and nothing else."""
    kind = type(module)
    return kind in ORDINARY or (isinstance(module, nn.Linear) and _multiplies(kind))  # type: ignore[arg-type]


@cache
def _multiplies(kind: type[nn.Linear]) -> bool:
    """Whether layers of a class made from `nn.Linear` give x Wᵀ + b, as a layer of that class, all else unset, does."""
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
    found: set[str] = set()
    for base in kind.__mro__:
        if not base.__module__.startswith(("torch.", "builtins")):
            try:
                source = inspect.getsource(base)
            except (OSError, TypeError):  # made at run time
                continue
            found |= set(_READ.findall(source))
    return frozenset(found)
