"""Measures of sets: each against a second implementation in NumPy or SciPy, or a known answer."""

import math

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import scipy.ndimage
import torch
from monai.metrics.fid import compute_frechet_distance
from monai.networks.nets import resnet50
from scipy.spatial.distance import cdist

from diffusers_med3d import metrics
from diffusers_med3d.metrics.features import PlanarFeatures
from diffusers_med3d.metrics.pretrained import radimagenet_network
from test_metrics import blob, blur, generator


def ball(size: int = 24, seed: int = 0, detail: float = 0.3) -> torch.Tensor:
    """A ball with stronger waves than ``blob`` has by default."""
    return blob(size, seed, detail)


# --- bootstrap ---


def test_a_resample_draws_as_many_subjects_of_each_class_and_all_scans_of_a_subject_together():
    subjects, labels = ["a", "b", "c", "c", "d", "e"], [0, 0, 0, 0, 1, 1]
    weights = metrics.bootstrap_weights(subjects, labels, 500, seed=1)
    assert weights.shape == (501, 6) and (weights[0] == 1).all()
    assert (weights[1:, 2] == weights[1:, 3]).all()
    assert (weights[1:, :3].sum(1) == 3).all() and (weights[1:, 4:].sum(1) == 2).all()
    assert weights[1:].mean(0) == pytest.approx(np.ones(6), abs=0.15)


def test_sets_of_the_same_subjects_are_resampled_alike_and_others_are_not():
    names = (["a", "b", "c"], ["a", "b", "c"], ["d", "e", "f"])
    first, second, other = (metrics.bootstrap_weights(own, [0, 0, 1], 50, seed=3) for own in names)
    assert (first == second).all() and (first != other).any()


def test_the_interval_of_a_mean_agrees_with_the_textbooks():
    values = np.random.default_rng(0).normal(3, 2, 400)
    weights = metrics.bootstrap_weights([str(i) for i in range(400)], [0] * 400, 2000)
    interval = metrics.bootstrap_interval(metrics.weighted_mean(values, weights, [0] * 400, {0: 1.0}))
    stderr = values.std(ddof=1) / 20
    assert interval.value == pytest.approx(values.mean())
    assert interval.stderr == pytest.approx(stderr, rel=0.07)
    assert (interval.low, interval.high) == pytest.approx(
        (values.mean() - 1.96 * stderr, values.mean() + 1.96 * stderr), abs=0.2 * stderr
    )


def test_resamples_that_are_biased_or_failed_do_not_move_the_interval():
    resamples = np.random.default_rng(0).normal(0, 1, 1000)
    plain, biased = metrics.bootstrap_interval([2, *(2 + resamples)]), metrics.bootstrap_interval([2, *(9 + resamples)])
    assert (plain.low, plain.high) == pytest.approx((biased.low, biased.high))
    assert metrics.bootstrap_interval([2, *(2 + resamples), float("nan"), float("inf")]).low == pytest.approx(plain.low)
    assert math.isnan(metrics.bootstrap_interval([2.0]).low)
    assert str(metrics.bootstrap_interval([2.0])) == "2"


def test_a_figure_that_is_missing_does_not_read_as_zero():
    assert str(metrics.Interval(float("nan"))) == "nan" and str(metrics.Interval(-1e-15, -1e-15, 1.0)) == "0 [0, 1]"


def test_a_weighted_mean_counts_every_class_its_share_and_leaves_out_nan():
    values, labels = [1.0, 3.0, 10.0, float("nan")], [0, 0, 1, 1]
    weights = np.array([[1.0, 1, 1, 1], [3, 1, 2, 5]])
    assert metrics.weighted_mean(values, weights, labels, {0: 0.25, 1: 0.75}).tolist() == pytest.approx([8.0, 7.875])


# --- KID of stratified sets ---


def stratified_kid(a, labels_a, b, labels_b, shares) -> float:
    """By loops: the mean kernel over pairs of every two classes, weighted by their shares."""

    def mean(x, labels_x, y, labels_y, same):
        total = 0.0
        for c, p in shares.items():
            for d, q in shares.items():
                values = [
                    (x[i] @ y[j] / len(x[i]) + 1) ** 3
                    for i in range(len(x)) if labels_x[i] == c
                    for j in range(len(y)) if labels_y[j] == d and not (same and i == j)
                ]  # fmt: skip
                total += p * q * np.mean(values)
        return total

    return (
        mean(a, labels_a, a, labels_a, True)
        + mean(b, labels_b, b, labels_b, True)
        - 2 * mean(a, labels_a, b, labels_b, False)
    )


def kid_by_pairs(a, labels_a, b, labels_b, shares) -> float:
    def mean(x, labels_x, y, labels_y, same):
        kernel = metrics.polynomial_kernel(torch.as_tensor(x), torch.as_tensor(y)).numpy()
        allowed = ~np.eye(len(x), dtype=bool) if same else np.ones(kernel.shape, dtype=bool)
        ones = [np.ones((1, len(z))) for z in (x, y)]
        return metrics.weighted_pair_mean(kernel, allowed, ones[0], labels_x, ones[1], labels_y, shares)[0]

    return (
        mean(a, labels_a, a, labels_a, True)
        + mean(b, labels_b, b, labels_b, True)
        - 2 * mean(a, labels_a, b, labels_b, False)
    )


def test_the_kid_of_a_report_equals_loops_over_pairs_and_with_one_class_the_plain_kid():
    rng = np.random.default_rng(0)
    a, b, labels_a, labels_b = (
        rng.normal(size=(7, 3)),
        rng.normal(size=(6, 3)) + 1,
        [0, 0, 0, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1],
    )
    shares = {0: 0.4, 1: 0.6}
    expected = stratified_kid(a, labels_a, b, labels_b, shares)
    assert kid_by_pairs(a, labels_a, b, labels_b, shares) == pytest.approx(expected, rel=1e-9)
    plain = metrics.kid(torch.from_numpy(a), torch.from_numpy(b)).value
    assert kid_by_pairs(a, [0] * 7, b, [0] * 6, {0: 1.0}) == pytest.approx(plain, rel=1e-9)


def test_between_stratified_draws_of_one_population_kid_is_zero_on_average_and_the_plain_one_is_not():
    rng, labels, values, plain = np.random.default_rng(1), [0, 0, 1, 1], [], []
    for _ in range(300):
        a, b = (np.concatenate([rng.normal(0, 0.3, (2, 2)), rng.normal(1.5, 0.3, (2, 2))]) for _ in range(2))
        values.append(kid_by_pairs(a, labels, b, labels, {0: 0.5, 1: 0.5}))
        plain.append(metrics.kid(torch.from_numpy(a), torch.from_numpy(b)).value)
    stderr = np.std(values) / math.sqrt(300)
    assert abs(np.mean(values)) < 3 * stderr
    assert np.mean(plain) < -10 * stderr


# --- Fréchet ---


def scipy_frechet(a: np.ndarray, b: np.ndarray) -> float:
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root))


def test_frechet_equals_scipys_and_monais_even_far_from_the_origin():
    a = torch.randn(30, 4, generator=generator()).double() @ torch.randn(4, 4, generator=generator(2)).double() + 100
    b = 1.5 * torch.randn(25, 4, generator=generator(1)).double() + 101
    value = metrics.frechet(a, b).item()
    assert value == pytest.approx(scipy_frechet(a.numpy(), b.numpy()), rel=1e-7)
    moments = [m for x in (a, b) for m in (x.mean(0), x.T.cov())]
    assert value == pytest.approx(compute_frechet_distance(*moments).item(), rel=1e-7)
    assert metrics.frechet(a, a).item() == pytest.approx(0, abs=1e-8)


def test_a_weight_counts_as_so_many_copies_in_the_frechet_distance():
    a, b = torch.randn(6, 2, generator=generator()), torch.randn(5, 2, generator=generator(1))
    weights_a, weights_b = (
        torch.tensor([[1, 1, 1, 1, 1, 1], [2, 0, 1, 3, 0, 0]]),
        torch.tensor([[1] * 5, [1, 1, 2, 0, 1]]),
    )
    both = metrics.frechet(a, b, weights_a, weights_b).tolist()
    copies = a.repeat_interleave(weights_a[1], 0), b.repeat_interleave(weights_b[1], 0)
    assert both == pytest.approx(
        [scipy_frechet(a.numpy(), b.numpy()), scipy_frechet(*(c.numpy() for c in copies))], rel=1e-4
    )


def test_frechet_says_what_it_cannot_use_and_on_how_many_dimensions_it_may_be_read():
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(3, 4\)"):
        metrics.frechet(torch.rand(3, 2), torch.rand(3, 4))
    with pytest.raises(ValueError, match="finite"):
        metrics.frechet(torch.full((3, 2), float("nan")), torch.rand(3, 2))
    assert metrics.frechet_dimensions(12, 40, 1280) == 3
    assert metrics.frechet_dimensions(400, 400, 64) == 64
    assert metrics.frechet_dimensions(7, 400, 64) == 1


def test_principal_components_are_the_eigenvectors_of_the_covariance():
    features = torch.randn(40, 5, generator=generator()) @ torch.randn(5, 5, generator=generator(1)) + 3
    mean, directions = metrics.principal_components(features, 2)
    values, vectors = np.linalg.eigh(np.cov(features.double().numpy().T))
    assert mean.numpy() == pytest.approx(features.double().mean(0).numpy())
    assert np.abs(vectors[:, [-1, -2]].T @ directions.numpy()) == pytest.approx(np.eye(2), abs=1e-6)
    with pytest.raises(ValueError, match="no 6 principal"):
        metrics.principal_components(features, 6)


# --- precision, recall, density, coverage ---


def test_precision_recall_density_and_coverage_equal_loops_over_the_balls():
    samples, scans = torch.randn(9, 3, generator=generator()) + 0.7, torch.randn(11, 3, generator=generator(1))
    found = metrics.manifold(samples, scans, k=2)
    between = cdist(samples.numpy(), scans.numpy())
    radius = {
        name: np.sort(cdist(x.numpy(), x.numpy()), 1)[:, 2] for name, x in (("samples", samples), ("scans", scans))
    }
    assert found.precision.tolist() == [any(between[i, j] < radius["scans"][j] for j in range(11)) for i in range(9)]
    assert found.recall.tolist() == [any(between[i, j] < radius["samples"][i] for i in range(9)) for j in range(11)]
    assert found.density.tolist() == [sum(between[i, j] < radius["scans"][j] for j in range(11)) / 2 for i in range(9)]
    assert found.coverage.tolist() == [min(between[i, j] for i in range(9)) < radius["scans"][j] for j in range(11)]
    assert 0 < found.precision.double().mean() < 1 and 0 < found.coverage.double().mean() < 1


def test_samples_of_one_mode_are_precise_and_cover_little():
    scans = torch.cat([torch.randn(10, 2, generator=generator()), torch.randn(10, 2, generator=generator(1)) + 20])
    found = metrics.manifold(0.3 * torch.randn(20, 2, generator=generator(2)), scans, k=3)
    assert found.precision.double().mean() > 0.9 and found.coverage.double().mean() <= 0.5
    with pytest.raises(ValueError, match="k = 10 neighbours"):
        metrics.manifold(scans[:10], scans, k=10)


# --- memorisation ---


def shift(volume: torch.Tensor, axis: int, steps: int) -> torch.Tensor:
    """Moved by whole voxels, background coming in; the ball stays inside."""
    return volume.roll(steps, 2 + axis)


def test_a_mirrored_shifted_and_darkened_copy_is_flagged_and_an_unseen_blurry_volume_is_not():
    training = torch.cat([ball(seed=seed) for seed in range(20)])
    names = [f"t{i}" for i in range(20)]
    unseen = ball(seed=99)
    copy = 0.95 * shift(training[7:8].flip(2), 1, 2)
    blurry = ball(seed=99, detail=0.05)
    found = metrics.nearest_training_scan(torch.cat([copy, unseen, blurry]), training, names)
    themselves = metrics.nearest_training_scan(training, training, names, names)
    threshold = metrics.copy_threshold(themselves.ratio)
    assert (found.ratio < threshold).tolist() == [True, False, False]
    assert found.scan[0] == 7
    # the blurry one lies nearer to the training scans than a sharp one: the distance alone would flag it first
    assert found.distance[2] < found.distance[1]


def test_the_nearest_distance_equals_a_loop_over_mirror_images_and_shifts():
    drawn = torch.zeros(5, 1, 8, 8, 8)  # a margin of background, so that nothing is lost by a shift
    blocks = torch.rand(5, 1, 2, 2, 2, generator=generator())
    drawn[:, :, 2:6, 2:6, 2:6] = torch.nn.functional.interpolate(blocks, scale_factor=2)
    training, volume = drawn[:4], drawn[4:]
    training[3] = 0.1 * training[3] + 0.9 * volume[0].roll(2, 2)  # nearly a copy, one block further

    def pooled(v: torch.Tensor) -> np.ndarray:
        return v.double().numpy().reshape(4, 2, 4, 2, 4, 2).mean((1, 3, 5))

    distances = []
    for scan in training:
        versions = []
        for version in (pooled(scan[0]), pooled(scan[0])[::-1]):
            padded = np.pad(version, 1)
            for offset in [(1, 1, 1), (0, 1, 1), (2, 1, 1), (1, 0, 1), (1, 2, 1), (1, 1, 0), (1, 1, 2)]:
                versions.append(padded[tuple(slice(o, o + 4) for o in offset)])
        distances.append(min(np.sqrt(((pooled(volume[0, 0]) - v) ** 2).mean()) for v in versions))
    found = metrics.nearest_training_scan(volume, training, ["a", "b", "b", "c"])
    by_subject = sorted([distances[0], min(distances[1:3]), distances[3]])
    assert found.distance.item() == pytest.approx(by_subject[0], rel=1e-5)
    assert found.ratio.item() == pytest.approx(by_subject[0] / by_subject[1], rel=1e-5)


def test_a_scan_is_never_its_own_nearest_and_two_subjects_are_needed():
    training = torch.cat([ball(8, seed) for seed in range(3)])
    found = metrics.nearest_training_scan(training, training, ["a", "a", "b"], ["x", "y", "z"])
    assert found.distance.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="at least two"):
        metrics.nearest_training_scan(training, training, ["a", "a", "b"], ["a", "a", "b"])
    with pytest.raises(ValueError, match="one shape"):
        metrics.nearest_training_scan(ball(8), ball(12), ["a"])


# --- symmetry and tissue ---


def test_symmetry_is_one_for_a_symmetric_volume_off_the_middle_and_equals_numpys_correlation():
    volume = ball(16)
    symmetric = volume + volume.flip(2)
    assert metrics.left_right_symmetry(torch.cat([symmetric, shift(symmetric, 0, 1)])).tolist() == pytest.approx(
        [1, 1], abs=1e-5
    )
    expected = np.corrcoef(volume.flatten().numpy(), volume.flip(2).flatten().numpy())[0, 1]
    assert metrics.left_right_symmetry(volume, max_shift=0).item() == pytest.approx(expected, abs=1e-5)
    half = volume.clone()
    half[:, :, :8] = 0
    assert metrics.left_right_symmetry(half, max_shift=0) < 0 < metrics.left_right_symmetry(half)
    with pytest.raises(ValueError, match="X > 4"):
        metrics.left_right_symmetry(torch.rand(1, 1, 4, 8, 8))


def test_intensity_tissues_find_three_intensities_and_their_millilitres():
    volume = torch.zeros(1, 1, 10, 10, 10)
    volume[..., :2], volume[..., 2:5], volume[..., 5:9] = 0.2, 0.5, 0.9
    volume = (volume + 0.01 * torch.randn(volume.shape, generator=generator())) * (volume > 0)
    found = metrics.tissue_volumes(volume, metrics.intensity_tissues, 3, (2.0, 2.0, 2.5))
    assert found.tolist() == [pytest.approx([2.0, 3.0, 4.0])]
    assert not metrics.intensity_tissues(torch.zeros(1, 1, 4, 4, 4)).any()


def test_a_segmenter_with_an_unusable_answer_is_refused_with_what_it_gave():
    volumes = torch.rand(2, 1, 4, 4, 4)
    with pytest.raises(ValueError, match=r"torch.float32 \(2, 4, 4, 4\)"):
        metrics.tissue_volumes(volumes, lambda v: v[:, 0], 3, (1, 1, 1))
    with pytest.raises(ValueError, match="got 0 to 7"):
        metrics.tissue_volumes(volumes, lambda v: (v[:, 0] > 0.5).long() * 7, 3, (1, 1, 1))


# --- detail inside the anatomy ---


def test_white_noise_inside_anatomy_of_any_size_has_its_variance_in_every_shell_and_is_no_detail():
    axis = torch.linspace(-1, 1, 40)
    radius = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).square().sum(0).sqrt()
    for limit in (0.6, 0.9):
        noise = 0.5 + 0.05 * torch.randn(6, 1, 40, 40, 40, generator=generator())
        volumes = noise * (radius < limit)
        _, power = metrics.interior_spectrum(volumes, bins=8)
        assert power[:, 2:].mean(0).tolist() == pytest.approx([0.0025] * 6, rel=0.1)
        assert metrics.interior_detail(volumes).mean().item() == pytest.approx(0, abs=0.0025 * 0.05)


def numpy_taper(volume: np.ndarray) -> np.ndarray:
    """Anatomy above 0.05, three voxels eroded, then smoothed twice over 3^3 voxels."""
    inside = scipy.ndimage.binary_erosion(volume > 0.05, np.ones((3, 3, 3)), border_value=1)
    inside = scipy.ndimage.binary_erosion(inside, np.ones((5, 5, 5)), border_value=1).astype(float)
    for _ in range(2):
        inside = scipy.ndimage.uniform_filter(inside, 3, mode="constant")
    return inside


def test_detail_and_spectrum_inside_equal_scipys_and_a_loop_over_the_coefficients():
    volume = ball(20) + 0.05 * torch.rand(1, 1, 20, 20, 20, generator=generator()) * (ball(20) > 0)
    v = volume[0, 0].double().numpy()
    weight = numpy_taper(v)
    windowed = (v - (v * weight).sum() / weight.sum()) * weight
    power = np.abs(scipy.fft.fftn(windowed)) ** 2 / (weight**2).sum()
    fine, corners, shells = [], [], [[] for _ in range(4)]
    for index, value in np.ndenumerate(power):
        radius = math.sqrt(sum((min(k, 20 - k) / 20) ** 2 for k in index))
        if radius > 0.5 + 1e-6:
            corners.append(value)
        elif radius > 0.25 + 1e-6:
            fine.append(value)
        if 0 < radius <= 0.5 + 1e-6:
            shells[math.ceil(radius * 8 - 1e-6) - 1].append(value)
    assert metrics.interior_detail(volume).item() == pytest.approx(np.mean(fine) - np.mean(corners), rel=1e-3)
    assert metrics.interior_spectrum(volume, bins=4)[1][0].tolist() == pytest.approx(
        [np.mean(shell) for shell in shells], rel=1e-3
    )


def test_blur_takes_detail_away_noise_brings_none_back_and_a_volume_without_an_inside_has_none():
    inside = ball(32) > 0
    scan = ball(32) + 0.3 * blur(torch.randn(1, 1, 32, 32, 32, generator=generator())) * inside
    hidden = blur(scan) + 0.02 * torch.randn(1, 1, 32, 32, 32, generator=generator(1)) * inside
    volumes = torch.cat([scan, blur(scan), hidden, ball(32), blur(ball(32)), torch.zeros(1, 1, 32, 32, 32)])
    detail, sharpness = metrics.interior_detail(volumes), metrics.sharpness(volumes)
    assert detail[1] < 0.3 * detail[0]
    assert abs(detail[2] - detail[1]) < 0.1 * detail[0] and sharpness[2] > 1.2 * sharpness[1]  # which noise fools
    assert detail[4] < detail[3]  # the rim that the blur darkened is no detail, even where there is little other
    assert detail[5].isnan() and metrics.interior_spectrum(volumes)[1][5].isnan().all()


# --- MS-SSIM of all pairs ---


def test_the_matrix_holds_every_pair_of_one_class_and_nothing_else():
    volumes = torch.cat([ball(16, seed) for seed in range(5)])
    matrix = metrics.ms_ssim_matrix(volumes, [0, 1, 0, 1, 0], batch_size=3)
    for i in range(5):
        for j in range(5):
            if i != j and i % 2 == j % 2:
                expected = metrics.ms_ssim(volumes[i : i + 1], volumes[j : j + 1]).item()
                assert matrix[i, j].item() == pytest.approx(expected, abs=1e-5)
            else:
                assert matrix[i, j].isnan()
    drawn = metrics.ms_ssim_matrix(volumes, max_pairs=4).isfinite()
    assert drawn.sum() == 8 and (drawn == drawn.T).all()


# --- extractors ---


def test_scattering_features_equal_loops_over_blocks_of_two_voxels():
    volume = torch.rand(1, 1, 8, 8, 8, generator=generator())
    features = metrics.ScatteringFeatures(levels=1, regions=2)(volume)[0]
    v = volume[0, 0].double().numpy()
    details, coarse = np.zeros((7, 2, 2, 2)), np.zeros((2, 2, 2))
    signs = [(a, b, c) for a in (1, -1) for b in (1, -1) for c in (1, -1)][1:]
    for x, y, z in np.ndindex(4, 4, 4):
        block = v[2 * x : 2 * x + 2, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2]
        region = (x // 2, y // 2, z // 2)
        coarse[region] += block.mean() / 8
        for k, (a, b, c) in enumerate(signs):
            wave = np.einsum("i,j,k->ijk", [1, a], [1, b], [1, c]) / 8
            details[(k, *region)] += abs((block * wave).sum()) / 8
    assert features.numpy() == pytest.approx(np.concatenate([32 * details.ravel(), 4 * coarse.ravel()]), abs=1e-4)


def test_scattering_features_tell_blur_and_refuse_small_volumes():
    extract = metrics.ScatteringFeatures(levels=2, regions=4)
    volumes = torch.cat([ball(seed=seed) for seed in range(6)])
    features = extract(volumes)
    assert features.shape == (6, 4**3 * 15) and extract.blocks["3D"] == slice(0, 960)
    value, stderr = metrics.kid(features, extract(blur(volumes)))
    assert value > 3 * stderr
    with pytest.raises(ValueError, match="32 voxels a side"):
        metrics.ScatteringFeatures()(volumes)


def test_an_unknown_extractor_and_one_that_cannot_be_reached_say_what_works(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="'vgg', expected one of efficientnet-lite0"):
        metrics.extractor("vgg")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("medicalnet", "radimagenet"):
        with pytest.raises(ConnectionError, match=f"{name}.*Offline, use 'efficientnet-lite0'"):
            metrics.extractor(name)
    monkeypatch.setitem(__import__("sys").modules, "pytorch_fid.inception", None)
    with pytest.raises(ImportError, match="pip install pytorch-fid"):
        metrics.extractor("inception")


@pytest.mark.slow
def test_radimagenets_weights_load_under_the_names_they_were_published_with():
    torch.manual_seed(0)
    source = resnet50(spatial_dims=2, n_input_channels=3, feed_forward=False, bias_downsample=False, conv1_t_stride=2)
    children = ["conv1", "bn1", "act", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    published = {}
    for key, value in source.state_dict().items():
        first, rest = key.split(".", 1)
        published[f"backbone.{children.index(first)}.{rest}"] = value
    picture = torch.rand(1, 3, 32, 32, generator=generator())
    with torch.no_grad():
        assert torch.equal(radimagenet_network(published)(picture), source.eval()(picture))
    published.pop("backbone.7.0.conv1.weight")
    with pytest.raises(RuntimeError, match="layer4.0.conv1.weight"):
        radimagenet_network(published)


def test_medicalnet_features_do_not_depend_on_brightness_and_contrast_inside():
    network = torch.nn.Sequential(
        torch.nn.Conv3d(1, 3, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool3d(1), torch.nn.Flatten()
    )
    extract = metrics.MedicalNetFeatures(network=network)
    volume = ball(12)
    inside_only = torch.where(volume > 0, volume, volume.new_tensor(0))
    features = extract(torch.cat([inside_only, 0.5 * inside_only]))
    assert features.shape == (2, 3) and extract.blocks["3D"] == slice(0, 3)
    # zero is not the mean inside, so the background keeps a trace of the brightness: compare with a shifted one too
    expected = (inside_only - inside_only[volume > 0].mean()) / inside_only[volume > 0].std()
    assert torch.allclose(features[0], network(expected)[0], atol=1e-5)
    assert torch.allclose(features[0], features[1], atol=1e-4)
    with pytest.raises(ValueError, match="above 0"):
        extract(torch.zeros(1, 1, 12, 12, 12))


@pytest.mark.parametrize(
    "extract",
    [
        metrics.ScatteringFeatures(levels=1, regions=2),
        PlanarFeatures(lambda pictures: pictures[:, 0, ::4, ::4].flatten(1), "pixels", num_slices=2, image_size=8),
        metrics.MedicalNetFeatures(
            network=torch.nn.Sequential(torch.nn.Conv3d(1, 3, 3), torch.nn.AdaptiveAvgPool3d(1), torch.nn.Flatten())
        ),
    ],
    ids=lambda extract: extract.extractor.split()[0],
)
def test_features_of_two_channels_are_those_of_each_side_by_side_within_every_part(extract):
    first, second = (torch.rand(3, 1, 8, 8, 8, generator=generator(seed)) for seed in (1, 2))
    alone = [extract(first), extract(second)]
    parts = dict(extract.blocks)
    together = extract(torch.cat([first, second], dim=1))
    assert together.shape == (3, 2 * alone[0].shape[1]) and list(extract.blocks) == list(parts)
    for name, part in extract.blocks.items():
        side_by_side = torch.cat([features[:, parts[name]] for features in alone], dim=1)
        torch.testing.assert_close(together[:, part], side_by_side, atol=1e-5, rtol=1e-5)


def test_any_function_becomes_an_extractor_under_a_name():
    extract = metrics.NamedExtractor(lambda v: v.mean((2, 3, 4)), "means")
    assert extract.extractor == "means" and extract(torch.ones(2, 1, 3, 3, 3)).tolist() == [[1.0], [1.0]]
