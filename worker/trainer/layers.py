"""The layers of a transformers model, and what may be done with each as soon as it is loaded."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import nn
from transformers import PreTrainedModel, core_model_loading, modeling_utils

from worker.trainer.linears import body
from worker.trainer.progress import progress


def layer_names(model: PreTrainedModel) -> list[str]:
    """The names of the layers of a causal `model`: the modules of the longest list in its body."""
    inner = {id(module) for module in body(model).modules()}
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and id(module) in inner
    ]
    name, layers = max(lists, key=lambda entry: len(entry[1]), default=("", nn.ModuleList()))
    return [f"{name}.{number}" for number in range(len(layers))]


@contextmanager
def on_load(take: Callable[[nn.Module, int], None]) -> Iterator[None]:
    """Within this context, transformers' loader calls `take(layer, number)` for each layer as soon as it is read.

    So a process that keeps a part of each layer never holds the whole model.
    """
    set_parameter, missing = core_model_loading.set_param_for_module, dict[str, set[str]]()
    # `missing` has the parameters of each layer that are not read yet.

    def set_and_take(model: PreTrainedModel, name: str, *rest: Any) -> None:
        progress.mark()
        set_parameter(model, name, *rest)
        if not missing:
            for layer in layer_names(model):
                parameters = model.get_submodule(layer).named_parameters()
                missing[layer] = {f"{layer}.{parameter}" for parameter, _ in parameters}
        for number, (layer, names) in enumerate(missing.items()):
            if name in names:
                names.remove(name)
                if not names:
                    take(model.get_submodule(layer), number)
                return

    with (
        patch.dict(os.environ, HF_DEACTIVATE_ASYNC_LOAD="1"),  # else threads would read the next layers meanwhile
        patch.object(core_model_loading, "set_param_for_module", set_and_take),
        patch.object(modeling_utils, "caching_allocator_warmup"),  # it allocates the whole model
    ):
        yield
