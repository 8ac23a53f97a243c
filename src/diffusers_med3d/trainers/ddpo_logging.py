"""What `DDPOTrainer` records between two log entries, and what it warns about."""

import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

FIRST_RATIO = "ratio/first_step"  # largest |ratio - 1| before any update of a rollout: 0, or something is wrong
LARGEST_RATIO = "ratio/max_deviation"  # largest |ratio - 1| after an update: what epsilon is to be measured against
CLIP_RATIO = "clip_ratio"
CLIP_WARNING_AFTER = 10  # log entries

_LARGEST = (FIRST_RATIO, LARGEST_RATIO)


class Recorder:
    """Values by name. In a log interval `seconds/...` add up, largest ratios keep their maximum, others a mean."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def __call__(self, name: str, value: float) -> None:
        self._values[name].append(value)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Record the wall time of a block as `seconds/<phase>`."""
        start = time.perf_counter()
        yield
        self(f"seconds/{phase}", time.perf_counter() - start)

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()

    def flush(self, accelerator: Accelerator) -> dict[str, float]:
        """What was recorded since the last flush, over all processes, which must have recorded the same names."""
        names = sorted(self._values)
        if not names:
            return {}
        own = torch.stack([self._reduce(name, torch.tensor(self._values[name])) for name in names])
        everyone = accelerator.gather(own.to(accelerator.device)[None])  # (processes, names)
        self._values.clear()
        columns = zip(names, everyone.unbind(dim=1), strict=True)
        return {name: (c.max() if name in _LARGEST else c.nanmean()).item() for name, c in columns}

    @staticmethod
    def _reduce(name: str, values: torch.Tensor) -> torch.Tensor:
        return values.max() if name in _LARGEST else values.sum() if name.startswith("seconds/") else values.nanmean()


class Watch:
    """Warns about a ratio that is not 1 before an update, and about a clip range that can hardly be right.

    Args:
        epsilon: the clip range.
    """

    def __init__(self, epsilon: float) -> None:
        self.epsilon = epsilon
        self._clip_ratios: list[float] = []

    def __call__(self, logs: dict[str, float]) -> None:
        if logs.get(FIRST_RATIO, 0.0) > self.epsilon:
            warnings.warn(
                f"{FIRST_RATIO} is {logs[FIRST_RATIO]:.1e}, more than epsilon ({self.epsilon:.1e}): rollout and update "
                "disagree about one policy (a reward that changes the network, a layer that is not deterministic?).",
                stacklevel=3,
            )
        if CLIP_RATIO not in logs:
            return
        self._clip_ratios.append(logs[CLIP_RATIO])
        if len(self._clip_ratios) == CLIP_WARNING_AFTER and set(self._clip_ratios) in ({0.0}, {1.0}):
            never = self._clip_ratios[0] == 0.0
            warnings.warn(
                f"{CLIP_RATIO} was {self._clip_ratios[0]:.0f} in the first {CLIP_WARNING_AFTER} log entries: "
                f"epsilon={self.epsilon} {'never acts; lower it' if never else 'always acts; raise it'}. "
                "Log-probabilities are means over the latent, so a fitting epsilon depends on its size.",
                stacklevel=3,
            )
