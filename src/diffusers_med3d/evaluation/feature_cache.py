"""Features kept by the content of their volumes, so that none is computed twice, in one run or in the next."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..metrics.features import Extractor, PlanarFeatures, features_of
from ..metrics.features3d import ScatteringFeatures
from ..metrics.pretrained import MedicalNetFeatures
from ..utils.files import whole_file
from ..utils.hashing import json_hash, tensor_hash

FEATURES_VERSION = 1
"""Raise it where an extractor of this package gives other features with the same name and weights."""


class FeatureCache:
    """Features of volumes by the SHA-256 of their voxels; on disk one safetensors file per extractor.

    The file's name is a hash of the extractor's name and weights. Names of subjects and scans are not in it. Features
    of your own functions stay in memory, because nobody can see from outside whether a function has changed since.

    Args:
        folder: where features are kept for the next run; None keeps them in memory only.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._kept: dict[Extractor, _Kept] = {}

    def features_of(self, extractor: Extractor, volumes: Tensor, batch_size: int = 8) -> Tensor:
        """Features (N, D) of volumes (N, C, X, Y, Z); only volumes that are new here go through the extractor.

        Raises:
            ValueError: see `diffusers_med3d.metrics.features_of`; a file of the cache that cannot be read.
        """
        if extractor not in self._kept:
            version = None if self.folder is None else _version(extractor)
            path = None if self.folder is None or version is None else self.folder / f"{version[:32]}.safetensors"
            self._kept[extractor] = _Kept(path)
        kept = self._kept[extractor]
        hashes = [tensor_hash([(str(tuple(volume.shape)), volume)]) for volume in volumes]
        new = {one: row for row, one in enumerate(hashes) if one not in kept.features}  # equal volumes once
        if new:
            made = features_of(extractor, volumes[list(new.values())], batch_size)
            kept.features.update(zip(new, made, strict=True))
            kept.write(extractor.blocks)
        elif not extractor.blocks:  # an extractor fills them in its first call, which this one never got
            extractor.blocks = kept.blocks
        return torch.stack([kept.features[one] for one in hashes])


class _Kept:
    """What is known of one extractor: features (D,) by hash of the volume, and which part of them is what."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.features: dict[str, Tensor] = {}
        self.blocks: dict[str, slice] = {}
        if path is None or not path.is_file():
            return
        try:
            with safe_open(path, "pt") as file:
                about, features = file.metadata(), file.get_tensor("features")
            self.features = dict(zip(json.loads(about["hashes"]), features, strict=True))
            self.blocks = {name: slice(*ends) for name, ends in json.loads(about["blocks"]).items()}
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} holds no features that can be read ({error}); delete it.") from error

    def write(self, blocks: dict[str, slice]) -> None:
        """The whole file anew."""
        self.blocks = dict(blocks)
        if self.path is None:
            return
        ends = {name: [place.start, place.stop] for name, place in blocks.items()}
        about = {"hashes": json.dumps(list(self.features)), "blocks": json.dumps(ends)}
        with whole_file(self.path) as temporary:
            save_file({"features": torch.stack(list(self.features.values()))}, temporary, about)


def _version(extractor: Extractor) -> str | None:
    """Hash of what an extractor computes; None for functions, which cannot be hashed."""
    about = [extractor.extractor, FEATURES_VERSION]
    if isinstance(extractor, ScatteringFeatures):
        return json_hash(about)
    if isinstance(extractor, PlanarFeatures):
        about += [extractor.gain, extractor.offset]
    elif not isinstance(extractor, MedicalNetFeatures):
        return None
    network = extractor.network
    return tensor_hash(network.state_dict().items(), about) if isinstance(network, nn.Module) else None
