"""PPO fine-tuning in two processes against one: the same samples, the same update, less time.

On a CPU the two talk through gloo, on two GPUs through NCCL. Both runs make the same rollouts of the same samples.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import Row, Settings
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("processes_worker.py")


def _run(folder: Path, processes: int, settings: Settings) -> tuple[dict, dict[str, torch.Tensor]]:
    """What the worker wrote: its report, and weights and advantages after the first iteration."""
    # `accelerate launch --cpu --num_processes 2` would start one process (docs/pitfalls.md, P15)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    out = folder / str(processes)
    command += [str(WORKER), str(out), settings.size, str(settings.repeats)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(WORKER.parents[1]), *sys.path])
    if settings.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # gloo, also beside a GPU
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{processes} process(es) failed:\n{done.stderr[-3000:]}")
    return json.loads((out / "report.json").read_text()), load_file(out / "state.safetensors")


def rows(settings: Settings) -> Iterator[Row]:
    """Differences, the share of time that processes talk or wait for each other, and the time of an iteration."""
    if settings.device == "cuda" and torch.cuda.device_count() < 2:
        raise RuntimeError("two processes with --device cuda need two GPUs, found one; --device cpu uses gloo.")
    with tempfile.TemporaryDirectory() as temporary:
        one, first = _run(Path(temporary), 1, settings)
        two, second = _run(Path(temporary), 2, settings)
    kind = "gloo" if settings.device == "cpu" else "NCCL"
    differences = {name: (first[name] - second[name]).abs().max().item() for name in first}
    same = {"suite": "processes", "peer": "one process", "unit": "", "bar": 1e-6}
    what = f"largest difference of an advantage, two processes ({kind})"
    yield Row(what=what, ours=differences["advantages"], note="advantages are of the order of 1", **same)
    moved = f"the iteration moved weights by up to {one['largest_step']:.0e}"
    yield Row(what="the same of a weight after one iteration", ours=differences["weights"], note=moved, **same)
    share = two["communication"] / two["profiled"]
    yield Row(
        "processes",
        "share of an iteration in communication",
        "",
        "",
        share,
        note="waiting for the other process included",
    )
    ours, theirs = statistics.median(two["wall"]), statistics.median(one["wall"])
    load = os.getloadavg()[0]
    work = statistics.median(two["processor"]) / statistics.median(one["processor"])
    yield Row(
        "processes",
        "one iteration in two processes, by the clock",
        "one process",
        "s",
        ours,
        theirs,
        ours / theirs,
        repeats=settings.repeats,
        bar=0.6,
        note=f"{os.cpu_count()} cores, load {load:.1f}; each process computes {work:.2f} of what one alone computes",
    )
