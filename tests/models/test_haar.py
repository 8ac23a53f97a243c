"""The Haar start: an untrained autoencoder that already hands fine detail through."""

import pytest
import torch
from torch.nn import functional as F

from diffusers_med3d import AutoencoderKL3D
from diffusers_med3d.models.haar import haar_filter, haar_init_


def smooth_volumes() -> torch.Tensor:
    """Two smooth volumes (2, 1, 16, 16, 16) in [0, 1] with a background of 0."""
    noise = torch.rand(2, 1, 10, 10, 10, generator=torch.Generator().manual_seed(0))
    return F.pad(F.interpolate(noise, 12, mode="trilinear"), (2,) * 6)


def build(**changes) -> AutoencoderKL3D:
    return AutoencoderKL3D(**{"norm_num_groups": 1, "use_convtranspose": True} | changes)


def test_the_untrained_round_trip_beats_the_mean_of_every_block():
    volumes = smooth_volumes()
    autoencoder = haar_init_(build())
    with torch.no_grad():
        posterior = autoencoder.encode(volumes).latent_dist
        reconstruction = autoencoder.decode(posterior.mode()).sample
    blocks = F.interpolate(F.avg_pool3d(volumes, 4), scale_factor=4)
    error = (reconstruction - volumes).square().mean()
    assert error < 0.5 * (blocks - volumes).square().mean()
    assert posterior.std.max() < 0.05, "posterior noise must not drown the code"


def test_with_room_for_every_coefficient_nothing_is_lost():
    volumes = smooth_volumes()
    autoencoder = haar_init_(build(channels=(16, 32), attention_levels=(False, False), latent_channels=8))
    with torch.no_grad():
        reconstruction = autoencoder(volumes).sample
    correlation = torch.corrcoef(torch.stack([reconstruction.flatten(), volumes.flatten()]))[0, 1]
    assert correlation > 0.99  # up to the scale that the last GroupNorm leaves open


def test_the_bands_are_orthogonal():
    bands = [haar_filter((x, y, z)).flatten() for x in (0, 1) for y in (0, 1) for z in (0, 1)]
    gram = torch.stack(bands) @ torch.stack(bands).T
    assert torch.equal(gram, 8 * torch.eye(8))


@pytest.mark.parametrize("changes", [{"use_convtranspose": False}, {"norm_num_groups": 8}])
def test_networks_that_it_does_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match="haar_init_ needs"):
        haar_init_(build(**changes))
