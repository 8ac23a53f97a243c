"""Speed and memory against what others need for the same work.

    python benchmarks/run.py                                  # all suites
    python benchmarks/run.py --suite sampling rl --device cuda

Prints a table. Every suite writes its own SUITE.json, row by row, so that nothing is lost when another one fails, and
benchmarks.md, benchmarks.png and growth.png are made of all suites in --output_dir. What is compared is called in turn
(ours, theirs, ours, theirs, ...) and the ratio is the median over the pairs, so that a machine which others use too
gives a fair ratio; on a CPU the processor's time counts, on a GPU the clock's. benchmarks/README.md has the figures.
"""

import importlib
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from diffusers_med3d.utils.arguments import ScriptParser

sys.path.insert(0, str(Path(__file__).parent))  # where this is run by its path and not as a script

from measure import Row, Settings, machine, summarize, table, write

SUITES = ("start", "memory", "sampling", "rl", "scaling", "data", "presets", "processes", "evaluation")


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
    """Run the suites, each to its end or to its error."""
    (args,) = ScriptParser(BenchmarkArguments, description=__doc__).parse()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("run.py: error: --device cuda, but torch finds no GPU.")
    torch.set_num_threads(args.threads)
    settings = Settings(args.device, args.repeats, args.size)
    folder, command = Path(args.output_dir), " ".join(["python", "benchmarks/run.py", *sys.argv[1:]])
    print(", ".join(f"{name}: {value}" for name, value in machine(args.device).items()), flush=True)
    failed = []
    with tqdm(args.suite, desc="suites", unit="suite", position=0) as progress:
        for suite in progress:
            progress.set_postfix_str(suite)
            rows: list[Row] = []
            try:
                for row in importlib.import_module(f"suites.{suite}").rows(settings):
                    rows.append(row)
                    progress.write(table([row]).split("\n")[-1])
                    write(suite, rows, settings, command, folder)
            except Exception:
                failed.append(suite)
                progress.write(traceback.format_exc())
            summary = summarize(SUITES, folder)
    print(f"\n{summary}\n\nwritten to {args.output_dir}")
    if failed:
        raise SystemExit(f"run.py: error: failed before its end: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
