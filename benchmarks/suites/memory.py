"""Peak memory of each kind of work, and decoding in slabs against decoding at once."""

from collections.abc import Iterator
from functools import partial

import torch
from measure import GIB, Row, Settings, paired, peak_bytes, row_of_pairs, row_of_peaks

from suites.networks import make_pipeline, make_reward

SLABS = 16


def rows(settings: Settings) -> Iterator[Row]:
    """GiB for one cube, float32, without the weights; then a decode in slabs."""
    wide = settings.size == "brain-t1"
    for side in (32, 64, 96) if wide else (16,):
        yield from _work(settings, side)
    side = 128 if wide else 32
    vae = make_pipeline(settings, side).vae
    latents = torch.randn(1, vae.latent_channels, *vae.latent_shape([side] * 3), device=settings.device)

    @torch.no_grad()
    def decode(splits: int) -> torch.Tensor:
        vae.set_num_splits(splits)
        return vae.decode_latents(latents)

    difference = (decode(1) - decode(SLABS)).abs().max().item()
    what, peer = f"decode {side}^3 in {SLABS} slabs", "the same decode at once"
    ours, theirs = partial(decode, SLABS), partial(decode, 1)
    named = {"suite": "memory", "peer": peer}
    yield row_of_peaks(
        ours,
        theirs,
        settings.device,
        what=f"{what}, peak memory",
        bar=0.35,
        note=f"same values to {difference:.0e}",
        **named,
    )
    pairs = paired(ours, theirs, settings, warm_up=False)
    yield row_of_pairs(pairs, settings.device, what=f"{what}, time", bar=1.3, **named)


def _work(settings: Settings, side: int) -> Iterator[Row]:
    pipeline, reward = make_pipeline(settings, side), make_reward(settings)
    unet, vae = pipeline.unet, pipeline.vae
    latents = torch.randn(1, vae.latent_channels, *vae.latent_shape([side] * 3), device=settings.device)
    volume = torch.rand(1, 1, side, side, side, device=settings.device)

    def denoise() -> torch.Tensor:
        return unet(latents, 500).sample

    def train() -> None:
        denoise().square().mean().backward()

    def peak(work) -> float:
        return peak_bytes(work, settings.device) / GIB

    with torch.no_grad():
        found = {
            "decode": peak(lambda: vae.decode_latents(latents)),
            "denoise one step": peak(denoise),
            "score with a 3D reward": peak(lambda: reward(volume)),
        }
    train()
    found["train the UNet, batch 1"] = peak(train)
    unet.enable_gradient_checkpointing()
    found["the same with gradient checkpointing"] = peak(train)
    for what, gib in found.items():
        yield Row("memory", f"{side}^3: {what}", "", "GiB", gib)
