"""Sampling against MONAI's LatentDiffusionInferer with the same weights, noise and DDIM steps."""

from collections.abc import Iterator
from functools import partial

import torch
from measure import Row, Settings, now, paired, row_of_pairs, row_of_peaks
from monai.inferers import LatentDiffusionInferer
from monai.networks.schedulers import DDIMScheduler

from diffusers_med3d.trainers.base import bf16_is_fast
from suites.networks import SCHEDULE, make_pipeline, monai_networks

STEPS = 10
PEER = "MONAI's LatentDiffusionInferer"


@torch.no_grad()
def rows(settings: Settings) -> Iterator[Row]:
    """Time and peak memory of N steps and decoding, for one volume and for four.

    Then in bfloat16 where the device computes in it natively, and on a GPU compiled.
    """
    pipeline = make_pipeline(settings)
    network, autoencoder = monai_networks(pipeline)
    schedule = DDIMScheduler(1000, schedule="scaled_linear_beta", clip_sample=False, **SCHEDULE)
    schedule.set_timesteps(STEPS, device=settings.device)
    inferer = LatentDiffusionInferer(schedule, scale_factor=1.0)
    latent = (pipeline.unet.config.in_channels, *pipeline.vae.latent_shape(pipeline.config.volume_shape))
    for count in (1, 4):
        noise = torch.randn(count, *latent, device=settings.device)
        ours = partial(pipeline, latents=noise, num_inference_steps=STEPS)
        theirs = partial(inferer.sample, noise, autoencoder, network, verbose=False)
        difference = (ours().volumes - theirs().clamp(0, 1)).abs().max().item()
        if difference > 1e-3:
            raise RuntimeError(f"the two samplers must do the same work, but their volumes differ by {difference:.2g}.")
        what = f"{count} volume(s), {STEPS} steps and decoding"
        note = f"same volumes to {difference:.0e}"
        pairs = paired(ours, theirs, settings, warm_up=False)
        named = {"suite": "sampling", "peer": PEER}
        yield row_of_pairs(pairs, settings.device, what=f"{what}, eager float32", bar=1.0, note=note, **named)
        note = "the same runs: the defaults are eager float32"
        yield row_of_pairs(pairs, settings.device, what=f"{what}, defaults", bar=0.8, note=note, **named)
        yield row_of_peaks(
            ours, theirs, settings.device, suite="sampling", what=f"{what}, peak memory", peer=PEER, bar=1.0
        )
    if bf16_is_fast(settings.device == "cuda"):
        pipeline.to(torch.bfloat16)
        pairs = paired(ours, theirs, settings)
        yield row_of_pairs(pairs, settings.device, suite="sampling", what=f"{what}, bfloat16", peer=PEER, bar=0.8)
    if settings.device == "cuda":
        pipeline.unet = torch.compile(pipeline.unet)
        start = now(settings.device)
        ours()
        note = f"first call {(now(settings.device) - start).wall:.0f} s"
        pairs = paired(ours, theirs, settings)
        what = f"{what}, the same compiled"
        yield row_of_pairs(pairs, settings.device, suite="sampling", what=what, peer=PEER, bar=0.8, note=note)
