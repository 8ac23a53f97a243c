"""Tiny real components for every test: small networks, a saved pipeline, a folder of small synthetic brains.

Pitfalls that tests name by their number are those of docs/pitfalls.md.
"""

import os

# Before torch and the Hugging Face libraries are imported: no network, no telemetry, no thread storms between test
# workers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import csv
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import minihub
from diffusers_med3d import AutoencoderKL3D, DiffusionUNet3D, MedDiffusion3DPipeline, VQModel3D

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"
VOLUME_SHAPE = (16, 16, 16)  # voxels of the tiny pipeline; latents are (4, 4, 4, 4)
SPACING = (12.0, 12.0, 12.0)  # mm: 16 voxels hold a whole synthetic brain
CLASS_NAMES = ("young", "middle", "old")  # index 3 is the null class
SPLIT = {  # of the subjects of brains_folder
    "train": ["sub-01", "sub-04", "sub-06", "sub-08"],
    "validation": ["sub-02", "sub-05", "sub-07"],
    "test": ["sub-03"],
    "folds": {"a": ["sub-01", "sub-06"], "b": ["sub-04", "sub-08"]},
}


def run_example(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    """Run a script of examples/ in this process, as if these were its arguments."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture(autouse=True)
def few_threads_and_a_fixed_seed():
    """Tests draw the same numbers in any order, and two of them side by side do not fight for the cores."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)


def awaken(module: torch.nn.Module, scale: float = 0.05) -> torch.nn.Module:
    """Give small weights to the layers that MONAI starts at zero: with them, outputs would depend on nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(0, scale)
    return module.eval()


@pytest.fixture
def tiny_vae() -> AutoencoderKL3D:
    """f = 4, four latent channels with statistics that differ by channel; 16^3 -> (4, 4, 4, 4)."""
    torch.manual_seed(1)
    vae = AutoencoderKL3D(
        channels=(8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
        latents_mean=[-0.5, 0.0, 0.3, 1.0],
        latents_std=[0.5, 1.0, 2.0, 0.8],
    )
    return awaken(vae)


@pytest.fixture
def tiny_vq() -> VQModel3D:
    """f = 4, four latent channels, a codebook of 16."""
    torch.manual_seed(2)
    vq = VQModel3D(
        channels=(8, 8),
        num_res_layers=1,
        num_res_channels=(8, 8),
        num_embeddings=16,
        embedding_dim=4,
        latents_mean=[-0.5, 0.0, 0.3, 1.0],
        latents_std=[0.5, 1.0, 2.0, 0.8],
    )
    return awaken(vq)


@pytest.fixture
def tiny_unet() -> DiffusionUNet3D:
    """Two levels, attention on the last, four classes of which the last is the null class."""
    torch.manual_seed(3)
    unet = DiffusionUNet3D(
        in_channels=4,
        out_channels=4,
        channels=(8, 16),
        num_res_blocks=1,
        attention_levels=(False, True),
        num_head_channels=8,
        norm_num_groups=8,
        num_class_embeds=4,
    )
    return awaken(unet)


@pytest.fixture
def tiny_scheduler() -> DDIMScheduler:
    """As the bundled generator has it: v-prediction, latents unclipped, a finite last step (docs/pitfalls.md, P5)."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="leading",
    )


@pytest.fixture
def tiny_pipeline(tiny_vae, tiny_unet, tiny_scheduler) -> MedDiffusion3DPipeline:
    """A complete pipeline that samples in milliseconds; its volumes are noise."""
    pipeline = MedDiffusion3DPipeline(
        vae=tiny_vae,
        unet=tiny_unet,
        scheduler=tiny_scheduler,
        volume_shape=VOLUME_SHAPE,
        spacing=SPACING,
        class_names=CLASS_NAMES,
        channel_names=("t1",),
        intensity="robust range of the brain to [0, 1], background 0",
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def tiny_pipeline_folder(tiny_pipeline, tmp_path) -> str:
    """`tiny_pipeline`, saved."""
    folder = tmp_path / "tiny-pipeline"
    tiny_pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny_volumes() -> torch.Tensor:
    """(3, 1, 16, 16, 16) in [0, 1]: ellipsoids with texture on a background of exactly 0, all different."""
    return torch.stack([torch.from_numpy(synthetic_brain(VOLUME_SHAPE, seed)) for seed in range(3)])[:, None]


def synthetic_brain(shape: tuple[int, int, int], seed: int, margin: float = 0.85) -> np.ndarray:
    """float32 `shape` in [0, 1], RAS: an ellipsoid with texture and a ventricle that grows with the seed.

    One bright spot lies to the right, in front and above the centre, so that a lost flip or a swapped axis shows.
    """
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radii = margin * (1 - 0.05 * rng.random(3))
    radius = np.sqrt(sum((axis / r) ** 2 for axis, r in zip(axes, radii, strict=True)))
    volume = 0.55 + 0.08 * rng.standard_normal(shape) + 0.1 * np.sin(8 * radius)
    volume[radius < 0.15 + 0.03 * (seed % 8)] = 0.15
    spot = sum((axis - centre) ** 2 for axis, centre in zip(axes, (0.4, 0.35, 0.3), strict=True))
    volume[spot < 0.04] = 1.0
    return np.where(radius <= 1, np.clip(volume, 0.02, 1), 0).astype(np.float32)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[minihub.Hub]:
    """A Hub on loopback that huggingface_hub's client in this process is connected to and signed in at."""
    with minihub.connected(tmp_path, monkeypatch) as hub:
        yield hub


def write_brains(folder: Path) -> None:
    """Write a niftifolder of nine scans of eight subjects; `metadata.csv` has file_name, participant_id and age.

    About 6 mm voxels, every scan another shape, int16, background exactly 0; affines with an offset, one stored LAS and
    one stored (anterior, superior, right) so that only a real reorientation puts the bright spot to the right, front
    and top. One subject has two scans, one has no age; the ages give three young (<= 35), two middle and two old (>=
    60) subjects.
    """
    (folder / "images").mkdir(parents=True)
    rows = []
    ages = ["22.5", "31", "34", "45", "51", "62", "74", ""]
    for scan in range(9):
        subject = scan % 8
        name = f"sub-{subject + 1:02d}" + ("_ses-2" if scan == 8 else "") + "_T1w"
        shape = (24 + scan % 3, 30 - scan % 4, 26 + scan % 2)
        volume = (1000 * synthetic_brain(shape, subject)).astype(np.int16)
        affine = np.diag([6.0, 6.0, 6.0, 1.0])
        affine[:3, 3] = [-70 + scan, -95, -60 - scan]
        image = nibabel.Nifti1Image(volume, affine)
        if scan == 1:
            image = image.as_reoriented(nibabel.io_orientation(np.diag([-1.0, 1, 1, 1])))  # stored LAS
        if scan == 2:
            image = image.as_reoriented(np.array([[2, 1], [0, 1], [1, 1]]))  # stored ASR
        nibabel.save(image, folder / "images" / f"{name}.nii.gz")
        rows.append((f"images/{name}.nii.gz", f"sub-{subject + 1:02d}", ages[subject]))
    with open(Path(folder) / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "participant_id", "age"), *rows])


@pytest.fixture(scope="session")
def brains_folder(tmp_path_factory) -> str:
    """The niftifolder of `write_brains`."""
    folder = tmp_path_factory.mktemp("brains")
    write_brains(folder)
    return str(folder)
