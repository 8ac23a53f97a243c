"""`evaluate` against the same measures computed one by one, and how long 1,000 volumes would take."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from measure import Row, Settings, paired, row_of_pairs, timed
from torch import Tensor

from diffusers_med3d.evaluation import FeatureCache, VolumeSet, evaluate
from diffusers_med3d.metrics import (
    Extractor,
    ScatteringFeatures,
    SliceFeatures,
    features_of,
    interior_detail,
    interior_spectrum,
    kid,
    left_right_symmetry,
    manifold,
    ms_ssim_matrix,
    nearest_training_scan,
    noise_level,
    sharpness,
)

SINGLE = (sharpness, noise_level, interior_detail, interior_spectrum, left_right_symmetry)
MANY, SCANS, PAIRS = 1000, 100, 200  # samples, training scans, pairs of MS-SSIM in each of three sets
SECONDS_PER_HOUR = 3600
MOST_PAIRS = 2  # a pass takes half a minute of a slow core


class _Counted:
    """An extractor that counts the volumes which go through it."""

    def __init__(self, extractor: Extractor) -> None:
        self.inner, self.extractor, self.blocks, self.volumes = extractor, extractor.extractor, extractor.blocks, 0

    def __call__(self, volumes: Tensor) -> Tensor:
        self.volumes += len(volumes)
        features = self.inner(volumes)
        self.blocks = self.inner.blocks
        return features


def _set(name: str, count: int, side: int, seed: int) -> VolumeSet:
    """Balls of smooth noise, each another."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, side)
    inside = sum(axis.square().view([-1 if i == k else 1 for i in range(3)]) for k in range(3)) < 0.9
    noise = torch.rand(count, 1, *[side // 4] * 3, generator=generator)
    texture = torch.nn.functional.interpolate(noise, size=[side] * 3, mode="trilinear")
    grain = 0.05 * torch.rand(texture.shape, generator=generator)
    volumes = ((0.2 + 0.7 * texture + grain) * inside).clamp(0, 1)
    return VolumeSet(volumes, [0] * count, [f"{name}{i}" for i in range(count)])


def rows(settings: Settings) -> Iterator[Row]:
    """One pass against measure by measure, a second evaluation of the same volumes, and seconds at 128^3."""
    wide = settings.size == "brain-t1"
    side = 64 if wide else 32
    settings = replace(settings, repeats=min(settings.repeats, MOST_PAIRS))
    samples, reference, train = (
        _set(name, count, side, seed) for seed, (name, count) in enumerate((("m", 6), ("r", 6), ("t", 8)))
    )
    slices, pixels = (8, 128) if wide else (2, 32)
    extractors = [SliceFeatures(slices, pixels, settings.device), ScatteringFeatures()]

    def pass_over(extractors, folder: str | None = None) -> None:
        cache = FeatureCache(folder)
        evaluate({"m": samples}, reference, train, extractors, (3.0,) * 3, num_resamples=100, cache=cache)

    def one_by_one() -> None:
        for extractor in extractors:
            for distance in (kid, partial(manifold, k=3)):
                made, floor, real = (features_of(extractor, one.volumes) for one in (samples, train, reference))
                distance(made, real), distance(floor, real)
        for one in (samples, reference, train):
            ms_ssim_matrix(one.volumes)
            for measure in SINGLE:
                measure(one.volumes)
            owners = None if one is samples else one.subjects
            nearest_training_scan(one.volumes, train.volumes, train.subjects, owners)

    volumes = len(samples) + len(reference) + len(train)
    named = {"suite": "evaluation", "what": f"evaluate {volumes} volumes of {side}^3, features anew"}
    note = "intervals and the search for duplicates are in ours only"
    pairs = paired(partial(pass_over, extractors), one_by_one, settings)
    yield row_of_pairs(pairs, settings.device, peer="the measures one by one", bar=1.0, note=note, **named)
    counted = [_Counted(one) for one in extractors]
    pass_over(counted)
    passes = max(one.volumes for one in counted) / volumes
    yield Row("evaluation", "passes of a volume through an extractor", "one", "", passes, 1.0, passes, bar=1.0)
    with tempfile.TemporaryDirectory() as folder:
        pass_over(extractors, folder)
        pairs = paired(partial(pass_over, extractors, folder), partial(pass_over, extractors), settings, warm_up=False)
        named["what"] = "the same again, features read from the folder"
        yield row_of_pairs(pairs, settings.device, peer="features anew", bar=1.0, **named)
    yield from _thousand(settings, extractors)


def _thousand(settings: Settings, extractors: list[Extractor]) -> Iterator[Row]:
    """Seconds per volume or pair, measured on two volumes, and the sum for many of them."""
    side = 128 if settings.size == "brain-t1" else 64
    few = _set("m", 2, side, 3)
    parts: dict[str, tuple[Callable[[], object], int]] = {
        extractor.extractor.split(",")[0]: (partial(features_of, extractor, few.volumes, 1), MANY // 2)
        for extractor in extractors
    }
    parts["measures of single volumes"] = (lambda: [measure(few.volumes) for measure in SINGLE], MANY // 2)
    parts["MS-SSIM of a pair"] = (partial(ms_ssim_matrix, few.volumes), 3 * PAIRS)
    nearest = partial(nearest_training_scan, few.volumes, few.volumes, few.subjects)
    parts["nearest training scan, a pair"] = (nearest, MANY * SCANS // 4)
    hours = 0.0
    for what, (call, times) in parts.items():
        call()
        seconds = timed(call, settings.device).on(settings.device)
        hours += seconds * times / SECONDS_PER_HOUR
        per = seconds / (4 if what.startswith("nearest") else 1 if what.startswith("MS-SSIM") else 2)
        yield Row(
            "evaluation",
            f"{side}^3: {what}",
            "",
            "s",
            per,
        )
    yield Row(
        "evaluation",
        f"{MANY} samples of {side}^3 against {SCANS} training scans, hours",
        "",
        "h",
        hours,
        bar=1.0,
        note=f"an estimate from the rows above, on this {settings.device}; duplicates and the bootstrap are not in it",
    )
