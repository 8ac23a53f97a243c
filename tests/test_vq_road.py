"""examples/vq_road.py: all four stages in a row with the VQ autoencoder, two steps each."""

import json
import os
import subprocess
import sys
from pathlib import Path

from diffusers_med3d import MedDiffusion3DPipeline, VQModel3D

REPOSITORY = Path(__file__).parents[1]
STAGES = ["autoencoder", "generator-a", "generator-b", "reward-3d", "reward-2d", "ppo"]
SPLIT = {
    "train": ["sub-01", "sub-04", "sub-06", "sub-08"],
    "validation": ["sub-02", "sub-05", "sub-07"],
    "test": ["sub-03"],
    "folds": {"a": ["sub-01", "sub-06"], "b": ["sub-04", "sub-08"]},
}


def drive(folder: Path, data_dir: str, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "examples" / "vq_road.py"), "--data_dir", data_dir]
    command += ["--split_file", str(folder / "split.json"), "--output_dir", str(folder / "road")]
    command += ["--report", str(folder / "docs" / "road.md"), "--size", "16", "--spacing", "12"]
    command += ["--num_embeddings", "16", "--batch_size", "2", "--eval_samples", "0", "--eval_volumes", "2"]
    for stage in ("autoencoder", "diffusion", "reward", "ppo"):
        command += [f"--{stage}_steps", "2"]
    command += more
    return subprocess.run(command, capture_output=True, text=True, env=os.environ)


def test_the_whole_road_runs_writes_its_figures_and_repeats_no_finished_stage(tmp_path, brains_folder):
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    first = drive(tmp_path, brains_folder)
    assert first.returncode == 0, first.stderr[-3000:]
    road = tmp_path / "road"
    pipeline = MedDiffusion3DPipeline.from_pretrained(road / "ppo")
    assert isinstance(pipeline.vae, VQModel3D) and pipeline.vae.config.num_embeddings == 16
    report = (tmp_path / "docs" / "road.md").read_text()
    assert all(f"| {stage} |" in report for stage in STAGES)
    for label in ("PSNR inside the brain", "codebook in use", "rank correlation", "after, mean and 95 % interval"):
        assert label in report
    assert sorted(path.name for path in (tmp_path / "docs" / "road").iterdir()) == [
        "before_after.png",
        "round_trips.png",
    ]
    figures = json.loads((road / "autoencoder" / "road.json").read_text())
    assert f"| {figures['eval_psnr']:.1f} |" in report

    again = drive(tmp_path, brains_folder)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("finished earlier") == len(STAGES)
    assert f"| {figures['eval_psnr']:.1f} |" in again.stdout

    other = drive(tmp_path, brains_folder, "--ppo_steps", "3")
    assert other.returncode == 1 and other.stdout.count("finished earlier") == len(STAGES) - 1
    assert "ppo was not made with" in other.stderr and "--max_steps 3" in other.stderr
