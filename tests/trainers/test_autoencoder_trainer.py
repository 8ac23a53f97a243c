"""Stage 1: diffusers_med3d.trainers.autoencoder and examples/train_autoencoder.py."""

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool3d

from conftest import SPLIT, run_example
from diffusers_med3d import AutoencoderKL3D, VQModel3D
from diffusers_med3d.data import DataArguments, VolumeDataset
from diffusers_med3d.trainers.autoencoder import AutoencoderConfig, AutoencoderLosses, AutoencoderTrainer, CropDataset
from diffusers_med3d.trainers.base import last_checkpoint
from diffusers_med3d.trainers.losses import gradient_l1, spectral_l1

TRAIN = SPLIT["train"]


@pytest.fixture(scope="module")
def scans(brains_folder) -> VolumeDataset:
    args = DataArguments(brains_folder, "unused.json", volume_shape=[16, 16, 16], spacing=[12.0, 12.0, 12.0])
    return VolumeDataset(brains_folder, TRAIN, **args.reading())


def kl_model(**changes) -> AutoencoderKL3D:
    torch.manual_seed(1)
    return AutoencoderKL3D(channels=(4, 8, 8), latent_channels=2, norm_num_groups=4, **changes)


def vq_model() -> VQModel3D:
    torch.manual_seed(1)
    return VQModel3D(channels=(8, 8), num_res_channels=(8, 8), num_embeddings=8, embedding_dim=2)


def config(output_dir: Path, **changes) -> AutoencoderConfig:
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "warmup_steps": 0,
        "crop_size": 12,
        "adversarial_start": 0,
        "discriminator_channels": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "picture_steps": 0,
        "disable_tqdm": True,
        "bf16": False,
        **changes,
    }
    return AutoencoderConfig(output_dir=str(output_dir), **settings)


def make(
    output_dir: Path,
    model: torch.nn.Module,
    scans: VolumeDataset,
    cls: type[AutoencoderTrainer] = AutoencoderTrainer,
    **changes,
) -> AutoencoderTrainer:
    torch.manual_seed(5)  # the discriminator's weights
    return cls(model=model, args=config(output_dir, **changes), train_dataset=scans, eval_dataset=scans)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_weight": -1.0}, "kl_weight must be at least 0, got -1.0"),
        ({"kl_weight": float("nan")}, "kl_weight must be a number, got nan"),
        ({"discriminator_channels": 0}, "discriminator_channels must be at least 1, got 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


# --- losses ---


def test_losses_equal_numpys():
    x, y = torch.rand(2, 1, 6, 7, 8), torch.rand(2, 1, 6, 7, 8)
    a, b = x.double().numpy(), y.double().numpy()
    steps = [np.abs(np.diff(a, axis=axis) - np.diff(b, axis=axis)).mean() for axis in (2, 3, 4)]
    assert gradient_l1(x, y).item() == pytest.approx(np.mean(steps), rel=1e-5)
    half = [np.abs(np.fft.rfftn(v, axes=(2, 3, 4), norm="ortho")) for v in (a, b)]
    assert spectral_l1(x, y).item() == pytest.approx(np.abs(half[0] - half[1]).mean(), rel=1e-4)


def test_a_blurred_volume_has_a_spectral_loss_though_its_phase_is_right():
    sharp = torch.rand(1, 1, 8, 8, 8)
    assert spectral_l1(sharp, sharp).item() == 0
    assert spectral_l1(avg_pool3d(sharp, 3, 1, 1), sharp) > 0.1


@pytest.mark.slow
def test_the_discriminator_learns_to_tell_softer_volumes_from_sharp_ones(tmp_path):
    # with the norm and the weights that MONAI's starts with it was right about half of the pairs
    discriminator = AutoencoderLosses(kl_model(), config(tmp_path, discriminator_channels=8)).discriminator
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-3)

    def judged(count: int) -> list[torch.Tensor]:
        noise = torch.rand(count, 1, 20, 20, 20)
        sharp = avg_pool3d(noise, 3, 1)[..., 1:-1, 1:-1, 1:-1]
        softer = 0.5 * (sharp + avg_pool3d(avg_pool3d(noise, 3, 1), 3, 1))
        return [discriminator(volumes)[-1] for volumes in (sharp, softer)]

    for _ in range(150):
        real, fake = judged(8)
        loss = 0.5 * ((real - 1).square().mean() + fake.square().mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        real, fake = (judgement.flatten(1).mean(1) for judgement in judged(64))
    assert (real[:, None] > fake).float().mean() > 0.8


def test_each_half_of_the_adversarial_game_sends_gradients_to_its_own_player_only(tmp_path):
    losses = AutoencoderLosses(kl_model(), config(tmp_path))
    parts = losses(torch.rand(2, 1, 16, 16, 16), adversarial=True)
    players = {"autoencoder": losses.autoencoder, "discriminator": losses.discriminator}

    def touched(loss: torch.Tensor) -> list[str]:
        touched = []
        for name, module in players.items():
            gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
            touched += [name] if any(g is not None and g.any() for g in gradients) else []
        return touched

    assert touched(parts["adversarial"]) == ["autoencoder"]
    assert touched(parts["discriminator"]) == ["discriminator"]
    assert touched(parts["l1"]) == ["autoencoder"]
    total = parts["l1"] + 0.3 * parts["gradient"] + 0.3 * parts["spectral"] + 1e-4 * parts["kl"]
    total = total + 0.01 * parts["adversarial"] + parts["discriminator"]
    assert parts["loss"].item() == pytest.approx(total.item(), rel=1e-5)


# --- crops ---


def test_crops_are_pieces_of_the_scans_that_show_some_of_the_brain(scans):
    crops = CropDataset(scans, crop_size=8, divisor=4)
    assert len(crops) == len(scans)
    pieces = crops.draw(torch.arange(len(crops)).repeat(8))
    assert pieces.shape == (8 * len(crops), 1, 8, 8, 8)
    assert min((piece > 0).float().mean() for piece in pieces) > 0.05
    assert len({tuple(piece.flatten().tolist()) for piece in pieces}) > len(pieces) / 2
    whole = CropDataset(scans, crop_size=0, divisor=4).draw(torch.tensor([0]))[0]
    scan = scans[0]["volume"].as_tensor()
    assert torch.equal(whole, scan) or torch.equal(whole, scan.flip(1))


@pytest.mark.parametrize("size", [10, 20])
def test_a_crop_that_cannot_be_cut_or_encoded_is_refused(scans, size):
    with pytest.raises(ValueError, match=rf"crop_size {size} must be a multiple of 4 and fit in .*\(16, 16, 16\)"):
        CropDataset(scans, crop_size=size, divisor=4)


def test_volumes_that_cannot_be_evaluated_whole_are_refused_before_training(tmp_path, brains_folder):
    args = DataArguments(brains_folder, "unused.json", volume_shape=[18, 16, 16], spacing=[12.0, 12.0, 12.0])
    with pytest.raises(ValueError, match=r"\(18, 16, 16\) must be a multiple of 4 .* fits is \(16, 16, 16\)"):
        make(tmp_path, kl_model(), VolumeDataset(brains_folder, ["sub-01"], **args.reading()))


# --- training ---


@pytest.mark.parametrize("build", [kl_model, vq_model])
def test_every_parameter_of_autoencoder_and_discriminator_moves(tmp_path, scans, build):
    trainer = make(tmp_path, build(), scans)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    still = [name for name, p in trainer.model.named_parameters() if torch.equal(p, before[name])]
    # The codebook follows the encoder by a moving average, not by a gradient; it has a test of its own.
    assert [name for name in still if "quantizer" not in name] == []
    assert any(name.startswith("discriminator") for name in before)
    losses = [row for row in trainer.state.log_history if "loss" in row]
    kind = "kl" if build is kl_model else "commitment"
    assert {"l1", "gradient", "spectral", "adversarial", "discriminator", kind} <= set(losses[0])


@pytest.mark.parametrize("build", [kl_model, vq_model])
def test_the_decoder_alone_is_trained_and_latents_stay_as_they_are(tmp_path, scans, build):
    model, volumes = build(), scans.stack()
    model.set_latent_statistics(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), None)
    latents = model.eval().encode_latents(volumes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make(tmp_path, model, scans, decoder_only=True)
    trainer.train()
    trainer.save_model()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith(("decoder", "post_quant_conv"))}
    saved = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(saved.encode_latents(volumes), latents) and list(saved.config.latents_std) == [3.0, 4.0]


def test_the_codebook_moves_and_its_use_is_reported(tmp_path, scans):
    model = vq_model()
    before = model.quantizer.quantizer.embedding.weight.detach().clone()
    trainer = make(tmp_path, model, scans)
    trainer.train()
    assert not torch.equal(model.quantizer.quantizer.embedding.weight, before)
    used = {int(i) for item in scans for i in model.index_quantize(item["volume"].as_tensor()[None]).unique()}
    assert trainer.evaluate()["eval_codes_used"] == pytest.approx(len(used) / 8)


def test_the_nearest_code_is_found_under_bf16_autocast_too():
    model = vq_model().eval()
    latents = torch.randn(2, 2, 6, 6, 6)
    codebook = model.quantizer.quantizer.embedding.weight
    codebook.copy_(1 + 0.01 * torch.randn(8, 2))  # close to one another: bf16 cannot tell them apart
    nearest = torch.cdist(latents.movedim(1, -1).reshape(-1, 2).double(), codebook.double()).argmin(1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        quantised, _ = model.quantize(latents)
    assert torch.allclose(quantised.movedim(1, -1).reshape(-1, 2), codebook[nearest], atol=1e-6)


def test_codes_that_nobody_uses_restart_at_latents_of_the_batch_in_training_only():
    model = vq_model()
    quantizer = model.quantizer.quantizer
    latents = torch.randn(1, 2, 4, 4, 4)
    rows = latents.movedim(1, -1).reshape(-1, 2)
    before = quantizer.embedding.weight.clone()
    model.eval().quantize(latents)
    assert torch.equal(quantizer.embedding.weight, before)
    model._restart_unused_codes(latents)  # the first batch: nothing was used yet
    assert all((rows == code).all(1).any() for code in quantizer.embedding.weight)
    quantizer.ema_cluster_size[:] = torch.tensor([8.0, 8, 8, 0.7, 8, 8, 0.9, 8])  # an even spread is 8, a tenth is 0.8
    before = quantizer.embedding.weight.clone()
    model._restart_unused_codes(torch.randn(1, 2, 4, 4, 4))
    changed = (quantizer.embedding.weight != before).any(1).tolist()
    assert changed == [False, False, False, True, False, False, False, False]
    assert torch.allclose(quantizer.ema_w[3] / quantizer.ema_cluster_size[3], quantizer.embedding.weight[3])


@pytest.mark.slow
def test_the_codebook_does_not_collapse(tmp_path, scans):
    torch.manual_seed(1)
    model = VQModel3D(channels=(8, 8), num_res_channels=(8, 8), num_embeddings=32, embedding_dim=4, decay=0.9)
    settings = {"max_steps": 100, "learning_rate": 1e-3, "adversarial_weight": 0.0, "crop_size": 0}
    trainer = make(tmp_path, model, scans, per_device_train_batch_size=4, **settings)
    trainer.train()
    assert trainer.evaluate()["eval_codes_used"] > 0.5


def test_the_discriminator_rests_until_its_step(tmp_path, scans):
    trainer = make(tmp_path, kl_model(), scans, adversarial_start=2, max_steps=2)
    before = [p.detach().clone() for p in trainer.model.discriminator.parameters()]
    trainer.args.weight_decay = 0.0
    trainer.train()
    assert all(torch.equal(p, old) for p, old in zip(trainer.model.discriminator.parameters(), before, strict=True))
    assert make(tmp_path, kl_model(), scans, adversarial_weight=0.0).model.discriminator is None


@pytest.mark.slow
def test_training_lowers_the_reconstruction_error(tmp_path, scans):
    trainer = make(tmp_path, kl_model(), scans, max_steps=30, learning_rate=5e-3, adversarial_weight=0.0, crop_size=0)
    before = trainer.evaluate()["eval_psnr"]
    trainer.train()
    assert trainer.evaluate()["eval_psnr"] > before + 3


def test_evaluation_reports_fidelity_and_detail_of_whole_round_trips(tmp_path, scans):
    trainer = make(tmp_path, kl_model(), scans)
    sizes = []
    first = next(m for m in trainer.autoencoder.encoder.modules() if isinstance(m, torch.nn.Conv3d))
    first.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    trainer.args.per_device_eval_batch_size = len(scans) - 1
    results = trainer.evaluate()
    assert sizes == [len(scans) - 1, 1]
    volumes = scans.stack()
    with torch.no_grad():
        round_trip = trainer.autoencoder.eval()(volumes).sample.clamp(0, 1)
    psnr = [10 * np.log10(1 / ((x - y) ** 2).mean().item()) for x, y in zip(round_trip, volumes, strict=True)]
    assert results["eval_psnr"] == pytest.approx(np.mean(psnr), abs=1e-3)
    assert {"eval_psnr_foreground", "eval_high_frequency_ratio"} <= set(results)
    trainer.eval_dataset, validation = None, trainer.eval_dataset
    assert trainer.evaluate(validation)["eval_psnr"] == results["eval_psnr"]
    with pytest.raises(ValueError, match="evaluate needs an eval_dataset"):
        trainer.evaluate()


def test_a_round_trip_of_nan_is_counted_named_and_left_out(tmp_path, scans):
    trainer = make(tmp_path, kl_model(), scans, per_device_eval_batch_size=1)
    whole = trainer.evaluate()
    assert "eval_unjudged" not in whole
    calls, broken = [], [1]

    def breaks(module, inputs, output):
        calls.append(len(calls) % len(scans))
        if calls[-1] in broken:
            output.sample = output.sample * torch.nan

    trainer.autoencoder.register_forward_hook(breaks)
    with pytest.warns(UserWarning, match=f"round trip of 1 of {len(scans)} validation scans .* the first is scan 1"):
        results = trainer.evaluate()
    assert results["eval_unjudged"] == 1 and np.isfinite(results["eval_psnr"])
    broken[:] = range(len(scans))
    with pytest.warns(UserWarning, match=f"round trip of {len(scans)} of {len(scans)} validation scans"):
        assert trainer.evaluate()["eval_psnr"] == -np.inf  # never the best checkpoint


# --- latent statistics ---


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["channel", "global"])
@pytest.mark.parametrize("with_atlas", [False, True])
def test_latent_statistics_cover_the_whole_training_set_and_are_applied_once(tmp_path, scans, scaling, with_atlas):
    trainer = make(tmp_path, kl_model(), scans, latent_scaling=scaling, latent_atlas=with_atlas)
    trainer.train()
    trainer.save_model()
    model = AutoencoderKL3D.from_pretrained(tmp_path)
    volumes = scans.stack()
    with torch.no_grad():
        mean, sigma = model.encode_moments(volumes)
        # Statistics of one scan alone are others: a first batch would not do.
        assert (mean[:1].mean((0, 2, 3, 4)) - mean.mean((0, 2, 3, 4))).abs().max() > 1e-3
        assert model.config.latents_mean == pytest.approx(mean.mean((0, 2, 3, 4)).tolist(), abs=1e-5)
        middle = mean.mean((0,) if with_atlas else (0, 2, 3, 4), keepdim=True)
        expected = ((mean - middle).square().mean((0, 2, 3, 4)) + sigma.square().mean((0, 2, 3, 4))).sqrt()
        expected = expected if scaling == "channel" else expected.min().expand(2)  # torch's median of two
        assert model.config.latents_std == pytest.approx(expected.tolist(), rel=1e-3)
        if with_atlas:
            atlas = middle[0] - mean.mean((0, 2, 3, 4))[:, None, None, None]
            torch.testing.assert_close(model.latents_atlas, atlas, atol=1e-5, rtol=1e-5)
        else:
            assert model.latents_atlas is None
        by_hand = (mean - middle) / torch.tensor(model.config.latents_std).view(1, 2, 1, 1, 1)
        torch.testing.assert_close(model.encode_latents(volumes), by_hand, atol=1e-4, rtol=1e-4)
        again = model.decode_latents(model.encode_latents(volumes))
        assert torch.allclose(again, model.decode(mean).sample.clamp(0, 1), atol=1e-5)


# --- resuming ---


@pytest.mark.slow
def test_a_resumed_run_repeats_the_uninterrupted_one_exactly(tmp_path, scans):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "ema_decay": 0.9}
    whole = make(tmp_path / "whole", kl_model(), scans, **settings)
    whole.train()

    class Killed(AutoencoderTrainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    first = make(tmp_path / "parts", kl_model(), scans, Killed, **settings)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = make(tmp_path / "parts", kl_model(), scans, **settings)
    second.train(resume_from_checkpoint=last_checkpoint(tmp_path / "parts"))
    for (name, mine), theirs in zip(second.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    for mine, theirs in zip(second.ema.shadow_params, whole.ema.shadow_params, strict=True):
        assert torch.equal(mine, theirs)


# --- the script ---


@pytest.mark.slow
def test_the_script_takes_as_many_channels_as_the_scans_have(tmp_path, brains_folder, monkeypatch):
    shutil.copytree(brains_folder, tmp_path / "scans")
    for path in (tmp_path / "scans" / "images").iterdir():
        image = nibabel.load(path)
        both = np.stack([image.get_fdata(), image.get_fdata()[::-1]], axis=-1).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(both, image.affine), path)
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    common = ["--data_dir", str(tmp_path / "scans"), "--split_file", str(tmp_path / "split.json"), "--max_steps", "1"]
    common += ["--volume_shape", "16", "16", "16", "--spacing", "12", "12", "12", "--channels", "4", "8", "8"]
    common += ["--latent_channels", "2", "--crop_size", "0", "--per_device_train_batch_size", "2"]
    common += ["--output_dir", str(tmp_path / "out"), "--adversarial_weight", "0"]
    run_example(monkeypatch, "train_autoencoder.py", *common)
    assert AutoencoderKL3D.from_pretrained(tmp_path / "out").config.in_channels == 2


@pytest.mark.slow
def test_the_script_trains_two_steps_is_resumed_and_writes_a_loadable_autoencoder(tmp_path, brains_folder, monkeypatch):
    (tmp_path / "split.json").write_text(json.dumps(SPLIT))
    common = ["--data_dir", brains_folder, "--split_file", str(tmp_path / "split.json"), "--volume_shape", "16", "16"]
    common += ["16", "--spacing", "12", "12", "12", "--channels", "4", "8", "8", "--latent_channels", "2"]
    common += ["--crop_size", "12", "--per_device_train_batch_size", "2", "--adversarial_start", "1"]
    common += ["--discriminator_channels", "4", "--save_steps", "1", "--logging_steps", "1"]
    common += ["--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", "latest"]
    run_example(monkeypatch, "train_autoencoder.py", *common, "--max_steps", "2")
    model = AutoencoderKL3D.from_pretrained(tmp_path / "out")
    assert len(model.config.latents_mean) == 2 and min(model.config.latents_std) > 0
    assert {"README.md", "figures", "runs"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert last_checkpoint(tmp_path / "out").endswith("checkpoint-2")
    run_example(monkeypatch, "train_autoencoder.py", *common, "--max_steps", "3")
    history = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3]
    assert not torch.equal(
        next(AutoencoderKL3D.from_pretrained(tmp_path / "out").parameters()), next(model.parameters())
    )


@pytest.mark.slow
def test_a_run_is_watched_by_the_round_trips_of_the_same_scans(tmp_path, scans):
    trainer = make(tmp_path, kl_model(), scans, picture_steps=2, max_steps=2)
    trainer.train()
    frames = [path.name for path in sorted((tmp_path / "film").iterdir())]
    assert frames == ["reconstructions-000000.png", "reconstructions-000002.png"]
    axes = trainer.film_figures()["reconstructions"].axes
    assert [a.get_ylabel() for a in axes if a.get_ylabel()] == ["scan", "round trip"]
