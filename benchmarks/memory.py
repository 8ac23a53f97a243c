"""Peak memory per volume size, for docs/memory.md.

    python benchmarks/memory.py --sizes 32 64 96 128

Networks as wide as those of `brain-t1`, random weights, float32, one volume at a time. On a GPU the peak of its
allocator is read, on a CPU that of torch's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.autograd import profiler

from diffusers_med3d import AutoencoderKL3D, DiffusionUNet3D, VolumeRewardModel
from diffusers_med3d.utils.arguments import ScriptParser


@dataclass
class MemoryArguments:
    """What is measured."""

    sizes: list[int] = field(default_factory=lambda: [32, 64, 96, 128], metadata={"help": "Voxels per side."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute the UNet's blocks in the backward pass."}
    )


def peak_bytes(function: Callable[[], object], device: str) -> int:
    """Most bytes allocated at once while ``function`` runs, beyond those before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profiler.profile(profile_memory=True) as record:
        function()
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(size: int, device: str, checkpointing: bool) -> list[int]:
    """Peaks for a cube of ``size`` voxels a side: decode, one denoising step, its training, a 3D reward's score."""
    vae = AutoencoderKL3D(
        channels=(16, 32, 64),
        latent_channels=24,
        norm_num_groups=1,
        use_convtranspose=True,
        latents_mean=[0.0] * 24,
        latents_std=[1.0] * 24,
    )
    unet = DiffusionUNet3D(
        in_channels=24,
        out_channels=24,
        channels=(64, 64, 96),
        num_res_blocks=2,
        attention_levels=(False, False, True),
        num_head_channels=32,
        norm_num_groups=4,
        num_class_embeds=4,
    )
    reward = VolumeRewardModel(channels=(16, 32, 64, 96), norm_num_groups=8, num_members=2)
    vae, unet, reward = (model.to(device).eval() for model in (vae, unet, reward))
    if checkpointing:
        unet.enable_gradient_checkpointing()
    latents = torch.randn(1, 24, size // 4, size // 4, size // 4, device=device)
    volumes = torch.rand(1, 1, size, size, size, device=device)
    time, label = torch.tensor([500], device=device), torch.tensor([0], device=device)

    def denoise():
        return unet(latents, time, class_labels=label).sample

    with torch.no_grad():
        peaks = [peak_bytes(lambda: vae.decode_latents(latents), device), peak_bytes(denoise, device)]
        peaks.append(peak_bytes(lambda: reward(volumes), device))
    unet.train()
    peaks.append(peak_bytes(lambda: denoise().square().mean().backward(), device))
    return peaks


def main() -> None:
    """Print one Markdown row per size, in GiB."""
    (args,) = ScriptParser(MemoryArguments, description=__doc__).parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| volume | decode | denoise one step | score (3D reward) | train the UNet, batch 1 |\n|---|---|---|---|---|")
    for size in args.sizes:
        peaks = measure(size, device, args.gradient_checkpointing)
        print(f"| {size}^3 | " + " | ".join(f"{peak / 2**30:.2f}" for peak in peaks) + " |", flush=True)


if __name__ == "__main__":
    main()
