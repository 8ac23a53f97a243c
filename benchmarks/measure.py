"""How the benchmarks measure: interleaved pairs, processor time beside wall time, peak memory, tables and files."""

import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.autograd import profiler
from tqdm import tqdm

from diffusers_med3d import viz
from diffusers_med3d.utils.files import read_json, write_json, write_whole

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
    `sizes` maps a multiple of the work to what it takes, and is plotted.
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
    sizes: dict[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """ "met" or "missed": the ratio, or without one our own value, against the bar; empty without a bar."""
        if self.bar is None:
            return ""
        return "met" if (self.ours if self.ratio is None else self.ratio) <= self.bar else "missed"


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
    return [(timed(ours, settings.device), timed(theirs, settings.device)) for _ in repeated(settings)]


def repeated(settings: Settings) -> Iterator[int]:
    """0, 1, ... for every repeat, with a progress bar that goes away."""
    yield from tqdm(range(settings.repeats), desc="repeats", leave=False, position=1)


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
        bar = "" if row.bar is None else f"{row.bar:g}"
        remarks = "; ".join(part for part in (row.verdict, row.note) if part)
        lines.append(
            f"| {row.suite} | {row.what} | {row.ours:.3g} {row.unit} | {theirs} | {row.peer} | {ratio} | {wall} | "
            f"{bar} | {remarks} |"
        )
    return "\n".join(lines)


def write(suite: str, rows: Sequence[Row], settings: Settings, command: str, folder: Path) -> None:
    """`<suite>.json`: the rows of one suite so far, with the machine and the settings."""
    content = {"command": command, "machine": machine(settings.device), "settings": asdict(settings)}
    write_json(folder / f"{suite}.json", content | {"rows": [asdict(row) for row in rows]})


def summarize(suites: Sequence[str], folder: Path) -> str:
    """Write `benchmarks.md`, `benchmarks.png` and `growth.png` of all suites measured in the folder, at any time.

    Returns:
        the table.
    """
    found = {suite: read_json(folder / f"{suite}.json") for suite in suites if (folder / f"{suite}.json").is_file()}
    rows = [Row(**row) for content in found.values() for row in content["rows"]]
    where = [
        f"- {suite}: `{content['command']}`, "
        + ", ".join(f"{name} {value}" for name, value in (content["machine"] | content["settings"]).items())
        for suite, content in found.items()
    ]
    barred = [row for row in rows if row.bar is not None]
    counts = f"{sum(row.verdict == 'met' for row in barred)} of {len(barred)} bars met."
    write_whole(folder / "benchmarks.md", "\n\n".join([table(rows), counts, "\n".join(where)]) + "\n")
    ratios = {
        f"{row.suite}: {row.what}": (row.ratio, row.low or row.ratio, row.high or row.ratio, row.bar)
        for row in rows
        if row.ratio is not None and row.bar is not None
    }
    if ratios:
        viz.save(viz.ratio_bars(ratios, "ours / peer or floor"), folder / "benchmarks.png")
    grown = [row for row in rows if row.sizes]
    if grown:
        panels = {}
        for row in grown:
            times, values = [float(size) for size in row.sizes], list(row.sizes.values())
            line = [values[0] / times[0] * size for size in times]
            panels[f"{row.what} ({row.unit})"] = {"measured": (times, values), "in proportion": (times, line)}
        viz.save(viz.curve_panels(panels, xlabel="times the work"), folder / "growth.png")
    return f"{table(rows)}\n\n{counts}"
