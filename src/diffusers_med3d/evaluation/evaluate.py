"""All figures of some sets of generated volumes against real scans, with floor and intervals: `evaluate`."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from ..data.duplicates import find_duplicates, one_person_each
from ..metrics.bootstrap import bootstrap_interval, weighted_pair_mean
from ..metrics.features import Extractor
from ..metrics.frechet import SAMPLES_PER_DIMENSION, frechet, frechet_dimensions, principal_components
from ..metrics.image import interior_detail, interior_spectrum, noise_level, sharpness
from ..metrics.kid import polynomial_kernel
from ..metrics.manifold import manifold
from ..metrics.memorisation import copy_threshold, nearest_training_scan
from ..metrics.similarity import ms_ssim_matrix
from ..metrics.symmetry import left_right_symmetry
from ..metrics.tissue import Segmenter, tissue_volumes
from .feature_cache import FeatureCache
from .report import FLOOR, REFERENCE, Draws, Figure, Report
from .sets import Sets, distinct
from .volume_set import VolumeSet

FLOOR_DRAWS = 10  # draws of training scans that measures which depend on the count are averaged over


def kid_draws(sets: Sets, features: Mapping[str, Tensor]) -> Draws:
    """Unbiased KID of every set to the reference, by pairs of different subjects, classes weighted (see `kid`)."""
    within = {name: sets.pair_mean(name, name, polynomial_kernel(own, own).numpy()) for name, own in features.items()}
    return {
        name: within[name]
        + within[REFERENCE]
        - 2 * sets.pair_mean(name, REFERENCE, polynomial_kernel(own, features[REFERENCE]).numpy())
        for name, own in features.items()
        if name != REFERENCE
    }


def _frechet(sets: Sets, features: Mapping[str, Tensor], dimensions: int) -> Draws:
    """Fréchet distance of every independent set to the reference, on as many volumes of each."""
    if dimensions < features[REFERENCE].shape[1]:
        mean, directions = principal_components(features[FLOOR], dimensions)
        features = {name: (own.double() - mean) @ directions for name, own in features.items()}
    real, real_weights = features[REFERENCE], torch.from_numpy(sets.weights[REFERENCE])
    points = []
    for _ in range(FLOOR_DRAWS):
        points.append(frechet(features[FLOOR][sets.floor_rows()], real).item())
    floor = frechet(features[FLOOR], real, torch.from_numpy(sets.floor_weights()), real_weights[1:])
    draws = {FLOOR: np.concatenate([[np.mean(points)], floor.numpy()])}
    for name in sets.models:
        if name not in sets.derived:
            rows = sets.matched_rows(name)
            weights = torch.from_numpy(sets.weights[name][:, rows])
            draws[name] = frechet(features[name][rows], real, weights, real_weights).numpy()
    return draws


def _manifold(sets: Sets, features: Mapping[str, Tensor], k: int) -> dict[str, Draws]:
    """Precision, recall, density and coverage of every independent set; the balls themselves are not resampled."""
    draws: dict[str, Draws] = {"precision": {}, "recall": {}, "density": {}, "coverage": {}}
    real = features[REFERENCE]
    of_scans = np.zeros((2, len(real)))  # recall and coverage of each reference scan, averaged over draws
    of_floor = np.zeros((3, len(features[FLOOR])))  # precision and density summed over draws, and in how many drawn
    for _ in range(FLOOR_DRAWS):
        rows = sets.floor_rows()
        found = manifold(features[FLOOR][rows], real, k)
        of_scans += np.stack([found.recall, found.coverage]) / FLOOR_DRAWS
        of_floor[:, rows] += np.stack([found.precision, found.density, np.ones(len(rows))])
    drawn = np.where(of_floor[2] > 0, of_floor[2], np.nan)
    draws["precision"][FLOOR] = sets.floor_mean(of_floor[0] / drawn)
    draws["density"][FLOOR] = sets.floor_mean(of_floor[1] / drawn)
    draws["recall"][FLOOR], draws["coverage"][FLOOR] = (sets.mean(REFERENCE, values) for values in of_scans)
    for name in sets.models:
        if name not in sets.derived:
            rows = sets.matched_rows(name)
            found = manifold(features[name][rows], real, k)
            for measure in ("precision", "density"):
                draws[measure][name] = sets.mean(name, getattr(found, measure), rows)
            for measure in ("recall", "coverage"):
                draws[measure][name] = sets.mean(REFERENCE, getattr(found, measure))
    return draws


def _by_block(sets: Sets, measure: str, whole: str, blocks: Mapping[str, Draws], extractor: str) -> list[Figure]:
    """A distance averaged over the parts of the features, then part by part where there are several."""
    mean = {one: np.mean([draws[one] for draws in blocks.values()], axis=0) for one in next(iter(blocks.values()))}
    figures = [sets.figure(f"{measure} {whole}", "lower", FLOOR, mean, extractor)]
    if len(blocks) > 1:
        figures += [sets.figure(f"{measure} {block}", "lower", FLOOR, own, extractor) for block, own in blocks.items()]
    return figures


def _feature_figures(
    sets: Sets, extractor: Extractor, cache: FeatureCache, neighbours: int, batch_size: int
) -> list[Figure]:
    """KID and Fréchet by block and on average, and the nearest-neighbour measures, of one extractor."""
    features = {name: cache.features_of(extractor, one.volumes, batch_size) for name, one in sets.all.items()}
    name, blocks = extractor.extractor, extractor.blocks
    whole = "tri-planar" if len(blocks) == 3 else next(iter(blocks)) if len(blocks) == 1 else "mean"
    parts = {block: {one: own[:, place] for one, own in features.items()} for block, place in blocks.items()}
    figures = _by_block(sets, "KID", whole, {block: kid_draws(sets, part) for block, part in parts.items()}, name)
    matched, scans = sum(sets.matched_counts.values()), len(features[REFERENCE])
    size = min(part[REFERENCE].shape[1] for part in parts.values())
    dimensions = frechet_dimensions(matched, scans, size)
    independent = [one for one in sets.models if one not in sets.derived]
    if dimensions >= 2 and independent:
        measure = "Fréchet" if dimensions == size else f"Fréchet on {dimensions} principal components,"
        by_block = {block: _frechet(sets, part, dimensions) for block, part in parts.items()}
        figures += _by_block(sets, measure, whole, by_block, name)
    rule = (
        f"{name}: {size} dimensions a part, {matched} volumes of each set against {scans} reference scans; a Fréchet "
        f"distance may be read on at most a {SAMPLES_PER_DIMENSION}th as many dimensions as volumes"
    )
    if dimensions < 2:
        sets.notes.append(f"{rule}, so it is left out.")
    elif dimensions < size:
        sets.notes.append(
            f"{rule}, so it is given on the {dimensions} leading principal components of the training scans, and is "
            "blind to what lies outside them."
        )
    k = min(neighbours, matched - 1, scans - 1)
    if k >= 1 and independent:
        for measure, draws in _manifold(sets, features, k).items():
            figures.append(sets.figure(f"{measure}, k = {k}", "higher", FLOOR, draws, name))
    return figures


def _similarity_figures(sets: Sets, max_pairs: int, seed: int) -> list[Figure]:
    """MS-SSIM between volumes of one class and different subjects: mean and closest pair."""
    mean: Draws = {}
    closest: Draws = {}
    for name, one in sets.all.items():
        rows = sets.floor_rows() if name == FLOOR else np.arange(len(one))
        labels = sets.labels[name][rows]
        subjects = [one.subjects[row] for row in rows]
        volumes = one.volumes[torch.from_numpy(rows)]
        pairs = ms_ssim_matrix(volumes, labels.tolist(), max_pairs=max_pairs, seed=seed).double().numpy()
        allowed = distinct(subjects, subjects) & np.isfinite(pairs)
        weights = (sets.floor_resamples if name == FLOOR else sets.weights[name])[:, rows]
        mean[name] = weighted_pair_mean(
            pairs, allowed, weights, labels, weights, labels, sets.shares, within_class=True
        )
        highest = pairs[allowed].max() if allowed.any() else float("nan")
        closest[name] = np.concatenate([[highest], np.full(sets.num_resamples, np.nan)])
    return [
        sets.figure("MS-SSIM, mean of pairs", "scans", FLOOR, mean),
        sets.figure("MS-SSIM, closest pair", "scans", FLOOR, closest),
    ]


def _spectrum_figures(sets: Sets, bins: int) -> tuple[Figure, dict[str, dict[str, list[float]]]]:
    """Mean power spectrum (log10) of every set with intervals, and its mean distance to the reference's in dB."""
    logs: dict[str, NDArray] = {}
    spectra: dict[str, dict[str, list[float]]] = {}
    for name, one in sets.all.items():
        centres, power = interior_spectrum(one.volumes, bins)
        decibels = 10 * power.clamp_min(1e-12).log10().double().numpy()
        logs[name] = np.stack([sets.mean(name, decibels[:, shell]) for shell in range(bins)], axis=1)  # (1 + R, bins)
        intervals = [bootstrap_interval(logs[name][:, shell]) for shell in range(bins)]
        spectra[name] = {
            "frequency": centres.tolist(),
            "decibel": [interval.value for interval in intervals],
            "low": [interval.low for interval in intervals],
            "high": [interval.high for interval in intervals],
        }
    distance = {name: np.abs(values - logs[REFERENCE]).mean(1) for name, values in logs.items() if name != REFERENCE}
    return sets.figure("power spectrum, mean distance in dB", "lower", FLOOR, distance), spectra


def _seen_scans(reference: VolumeSet, train: VolumeSet) -> list[str]:
    """Sentences about reference scans that are training scans under another name."""
    found = find_duplicates([*reference.volumes, *train.volumes], progress=False)
    return [
        f"The reference scan of {reference.subjects[pair.first]} is the training scan of "
        f"{train.subjects[pair.second - len(reference)]} under another name (detail correlation {pair.score:.3f}): the "
        "models have seen it, so it cannot judge them. Leave one of the two out and make the split anew."
        for pair in found
        if pair.first < len(reference) <= pair.second
    ]


def evaluate(
    models: Mapping[str, VolumeSet],
    reference: VolumeSet,
    train: VolumeSet,
    extractors: Sequence[Extractor],
    spacing: Sequence[float],
    segmenter: Segmenter | None = None,
    tissue_names: Sequence[str] = (),
    num_resamples: int = 1000,
    seed: int = 0,
    neighbours: int = 5,
    max_pairs: int = 200,
    batch_size: int = 8,
    cache: FeatureCache | None = None,
) -> Report:
    """Measures sets of generated volumes against scans that no model saw.

    The floor is what a perfect generator would score: training scans in place of the samples, of the reference's class
    mix, and as many as there are samples where the measure depends on the count. The excess over it is the figure to
    read. Measures of single volumes have no such floor; their excess is over the mean of the reference scans.

    Args:
        models: name -> samples with the class mix of the reference; the first is what the others are compared with.
            A set made from the reference scans themselves (round-trips) bears their subjects: one subject's scan and
            its version are then never paired, and measures that need independent sets are left out for it.
        reference: scans of subjects that no model was trained on.
        train: the models' training scans.
        extractors: of features (see `extractor`).
        spacing: voxel size in mm.
        segmenter: for the volumes of `tissue_names`, label 1 being the first.
        num_resamples: of the bootstrap over subjects and samples.
        seed: of the bootstrap and the draws of training scans.
        neighbours: k of precision, recall, density and coverage; fewer where sets are smaller.
        max_pairs: most pairs per class whose MS-SSIM is taken.
        batch_size: volumes at once through an extractor.
        cache: of features; None computes them in this call, each once.

    Raises:
        ValueError: sets that cannot be compared (other shapes, another class mix, subjects in reference and training).
    """
    cache = FeatureCache() if cache is None else cache
    sets = Sets(models, reference, train, num_resamples, seed)
    sets.notes += _seen_scans(reference, train)
    figures: list[Figure] = []
    per_volume: dict[str, dict[str, list[float]]] = {}
    with tqdm(total=len(extractors) + 3 + (segmenter is not None), desc="measuring", unit="step") as progress:
        for one in extractors:
            progress.set_postfix_str(one.extractor.split(",")[0])
            figures += _feature_figures(sets, one, cache, neighbours, batch_size)
            progress.update()

        progress.set_postfix_str("MS-SSIM")
        figures += _similarity_figures(sets, max_pairs, seed)
        progress.update()

        def add(name: str, aim: str, values: Mapping[str, Tensor]) -> None:
            per_volume[name] = {one: [float(v) for v in own] for one, own in values.items()}
            figures.append(sets.figure(name, aim, REFERENCE, {one: sets.mean(one, own) for one, own in values.items()}))

        progress.set_postfix_str("detail")
        add("sharpness", "scans", {name: sharpness(one.volumes) for name, one in sets.all.items()})
        add("noise level", "scans", {name: noise_level(one.volumes) for name, one in sets.all.items()})
        detail = {name: interior_detail(one.volumes) for name, one in sets.all.items()}
        scale = sets.mean(REFERENCE, detail[REFERENCE])[0]
        add("high-frequency power less noise, scans = 1", "scans", {name: own / scale for name, own in detail.items()})
        spectrum_figure, spectra = _spectrum_figures(sets, bins=min(16, min(reference.volumes.shape[2:]) // 2))
        figures.append(spectrum_figure)
        add("left-right symmetry", "scans", {name: left_right_symmetry(one.volumes) for name, one in sets.all.items()})
        progress.update()

        if segmenter is not None:
            progress.set_postfix_str("tissue")
            volumes = {
                name: tissue_volumes(one.volumes, segmenter, len(tissue_names), spacing)
                for name, one in sets.all.items()
            }
            for k, tissue in enumerate(tissue_names):
                add(f"{tissue} in ml", "scans", {name: own[:, k] for name, own in volumes.items()})
            progress.update()

        progress.set_postfix_str("memorisation")
        doubles = find_duplicates(list(train.volumes), progress=False)
        people = dict(zip(train.subjects, one_person_each(train.subjects, doubles), strict=True))
        trained = [people[name] for name in train.subjects]
        nearest = {
            name: nearest_training_scan(
                one.volumes,
                train.volumes,
                trained,
                None if name in models else [people.get(subject, subject) for subject in one.subjects],
            )
            for name, one in sets.all.items()
        }
        threshold = copy_threshold(nearest[FLOOR].ratio)
        add("distance to the nearest training scan", "scans", {name: own.distance for name, own in nearest.items()})
        add("nearest over second nearest", "scans", {name: own.ratio for name, own in nearest.items()})
        add("copies flagged", "lower", {name: (own.ratio < threshold).float() for name, own in nearest.items()})
        sets.notes.append(
            f"A volume is flagged as a copy when its nearest over second nearest is under {threshold:.3f}, the 5 % "
            "quantile of the training scans among themselves: unseen scans are flagged at about that rate."
        )
        pairs = [(train.subjects[pair.first], train.subjects[pair.second]) for pair in doubles]
        progress.update()
    if sets.derived:
        sets.notes.append(
            f"Made from the reference scans, so without Fréchet and nearest-neighbour measures: {sorted(sets.derived)}."
        )
    return Report(
        figures,
        sets.counts,
        sets.notes,
        per_volume,
        spectra,
        sets.models,
        {name: own.scan.tolist() for name, own in nearest.items()},
        [pair for pair in pairs if pair[0] != pair[1]],
    )
