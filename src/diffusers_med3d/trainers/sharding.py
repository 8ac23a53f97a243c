"""Networks whose weights FSDP2 has divided between processes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule


def gathered_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict of a network, divided or not, in every process; all of them must call it."""
    if isinstance(model, FSDPModule):
        return cast(dict[str, Tensor], get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    return model.state_dict()


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """`load_state_dict`, strictly, of the whole state dict into a network that may be divided."""
    if isinstance(model, FSDPModule):
        set_model_state_dict(model, dict(state_dict), options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(state_dict, strict=True)


@contextmanager
def whole_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the network holds these weights in place of its share, and is of its own class: it can be saved.

    FSDP2 replaces parameters by parts of them and the class by a subclass of its own, and `save_pretrained` can write
    neither. Afterwards the network is as it was.

    Args:
        model: the network, divided or not.
        state_dict: all of its weights, gathered.
    """
    divided = [
        (module, name, parameter, f"{prefix}.{name}" if prefix else name)
        for prefix, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    kind = type(model)
    try:
        if isinstance(model, FSDPModule):
            model.__class__ = kind.__bases__[1]  # torch makes the subclass as (FSDPModule, class of the network)
        for module, name, _, key in divided:
            module._parameters[name] = nn.Parameter(state_dict[key], requires_grad=False)
        yield
    finally:
        model.__class__ = kind
        for module, name, parameter, _ in divided:
            module._parameters[name] = parameter
