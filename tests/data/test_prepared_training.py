"""Two training steps from the output of prepare_dataset.py, with no flag that says anything about the scans."""

import json

import pytest

import trees
from conftest import run_example


@pytest.mark.slow
def test_two_modalities_of_brats_train_an_autoencoder_that_knows_their_grid(tmp_path, monkeypatch):
    data = tmp_path / "data"
    flags = ["--modalities", "t1", "t2", "--max_voxels", 32**3, "--num_proc", 1]
    source = ("--input", trees.brats(tmp_path / "in"), "--output", data)
    run_example(monkeypatch, "prepare_dataset.py", "--layout", "brats2019", *source, *flags)
    run_example(
        monkeypatch,
        "train_autoencoder.py",
        *("--data_dir", data, "--split_file", data / "split.json", "--output_dir", tmp_path / "vae"),
        *("--channels", 8, 8, "--latent_channels", 2, "--crop_size", 16, "--max_steps", 2, "--save_steps", 2),
        *(
            "--per_device_train_batch_size",
            2,
            "--report_to",
            "none",
            "--bf16",
            "false",
            "--picture_steps",
            0,
            "--adversarial_weight",
            0,
        ),
    )
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    prepared = json.loads((data / "dataset.json").read_text())
    assert config["in_channels"] == 2
    assert config["data_settings"]["volume_shape"] == prepared["volume_shape"]
    assert config["data_settings"]["spacing"] == prepared["spacing"]
