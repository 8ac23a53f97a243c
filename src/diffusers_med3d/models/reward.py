"""Reward models: how real a volume looks, judged by the whole volume (3D) or by its slices (2D).

Both score a volume with one unbounded number, trained towards 1 for a real scan and 0 for heavy damage (see
``spectrum.py``), higher = more real. There is no sigmoid at the end, so the score does not flatten near real scans,
where reinforcement learning has to find its way. GroupNorm only: a sample's score does not depend on its batch.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from monai.networks.blocks import Convolution, ResidualUnit
from torch import nn

from ..hub.publish import PublishMixin
from .casting import QuietCastMixin
from .checkpointing import CheckpointedBlocksMixin
from .sizes import check_volumes

RANGE_TOLERANCE = 1e-3
GAIN = 5.0


class ResidualScorer(CheckpointedBlocksMixin, nn.Module):
    """Residual trunk of MONAI blocks, pooling, two linear layers: (N, C, ...) -> (N,).

    The first convolution, which has no norm (how much detail there is, is what counts), and every unit halve the side.
    The mean of every level's features is pooled, so that texture has a short way to the score, and of the last level
    the maximum too, so that a defect in one place (a cut, a seam) stays visible.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        channels: Sequence[int],
        norm_num_groups: int,
        num_orientations: int = 0,
    ) -> None:
        super().__init__()
        norm, act = ("GROUP", {"num_groups": norm_num_groups}), ("LEAKYRELU", {"negative_slope": 0.1})
        widths = list(channels)
        self.stem = Convolution(spatial_dims, in_channels, widths[0], strides=2, kernel_size=3, act=act, norm=None)
        self.orientation = nn.Embedding(num_orientations, widths[0]) if num_orientations else None
        if self.orientation is not None:
            nn.init.normal_(self.orientation.weight, std=0.02)  # beside features of 0.05, 1 would drown the image
        self.blocks = nn.ModuleList(
            ResidualUnit(spatial_dims, before, after, strides=2, act=act, norm=norm)
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        features = sum(widths) + widths[-1]
        self.head = nn.Sequential(
            nn.LayerNorm(features), nn.Linear(features, widths[-1]), nn.LeakyReLU(0.1), nn.Linear(widths[-1], 1)
        )

    def forward(self, images: torch.Tensor, orientation: int | None = None) -> torch.Tensor:
        """Images (N, C, ...) to scores (N,); ``orientation`` is the axis that the slices are perpendicular to."""
        features = self.pooled(images, orientation).to(next(self.head.parameters()).dtype)
        with torch.autocast(features.device.type, enabled=False):
            return self.head(features).squeeze(1)

    def pooled(self, images: torch.Tensor, orientation: int | None = None) -> torch.Tensor:
        """Images (N, C, ...) to the pooled features (N, D) that the score is made of, in float32."""
        hidden = self._call(self.stem, images)
        # means in float32: bfloat16 has steps of 0.4 %, coarser than the differences that ranking is about
        pooled = [hidden.float().flatten(2).mean(-1)]
        if self.orientation is not None:
            shift = self.orientation.weight[orientation]
            hidden = hidden + shift.view(1, -1, *[1] * (hidden.ndim - 2)).to(hidden.dtype)
        for block in self.blocks:
            hidden = self._call(block, hidden)
            pooled.append(hidden.float().flatten(2).mean(-1))
        pooled.append(hidden.float().flatten(2).amax(-1))
        return torch.cat(pooled, dim=1)


def box_filter(images: torch.Tensor) -> torch.Tensor:
    """Mean over 3 voxels along every spatial axis of (N, C, ...), zero outside; one axis after the other is fastest."""
    pool = F.avg_pool3d if images.ndim == 5 else F.avg_pool2d
    for axis in range(images.ndim - 2):
        kernel = [3 if dim == axis else 1 for dim in range(images.ndim - 2)]
        images = pool(images, kernel, 1, [side // 2 for side in kernel])
    return images


def mirror(volumes: torch.Tensor) -> torch.Tensor:
    """Mirror image of volumes (B, C, X, Y, Z) in the plane across X through the centre of their intensity."""
    side = volumes.shape[2]
    positions = torch.arange(side, device=volumes.device)
    mass = volumes.detach().float().clamp_min(0).sum((1, 3, 4)) + 1e-6  # (B, X)
    twice_the_centre = (2 * (mass * positions).sum(1) / mass.sum(1)).round().long()
    sources = twice_the_centre[:, None] - positions  # (B, X)
    inside = ((sources >= 0) & (sources < side)).to(volumes.dtype)
    rows = torch.arange(volumes.shape[0], device=volumes.device)[:, None]
    mirrored = volumes.movedim(2, 1)[rows, sources.clamp(0, side - 1)]  # (B, X, C, Y, Z)
    return (mirrored * inside[:, :, None, None, None]).movedim(1, 2)


class _RewardModel(PublishMixin, QuietCastMixin, ModelMixin, ConfigMixin):
    """What the two reward models share: checks of the input, what the networks see, the mean over the ensemble.

    A network sees an image, what a 3-voxel box filter takes away from it (fine detail is a twentieth of the intensity
    range and would take long to be noticed), and, with ``compare_sides``, the difference of the filtered image and its
    mirror image: on brains this separates half-swapped scans from others (AUC 0.98, where the step at the seam gives
    0.76), while a network without it has to carry one side's anatomy across the volume to compare.
    """

    _supports_gradient_checkpointing = True
    members: nn.ModuleList

    @property
    def smallest_side(self) -> int:
        """Every side of a volume must have at least this many voxels, so that two remain where pooling begins."""
        return 2 ** (len(self.config.channels) + 1)

    def forward(self, volumes: torch.Tensor, return_members: bool = False) -> torch.Tensor:
        """Score volumes.

        Args:
            volumes: (B, C, X, Y, Z), floating point, in [0, 1].
            return_members: give each member's score.

        Returns:
            scores (B,), the mean over the members; or (B, num_members).

        Raises:
            ValueError: wrong rank, channels, type, size or range, or NaN.
        """
        self.check_input(volumes)
        scores = self._score(volumes.to(self.dtype))  # (B, M)
        return scores if return_members else scores.mean(1)

    def features(self, volumes: torch.Tensor) -> torch.Tensor:
        """The pooled features that scores are made of: volumes as for scoring to float32 (B, D), all members'.

        Raises:
            ValueError: as scoring.
        """
        self.check_input(volumes)
        return self._features(volumes.to(self.dtype))

    def _scorers(self) -> list[ResidualScorer]:
        return [member for member in self.members if isinstance(member, ResidualScorer)]

    def _score(self, volumes: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _features(self, volumes: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _inputs(self, images: torch.Tensor, mirrored: torch.Tensor | None) -> torch.Tensor:
        smooth = box_filter(images)
        inputs = [images, GAIN * (images - smooth)]
        if mirrored is not None:
            inputs.append(GAIN * (smooth - box_filter(mirrored)))
        return torch.cat(inputs, dim=1)

    def check_input(self, volumes: torch.Tensor) -> None:
        """ValueError, as by scoring them, for volumes that cannot be scored."""
        if not volumes.is_floating_point():
            raise ValueError(f"volumes must be floating point in [0, 1], got {volumes.dtype}.")
        check_volumes(volumes, self.config.in_channels)
        if volumes.shape[0] == 0:
            raise ValueError(f"volumes hold no sample: shape {tuple(volumes.shape)}.")
        if min(volumes.shape[2:]) < self.smallest_side:
            raise ValueError(
                f"volume shape {tuple(volumes.shape[2:])} is too small: every side must have at least "
                f"{self.smallest_side} voxels; the nearest that fits is "
                f"{tuple(max(side, self.smallest_side) for side in volumes.shape[2:])}."
            )
        low, high = float(volumes.min()), float(volumes.max())
        if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
            raise ValueError(f"volumes must lie in [0, 1], got values from {low:.4g} to {high:.4g}.")


def _check_architecture(channels: Sequence[int], norm_num_groups: int, num_members: int) -> None:
    if not channels or any(width <= 0 or width % norm_num_groups for width in channels):
        raise ValueError(f"channels must be multiples of norm_num_groups={norm_num_groups}, got {tuple(channels)}.")
    if num_members < 1:
        raise ValueError(f"num_members must be at least 1, got {num_members}.")


class VolumeRewardModel(_RewardModel):
    """Scores a whole volume by realism (shape, left-right agreement, large-scale anatomy).

    Args:
        in_channels: channels of a volume.
        channels: channels of each level; the side is halved at each.
        norm_num_groups: groups of every GroupNorm; every entry of ``channels`` must be a multiple.
        num_members: networks of the ensemble, which differ by their initial weights; the score is their mean.
        compare_sides: show the networks the difference to the mirror image across the first axis (left to right): for
            anatomy that is nearly symmetric.
        data_settings: how the volumes of the training data were made (grid, intensity, classes), as
            ``data.DataSettings.to_dict`` gives it; None where that is not known.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        channels: Sequence[int] = (16, 32, 64, 96),
        norm_num_groups: int = 8,
        num_members: int = 2,
        compare_sides: bool = False,
        data_settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_architecture(channels, norm_num_groups, num_members)
        inputs = (3 if compare_sides else 2) * in_channels
        self.members = nn.ModuleList(ResidualScorer(3, inputs, channels, norm_num_groups) for _ in range(num_members))

    def _score(self, volumes: torch.Tensor) -> torch.Tensor:
        inputs = self._inputs(volumes, mirror(volumes) if self.config.compare_sides else None)
        return torch.stack([member(inputs) for member in self.members], dim=1)

    def _features(self, volumes: torch.Tensor) -> torch.Tensor:
        inputs = self._inputs(volumes, mirror(volumes) if self.config.compare_sides else None)
        return torch.cat([member.pooled(inputs) for member in self._scorers()], dim=1)


class SliceRewardModel(_RewardModel):
    """Scores slices across the three axes by realism (texture, folds, edges); a volume's score is their mean.

    Slices lie evenly between the two positions that cut ``mass_margin`` of the volume's intensity off either end of an
    axis, so they follow the anatomy and not the field of view. In training mode each is moved at random within its own
    interval, by the same share in every volume of the batch: versions of one subject are compared on the same slices.
    One network serves the three orientations; a learned embedding tells it the orientation.

    Args:
        in_channels: channels of a volume.
        channels: channels of each level; the side is halved at each.
        norm_num_groups: groups of every GroupNorm; every entry of ``channels`` must be a multiple.
        num_members: networks of the ensemble, which differ by their initial weights; the score is their mean.
        num_slices: slices per axis.
        mass_margin: share of the intensity that lies before the first and after the last interval of an axis.
        compare_sides: show the networks the difference to the same slice of the mirror image across the first axis
            (left to right): for anatomy that is nearly symmetric.
        data_settings: how the volumes of the training data were made (grid, intensity, classes), as
            ``data.DataSettings.to_dict`` gives it; None where that is not known.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        channels: Sequence[int] = (16, 32, 64, 96),
        norm_num_groups: int = 8,
        num_members: int = 2,
        num_slices: int = 8,
        mass_margin: float = 0.03,
        compare_sides: bool = False,
        data_settings: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check_architecture(channels, norm_num_groups, num_members)
        if num_slices < 1:
            raise ValueError(f"num_slices must be at least 1, got {num_slices}.")
        if not 0 <= mass_margin < 0.5:
            raise ValueError(f"mass_margin must lie in [0, 0.5), got {mass_margin}.")
        inputs = (3 if compare_sides else 2) * in_channels
        self.members = nn.ModuleList(
            ResidualScorer(2, inputs, channels, norm_num_groups, num_orientations=3) for _ in range(num_members)
        )

    def _score(self, volumes: torch.Tensor) -> torch.Tensor:
        batch, scores = volumes.shape[0], []
        for axis, inputs in enumerate(self._planes(volumes)):
            scores.append(torch.stack([member(inputs, axis).view(batch, -1) for member in self.members], dim=1))
        return torch.cat(scores, dim=2).mean(2)  # (B, M, 3 N) -> (B, M)

    def _features(self, volumes: torch.Tensor) -> torch.Tensor:
        """Means over the slices of each axis, one axis after the other."""
        batch, members, found = volumes.shape[0], self._scorers(), []
        for axis, inputs in enumerate(self._planes(volumes)):
            found += [member.pooled(inputs, axis).view(batch, len(inputs) // batch, -1).mean(1) for member in members]
        return torch.cat(found, dim=1)

    def _planes(self, volumes: torch.Tensor) -> Iterator[torch.Tensor]:
        """What the networks see of each axis: the same slices (B * num_slices, C, H, W) for every member."""
        mirrored = mirror(volumes) if self.config.compare_sides else None
        for axis in range(3):
            positions = self.slice_positions(volumes, axis)
            slices = self.slices(volumes, axis, positions).flatten(0, 1)
            others = None if mirrored is None else self.slices(mirrored, axis, positions).flatten(0, 1)
            yield self._inputs(slices, others)

    @staticmethod
    def slices(volumes: torch.Tensor, axis: int, positions: torch.Tensor) -> torch.Tensor:
        """Slices (B, N, C, H, W) of volumes (B, C, X, Y, Z) at ``positions`` (B, N) along ``axis`` (0, 1 or 2)."""
        stacks = volumes.movedim(2 + axis, 1)  # (B, side, C, H, W)
        rows = torch.arange(volumes.shape[0], device=volumes.device)[:, None]
        return stacks[rows, positions]

    def slice_positions(self, volumes: torch.Tensor, axis: int) -> torch.Tensor:
        """Indices (B, num_slices) of the slices of each volume along ``axis``."""
        side = volumes.shape[2 + axis]
        others = [dim for dim in range(1, 5) if dim != 2 + axis]
        # the constant makes an empty volume a uniform one instead of 0 / 0
        mass = volumes.detach().float().clamp_min(0).sum(others) + 1e-6  # (B, side)
        share = mass.cumsum(1) / mass.sum(1, keepdim=True)
        margin = self.config.mass_margin
        low = (share < margin).sum(1, keepdim=True).float()
        high = (share < 1 - margin).sum(1, keepdim=True).float() + 1
        count = self.config.num_slices
        offsets = torch.rand(count, device=volumes.device) if self.training else 0.5
        steps = torch.arange(count, device=volumes.device) + offsets
        return (low + (high - low) * steps / count).long().clamp(0, side - 1)
