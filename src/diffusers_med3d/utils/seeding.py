"""Random numbers that depend on keys alone: a resumed or distributed run draws what an uninterrupted one does."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch


def derive_seed(*keys: object) -> int:
    """One 63-bit seed from keys such as ("evaluation", seed, sample): the same on every machine, unlike `hash`.

    Integers from 0 on enter as they are; everything else enters by the CRC-32 of its ``repr``.
    """
    numbers = [
        int(key) if isinstance(key, int | np.integer) and key >= 0 else zlib.crc32(repr(key).encode()) for key in keys
    ]
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seeded(*keys: object) -> torch.Generator:
    """CPU generator whose numbers depend on ``keys`` alone; see `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(*keys))


def generators_for(keys: Sequence[Sequence[object]]) -> list[torch.Generator]:
    """One CPU generator per sample, so that a sample does not depend on its batch, rank or device."""
    return [seeded(*key) for key in keys]
