"""models/slabs.py: a decoder in slabs gives what the whole decoder gives."""

import pytest
import torch

from diffusers_med3d import AutoencoderKL3D


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("use_convtranspose", [True, False])
def test_a_decode_in_slabs_is_the_whole_decode(parts, use_convtranspose):
    vae = AutoencoderKL3D(
        channels=(8, 16, 16),
        latent_channels=3,
        norm_num_groups=4,
        num_res_blocks=(1, 1, 2),
        attention_levels=(False, False, True),
        use_convtranspose=use_convtranspose,
    ).eval()
    latents = torch.randn(2, 3, 5, 3, 4)
    with torch.no_grad():
        whole = vae.decode(latents).sample
        vae.set_num_splits(parts)
        torch.testing.assert_close(vae.decode(latents).sample, whole, atol=1e-5, rtol=1e-5)


def test_a_decode_that_needs_a_gradient_is_whole():
    vae = AutoencoderKL3D(channels=(8, 8), latent_channels=2, norm_num_groups=4, attention_levels=(False, False))
    vae.set_num_splits(2)
    latents = torch.randn(1, 2, 4, 4, 4, requires_grad=True)
    vae.decode(latents).sample.sum().backward()
    assert latents.grad.abs().max() > 0


def test_a_number_of_slabs_that_is_none_is_refused():
    with pytest.raises(ValueError, match="num_splits must be a whole number of at least 1, got 0"):
        AutoencoderKL3D(channels=(8, 8), latent_channels=2, attention_levels=(False, False)).set_num_splits(0)
