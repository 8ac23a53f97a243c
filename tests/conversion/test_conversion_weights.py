"""Weights in every published layout and the missing scale factor."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from monai.bundle import ConfigParser
from monai.networks.nets import VQVAE, AutoencoderKL, DiffusionModelUNet
from safetensors.torch import save_file

from conftest import awaken, run_example
from diffusers_med3d import MedDiffusion3DPipeline
from diffusers_med3d.conversion import (
    Definition,
    convert_bundle,
    estimate_scale_factor,
    read_bundle,
    read_weights,
)
from diffusers_med3d.conversion.networks import build_autoencoder, build_unet
from diffusers_med3d.conversion.weights import attention_without_fc, load_exactly

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
    mean = ours.eval().encode(volumes).latent_dist.mean
    torch.testing.assert_close(mean, without.encode(volumes)[0], atol=1e-5, rtol=1e-5)
    latents = torch.randn(1, 2, 4, 4, 4)
    torch.testing.assert_close(ours.decode(latents).sample, without.decode(latents), atol=1e-5, rtol=1e-5)


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
    torch.testing.assert_close(vae.encode_latents(volumes), 4 * vae.encode(volumes).latent_dist.mean)
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
    mean, sigma = pipeline.vae.encode_moments(volumes)
    draws = torch.stack([mean + sigma * torch.randn_like(mean) for _ in range(200)])
    assert 1 / pipeline.vae.config.latents_std[0] == pytest.approx(1 / draws.std().item(), rel=0.01)
    assert sigma.mean() > 0.1  # so that the posterior's noise counts
    with pytest.raises(ValueError, match="no volumes"):
        estimate_scale_factor(pipeline.vae, [])


@torch.no_grad()
def test_weights_load_into_monais_class_as_they_are(tiny_unet):
    config = {name: value for name, value in tiny_unet.config.items() if name in UNET or name == "num_class_embeds"}
    theirs = DiffusionModelUNet(spatial_dims=3, **config).eval()
    theirs.load_state_dict(tiny_unet.state_dict())
    latents, labels = torch.randn(1, 4, 4, 4, 4), torch.tensor([2])
    expected = tiny_unet(latents, 9, labels).sample
    torch.testing.assert_close(theirs(latents, torch.tensor([9]), class_labels=labels), expected)


@torch.no_grad()
def test_the_script_converts_a_bundle_folder(bundle, brains_folder, monkeypatch, tmp_path, capsys):
    def run(*flags: object) -> None:
        run_example(monkeypatch, "convert_monai_bundle.py", *flags)

    ours = str(tmp_path / "ours")
    with pytest.raises(SystemExit, match="scale factor"):
        run("--bundle", bundle, "--output_dir", ours)
    assert not Path(ours).exists()
    run("--bundle", bundle, "--estimate_from", brains_folder, "--output_dir", ours)
    assert "scale factor" in capsys.readouterr().out
    pipeline = MedDiffusion3DPipeline.from_pretrained(ours)
    assert pipeline.config.volume_shape == [8, 8, 8]
    assert pipeline.scheduler.config.timestep_spacing == "leading"  # the bundle says MONAI 1.4
    assert not list(tmp_path.glob("tmp*"))
    with pytest.raises(SystemExit, match="exists already"):
        run("--bundle", bundle, "--scale_factor", 1.0, "--output_dir", ours)

    (bundle / "models" / "unet.pt").rename(bundle / "models" / "renamed.pt")
    with pytest.raises(SystemExit, match="give --unet_weights"):
        run("--bundle", bundle, "--scale_factor", 1.0, "--output_dir", tmp_path / "other")
    with pytest.raises(SystemExit, match="no MONAI bundle"):
        run("--bundle", tmp_path, "--output_dir", tmp_path / "other")


def test_the_script_takes_a_bundle_from_the_hub_without_its_data(bundle, hub, monkeypatch, tmp_path):
    (bundle / "datasets").mkdir()
    (bundle / "datasets" / "masks.zip").write_bytes(b"large")
    api = HfApi()
    api.create_repo("tester/bundle")
    api.upload_folder(repo_id="tester/bundle", folder_path=bundle)
    output = str(tmp_path / "ours")
    flags = ("--bundle", "tester/bundle", "--scale_factor", 1.0, "--output_dir", output)
    run_example(monkeypatch, "convert_monai_bundle.py", *flags)
    assert MedDiffusion3DPipeline.from_pretrained(output).config.spacing == [2.0, 2.0, 2.0]
    assert list(Path(hub.cache).rglob("unet.pt")) and not list(Path(hub.cache).rglob("masks.zip"))
