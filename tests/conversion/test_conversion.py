"""MONAI's published generators converted: equal to MONAI's own classes, in encode, decode, one step and a whole run."""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from monai.bundle import ConfigParser

from conftest import awaken
from diffusers_med3d import MedDiffusion3DPipeline
from diffusers_med3d.conversion import Conversion, convert_bundle, read_bundle
from diffusers_med3d.conversion.networks import build_autoencoder, build_scheduler, build_unet
from monai_configs import LATENT_SHAPES, PUBLISHED, small

NETWORKS = {
    "brats": ("autoencoder_def", "network_def", "noise_scheduler"),
    "brain": ("autoencoder_def", "diffusion_def", "scheduler"),
    "maisi-ddpm": ("autoencoder_def", "diffusion_unet_def", "noise_scheduler"),
    "maisi-rflow": ("autoencoder_def", "diffusion_unet_def", "noise_scheduler"),
}
FLOW_ROUNDING = 2e-2  # in latents (up to 4.6 here), at 30 steps of the published schedule
DDPM_ROUNDING = 1e-4  # in volumes, with the float32 products of alphas that both libraries ship
SCALE = {"brats": 0.8, "brain": 1.0, "maisi-ddpm": 1.06, "maisi-rflow": 1.06}


def monai_parts(name: str, config: dict[str, Any]) -> tuple[Any, Any, Any]:
    """MONAI's own autoencoder, UNet and scheduler, as MONAI's parser makes them from the config."""
    config = {**config, "device": "cpu", "model_dir": "."}
    for key in NETWORKS[name][:2]:
        # only CUDA has them: flash attention, and float16 norms between float32 convolutions
        config[key] = {**config[key], "use_flash_attention": False}
        if "norm_float16" in config[key]:
            config[key]["norm_float16"] = False
    config[NETWORKS[name][2]] = {k: v for k, v in config[NETWORKS[name][2]].items() if k != "_requires_"}
    parser = ConfigParser(config)
    return tuple(parser.get_parsed_content(key) for key in NETWORKS[name])


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "inference.json"
    path.write_text(json.dumps(config))
    return path


def to_generative_models(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Today's keys to those of GenerativeModels, with the linear layer that it saved and never applied."""
    old = {}
    for key, value in state.items():
        key = key.replace(".attn.to_", ".to_").replace(".postconv.", ".conv.")
        if ".transformer_blocks." in key:
            key = key.replace(".out_proj.", ".to_out.0.")
        old[key.replace(".attn.out_proj.", ".proj_attn.")] = value.clone()
    for key in [key for key in old if key.endswith(".to_q.bias")]:
        width, prefix = old[key].shape[0], key.removesuffix("to_q.bias")
        old[f"{prefix}proj_attn.weight"], old[f"{prefix}proj_attn.bias"] = torch.randn(width, width), torch.randn(width)
    return old


class Converted:
    """One published generator, small, with random weights: MONAI's parts and our pipeline."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(0)
        config = small(name)
        if name == "maisi-ddpm":  # DDPM in MONAI is right for all timesteps or none
            config["noise_scheduler"]["num_train_timesteps"] = 12
        if name == "maisi-rflow":  # timesteps 1000, 900, 750, 500: MONAI rounds others, see docs/monai.md
            numel = torch.tensor(LATENT_SHAPES[name]).prod().item()
            config["noise_scheduler"]["base_img_size_numel"] = numel / 27
        self.name, self.scale = name, SCALE[name]
        self.autoencoder, self.unet, self.scheduler = monai_parts(name, config)
        awaken(self.autoencoder)
        awaken(self.unet)
        vae_file, unet_file = folder / "vae.pt", folder / "unet.pt"
        if name in ("brats", "brain"):  # published in the layout of GenerativeModels
            torch.save(to_generative_models(self.autoencoder.state_dict()), vae_file)
            torch.save(to_generative_models(self.unet.state_dict()), unet_file)
            factor = self.scale
        else:
            torch.save(self.autoencoder.state_dict(), vae_file)
            content = {"unet_state_dict": self.unet.state_dict(), "scale_factor": torch.tensor(self.scale), "epoch": 3}
            torch.save(content, unet_file)
            factor = None
        self.latent_shape = LATENT_SHAPES[name]
        factor_of_size = 2 ** (len(config["autoencoder_def"].get("channels", [0, 0, 0])) - 1)
        self.conversion: Conversion = convert_bundle(
            read_bundle([write_config(folder, config)]),
            vae_file,
            unet_file,
            scale_factor=factor,
            volume_shape=[side * factor_of_size for side in self.latent_shape],
            spacing=None if name != "brain" else [1.0, 1.0, 1.0],
            class_names={"ct": 1, "mri_t1": 9} if name == "maisi-rflow" else None,
        )
        self.pipeline: MedDiffusion3DPipeline = self.conversion.pipeline
        self.pipeline.set_progress_bar_config(disable=True)

    def monai_inputs(self, batch: int) -> dict[str, torch.Tensor]:
        """What the published samplers hand to MONAI's UNet besides latent and timestep."""
        if self.name == "brain":
            values = torch.tensor([[0.0, 0.1, 0.2, 0.4]]).repeat(batch, 1)
            return {"context": values[:, None]}
        if self.name == "maisi-ddpm":
            return {
                "top_region_index_tensor": 100 * torch.tensor([[0.0, 1, 0, 0]]).repeat(batch, 1),
                "bottom_region_index_tensor": 100 * torch.tensor([[0.0, 0, 1, 0]]).repeat(batch, 1),
                "spacing_tensor": 100 * torch.tensor([[1.5, 1.5, 2.0]]).repeat(batch, 1),
            }
        if self.name == "maisi-rflow":
            return {
                "spacing_tensor": 100 * torch.tensor([[1.5, 1.5, 2.0]]).repeat(batch, 1),
                "class_labels": torch.full((batch,), 9),
            }
        return {}

    def monai_predict(self, latents: torch.Tensor, t: float) -> torch.Tensor:
        inputs = self.monai_inputs(len(latents))
        if self.name == "brain":
            maps = inputs["context"][:, 0][..., None, None, None].expand(-1, -1, *latents.shape[2:])
            latents = torch.cat([latents, maps], dim=1)
        return self.unet(latents, timesteps=torch.tensor([t] * len(latents)), **inputs)

    def our_arguments(self) -> dict[str, Any]:
        if self.name == "brain":
            return {"conditions": {"gender": 0.0, "age": 0.1, "ventricular_vol": 0.2, "brain_vol": 0.4}}
        if self.name == "maisi-ddpm":
            regions = {"top_region": "chest", "bottom_region": "abdomen"}
            return {"spacing": (1.5, 1.5, 2.0), "conditions": regions}
        if self.name == "maisi-rflow":
            return {"spacing": (1.5, 1.5, 2.0), "class_labels": "mri_t1"}
        return {}


@pytest.fixture(scope="module")
def convert_once(tmp_path_factory) -> Callable[[str], Converted]:
    """Each published generator is converted once for all tests, which leave it as it is."""
    return cache(lambda name: Converted(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(params=list(PUBLISHED))
def converted(request, convert_once) -> Converted:
    return convert_once(request.param)


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_networks_at_the_published_size_have_the_tensors_of_monais_own(name, tmp_path):
    config = read_bundle([write_config(tmp_path, PUBLISHED[name])])
    with torch.device("meta"):
        autoencoder, unet, _ = monai_parts(name, PUBLISHED[name])
        ours = build_autoencoder(config.autoencoder)
        our_unet = build_unet(config.unet, ours.latent_channels, config.context_names)
    for theirs, mine in ((autoencoder, ours), (unet, our_unet)):
        expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
        assert {key: tuple(value.shape) for key, value in mine.state_dict().items()} == expected
    assert sum(p.numel() for p in our_unet.parameters()) > 1e8


def test_published_sizes_and_spacings_are_read_where_they_stand_in_plain_numbers(tmp_path):
    read = {name: read_bundle([write_config(tmp_path, PUBLISHED[name])]) for name in PUBLISHED}
    assert read["brats"].latent_shape == (36, 44, 28) and read["brats"].spacing == (1.1, 1.1, 1.1)
    assert read["brain"].latent_shape is None and read["brain"].spacing is None  # expressions, not evaluated
    assert read["brain"].context_names == ("gender", "age", "ventricular_vol", "brain_vol")
    assert read["maisi-ddpm"].latent_shape is None and read["maisi-ddpm"].volume_shape == (512, 512, 512)
    assert read["maisi-rflow"].volume_shape == (256, 256, 128)
    assert read["maisi-rflow"].unet_files == ("diff_unet_3d_rflow-mr-brain_v1.pt",)
    assert read["maisi-ddpm"].autoencoder_files == ("autoencoder_epoch273.pt",)
    assert read["maisi-ddpm"].unet_files == ("input_unet3d_data.pt",)
    assert read["maisi-rflow"].scale_factor is None  # that of the mask generator is another one's


@pytest.mark.slow
@torch.no_grad()
def test_encode_and_decode_equal_monais(converted):
    vae = converted.pipeline.vae
    volumes = torch.rand(1, 1, *converted.pipeline.config.volume_shape)
    mean, sigma = converted.autoencoder.encode(volumes)
    posterior = vae.encode(volumes).latent_dist
    torch.testing.assert_close(posterior.mean, mean, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(posterior.std, sigma, atol=5e-5, rtol=1e-5)
    assert mean.std() > 1e-3

    latents = torch.randn(1, *mean.shape[1:])
    decoded = converted.autoencoder.decode_stage_2_outputs(latents / converted.scale)
    torch.testing.assert_close(vae.decode(latents / converted.scale).sample, decoded, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode_latents(latents), decoded.clamp(0, 1), atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(vae.encode_latents(volumes), mean * converted.scale, atol=5e-5, rtol=1e-5)


@torch.no_grad()
def test_one_step_of_the_unet_equals_monais(converted):
    pipeline = converted.pipeline
    latents = torch.randn(2, pipeline.vae.latent_channels, *converted.latent_shape)
    arguments = converted.our_arguments()
    labels = pipeline.encode_class_labels(arguments.get("class_labels"), 2)
    conditions = pipeline.encode_conditions(arguments.get("conditions"), arguments.get("spacing"), 2)
    prediction = pipeline.predict(latents, 7.0, labels, conditions=conditions)
    sign = -1 if converted.name == "maisi-rflow" else 1
    expected = converted.monai_predict(latents, 7.0)
    torch.testing.assert_close(prediction, sign * expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 1e-3
    if conditions:
        other = {name: value + 1 for name, value in conditions.items()}
        assert (pipeline.predict(latents, 7.0, labels, conditions=other) - prediction).abs().max() > 1e-6


def in_double(*schedulers: Any) -> None:
    """float64 products of alphas. In float32 both libraries lose digits in 1 - alpha and diffusers' DDPM in beta, which
    it takes from a ratio of two such products: up to 4e-4 in a whole run (docs/monai.md), and no fault of the
    conversion.
    """
    for scheduler in schedulers:
        scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), dim=0)


def monai_flow(converted: Converted, scheduler: Any, image: torch.Tensor, steps: int) -> torch.Tensor:
    """NV-Generate's loop."""
    scheduler.set_timesteps(steps, input_img_size_numel=image[0, 0].numel())
    for t, next_t in zip(scheduler.timesteps, [*scheduler.timesteps[1:], torch.tensor(0)], strict=True):
        image, _ = scheduler.step(converted.monai_predict(image, t.item()), t, image, next_t)
    return image


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("transform", "steps", "tolerance"), [(False, 50, 1e-5), (True, 30, FLOW_ROUNDING)])
def test_a_flow_equals_monais_at_usual_numbers_of_steps_up_to_monais_rounding(
    convert_once, tmp_path, transform, steps, tolerance
):
    converted = convert_once("maisi-rflow")
    numel = torch.tensor(converted.latent_shape).prod().item()
    definition = {**PUBLISHED["maisi-rflow"]["noise_scheduler"], "base_img_size_numel": numel / 27}
    definition["use_timestep_transform"] = transform
    theirs = ConfigParser({"scheduler": definition}).get_parsed_content("scheduler")
    config = read_bundle([write_config(tmp_path, {**small("maisi-rflow"), "noise_scheduler": definition})])
    pipeline = copy.copy(converted.pipeline)
    pipeline.scheduler = build_scheduler(config.scheduler, converted.latent_shape)
    noise = torch.randn(1, 4, *converted.latent_shape)
    expected = monai_flow(converted, theirs, noise, steps)
    arguments = {"latents": noise, "num_inference_steps": steps, "output_type": "latent", **converted.our_arguments()}
    torch.testing.assert_close(pipeline(**arguments).volumes, expected, atol=tolerance, rtol=1e-5)
    assert (expected - noise).abs().max() > 0.1 and converted.pipeline.scheduler.config.shift == pytest.approx(3)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "double", "tolerance"),
    [
        ("brats", False, 1e-5),
        ("brain", False, 1e-5),
        ("maisi-rflow", False, 1e-5),
        ("maisi-ddpm", True, 1e-5),
        ("maisi-ddpm", False, DDPM_ROUNDING),
    ],
)
def test_a_whole_sampling_run_equals_monais_from_the_same_noise(convert_once, name, double, tolerance):
    converted = convert_once(name)
    pipeline, scheduler = copy.copy(converted.pipeline), copy.deepcopy(converted.scheduler)
    pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
    noise = torch.randn(1, pipeline.vae.latent_channels, *converted.latent_shape)
    generator = torch.Generator().manual_seed(5)
    steps = {"brats": 5, "brain": 4, "maisi-ddpm": 12, "maisi-rflow": 4}[converted.name]

    if converted.name == "maisi-rflow":
        image = monai_flow(converted, scheduler, noise, steps)
        assert scheduler.timesteps.tolist() == [1000, 900, 750, 500]
    else:
        image, extra = noise, {}
        scheduler.set_timesteps(steps)
        if converted.name == "maisi-ddpm":
            extra["generator"] = generator
            if double:
                in_double(scheduler, pipeline.scheduler)
        for t in scheduler.timesteps:
            image, _ = scheduler.step(converted.monai_predict(image, t.item()), t, image, **extra)
    expected = converted.autoencoder.decode_stage_2_outputs(image / converted.scale)

    arguments = {"latents": noise, "num_inference_steps": steps, **converted.our_arguments()}
    latents = pipeline(**arguments, output_type="latent", generator=torch.Generator().manual_seed(5)).volumes
    torch.testing.assert_close(latents, image, atol=tolerance * max(1.0, image.abs().max().item()), rtol=1e-5)
    out = pipeline(**arguments, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(out.volumes, expected.clamp(0, 1), atol=tolerance, rtol=1e-5)
    assert (image - noise).abs().max() > 0.1
    if "spacing" in arguments:
        assert out.spacing == (1.5, 1.5, 2.0)
        assert out.affine.diagonal().tolist() == [1.5, 1.5, 2.0, 1.0]


@torch.no_grad()
def test_guidance_of_maisi_equals_nv_generates_against_class_zero(convert_once):
    converted = convert_once("maisi-rflow")
    latents = torch.randn(1, 4, *converted.latent_shape)
    inputs = converted.monai_inputs(2)
    inputs["class_labels"] = torch.tensor([9, 0])
    conditional, null = converted.unet(latents.repeat(2, 1, 1, 1, 1), torch.tensor([7.0, 7.0]), **inputs).chunk(2)
    expected = -(null + 15 * (conditional - null))
    pipeline = converted.pipeline
    labels = pipeline.encode_class_labels("mri_t1", 1)
    conditions = pipeline.encode_conditions(None, (1.5, 1.5, 2.0), 1)
    torch.testing.assert_close(pipeline.predict(latents, 7.0, labels, 15.0, conditions), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_saved_maisi_pipeline_loads_with_equal_volumes(convert_once, tmp_path):
    converted = convert_once("maisi-rflow")
    converted.pipeline.save_pretrained(tmp_path / "saved")
    loaded = MedDiffusion3DPipeline.from_pretrained(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.class_names == {"ct": 1, "mri_t1": 9}
    arguments = {"class_labels": "mri_t1", "spacing": (1.5, 1.5, 2.0), "num_inference_steps": 2}
    volumes = [p(**arguments, generator=torch.Generator().manual_seed(1)).volumes for p in (converted.pipeline, loaded)]
    assert torch.equal(*volumes)


@torch.no_grad()
def test_conditions_of_a_pipeline_are_checked_at_the_door(convert_once, tiny_pipeline):
    pipeline = convert_once("maisi-ddpm").pipeline
    with pytest.raises(ValueError, match=r"missing \['top_region', 'bottom_region'\]"):
        pipeline(num_inference_steps=1)
    with pytest.raises(ValueError, match="'head', 'chest', 'abdomen', 'pelvis'"):
        pipeline(num_inference_steps=1, conditions={"top_region": "toe", "bottom_region": 0})
    with pytest.raises(ValueError, match="three positive numbers"):
        pipeline(num_inference_steps=1, spacing=(1, -1, 1), conditions={"top_region": 0, "bottom_region": 1})
    with pytest.raises(ValueError, match="encode_conditions"):
        pipeline.unet(torch.zeros(1, 4, 8, 8, 8), 0)
    with pytest.raises(ValueError, match="takes no conditions"):
        tiny_pipeline(conditions={"age": 3})
    with pytest.raises(ValueError, match="knows one spacing"):
        tiny_pipeline(spacing=(1, 1, 1))


@torch.no_grad()
def test_splitting_convolutions_changes_nothing_and_sizes_that_do_not_split_are_refused(convert_once):
    vae = copy.deepcopy(convert_once("maisi-ddpm").pipeline.vae)
    volumes = torch.rand(1, 1, 16, 128, 16)
    split = vae.encode(volumes).latent_dist.mean
    with pytest.raises(ValueError, match=r"latent side of 16 .* cannot be computed in 8 parts"):
        vae.encode(volumes[:, :, :, :64])
    assert [vae.fitting_splits(16, (4, side, 4)) for side in (16, 32, 12, 7, 64)] == [4, 8, 3, 1, 16]
    vae.set_num_splits(1)
    torch.testing.assert_close(vae.encode(volumes).latent_dist.mean, split, atol=1e-5, rtol=1e-5)
    assert vae.to(torch.bfloat16).decode_latents(torch.randn(1, 4, 4, 4, 4)).isfinite().all()


def scheduler_of(tmp_path: Path, definition: dict[str, Any], **entries: Any) -> Any:
    config = read_bundle([write_config(tmp_path, {**small("brats"), **entries, "noise_scheduler": definition})])
    return build_scheduler(config.scheduler, (8, 8, 8), config.timestep_spacing, config.zero_terminal_snr)


def monai_target(name: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": f"monai.networks.schedulers.{name}", **arguments}


@pytest.mark.parametrize(
    ("definition", "steps"),
    [
        (monai_target("DDIMScheduler", schedule="linear_beta", prediction_type="v_prediction"), 7),
        (monai_target("DDIMScheduler", schedule="cosine", set_alpha_to_one=False), 7),
        (monai_target("DDIMScheduler", schedule="sigmoid_beta", sig_range=4, prediction_type="sample"), 10),
        (monai_target("DDPMScheduler", schedule="scaled_linear_beta", variance_type="fixed_large"), 20),
        (monai_target("DDPMScheduler", beta_end=0.1, clip_sample_min=-2.0, clip_sample_max=2.0), 20),
    ],
)
def test_every_noise_schedule_prediction_type_and_clipping_samples_as_in_monai(tmp_path, definition, steps):
    definition["num_train_timesteps"] = 20
    ours = scheduler_of(tmp_path, definition)
    theirs = ConfigParser({"scheduler": definition}).get_parsed_content("scheduler")
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    if isinstance(ours, DDPMScheduler):
        in_double(ours, theirs)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    image = other = torch.randn(1, 2, 4, 4, 4)
    for t in ours.timesteps:
        extra = [{"generator": g} if isinstance(ours, DDPMScheduler) else {} for g in generators]
        image = ours.step(torch.tanh(image), t, image, **extra[0]).prev_sample
        other, _ = theirs.step(torch.tanh(other), t, other, **extra[1])
    torch.testing.assert_close(image, other, atol=1e-5, rtol=1e-5)


def test_bundles_of_monai_before_1_6_keep_the_timesteps_they_were_published_with(tmp_path):
    definition = PUBLISHED["brats"]["noise_scheduler"]
    old, new = (scheduler_of(tmp_path, definition, monai_version=version) for version in ("1.4.0", "1.6.1"))
    for scheduler in (old, new):
        scheduler.set_timesteps(50)
    assert old.timesteps.tolist() == [20 * i for i in reversed(range(50))]
    assert new.timesteps[:2].tolist() == [999, 979]
    assert isinstance(new, DDIMScheduler) and not new.config.clip_sample


def test_the_shift_of_a_flow_is_monais_timestep_transform_up_to_monais_rounding(tmp_path):
    definition = PUBLISHED["maisi-rflow"]["noise_scheduler"]
    config = {**PUBLISHED["maisi-rflow"], "noise_scheduler": definition}
    ours = build_scheduler(read_bundle([write_config(tmp_path, config)]).scheduler, (64, 64, 32))
    assert isinstance(ours, FlowMatchEulerDiscreteScheduler)
    theirs = ConfigParser({"scheduler": definition}).get_parsed_content("scheduler")
    theirs.set_timesteps(30, input_img_size_numel=64 * 64 * 32)
    ours.set_timesteps(sigmas=[1 - i / 30 for i in range(30)])
    assert (ours.timesteps - theirs.timesteps).abs().max() <= 0.25  # MONAI's are float16
    assert ours.config.shift == pytest.approx(4 ** (1 / 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clip_sample": True, "clip_sample_min": 0.0}, "around 0"),
        ({"steps_offset": 1}, "steps_offset=1"),
        ({"beta_strat": 0.1}, "beta_strat"),
    ],
)
def test_scheduler_options_that_diffusers_does_not_have_are_refused(tmp_path, change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        scheduler_of(tmp_path, {**PUBLISHED["brats"]["noise_scheduler"], **change})


def changed_weights(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Convert the small BraTS generator after changing the UNet's weights."""
    config = small("brats")
    autoencoder, unet, _ = monai_parts("brats", config)
    state = unet.state_dict()
    change(state)
    torch.save(autoencoder.state_dict(), tmp_path / "vae.pt")
    torch.save(state, tmp_path / "unet.pt")
    read = read_bundle([write_config(tmp_path, config)])
    convert_bundle(read, tmp_path / "vae.pt", tmp_path / "unet.pt", scale_factor=1.0)


def test_weights_that_do_not_match_are_listed_and_refused(tmp_path):
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["control.weight"] = torch.zeros(1)
        state["time_embed.0.weight"] = torch.zeros(3, 3)
        del state["conv_in.conv.bias"]

    with pytest.raises(ValueError, match="1 missing: conv_in.conv.bias") as caught:
        changed_weights(tmp_path, spoil)
    assert "1 unexpected: control.weight" in str(caught.value)
    assert r"1 of another shape: time_embed.0.weight: (3, 3) instead of (32, 8)" in str(caught.value)
