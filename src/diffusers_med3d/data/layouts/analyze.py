"""Analyze 7.5 images (.hdr and .img) with the orientation that their header states.

Analyze has no affine. Its byte ``orient`` names one of six storage orders (Mayo's definition: 0 transverse, 1 coronal,
2 sagittal, 3 to 5 the same flipped), in each of which the first voxel lies to the patient's *right*. nibabel and SPM
ignore that byte and take 0; ITK takes yet another order and mirrors the image. For OASIS-1 the two that occur are 0
(T88_111: left, anterior, superior) and 2 (RAW and SUBJ_111: anterior, superior, left); they agree with the first voxel
that the documentation of 4dfp gives for images converted by ``4dfptoanalyze``, the program that wrote them: "right
occipital skull-base" and "occipital skull-base right".
"""

from pathlib import Path

import nibabel
import numpy as np
from nibabel.analyze import AnalyzeImage

ORIENTATIONS = ("LAS", "LSA", "ASL", "LPS", "LIA", "AIL")
ORIENT_BYTE = 252  # offset of hist.orient in the header of 348 bytes


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Array (X, Y, Z) float32 as stored and its affine (4, 4); the middle of the volume is the origin.

    Raises:
        ValueError: an unknown storage order, more than one volume, or an .img of another size than the .hdr says.
    """
    orient = path.with_suffix(".hdr").read_bytes()[ORIENT_BYTE]
    if orient >= len(ORIENTATIONS):
        raise ValueError(f"the header's orient is {orient}, expected 0 to {len(ORIENTATIONS) - 1}.")
    image = AnalyzeImage.from_filename(str(path.with_suffix(".img")))
    array = np.asarray(image.dataobj, dtype=np.float32)
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim != 3:
        raise ValueError(f"expected one volume (X, Y, Z), got shape {array.shape}.")
    zooms = np.abs(np.array(image.header.get_zooms()[:3], dtype=float))
    if not (zooms > 0).all():
        raise ValueError(f"the header's voxel size is {zooms.tolist()}; all must be above 0.")
    wanted = nibabel.orientations.axcodes2ornt(ORIENTATIONS[orient])  # per array axis: which of R, A, S and its sign
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (world, sign) in enumerate(wanted):
        affine[int(world), axis] = sign * zooms[axis]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(array.shape) - 1) / 2)
    return array, affine
