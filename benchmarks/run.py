"""Speed and memory against what others need for the same work.

    python benchmarks/run.py                                  # all suites
    python benchmarks/run.py --suite sampling rl --device cuda

Prints a table, and writes benchmarks.json, benchmarks.md and benchmarks.png. What is compared is called in turn (ours,
theirs, ours, theirs, ...) and the ratio is the median over the pairs, so that a machine which others use too gives a
fair ratio; on a CPU the processor's time counts, on a GPU the clock's. benchmarks/README.md has the figures.
"""

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffusers_med3d.utils.arguments import ScriptParser

sys.path.insert(0, str(Path(__file__).parent))  # where this is run by its path and not as a script

from measure import Row, Settings, machine, table, write

SUITES = ("start", "memory", "sampling", "rl", "scaling", "data", "presets")


@dataclass
class BenchmarkArguments:
    """What is measured, and where."""

    suite: list[str] = field(
        default_factory=lambda: list(SUITES), metadata={"help": "Which suites.", "choices": list(SUITES)}
    )
    device: str = field(default="cpu", metadata={"help": "Where.", "choices": ["cpu", "cuda"]})
    repeats: int = field(default=5, metadata={"help": "Pairs of measurements per row."})
    size: str = field(
        default="brain-t1",
        metadata={
            "help": "Networks and volumes as wide as those of brain-t1, or tiny.",
            "choices": ["brain-t1", "tiny"],
        },
    )
    threads: int = field(default=1, metadata={"help": "Threads of torch on a CPU."})
    output_dir: str = field(default="outputs/benchmarks", metadata={"help": "Where the results go."})

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.threads < 1:
            raise ValueError(f"repeats and threads must be at least 1, got {self.repeats} and {self.threads}.")


def main() -> None:
    """Run the suites; what is measured is printed and written after each."""
    (args,) = ScriptParser(BenchmarkArguments, description=__doc__).parse()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("run.py: error: --device cuda, but torch finds no GPU.")
    torch.set_num_threads(args.threads)
    settings = Settings(args.device, args.repeats, args.size)
    print(", ".join(f"{name}: {value}" for name, value in machine(args.device).items()), flush=True)
    rows: list[Row] = []
    for suite in args.suite:
        for row in importlib.import_module(f"suites.{suite}").rows(settings):
            rows.append(row)
            print(table([row]).split("\n")[-1], flush=True)
            write(rows, settings, " ".join(["python", "benchmarks/run.py", *sys.argv[1:]]), Path(args.output_dir))
    print(f"\n{table(rows)}\n\nwritten to {args.output_dir}")


if __name__ == "__main__":
    main()
