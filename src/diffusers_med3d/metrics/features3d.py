"""Features of whole volumes without a network and without weights: first-order wavelet scattering."""

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F


class ScatteringFeatures:
    """Callable: volumes (B, C, X, Y, Z) in [0, 1] -> (B, C D): how much detail of which size is where, by channel.

    First-order scattering (Bruna and Mallat, IEEE PAMI 35, 2013, eq. 6, in three dimensions with Haar wavelets): at
    each scale the 7 Haar details, their moduli averaged over a grid of regions, and at the end the coarse volume itself
    averaged over the same regions. It needs no download, was trained on nothing, sees all three dimensions at once, and
    tells blur, noise and misplaced anatomy; unlike a network it knows nothing of what matters to a reader.

    Details of scale j are multiplied by 32 * 2^(levels - j), the coarse volume by 4: brains, as natural pictures, lose
    amplitude towards fine scales, and without the gains the kernel of KID would see coarse anatomy only.

    Args:
        levels: scales; the finest details are two voxels wide, the coarsest 2^levels.
        regions: regions per side.

    Attributes:
        extractor: the name to stand beside every figure made with it.
        blocks: the whole vector as one part.
    """

    DETAIL_GAIN, COARSE_GAIN = 32.0, 4.0
    """Bring details and coarse volume of T1 brains at 3 mm to about 1, where KID's cubic kernel sees beyond means."""

    def __init__(self, levels: int = 3, regions: int = 4) -> None:
        if levels < 1 or regions < 1:
            raise ValueError(f"levels and regions must be at least 1, got {levels} and {regions}.")
        self.levels, self.regions = levels, regions
        self.extractor = f"haar-scattering-3d (no weights), {levels} levels, {regions}^3 regions"
        self.blocks: dict[str, slice] = {}
        bands = []
        for signs in product((1.0, -1.0), repeat=3):
            low, high = torch.tensor([0.5, 0.5]), torch.tensor([0.5, -0.5])
            bands.append(torch.einsum("i,j,k->ijk", *(low if sign > 0 else high for sign in signs)))
        self.filters = torch.stack(bands)[:, None]  # (8, 1, 2, 2, 2), the first the average

    @torch.no_grad()
    def __call__(self, volumes: Tensor) -> Tensor:
        if volumes.ndim != 5:
            raise ValueError(f"Scattering features need volumes (B, C, X, Y, Z), got {tuple(volumes.shape)}.")
        if min(volumes.shape[2:]) < self.regions * 2**self.levels:
            raise ValueError(
                f"{self.levels} levels and {self.regions} regions need {self.regions * 2**self.levels} voxels a side, "
                f"got {tuple(volumes.shape[2:])}."
            )
        coarse, features = volumes.detach().float().flatten(0, 1)[:, None], []  # every channel a volume of its own
        for level in range(1, self.levels + 1):
            bands = F.conv3d(coarse, self.filters.to(coarse), stride=2)
            coarse, details = bands[:, :1], bands[:, 1:].abs()
            gain = self.DETAIL_GAIN * 2.0 ** (self.levels - level)
            features.append(gain * F.adaptive_avg_pool3d(details, self.regions).flatten(1))
        features.append(self.COARSE_GAIN * F.adaptive_avg_pool3d(coarse, self.regions).flatten(1))
        together = torch.cat(features, dim=1).reshape(len(volumes), -1).cpu()
        self.blocks = {"3D": slice(0, together.shape[1])}
        return together
