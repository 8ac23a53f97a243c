"""The pipeline's call: schedulers, guidance, partial noising, seeds, outputs, and what is refused at the door."""

import nibabel
import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from monai.data import DataLoader, MetaTensor

from diffusers_med3d import DiffusionUNet3D, MedDiffusion3DPipeline
from diffusers_med3d.models import DiffusionUNet3DOutput
from diffusers_med3d.pipelines.med_diffusion_3d import guided_prediction
from diffusers_med3d.trainers.diffusion import default_scheduler

SCHEDULERS = [
    DDPMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    EulerDiscreteScheduler,
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def swap_scheduler(pipeline: MedDiffusion3DPipeline, scheduler_class: type, **changes) -> MedDiffusion3DPipeline:
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **changes)
    return pipeline


class IdealDenoiser(DiffusionUNet3D):
    """The exact prediction for data ~ N(MEAN, STD^2) in every voxel, so that samples must follow that law."""

    MEAN, STD = 0.7, 0.5
    alphas_cumprod: np.ndarray
    prediction_type: str

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        times = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1).numpy()
        sigmas = np.interp(times, np.arange(1000), ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5)
        alpha = float((1 / (1 + sigmas[0] ** 2)) ** 0.5)
        sigma = float((1 - alpha**2) ** 0.5)
        noise = sigma * (sample - alpha * self.MEAN) / (alpha**2 * self.STD**2 + sigma**2)
        clean = (sample - sigma * noise) / alpha
        prediction = {"epsilon": noise, "sample": clean, "v_prediction": alpha * noise - sigma * clean}
        return DiffusionUNet3DOutput(sample=prediction[self.prediction_type])


def ideal_denoiser(pipeline: MedDiffusion3DPipeline) -> IdealDenoiser:
    """In place of the pipeline's UNet, for its scheduler."""
    ideal = IdealDenoiser.from_config(dict(pipeline.unet.config)).eval()
    ideal.alphas_cumprod = pipeline.scheduler.alphas_cumprod.double().numpy()
    ideal.prediction_type = pipeline.scheduler.config.prediction_type
    return ideal


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_every_scheduler_and_prediction_type_samples_the_distribution_of_an_ideal_denoiser(
    tiny_pipeline, scheduler_class, prediction_type
):
    """A missing scale_model_input or init_noise_sigma, or clipped latents, moves mean or spread by more than 0.03."""
    swap_scheduler(tiny_pipeline, scheduler_class, prediction_type=prediction_type, timestep_spacing="trailing")
    tiny_pipeline.unet = ideal_denoiser(tiny_pipeline)
    latents = tiny_pipeline(
        num_samples=64,  # 16,384 values
        num_inference_steps=500
        if scheduler_class is DDPMScheduler
        else 100,  # its variance is exact for small steps only
        eta=0.5,
        generator=seeded(),
        output_type="latent",
    ).volumes
    assert latents.mean().item() == pytest.approx(IdealDenoiser.MEAN, abs=0.03)
    assert latents.std().item() == pytest.approx(IdealDenoiser.STD, abs=0.03)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_every_scheduler_repeats_itself_whatever_ran_before(tiny_pipeline, tiny_volumes, scheduler_class):
    swap_scheduler(tiny_pipeline, scheduler_class)

    def call() -> torch.Tensor:
        return tiny_pipeline(2, [0, None], num_inference_steps=4, guidance_scale=2.0, generator=seeded()).volumes

    first = call()
    partly = tiny_pipeline(volumes=tiny_volumes, strength=0.5, num_inference_steps=4, generator=seeded()).volumes
    assert torch.equal(call(), first)
    again = tiny_pipeline(volumes=tiny_volumes, strength=0.5, num_inference_steps=4, generator=seeded()).volumes
    assert torch.equal(again, partly) and torch.isfinite(partly).all()


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_with_a_generator_per_sample_a_sample_does_not_depend_on_its_batch(tiny_pipeline, scheduler_class):
    swap_scheduler(tiny_pipeline, scheduler_class)
    options = {"num_inference_steps": 5, "eta": 1.0, "guidance_scale": 1.5}
    together = tiny_pipeline(class_labels=[0, 1, 2], generator=[seeded(i) for i in range(3)], **options).volumes
    for i in range(3):
        alone = tiny_pipeline(class_labels=[i], generator=[seeded(i)], **options).volumes
        assert (alone[0] - together[i]).abs().max() <= 1e-4
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [3, 5, 9, 12])
def test_full_noise_from_pure_noise_is_finite(tiny_pipeline, steps):
    """1 - alpha - sigma^2 of DDIM is -6e-8 at the first of these steps in float32: its root is NaN."""
    tiny_pipeline.scheduler = default_scheduler("v_prediction")
    out = tiny_pipeline(num_inference_steps=steps, eta=1.0, generator=seeded(), output_type="latent")
    assert out.volumes.isfinite().all()


def test_volumes_are_float32_in_the_unit_range_with_a_centred_ras_affine(tiny_pipeline):
    out = tiny_pipeline(num_samples=2, volume_shape=(16, 24, 32), num_inference_steps=2)
    assert out.volumes.shape == (2, 1, 16, 24, 32) and out.volumes.dtype == torch.float32
    assert out.volumes.min() >= 0 and out.volumes.max() <= 1
    assert out.spacing == (12.0, 12.0, 12.0)
    assert nibabel.aff2axcodes(out.affine) == ("R", "A", "S")
    centre = out.affine @ [7.5, 11.5, 15.5, 1]
    assert centre.tolist() == [0, 0, 0, 1]


def test_output_types(tiny_pipeline):
    options = {"num_samples": 2, "num_inference_steps": 2}
    tensor = tiny_pipeline(generator=seeded(), **options).volumes
    array = tiny_pipeline(generator=seeded(), output_type="np", **options).volumes
    latents = tiny_pipeline(generator=seeded(), output_type="latent", **options)
    assert isinstance(array, np.ndarray) and np.array_equal(array, tensor.numpy())
    assert latents.volumes.shape == (2, 4, 4, 4, 4)
    assert torch.equal(tiny_pipeline.decode_latents(latents.volumes), tensor)
    with pytest.raises(ValueError, match="latents have no affine"):
        latents.save_nifti("nowhere")
    volumes, affine, spacing = tiny_pipeline(generator=seeded(), return_dict=False, **options)
    assert torch.equal(volumes, tensor) and affine.shape == (4, 4) and spacing == (12.0, 12.0, 12.0)


def test_given_latents_are_where_sampling_starts(tiny_pipeline):
    latents = torch.randn((2, 4, 4, 4, 4), generator=seeded(4))
    for scheduler_class in (DDIMScheduler, EulerDiscreteScheduler):
        swap_scheduler(tiny_pipeline, scheduler_class)
        drawn = tiny_pipeline(num_samples=2, num_inference_steps=3, generator=seeded(4)).volumes
        given = tiny_pipeline(latents=latents.clone(), num_inference_steps=3, generator=seeded(5)).volumes
        assert torch.equal(given, drawn)


def test_class_labels_may_be_indices_names_none_or_a_tensor(tiny_pipeline):
    labels = tiny_pipeline.encode_class_labels([0, "old", None, "middle"], 4)
    assert labels.tolist() == [0, 2, 3, 1] and labels.dtype == torch.long
    assert tiny_pipeline.encode_class_labels("old", 2).tolist() == [2, 2]
    assert tiny_pipeline.encode_class_labels(None, 2).tolist() == [3, 3]
    assert tiny_pipeline.encode_class_labels(torch.tensor([1, 3]), 2).tolist() == [1, 3]


def test_the_class_changes_the_sample_and_no_class_is_the_null_class(tiny_pipeline):
    def call(label) -> torch.Tensor:
        return tiny_pipeline(class_labels=label, num_inference_steps=3, generator=seeded()).volumes

    assert (call(0) - call(2)).abs().max() > 1e-4
    assert torch.equal(call(None), call(3))
    assert torch.equal(call("old"), call(2))


def test_guidance_is_null_plus_scale_times_the_difference_in_one_forward_of_twice_the_batch(tiny_unet):
    sample, labels = torch.randn(3, 4, 4, 4, 4), torch.tensor([0, 1, 2])
    times = torch.tensor([10, 500, 900])
    batches = []
    tiny_unet.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    with torch.no_grad():
        guided = guided_prediction(tiny_unet, sample, times, labels, 3.0)
        plain = guided_prediction(tiny_unet, sample, times, labels, 1.0)
        assert batches == [6, 3]
        conditional = tiny_unet(sample, times, labels).sample
        null = tiny_unet(sample, times, None).sample
    assert torch.equal(plain, conditional)
    assert torch.allclose(guided, null + 3 * (conditional - null), atol=1e-5)
    assert (guided - plain).abs().max() > 1e-3


def test_guidance_of_a_half_precision_network_comes_back_in_the_dtype_of_the_sample(tiny_unet):
    with torch.no_grad():
        out = guided_prediction(tiny_unet.bfloat16(), torch.randn(1, 4, 4, 4, 4), 5, torch.tensor([0]), 2.0)
    assert out.dtype == torch.float32


def test_strength_0_is_the_round_trip_and_strength_1_a_full_sample(tiny_pipeline, tiny_volumes):
    round_trip = tiny_pipeline.vae.decode_latents(tiny_pipeline.vae.encode_latents(tiny_volumes))
    unchanged = tiny_pipeline(volumes=tiny_volumes, strength=0.0, num_inference_steps=10).volumes
    assert (unchanged - round_trip).abs().max() <= 1e-5
    full = tiny_pipeline(num_samples=3, num_inference_steps=10, generator=seeded()).volumes
    noised = tiny_pipeline(volumes=tiny_volumes, strength=1.0, num_inference_steps=10, generator=seeded()).volumes
    assert torch.equal(noised, full)


@pytest.mark.parametrize("scheduler_class", SCHEDULERS)
def test_partial_noising_runs_the_last_steps_and_moves_further_with_more_strength(
    tiny_pipeline, tiny_volumes, scheduler_class
):
    swap_scheduler(tiny_pipeline, scheduler_class)
    tiny_pipeline.unet = ideal_denoiser(tiny_pipeline)
    start = tiny_pipeline.encode_latents(tiny_volumes)
    distances, steps = [], []
    for strength in (0.1, 0.3, 0.6, 0.9):
        out = tiny_pipeline(
            volumes=tiny_volumes,
            strength=strength,
            num_inference_steps=20,
            generator=seeded(),
            output_type="latent",
            callback_on_step_end=lambda pipeline, i, t, tensors: steps.append(pipeline.num_timesteps) or {},
        )
        distances.append((out.volumes - start).square().mean().sqrt().item())
    assert steps == [2] * 2 + [6] * 6 + [12] * 12 + [18] * 18
    assert distances == sorted(distances) and distances[-1] > 2 * distances[0]


def test_partial_noising_takes_monai_tensors_and_gives_plain_ones(tiny_pipeline, tiny_volumes):
    options = {"strength": 0.5, "num_inference_steps": 2}
    scans = [MetaTensor(volume, affine=np.diag([2.0, 2, 2 + i, 1])) for i, volume in enumerate(tiny_volumes)]
    (batch,) = DataLoader(scans, batch_size=3)
    plain = tiny_pipeline(volumes=tiny_volumes, generator=seeded(), **options)
    for volumes in (scans, batch):
        out = tiny_pipeline(volumes=volumes, generator=seeded(), **options)
        assert type(out.volumes) is torch.Tensor and torch.equal(out.volumes, plain.volumes)
        assert out.affine[:, 2, 2].tolist() == [2.0, 3.0, 4.0]


def test_a_stack_that_lost_the_affines_of_all_but_the_first_scan_is_refused(tiny_pipeline, tiny_volumes):
    stack = torch.stack(
        [MetaTensor(volume, affine=np.diag([2.0, 2, 2 + i, 1])) for i, volume in enumerate(tiny_volumes)]
    )
    options = {"volumes": stack, "strength": 0.5, "num_inference_steps": 2}
    with pytest.raises(ValueError, match=r"this batch of 3 scans brings 1 affine\(s\); pass a list of scans"):
        tiny_pipeline(**options)
    assert np.array_equal(tiny_pipeline(affine=np.eye(4), **options).affine, np.eye(4))


def test_partial_noising_keeps_the_affine_it_is_given(tiny_pipeline, tiny_volumes):
    options = {"volumes": tiny_volumes, "strength": 0.5, "num_inference_steps": 4}
    affines = np.stack([np.diag([2.0, 2, 2, 1])] * 3)
    affines[:, 0, 3] = [1, 2, 3]
    assert np.array_equal(tiny_pipeline(affine=affines, **options).affine, affines)
    assert np.array_equal(tiny_pipeline(**options).affine, tiny_pipeline.affine())


def test_save_nifti_writes_the_voxels_and_the_true_affine(tiny_pipeline, tmp_path):
    out = tiny_pipeline(num_samples=2, num_inference_steps=2)
    paths = out.save_nifti(tmp_path / "new", prefix="brain")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["brain-0000.nii.gz", "brain-0001.nii.gz"]
    for path, volume in zip(paths, out.volumes, strict=True):
        image = nibabel.load(path)
        assert np.array_equal(image.get_fdata(dtype=np.float32), volume[0].numpy())
        assert np.array_equal(image.affine, out.affine) and not np.array_equal(image.affine, np.eye(4))
        assert np.allclose(image.get_qform(), out.affine) and int(image.header["qform_code"]) == 2
        assert image.header.get_zooms() == out.spacing and image.header.get_xyzt_units()[0] == "mm"


def test_save_nifti_does_not_overwrite_unless_told(tiny_pipeline, tmp_path):
    out = tiny_pipeline(num_inference_steps=2)
    out.save_nifti(tmp_path)
    with pytest.raises(FileExistsError, match="sample-0000.nii.gz"):
        out.save_nifti(tmp_path)
    assert out.save_nifti(tmp_path, overwrite=True)[0].exists()


def test_a_callback_sees_each_step_and_may_change_the_latents(tiny_pipeline):
    seen = []

    def halve(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), set(tensors), pipeline.guidance_scale))
        return {"latents": tensors["latents"] * 0.5}

    options = {"num_inference_steps": 3, "output_type": "latent", "guidance_scale": 2.0}
    plain = tiny_pipeline(generator=seeded(), **options).volumes
    changed = tiny_pipeline(
        generator=seeded(),
        callback_on_step_end=halve,
        callback_on_step_end_tensor_inputs=["latents", "class_labels"],
        **options,
    ).volumes
    assert [entry[0] for entry in seen] == [0, 1, 2]
    assert [entry[1] for entry in seen] == tiny_pipeline.scheduler.timesteps.tolist()
    assert seen[0][2:] == ({"latents", "class_labels"}, 2.0)
    assert changed.std() < plain.std()
    watched = tiny_pipeline(generator=seeded(), callback_on_step_end=lambda *given: None, **options).volumes
    assert torch.equal(watched, plain)


def test_a_progress_bar_counts_the_steps(tiny_pipeline, capfd):
    tiny_pipeline.set_progress_bar_config(disable=False)
    tiny_pipeline(num_inference_steps=3)
    assert "3/3" in capfd.readouterr().err


def test_a_call_leaves_weights_modes_and_configs_as_they_were(tiny_pipeline, tiny_volumes):
    before = {name: part.config for name, part in tiny_pipeline.components.items()}
    weights = {key: value.clone() for key, value in tiny_pipeline.unet.state_dict().items()}
    tiny_pipeline.unet.train()
    out = tiny_pipeline(volumes=tiny_volumes, strength=0.5, num_inference_steps=4, guidance_scale=2.0)
    assert not out.volumes.requires_grad and tiny_pipeline.unet.training
    assert {name: part.config for name, part in tiny_pipeline.components.items()} == before
    assert all(torch.equal(value, weights[key]) for key, value in tiny_pipeline.unet.state_dict().items())


def test_offloading_brings_the_autoencoder_to_the_device_before_it_works(tiny_pipeline, tiny_volumes):
    """enable_model_cpu_offload acts on forward alone, which the pipeline does not call."""

    class Counter(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    counter = Counter()
    add_hook_to_module(tiny_pipeline.vae, counter)
    tiny_pipeline(volumes=tiny_volumes[:1], strength=0.0)
    assert counter.calls == 2  # to encode and to decode


def test_decoding_in_chunks_is_decoding_at_once(tiny_pipeline):
    latents = torch.randn(5, 4, 4, 4, 4)
    with torch.no_grad():
        chunked, whole = tiny_pipeline.decode_latents(latents, chunk_size=2), tiny_pipeline.vae.decode_latents(latents)
    assert (chunked - whole).abs().max() <= 1e-5


def test_a_bfloat16_pipeline_gives_float32_volumes_near_those_of_float32(tiny_pipeline):
    options = {"class_labels": [0, 1], "num_inference_steps": 4}
    full = tiny_pipeline(generator=seeded(), **options).volumes
    half = tiny_pipeline.to(torch.bfloat16)(generator=seeded(), **options).volumes
    assert half.dtype == torch.float32
    assert (half - full).abs().mean() < 0.05


def test_a_pipeline_without_classes_samples_and_refuses_labels_and_guidance(tiny_vae, tiny_scheduler):
    unet = DiffusionUNet3D(
        in_channels=4, out_channels=4, channels=(8, 16), num_res_blocks=1, attention_levels=(False, True),
        num_head_channels=8, norm_num_groups=8,
    )  # fmt: skip
    pipeline = MedDiffusion3DPipeline(tiny_vae, unet, tiny_scheduler, volume_shape=(16, 16, 16))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_samples=2, num_inference_steps=2).volumes.shape == (2, 1, 16, 16, 16)
    with pytest.raises(ValueError, match="has no classes"):
        pipeline(class_labels=0)
    with pytest.raises(ValueError, match="guidance_scale=2.0 needs a network with classes"):
        pipeline(guidance_scale=2.0)


def test_a_vq_pipeline_samples_and_noises_partially(tiny_vq, tiny_unet, tiny_scheduler, tiny_volumes):
    pipeline = MedDiffusion3DPipeline(tiny_vq, tiny_unet, tiny_scheduler, volume_shape=(16, 16, 16))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_samples=2, num_inference_steps=2).volumes.shape == (2, 1, 16, 16, 16)
    assert pipeline(volumes=tiny_volumes, strength=0.5, num_inference_steps=2).volumes.shape == tiny_volumes.shape


def nan_volume() -> torch.Tensor:
    volume = torch.zeros(1, 1, 16, 16, 16)
    volume[0, 0, 3, 4, 5] = float("nan")
    return volume


VOLUME = torch.zeros(1, 1, 16, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1, got 0"),
        ({"class_labels": []}, "at least one sample, got class_labels of length 0"),
        ({"volumes": VOLUME[:0], "strength": 0.5}, "volumes hold no sample"),
        ({"eta": "1"}, r"eta must be a number in \[0, 1\], got '1'"),
        ({"guidance_scale": "2"}, r"guidance_scale must be a number >= 0 \(1 is off\), got '2'"),
        ({"num_inference_steps": True}, "num_inference_steps must be a whole number from 1 to 1000, got True"),
        ({"best_of": True}, "best_of must be a whole number of at least 1, got True"),
        ({"class_labels": 0.0}, "class_labels must be an index, a name, None or a list of these, got 0.0"),
        ({"class_labels": {"old"}}, "class_labels must be an index, a name, None or a list of these, got {'old'}"),
        (
            {"class_labels": {"old": 1}},
            "class_labels must be an index, a name, None or a list of these, got {'old': 1}",
        ),
        ({"num_samples": 2, "class_labels": [0]}, "num_samples: 2, class_labels: 1"),
        ({"class_labels": ["young", "ancient"]}, "unknown class 'ancient'"),
        ({"class_labels": 4}, "class label 4 is no whole number from 0 to 3"),
        ({"class_labels": [-1]}, "class label -1 is no whole number"),
        ({"class_labels": [0.5]}, "class label 0.5 is no whole number"),
        ({"num_samples": 3, "generator": [seeded(), seeded()]}, "num_samples: 3, generator: 2"),
        ({"volume_shape": (18, 16, 16)}, r"multiple of 8 .* nearest that fits is \(16, 16, 16\)"),
        ({"volume_shape": (16, 16)}, "three sides"),
        ({"volume_shape": (16, float("inf"), 16)}, r"three sides .* got \(16, inf, 16\)"),
        ({"volume_shape": 16}, "three sides .* got 16"),
        ({"volume_shape": (16, 16.5, 16)}, "whole numbers"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 1000, got 0"),
        ({"num_inference_steps": 1001}, "got 1001"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number >= 0"),
        ({"eta": 1.5}, r"eta must be a number in \[0, 1\], got 1.5"),
        ({"output_type": "pil"}, "output_type must be 'pt', 'np' or 'latent', got 'pil'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"not \['noise'\]"),
        ({"latents": torch.zeros(1, 4, 5, 4, 4)}, r"latents must have shape \(1, 4, 4, 4, 4\), got \(1, 4, 5, 4, 4\)"),
        ({"latents": torch.full((1, 4, 4, 4, 4), torch.nan)}, "latents hold 256 NaN or infinite values"),
        (
            {"latents": torch.zeros(1, 4, 4, 4, 4, dtype=torch.complex64)},
            "latents must be real numbers, got torch.compl",
        ),
        ({"latents": torch.zeros(())}, r"latents must have shape \(B, c, x, y, z\), got \(\)"),
        ({"latents": torch.zeros(1, 4, 4, 4, 4), "volumes": VOLUME, "strength": 0.5}, "not both"),
        ({"volumes": VOLUME}, "volumes and strength belong together"),
        ({"strength": 0.5}, "volumes and strength belong together"),
        ({"affine": np.eye(4)}, "affine belongs to volumes"),
        ({"volumes": VOLUME, "strength": 1.2}, r"strength must be a number in \[0, 1\], got 1.2"),
        ({"volumes": VOLUME, "strength": float("nan")}, "strength must be a number in"),
        ({"volumes": VOLUME, "strength": "0.5"}, r"strength must be a number in \[0, 1\], got '0.5'"),
        ({"volumes": VOLUME.to(torch.complex64), "strength": 0.5}, "volumes must be real numbers, got torch.complex64"),
        ({"volumes": VOLUME, "strength": 0.04, "num_inference_steps": 10}, "num_inference_steps >= 13"),
        ({"volumes": VOLUME, "strength": 0.05, "num_inference_steps": 10}, "num_inference_steps >= 11"),
        ({"volumes": VOLUME[0], "strength": 0.5}, r"volumes must have shape \(B, C, X, Y, Z\)"),
        ({"volumes": VOLUME.repeat(1, 2, 1, 1, 1), "strength": 0.5}, "volumes must have 1 channel"),
        ({"volumes": VOLUME + 2, "strength": 0.5}, r"volumes must lie in \[0, 1\], got \[2, 2\]"),
        ({"volumes": nan_volume(), "strength": 0.5}, "1 NaN or infinite"),
        ({"volumes": VOLUME[..., :14], "strength": 0.5}, "nearest that fits is"),
        ({"volumes": VOLUME, "strength": 0.5, "volume_shape": (24, 16, 16)}, "volume_shape says"),
        ({"volumes": VOLUME, "strength": 0.5, "affine": np.eye(3)}, r"affine must be \(4, 4\)"),
        ({"volumes": VOLUME, "strength": 0.5, "affine": np.full((4, 4), np.nan)}, r"and finite, got \(4, 4\): \[\[nan"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_value_found(tiny_pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline(**{"num_inference_steps": 2} | arguments)


def test_a_seed_in_place_of_a_generator_is_a_type_error(tiny_pipeline):
    with pytest.raises(TypeError, match="generator must be a torch.Generator or a list of them, got int"):
        tiny_pipeline(generator=42)


def test_an_array_in_place_of_a_tensor_is_a_type_error(tiny_pipeline):
    with pytest.raises(TypeError, match="volumes must be a torch.Tensor, got ndarray"):
        tiny_pipeline(volumes=VOLUME.numpy(), strength=0.5)
    with pytest.raises(TypeError, match=r"volumes\[0\] must be a torch.Tensor, got ndarray"):
        tiny_pipeline(volumes=[VOLUME[0].numpy()], strength=0.5)
    for latents in (np.zeros((1, 4, 4, 4, 4)), [0.0]):
        with pytest.raises(TypeError, match=f"latents must be a torch.Tensor, got {type(latents).__name__}"):
            tiny_pipeline(latents=latents)


def test_samples_that_are_not_finite_are_said_to_be_so(tiny_pipeline):
    with pytest.warns(UserWarning, match=r"2 of 2 samples hold NaN or infinite values.*guidance_scale=1e\+30"):
        out = tiny_pipeline(class_labels=[0, 1], guidance_scale=1e30, num_inference_steps=3)
    assert not out.volumes.isfinite().any()


def test_a_generator_with_position_maps_refuses_other_sizes_at_the_door(tiny_vae, tiny_scheduler):
    unet = DiffusionUNet3D(
        in_channels=4, out_channels=4, channels=(8, 16), num_res_blocks=1, attention_levels=(False, False),
        num_head_channels=8, norm_num_groups=8, position_shape=(4, 4, 4),
    )  # fmt: skip
    refused = pytest.raises(ValueError, match=r"volume_shape \(24, 16, 16\) is not \(16, 16, 16\), the only size")
    with refused:
        MedDiffusion3DPipeline(tiny_vae, unet, tiny_scheduler, volume_shape=(24, 16, 16))
    pipeline = MedDiffusion3DPipeline(tiny_vae, unet, tiny_scheduler, volume_shape=(16, 16, 16))
    for arguments in ({"volume_shape": (24, 16, 16)}, {"volumes": torch.zeros(1, 1, 24, 16, 16), "strength": 0.5}):
        with refused:
            pipeline(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"orientation": "LPS"}, "orientation must be 'RAS', got 'LPS'"),
        ({"spacing": (1.0, 0.0, 1.0)}, "spacing must be three positive numbers"),
        ({"spacing": 2}, r"spacing must be three positive numbers \(mm\), got 2"),
        ({"spacing": ("a", 1, 1)}, "spacing must be three positive numbers"),
        ({"volume_shape": (float("inf"), 16, 16)}, "three sides"),
        ({"class_names": ("young", "old")}, "class_names must name the 3 classes"),
        ({"channel_names": ("t1", "t2")}, "channel_names must be 1 name"),
        ({"volume_shape": (20, 20, 20)}, "multiple of 8"),
        ({"vae": None}, "vae must be an autoencoder, such as AutoencoderKL3D, got None"),
        ({"unet": None}, "unet must be a UNet, such as DiffusionUNet3D, got None"),
        ({"scheduler": None}, "scheduler must be a diffusers scheduler, such as DDIMScheduler, got None"),
        ({"class_names": {"a": 0.5}}, r"class_names\['a'\] must be a whole number, got 0.5"),
        ({"class_names": "abc"}, "class_names must be a list of texts, or a dict from text to index, got 'abc'"),
        ({"data_settings": "x"}, "data_settings must be a dict or None, got 'x'"),
        ({"data_settings": []}, r"data_settings must be a dict or None, got \[\]"),
        ({"intensity": None}, "intensity must be a text, got None"),
    ],
)
def test_a_pipeline_whose_parts_do_not_fit_is_not_built(tiny_vae, tiny_unet, tiny_scheduler, arguments, message):
    with pytest.raises(ValueError, match=message):
        parts = {"vae": tiny_vae, "unet": tiny_unet, "scheduler": tiny_scheduler}
        MedDiffusion3DPipeline(**parts | {"volume_shape": (16, 16, 16)} | arguments)
