"""What every reward function is called, takes and returns."""

import inspect
import math
import numbers
import sys
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from functools import partial
from typing import Any

import numpy as np
import torch


def reward_names(reward_funcs: Sequence[Callable]) -> list[str]:
    """One distinct name per reward for the logs: its `__name__` (a partial's is its function's), numbered if needed."""
    names: list[str] = []
    for func in reward_funcs:
        while isinstance(func, partial):
            func = func.func
        name = func.__name__ if hasattr(func, "__name__") else type(func).__name__
        names.append(name if name not in names else f"{name}_{sum(n.startswith(name) for n in names) + 1}")
    return names


def check_signature(func: Callable, name: str, columns: Sequence[str]) -> None:
    """Refuse a function that cannot be called as `func(volumes, **columns)` (ValueError), before there are volumes."""
    try:  # a module takes anything by its signature, and hands it to `forward`
        signature = inspect.signature(func.forward if isinstance(func, torch.nn.Module) else func)
    except ValueError:  # some compiled functions have none
        return
    try:
        signature.bind(None, **dict.fromkeys(columns))
    except TypeError as error:
        raise ValueError(
            f"the reward {name} cannot be called with volumes and the conditions {list(columns)} ({error}); define it "
            f"as {name}(volumes, **conditions)."
        ) from error


def as_reward_tensor(rewards: Any, size: int, name: str) -> torch.Tensor:
    """Turn what a reward function returned into float32 (size,) on the CPU; None, NaN and infinities become NaN.

    Args:
        rewards: a tensor or array of shape (size,) or (size, 1) of any real type, or a list or tuple of `size` numbers
            or None.
        size: number of volumes that were scored.
        name: of the reward, for messages.

    Raises:
        ValueError: anything else, such as a dict, `(scores, info)`, one number for all volumes, texts or complex
            numbers; with what came and what is wanted.
    """
    wanted = f"expected {size} numbers, or None for what it cannot score"
    if rewards is None:
        raise ValueError(f"Reward {name!r} returned None for {size} volumes; {wanted}.")
    if isinstance(rewards, np.ndarray | np.generic):
        rewards = (
            torch.from_numpy(np.asarray(rewards, np.float64)) if rewards.dtype.kind in "biuf" else rewards.tolist()
        )
    if isinstance(rewards, torch.Tensor):
        if rewards.is_complex() or rewards.is_meta:
            kind = "without values (on the device 'meta')" if rewards.is_meta else f"of {rewards.dtype}"
            raise ValueError(f"Reward {name!r} gave a tensor {kind} for {size} volumes; {wanted}.")
        exact = rewards.detach().to("cpu", torch.float64)
    elif isinstance(rewards, str | bytes | Mapping | Set) or not isinstance(rewards, Collection):
        raise ValueError(f"Reward {name!r} returned {_described(rewards)} for {size} volumes; {wanted}.")
    else:
        found = list(rewards)
        odd = [one for one in found if one is not None and not _is_number(one)]
        if odd:
            raise ValueError(
                f"Reward {name!r} returned a {type(rewards).__name__} of {len(found)} that holds {_described(odd[0])} "
                f"for {size} volumes; {wanted}."
            )
        exact = torch.tensor([math.nan if one is None else _as_float(one) for one in found], dtype=torch.float64)
    values = exact.float()
    beyond = exact[exact.isfinite() & ~values.isfinite()]
    if len(beyond):
        raise ValueError(
            f"Reward {name!r} returned {beyond[0].item():.3g}, which is beyond float32; rewards should be of order 1."
        )
    if values.shape == (size, 1):
        values = values[:, 0]
    if values.shape != (size,):
        raise ValueError(f"Reward {name!r} gave shape {tuple(values.shape)} for {size} volumes; {wanted}.")
    return torch.where(values.isfinite(), values, math.nan)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number of hundreds of digits
        return sys.float_info.max if value > 0 else -sys.float_info.max


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.ndim == 0 and not (torch.is_tensor(value) and value.is_complex())
    return isinstance(value, numbers.Real | np.bool_)


def _described(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, numbers.Real | str | bytes):
        return f"{'the text ' if isinstance(value, str) else ''}{value!r:.60}"
    keys = f" with the keys {list(value)[:3]}" if isinstance(value, Mapping) else ""
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor | np.ndarray) else ""
    return f"a {type(value).__name__}{keys}{shape}"
