"""A set of volumes of one kind, all through the same loader."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class VolumeSet:
    """Volumes of one kind, all through the same loader.

    Args:
        volumes: (N, C, X, Y, Z) in [0, 1].
        labels: class of each.
        subjects: whose scan each is; for samples a name per seed. Sets with the same names are compared in pairs.

    Raises:
        ValueError: counts that differ, volumes that are not 5-D or not finite.
    """

    volumes: Tensor
    labels: list[int]
    subjects: list[str]

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
