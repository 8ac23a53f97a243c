"""Made-up brains for trying things out: deformed, re-contrasted tissue maps of a template, with or without lesions.

They are no scans of anybody and stand for none: results on them say that a program runs, not that it works on people.
"""

import gzip
from pathlib import Path

import nibabel
import numpy as np
from scipy.ndimage import affine_transform, binary_erosion, gaussian_filter, map_coordinates, zoom
from tqdm.auto import tqdm

from ..utils.files import whole_file, write_json
from .writing import write_metadata

CLASS_NAMES = ("plain", "lesion")
CONTRASTS = {"csf": 0.25, "gm": 0.65, "wm": 1.0}
"""Mean intensity of the tissues, as in a T1-weighted scan."""


def tissue_maps(spacing: float = 2.0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Shares of CSF, grey and white matter in every voxel, (X, Y, Z) each, and their affine (4, 4).

    From the ICBM152 2009 maps inside of nilearn (``pip install "diffusers-med3d[phantom]"``); nothing is downloaded.

    Raises:
        ImportError: without nilearn.
    """
    try:
        from nilearn.datasets import load_mni152_gm_template, load_mni152_template, load_mni152_wm_template
    except ImportError as error:
        raise ImportError('the phantom needs nilearn: pip install "diffusers-med3d[phantom]"') from error
    full = {
        "head": load_mni152_template(resolution=1),
        "gm": load_mni152_gm_template(resolution=1),
        "wm": load_mni152_wm_template(resolution=1),
    }
    affine = full["head"].affine.copy()
    factor = 1.0 / spacing
    maps = {}
    for name, image in full.items():
        array = np.asarray(image.dataobj, dtype=np.float32)
        smooth = gaussian_filter(array, 0.4 * spacing) if spacing > 1 else array
        maps[name] = zoom(smooth, factor, order=1, grid_mode=True, mode="nearest")
    affine[:3, 3] += affine[:3, :3] @ np.full(3, 0.5 * (spacing - 1))
    affine[:3, :3] *= spacing
    brain = np.clip(maps.pop("head") * 8, 0, 1)
    maps = {name: np.clip(one, 0, 1) * brain for name, one in maps.items()}
    return {"csf": np.clip(brain - maps["gm"] - maps["wm"], 0, 1), **maps}, affine


def make_phantom(
    output_dir: str | Path,
    num_subjects: int = 48,
    seed: int = 0,
    spacing: float = 2.0,
    lesion_share: float = 0.5,
    deformation: float = 4.0,
    noise: float = 0.03,
    bias: float = 0.15,
) -> Path:
    """Write a niftifolder of made-up brains: ``images/``, ``metadata.csv`` (``class``: plain or lesion), a note.

    Every subject depends on ``seed`` and its number alone, so that a smaller set is part of a larger one. A volume that
    is there already is not made again.

    Args:
        output_dir: folder to be made.
        num_subjects: of both classes together.
        seed: of everything random.
        spacing: voxel size in mm, 1 or more.
        lesion_share: share of subjects with lesions.
        deformation: mm, standard deviation of a smooth random warp.
        noise: standard deviation of the Rician noise, white matter is 1.
        bias: standard deviation of the log of a smooth multiplicative field.

    Returns:
        The folder.
    """
    if num_subjects < 1 or spacing < 1 or not 0 <= lesion_share <= 1:
        raise ValueError(
            "num_subjects and spacing must be at least 1 and lesion_share in [0, 1], got "
            f"{num_subjects}, {spacing} and {lesion_share}."
        )
    folder = Path(output_dir)
    maps, affine = tissue_maps(spacing)
    rows = []
    for number in tqdm(range(1, num_subjects + 1), desc="making the phantom", unit="brain"):
        lesion = int(number * lesion_share) > int((number - 1) * lesion_share)
        name = f"sub-phantom{number:03d}"
        rows.append(
            {
                "file_name": f"images/{name}.nii.gz",
                "participant_id": name,
                "class": CLASS_NAMES[lesion],
                "phantom": "yes",
            }
        )
        path = folder / rows[-1]["file_name"]
        if path.is_file():
            continue
        volume = phantom_brain(maps, spacing, lesion, np.random.default_rng([seed, number]), deformation, noise, bias)
        image = nibabel.Nifti1Image((1000 * volume).round().astype(np.int16), affine)
        image.header["descrip"] = b"phantom, no scan"
        with whole_file(path) as temporary:
            temporary.write_bytes(gzip.compress(image.to_bytes(), 5, mtime=0))
    write_metadata(rows, folder / "metadata.csv")
    note = "Made-up brains from the ICBM152 2009 tissue maps of nilearn. They are no scans and show nobody."
    write_json(folder / "phantom.json", {"note": note, "num_subjects": num_subjects, "seed": seed, "spacing": spacing})
    return folder


def phantom_brain(
    maps: dict[str, np.ndarray],
    spacing: float,
    lesion: bool,
    rng: np.random.Generator,
    deformation: float = 4.0,
    noise: float = 0.03,
    bias: float = 0.15,
) -> np.ndarray:
    """One brain (X, Y, Z) float32, white matter about 1, background exactly 0; see ``make_phantom``."""
    shape = maps["gm"].shape
    coordinates = _pose(shape, rng) + _warp(shape, spacing, deformation, rng)
    warped = {name: map_coordinates(one, coordinates, order=1) for name, one in maps.items()}
    contrasts = {name: mean * (1 + rng.normal(0, 0.05)) for name, mean in CONTRASTS.items()}
    volume = sum(contrasts[name] * one for name, one in warped.items())
    if lesion:
        inside = _lesions(warped["wm"], spacing, rng)
        volume = volume * (1 - inside) + contrasts["gm"] * rng.uniform(0.5, 0.75) * inside
    volume = volume * np.exp(_field(shape, 60.0 / spacing, bias, rng))
    brain = sum(warped.values()) > 0.5
    real, imaginary = (noise * _field(shape, 0.5, 1.0, rng) for _ in range(2))
    noisy = np.hypot(volume + real, imaginary)
    return np.where(brain, np.maximum(noisy, 1e-3), 0).astype(np.float32)


def _field(shape: tuple[int, ...], width: float, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian random field of a given smoothness (voxels) and standard deviation; coarse where that is enough."""
    step = max(1, int(width // 3))
    coarse = rng.standard_normal([side // step + 3 for side in shape])
    smooth = gaussian_filter(coarse, width / step, mode="wrap")
    smooth *= strength / smooth.std()
    if step == 1:
        return smooth[tuple(slice(side) for side in shape)]
    return affine_transform(smooth, np.full(3, 1 / step), output_shape=shape, order=1)


def _pose(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Coordinates (3, X, Y, Z) after a small random rotation, scaling and shift about the middle."""
    x, y, z = rng.normal(0, np.deg2rad(4), 3)
    turn_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    turn_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    turn_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    matrix = turn_x @ turn_y @ turn_z @ np.diag(1.02 + rng.normal(0, 0.03, 3))
    centre = (np.array(shape) - 1) / 2
    grid = np.stack(np.meshgrid(*[np.arange(side) for side in shape], indexing="ij")).astype(float)
    moved = np.einsum("ij,jxyz->ixyz", matrix, grid - centre[:, None, None, None])
    return moved + (centre + rng.normal(0, 1.0, 3))[:, None, None, None]


def _warp(shape: tuple[int, ...], spacing: float, strength: float, rng: np.random.Generator) -> np.ndarray:
    """Displacements (3, X, Y, Z) in voxels: a broad warp, and a fine one of a third of its strength for the folds."""
    broad, fine = (
        np.stack([_field(shape, width / spacing, part * strength / spacing, rng) for _ in range(3)])
        for width, part in ((25.0, 1.0), (8.0, 0.35))
    )
    return broad + fine


def _lesions(white: np.ndarray, spacing: float, rng: np.random.Generator) -> np.ndarray:
    """Soft-edged, irregular blobs in white matter, in [0, 1]."""
    deep = np.argwhere(binary_erosion(white > 0.7, iterations=max(1, round(4 / spacing))))
    rough = _field(white.shape, 4.0 / spacing, 1.0, rng)
    grid = np.stack(np.meshgrid(*[np.arange(side) for side in white.shape], indexing="ij"))
    inside = np.zeros(white.shape)
    for centre in deep[rng.choice(len(deep), rng.integers(3, 7), replace=False)]:
        radius = rng.uniform(5, 11) / spacing
        distance = np.sqrt(((grid - centre[:, None, None, None]) ** 2).sum(0)) / radius
        inside = np.maximum(inside, 1 / (1 + np.exp((distance + 0.35 * rough - 1) / 0.08)))
    return inside * np.clip(white * 1.5, 0, 1)
