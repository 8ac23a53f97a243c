"""Checkpoints that earlier versions wrote, under tests/frozen/<version>: every later version gives equal outputs, or
refuses by name a network with parts that were removed."""

import json

import pytest
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch.testing import assert_close

from conftest import REPOSITORY
from diffusers_med3d import AutoencoderKL3D, MedDiffusion3DPipeline
from make_frozen import main, outputs, pipelines

FROZEN = REPOSITORY / "tests" / "frozen"
VERSIONS = sorted(folder.name for folder in FROZEN.iterdir() if (folder / "expected.safetensors").is_file())
TOLERANCE = 1e-4  # absolute, on outputs of order 1 in float32: what other kernels and thread counts may change


@pytest.mark.parametrize("version", VERSIONS)
def test_a_frozen_checkpoint_of_every_class_gives_the_outputs_it_gave_when_it_was_made(version):
    expected = load_file(FROZEN / version / "expected.safetensors")
    inputs = {name: expected.pop(name) for name in ("volumes", "sample", "timestep", "class_labels")}
    found = outputs(FROZEN / version, inputs)
    refused = {name for name in expected if version == "0.1" and "/flow-pipeline" in name}
    assert found.keys() == expected.keys() - refused and len(refused) in (0, 3)
    for name in found:
        value = expected[name]
        assert value.std() > 20 * TOLERANCE, name  # so that the comparison can fail
        assert_close(found[name], value, rtol=0, atol=TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("version", VERSIONS)
def test_frozen_files_name_classes_not_modules_and_stay_small(version):
    for name in pipelines(FROZEN / version):
        index = json.loads((FROZEN / version / name / "model_index.json").read_text())
        assert index["_class_name"] == "MedDiffusion3DPipeline"
        assert index["vae"] == ["diffusers_med3d", "AutoencoderKL3D"]
        assert index["unet"] == ["diffusers_med3d", "DiffusionUNet3D"]
        assert index["class_names"] == {"young": 0, "middle": 1, "old": 2}
    files = [path for path in (FROZEN / version).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 500_000


def test_frozen_checkpoints_are_never_made_again():
    with pytest.raises(SystemExit, match=f"{VERSIONS[0]} is frozen and is never made again"):
        main(VERSIONS[0])


@pytest.mark.parametrize(
    ("folder", "parts"),
    [
        ("frozen/0.1/flow-pipeline", "sample_skip"),
        ("frozen_modes/0.1/pipeline", "sample_skip and sample_gate and num_modes"),
    ],
)
def test_a_frozen_pipeline_with_a_part_that_was_removed_is_refused_by_its_name(folder, parts):
    source = REPOSITORY / "tests" / folder
    for load in (MedDiffusion3DPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
        with pytest.raises(ValueError, match=f"DiffusionUNet3D has {parts}, which version 0.2 no longer has"):
            load(source)
    assert AutoencoderKL3D.from_pretrained(source, subfolder="vae").latent_channels == 4  # its other parts are as ever
