"""A set of volumes of one kind, all through the same loader."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from ..utils.padding import centred


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

    def padded(self, shape: Sequence[int]) -> "VolumeSet":
        """The volumes in the middle of a larger grid (X, Y, Z) of background.

        Raises:
            ValueError: not three sides, or one that is shorter than that of the volumes.
        """
        own = tuple(self.volumes.shape[2:])
        if len(shape) != 3 or any(wanted < side for wanted, side in zip(shape, own, strict=True)):
            raise ValueError(
                f"volumes of {own} cannot be padded to {tuple(shape)}: expected three sides, none shorter."
            )
        return replace(self, volumes=centred(self.volumes, shape))

    def note(self, name: str) -> str:
        """Return a sentence that counts what was left out of the set called ``name``; empty where nothing was."""
        if not self.left_out:
            return ""
        total, first = len(self) + len(self.left_out), self.left_out[0]
        return (
            f"{len(self.left_out)} of {total} volumes of {name} cannot be judged and are left out, the first is "
            f"{first.name}: {first.reason.rstrip('.')}."
        )
