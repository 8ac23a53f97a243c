"""Compiled, wrapped and sharded networks and the weights saved from them, in every stage: docs/reliability.md."""

import copy
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from diffusers_med3d import (
    AutoencoderKL3D,
    DDPOConfig,
    DDPOTrainer,
    DiffusionUNet3D,
    MedDiffusion3DPipeline,
    VolumeReward,
    VolumeRewardModel,
)
from diffusers_med3d.conversion.weights import read_weights
from diffusers_med3d.pipelines.lora import LORA_FILE, write_lora
from diffusers_med3d.rewards.loading import load_reward
from diffusers_med3d.trainers.base import Med3DConfig, Med3DTrainer
from diffusers_med3d.trainers.lora import add_lora
from diffusers_med3d.utils.hashing import pipeline_hash
from diffusers_med3d.utils.wrappers import unwrapped, without_prefixes

pytestmark = pytest.mark.slow

WEIGHTS = "diffusion_pytorch_model.safetensors"


def compiled(module):
    return torch.compile(module, backend="eager")


def sample(pipeline):
    generator = [torch.Generator().manual_seed(0)]
    return pipeline(class_labels=[1], num_inference_steps=2, generator=generator).volumes


@pytest.fixture
def compiled_pipeline(tiny_pipeline) -> MedDiffusion3DPipeline:
    pipeline = copy.deepcopy(tiny_pipeline)
    pipeline.unet, pipeline.vae = compiled(pipeline.unet), compiled(pipeline.vae)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_wrapper_in_a_wrapper_is_taken_off(tiny_unet):
    assert unwrapped(tiny_unet) is tiny_unet and unwrapped(compiled(tiny_unet)) is tiny_unet
    assert unwrapped(torch.nn.DataParallel(compiled(tiny_unet))) is tiny_unet
    assert unwrapped(compiled(torch.nn.DataParallel(tiny_unet))) is tiny_unet


@pytest.mark.slow
def test_a_compiled_pipeline_samples_saves_and_is_known_as_uncompiled(tiny_pipeline, compiled_pipeline, tmp_path):
    torch.testing.assert_close(sample(compiled_pipeline), sample(tiny_pipeline), atol=1e-4, rtol=0)
    assert pipeline_hash(compiled_pipeline) == pipeline_hash(tiny_pipeline)
    compiled_pipeline.save_pretrained(tmp_path)
    loaded = MedDiffusion3DPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(sample(loaded), sample(tiny_pipeline), atol=1e-4, rtol=0)


def lora_folder(unet, folder: Path) -> Path:
    adapted = DiffusionUNet3D.from_config(unet.config)
    adapted.load_state_dict(unet.state_dict())
    add_lora(adapted, LoraConfig(r=2, lora_alpha=4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return write_lora(adapted, folder, "default").parent


@pytest.mark.slow
def test_an_adapter_on_a_compiled_unet_is_as_on_an_uncompiled_one(tiny_pipeline, compiled_pipeline, tmp_path):
    folder, before = lora_folder(tiny_pipeline.unet, tmp_path / "lora"), sample(compiled_pipeline)
    for pipeline in (tiny_pipeline, compiled_pipeline):
        pipeline.load_lora_weights(folder, adapter_name="mine")
    adapted = sample(compiled_pipeline)
    torch.testing.assert_close(adapted, sample(tiny_pipeline), atol=1e-4, rtol=0)
    assert not torch.allclose(adapted, before, atol=1e-2)
    compiled_pipeline.save_lora_weights(tmp_path / "again")
    first, second = (load_file(one / LORA_FILE) for one in (folder, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(ValueError, match=r"carries LoRA adapters \['mine'\]"):
        compiled_pipeline.save_pretrained(tmp_path / "plain")
    assert compiled_pipeline.get_active_adapters() == ["mine"]
    assert compiled_pipeline.get_list_adapters() == {"unet": ["mine"]}
    compiled_pipeline.set_adapters("mine", 0.0)
    torch.testing.assert_close(sample(compiled_pipeline), before, atol=1e-4, rtol=0)
    compiled_pipeline.unload_lora_weights()
    torch.testing.assert_close(sample(compiled_pipeline), before, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoraConfig(r=2, lora_alpha=4)])
def test_fine_tuning_a_compiled_pipeline_gives_the_weights_of_an_uncompiled_one(
    tiny_pipeline, compiled_pipeline, tmp_path, lora
):
    trained = []
    for name, pipeline in (("plain", tiny_pipeline), ("compiled", compiled_pipeline)):
        args = DDPOConfig(
            output_dir=str(tmp_path / name), max_steps=2, per_device_train_batch_size=4, num_generations=4,
            steps_per_generation=1, num_inference_steps=3, eval_num_inference_steps=2, report_to="none",
            disable_tqdm=True, bf16=False, save_strategy="steps", save_steps=1,
        )  # fmt: skip
        rewards = [lambda volumes, **_: volumes.flatten(1).mean(1)]
        rows = datasets.Dataset.from_dict({"class_label": [0]})
        trainer = DDPOTrainer(pipeline, rewards, args, rows, peft_config=copy.deepcopy(lora))
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        trained.append(MedDiffusion3DPipeline.from_pretrained(tmp_path / name).unet.state_dict())
        assert not any("_orig_mod" in key for key in load_file(tmp_path / name / "checkpoint-2" / "model.safetensors"))
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.allclose(trained[0][key], trained[1][key], atol=1e-4) for key in trained[0])


def test_a_compiled_reward_model_is_a_reward(tiny_volumes):
    model = VolumeRewardModel(channels=(8, 8), norm_num_groups=4, num_members=1).eval()
    reward = load_reward(compiled(model))
    assert isinstance(reward, VolumeReward)
    torch.testing.assert_close(reward(tiny_volumes), VolumeReward(model)(tiny_volumes))


def test_every_trainer_takes_the_network_out_of_its_wrapper(tiny_unet, tmp_path):
    args = Med3DConfig(output_dir=str(tmp_path), report_to="none", bf16=False)
    assert Med3DTrainer(compiled(tiny_unet), args, train_dataset=[{}]).model is tiny_unet


# Weights as others saved them


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_are_read_under_any_prefix(tmp_path, prefix, wrapper, suffix):
    state, path = {f"{prefix}conv.weight": torch.ones(2), f"{prefix}conv.bias": torch.zeros(2)}, tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save({wrapper: state} if wrapper else state, path)
    elif wrapper is None:
        save_file(state, path)
    else:
        pytest.skip("safetensors hold tensors by name alone")
    assert sorted(read_weights(path)[0]) == ["conv.bias", "conv.weight"]


def test_a_prefix_that_only_some_names_have_is_part_of_them():
    assert sorted(without_prefixes({"module.a": torch.ones(1), "b": torch.ones(1)})) == ["b", "module.a"]
    assert without_prefixes({}) == {}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_saved_model_whose_weights_bear_prefixes_is_read(tiny_unet, tmp_path, prefix):
    tiny_unet.save_pretrained(tmp_path)
    save_file({prefix + k: v.contiguous() for k, v in tiny_unet.state_dict().items()}, tmp_path / WEIGHTS)
    loaded = DiffusionUNet3D.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in tiny_unet.state_dict().items())


def test_a_model_that_lacks_weights_is_refused_and_not_filled_with_random_numbers(tiny_vae, tmp_path):
    tiny_vae.save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    first = sorted(state)[0]
    save_file({"other": state.pop(first), **state}, tmp_path / WEIGHTS)
    with pytest.raises(
        ValueError, match=f"lacks 1 of the weights of AutoencoderKL3D, such as {first}, and holds other"
    ):
        AutoencoderKL3D.from_pretrained(tmp_path)


@pytest.mark.parametrize(("first", "second"), [("5KB", "10GB"), ("10GB", "5KB"), ("5KB", "20KB"), ("10GB", "10GB")])
def test_what_was_saved_last_is_loaded_in_one_file_or_in_shards(tiny_unet, tmp_path, first, second):
    tiny_unet.save_pretrained(tmp_path, max_shard_size=first)
    with torch.no_grad():
        tiny_unet.conv_in.conv.weight.fill_(0.5)
    tiny_unet.save_pretrained(tmp_path, max_shard_size=second)
    loaded = DiffusionUNet3D.from_pretrained(tmp_path)
    assert (loaded.conv_in.conv.weight == 0.5).all()
    index, one = (tmp_path / f"{WEIGHTS}.index.json").is_file(), (tmp_path / WEIGHTS).is_file()
    assert (index, one) == ((False, True) if second == "10GB" else (True, False))


# Labels


@pytest.mark.parametrize(
    "labels",
    [1, torch.tensor(1), torch.tensor([1]), np.int64(1), np.array(1), [torch.tensor(1)],
     [np.int32(1)]],
)  # fmt: skip
def test_one_label_may_be_a_number_of_any_library(tiny_pipeline, labels):
    made = tiny_pipeline(class_labels=labels, num_inference_steps=1, output_type="latent").volumes
    assert len(made) == 1 and tiny_pipeline.encode_class_labels(labels, 1).tolist() == [1]
