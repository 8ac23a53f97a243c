"""Writing files whole or not at all, seeds that depend on keys alone, hashes of contents."""

from .files import once, whole_file, whole_folder, write_json, write_whole
from .hashing import json_hash, pipeline_hash, tensor_hash
from .seeding import derive_seed, generators_for, seeded

__all__ = [
    "derive_seed",
    "generators_for",
    "json_hash",
    "once",
    "pipeline_hash",
    "seeded",
    "tensor_hash",
    "whole_file",
    "whole_folder",
    "write_json",
    "write_whole",
]
