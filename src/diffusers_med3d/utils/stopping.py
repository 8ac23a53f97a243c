"""Why a run ends before its time: something that only its user can mend, or a signal."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What asks a run to stop: `kill` and batch systems, Ctrl-C, and SLURM's `--signal=USR1@120` before the time is up."""


class TrainingStopped(RuntimeError):
    """A run that cannot go on, for a reason that its message says in one line; the checkpoints are whole."""


@contextmanager
def stopped_in_one_line() -> Iterator[None]:
    """Inside, `TrainingStopped` ends the script with its message in one line and exit code 1."""
    try:
        yield
    except TrainingStopped as error:
        raise SystemExit(f"{Path(sys.argv[0]).name}: stopped: {' '.join(str(error).split())}") from error


@contextmanager
def lost_process_named() -> Iterator[None]:
    """Inside, what a collective call says when another process is gone becomes `TrainingStopped`, in plain words."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise TrainingStopped(
            "Another process of this run has ended, and this one cannot go on without it; the message of that process "
            "says why. Checkpoints are whole: go on with --resume_from_checkpoint latest."
        ) from error


def is_lost_process(error: BaseException) -> bool:
    """Return whether an error is gloo's of a connection that the other process no longer holds."""
    return "closed by peer" in str(error) or "reset by peer" in str(error)


class SignalWatch:
    """Remembers the first of `SIGNALS` that arrives while it is entered; a second Ctrl-C interrupts at once.

    Further signals of batch systems are passed over, so that a warning and the end of the grace period do not cut off
    the save that the first one asked for. Outside of the main thread, where Python has no handlers, it sees none.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "SignalWatch":
        self.received = None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)
