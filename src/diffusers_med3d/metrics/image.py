"""Measures of one volume, or of a volume against its reference: fidelity, fine detail, sharpness, noise.

Volumes are (B, C, X, Y, Z) in [0, 1]; masks are bool, broadcastable to them. Every function gives one float per volume.
Only figures that went through the same loader may be compared: resampling alone moves a scan further from itself than
a change of subject does.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

HALF_NYQUIST = 0.25  # cycles per voxel
FOREGROUND = 0.1  # intensity above which a voxel counts as tissue, background being 0
INTERIOR = 0.05  # intensity above which a voxel counts as anatomy in `interior_spectrum`: fluid does, haze does not


def _check(volumes: Tensor) -> Tensor:
    if volumes.ndim != 5:
        raise ValueError(f"Volumes must be (B, C, X, Y, Z), got {tuple(volumes.shape)}.")
    return volumes.detach().float()


def psnr(volumes: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB for a data range of 1, over the mask where one is given; infinite if equal.

    Returns:
        (B,)

    Raises:
        ValueError: if the shapes differ or a mask is empty.
    """
    volumes, reference = _check(volumes), _check(reference)
    if volumes.shape != reference.shape:
        raise ValueError(f"Volumes {tuple(volumes.shape)} and reference {tuple(reference.shape)} differ in shape.")
    weight = torch.ones_like(volumes) if mask is None else mask.to(volumes).expand_as(volumes)
    count = weight.flatten(1).sum(1)
    if (count == 0).any():
        raise ValueError(f"The mask of volume {int((count == 0).nonzero()[0])} holds no voxel.")
    mse = ((volumes - reference) ** 2 * weight).flatten(1).sum(1) / count
    return -10 * torch.log10(mse)


def _taper(mask: Tensor) -> Tensor:
    """Weights (B, C, X, Y, Z) that rise from 0 outside a mask to 1 five voxels inside it.

    A hard edge would put its own step into the spectrum, and the more so the more a blur has darkened the rim.
    """
    weight = -F.max_pool3d(-mask.float(), 5, stride=1, padding=2)  # two voxels eroded
    for _ in range(2):
        weight = F.avg_pool3d(weight, 3, stride=1, padding=1)
    return weight


def _power(volumes: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Radial frequency of every FFT coefficient (X, Y, Z) in cycles per voxel, and its power (B, X, Y, Z)."""
    if mask is not None:
        weight = _taper(mask.to(volumes.device).expand_as(volumes))
        dims = (2, 3, 4)
        mean = (volumes * weight).sum(dims, keepdim=True) / weight.sum(dims, keepdim=True)
        volumes = (volumes - mean) * weight
    power = torch.fft.fftn(volumes, dim=(2, 3, 4)).abs().square().mean(1)
    axes = torch.meshgrid(*(torch.fft.fftfreq(size, device=power.device) for size in power.shape[1:]), indexing="ij")
    return torch.stack(axes).square().sum(0).sqrt(), power


def power_spectrum(volumes: Tensor, mask: Tensor | None = None, bins: int = 16) -> tuple[Tensor, Tensor]:
    """Mean power of the 3-D Fourier coefficients in `bins` equal shells of radial frequency up to Nyquist.

    The zero frequency and the corners beyond 0.5 cycles per voxel are left out. Power is divided by the number of
    voxels, so white noise of standard deviation s has s**2 in every shell, whatever the size.

    Args:
        mask: keeps what lies inside, fading out over five voxels, with the mean inside taken away, so that the mask's
            edge adds nothing of its own. NaN where nothing lies three voxels inside the mask.

    Returns:
        shell centres in cycles per voxel (bins,) and power (B, bins).
    """
    radius, power = _power(_check(volumes), mask)
    shell = (radius * (2 * bins)).ceil().long() - 1  # (k/2b, (k+1)/2b] -> k; the zero frequency is -1
    keep = (shell >= 0) & (shell < bins)
    total = torch.zeros(len(power), bins, device=power.device).index_add_(1, shell[keep], power[:, keep])
    count = torch.bincount(shell[keep], minlength=bins)
    centres = (torch.arange(bins, device=power.device) + 0.5) / (2 * bins)
    return centres, total / count.clamp_min(1) / radius.numel()


def high_frequency_ratio(volumes: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    """Power above half Nyquist over that of `reference` (absolute, not shares): 1 = as much fine detail, < 1 = blurred.

    Returns:
        (B,)
    """
    radius, power = _power(_check(volumes), mask)
    _, reference_power = _power(_check(reference), mask)
    high = radius > HALF_NYQUIST
    return power[:, high].sum(1) / reference_power[:, high].sum(1)


def _filter(volumes: Tensor, kernel: Tensor) -> Tensor:
    """Applies one 3x3x3 kernel to every channel; the outermost voxels, which lack neighbours, are dropped."""
    channels = volumes.shape[1]
    return F.conv3d(volumes, kernel.to(volumes).expand(channels, 1, 3, 3, 3), groups=channels)


def _inside(volumes: Tensor) -> Tensor:
    """Foreground whose 26 neighbours are foreground too (same shape as `_filter`'s answer): outlines do not count."""
    return -F.max_pool3d(-(volumes > FOREGROUND).float(), 3, stride=1) > 0.5


def sharpness(volumes: Tensor) -> Tensor:
    """Standard deviation of the Laplacian inside the tissue over that of the intensities there (scale-free).

    The tissue is where the intensity exceeds 0.1, one voxel of rim taken off. Noise raises it: read it beside
    `noise_level`.

    Returns:
        (B,); NaN for a volume without tissue.
    """
    volumes = _check(volumes)
    second = torch.tensor([1.0, -2.0, 1.0])
    kernel = torch.zeros(3, 3, 3)
    kernel[:, 1, 1] += second
    kernel[1, :, 1] += second
    kernel[1, 1, :] += second
    laplacian, inside = _filter(volumes, kernel), _inside(volumes)
    centre = volumes[:, :, 1:-1, 1:-1, 1:-1]
    nan = volumes.new_tensor(float("nan"))
    ratios = [
        answer[keep].std() / intensity[keep].std() if keep.sum() > 1 else nan
        for answer, intensity, keep in zip(laplacian, centre, inside, strict=True)
    ]
    return torch.stack(ratios)


def noise_level(volumes: Tensor) -> Tensor:
    """Standard deviation of white noise inside the tissue, estimated from what no smooth structure explains.

    The 3-D form of J. Immerkaer, Fast Noise Variance Estimation (CVIU 64, 1996), eq. 4: the second difference along all
    three axes at once vanishes wherever the intensity is linear along any one axis. The median absolute answer over
    0.6745 replaces the mean absolute one, so that edges weigh less. Fine cortex leaves a floor: compare with scans.

    Returns:
        (B,); NaN for a volume without tissue.
    """
    volumes = _check(volumes)
    second = torch.tensor([1.0, -2.0, 1.0])
    kernel = torch.einsum("i,j,k->ijk", second, second, second)
    response, inside = _filter(volumes, kernel).abs(), _inside(volumes)
    gain = 0.6745 * math.sqrt(kernel.square().sum().item())
    nan = volumes.new_tensor(float("nan"))
    medians = [r[m].median() if m.any() else nan for r, m in zip(response, inside, strict=True)]
    return torch.stack(medians) / gain


def _interior(volumes: Tensor) -> Tensor:
    """Anatomy with one voxel of rim taken off, which partial volume, or a blur, darkens."""
    return -F.max_pool3d(-(volumes > INTERIOR).float(), 3, stride=1, padding=1) > 0.5


def interior_spectrum(volumes: Tensor, bins: int = 16) -> tuple[Tensor, Tensor]:
    """`power_spectrum` of each volume inside its own anatomy (above 0.05), whatever the size of that.

    One voxel of rim is left out, the anatomy fades out over the next five, the mean inside is taken away, and the power
    is divided by the squared weights, so white noise of standard deviation s inside has s**2 in every shell. This
    compares sets of different subjects; outlines do not count.

    Returns:
        shell centres in cycles per voxel (bins,) and power (B, bins); NaN for a volume without an inside.
    """
    volumes = _check(volumes)
    mask = _interior(volumes)
    centres, power = power_spectrum(volumes, mask, bins)
    weight = _taper(mask).square().flatten(1).mean(1, keepdim=True)
    return centres, torch.where(weight > 0, power / weight, float("nan"))


def interior_detail(volumes: Tensor) -> Tensor:
    """Fine detail of a volume's inside: mean power from half Nyquist to Nyquist (0.25 to 0.5 cycles per voxel) less the
    mean power beyond, see `interior_spectrum`.

    The absolute amount, to be divided by that of scans. White noise adds equally to every coefficient, so what stands
    in the corners of frequency space, where a volume has little structure, is taken away as noise: noise adds nothing
    on average (plain power makes up with 5 % noise a third of what a blur of 0.6 voxel took). Noise that is not white
    still counts: read it beside `noise_level`.

    Returns:
        (B,); negative where there is less than in the corners; NaN for a volume without an inside.
    """
    volumes = _check(volumes)
    mask = _interior(volumes)
    radius, power = _power(volumes, mask)
    fine, corners = power[:, (radius > HALF_NYQUIST) & (radius <= 0.5)], power[:, radius > 0.5]
    weight = _taper(mask).square().flatten(1).mean(1)
    return torch.where(weight > 0, (fine.mean(1) - corners.mean(1)) / radius.numel() / weight, float("nan"))
