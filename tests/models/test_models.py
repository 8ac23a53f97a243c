"""The generator's networks: MONAI's maths, sizes at the door, statistics once each way, precision, checkpointing."""

import io
import json
import logging
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel
from monai.networks.nets import VQVAE, AutoencoderKL, DiffusionModelUNet
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from conftest import awaken
from diffusers_med3d import AutoencoderKL3D, DiffusionUNet3D, VQModel3D
from diffusers_med3d.models.autoencoder import DiagonalGaussianDistribution3D


@pytest.fixture(params=["tiny_vae", "tiny_vq"])
def autoencoder(request) -> AutoencoderKL3D | VQModel3D:
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["tiny_vae", "tiny_vq", "tiny_unet"])
def model(request) -> AutoencoderKL3D | VQModel3D | DiffusionUNet3D:
    return request.getfixturevalue(request.param)


def run(model: torch.nn.Module, batch: int = 2, side: int = 16) -> torch.Tensor:
    """One forward pass that ends in a scalar."""
    if isinstance(model, DiffusionUNet3D):
        sample = torch.randn((batch, 4, side, side, side), generator=torch.Generator().manual_seed(1))
        return (
            model(sample.to(model.dtype), torch.full((batch,), 500), torch.zeros(batch).long()).sample.square().mean()
        )
    volumes = torch.rand((batch, 1, side, side, side), generator=torch.Generator().manual_seed(1))
    return model(volumes.to(model.dtype))[0].square().mean()


# --- MONAI's networks


def test_the_unet_computes_what_monai_computes(tiny_unet):
    monai = DiffusionModelUNet(
        spatial_dims=3, in_channels=4, out_channels=4, channels=(8, 16), num_res_blocks=1,
        attention_levels=(False, True), num_head_channels=8, norm_num_groups=8, num_class_embeds=4,
    ).eval()  # fmt: skip
    monai.load_state_dict(tiny_unet.state_dict())  # strict: the keys are MONAI's
    sample, times, labels = torch.randn(2, 4, 4, 6, 8), torch.tensor([3, 900]), torch.tensor([1, 3])
    with torch.no_grad():
        difference = tiny_unet(sample, times, labels).sample - monai(sample, times, class_labels=labels)
    assert difference.abs().max() <= 1e-5


def test_the_autoencoders_compute_what_monai_computes(tiny_vae, tiny_vq):
    volumes = torch.rand(2, 1, 16, 16, 24)
    kl = AutoencoderKL(
        spatial_dims=3, in_channels=1, out_channels=1, num_res_blocks=1, channels=(8, 8, 8),
        attention_levels=(False,) * 3, latent_channels=4, norm_num_groups=4,
        with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False,
    ).eval()  # fmt: skip
    vq = VQVAE(
        spatial_dims=3, in_channels=1, out_channels=1, channels=(8, 8), num_res_layers=1, num_res_channels=(8, 8),
        downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1, 0),) * 2,
        num_embeddings=16, embedding_dim=4,
    ).eval()  # fmt: skip
    for ours, monai in ((tiny_vae, kl), (tiny_vq, vq)):
        monai.load_state_dict(ours.state_dict())
        with torch.no_grad():
            latents = torch.randn(2, 4, 4, 4, 6)
            for mine, theirs in (
                (ours(volumes).sample, monai.reconstruct(volumes) if ours is tiny_vae else monai(volumes)[0]),
                (ours.decode_stage_2_outputs(latents), monai.decode_stage_2_outputs(latents)),
            ):
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
            torch.manual_seed(7)  # AutoencoderKL draws from its posterior
            expected = monai.encode_stage_2_inputs(volumes)
            torch.manual_seed(7)
            torch.testing.assert_close(ours.encode_stage_2_inputs(volumes), expected, atol=1e-5, rtol=0)


def test_encode_and_decode_answer_as_diffusers_autoencoders_do(tiny_vae, tiny_vq):
    volumes = torch.rand(2, 1, 16, 16, 24)
    with torch.no_grad():
        posterior = tiny_vae.encode(volumes).latent_dist
        assert posterior.mean.shape == posterior.std.shape == (2, 4, 4, 4, 6)
        assert torch.equal(posterior.mode(), posterior.mean)
        (same,) = tiny_vae.encode(volumes, return_dict=False)
        assert torch.equal(same.mean, posterior.mean)
        draw = posterior.sample(torch.Generator().manual_seed(3))
        noise = torch.randn(draw.shape, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(draw, posterior.mean + posterior.std * noise)
        (decoded,) = tiny_vae.decode(draw, return_dict=False)
        assert torch.equal(decoded, tiny_vae.decode(draw).sample) and decoded.shape == volumes.shape
        drawn = tiny_vae(volumes, sample_posterior=True, generator=torch.Generator().manual_seed(3)).sample
        torch.testing.assert_close(drawn, decoded)
        assert torch.equal(tiny_vae(volumes).sample, tiny_vae.decode(posterior.mode()).sample)

        latents = tiny_vq.encode(volumes).latents
        assert latents.shape == (2, 4, 4, 4, 6) and torch.equal(tiny_vq.encode(volumes, return_dict=False)[0], latents)
        decoded, commit_loss = tiny_vq.decode(latents, return_dict=False)
        assert torch.equal(tiny_vq(volumes).sample, decoded) and torch.equal(tiny_vq(volumes).commit_loss, commit_loss)
        by_index = tiny_vq.decode_samples(tiny_vq.index_quantize(volumes))
        torch.testing.assert_close(by_index, decoded)


def test_the_divergence_of_a_posterior_sums_over_all_of_a_3d_latent(tiny_vae):
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = (torch.randn((2, 4, 3, 3, 5), generator=generator) for _ in range(2))
    posterior = DiagonalGaussianDistribution3D(torch.cat([mean, log_variance], dim=1))
    other = DiagonalGaussianDistribution3D(torch.cat([log_variance, mean], dim=1))
    for second, expected in (
        (None, Normal(torch.zeros_like(mean), torch.ones_like(mean))),
        (other, Normal(other.mean, other.std)),
    ):
        by_torch = kl_divergence(Normal(posterior.mean, posterior.std), expected).sum((1, 2, 3, 4))
        torch.testing.assert_close(posterior.kl(second), by_torch, rtol=1e-4, atol=1e-3)
    by_torch = -Normal(posterior.mean, posterior.std).log_prob(log_variance).sum((1, 2, 3, 4))
    torch.testing.assert_close(posterior.nll(log_variance), by_torch, rtol=1e-4, atol=1e-3)


def test_no_layer_depends_on_the_batch_or_drops_out(model):
    """BatchNorm or dropout would make the update see other numbers than the rollout (docs/pitfalls.md, 9 and 10)."""
    for module in model.modules():
        assert not isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        assert not isinstance(module, torch.nn.Dropout) or module.p == 0


def test_the_unet_gives_a_sample_the_same_prediction_alone_and_in_a_batch(tiny_unet):
    sample, times, labels = torch.randn(4, 4, 4, 4, 4), torch.tensor([1, 50, 400, 999]), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        together = tiny_unet(sample, times, labels).sample
        alone = torch.cat([tiny_unet(sample[i : i + 1], times[i], labels[i : i + 1]).sample for i in range(4)])
    assert (together - alone).abs().max() <= 1e-5


# --- conditions


def test_no_class_is_the_last_class(tiny_unet):
    sample = torch.randn(2, 4, 4, 4, 4)
    with torch.no_grad():
        none = tiny_unet(sample, 10).sample
        null = tiny_unet(sample, 10, torch.tensor([3, 3])).sample
        young = tiny_unet(sample, 10, torch.tensor([0, 0])).sample
    assert tiny_unet.null_class == 3
    assert torch.equal(none, null) and (none - young).abs().max() > 1e-4


def test_a_timestep_may_be_a_number_a_scalar_tensor_or_one_per_sample(tiny_unet):
    sample = torch.randn(2, 4, 4, 4, 4)
    with torch.no_grad():
        outputs = [tiny_unet(sample, t).sample for t in (10, torch.tensor(10), torch.tensor([10, 10]))]
        other = tiny_unet(sample, 900, return_dict=False)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    assert isinstance(other, tuple) and (other[0] - outputs[0]).abs().max() > 1e-4


# --- sizes


@pytest.mark.parametrize(
    ("shape", "nearest"), [((18, 16, 16), (16, 16, 16)), ((16, 23, 16), (16, 24, 16)), ((1, 16, 16), (4, 16, 16))]
)
def test_the_autoencoder_refuses_a_size_with_the_nearest_that_fits(autoencoder, shape, nearest):
    message = (
        rf"must be a multiple of 4 on every side; the nearest that fits is \({nearest[0]}, {nearest[1]}, {nearest[2]}\)"
    )
    with pytest.raises(ValueError, match=message):
        autoencoder.encode(torch.zeros(1, 1, *shape))
    with pytest.raises(ValueError, match=message):
        autoencoder.latent_shape(shape)
    fitting = torch.zeros(1, 1, *nearest)
    latents = autoencoder.encode_latents(fitting)
    assert latents.shape == (1, 4, *autoencoder.latent_shape(nearest))
    assert autoencoder.decode_latents(latents).shape == fitting.shape


def test_the_unet_refuses_a_size_with_the_nearest_that_fits(tiny_unet):
    with pytest.raises(ValueError, match=r"\(4, 7, 4\) must be a multiple of 2 .* \(4, 8, 4\)"):
        tiny_unet(torch.zeros(1, 4, 4, 7, 4), 0)


@pytest.mark.parametrize(
    ("volumes", "message"),
    [
        (torch.zeros(1, 16, 16, 16), r"\(B, C, X, Y, Z\), got \(1, 16, 16, 16\)"),
        (torch.zeros(1, 2, 16, 16, 16), "1 channel"),
        (torch.full((1, 1, 16, 16, 16), torch.inf), "4096 NaN or infinite"),
    ],
)
def test_the_autoencoder_refuses_volumes_of_another_kind(autoencoder, volumes, message):
    with pytest.raises(ValueError, match=message):
        autoencoder.encode_latents(volumes)


def test_the_unet_refuses_samples_and_labels_of_another_kind(tiny_unet):
    with pytest.raises(ValueError, match=r"\(B, 4, x, y, z\), got \(1, 3, 4, 4, 4\)"):
        tiny_unet(torch.zeros(1, 3, 4, 4, 4), 0)
    with pytest.raises(ValueError, match=r"class_labels must have shape \(2,\), got \(1,\)"):
        tiny_unet(torch.zeros(2, 4, 4, 4, 4), 0, torch.tensor([0]))


# --- latent statistics (docs/pitfalls.md, 25 and P7)


def test_latent_statistics_are_applied_once_each_way(tiny_vae):
    volumes = torch.rand(2, 1, 16, 16, 16)
    mean = torch.tensor(tiny_vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(tiny_vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        raw = tiny_vae.encode(volumes).latent_dist.mean
        latents = tiny_vae.encode_latents(volumes)
        assert torch.allclose(latents, (raw - mean) / std, atol=1e-6)
        assert torch.allclose(tiny_vae.decode_latents(latents), tiny_vae.decode(raw).sample.clamp(0, 1), atol=1e-5)


def test_normalised_latents_of_the_training_set_have_zero_mean_and_unit_variance(autoencoder):
    volumes = torch.rand(8, 1, 16, 16, 16)
    with torch.no_grad():
        raw = autoencoder.encode_moments(volumes)[0]
        autoencoder.set_latent_statistics(raw.mean((0, 2, 3, 4)), raw.std((0, 2, 3, 4)))
        latents = autoencoder.encode_latents(volumes)
    assert latents.mean((0, 2, 3, 4)).abs().max() <= 1e-4
    assert (latents.std((0, 2, 3, 4)) - 1).abs().max() <= 1e-3


def test_the_atlas_is_subtracted_place_by_place_saved_and_resized(autoencoder, tmp_path):
    volumes = torch.rand(6, 1, 16, 16, 16)
    with torch.no_grad():
        raw = autoencoder.encode_moments(volumes)[0]
        mean, std = raw.mean((0, 2, 3, 4)), raw.std((0, 2, 3, 4))
        autoencoder.set_latent_statistics(mean, std, raw.mean(0) - mean[:, None, None, None])
        latents = autoencoder.encode_latents(volumes)
        assert latents.mean(0).abs().max() < 1e-5
        torch.testing.assert_close(autoencoder.denormalize_latents(latents), raw, atol=1e-5, rtol=1e-5)
        autoencoder.save_pretrained(tmp_path)
        loaded = type(autoencoder).from_pretrained(tmp_path)
        assert torch.equal(loaded.encode_latents(volumes), latents)
        larger = torch.rand(1, 1, 32, 16, 16)
        moved = loaded.encode_latents(larger)
        loaded.set_latent_statistics(mean, std)
        assert loaded.latents_atlas is None and not torch.allclose(moved, loaded.encode_latents(larger))
        loaded.save_pretrained(tmp_path)
        assert type(autoencoder).from_pretrained(tmp_path).latents_atlas is None
    with pytest.raises(ValueError, match=r"atlas must be finite, \(4, x, y, z\); got \(3, 4, 4, 4\)"):
        autoencoder.set_latent_statistics(mean, std, torch.zeros(3, 4, 4, 4))


def test_latent_statistics_travel_in_the_config(autoencoder, tmp_path):
    autoencoder.set_latent_statistics(torch.arange(4.0), torch.arange(1.0, 5.0))
    autoencoder.save_pretrained(tmp_path)
    loaded = type(autoencoder).from_pretrained(tmp_path)
    assert loaded.config.latents_mean == [0, 1, 2, 3] and loaded.config.latents_std == [1, 2, 3, 4]
    volumes = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.encode_latents(volumes), autoencoder.encode_latents(volumes))


def test_an_autoencoder_without_statistics_says_so(tiny_vae):
    bare = AutoencoderKL3D.from_config(dict(tiny_vae.config) | {"latents_mean": None, "latents_std": None})
    for call in (
        lambda: bare.encode_latents(torch.zeros(1, 1, 16, 16, 16)),
        lambda: bare.decode_latents(torch.zeros(1, 4, 4, 4, 4)),
    ):
        with pytest.raises(ValueError, match="no latents_mean / latents_std"):
            call()


@pytest.mark.parametrize(
    ("mean", "std"), [([0.0] * 3, [1.0] * 4), ([0.0] * 4, [1.0, 0, 1, 1]), ([torch.nan] * 4, [1.0] * 4)]
)
def test_statistics_that_cannot_be_are_refused(tiny_vae, mean, std):
    with pytest.raises(ValueError, match="latent (mean|std) must be"):
        tiny_vae.set_latent_statistics(torch.tensor(mean), torch.tensor(std))


@pytest.mark.slow
def test_a_generator_draws_from_the_posterior_and_none_is_its_mean(tiny_vae):
    volumes = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        tiny_vae.quant_conv_log_sigma.conv.bias.fill_(-2.0)  # sigma near exp(-1)
        sigma = tiny_vae.encode(volumes).latent_dist.std
        draws = torch.cat([tiny_vae.encode_latents(volumes, torch.Generator().manual_seed(i)) for i in range(200)])
        std = torch.tensor(tiny_vae.config.latents_std).view(1, -1, 1, 1, 1)
        assert torch.equal(tiny_vae.encode_latents(volumes), tiny_vae.encode_latents(volumes))
        assert (draws.std(0, keepdim=True) * std / sigma).mean().item() == pytest.approx(1, abs=0.02)
        assert (draws.mean(0) - tiny_vae.encode_latents(volumes)).abs().mean() < 0.1


def test_vq_latents_are_quantised_before_they_are_decoded(tiny_vq):
    latents = torch.randn(1, 4, 4, 4, 4)
    mean = torch.tensor(tiny_vq.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(tiny_vq.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        codebook = tiny_vq.quantizer.quantizer.embedding.weight  # (16, 4)
        raw = (latents * std + mean).permute(0, 2, 3, 4, 1).reshape(-1, 4)
        nearest = codebook[torch.cdist(raw, codebook).argmin(1)].view(1, 4, 4, 4, 4).permute(0, 4, 1, 2, 3)
        expected = tiny_vq.decode(nearest).sample.clamp(0, 1)
        assert torch.allclose(tiny_vq.decode_latents(latents), expected, atol=1e-5)


# --- precision and memory


@pytest.mark.slow
def test_fp16_safetensors_load_as_float32_and_dtype_asks_for_another(model, tmp_path):
    before = run(model).item()
    model.to(torch.float16).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    # MONAI's quantiser computes in float32, so the codebook (small) stays so
    assert {value.dtype for key, value in stored.items() if not key.startswith("quantizer.")} == {torch.float16}
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32 and not loaded.training
    torch.manual_seed(0)
    assert run(loaded).item() == pytest.approx(before, rel=0.1, abs=0.02)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.isfinite(run(half))


def test_a_cast_warns_of_nothing_that_does_not_happen(model):
    warned = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("diffusers.models.modeling_utils").addHandler(handler)
    try:
        assert model.to(torch.float16).dtype == torch.float16
        assert {p.dtype for n, p in model.named_parameters() if n.startswith("quantizer.")} <= {torch.float32}
    finally:
        logging.getLogger("diffusers.models.modeling_utils").removeHandler(handler)
    assert warned == []


def saved_for_backward(model: torch.nn.Module) -> tuple[int, list[torch.Tensor]]:
    """Bytes that autograd keeps between forward and backward, weights not counted; and the gradients."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run(model)
    loss.backward()
    return sum(kept.values()), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def test_gradient_checkpointing_keeps_much_less_and_changes_no_gradient(model):
    """Less than half; for the VQ autoencoder, whose blocks are little more than one convolution each, less than 0.8."""
    plain, gradients = saved_for_backward(model)
    model.enable_gradient_checkpointing()
    checkpointed, same_gradients = saved_for_backward(model)
    assert checkpointed < (0.8 if isinstance(model, VQModel3D) else 0.5) * plain, f"{checkpointed} of {plain} bytes"
    assert len(gradients) == len(same_gradients)
    for gradient, same in zip(gradients, same_gradients, strict=True):
        assert torch.allclose(gradient, same, atol=1e-6)
    model.disable_gradient_checkpointing()
    assert saved_for_backward(model)[0] == plain


TWO_LEVELS = {
    "in_channels": 2, "out_channels": 2, "channels": (8, 16), "num_res_blocks": 1, "norm_num_groups": 4,
    "attention_levels": (False, False), "num_class_embeds": 3, "num_head_channels": 4,
}  # fmt: skip


def test_position_maps_tell_places_apart_and_admit_one_size(tmp_path):
    unet = DiffusionUNet3D(**TWO_LEVELS, position_shape=(4, 4, 4))
    without = DiffusionUNet3D(**TWO_LEVELS)
    awaken(without)
    unet.load_state_dict(without.state_dict(), strict=False)  # the other keys are the same
    sample, labels = torch.randn(2, 2, 4, 4, 4), torch.tensor([0, 2])
    assert torch.equal(unet(sample, 5, labels).sample, without(sample, 5, labels).sample)  # they start at zero
    unet(sample, 5, labels).sample.square().mean().backward()
    assert unet.position.grad.shape == (1, 8, 4, 4, 4) and (unet.position.grad != 0).all()
    torch.nn.init.normal_(unet.position)
    assert not torch.allclose(unet(sample, 5, labels).sample, without(sample, 5, labels).sample, atol=1e-3)
    unet.save_pretrained(tmp_path)
    loaded = DiffusionUNet3D.from_pretrained(tmp_path)
    assert torch.equal(loaded(sample, 5, labels).sample, unet(sample, 5, labels).sample)
    with pytest.raises(ValueError, match=r"position maps of size \(4, 4, 4\) and takes no other, got \(8, 4, 4\)"):
        unet(torch.randn(1, 2, 8, 4, 4), 5)


def test_a_preconditioned_network_starts_as_the_best_linear_prediction_of_each_value(tmp_path):
    unet = DiffusionUNet3D(**TWO_LEVELS, position_shape=(4, 4, 4), precondition=True)
    variance = torch.rand(2, 4, 4, 4) * 3
    unet.set_data_variance(variance)
    sample, times = torch.randn(3, 2, 4, 4, 4), torch.tensor([0.1, 0.5, 0.9])
    t = times.view(-1, 1, 1, 1, 1)
    covariance, noisy_variance = t - (1 - t) * variance, (1 - t) ** 2 * variance + t**2  # of x_t with noise - x_0
    expected = covariance / noisy_variance * sample
    torch.testing.assert_close(unet(sample, 1000 * times).sample, expected, rtol=1e-4, atol=1e-5)
    awaken(unet)
    found = unet(sample, 1000 * times).sample
    assert not torch.allclose(found, expected, atol=1e-2)
    unet.save_pretrained(tmp_path)
    assert torch.equal(DiffusionUNet3D.from_pretrained(tmp_path)(sample, 1000 * times).sample, found)
    with pytest.raises(ValueError, match=r"variance must be at least 0, of shape \(2, 4, 4, 4\); got \(2, 1, 1, 1\)"):
        unet.set_data_variance(torch.ones(2, 1, 1, 1))


def test_a_preconditioned_network_needs_as_many_channels_out_as_in():
    with pytest.raises(ValueError, match="precondition needs in_channels == out_channels, got 2 and 3"):
        DiffusionUNet3D(**TWO_LEVELS | {"out_channels": 3}, precondition=True)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"sample_skip": True}, "sample_skip"),
        ({"sample_gate": True, "num_modes": 0}, "sample_gate"),
        ({"num_modes": 3, "mode_shape": [4, 4, 4]}, "num_modes"),
        ({"sample_skip": True, "sample_gate": True, "num_modes": 3}, "sample_skip and sample_gate and num_modes"),
    ],
)
def test_a_network_with_a_part_of_version_0_1_is_refused_by_its_name(tmp_path, parts, named):
    DiffusionUNet3D(**TWO_LEVELS).save_pretrained(tmp_path)
    edit_config(tmp_path, **parts)
    message = f"this checkpoint's DiffusionUNet3D has {named}, which version 0.2 no longer has. Load it with"
    for load in (DiffusionUNet3D.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    with pytest.raises(ValueError, match=message):
        DiffusionUNet3D.from_config(DiffusionUNet3D.load_config(tmp_path))


def test_a_network_of_version_0_1_with_these_parts_switched_off_loads_without_a_word(tmp_path):
    unet = DiffusionUNet3D(**TWO_LEVELS)
    unet.save_pretrained(tmp_path)
    edit_config(tmp_path, sample_skip=False, sample_gate=False, num_modes=0, mode_shape=None)
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("diffusers").addHandler(handler)
    try:
        loaded = DiffusionUNet3D.from_pretrained(tmp_path)
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    assert said.getvalue() == "" and "sample_skip" not in loaded.config
    sample, labels = torch.randn(2, 2, 4, 4, 4), torch.tensor([0, 2])
    assert torch.equal(loaded(sample, 5, labels).sample, unet.eval()(sample, 5, labels).sample)
