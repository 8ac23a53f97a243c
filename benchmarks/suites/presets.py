"""Whether fine-tuning fits a GPU with the presets of examples/presets, counted with tensors that hold no values.

Every tensor that one update and one decode make is counted while it lives, in float32: autocast to bfloat16 needs less,
the workspaces of a GPU's convolutions more. Weights, gradients, AdamW's moments, the average of the weights and the
reference policy are in it; rewards are not: they score one decoded volume at a time.
"""

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import yaml
from measure import GIB, Row, Settings
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_med3d import AutoencoderKL3D, AutoencoderKLMaisi3D, DiffusionUNet3D, DiffusionUNetMaisi3D
from diffusers_med3d.trainers.lora import add_lora

PRESETS = Path(__file__).parents[2] / "examples" / "presets"
GPUS = {"gpu_16gb": 16, "gpu_24gb": 24, "gpu_80gb": 80}


class _Peak(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.now += self.sizes[key]
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._forget, key)
        return made


def _networks() -> dict[str, tuple[Callable, Callable, tuple[int, int, int]]]:
    """Name -> autoencoder, UNet, size of the volume."""
    brain = {"channels": (64, 128, 128, 128), "latent_channels": 3, "num_res_blocks": 2, "norm_num_groups": 32}
    return {
        "128^3, latent 32^3": (
            lambda: AutoencoderKL3D(latent_channels=8, channels=(32, 64, 64)),
            lambda: DiffusionUNet3D(8, 8, channels=(64, 128, 256), num_class_embeds=4),
            (128, 128, 128),
        ),
        "160 x 224 x 160, MONAI's brain model": (
            lambda: AutoencoderKL3D(attention_levels=(False,) * 4, **brain),
            lambda: DiffusionUNet3D(
                3, 3, (256, 512, 768), 2, (False, True, True), num_head_channels=(256, 512, 768), norm_num_groups=32
            ),
            (160, 224, 160),
        ),
        "256 x 256 x 128, MAISI": (
            lambda: AutoencoderKLMaisi3D(),
            lambda: DiffusionUNetMaisi3D(
                4,
                4,
                channels=(64, 128, 256, 512),
                attention_levels=(False, False, True, True),
                num_head_channels=(0, 0, 32, 32),
                num_res_blocks=2,
                norm_num_groups=32,
                include_spacing=True,
            ),
            (256, 256, 128),
        ),
    }


def _update_bytes(make: Callable, preset: dict, latent: tuple[int, ...]) -> int:
    """Peak of one trained step, with everything that is kept between steps."""
    with torch.device("meta"):
        unet = make()
    if preset.get("lora_rank"):
        add_lora(unet, LoraConfig(r=preset["lora_rank"], lora_alpha=2 * preset["lora_rank"]))
    unet.to("meta").eval()
    if preset["gradient_checkpointing"]:
        unet.enable_gradient_checkpointing()
    weights = sum(one.numel() for one in unet.parameters())
    trained = sum(one.numel() for one in unet.parameters() if one.requires_grad)
    reference = 0 if preset.get("lora_rank") else weights
    kept = 4 * (weights + reference + 3 * trained)  # the average and two moments
    batch = preset["per_device_train_batch_size"]
    states = torch.empty(batch, *latent, device="meta")
    extra = {}
    if isinstance(unet, DiffusionUNetMaisi3D):
        extra = {"conditions": {"spacing": torch.empty(batch, 3, device="meta")}}
    with _Peak() as peak:
        timestep = torch.empty(batch, device="meta")
        with torch.no_grad():
            target = unet(states, timestep, **extra).sample
        for _ in range(2):  # the second adds to gradients that are there
            (unet(states, timestep, **extra).sample - target).square().mean().backward()
    return kept + peak.most


def _decode_bytes(make: Callable, preset: dict, volume_shape: tuple[int, ...]) -> int:
    with torch.device("meta"):
        vae = make()
    vae.to("meta").eval()
    shape = vae.latent_shape(volume_shape)
    vae.set_num_splits(vae.fitting_splits(preset["decode_num_splits"], shape))
    with torch.no_grad(), _Peak() as peak:
        vae.decode(torch.empty(preset["decode_batch_size"], vae.latent_channels, *shape, device="meta"))
    return peak.most


def rows(settings: Settings) -> Iterator[Row]:
    """GiB of one update and of one decode beside the GPU's."""
    for name, gigabytes in GPUS.items():
        preset = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
        for what, (make_vae, make_unet, volume_shape) in _networks().items():
            with torch.device("meta"):
                vae = make_vae()
            latent = (vae.latent_channels, *vae.latent_shape(volume_shape))
            update, decode = _update_bytes(make_unet, preset, latent), _decode_bytes(make_vae, preset, volume_shape)
            note = f"update {update / GIB:.1f}, decode {decode / GIB:.1f} GiB"
            yield Row(
                "presets",
                f"{name}: {what}",
                "the GPU",
                "GiB",
                max(update, decode) / GIB,
                gigabytes,
                max(update, decode) / GIB / gigabytes,
                bar=0.9,
                note=note,
            )
