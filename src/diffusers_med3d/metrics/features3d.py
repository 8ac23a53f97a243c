"""Features of whole volumes without a network and without weights: first-order wavelet scattering."""

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F


class ScatteringFeatures:
    """Callable: volumes (B, 1, X, Y, Z) in [0, 1] -> (B, D): how much detail of which size is where.

    First-order scattering (Bruna and Mallat, IEEE PAMI 35, 2013, eq. 6, in three dimensions with Haar wavelets): at
    each scale the 7 Haar details, their moduli averaged over a grid of regions, and at the end the coarse volume itself
    averaged over the same regions. It needs no download, was trained on nothing, sees all three dimensions at once, and
    tells blur, noise and misplaced anatomy; unlike a network it knows nothing of what matters to a reader.

    Details of scale j are multiplied by 2^(levels - j): natural pictures lose amplitude towards fine scales, and
    without the gain the polynomial kernel of KID would see coarse anatomy only.

    Args:
        levels: scales; the finest details are two voxels wide, the coarsest 2^levels.
        regions: regions per side.

    Attributes:
        extractor: the name to stand beside every figure made with it.
        blocks: the whole vector as one part.
    """

    GAIN = 4.0
    """Of all features: brings their products to about 1, where the cubic kernel of KID sees more than the mean."""

    def __init__(self, levels: int = 3, regions: int = 4) -> None:
        if levels < 1 or regions < 1:
            raise ValueError(f"levels and regions must be at least 1, got {levels} and {regions}.")
        self.levels, self.regions = levels, regions
        self.extractor = f"haar-scattering-3d (no weights), {levels} levels, {regions}^3 regions"
        size = regions**3 * (1 + 7 * levels)
        self.blocks = {"3D": slice(0, size)}
        bands = []
        for signs in product((1.0, -1.0), repeat=3):
            low, high = torch.tensor([0.5, 0.5]), torch.tensor([0.5, -0.5])
            bands.append(torch.einsum("i,j,k->ijk", *(low if sign > 0 else high for sign in signs)))
        self.filters = torch.stack(bands)[:, None]  # (8, 1, 2, 2, 2), the first the average

    @torch.no_grad()
    def __call__(self, volumes: Tensor) -> Tensor:
        if volumes.ndim != 5 or volumes.shape[1] != 1:
            raise ValueError(f"Scattering features need volumes (B, 1, X, Y, Z), got {tuple(volumes.shape)}.")
        if min(volumes.shape[2:]) < self.regions * 2**self.levels:
            raise ValueError(
                f"{self.levels} levels and {self.regions} regions need {self.regions * 2**self.levels} voxels a side, "
                f"got {tuple(volumes.shape[2:])}."
            )
        coarse, features = volumes.detach().float(), []
        for level in range(1, self.levels + 1):
            bands = F.conv3d(coarse, self.filters.to(coarse), stride=2)
            coarse, details = bands[:, :1], bands[:, 1:].abs()
            features.append(F.adaptive_avg_pool3d(details, self.regions).flatten(1) * 2.0 ** (self.levels - level))
        features.append(F.adaptive_avg_pool3d(coarse, self.regions).flatten(1))
        return self.GAIN * torch.cat(features, dim=1).cpu()
