"""benchmarks/run.py: every suite runs on tiny networks and writes what it measured."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LONG = [pytest.param(suite, marks=pytest.mark.long) for suite in ("scaling", "start", "presets")]


def run(monkeypatch, folder: Path, *suites: str) -> list[dict]:
    command = ["run.py", "--suite", *suites, "--size", "tiny", "--repeats", "1", "--output_dir", str(folder)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    runpy.run_path(str(BENCHMARKS / "run.py"), run_name="__main__")
    assert (folder / "benchmarks.md").is_file()
    return json.loads((folder / "benchmarks.json").read_text())["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["sampling", "rl", "memory", "data"] + LONG)
def test_a_suite_measures_something(monkeypatch, tmp_path, suite):
    rows = run(monkeypatch, tmp_path, suite)
    assert rows and all(row["suite"] == suite and row["ours"] >= 0 for row in rows)


def test_the_median_of_pairs_is_the_ratio_of_the_table(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measure import Times, row_of_pairs, table

    pairs = [(Times(1.0, 2.0), Times(2.0, 2.0)), (Times(3.0, 3.0), Times(2.0, 1.0)), (Times(2.0, 1.0), Times(2.0, 1.0))]
    row = row_of_pairs(pairs, "cpu", suite="s", what="w", peer="p", bar=0.9)
    assert (row.ratio, row.low, row.high, row.wall_ratio) == (1.0, 0.5, 1.5, 1.0)
    assert "| 0.9 | missed |" in table([row])
