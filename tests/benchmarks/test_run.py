"""benchmarks/run.py: every suite runs on tiny networks and writes what it measured."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from diffusers_med3d import DDPOConfig, DDPOTrainer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LONG = [
    pytest.param(suite, marks=pytest.mark.long) for suite in ("scaling", "start", "presets", "processes", "evaluation")
]


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(monkeypatch, folder: Path, *suites: str) -> dict[str, list[dict]]:
    command = ["run.py", "--suite", *suites, "--size", "tiny", "--repeats", "1", "--output_dir", str(folder)]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_path(str(BENCHMARKS / "run.py"), run_name="__main__")
    return {suite: json.loads((folder / f"{suite}.json").read_text())["rows"] for suite in suites}


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["sampling", "rl", "memory", "data"] + LONG)
def test_a_suite_measures_something(monkeypatch, tmp_path, suite):
    rows = run(monkeypatch, tmp_path, suite)[suite]
    assert rows and all(row["suite"] == suite and row["ours"] >= 0 for row in rows)
    assert any(row["bar"] is not None for row in rows)
    assert f"| {suite} |" in (tmp_path / "benchmarks.md").read_text()
    assert (tmp_path / "growth.png").is_file() == (suite == "scaling")


def test_a_suite_that_fails_leaves_its_first_rows_and_those_of_the_others(monkeypatch, tmp_path, capsys):
    def rows(name, fails):
        def made(settings):
            yield Row(name, "first", "a peer", "s", 1.0, 2.0, 0.5, bar=0.6)
            if fails:
                raise RuntimeError("the second row cannot be measured")
            yield Row(name, "second", "", "s", 1.0, bar=0.5)

        return made

    from measure import Row
    from suites import data, start

    monkeypatch.setattr(start, "rows", rows("start", True))
    monkeypatch.setattr(data, "rows", rows("data", False))
    with pytest.raises(SystemExit, match="failed before its end: start"):
        run(monkeypatch, tmp_path, "start", "data")
    found = {path.stem: json.loads(path.read_text())["rows"] for path in tmp_path.glob("*.json")}
    assert {suite: [row["what"] for row in own] for suite, own in found.items()} == {
        "start": ["first"],
        "data": ["first", "second"],
    }
    text = (tmp_path / "benchmarks.md").read_text()
    assert text.count("| start |") == 1 and text.count("| data |") == 2 and "2 of 3 bars met." in text
    assert (tmp_path / "benchmarks.png").is_file()
    assert "the second row cannot be measured" in capsys.readouterr().out


def test_the_median_of_pairs_is_the_ratio_of_the_table():
    from measure import Times, row_of_pairs, table

    pairs = [(Times(1.0, 2.0), Times(2.0, 2.0)), (Times(3.0, 3.0), Times(2.0, 1.0)), (Times(2.0, 1.0), Times(2.0, 1.0))]
    row = row_of_pairs(pairs, "cpu", suite="s", what="w", peer="p", bar=0.9)
    assert (row.ratio, row.low, row.high, row.wall_ratio) == (1.0, 0.5, 1.5, 1.0)
    assert "| 0.9 | missed |" in table([row])


@pytest.mark.slow
@pytest.mark.parametrize(
    "switches",
    [
        {"sde_window_size": 0, "share_initial_noise": False},
        {"sde_window_size": 2, "share_initial_noise": True},
        {"sde_window_size": 2, "share_initial_noise": False, "beta": 0.0},
        {"loss_type": "awm", "forward_times": 3},
    ],
)
def test_the_evaluations_counted_are_those_that_a_trainer_makes(tmp_path, switches):
    from measure import Settings
    from suites.evaluations import Iteration
    from suites.networks import make_pipeline

    calls = {"rollout": 0, "update": 0, "reference": 0}

    def counter(name):
        def count(module, inputs):
            calls[name or ("update" if torch.is_grad_enabled() else "rollout")] += len(inputs[0])

        return count

    trainer = DDPOTrainer(
        make_pipeline(Settings(size="tiny")),
        lambda volumes, **conditions: volumes.mean((1, 2, 3, 4)),
        DDPOConfig(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=4, steps_per_generation=2,
            num_inference_steps=5, picture_steps=0, save_strategy="no", report_to="none", bf16=False, **switches,
        ),
        [{"number": 0}, {"number": 1}],
    )  # fmt: skip
    trainer.model.register_forward_pre_hook(counter(""))
    if trainer.reference is not None:
        trainer.reference.register_forward_pre_hook(counter("reference"))
    trainer.train()
    counted = Iteration(samples=8, num_generations=4, num_inference_steps=5, optimizer_steps=2, **switches)
    start = trainer.sampler.window(0)[0].start if trainer.args.loss_type == "ddpo" else None
    expected = counted.evaluations(start)
    # a backward pass counts as two evaluations
    assert (calls["rollout"], 3 * calls["update"], calls["reference"]) == (
        expected.rollout,
        expected.update,
        expected.reference,
    )
