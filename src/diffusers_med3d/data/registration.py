"""Bring scans of a body part into one frame: affine to the mean of a group, on one grid, each resampled once.

Needs SimpleITK (``pip install "diffusers-med3d[register]"``), which counts in LPS millimetres. Arrays, grids and
affines here are RAS, as in NIfTI files. A transform maps points of the *grid* to points of the scan: resampling needs
it so.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

try:
    import SimpleITK as sitk
except ImportError as error:
    raise ImportError("registration needs SimpleITK: pip install 'diffusers-med3d[register]'.") from error

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])
MAX_CUT = 0.01
"""Largest share of a scan's foreground that may lie outside the grid."""


@dataclass(frozen=True)
class Grid:
    """Voxels (X, Y, Z) of ``spacing`` mm along right, anterior, superior; the point (0, 0, 0) is the middle."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]

    @property
    def affine(self) -> np.ndarray:
        """(4, 4), voxel to RAS millimetres."""
        affine = np.diag([*self.spacing, 1.0])
        affine[:3, 3] = -0.5 * (np.array(self.shape) - 1) * self.spacing
        return affine

    def blank(self) -> sitk.Image:
        """An image of zeros on this grid."""
        return _image(np.zeros(self.shape, np.float32), self.affine)


@dataclass(frozen=True)
class Jitter:
    """Standard deviations of the random changes that make another copy of a scan."""

    degrees: float = 2.0
    scale: float = 0.025
    shift: float = 1.2  # mm
    warp: float = 1.6  # mm along each axis
    smoothness: float = 20.0  # mm, standard deviation of the Gaussian that the warp is smoothed with


def _image(array: np.ndarray, affine: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T, dtype=np.float32))
    linear = affine[:3, :3]
    spacing = np.linalg.norm(linear, axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((RAS_TO_LPS @ (linear / spacing)).ravel().tolist())
    image.SetOrigin((RAS_TO_LPS @ affine[:3, 3]).tolist())
    return image


def _array(image: sitk.Image) -> np.ndarray:
    return np.ascontiguousarray(sitk.GetArrayFromImage(image).T)


def read_scan(array: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """A scan (X, Y, Z), positive on a background of 0, with its voxel-to-RAS affine."""
    if array.ndim != 3:
        raise ValueError(f"registration takes scans of one channel (X, Y, Z), got shape {array.shape}.")
    if not (array > 0).any():
        raise ValueError("nothing in the scan is above 0; intensities must be positive on a background of 0.")
    return _image(array, affine)


def template_image(template: np.ndarray, grid: Grid) -> sitk.Image:
    """A template (X, Y, Z) on the grid."""
    return _image(template, grid.affine)


def _foreground_points(scan: sitk.Image) -> np.ndarray:
    """Physical points (N, 3), LPS, of the voxels above 0."""
    indices = np.argwhere(_array(scan) > 0)
    direction = np.array(scan.GetDirection()).reshape(3, 3) * scan.GetSpacing()
    return indices @ direction.T + scan.GetOrigin()


def centred(scan: sitk.Image) -> sitk.AffineTransform:
    """The shift that brings the middle of the foreground's bounding box to the middle of the grid."""
    points = _foreground_points(scan)
    transform = sitk.AffineTransform(3)
    transform.SetTranslation(((points.min(0) + points.max(0)) / 2).tolist())
    return transform


def register(scan: sitk.Image, template: sitk.Image, start: sitk.AffineTransform | None = None) -> sitk.AffineTransform:
    """The affine from ``template`` to ``scan`` of the highest correlation. Every voxel counts, so it is repeatable."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsCorrelation()
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0, minStep=1e-3, numberOfIterations=100, gradientMagnitudeTolerance=1e-6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2])
    method.SetSmoothingSigmasPerLevel([6.0, 3.0])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    transform = sitk.AffineTransform(centred(scan) if start is None else start)
    method.SetInitialTransform(transform, inPlace=True)
    method.Execute(template, scan)
    return transform


def resample(scan: sitk.Image, transform: sitk.Transform, grid: Grid, smoothing: float) -> np.ndarray:
    """The scan on the grid, (X, Y, Z) float32, by cubic B-splines after a Gaussian of ``smoothing`` mm.

    Linear interpolation blurs the more, the further a point lies from the voxels around it, so a turned scan gets
    bands. Splines ring beside edges: what they leave where linear interpolation finds nothing is set to 0.
    """
    blank = grid.blank()
    smooth = sitk.DiscreteGaussian(scan, [smoothing**2] * 3, 32, 1e-3, True) if smoothing else scan
    values = _array(sitk.Resample(smooth, blank, transform, sitk.sitkBSpline, 0.0))
    inside = _array(sitk.Resample(sitk.Cast(scan > 0, sitk.sitkFloat32), blank, transform, sitk.sitkLinear, 0.0))
    return np.where(inside > 0, values.clip(min=0), 0).astype(np.float32)


def normalised(scan: sitk.Image, transform: sitk.Transform, grid: Grid) -> np.ndarray:
    """The scan on the grid by linear interpolation, divided by the mean of its foreground: what templates average."""
    volume = _array(sitk.Resample(scan, grid.blank(), transform, sitk.sitkLinear, 0.0))
    return volume / volume[volume > 0].mean()


def symmetric_mean(volumes: Iterable[np.ndarray]) -> np.ndarray:
    """Mean of volumes and of their mirror images, so that the midline is the middle of the grid."""
    volumes = list(volumes)
    mean = sum(volumes[1:], start=volumes[0]) / len(volumes)
    return (mean + mean[::-1]) / 2


def cut_share(scan: sitk.Image, transform: sitk.AffineTransform, grid: Grid) -> float:
    """Share of the scan's foreground voxels that lie outside the grid."""
    inverse = transform.GetInverse()
    matrix, offset = np.array(inverse.GetMatrix()).reshape(3, 3), np.array(inverse.GetTranslation())
    centre = np.array(inverse.GetCenter())
    points = (_foreground_points(scan) - centre) @ matrix.T + centre + offset
    half = 0.5 * np.array(grid.shape) * grid.spacing
    return float((np.abs(points) > half).any(axis=1).mean())


def correlation(volume: np.ndarray, template: np.ndarray) -> float:
    """Pearson correlation of two volumes on the grid."""
    return float(np.corrcoef(volume.ravel(), template.ravel())[0, 1])


def affine_of(transform: sitk.AffineTransform) -> np.ndarray:
    """(4, 4) from RAS points of the grid to RAS points of the scan."""
    matrix, centre = np.array(transform.GetMatrix()).reshape(3, 3), np.array(transform.GetCenter())
    affine = np.eye(4)
    affine[:3, :3] = RAS_TO_LPS @ matrix @ RAS_TO_LPS
    affine[:3, 3] = RAS_TO_LPS @ (np.array(transform.GetTranslation()) + centre - matrix @ centre)
    return affine


def transform_of(affine: np.ndarray) -> sitk.AffineTransform:
    """The inverse of ``affine_of``."""
    affine = np.asarray(affine, dtype=float)
    transform = sitk.AffineTransform(3)
    transform.SetMatrix((RAS_TO_LPS @ affine[:3, :3] @ RAS_TO_LPS).ravel().tolist())
    transform.SetTranslation((RAS_TO_LPS @ affine[:3, 3]).tolist())
    return transform


def jittered(
    transform: sitk.AffineTransform, grid: Grid, jitter: Jitter, rng: np.random.Generator
) -> sitk.CompositeTransform:
    """``transform`` after a small random warp, rotation, scaling and shift: one transform, so one interpolation."""
    rotation = sitk.Euler3DTransform()
    rotation.SetRotation(*np.deg2rad(rng.normal(0, jitter.degrees, 3)).tolist())
    affine = sitk.AffineTransform(3)
    affine.SetMatrix((np.array(rotation.GetMatrix()).reshape(3, 3) * (1 + rng.normal(0, jitter.scale, 3))).ravel())
    affine.SetTranslation(rng.normal(0, jitter.shift, 3).tolist())
    return sitk.CompositeTransform([transform, affine, _warp(grid, jitter, rng)])  # the last one is applied first


def _warp(grid: Grid, jitter: Jitter, rng: np.random.Generator) -> sitk.DisplacementFieldTransform:
    """Gaussian random displacements with a standard deviation of ``jitter.warp`` mm along each axis."""
    sigmas = [jitter.smoothness / step for step in grid.spacing]
    field = np.stack([gaussian_filter(rng.normal(size=grid.shape), sigmas, mode="wrap") for _ in range(3)], axis=-1)
    field *= jitter.warp / np.sqrt(np.mean(field**2))
    blank = grid.blank()
    image = sitk.GetImageFromArray(np.ascontiguousarray(field.transpose(2, 1, 0, 3)), isVector=True)
    image.CopyInformation(blank)
    return sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))
