"""Checks of numbers that a user gave, with name, value and what was expected in the message."""

import inspect
import math
import numbers
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np


def is_whole(value: Any) -> bool:
    """Whether this is a whole number, Python's or numpy's."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """A whole number, Python's or numpy's, as an int; anything else, or less than ``least``, is a ValueError."""
    if not is_whole(value) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} must be a whole number{bound}, got {value!r:.200}.")
    return int(value)


def is_number(value: Any) -> bool:
    """Whether this is a real number, Python's or numpy's, and not NaN."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and not math.isnan(value)


def number(name: str, value: Any) -> float:
    """A real number, Python's or numpy's, as an int or a float; NaN and anything else is a ValueError."""
    if not is_number(value):
        raise ValueError(f"{name} must be a number, got {value!r:.200}.")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def three_numbers(values: object) -> tuple[float, float, float] | None:
    """Three finite numbers from any sequence of them; None for anything else."""
    try:
        x, y, z = (float(value) for value in values)  # type: ignore[attr-defined]
    except (TypeError, ValueError, OverflowError):
        return None
    found = (x, y, z)
    return None if isinstance(values, str) or not all(map(math.isfinite, found)) else found


def positive_spacing(spacing: object) -> tuple[float, float, float]:
    """Three positive numbers (mm) from any sequence of them; anything else is a ValueError."""
    sides = three_numbers(spacing)
    if sides is None or min(sides) <= 0:
        raise ValueError(f"spacing must be three positive numbers (mm), got {spacing!r:.200}.")
    return sides


def true_or_false(name: str, value: Any) -> bool:
    """True or False, Python's or numpy's; anything else is a ValueError."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r:.200}.")
    return bool(value)


_CHECKS = {int: whole_number, float: number, bool: true_or_false}


def check_kind(name: str, value: Any, kind: Any) -> Any:
    """A value as Python's own number, where ``kind`` asks for one; other kinds are handed back unchecked.

    Args:
        name: for messages.
        value: what a user gave.
        kind: annotation: int, float, bool or a list of one of them, with or without None.

    Raises:
        ValueError: a value of another kind, or NaN.
    """
    kinds = (kind,) if kind in _CHECKS else (get_args(kind) if type(None) in get_args(kind) else (kind,))
    if value is None and type(None) in kinds:
        return None
    for one in kinds:
        if one in _CHECKS:
            return _CHECKS[one](name, value)
        if getattr(one, "__origin__", None) is list and get_args(one)[0] in _CHECKS:
            if not isinstance(value, list | tuple | np.ndarray):
                raise ValueError(f"{name} must be a list of numbers, got {value!r:.200}.")
            return [_CHECKS[get_args(one)[0]](f"{name}[{i}]", entry) for i, entry in enumerate(value)]
    return value


def checked_fields(settings: Any, inherited: Mapping[str, type]) -> dict[str, Any]:
    """The fields that this package's own dataclasses declare, numbers and truth values as Python's own.

    Args:
        settings: instance of a dataclass.
        inherited: other fields that are checked, and what they must be.

    Raises:
        ValueError: see `check_kind`.
    """
    kinds: dict[str, Any] = dict(inherited)
    for base in reversed(type(settings).__mro__):
        if base.__module__.split(".")[0] == __name__.split(".")[0]:
            kinds |= inspect.get_annotations(base)
    return {name: check_kind(name, vars(settings)[name], kind) for name, kind in kinds.items()}


def check_least(settings: Mapping[str, Any], least: Mapping[str, float]) -> None:
    """Refuse, with a ValueError, values below those of ``least``, and infinite ones."""
    for name, minimum in least.items():
        if not minimum <= settings[name] < math.inf:
            finite = "finite and " if settings[name] == math.inf else ""
            raise ValueError(f"{name} must be {finite}at least {minimum}, got {settings[name]}.")
