"""Reading scans against MONAI's CacheDataset, and what a training step waits for them."""

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import torch
from measure import Row, Settings, now, repeated, row_of_pairs, timed
from monai.data import CacheDataset
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    ResizeWithPadOrCropd,
    ScaleIntensityRangePercentilesd,
    Spacingd,
)

from diffusers_med3d.data import VolumeDataset
from diffusers_med3d.data.writing import write_metadata
from suites.networks import make_pipeline, side

SPACING = 3.0


def _write_scans(folder: Path, number: int, voxels: int) -> list[str]:
    """Ellipsoids of noise at 2 mm, as a niftifolder."""
    generator, rows, paths = np.random.default_rng(0), [], []
    (folder / "images").mkdir()
    grid = np.stack(np.meshgrid(*[np.linspace(-1.1, 1.1, voxels)] * 3, indexing="ij"))
    inside = (grid**2).sum(0) < 1
    for i in range(number):
        voxel_values = (inside * generator.uniform(200, 1000, inside.shape)).astype(np.int16)
        paths.append(str(folder / "images" / f"scan{i}.nii.gz"))
        nibabel.save(nibabel.Nifti1Image(voxel_values, np.diag([2.0, 2.0, 2.0, 1.0])), paths[-1])
        rows.append({"file_name": f"images/scan{i}.nii.gz", "participant_id": f"s{i}"})
    write_metadata(rows, folder / "metadata.csv")
    return paths


def rows(settings: Settings) -> Iterator[Row]:
    """The first epoch, a later epoch, and a step of training beside the volumes that it takes."""
    shape = [side(settings)] * 3
    number, voxels = (6, 90) if settings.size == "brain-t1" else (3, 20)
    with tempfile.TemporaryDirectory() as temporary:
        paths = _write_scans(Path(temporary), number, voxels)
        transform = Compose(
            [
                LoadImaged("volume"),
                EnsureChannelFirstd("volume"),
                Orientationd("volume", "RAS", labels=None),
                CropForegroundd("volume", "volume", allow_smaller=True),
                Spacingd("volume", [SPACING] * 3),
                ScaleIntensityRangePercentilesd("volume", 0, 99.5, 0, 1, clip=True),
                ResizeWithPadOrCropd("volume", shape),
            ]
        )

        def ours() -> VolumeDataset:
            return VolumeDataset(temporary, volume_shape=shape, spacing=[SPACING] * 3, fit="crop")

        def theirs() -> CacheDataset:
            return CacheDataset([{"volume": path} for path in paths], transform, num_workers=1, progress=False)

        read, cached = ours(), theirs()
        pairs = [(timed(ours, "cpu"), timed(theirs, "cpu")) for _ in repeated(settings)]
        yield row_of_pairs(
            pairs, "cpu", suite="data", what=f"read and prepare {number} scans", peer="MONAI's CacheDataset", bar=1.0
        )

        def epoch(dataset) -> None:
            for _ in range(20):
                for i in range(len(dataset)):
                    dataset[i]["volume"]

        pairs = [(timed(lambda: epoch(read), "cpu"), timed(lambda: epoch(cached), "cpu")) for _ in repeated(settings)]
        yield row_of_pairs(
            pairs, "cpu", suite="data", what="20 later epochs, from memory", peer="MONAI's CacheDataset", bar=1.0
        )
    pipeline = make_pipeline(settings)
    volumes = read.stack()
    latents = torch.randn(8, pipeline.vae.latent_channels, *pipeline.vae.latent_shape(shape))
    shares, waits = [], []
    for _ in repeated(settings):
        start = now(settings.device)
        batch = latents[torch.randperm(len(latents))[:4]].to(settings.device)
        wait = now(settings.device) - start
        pipeline.unet(batch, 500).sample.square().mean().backward()
        step = now(settings.device) - start
        shares.append(wait.wall / step.wall)
        waits.append(wait.wall)
    yield Row(
        "data",
        "wait for the batch of latents, of a training step",
        "the step",
        "s",
        statistics.median(waits),
        ratio=statistics.median(shares),
        low=min(shares),
        high=max(shares),
        repeats=settings.repeats,
        bar=0.01,
        note=f"{len(volumes)} scans and their latents are kept in memory",
    )
