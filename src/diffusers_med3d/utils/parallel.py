"""Work on many items at once, with a progress bar."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

from tqdm.auto import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")


def parallel(
    function: Callable[[Job], Result], jobs: Iterable[Job], num_proc: int, what: str, unit: str = "scan"
) -> Iterator[Result]:
    """Results in the order of the jobs; with one process, of this process.

    Args:
        function: of a module, so that other processes find it.
        jobs: its arguments.
        num_proc: processes.
        what: name of the progress bar.
        unit: of the progress bar.
    """
    jobs = list(jobs)
    if num_proc <= 1 or len(jobs) <= 1:
        yield from tqdm(map(function, jobs), what, len(jobs), unit=unit)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of torch
    with ProcessPoolExecutor(min(num_proc, len(jobs)), mp_context=context) as pool:
        yield from tqdm(pool.map(function, jobs), what, len(jobs), unit=unit)
