"""Hashes of contents, by which kept results know what they were made of."""

import hashlib
import json
from collections.abc import Iterable
from itertools import chain
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from .wrappers import unwrapped


def json_hash(value: Any) -> str:
    """SHA-256 of a JSON-able value, whatever the order of its keys; other objects enter by their text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def tensor_hash(tensors: Iterable[tuple[str, Tensor]], first: Any = None) -> str:
    """SHA-256 of a JSON-able ``first``, then of names and float32 values of tensors, on any device in any precision."""
    digest = hashlib.sha256(json_hash(first).encode())
    for name, tensor in tensors:
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def pipeline_hash(pipeline: DiffusionPipeline) -> str:
    """Hash of a generator's weights and scheduler: tells generators apart without a path."""
    parts = (unwrapped(pipeline.vae), unwrapped(pipeline.unet))
    weights = chain.from_iterable(part.state_dict().items() for part in parts)
    return tensor_hash(weights, dict(pipeline.scheduler.config))
