"""What goes from one script to the next: grid, classes and subjects, and refusals of what does not fit."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

import trees
from conftest import EXAMPLES, SPLIT, run_example
from diffusers_med3d import AutoencoderKL3D
from diffusers_med3d.data import DataArguments
from diffusers_med3d.schedulers.flow import is_flow

FINE = {"volume_shape": [40, 56, 40], "spacing": [1.0, 1.0, 1.0]}


@pytest.fixture
def fine_autoencoder(tmp_path) -> Path:
    """An autoencoder that was trained on 40 x 56 x 40 voxels of 1 mm with the classes LGG and HGG."""
    settings = FINE | {"label_column": "grade", "class_names": ["LGG", "HGG"], "class_edges": []}
    vae = AutoencoderKL3D(
        channels=(8, 8), latent_channels=2, attention_levels=(False, False), norm_num_groups=4, data_settings=settings
    )
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def folder_of_grades(folder: Path) -> Path:
    rows = [["file_name", "participant_id", "grade"]]
    for i in range(4):
        trees.save(folder / f"{i}.nii.gz", trees.anatomy(i), step=2.0)
        rows.append([f"{i}.nii.gz", f"p{i}", ("LGG", "HGG")[i % 2]])
    trees.write_csv(folder / "metadata.csv", rows)
    return folder


def test_the_generator_takes_grid_and_classes_of_its_autoencoder_and_refuses_another_grid(tmp_path, fine_autoencoder):
    script = runpy.run_path(str(EXAMPLES / "train_diffusion.py"))
    data_dir = str(folder_of_grades(tmp_path / "data"))
    model = script["ModelArguments"](
        autoencoder=str(fine_autoencoder), channels=[8, 16], num_head_channels=8, norm_num_groups=4
    )
    pipeline = script["build"](model, DataArguments(data_dir, ""))
    assert pipeline.config.volume_shape == FINE["volume_shape"] and pipeline.config.spacing == FINE["spacing"]
    assert pipeline.config.class_names == ["LGG", "HGG"] and pipeline.unet.config.num_class_embeds == 3
    with pytest.raises(
        ValueError, match=r"spacing is \[1.0, 1.0, 1.0\] by the autoencoder .*vae, but \[3.0, 3.0, 3.0\]"
    ):
        script["build"](model, DataArguments(data_dir, "", spacing=[3.0] * 3))


def test_a_new_generator_is_a_preconditioned_flow_and_knows_places_where_scans_are_registered(
    tmp_path, fine_autoencoder
):
    script = runpy.run_path(str(EXAMPLES / "train_diffusion.py"))
    data_dir = str(folder_of_grades(tmp_path / "data"))

    def unet_and_scheduler(registration: str | None, **flags):
        model = script["ModelArguments"](str(fine_autoencoder), channels=[8, 16], num_head_channels=8, **flags)
        pipeline = script["build"](model, DataArguments(data_dir, "", registration=registration))
        return pipeline.unet.config, pipeline.scheduler

    unet, scheduler = unet_and_scheduler("a mean brain")
    assert (unet.precondition, unet.position_shape) == (True, (20, 28, 20)) and is_flow(scheduler)
    unet, scheduler = unet_and_scheduler(None)
    assert (unet.precondition, unet.position_shape) == (True, None)
    unet, scheduler = unet_and_scheduler(None, position_maps=True, precondition=False)
    assert (unet.precondition, unet.position_shape) == (False, (20, 28, 20))
    unet, scheduler = unet_and_scheduler("a mean brain", position_maps=False, prediction_type="v_prediction")
    assert (unet.precondition, unet.position_shape) == (False, None) and not is_flow(scheduler)
    with pytest.raises(ValueError, match="--precondition needs --prediction_type flow, got sample"):
        unet_and_scheduler(None, prediction_type="sample", precondition=True)


def test_a_reward_of_another_spacing_than_its_generators_is_refused_with_both(
    brains_folder, tiny_pipeline_folder, tmp_path, monkeypatch
):
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    flags = ["--data_dir", brains_folder, "--split_file", tmp_path / "split.json", "--output_dir", tmp_path / "reward"]
    flags += ["--fold_a_model", tiny_pipeline_folder, "--spacing", 2, 2, 2]
    with pytest.raises(
        SystemExit, match=r"spacing is \[12.0, 12.0, 12.0\] by the generator .*tiny-pipeline, but \[2.0, 2.0, 2.0\]"
    ):
        run_example(monkeypatch, "train_reward.py", *flags)
    assert not (tmp_path / "reward").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"1 row\(s\) name a file that is not there, the first is 'images/gone.nii.gz'"),
        ("flat", r"must have 3 or 4 axes, got shape \(8, 8\)"),
        ("no table", "no metadata.csv in .*prepare_dataset.py writes one from the usual layouts"),
    ],
)
def test_rows_without_a_volume_are_refused_before_there_is_a_split(tmp_path, monkeypatch, kind, message):
    folder = trees.niftifolder(tmp_path / "data", people=4)
    if kind == "missing":
        with (folder / "metadata.csv").open("a") as file:
            file.write("images/gone.nii.gz,p99,a\n")
    elif kind == "flat":
        nibabel.save(nibabel.Nifti1Image(np.ones((8, 8), np.float32), np.eye(4)), folder / "images" / "scan1.nii.gz")
    else:
        (folder / "metadata.csv").unlink()
    flags = ["--data_dir", folder, "--split_file", tmp_path / "split.json", "--label_column", "group"]
    with pytest.raises(SystemExit, match=message) as refused:
        run_example(
            monkeypatch, "make_split.py", *flags, "--class_names", "a", "b", "--test", 0, 0, "--validation", 1, 0
        )
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "split.json").exists()


@pytest.mark.slow
def test_a_run_prints_no_warning_of_the_libraries_below(brains_folder, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    flags = ["--data_dir", brains_folder, "--split_file", tmp_path / "split.json", "--output_dir", tmp_path / "vae"]
    flags += ["--volume_shape", 16, 16, 16, "--spacing", 12, 12, 12, "--channels", 8, 8, "--latent_channels", 4]
    flags += ["--crop_size", 16, "--max_steps", 1, "--bf16", "false", "--report_to", "none"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "train_autoencoder.py"), *map(str, flags)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "grid 16 x 16 x 16 voxels of 12 x 12 x 12 mm = 192 x 192 x 192 mm; anatomy" in done.stdout
    for noise in ("Warning", "kept in float32", "Traceback"):
        assert noise not in done.stderr, done.stderr[-3000:]


@pytest.mark.slow
def test_what_cannot_be_resumed_is_said_in_one_line(brains_folder, tmp_path, monkeypatch):
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    flags = ["--data_dir", brains_folder, "--split_file", tmp_path / "split.json", "--output_dir", tmp_path / "vae"]
    flags += ["--volume_shape", 16, 16, 16, "--spacing", 12, 12, 12, "--latent_channels", 4, "--crop_size", 16]
    flags += ["--max_steps", 1, "--save_steps", 1, "--bf16", "false", "--report_to", "none", "--adversarial_weight", 0]
    run_example(monkeypatch, "train_autoencoder.py", *flags, "--channels", 8, 8)
    (tmp_path / "empty").mkdir()
    for more, message in (
        (["--channels", 16, 16, "--resume_from_checkpoint", "latest"], "is of another network: .* Give the flags"),
        (["--channels", 8, 8, "--resume_from_checkpoint", tmp_path / "empty"], "empty is no whole checkpoint"),
    ):
        with pytest.raises(SystemExit, match=f"^train_autoencoder.py: error: .*{message}") as refused:
            run_example(monkeypatch, "train_autoencoder.py", *flags, *more)
        assert "\n" not in str(refused.value)
