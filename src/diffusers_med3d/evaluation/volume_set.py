"""A set of volumes of one kind, all through the same loader."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class LeftOut(NamedTuple):
    """A volume that cannot be judged: its row among those asked for, its name, its class and why."""

    row: int
    name: str
    label: int
    reason: str


@dataclass(frozen=True)
class VolumeSet:
    """Volumes of one kind, all through the same loader.

    Args:
        volumes: (N, C, X, Y, Z) in [0, 1].
        labels: class of each.
        subjects: whose scan each is; for samples a name per seed. Sets with the same names are compared in pairs.
        left_out: volumes that could not be read or judged, such as samples with NaN.

    Raises:
        ValueError: counts that differ, volumes that are not 5-D or not finite.
    """

    volumes: Tensor
    labels: list[int]
    subjects: list[str]
    left_out: tuple[LeftOut, ...] = ()

    def __post_init__(self) -> None:
        if self.volumes.ndim != 5 or not len(self.volumes) == len(self.labels) == len(self.subjects) > 0:
            raise ValueError(
                "Expected volumes (N, C, X, Y, Z) with N labels and subjects, got "
                f"{tuple(self.volumes.shape)}, {len(self.labels)} and {len(self.subjects)}."
            )
        if not self.volumes.isfinite().all():
            raise ValueError(f"{int((~self.volumes.isfinite()).sum())} voxels are NaN or infinite.")

    def __len__(self) -> int:
        return len(self.volumes)

    def note(self, name: str) -> str:
        """Return a sentence that counts what was left out of the set called ``name``; empty where nothing was."""
        if not self.left_out:
            return ""
        total, first = len(self) + len(self.left_out), self.left_out[0]
        return (
            f"{len(self.left_out)} of {total} volumes of {name} cannot be judged and are left out, the first is "
            f"{first.name}: {first.reason.rstrip('.')}."
        )
