"""How long a program takes to start: imports, and loading a bundled generator."""

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator

from measure import Row, Settings, repeated

DIFFUSERS = "from diffusers import DiffusionPipeline, ModelMixin"
PIPELINE = "from diffusers_med3d import MedDiffusion3DPipeline as P"
LOAD = "P.from_pretrained('brain-t1')"


def _seconds(setup: str, statement: str) -> tuple[float, float]:
    """Processor and wall seconds of a statement in a Python of its own, after a setup that is not counted."""
    program = (
        f"import time\n{setup}\nc, w = time.process_time(), time.perf_counter()\n{statement}\n"
        "print(time.process_time() - c, time.perf_counter() - w)"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    found = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True).stdout.split()
    return float(found[-2]), float(found[-1])


def rows(settings: Settings) -> Iterator[Row]:
    """Processor seconds, medians over new processes; wall seconds are in the notes."""
    parts = (
        ("import diffusers_med3d, after diffusers", "diffusers alone", DIFFUSERS, "import diffusers_med3d", 0.5),
        ("the pipeline class, after diffusers", "diffusers alone", DIFFUSERS, PIPELINE, None),
        ("from_pretrained of a bundled name", "", PIPELINE, LOAD, 1.0),
    )
    for what, peer, setup, statement, bar in parts:
        found = [_seconds(setup, statement) for _ in repeated(settings)]
        processor, wall = (statistics.median(values) for values in zip(*found, strict=True))
        note = f"{min(c for c, _ in found):.2f}-{max(c for c, _ in found):.2f} s; {wall:.1f} s on the clock"
        yield Row("start", f"{what}, seconds more", peer, "s", processor, repeats=settings.repeats, bar=bar, note=note)
