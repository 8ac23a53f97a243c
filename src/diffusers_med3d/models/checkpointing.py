"""Gradient checkpointing block by block: one switch, one call, for every network of this package."""

from collections.abc import Callable
from typing import Any

import torch


class CheckpointedBlocksMixin:
    """``_call`` a block, recomputing it in the backward pass when ``enable_gradient_checkpointing`` was called."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]  # set by diffusers

    def _call(self, block: torch.nn.Module, *inputs: Any) -> Any:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)
