"""A decoder computed slab by slab along the first spatial axis: the values of the whole decode in less memory.

Tiles that are decoded apart differ grossly from the whole, because group normalisation sees the whole volume
(docs/pitfalls.md, 20). Here statistics are of the whole volume and convolutions read one voxel beyond their slab. What
is kept whole is one tensor per residual block; what an upsampling makes, the largest of all, never is.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from monai.networks.blocks import Convolution, UpSample
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch import Tensor, nn
from torch.nn import functional as F

from .convolution import convolve


class Source(Protocol):
    """A tensor (B, C, X, Y, Z) that may be computed only where it is read; `length` is X."""

    length: int

    def read(self, start: int, stop: int) -> Tensor:
        """The part from `start` to `stop` of the first spatial axis."""


class _Whole:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.length = tensor, tensor.shape[2]

    def read(self, start: int, stop: int) -> Tensor:
        return self.tensor[:, :, start:stop]


class _Upsampled:
    """What `UpSample` makes of `source`: each voxel becomes two along every axis."""

    def __init__(self, source: Source, block: UpSample) -> None:
        self.source, self.block, self.length = source, block, 2 * source.length

    def read(self, start: int, stop: int) -> Tensor:
        if "deconv" in self.block._modules:  # kernel 2, stride 2: no voxel reaches beyond its own two
            low = self.source.read(start // 2, -(-stop // 2))
            return self.block(low)[:, :, start % 2 : start % 2 + stop - start]
        first, last = max(start - 1, 0), min(stop + 1, self.length)
        low = self.source.read(first // 2, -(-last // 2))
        high = self.block.upsample_non_trainable(low)[:, :, first % 2 : first % 2 + last - first]
        return _convolve(self.block.postconv.conv, high, first == start, last == stop)


class _Normalised:
    """`source` after a group norm with the statistics of the whole."""

    def __init__(self, source: Source, norm: nn.GroupNorm, parts: int) -> None:
        self.source, self.length = source, source.length
        self.scale, self.shift = _group_norm(source, norm, parts)

    def read(self, start: int, stop: int) -> Tensor:
        return self.source.read(start, stop) * self.scale + self.shift


def decode_in_slabs(blocks: nn.ModuleList, latents: Tensor, parts: int) -> Tensor:
    """What the blocks of MONAI's decoder make of `latents` (B, c, x, y, z), up to rounding; without gradients.

    Args:
        blocks: of the decoder.
        latents: after the convolution that follows the quantisation.
        parts: slabs of every layer; more take less memory.
    """
    source: Source = _Whole(latents)
    for block in blocks:
        if isinstance(block, AEKLResBlock):
            source = _Whole(_residual(block, source, parts))
        elif isinstance(block, UpSample):
            source = _Upsampled(source, block)
        elif isinstance(block, nn.GroupNorm):
            source = _Normalised(source, block, parts)
        elif isinstance(block, Convolution):
            source = _Whole(_filled(block.conv, source, parts))
        else:  # attention sees all places at once
            source = _Whole(block(source.read(0, source.length)))
    return source.read(0, source.length)


def _slabs(length: int, parts: int) -> Iterator[tuple[int, int]]:
    size = -(-length // parts)
    for start in range(0, length, size):
        yield start, min(start + size, length)


def _convolve(conv: nn.Conv3d, x: Tensor, at_start: bool, at_stop: bool) -> Tensor:
    """A convolution of kernel 3 whose input has one more voxel on either side of the first axis, but for the ends of
    the volume, where zeros stand for it."""
    if at_start or at_stop:
        x = F.pad(x, (0, 0, 0, 0, int(at_start), int(at_stop)))
    return convolve(x, conv.weight, conv.bias, (0, 1, 1))


def _filled(conv: nn.Conv3d, source: Source, parts: int) -> Tensor:
    """The whole output of a convolution of kernel 3."""
    made: Tensor | None = None
    for start, stop in _slabs(source.length, parts):
        first, last = max(start - 1, 0), min(stop + 1, source.length)
        slab = _convolve(conv, source.read(first, last), first == start, last == stop)
        if made is None:
            made = slab.new_empty(*slab.shape[:2], source.length, *slab.shape[3:])
        made[:, :, start:stop] = slab
    assert made is not None
    return made


def _group_norm(source: Source, norm: nn.GroupNorm, parts: int) -> tuple[Tensor, Tensor]:
    """Factor and addend (B, C, 1, 1, 1) of a group norm over the whole source.

    Means and variances of the slabs are put together as in Chan et al. 1979 ("Updating formulae and a pairwise
    algorithm for computing sample variances").
    """
    counts, means, variances = [], [], []
    for start, stop in _slabs(source.length, parts):
        grouped = source.read(start, stop).unflatten(1, (norm.num_groups, -1)).flatten(2)
        variance, mean = torch.var_mean(grouped.float(), dim=2, correction=0)  # (B, groups)
        counts.append(grouped.shape[2])
        means.append(mean.double())
        variances.append(variance.double())
        dtype = grouped.dtype
    weights = torch.tensor(counts, dtype=torch.float64, device=means[0].device)
    weights = (weights / weights.sum()).view(-1, 1, 1)
    each = torch.stack(means)  # (slabs, B, groups)
    mean = (weights * each).sum(0)
    variance = (weights * (torch.stack(variances) + (each - mean).square())).sum(0)
    per_group = norm.num_channels // norm.num_groups
    mean = mean.repeat_interleave(per_group, dim=1)
    scale = (variance + norm.eps).rsqrt().repeat_interleave(per_group, dim=1) * norm.weight.double()
    shift = norm.bias.double() - mean * scale
    return scale.to(dtype)[..., None, None, None], shift.to(dtype)[..., None, None, None]


def _residual(block: AEKLResBlock, source: Source, parts: int) -> Tensor:
    hidden = _filled(block.conv1.conv, _Activated(source, block.norm1, parts), parts)
    scale, shift = _group_norm(_Whole(hidden), block.norm2, parts)
    plane: Tensor | None = None  # the last of the slab before, which its result has overwritten
    for start, stop in _slabs(source.length, parts):
        at_stop = stop == source.length
        slab = hidden[:, :, start : stop + (not at_stop)]
        if plane is not None:
            slab = torch.cat([plane, slab], dim=2)
        plane = hidden[:, :, stop - 1 : stop].clone()
        made = _convolve(block.conv2.conv, F.silu(slab * scale + shift, inplace=True), start == 0, at_stop)
        before = source.read(start, stop)
        if isinstance(block.nin_shortcut, Convolution):
            shortcut = block.nin_shortcut.conv
            before = convolve(before, shortcut.weight, shortcut.bias)
        hidden[:, :, start:stop] = made.add_(before)
    return hidden


class _Activated(_Normalised):
    def read(self, start: int, stop: int) -> Tensor:
        return F.silu(super().read(start, stop), inplace=True)
