"""Damage of single volumes that the generator does not make by itself, so that fine-tuning finds no way out there.

Blur, noise, noise on top of blur, over-sharpening, wrong contrast, bias field, thick slices, shuffled blocks, a
hemisphere of another subject, cut-off anatomy. Pure functions on one volume (C, X, Y, Z) in [0, 1] in RAS; voxels up to
``FOREGROUND_THRESHOLD`` are background, which only damage that moves anatomy changes. All randomness comes from
``generator``, on the CPU, so a seed gives the same damage on every device.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from ..data.transforms import FOREGROUND_THRESHOLD, flip_and_shift, shift_volume

MAX_SEAM_OFFSET, MAX_MISPLACEMENT = 3, 2
"""Voxels by which the seam of a half-swap and the foreign hemisphere lie beside their places."""


def _uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _integer(generator: torch.Generator, count: int) -> int:
    return int(torch.randint(count, (), generator=generator))


def _normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def _in_foreground(volume: torch.Tensor, damaged: torch.Tensor) -> torch.Tensor:
    return torch.where(volume > FOREGROUND_THRESHOLD, damaged.clamp(0, 1), volume)


def gaussian_smooth(volume: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian filter of (C, X, Y, Z), ``sigma`` in voxels, zero outside."""
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, device=volume.device, dtype=volume.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    smooth = volume[:, None]  # (C, 1, X, Y, Z): channels are filtered apart
    for axis in range(3):
        shape, padding = [1, 1, 1, 1, 1], [0, 0, 0]
        shape[2 + axis], padding[axis] = -1, radius
        smooth = F.conv3d(smooth, kernel.view(shape), padding=padding)
    return smooth[:, 0]


def blur(volume: torch.Tensor, severity: float, generator: torch.Generator) -> torch.Tensor:
    """Gaussian blur of 0.4 to 2 voxels inside the anatomy."""
    return _in_foreground(volume, gaussian_smooth(volume, 0.4 + 1.6 * severity))


def noise(volume: torch.Tensor, severity: float, generator: torch.Generator) -> torch.Tensor:
    """White Gaussian noise, standard deviation 0.02 to 0.15, inside the anatomy."""
    return _in_foreground(volume, volume + (0.02 + 0.13 * severity) * _normal(volume, generator))


def noisy_blur(volume: torch.Tensor, severity: float, generator: torch.Generator) -> torch.Tensor:
    """Noise on top of blur: together they fake the high-frequency power of a sharp scan."""
    return noise(blur(volume, severity, generator), severity, generator)


def oversharpen(volume: torch.Tensor, severity: float, generator: torch.Generator) -> torch.Tensor:
    """Unsharp mask with gain 0.5 to 3: the cheapest way to look sharp, which a reward must not fall for."""
    detail = volume - gaussian_smooth(volume, 1.0)
    return _in_foreground(volume, volume + (0.5 + 2.5 * severity) * detail)


def contrast(volume: torch.Tensor, severity: float, generator: torch.Generator) -> torch.Tensor:
    """Stretch intensities about the mean of the anatomy by 1.3 to 3, or press them together by as much.

    Generators without detail have too little contrast, and a reward that knows only that lets them win with too much.
    """
    stretch = math.exp((0.26 + 0.84 * severity) * (1 if _uniform(generator) < 0.5 else -1))
    mean = brightness(volume)
    return _in_foreground(volume, mean + stretch * (volume - mean))


def bias_field(volume: torch.Tensor, severity: float, generator: torch.Generator) -> torch.Tensor:
    """Smooth multiplicative field of mean 1, log-amplitude 0.2 to 1 inside the anatomy."""
    coarse = torch.randn((1, 1, 3, 3, 3), generator=generator).to(volume)
    field = F.interpolate(coarse, size=volume.shape[1:], mode="trilinear", align_corners=True)[0]
    anatomy = (volume > FOREGROUND_THRESHOLD).any(0, keepdim=True)
    inside = field[anatomy] if anatomy.any() else field.flatten()  # the field's extremes lie in the empty corners
    field = (field - inside.mean()) * ((0.2 + 0.8 * severity) / (inside - inside.mean()).abs().max())
    field = torch.exp(field)
    mean = (volume * field).mean() / volume.mean().clamp_min(1e-6)
    return _in_foreground(volume, volume * field / mean.clamp_min(1e-6))


def thick_slices(volume: torch.Tensor, severity: float, generator: torch.Generator) -> torch.Tensor:
    """Average 2 to 6 neighbouring slices along a random axis, then interpolate back."""
    axis, factor = _integer(generator, 3), max(2, round(1 + 5 * severity))
    size = list(volume.shape[1:])
    size[axis] = max(2, size[axis] // factor)
    thick = F.interpolate(volume[None], size=size, mode="area")
    return _in_foreground(volume, F.interpolate(thick, size=volume.shape[1:], mode="trilinear")[0])


def shuffle_blocks(volume: torch.Tensor, severity: float, generator: torch.Generator) -> torch.Tensor:
    """Let a share ``severity`` of the blocks of anatomy (an eighth of the side each) change places."""
    sides = [max(1, side // 8) for side in volume.shape[1:]]
    anatomy = (volume > FOREGROUND_THRESHOLD).float()
    occupied = F.avg_pool3d(anatomy[None], sides)[0].mean(0) > 0.5  # one number per block
    blocks = []
    for corner in occupied.nonzero().tolist():
        blocks.append((slice(None), *(slice(i * side, (i + 1) * side) for i, side in zip(corner, sides, strict=True))))
    count = min(len(blocks), max(2, round(severity * len(blocks))))
    chosen = [blocks[i] for i in torch.randperm(len(blocks), generator=generator)[:count].tolist()]
    shuffled = volume.clone()
    for target, source in zip(chosen, chosen[1:] + chosen[:1], strict=True):  # one cycle: no block keeps its place
        shuffled[target] = volume[source]
    return shuffled


def cut_off(volume: torch.Tensor, severity: float, generator: torch.Generator) -> torch.Tensor:
    """Set the outer 10 to 50 % of the anatomy to background, on a random side."""
    axis, from_start = _integer(generator, 3), _uniform(generator) < 0.5
    others = [dim for dim in range(4) if dim != 1 + axis]
    occupied = (volume > FOREGROUND_THRESHOLD).float().amax(others).nonzero().flatten()
    cut = volume.clone()
    if occupied.numel() == 0:
        return cut
    first, last = int(occupied[0]), int(occupied[-1]) + 1
    depth = max(1, round((0.1 + 0.4 * severity) * (last - first)))
    start, end = (0, first + depth) if from_start else (last - depth, volume.shape[1 + axis])
    cut.narrow(1 + axis, start, end - start).zero_()
    return cut


def swap_hemisphere(volume: torch.Tensor, other: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Replace one hemisphere (X is left to right) by that of ``other``.

    The seam lies up to 3 voxels beside the midline, the foreign part up to 2 voxels beside its place, as bright as
    what it replaces: no single cue but the disagreement of the two sides gives every swap away.
    """
    middle = _midline(volume)
    beside = [_integer(generator, 2 * MAX_MISPLACEMENT + 1) - MAX_MISPLACEMENT for _ in range(3)]
    moved = shift_volume(other, (middle - _midline(other) + beside[0], *beside[1:]))
    seam = middle + _integer(generator, 2 * MAX_SEAM_OFFSET + 1) - MAX_SEAM_OFFSET
    own = _halves(volume, seam) == (_uniform(generator) < 0.5)
    level, found = brightness(torch.where(own, 0.0, volume)), brightness(torch.where(own, 0.0, moved))
    return torch.where(own, volume, (moved * (level / found if level and found else 1.0)).clamp(0, 1))


def mirror_hemisphere(volume: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Replace one hemisphere by the mirror image of the other. No damage: perfect agreement is not punished."""
    middle = _midline(volume)
    mirrored = shift_volume(volume.flip(1), (2 * middle - volume.shape[1], 0, 0))
    return torch.where(_halves(volume, middle) == (_uniform(generator) < 0.5), volume, mirrored)


def brightness(volume: torch.Tensor) -> float:
    """Mean of the anatomy, 0 where there is none."""
    anatomy = volume[volume > FOREGROUND_THRESHOLD]
    return float(anatomy.mean()) if anatomy.numel() else 0.0


def nearest_in_brightness(light: torch.Tensor, subjects: torch.Tensor, scan: int) -> int:
    """The scan of another subject whose brightness is nearest, so that a half-swap is no matter of contrast.

    Args:
        light: (N,) `brightness` of the scans.
        subjects: (N,) a number per scan, the same for scans of one subject; at least two different ones.
        scan: whose partner is sought.
    """
    distance = (light - light[scan]).abs()
    distance[subjects == subjects[scan]] = torch.inf
    return int(distance.argmin())


def _halves(volume: torch.Tensor, seam: int) -> torch.Tensor:
    return (torch.arange(volume.shape[1], device=volume.device) < seam).view(1, -1, 1, 1)


def _midline(volume: torch.Tensor) -> int:
    mass = volume.float().sum((0, 2, 3)) + 1e-6  # (X,)
    return round(float((mass * torch.arange(len(mass), device=mass.device)).sum() / mass.sum() + 0.5))


DAMAGES: Mapping[str, Callable[[torch.Tensor, float, torch.Generator], torch.Tensor]] = {
    "blur": blur,
    "noise": noise,
    "noisy_blur": noisy_blur,
    "oversharpen": oversharpen,
    "contrast": contrast,
    "bias_field": bias_field,
    "thick_slices": thick_slices,
    "shuffle_blocks": shuffle_blocks,
    "cut_off": cut_off,
}


HALF_SWAP = "half_swap"


HALF_SWAP_SEVERITY = 0.5


DAMAGE_NAMES = (*DAMAGES, HALF_SWAP)


def damage(
    volume: torch.Tensor, kind: str, severity: float, generator: torch.Generator, other: torch.Tensor | None = None
) -> torch.Tensor:
    """Damage one volume.

    Args:
        volume: (C, X, Y, Z) in [0, 1]; not changed in place.
        kind: one of ``DAMAGE_NAMES``.
        severity: in (0, 1]; "half_swap" has only one severity, ``HALF_SWAP_SEVERITY``.
        generator: on the CPU.
        other: volume of another subject, for "half_swap".
    """
    if volume.ndim != 4:
        raise ValueError(f"volume must have shape (C, X, Y, Z), got {tuple(volume.shape)}.")
    if not 0 < severity <= 1:
        raise ValueError(f"severity must lie in (0, 1], got {severity}.")
    if kind == HALF_SWAP:
        if other is None or other.shape != volume.shape:
            found = None if other is None else tuple(other.shape)
            raise ValueError(
                f"half_swap needs a volume of another subject of shape {tuple(volume.shape)}, got {found}."
            )
        return swap_hemisphere(volume, other, generator)
    if kind not in DAMAGES:
        raise ValueError(f"unknown damage {kind!r}, expected one of {DAMAGE_NAMES}.")
    return DAMAGES[kind](volume, severity, generator)


def augment(volume: torch.Tensor, generator: torch.Generator, max_shift: int = 3) -> torch.Tensor:
    """Change what says nothing about realism: left-right flip, shift, brightness (factor 0.85-1.1, gamma 0.85-1.2).

    The versions of one subject are changed alike (same seed), so that they differ by their realism alone; subjects are
    not, so that the score cannot lean on any of it.
    """
    volume = flip_and_shift(volume, generator, max_shift)
    gamma, factor = _uniform(generator, 0.85, 1.2), _uniform(generator, 0.85, 1.1)
    return (factor * volume.clamp(0, 1) ** gamma).clamp(0, 1)


def clear_haze(volume: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """In half of the cases, set what is below a random threshold of at most 0.03 to 0.

    A decoder leaves a faint haze in the background, a scan does not: without this it would give a decoder away.
    """
    if _uniform(generator) < 0.5:
        return volume
    return torch.where(volume > _uniform(generator, 0.0, 0.03), volume, torch.zeros_like(volume))
