"""Weights in every published layout, the missing scale factor, and the way back to MONAI."""

import importlib.util
import json
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from huggingface_hub import HfApi
from monai.bundle import ConfigParser
from monai.networks.nets import VQVAE, AutoencoderKL, DiffusionModelUNet
from safetensors.torch import save_file

from conftest import awaken
from diffusers_med3d import AutoencoderKLMaisi3D, DiffusionUNet3D, DiffusionUNetMaisi3D, MedDiffusion3DPipeline
from diffusers_med3d.conversion import (
    Definition,
    convert_bundle,
    estimate_scale_factor,
    read_bundle,
    read_weights,
    save_monai_bundle,
    to_monai_definition,
    to_monai_state_dict,
)
from diffusers_med3d.conversion.convert import negate_prediction_
from diffusers_med3d.conversion.networks import build_autoencoder, build_unet
from diffusers_med3d.conversion.to_monai import scheduler_definition, scheduler_lines
from diffusers_med3d.conversion.weights import attention_without_fc, load_exactly

EXAMPLE = Path(__file__).parents[1] / "examples" / "convert_monai_bundle.py"
AUTOENCODER = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 1,
    "channels": [4, 8],
    "latent_channels": 2,
    "num_res_blocks": 1,
    "attention_levels": [False, True],
    "norm_num_groups": 4,
    "with_encoder_nonlocal_attn": True,
    "with_decoder_nonlocal_attn": False,
}
UNET = {
    "spatial_dims": 3,
    "in_channels": 2,
    "out_channels": 2,
    "channels": [8, 16],
    "num_res_blocks": 1,
    "attention_levels": [False, True],
    "num_head_channels": 8,
    "norm_num_groups": 4,
}
CONFIG = {
    "autoencoder_def": {"_target_": "monai.networks.nets.AutoencoderKL", **AUTOENCODER},
    "network_def": {"_target_": "monai.networks.nets.DiffusionModelUNet", **UNET},
    "noise_scheduler": {"_target_": "monai.networks.schedulers.DDIMScheduler", "clip_sample": False},
    "latent_shape": [2, 4, 4, 4],
    "spacing": [2.0, 2.0, 2.0],
    "load_autoencoder_path": "$@model_dir + '/vae.pt'",
    "load_diffusion_path": "$@model_dir + '/unet.pt'",
}


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A bundle folder as MONAI's CheckpointSaver leaves it: GenerativeModels names and no scale factor."""
    folder = tmp_path / "bundle"
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs" / "inference.json").write_text(json.dumps(CONFIG))
    (folder / "configs" / "metadata.json").write_text(json.dumps({"monai_version": "1.4.0"}))
    torch.save(awaken(AutoencoderKL(**AUTOENCODER)).state_dict(), folder / "models" / "vae.pt")
    torch.save({"model": awaken(DiffusionModelUNet(**UNET)).state_dict()}, folder / "models" / "unet.pt")
    return folder


def read(folder: Path) -> Any:
    return read_bundle([folder / "configs" / "inference.json", folder / "configs" / "metadata.json"])


def convert(folder: Path, **arguments: Any) -> MedDiffusion3DPipeline:
    models = folder / "models"
    pipeline, _ = convert_bundle(read(folder), models / "vae.pt", models / "unet.pt", **arguments)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("convert_monai_bundle", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
@pytest.mark.parametrize("include_fc", [False, True])
@pytest.mark.parametrize("combined", [False, True])
def test_attention_of_every_monai_layout_gives_equal_outputs(include_fc, combined):
    arguments = {**UNET, "include_fc": include_fc, "use_combined_linear": combined}
    theirs = awaken(DiffusionModelUNet(**arguments))
    ours = build_unet(Definition("DiffusionModelUNet", arguments), 2)
    state = theirs.state_dict()
    if not include_fc:  # MONAI 1.4 saved the layer all the same
        extra = {key.replace("norm.weight", "attn.out_proj.weight"): torch.randn(16, 16) for key in state if ".attention" in key and key.endswith(".norm.weight")}  # fmt: skip  # noqa: E501
        state = {**state, **extra}
        assert extra
    left_out = load_exactly(ours, state, "UNet")
    assert left_out == ([] if include_fc else sorted(extra, key=list(state).index))
    sample, t = torch.randn(2, 2, 4, 4, 4), torch.tensor([5, 900])
    torch.testing.assert_close(ours.eval()(sample, t).sample, theirs(sample, t), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_linear_layer_that_generative_models_never_applies_is_left_out_whatever_the_config_says():
    without = awaken(AutoencoderKL(**AUTOENCODER, include_fc=False))
    old = {}
    for key, value in without.state_dict().items():
        key = key.replace(".attn.to_", ".to_").replace(".postconv.", ".conv.")
        old[key] = value
        if key.endswith("to_q.weight"):
            old[key.replace("to_q", "proj_attn")], old[key.replace("to_q.weight", "proj_attn.bias")] = (
                torch.randn_like(value),
                torch.randn(len(value)),
            )
    ours = build_autoencoder(Definition("AutoencoderKL", AUTOENCODER), attention_without_fc(old))
    left_out = load_exactly(ours, old, "AutoencoderKL")
    assert len(left_out) == 6 and all(".proj_attn." in key for key in left_out)
    volumes = torch.rand(1, 1, 8, 8, 8)
    torch.testing.assert_close(ours.eval().encode(volumes)[0], without.encode(volumes)[0], atol=1e-5, rtol=1e-5)
    latents = torch.randn(1, 2, 4, 4, 4)
    torch.testing.assert_close(ours.decode(latents), without.decode(latents), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_vqvae_of_a_plain_script_gives_equal_codes_and_volumes():
    levels = {"downsample_parameters": [2, 4, 1, 1], "upsample_parameters": [[2, 4, 1, 1, 0]] * 2}
    arguments = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "num_res_layers": 1, "num_res_channels": 8}
    arguments |= {"num_embeddings": 16, "embedding_dim": 4, **levels}
    theirs = VQVAE(channels=[8, 8], **arguments).eval()
    ours = build_autoencoder(Definition("VQVAE", {**arguments, "num_channels": [8, 8]}))  # GenerativeModels' word
    load_exactly(ours, theirs.state_dict(), "VQVAE")
    volumes = torch.rand(1, 1, 16, 16, 16)
    torch.testing.assert_close(ours.eval()(volumes)[0], theirs(volumes)[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(ours.index_quantize(volumes), theirs.index_quantize(volumes))
    with pytest.raises(ValueError, match="'dropout': 0.1"):
        build_autoencoder(Definition("VQVAE", {**arguments, "channels": [8, 8], "dropout": 0.1}))


@torch.no_grad()
def test_checkpoints_of_a_plain_script_with_a_vqvae_become_a_pipeline_that_samples_as_monai_does(tmp_path):
    levels = {"downsample_parameters": [2, 4, 1, 1], "upsample_parameters": [2, 4, 1, 1, 0]}
    autoencoder = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "channels": [8, 8], "num_res_layers": 1}
    autoencoder |= {"num_res_channels": 8, "num_embeddings": 16, "embedding_dim": 2, **levels}
    unet = {**UNET, "num_class_embeds": 3}
    config = {
        "autoencoder_def": {"_target_": "monai.networks.nets.VQVAE", **autoencoder},
        "network_def": {"_target_": "monai.networks.nets.DiffusionModelUNet", **unet},
        "noise_scheduler": {"_target_": "monai.networks.schedulers.DDIMScheduler", "clip_sample": False},
    }
    (tmp_path / "mine.json").write_text(json.dumps(config))
    vqvae, network = VQVAE(**autoencoder).eval(), awaken(DiffusionModelUNet(**unet))
    torch.save({"state_dict": vqvae.state_dict()}, tmp_path / "vqvae.pt")
    torch.save(network.state_dict(), tmp_path / "unet.pt")
    pipeline, _ = convert_bundle(
        read_bundle([tmp_path / "mine.json"]), tmp_path / "vqvae.pt", tmp_path / "unet.pt", scale_factor=0.5,
        volume_shape=(16, 16, 16), spacing=(2.0, 2.0, 2.0),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    image = noise = torch.randn(1, 2, 4, 4, 4)
    scheduler = ConfigParser(config).get_parsed_content("noise_scheduler")
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        image, _ = scheduler.step(network(image, t[None], class_labels=torch.tensor([1])), t, image)
    arguments = {"class_labels": 1, "latents": noise, "num_inference_steps": 4}
    latents = pipeline(**arguments, output_type="latent").volumes
    torch.testing.assert_close(latents, image, atol=1e-5 * image.abs().max().item(), rtol=1e-5)
    expected = vqvae.decode_stage_2_outputs(image / 0.5)
    torch.testing.assert_close(pipeline(**arguments).volumes, expected.clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_checkpoints_are_unwrapped_and_never_unpickled(tmp_path):
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (open, (str(tmp_path / "ran"), "w"))

    state = {"a.weight": torch.ones(2)}
    torch.save(
        {"unet_state_dict": {"module.a.weight": torch.ones(2)}, "scale_factor": torch.tensor(0.5)}, tmp_path / "d.pt"
    )
    save_file(state, tmp_path / "s.safetensors")
    assert read_weights(tmp_path / "d.pt")[0].keys() == state.keys() and read_weights(tmp_path / "d.pt")[1] == 0.5
    plain, factor = read_weights(tmp_path / "s.safetensors")
    assert plain.keys() == state.keys() and factor is None
    torch.save({"state_dict": state, "more": Payload()}, tmp_path / "bad.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload()))
    for name in ("bad.pt", "plain.pt"):
        with pytest.raises(ValueError, match=f"{name} holds more than tensors"):
            read_weights(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_weights(tmp_path / "empty.pt")


def test_expressions_in_a_config_are_never_evaluated(tmp_path):
    marker = tmp_path / "ran"
    config = {**CONFIG, "imports": [f"$open({str(marker)!r}, 'w')"], "x": "$@imports"}
    path = tmp_path / "inference.json"
    path.write_text(json.dumps(config))
    assert read_bundle([path]).spacing == (2.0, 2.0, 2.0)
    config["network_def"] = {**config["network_def"], "channels": f"$open({str(marker)!r}, 'w')"}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="channels of .* is the expression"):
        read_bundle([path])
    assert not marker.exists()
    config["network_def"] = {**CONFIG["network_def"], "channels": "@nowhere"}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'@nowhere', which is in none of its files"):
        read_bundle([path])
    del config["network_def"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected one definition of DiffusionModelUNet"):
        read_bundle([path])


def test_configs_in_yaml_are_read_as_in_json(tmp_path):
    path = tmp_path / "inference.yaml"
    path.write_text(json.dumps(CONFIG).replace('"norm_num_groups": 4', '"norm_eps": 1e-06, "norm_num_groups": 4'))
    config = read_bundle([path])
    assert build_autoencoder(config.autoencoder).config.norm_eps == 1e-6


def test_a_missing_scale_factor_is_asked_for_and_a_given_one_is_applied_once_each_way(bundle):
    with pytest.raises(ValueError, match="neither the weights nor the config hold the scale factor"):
        convert(bundle)
    with pytest.raises(ValueError, match="positive number, got 0"):
        convert(bundle, scale_factor=0.0)
    with pytest.raises(ValueError, match="not both"):
        convert(bundle, scale_factor=1.0, read_volumes=lambda shape, spacing: [])
    vae = convert(bundle, scale_factor=4.0).vae
    volumes = torch.rand(1, 1, 8, 8, 8)
    torch.testing.assert_close(vae.encode_latents(volumes), 4 * vae.encode(volumes)[0])
    assert vae.config.latents_mean == [0.0, 0.0] and vae.config.latents_std == [0.25, 0.25]


@torch.no_grad()
def test_the_scale_factor_is_estimated_over_all_volumes_with_the_posteriors_noise(bundle):
    seen = []

    def read_volumes(shape: Any, spacing: Any) -> list[torch.Tensor]:
        seen.append((tuple(shape), tuple(spacing)))
        return list(volumes)

    volumes = torch.rand(3, 1, 8, 8, 8, generator=torch.Generator().manual_seed(2))
    pipeline = convert(bundle, read_volumes=read_volumes)
    assert seen == [((8, 8, 8), (2.0, 2.0, 2.0))]
    mean, sigma = pipeline.vae.encode(volumes)
    draws = torch.stack([mean + sigma * torch.randn_like(mean) for _ in range(200)])
    assert 1 / pipeline.vae.config.latents_std[0] == pytest.approx(1 / draws.std().item(), rel=0.01)
    assert sigma.mean() > 0.1  # so that the posterior's noise counts
    with pytest.raises(ValueError, match="no volumes"):
        estimate_scale_factor(pipeline.vae, [])


@torch.no_grad()
def test_a_pipeline_goes_to_monais_classes_and_back_with_equal_volumes(tiny_pipeline, tmp_path):
    with pytest.warns(UserWarning, match="scheduler.timesteps = "):
        folder = save_monai_bundle(tiny_pipeline, tmp_path / "monai")
    config = json.loads((folder / "configs" / "inference.json").read_text())
    parser = ConfigParser(config)
    autoencoder, unet = (parser.get_parsed_content(name) for name in ("autoencoder_def", "network_def"))
    autoencoder.load_state_dict(read_weights(folder / "models" / "autoencoder.safetensors")[0])
    unet.load_state_dict(read_weights(folder / "models" / "diffusion.safetensors")[0])

    volumes, latents = torch.rand(1, 1, 16, 16, 16), torch.randn(1, 4, 4, 4, 4)
    vae = tiny_pipeline.vae
    mean, sigma = autoencoder.eval().encode(volumes)  # statistics per channel are in the weights now
    torch.testing.assert_close(mean * config["scale_factor"], vae.encode_latents(volumes), atol=1e-5, rtol=1e-5)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    torch.testing.assert_close(sigma, vae.encode(volumes)[1] / std, atol=1e-5, rtol=1e-5)
    decoded = autoencoder.decode(latents / config["scale_factor"])
    torch.testing.assert_close(decoded.clamp(0, 1), vae.decode_latents(latents), atol=1e-5, rtol=1e-5)
    labels = torch.tensor([2])
    expected = tiny_pipeline.unet(latents, 9, labels).sample
    torch.testing.assert_close(unet.eval()(latents, torch.tensor([9]), class_labels=labels), expected)

    back, _ = convert_bundle(
        read_bundle([folder / "configs" / "inference.json"]),
        folder / "models" / "autoencoder.safetensors",
        folder / "models" / "diffusion.safetensors",
    )
    back.set_progress_bar_config(disable=True)
    assert back.scheduler.config.timestep_spacing == "leading"
    runs = [p(class_labels=1, latents=latents, num_inference_steps=4).volumes for p in (tiny_pipeline, back)]
    torch.testing.assert_close(*runs, atol=1e-5, rtol=1e-5)
    with pytest.raises(FileExistsError, match="exists already"):
        save_monai_bundle(tiny_pipeline, folder)
    with pytest.warns(UserWarning, match="scheduler.timesteps = "):
        half = save_monai_bundle(tiny_pipeline.to(torch.float16), tmp_path / "half")
    autoencoder.load_state_dict(read_weights(half / "models" / "autoencoder.safetensors")[0])
    torch.testing.assert_close(autoencoder.decode(latents / config["scale_factor"]), decoded, atol=5e-3, rtol=5e-3)


@torch.no_grad()
@pytest.mark.parametrize(("spacing", "zero_snr", "lines"), [("trailing", True, 2), ("leading", False, 1)])
def test_what_a_config_cannot_say_of_a_scheduler_is_warned_of_and_the_lines_given_make_monai_sample_the_same(
    tiny_pipeline, tmp_path, spacing, zero_snr, lines
):
    options = {"timestep_spacing": spacing, "rescale_betas_zero_snr": zero_snr, "steps_offset": 1}
    tiny_pipeline.scheduler = DDIMScheduler.from_config(tiny_pipeline.scheduler.config, **options)
    with pytest.warns(UserWarning, match="it would give other volumes"):
        folder = save_monai_bundle(tiny_pipeline, tmp_path / "monai")
    config = json.loads((folder / "configs" / "inference.json").read_text())
    assert len(config["scheduler_lines"]) == lines
    files = [folder / "models" / f"{name}.safetensors" for name in ("autoencoder", "diffusion")]
    unet = ConfigParser(config).get_parsed_content("network_def").eval()
    unet.load_state_dict(read_weights(files[1])[0])
    noise = torch.randn(1, 4, 4, 4, 4)

    def sample(lines: list[str]) -> torch.Tensor:
        scheduler, image = ConfigParser(config).get_parsed_content("noise_scheduler"), noise
        scheduler.set_timesteps(6)
        for line in lines:
            exec(line, {"torch": torch, "scheduler": scheduler, "N": 6, "T": scheduler.num_train_timesteps})
        for t in scheduler.timesteps:
            prediction = unet(image, t[None], class_labels=torch.tensor([1]))
            image, _ = scheduler.step(prediction, t, image)
        return image

    arguments = {"class_labels": 1, "latents": noise, "num_inference_steps": 6, "output_type": "latent"}
    latents = tiny_pipeline(**arguments).volumes
    torch.testing.assert_close(sample(config["scheduler_lines"]), latents, atol=1e-5, rtol=1e-5)
    assert (sample([]) - latents).abs().max() > 1e-2
    back, _ = convert_bundle(read_bundle([folder / "configs" / "inference.json"]), *files)
    back.set_progress_bar_config(disable=True)
    torch.testing.assert_close(back(**arguments).volumes, latents, atol=1e-5, rtol=1e-5)


def test_a_scheduler_that_a_config_says_in_full_needs_no_lines(tiny_scheduler):
    spread = DDIMScheduler.from_config(tiny_scheduler.config, timestep_spacing="linspace", steps_offset=1)
    assert scheduler_definition(spread, (4, 4, 4))["steps_offset"] == 0  # diffusers uses it for "leading" alone
    assert scheduler_lines(spread) == scheduler_lines(FlowMatchEulerDiscreteScheduler()) == []


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(trained_betas=[0.1, 0.2]), "trained_betas"),
        (DDIMScheduler(thresholding=True), "'thresholding': True"),
        (DDIMScheduler(beta_schedule="squaredcos_cap_v2"), "squaredcos_cap_v2"),
        (DDPMScheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr=True .*; set a DDIMScheduler"),
        (DDPMScheduler(variance_type="fixed_small_log"), "fixed_small_log"),
        (FlowMatchEulerDiscreteScheduler(shift_terminal=0.1), "'shift_terminal': 0.1"),
    ],
)
def test_schedulers_that_monai_does_not_have_are_refused_on_the_way_back(scheduler, message):
    with pytest.raises(ValueError, match=message):
        scheduler_definition(scheduler, (4, 4, 4))


@torch.no_grad()
def test_a_flow_with_conditions_goes_to_maisis_classes_and_back(tmp_path):
    torch.manual_seed(4)
    unet = DiffusionUNetMaisi3D(
        in_channels=2, out_channels=2, channels=(8, 16), num_res_blocks=1, attention_levels=(False, True),
        num_head_channels=8, norm_num_groups=4, include_spacing=False, context_names=["age", "volume"],
        concat_context=True, include_fc=True,
    )  # fmt: skip
    vae = AutoencoderKLMaisi3D(
        channels=(4, 8), latent_channels=2, num_res_blocks=(1, 1), attention_levels=(False, False), norm_num_groups=4,
        latents_mean=[0.0, 0.0], latents_std=[0.5, 0.5],
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = MedDiffusion3DPipeline(awaken(vae), awaken(unet), scheduler, volume_shape=(8, 8, 8))
    pipeline.set_progress_bar_config(disable=True)
    folder = save_monai_bundle(pipeline, tmp_path / "monai")
    parser = ConfigParser(json.loads((folder / "configs" / "inference.json").read_text().replace("@", "")))
    theirs = parser.get_parsed_content("network_def")
    theirs.load_state_dict(read_weights(folder / "models" / "diffusion.safetensors")[0])

    latents, values = torch.randn(1, 2, 4, 4, 4), torch.tensor([[0.3, 0.7]])
    conditions = unet.encode_conditions({"age": 0.3, "volume": 0.7}, 1)
    velocity = unet(latents, 500.0, conditions=conditions).sample
    maps = values[..., None, None, None].expand(-1, -1, 4, 4, 4)
    expected = theirs.eval()(torch.cat([latents, maps], 1), torch.tensor([500.0]), context=values[:, None])
    torch.testing.assert_close(velocity, -expected, atol=1e-5, rtol=1e-5)  # MONAI's flows point the other way
    monai_scheduler = parser.get_parsed_content("noise_scheduler")
    monai_scheduler.set_timesteps(4, input_img_size_numel=64)
    assert monai_scheduler.timesteps.tolist() == [1000, 900, 750, 500]

    config = read_bundle([folder / "configs" / "inference.json"])
    files = [folder / "models" / f"{name}.safetensors" for name in ("autoencoder", "diffusion")]
    back, _ = convert_bundle(config, *files)
    back.set_progress_bar_config(disable=True)
    assert back.unet.config.context_names == ["age", "volume"]
    assert back.scheduler.config.shift == pytest.approx(3.0)
    arguments = {"latents": latents, "num_inference_steps": 3, "conditions": {"age": 0.3, "volume": 0.7}}
    torch.testing.assert_close(pipeline(**arguments).volumes, back(**arguments).volumes, atol=1e-5, rtol=1e-5)


def test_what_monai_does_not_have_is_refused_on_the_way_back(tiny_unet, tiny_vae, tiny_vq):
    config = {key: value for key, value in tiny_unet.config.items() if not key.startswith("_")}
    for name in ("sample_skip", "sample_gate", "precondition"):
        with pytest.raises(ValueError, match=f"no {name}"):
            to_monai_state_dict(DiffusionUNet3D(**{**config, name: True}))
    with pytest.raises(ValueError, match="no num_modes"):
        to_monai_state_dict(DiffusionUNet3D(**{**config, "num_modes": 2, "mode_shape": (4, 4, 4)}))
    tiny_vae.set_latent_statistics(torch.zeros(4), torch.ones(4), torch.zeros(4, 4, 4, 4))
    with pytest.raises(ValueError, match="no atlas of latents"):
        to_monai_state_dict(tiny_vae)
    definition = to_monai_definition(tiny_vq)
    theirs = ConfigParser({"net": definition}).get_parsed_content("net")
    theirs.load_state_dict(to_monai_state_dict(tiny_vq))
    prediction = tiny_unet(torch.ones(1, 4, 4, 4, 4), 3).sample
    torch.testing.assert_close(negate_prediction_(tiny_unet)(torch.ones(1, 4, 4, 4, 4), 3).sample, -prediction)


@torch.no_grad()
def test_the_script_converts_a_bundle_folder_both_ways(bundle, brains_folder, example, tmp_path, capsys):
    def run(**arguments: Any) -> None:
        example.main(example.ConvertArguments(**arguments))

    ours = str(tmp_path / "ours")
    with pytest.raises(ValueError, match="scale factor"):
        run(bundle=str(bundle), output_dir=ours)
    assert not Path(ours).exists()
    run(bundle=str(bundle), estimate_from=brains_folder, output_dir=ours)
    assert "scale factor" in capsys.readouterr().out
    pipeline = MedDiffusion3DPipeline.from_pretrained(ours)
    assert pipeline.config.volume_shape == [8, 8, 8]
    assert pipeline.scheduler.config.timestep_spacing == "leading"  # the bundle says MONAI 1.4
    assert not list(tmp_path.glob("tmp*"))
    with pytest.raises(FileExistsError, match="exists already"):
        run(bundle=str(bundle), scale_factor=1.0, output_dir=ours)

    with pytest.warns(UserWarning, match="scheduler.timesteps = "):
        run(to_monai=ours, output_dir=str(tmp_path / "monai"))
    run(bundle=str(tmp_path / "monai"), output_dir=str(tmp_path / "again"))
    again = MedDiffusion3DPipeline.from_pretrained(tmp_path / "again")
    assert again.vae.config.latents_std == pytest.approx(pipeline.vae.config.latents_std)
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(tensor, again.unet.state_dict()[name])

    with pytest.raises(ValueError, match="give --unet_weights"):
        (bundle / "models" / "unet.pt").rename(bundle / "models" / "renamed.pt")
        run(bundle=str(bundle), scale_factor=1.0, output_dir=str(tmp_path / "other"))
    with pytest.raises(FileNotFoundError, match="no MONAI bundle"):
        run(bundle=str(tmp_path), output_dir=str(tmp_path / "other"))


def test_the_script_takes_a_bundle_from_the_hub_without_its_data(bundle, hub, example, tmp_path):
    (bundle / "datasets").mkdir()
    (bundle / "datasets" / "masks.zip").write_bytes(b"large")
    api = HfApi()
    api.create_repo("tester/bundle")
    api.upload_folder(repo_id="tester/bundle", folder_path=bundle)
    output = str(tmp_path / "ours")
    example.main(example.ConvertArguments(bundle="tester/bundle", scale_factor=1.0, output_dir=output))
    assert MedDiffusion3DPipeline.from_pretrained(output).config.spacing == [2.0, 2.0, 2.0]
    assert list(Path(hub.cache).rglob("unet.pt")) and not list(Path(hub.cache).rglob("masks.zip"))
