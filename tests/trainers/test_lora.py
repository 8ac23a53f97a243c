"""LoRA adapters on a pipeline: loading, weighing, swapping, fusing, saving; and what fine-tuning writes."""

import gc
import json
from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_med3d import DDPOConfig, DDPOTrainer, DiffusionUNet3D, MedDiffusion3DPipeline
from diffusers_med3d.pipelines.conditions import Conditions
from diffusers_med3d.pipelines.lora import LORA_FILE, lora_layers, write_lora
from diffusers_med3d.rl import transition
from diffusers_med3d.trainers.lora import add_lora

NOISE = torch.randn(2, 4, 4, 4, 4, generator=torch.Generator().manual_seed(7))


def copy_of(unet: DiffusionUNet3D) -> DiffusionUNet3D:
    plain = DiffusionUNet3D.from_config(dict(unet.config))
    plain.load_state_dict(unet.state_dict())
    return plain.eval()


def make_adapter(unet: DiffusionUNet3D, folder: Path, seed: int, rank: int = 2, alpha: int = 4) -> DiffusionUNet3D:
    """Write an adapter for `unet` that changes every targeted layer; returns the network that carries it."""
    torch.manual_seed(seed)
    network = copy_of(unet)
    add_lora(network, LoraConfig(r=rank, lora_alpha=alpha))
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    write_lora(network, folder, "default")
    return network


def volumes_of(pipeline: MedDiffusion3DPipeline) -> torch.Tensor:
    return pipeline(class_labels=[0, 2], latents=NOISE, num_inference_steps=3).volumes


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


def differ(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() > 1e-2)


@pytest.fixture
def adapters(tiny_pipeline, tmp_path) -> tuple[Path, Path]:
    """Folders of two adapters of the same rank, with different scales."""
    make_adapter(tiny_pipeline.unet, tmp_path / "a", seed=1)
    make_adapter(tiny_pipeline.unet, tmp_path / "b", seed=2, alpha=2)
    return tmp_path / "a", tmp_path / "b"


# Loading


def test_an_adapter_gives_the_volumes_of_the_network_it_was_trained_on(tiny_pipeline, tmp_path):
    """Pitfall 22: equal to the trained one, and not to the base."""
    base = volumes_of(tiny_pipeline)
    trained = make_adapter(tiny_pipeline.unet, tmp_path, seed=1)
    tiny_pipeline.load_lora_weights(tmp_path)
    loaded = volumes_of(tiny_pipeline)
    assert differ(loaded, base)
    config = {name: tiny_pipeline.config[name] for name in ("volume_shape", "class_names", "channel_names")}
    other = MedDiffusion3DPipeline(tiny_pipeline.vae, trained, tiny_pipeline.scheduler, **config)
    assert_same(volumes_of(other), loaded)


def test_the_file_is_laid_out_as_diffusers_has_it(adapters):
    """Frozen: `unet.` before every key, the LoraConfig beside them."""
    assert LORA_FILE == "pytorch_lora_weights.safetensors"
    with safe_open(adapters[0] / LORA_FILE, framework="pt") as file:
        keys, config = list(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])
    assert keys and all(k.startswith("unet.") and k.endswith((".lora_A.weight", ".lora_B.weight")) for k in keys)
    assert config["unet.r"] == 2 and config["unet.lora_alpha"] == 4 and config["unet.base_model_name_or_path"] is None
    assert any("conv1" in key for key in keys) and any("to_q" in key for key in keys)


def test_a_file_or_its_tensors_load_like_its_folder(tiny_pipeline, adapters):
    tiny_pipeline.load_lora_weights(adapters[0], adapter_name="folder")
    expected = volumes_of(tiny_pipeline)
    tiny_pipeline.load_lora_weights(str(adapters[0] / LORA_FILE), adapter_name="file")
    tiny_pipeline.set_adapters("file")
    assert_same(volumes_of(tiny_pipeline), expected)
    tiny_pipeline.unload_lora_weights()
    tensors = load_file(adapters[0] / LORA_FILE)
    tiny_pipeline.load_lora_weights(tensors)  # no LoraConfig, so the scale is alpha = rank: half of what it was
    tiny_pipeline.set_adapters("default_0", 2.0)
    assert_same(volumes_of(tiny_pipeline), expected)


def test_switched_off_or_unloaded_the_base_is_back(tiny_pipeline, adapters):
    base, keys = volumes_of(tiny_pipeline), list(tiny_pipeline.unet.state_dict())
    tiny_pipeline.load_lora_weights(adapters[0])
    tiny_pipeline.disable_lora()
    assert_same(volumes_of(tiny_pipeline), base)
    tiny_pipeline.enable_lora()
    assert differ(volumes_of(tiny_pipeline), base)
    tiny_pipeline.unload_lora_weights()
    assert_same(volumes_of(tiny_pipeline), base)
    assert list(tiny_pipeline.unet.state_dict()) == keys and not lora_layers(tiny_pipeline.unet)


@pytest.mark.slow
def test_several_adapters_add_up_with_their_weights(tiny_pipeline, adapters):
    plain = copy_of(tiny_pipeline.unet)
    weights = {name: value.clone() for name, value in plain.state_dict().items()}
    for folder, weight in zip(adapters, (0.5, -1.0), strict=True):
        tiny_pipeline.load_lora_weights(folder)
        tiny_pipeline.fuse_lora()
        tiny_pipeline.unload_lora_weights()
        for name, value in tiny_pipeline.unet.state_dict().items():
            weights[name] += weight * (value - plain.state_dict()[name])
        tiny_pipeline.unet.load_state_dict(plain.state_dict())
    tiny_pipeline.load_lora_weights(adapters[0], adapter_name="a")
    tiny_pipeline.load_lora_weights(adapters[1], adapter_name="b")
    assert tiny_pipeline.get_list_adapters() == {"unet": ["a", "b"]}
    tiny_pipeline.set_adapters(["a", "b"], [0.5, -1.0])
    assert tiny_pipeline.get_active_adapters() == ["a", "b"]
    together = volumes_of(tiny_pipeline)
    tiny_pipeline.set_adapters("a")
    alone = volumes_of(tiny_pipeline)
    tiny_pipeline.unload_lora_weights()
    tiny_pipeline.unet.load_state_dict(weights)
    assert_same(volumes_of(tiny_pipeline), together, atol=1e-4)
    assert differ(alone, together)


def test_an_adapter_is_swapped_in_place_with_its_own_scale(tiny_pipeline, adapters, tmp_path):
    tiny_pipeline.load_lora_weights(adapters[1], adapter_name="b")
    expected = volumes_of(tiny_pipeline)
    tiny_pipeline.unload_lora_weights()
    tiny_pipeline.load_lora_weights(adapters[0], adapter_name="style")
    first = volumes_of(tiny_pipeline)
    module = lora_layers(tiny_pipeline.unet)["conv_in.conv"]
    tiny_pipeline.load_lora_weights(adapters[1], adapter_name="style", hotswap=True)
    assert lora_layers(tiny_pipeline.unet)["conv_in.conv"] is module
    assert tiny_pipeline.get_list_adapters() == {"unet": ["style"]}
    assert differ(first, expected)
    assert_same(volumes_of(tiny_pipeline), expected)
    tiny_pipeline.save_lora_weights(tmp_path / "again")  # with the scale of the adapter that was swapped in
    tiny_pipeline.unload_lora_weights()
    tiny_pipeline.load_lora_weights(tmp_path / "again")
    assert_same(volumes_of(tiny_pipeline), expected)


@pytest.mark.slow
def test_a_hot_swap_of_unequal_adapters_is_refused_and_changes_nothing(tiny_pipeline, adapters, tmp_path):
    make_adapter(copy_of(tiny_pipeline.unet), tmp_path / "smaller", seed=3, rank=1)
    tiny_pipeline.load_lora_weights(adapters[0], adapter_name="a")
    before = volumes_of(tiny_pipeline)
    with pytest.raises(ValueError, match="needs the layers and ranks of 'a'; .* tensors differ"):
        tiny_pipeline.load_lora_weights(tmp_path / "smaller", adapter_name="a", hotswap=True)
    with pytest.raises(ValueError, match=r"No adapter 'x' to swap; loaded are \['a'\]"):
        tiny_pipeline.load_lora_weights(adapters[1], adapter_name="x", hotswap=True)
    with pytest.raises(ValueError, match="needs the LoraConfig"):
        tiny_pipeline.load_lora_weights(load_file(adapters[1] / LORA_FILE), adapter_name="a", hotswap=True)
    with pytest.raises(ValueError, match="already in use"):
        tiny_pipeline.load_lora_weights(adapters[1], adapter_name="a")
    assert_same(volumes_of(tiny_pipeline), before)


def spoil(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    key = "unet.conv_in.conv.lora_A.weight"
    if how == "no prefix":
        return {name.removeprefix("unet."): value for name, value in tensors.items()}
    if how == "empty":
        return {}
    if how == "one factor":
        return {name: value for name, value in tensors.items() if name != key}
    if how == "shape":
        return tensors | {key: torch.zeros(2, 5, 3, 3, 3)}
    where = {"unknown layer": "unet.conv_inn.conv", "group norm": "unet.out.0", "pointwise": "unet.skip"}[how]
    factors = {f"{where}.lora_A.weight": torch.zeros(2, 8), f"{where}.lora_B.weight": torch.zeros(8, 2)}
    return tensors | factors


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no prefix", "found 88 tensors, among them .'conv_in.conv.lora_A.weight'"),
        ("empty", "found 0 tensors"),
        ("one factor", "conv_in.conv lacks one of its two factors"),
        ("shape", r"conv_in.conv has factors \(2, 5, 3, 3, 3\), \(8, 2, 1, 1, 1\) for \(8, 4, 3, 3, 3\)"),
        ("unknown layer", "conv_inn.conv is no linear layer or 3D convolution"),
        ("group norm", "out.0 is no linear layer or 3D convolution"),
        ("pointwise", "skip is a 1x1x1 convolution, whose adapter PEFT cannot merge"),
    ],
)
def test_a_file_that_fits_in_part_is_refused_and_nothing_is_loaded(tiny_pipeline, adapters, how, message):
    """Pitfall 22: loading silently nothing, or half. Pitfall 17: 1x1x1 convolutions."""
    tiny_pipeline.unet.skip = torch.nn.Conv3d(8, 8, 1)
    base = volumes_of(tiny_pipeline)
    tensors = load_file(adapters[0] / LORA_FILE)
    message = message.replace("88", str(len(tensors)))
    save_file(spoil(tensors, how), adapters[0] / LORA_FILE)
    with pytest.raises(ValueError, match=message):
        tiny_pipeline.load_lora_weights(adapters[0])
    assert not lora_layers(tiny_pipeline.unet)
    assert_same(volumes_of(tiny_pipeline), base)


def test_a_folder_without_an_adapter_says_what_is_missing(tiny_pipeline, tmp_path):
    with pytest.raises(OSError, match=LORA_FILE):
        tiny_pipeline.load_lora_weights(tmp_path)


# Fusing and saving


def test_fused_weights_give_the_same_volumes_and_can_be_taken_apart(tiny_pipeline, adapters):
    base = volumes_of(tiny_pipeline)
    tiny_pipeline.load_lora_weights(adapters[0])
    expected = volumes_of(tiny_pipeline)
    tiny_pipeline.fuse_lora()
    assert tiny_pipeline.num_fused_loras == 1
    assert_same(volumes_of(tiny_pipeline), expected, atol=1e-4)
    tiny_pipeline.unfuse_lora()
    tiny_pipeline.disable_lora()
    assert_same(volumes_of(tiny_pipeline), base, atol=1e-4)


@pytest.mark.slow
def test_half_an_adapter_is_fused_as_half_an_adapter_is_weighed(tiny_pipeline, adapters):
    tiny_pipeline.load_lora_weights(adapters[0], adapter_name="a")
    tiny_pipeline.set_adapters("a", 0.5)
    expected = volumes_of(tiny_pipeline)
    tiny_pipeline.set_adapters("a")
    whole = volumes_of(tiny_pipeline)
    tiny_pipeline.fuse_lora(lora_scale=0.5)
    assert_same(volumes_of(tiny_pipeline), expected, atol=1e-4)
    assert differ(whole, expected)


def test_a_pipeline_with_an_adapter_is_saved_only_when_the_adapter_is_part_of_it(tiny_pipeline, adapters, tmp_path):
    tiny_pipeline.load_lora_weights(adapters[0], adapter_name="a")
    expected = volumes_of(tiny_pipeline)
    with pytest.raises(ValueError, match=r"carries LoRA adapters \['a'\].*fuse_lora\(\), then unload_lora_weights"):
        tiny_pipeline.save_pretrained(tmp_path / "saved")
    tiny_pipeline.fuse_lora()
    tiny_pipeline.unload_lora_weights()
    tiny_pipeline.save_pretrained(tmp_path / "saved")
    assert_same(volumes_of(MedDiffusion3DPipeline.from_pretrained(tmp_path / "saved")), expected, atol=1e-4)


def test_a_saved_adapter_loads_into_a_fresh_pipeline(tiny_pipeline, tiny_pipeline_folder, adapters, tmp_path):
    tiny_pipeline.load_lora_weights(adapters[0], adapter_name="a")
    tiny_pipeline.load_lora_weights(adapters[1], adapter_name="b")
    tiny_pipeline.set_adapters("b")
    expected = volumes_of(tiny_pipeline)
    with pytest.raises(ValueError, match=r"one of the loaded adapters, \['a', 'b'\]; got None"):
        tiny_pipeline.save_lora_weights(tmp_path / "saved")
    path = tiny_pipeline.save_lora_weights(tmp_path / "saved", "b")
    again = [tiny_pipeline.save_lora_weights(tmp_path / str(n), "b").read_bytes() for n in range(8)]
    assert set(again) == {path.read_bytes()}
    assert path == tmp_path / "saved" / LORA_FILE and list(path.parent.iterdir()) == [path]
    fresh = MedDiffusion3DPipeline.from_pretrained(tiny_pipeline_folder)
    fresh.load_lora_weights(tmp_path / "saved")
    assert_same(volumes_of(fresh), expected)


@pytest.mark.slow
def test_a_half_precision_pipeline_takes_an_adapter(tiny_pipeline, adapters):
    tiny_pipeline.load_lora_weights(adapters[0])
    expected = volumes_of(tiny_pipeline)
    tiny_pipeline.unload_lora_weights()
    tiny_pipeline.to(dtype=torch.bfloat16)
    base = volumes_of(tiny_pipeline)
    tiny_pipeline.load_lora_weights(adapters[0])
    loaded = volumes_of(tiny_pipeline)
    assert (loaded - expected).abs().mean() < 0.3 * (loaded - base).abs().mean()


# Fine-tuning


def brightness(volumes, **conditions):
    return volumes.mean(dim=(1, 2, 3, 4))


def make_trainer(pipeline: MedDiffusion3DPipeline, folder: Path, peft_config: LoraConfig | None) -> DDPOTrainer:
    args = DDPOConfig(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=6, num_generations=4, steps_per_generation=2,
        num_inference_steps=4, learning_rate=1e-2, ema_decay=0.5, report_to="none", disable_tqdm=True, bf16=False,
        picture_steps=0,
        save_strategy="no",
    )  # fmt: skip
    conditions = datasets.Dataset.from_dict({"class_label": [0, 1, 2]})
    return DDPOTrainer(pipeline, brightness, args, conditions, peft_config=peft_config)


@pytest.mark.slow
def test_what_fine_tuning_writes_loads_into_a_fresh_pipeline_and_differs_from_the_base(tiny_pipeline_folder, tmp_path):
    """Pitfall 22. The whole pipeline (adapters merged) and the adapters on the base give equal volumes."""
    load = MedDiffusion3DPipeline.from_pretrained
    trainer = make_trainer(load(tiny_pipeline_folder), tmp_path, LoraConfig(r=4, lora_alpha=8))
    trainer.train()
    trainer.save_model()
    with trainer.ema_weights():
        expected = volumes_of(trainer.pipeline)
    fresh = load(tiny_pipeline_folder)
    assert differ(volumes_of(fresh), expected)
    fresh.load_lora_weights(tmp_path)
    assert_same(volumes_of(fresh), expected)
    assert_same(volumes_of(load(tmp_path)), expected, atol=1e-4)
    trained = volumes_of(trainer.pipeline)  # the last weights, not their average
    trainer.pipeline.save_lora_weights(tmp_path / "last")
    fresh.load_lora_weights(tmp_path / "last", adapter_name="default_0", hotswap=True)
    assert_same(volumes_of(fresh), trained)


def networks() -> int:
    gc.collect()
    return sum(type(thing) is DiffusionUNet3D for thing in gc.get_objects())


@pytest.mark.slow
def test_the_reference_policy_is_the_network_with_the_adapter_off_and_no_second_copy(tiny_pipeline, tmp_path):
    base, before = copy_of(tiny_pipeline.unet), networks()
    trainer = make_trainer(tiny_pipeline, tmp_path, LoraConfig(r=4, lora_alpha=8))
    trainer.train()
    assert trainer.reference is None and networks() == before
    states, labels, t = NOISE, torch.tensor([0, 2]), int(trainer.scheduler.timesteps[1])
    reference = trainer._reference_transition(states, t, Conditions(labels, None))
    with torch.no_grad():
        output = base(states, t, labels).sample
        policy = trainer.model(states, t, labels).sample
    assert_same(reference.mean, transition(trainer.scheduler, output, t, states).mean)
    assert differ(policy, output)  # and the adapters are on again


def test_training_all_weights_of_a_pipeline_with_adapters_is_refused(tiny_pipeline, adapters, tmp_path):
    tiny_pipeline.load_lora_weights(adapters[0], adapter_name="a")
    with pytest.raises(ValueError, match=r"carries LoRA layers already \(\['a'\]\)"):
        make_trainer(tiny_pipeline, tmp_path, None)
