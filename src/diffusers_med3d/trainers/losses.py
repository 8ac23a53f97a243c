"""Losses of the autoencoder: pure functions."""

import torch
from torch import Tensor


def gradient_l1(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the finite differences along x, y and z; both (B, C, X, Y, Z). Scalar."""
    error = reconstruction - target
    return torch.stack([error.diff(dim=axis).abs().mean() for axis in (2, 3, 4)]).mean()


def spectral_l1(reconstruction: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the Fourier amplitudes (orthonormal 3D FFT). Scalar.

    Every coefficient weighs the same and most are high frequencies, so missing fine detail costs even when its phase
    cannot be known. (A squared error, as in Jukebox, arXiv 2005.00341, would see the zero frequency only.)
    """
    amplitudes = [
        torch.fft.rfftn(volume.float(), dim=(2, 3, 4), norm="ortho").abs() for volume in (reconstruction, target)
    ]
    return (amplitudes[0] - amplitudes[1]).abs().mean()
