"""Checkpoints that want to run code, read other files or fill the memory, and what leaves the machine: see
docs/reliability.md."""

import datetime
import gzip
import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import save_file

from conftest import REPOSITORY
from diffusers_med3d import AutoencoderKL3D, DiffusionUNet3D, MedDiffusion3DPipeline, VolumeRewardModel
from diffusers_med3d.conversion.weights import read_weights
from diffusers_med3d.hub import cards
from diffusers_med3d.hub.publish import model_files
from diffusers_med3d.pipelines.lora import LORA_FILE
from diffusers_med3d.trainers.checkpoints import mark_whole
from test_base_trainer import make

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Evil:
    """A pickle that leaves a file behind when it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


def evil_pickle(path: Path, trace: Path) -> None:
    with open(path, "wb") as file:
        pickle.dump({"weight": Evil(trace)}, file)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", WEIGHTS])
def test_a_pickle_in_place_of_weights_is_refused_and_not_opened(tiny_vae, tmp_path, name):
    tiny_vae.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / WEIGHTS).unlink()
    evil_pickle(tmp_path / "model" / name, tmp_path / "trace")
    for options in ({}, {"use_safetensors": None}, {"use_safetensors": False}):
        with pytest.raises((ValueError, OSError, pickle.UnpicklingError)):
            AutoencoderKL3D.from_pretrained(tmp_path / "model", **options)
    assert not (tmp_path / "trace").exists()


def test_a_sound_pickle_of_weights_is_refused_too(tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save(tiny_vae.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises((ValueError, OSError)):
        AutoencoderKL3D.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_pickle_inside_a_pipeline_is_refused(tiny_pipeline_folder, tmp_path, part):
    (Path(tiny_pipeline_folder) / part / WEIGHTS).unlink()
    evil_pickle(Path(tiny_pipeline_folder) / part / "diffusion_pytorch_model.bin", tmp_path / "trace")
    with pytest.raises((ValueError, OSError)):
        MedDiffusion3DPipeline.from_pretrained(tiny_pipeline_folder)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("name", ["w.pt", "w.ckpt", "w.safetensors"])
def test_a_pickle_among_weights_to_convert_is_refused_and_not_opened(tmp_path, name):
    evil_pickle(tmp_path / name, tmp_path / "trace")
    with pytest.raises((ValueError, SafetensorError)):
        read_weights(tmp_path / name)
    assert not (tmp_path / "trace").exists()


def test_a_pickle_among_adapters_is_refused_and_not_opened(tiny_pipeline, tmp_path):
    evil_pickle(tmp_path / LORA_FILE, tmp_path / "trace")
    evil_pickle(tmp_path / "pytorch_lora_weights.bin", tmp_path / "trace")
    for name in (LORA_FILE, "pytorch_lora_weights.bin"):
        with pytest.raises((ValueError, OSError, SafetensorError)):
            tiny_pipeline.load_lora_weights(tmp_path, weight_name=name)
    assert not (tmp_path / "trace").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_of_another_is_not_opened(tmp_path, name):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    make(tmp_path / "run", **settings).train()
    folder = tmp_path / "run" / "checkpoint-2"
    evil_pickle(folder / name, tmp_path / "trace")
    mark_whole(folder)
    with pytest.raises(pickle.UnpicklingError, match="(?i)weights.only"):
        make(tmp_path / "run", **settings).train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / "trace").exists()


CODE = "from pathlib import Path\nPath({trace!r}).touch()\nfrom diffusers_med3d import *\nclass Evil{base}: pass\n"


@pytest.mark.parametrize("loader", [MedDiffusion3DPipeline, DiffusionPipeline])
@pytest.mark.parametrize("where", ["pipeline", "component"])
def test_code_in_a_repository_does_not_run_without_trust_remote_code(tiny_pipeline_folder, tmp_path, loader, where):
    folder, trace = Path(tiny_pipeline_folder), str(tmp_path / "trace")
    index = json.loads((folder / "model_index.json").read_text())
    if where == "pipeline":
        (folder / "pipeline.py").write_text(CODE.format(trace=trace, base="(MedDiffusion3DPipeline)"))
        index["_class_name"] = ["pipeline", "Evil"]
    else:
        (folder / "unet" / "my_unet.py").write_text(CODE.format(trace=trace, base="(DiffusionUNet3D)"))
        index["unet"] = ["my_unet", "Evil"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError, AttributeError)):
        loader.from_pretrained(tiny_pipeline_folder)
    assert not Path(trace).exists()


def test_a_config_that_points_at_code_runs_none(tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(CODE.format(trace=str(tmp_path / "trace"), base=""))
    AutoencoderKL3D.from_pretrained(tmp_path)
    assert not (tmp_path / "trace").exists()


# Paths


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/{tmp}/secret.safetensors", "deeper/../../secret.safetensors"]
)
def test_an_index_of_weights_cannot_name_a_file_outside_of_its_folder(tiny_unet, tmp_path, name):
    folder = tmp_path / "model"
    tiny_unet.save_pretrained(folder, max_shard_size="5KB")
    index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())
    first = next(iter(index["weight_map"]))
    save_file({first: torch.ones_like(tiny_unet.state_dict()[first])}, tmp_path / "secret.safetensors")
    index["weight_map"][first] = name.format(tmp=tmp_path)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names weights that are no files beside it: '.*secret"):
        DiffusionUNet3D.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../outside", "../../outside", "/etc"])
def test_a_component_outside_of_the_folder_of_a_pipeline_is_not_read(tiny_pipeline_folder, tmp_path, name):
    path = Path(tiny_pipeline_folder) / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {name: index["unet"]}))
    loaded = MedDiffusion3DPipeline.from_pretrained(tiny_pipeline_folder)  # a name that the class does not take
    assert set(loaded.components) == {"unet", "vae", "scheduler"}
    with pytest.raises(ValueError, match="is not in the subpath|outside|holds"):
        published = model_files(tiny_pipeline_folder)
        if all(".." not in one and not one.startswith("/") for one in published):
            raise ValueError("nothing outside is published")


def test_pictures_outside_of_the_folder_of_a_card_do_not_travel():
    text = "![a](../secret.png) ![b](/etc/passwd) ![c](x/../../y.png) ![d](https://x.org/a.png) ![e](figures/a.png)"
    assert cards.pictures(text) == ["figures/a.png"]


# What leaves the machine


def test_a_saved_volume_holds_its_voxels_and_its_place_and_nothing_else(tiny_pipeline, tmp_path):
    made = tiny_pipeline(class_labels=[0], num_inference_steps=1)
    (path,) = made.save_nifti(tmp_path / "patient-miller")
    content = path.read_bytes()
    assert content[3] & 0x08 == 0 and content[4:8] == bytes(4)  # the archive tells no name and no date
    header = nibabel.load(path).header
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        assert header[field].tobytes().strip(b"\x00") == b"", field
    assert header.extensions == [] and b"miller" not in gzip.decompress(content)


JOBS = """
import json, os, socket, sys, warnings
warnings.simplefilter("ignore")
attempts = []
def refuse(*args, **kwargs):
    attempts.append(repr(args[1:] or args)[:100])
    raise OSError("no network in this test")
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = socket.create_connection = refuse
import datasets, torch
from diffusers_med3d import DDPOConfig, DDPOTrainer, MedDiffusion3DPipeline
from diffusers_med3d.data import DataArguments, VolumeDataset
from diffusers_med3d.evaluation import sample_volumes, volume_set
from diffusers_med3d.evaluation.evaluate import evaluate
from diffusers_med3d.evaluation.report import write_report
from diffusers_med3d.metrics.features import NamedExtractor
from diffusers_med3d.trainers.autoencoder import AutoencoderConfig, AutoencoderTrainer
from diffusers_med3d.trainers.diffusion import LatentDiffusionConfig, LatentDiffusionTrainer
folder, brains, split, out = sys.argv[1:5]
torch.set_num_threads(1)
common = dict(max_steps=2, logging_steps=1, save_steps=1, bf16=False, disable_tqdm=True)
data = DataArguments(brains, split, [16] * 3, [12.0] * 3)
train, validation = (VolumeDataset.from_arguments(data, part) for part in ("train", "validation"))
pipeline = MedDiffusion3DPipeline.from_pretrained(folder)
trainer = AutoencoderTrainer(pipeline.vae, AutoencoderConfig(output_dir=f"{out}/vae", crop_size=0,
    per_device_train_batch_size=2, discriminator_channels=4, **common), train, validation)
trainer.train(); trainer.evaluate(); trainer.save_model()
trainer = LatentDiffusionTrainer(pipeline, LatentDiffusionConfig(output_dir=f"{out}/diffusion", eval_samples=0,
    copies=1, per_device_train_batch_size=2, **common), train, validation)
trainer.train(); trainer.evaluate(); trainer.save_model()
args = DDPOConfig(output_dir=f"{out}/ddpo", per_device_train_batch_size=2, num_generations=2, steps_per_generation=1,
    num_inference_steps=3, eval_num_inference_steps=1, **common)
rows = datasets.Dataset.from_dict({"class_label": ["young"]})
trainer = DDPOTrainer(f"{out}/diffusion", lambda volumes, **_: volumes.flatten(1).mean(1), args, rows)
trainer.train(); trainer.evaluate(); trainer.save_model()
pipeline = MedDiffusion3DPipeline.from_pretrained(f"{out}/ddpo")
pipeline(class_labels=["old"], num_inference_steps=1).save_nifti(f"{out}/made")
samples = sample_volumes(pipeline, [0, 0, 1, 1, 2, 2], f"{out}/samples", data, num_inference_steps=1)
coarse = NamedExtractor(lambda v: torch.nn.functional.avg_pool3d(v, 4).flatten(1), "coarse")
report = evaluate({"mine": samples}, volume_set(validation), volume_set(train), [coarse], data.spacing, num_resamples=9)
write_report(report, f"{out}/report", {"mine": samples}, data.spacing, {"seeds": [0]})
print(json.dumps(attempts))
"""


@pytest.mark.slow
def test_no_job_opens_a_connection_and_none_tells_where_or_by_whom_it_was_run(
    tiny_pipeline_folder, brains_folder, tmp_path
):
    from conftest import SPLIT

    out = tmp_path / "secret-place"
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    (tmp_path / "jobs.py").write_text(JOBS)
    dropped = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "CI", "DO_NOT_TRACK")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment |= {"OMP_NUM_THREADS": "1", "USER": "dr-miller", "LOGNAME": "dr-miller", "MPLBACKEND": "Agg"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY / "src"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(tmp_path / "jobs.py"), tiny_pipeline_folder, brains_folder]
    command += [str(tmp_path / "split.json"), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, cwd=brains_folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []
    words = [str(tmp_path), brains_folder, "secret-place/", "dr-miller", socket.gethostname(), str(Path.home())]
    words += [datetime.date.today().isoformat(), *SPLIT["test"]]
    kept = ("training_subjects.json",)  # for the next stages; never published
    found = []
    for path in (path for path in out.rglob("*") if path.is_file() and path.name not in kept):
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        found += [f"{path.relative_to(out)}: {word}" for word in words if len(word) > 4 and word.encode() in content]
    local = ("trainer_state.json",)  # of a checkpoint, which stays on this machine: the best checkpoint's path
    assert [one for one in found if Path(one.split(":")[0]).name not in local] == []


def test_a_reward_model_on_disk_tells_no_local_path(tmp_path):
    model = VolumeRewardModel(channels=(8, 8), norm_num_groups=4, num_members=1)
    model.save_pretrained(tmp_path / "secret-place")
    VolumeRewardModel.from_pretrained(tmp_path / "secret-place").save_pretrained(tmp_path / "again")
    assert all(b"/secret-place" not in path.read_bytes() for path in (tmp_path / "again").iterdir())
    assert np.isfinite(model.members[0].head[1].weight.detach().numpy()).all()
