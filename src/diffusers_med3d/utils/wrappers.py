"""Networks and weights without what compilers and distributed training put around them."""

from collections.abc import Mapping
from typing import Any, TypeVar

from accelerate.utils import extract_model_from_parallel
from torch import nn

T = TypeVar("T")

PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and `torch.compile` put before the names of weights."""


def unwrapped(model: nn.Module) -> Any:
    """Return the network inside of what `torch.compile`, DistributedDataParallel and the like put around it.

    It shares the weights; its parameters and layers have their own names, without `_orig_mod.` or `module.`.
    """
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    return model if inner is model else unwrapped(inner)


def without_prefixes(state: Mapping[str, T]) -> dict[str, T]:
    """Return a state dict without the `PREFIXES` that all of its names have."""
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            return without_prefixes({key.removeprefix(prefix): value for key, value in state.items()})
    return dict(state)
