"""Calling reward functions: plain, learned or async callables `f(volumes, **conditions)`."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

from ..rl import as_reward_tensor

Rewards = Sequence[float | None] | torch.Tensor
RewardFunc = Callable[..., Rewards | Awaitable[Rewards]]


def reward_names(reward_funcs: Sequence[RewardFunc]) -> list[str]:
    """One distinct name per reward for the logs: its `__name__` (a partial's is its function's), numbered if needed."""
    names: list[str] = []
    for func in reward_funcs:
        while isinstance(func, partial):
            func = func.func
        name = func.__name__ if hasattr(func, "__name__") else type(func).__name__
        names.append(name if name not in names else f"{name}_{sum(n.startswith(name) for n in names) + 1}")
    return names


def check_signature(func: RewardFunc, name: str, columns: Sequence[str]) -> None:
    """Refuse a function that cannot be called as `func(volumes, **columns)` (ValueError), before there are volumes."""
    try:
        signature = inspect.signature(func)
    except ValueError:  # some compiled functions have none
        return
    try:
        signature.bind(None, **dict.fromkeys(columns))
    except TypeError as error:
        raise ValueError(
            f"the reward {name} cannot be called with volumes and the conditions {list(columns)} ({error}); define it "
            f"as {name}(volumes, **conditions)."
        ) from error


async def _gather(pending: Sequence[Awaitable[Rewards]]) -> list[Rewards]:
    return list(await asyncio.gather(*pending))


def score(
    reward_funcs: Sequence[RewardFunc], names: Sequence[str], volumes: torch.Tensor, conditions: dict[str, list[Any]]
) -> torch.Tensor:
    """Rewards of volumes (B, C, X, Y, Z) under all functions: float32 (B, R) on the CPU, NaN = could not be scored.

    Every column of `conditions` is handed over by name, as a list of B values. What async functions wait for runs
    concurrently, in a thread of its own, so that this also works inside a running event loop (a notebook).
    """
    with torch.no_grad():
        results: list[Any] = [func(volumes, **conditions) for func in reward_funcs]
    pending = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    if pending:
        with ThreadPoolExecutor(1) as thread:
            answers = thread.submit(asyncio.run, _gather([results[i] for i in pending])).result()
        for i, answer in zip(pending, answers, strict=True):
            results[i] = answer
    columns = [as_reward_tensor(r, len(volumes), n).cpu() for r, n in zip(results, names, strict=True)]
    return torch.stack(columns, dim=1)
