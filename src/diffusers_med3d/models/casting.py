"""Casting networks to another precision without a warning that does not apply to them."""

import logging
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from diffusers import ModelMixin as _DiffusersModel  # what the mixin is mixed into
else:
    _DiffusersModel = object

_LOGGER = logging.getLogger("diffusers.models.modeling_utils")


def _applies(record: logging.LogRecord) -> bool:
    return "should be kept in float32" not in record.getMessage()


class QuietCastMixin(_DiffusersModel):
    """``to`` of diffusers' models, which warns at every cast that modules "should be kept in float32", even of none.

    Ours need no warning: only the quantiser of `VQModel3D` must stay in float32, and it does so by itself.
    """

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As ``torch.nn.Module.to``."""
        _LOGGER.addFilter(_applies)
        try:
            return super().to(*args, **kwargs)
        finally:
            _LOGGER.removeFilter(_applies)
