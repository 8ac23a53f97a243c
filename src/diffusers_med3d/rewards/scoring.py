"""Calling reward functions: plain, learned or async callables `f(volumes, **conditions)`."""

import asyncio
import inspect
import threading
import traceback
import warnings
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..rl import as_reward_tensor

Rewards = Sequence[float | None] | torch.Tensor
RewardFunc = Callable[..., Rewards | Awaitable[Rewards]]

LOOP_GRACE = 5.0
"""Seconds after which coroutines that should have ended by themselves are given up."""


def score(
    reward_funcs: Sequence[RewardFunc],
    names: Sequence[str],
    volumes: torch.Tensor,
    conditions: dict[str, list[Any]],
    timeout: float | None = None,
    keep_going: bool = False,
) -> torch.Tensor:
    """Return the rewards of volumes (B, C, X, Y, Z) under all functions: float32 (B, R) on the CPU, NaN = no score.

    Every function gets its own copy of the voxels, and every column of `conditions` by name, as a list of B values.
    What async functions wait for runs concurrently. All of it runs in a thread, so that this also works inside a
    running event loop (a notebook).

    Args:
        reward_funcs: see `load_reward`.
        names: of the functions, for messages.
        volumes: float32 in [0, 1].
        conditions: B values for each name.
        timeout: seconds that one function may take, None for no limit. Nothing can end a thread: a function that hangs
            goes on in the background and ends with the process.
        keep_going: where a function raises an error or takes too long, warn and leave all volumes without its score,
            instead of raising ValueError.

    Raises:
        ValueError: a function that returns something else than B numbers; one that fails, unless `keep_going`.
    """
    results: list[Any] = []
    for func in reward_funcs:
        given = {name: list(values) for name, values in conditions.items()}
        results.append(_in_thread(partial(func, volumes.clone(), **given), volumes.device, timeout))
    pending = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    if pending:
        waiting = partial(asyncio.run, _gather([results[i] for i in pending], timeout))
        # a coroutine that blocks its event loop cannot be timed out from inside the loop
        answers = _in_thread(waiting, volumes.device, None if timeout is None else timeout + LOOP_GRACE)
        for position, i in enumerate(pending):
            results[i] = answers if isinstance(answers, Exception) else answers[position]
    columns = []
    for name, result in zip(names, results, strict=True):
        if isinstance(result, Exception):
            message = _failure(name, result, len(volumes), timeout)
            if not keep_going:
                raise ValueError(message) from result
            warnings.warn(f"{message} Their samples do not count in this update.", stacklevel=2)
            columns.append(torch.full((len(volumes),), torch.nan))
        else:
            columns.append(as_reward_tensor(result, len(volumes), name))
    return torch.stack(columns, dim=1)


def _in_thread(function: Callable[[], Any], device: torch.device, timeout: float | None) -> Any:
    """What a function returns, or the exception that it raised; TimeoutError after `timeout` seconds."""
    answer: list[Any] = []

    def run() -> None:
        try:
            with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                answer.append(function())
        except Exception as error:
            answer.append(error)
        except SystemExit as error:  # which would end the thread alone, without a word
            answer.append(RuntimeError(f"it called sys.exit({error.code!r})"))

    thread = threading.Thread(target=run, daemon=True)  # a daemon does not keep the process from ending
    thread.start()
    thread.join(None if timeout is None else min(timeout, threading.TIMEOUT_MAX))
    return answer[0] if answer else TimeoutError()


async def _gather(pending: Sequence[Awaitable[Rewards]], timeout: float | None) -> list[Any]:
    waiting = [asyncio.wait_for(one, timeout) for one in pending]
    return list(await asyncio.gather(*waiting, return_exceptions=True))


def _failure(name: str, error: Exception, size: int, timeout: float | None) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return f"Reward {name!r} took more than {timeout:g} seconds for {size} volumes."
    said = " ".join(f"{type(error).__name__}: {error}".split())
    place = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(place[-1].filename).name}, line {place[-1].lineno})" if place else ""
    return f"Reward {name!r} failed on {size} volumes with {said.rstrip('.: ')}{where}."
