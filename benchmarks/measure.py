"""How the benchmarks measure: interleaved pairs, processor time beside wall time, peak memory, tables and plots."""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch.autograd import profiler

from diffusers_med3d.utils.files import write_json

GIB = 2**30


@dataclass
class Settings:
    """What every suite gets."""

    device: str = "cpu"
    repeats: int = 5
    size: str = "brain-t1"  # or "tiny", for tests


@dataclass
class Row:
    """One line of the table: what we take, what the peer or the floor takes, and the ratio.

    `ratio` is the median over the pairs, `low` and `high` the smallest and the largest of them. Times are processor
    times on a CPU and wall times on a GPU; `wall_ratio` is of wall times always. Without a peer there is no ratio.
    """

    suite: str
    what: str
    peer: str
    unit: str
    ours: float
    theirs: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    wall_ratio: float | None = None
    repeats: int = 1
    bar: float | None = None
    note: str = ""
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Times:
    """Seconds of one call, or readings of two clocks."""

    processor: float
    wall: float

    def __sub__(self, other: "Times") -> "Times":
        return Times(self.processor - other.processor, self.wall - other.wall)

    def on(self, device: str) -> float:
        """The seconds that count: of the processor on a CPU, which other programs share, else of the clock."""
        return self.wall if device == "cuda" else self.processor


def now(device: str) -> Times:
    """Both clocks; on a GPU after all work that was asked for is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return Times(time.process_time(), time.perf_counter())


def timed(function: Callable[[], object], device: str) -> Times:
    """Seconds that one call takes."""
    start = now(device)
    function()
    return now(device) - start


def paired(
    ours: Callable[[], object], theirs: Callable[[], object], settings: Settings, warm_up: bool = True
) -> list[tuple[Times, Times]]:
    """Times of the two functions, called in turn: ours, theirs, ours, theirs, ..."""
    if warm_up:
        ours(), theirs()
    return [(timed(ours, settings.device), timed(theirs, settings.device)) for _ in range(settings.repeats)]


def row_of_pairs(
    pairs: Sequence[tuple[Times, Times]],
    device: str,
    *,
    suite: str,
    what: str,
    peer: str,
    bar: float | None = None,
    note: str = "",
) -> Row:
    """A row of times in seconds."""
    values = [(ours.on(device), theirs.on(device)) for ours, theirs in pairs]
    ratios = [ours / theirs for ours, theirs in values]
    return Row(
        suite,
        what,
        peer,
        "s",
        statistics.median(ours for ours, _ in values),
        statistics.median(theirs for _, theirs in values),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        statistics.median(ours.wall / theirs.wall for ours, theirs in pairs),
        len(pairs),
        bar,
        note,
    )


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Most bytes that torch's allocator had given out at once while ``function`` ran, beyond those before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = function()
        del kept
        return torch.cuda.max_memory_allocated() - before
    with profiler.profile(profile_memory=True) as record:
        kept = function()
    del kept
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def row_of_peaks(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    device: str,
    *,
    suite: str,
    what: str,
    peer: str,
    bar: float | None = None,
    note: str = "",
) -> Row:
    """A row of peak memory in GiB."""
    own, other = peak_bytes(ours, device) / GIB, peak_bytes(theirs, device) / GIB
    return Row(suite, what, peer, "GiB", own, other, own / other, bar=bar, note=note)


def machine(device: str) -> dict[str, object]:
    """What was measured on, without its name."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "torch": torch.__version__,
    }


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| suite | what | ours | peer or floor | | ratio (spread, pairs) | wall | bar | |", "|---" * 9 + "|"]
    for row in rows:
        theirs = "" if row.theirs is None else f"{row.theirs:.3g} {row.unit}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        if row.low is not None:
            ratio += f" ({row.low:.2f}-{row.high:.2f}, {row.repeats})"
        wall = "" if row.wall_ratio is None else f"{row.wall_ratio:.2f}"
        bar, verdict = "", ""
        if row.bar is not None:
            value = row.ours if row.ratio is None else row.ratio
            bar, verdict = f"{row.bar:g}", "met" if value <= row.bar else "missed"
        lines.append(
            f"| {row.suite} | {row.what} | {row.ours:.3g} {row.unit} | {theirs} | {row.peer} | {ratio} | {wall} | "
            f"{bar} | {verdict}{'; ' if verdict and row.note else ''}{row.note} |"
        )
    return "\n".join(lines)


def write(rows: Sequence[Row], settings: Settings, command: str, folder: Path) -> None:
    """``benchmarks.json``, ``benchmarks.md`` and ``benchmarks.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"command": command, "machine": machine(settings.device), "settings": asdict(settings)}
    write_json(folder / "benchmarks.json", content | {"rows": [asdict(row) for row in rows]})
    (folder / "benchmarks.md").write_text(f"`{command}`\n\n{table(rows)}\n")
    shown = [row for row in rows if row.ratio is not None]
    if not shown:
        return
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(shown) + 1), layout="constrained")
    places = range(len(shown))
    ratios = [row.ratio for row in shown]
    spread = [
        [row.ratio - (row.low or row.ratio) for row in shown],
        [(row.high or row.ratio) - row.ratio for row in shown],
    ]
    axes.barh(places, ratios, xerr=spread, color="tab:blue", alpha=0.7)
    for place, row in zip(places, shown, strict=True):
        if row.bar is not None:
            axes.plot([row.bar] * 2, [place - 0.4, place + 0.4], color="tab:red")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(places, [f"{row.suite}: {row.what}" for row in shown])
    axes.invert_yaxis()
    axes.set_xlabel("ours / peer or floor; red: the bar")
    figure.savefig(folder / "benchmarks.png", dpi=120)
    plt.close(figure)
