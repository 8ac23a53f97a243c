"""Every way in which a saved pipeline must load (docs/pitfalls.md, P1), each in a process that only imports us."""

import json
import os
import pkgutil
import re
import subprocess
import sys
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.pipelines import pipeline_loading_utils
from huggingface_hub import constants
from safetensors.torch import load_file

import diffusers_med3d
from diffusers_med3d import (
    AutoencoderKL3D,
    DiffusionUNet3D,
    MedDiffusion3DPipeline,
    SliceReward,
    SliceRewardModel,
    VolumeReward,
    VolumeRewardModel,
    VQModel3D,
)
from diffusers_med3d.hub.resolve import bundled_names, resolve
from diffusers_med3d.schedulers.flow import is_flow


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """Run ``code`` in a fresh interpreter outside the repository; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment,
        cwd=os.environ.get("TMPDIR", "/tmp"),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def sample(pipeline: DiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(class_labels=["young", "old"], num_inference_steps=2, generator=torch.manual_seed(5)).volumes


def test_model_index_names_our_package_and_not_our_files(tiny_pipeline_folder):
    index = json.loads(Path(tiny_pipeline_folder, "model_index.json").read_text())
    assert index["vae"] == ["diffusers_med3d", "AutoencoderKL3D"]
    assert index["unet"] == ["diffusers_med3d", "DiffusionUNet3D"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["volume_shape"] == [16, 16, 16] and index["spacing"] == [12.0, 12.0, 12.0]
    assert index["orientation"] == "RAS" and index["class_names"] == {"young": 0, "middle": 1, "old": 2}


def test_a_saved_pipeline_holds_safetensors_and_no_pickle(tiny_pipeline_folder):
    files = [path for path in Path(tiny_pipeline_folder).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_our_class_loads_a_folder_and_samples_the_same(tiny_pipeline, tiny_pipeline_folder):
    loaded = MedDiffusion3DPipeline.from_pretrained(tiny_pipeline_folder)
    assert torch.equal(sample(loaded), sample(tiny_pipeline))
    assert loaded.config.class_names == ["young", "middle", "old"]  # in the order of the indices
    assert loaded.config.intensity == tiny_pipeline.config.intensity


@pytest.mark.slow
def test_diffusion_pipeline_loads_a_folder_in_a_process_that_only_imported_the_package(tiny_pipeline_folder):
    code = """
import sys
import diffusers
import diffusers_med3d
from diffusers import DiffusionPipeline, AutoModel
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
model = AutoModel.from_pretrained(sys.argv[1], subfolder="unet")
print(type(pipeline).__name__, type(pipeline.vae).__name__, type(model).__name__)
"""
    out = run_python(code, tiny_pipeline_folder)
    assert out.split() == ["MedDiffusion3DPipeline", "AutoencoderKL3D", "DiffusionUNet3D"]


def test_components_load_one_by_one(tiny_pipeline, tiny_pipeline_folder):
    for model_class, name in ((AutoencoderKL3D, "vae"), (DiffusionUNet3D, "unet")):
        expected = tiny_pipeline.components[name].state_dict()
        for loader in (model_class, AutoModel):
            loaded = loader.from_pretrained(tiny_pipeline_folder, subfolder=name)
            assert type(loaded) is model_class
            assert all(torch.equal(loaded.state_dict()[key], value) for key, value in expected.items())


def test_auto_model_loads_a_model_that_stands_alone(tmp_path):
    model = VolumeRewardModel(channels=(8, 8), num_members=1)
    model.save_pretrained(tmp_path / "reward")
    assert type(AutoModel.from_pretrained(str(tmp_path / "reward"))) is VolumeRewardModel


def test_a_vq_pipeline_comes_back_whole(tiny_vq, tiny_unet, tiny_scheduler, tmp_path):
    pipeline = MedDiffusion3DPipeline(
        tiny_vq, tiny_unet, tiny_scheduler, (16, 16, 16), class_names=("young", "x", "old")
    )
    pipeline.save_pretrained(tmp_path / "vq")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "vq")
    assert type(loaded.vae) is VQModel3D
    assert torch.equal(sample(loaded), sample(pipeline))


def test_a_component_can_be_replaced_while_loading(tiny_pipeline_folder, tiny_unet):
    with torch.no_grad():
        tiny_unet.conv_in.conv.weight.add_(1)
    loaded = MedDiffusion3DPipeline.from_pretrained(tiny_pipeline_folder, unet=tiny_unet)
    assert loaded.unet is tiny_unet


def test_everything_that_diffusers_looks_up_is_an_attribute_of_the_package():
    for name in pipeline_loading_utils.LOADABLE_CLASSES["diffusers_med3d"]:
        assert getattr(diffusers_med3d, name) is getattr(diffusers, name) and name not in diffusers_med3d.__all__


@pytest.mark.slow
def test_dir_lists_what_can_be_imported_and_nothing_else():
    subpackages = {module.name for module in pkgutil.iter_modules(diffusers_med3d.__path__) if module.ispkg}
    assert set(dir(diffusers_med3d)) == {*diffusers_med3d.__all__, *subpackages, "__version__"}
    code = "import diffusers_med3d as m; print([getattr(m, n).__name__ for n in dir(m) if n != '__version__'])"
    names = run_python(code)
    assert "DDPOTrainer" in names and "diffusers_med3d.metrics" in names


def test_an_unknown_attribute_of_the_package_is_an_attribute_error():
    with pytest.raises(AttributeError, match="NoSuchTrainer"):
        _ = diffusers_med3d.NoSuchTrainer


@pytest.mark.slow
def test_importing_the_package_does_not_import_trl():
    assert run_python("import sys, diffusers_med3d; print('trl' in sys.modules)").strip() == "False"


def test_dtype_is_taken_without_a_deprecation_warning(tiny_pipeline_folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        loaded = MedDiffusion3DPipeline.from_pretrained(tiny_pipeline_folder, dtype=torch.bfloat16)
    assert loaded.unet.dtype == loaded.vae.dtype == torch.bfloat16


def test_half_precision_files_load_as_float32_by_default(tiny_pipeline, tmp_path):
    tiny_pipeline.to(torch.float16).save_pretrained(tmp_path / "half")
    stored = load_file(tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    loaded = MedDiffusion3DPipeline.from_pretrained(tmp_path / "half")
    assert loaded.unet.dtype == loaded.vae.dtype == torch.float32
    assert torch.isfinite(sample(loaded)).all()


def test_saved_configs_do_not_tell_the_folder_that_a_component_came_from(tiny_pipeline_folder, tmp_path):
    loaded = DiffusionPipeline.from_pretrained(tiny_pipeline_folder)
    loaded.save_pretrained(tmp_path / "again")
    configs = list((tmp_path / "again").rglob("*.json"))
    assert len(configs) == 4
    for path in configs:
        assert str(tmp_path) not in path.read_text(), path


def test_a_bare_name_that_is_not_bundled_is_refused_with_the_names_that_are():
    for ours in (MedDiffusion3DPipeline, DiffusionUNet3D, VolumeRewardModel):
        with pytest.raises(ValueError, match="'no-such-brain' is no bundled checkpoint") as error:
            ours.from_pretrained("no-such-brain")
        assert all(name in str(error.value) for name in bundled_names())


@pytest.mark.skipif("brain-t1-reward-3d" not in bundled_names(), reason="no bundled checkpoints in this checkout")
def test_our_networks_take_bundled_names_too():
    assert type(VolumeRewardModel.from_pretrained("brain-t1-reward-3d")) is VolumeRewardModel
    assert DiffusionUNet3D.from_pretrained("brain-t1", subfolder="unet").null_class == 3


def test_a_local_folder_goes_before_a_bundled_name_and_hub_ids_pass_through(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("brain-t1").mkdir()
    assert resolve("brain-t1") == "brain-t1"
    assert resolve("org/name") == "org/name"
    Path("adapter.safetensors").touch()
    assert resolve("adapter.safetensors") == "adapter.safetensors"


@pytest.mark.parametrize("name", [name for name in bundled_names() if "reward" not in name])
def test_a_bundled_generator_loads_by_its_bare_name(name):
    pipeline = MedDiffusion3DPipeline.from_pretrained(name)
    assert pipeline.config.orientation == "RAS" and pipeline.config.class_names
    assert is_flow(pipeline.scheduler) and pipeline.unet.config.precondition


def test_no_folder_of_the_package_bears_the_name_of_a_diffusers_pipeline():
    """diffusers would take components in it for its own and could not load them again (docs/pitfalls.md, P2)."""
    root = Path(diffusers_med3d.__file__).parent
    folders = {path.name for path in root.rglob("*") if path.is_dir() and (path / "__init__.py").exists()}
    assert folders
    assert not [name for name in folders | {root.name} if hasattr(diffusers.pipelines, name)]


# --- folders of another class ---


@pytest.mark.parametrize(
    ("wanted", "part", "message"),
    [
        (
            DiffusionUNet3D,
            "vae",
            "saved by AutoencoderKL3D, not by DiffusionUNet3D; use AutoencoderKL3D.from_pretrained.",
        ),
        (
            VolumeReward,
            "vae",
            "saved by AutoencoderKL3D, not by VolumeRewardModel; use AutoencoderKL3D.from_pretrained.",
        ),
        (
            VolumeReward,
            "slices",
            "saved by SliceRewardModel, not by VolumeRewardModel; use SliceReward.from_pretrained.",
        ),
        (SliceReward, "", "saved by MedDiffusion3DPipeline, not by SliceRewardModel; use MedDiffusion3DPipeline."),
        (
            AutoencoderKL3D,
            "",
            "use MedDiffusion3DPipeline.from_pretrained, or give subfolder='vae' for its Auto",
        ),
        (
            MedDiffusion3DPipeline,
            "unet",
            "saved by DiffusionUNet3D, not by MedDiffusion3DPipeline; use DiffusionUNet3D.",
        ),
    ],
)
def test_a_folder_of_another_class_is_refused_and_its_own_is_named(tiny_pipeline_folder, wanted, part, message):
    folder = Path(tiny_pipeline_folder, part)
    if part == "slices":
        SliceRewardModel(channels=(8, 8), num_members=1).save_pretrained(folder)
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        wanted.from_pretrained(folder)
    assert "\n" not in str(refusal.value)


def test_a_config_of_another_library_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="holds no DiffusionUNet3D: its config.json names no class of diffusers"):
        DiffusionUNet3D.from_pretrained(tmp_path)


def test_a_subclass_reads_what_its_base_class_saved(tiny_pipeline_folder):
    class Mine(DiffusionUNet3D):
        pass

    assert type(Mine.from_pretrained(tiny_pipeline_folder, subfolder="unet")) is Mine


@pytest.mark.parametrize("name", ["./outputs/generater", "outputs/generater", "outputs/v1/generater"])
def test_a_mistyped_path_is_answered_with_the_nearest_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    meant = name.replace("generater", "generator")
    Path(meant).mkdir(parents=True)
    with pytest.raises(OSError, match=re.escape(f"Did you mean {meant!r}?")):
        MedDiffusion3DPipeline.from_pretrained(name)
