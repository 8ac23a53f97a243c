"""LoRA for the 3D UNet: adapters injected in place, merged for saving, and the adapter file of its own."""

import json
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ..models import DiffusionUNet3D

LORA_FILE = "pytorch_lora_weights.safetensors"
PREFIX = "unet."


def _is_pointwise(module: nn.Module) -> bool:
    """1x1x1 convolutions (MONAI's skip connections): PEFT trains an adapter on them but cannot merge it."""
    return isinstance(module, nn.Conv3d) and set(module.kernel_size) == {1}


def default_targets(unet: DiffusionUNet3D) -> list[str]:
    """Every linear layer and every convolution larger than 1x1x1 (LoRA on attention alone would be too little here)."""
    return [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv3d) and not _is_pointwise(module))
    ]


def lora_layers(unet: nn.Module) -> dict[str, LoraLayer]:
    """Name -> layer that carries an adapter."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}


def add_lora(unet: DiffusionUNet3D, config: LoraConfig) -> None:
    """Freeze `unet` and inject trainable adapters into it, in place; its output does not change yet.

    Args:
        unet: without adapters.
        config: with `target_modules=None` the targets are `default_targets`.

    Raises:
        ValueError: if `unet` carries adapters already, or the config asks for what cannot be merged into the weights.
    """
    if lora_layers(unet):
        raise ValueError("The UNet carries LoRA layers already; merge or remove them before training new ones.")
    if config.use_dora or config.modules_to_save or config.bias != "none":
        raise ValueError(
            "Only plain LoRA can be merged: expected use_dora=False, modules_to_save=None and bias='none', got "
            f"use_dora={config.use_dora}, modules_to_save={config.modules_to_save}, bias={config.bias!r}."
        )
    if config.target_modules is None:
        config.target_modules = default_targets(unet)
    unet.requires_grad_(False)
    inject_adapter_in_model(config, unet)
    pointwise = [name for name, layer in lora_layers(unet).items() if _is_pointwise(layer.get_base_layer())]
    if pointwise:
        raise ValueError(
            f"PEFT cannot merge an adapter on a 1x1x1 convolution; leave these out of target_modules: {pointwise}."
        )


def enable_lora(unet: nn.Module, enabled: bool) -> None:
    """Switch all adapters on or off; off is the policy before fine-tuning. What is trainable does not change."""
    for layer in lora_layers(unet).values():
        layer._disable_adapters = not enabled  # `enable_adapters` would also freeze them


def merged(unet: DiffusionUNet3D) -> DiffusionUNet3D:
    """A new UNet without adapters whose weights include them; `unet` itself is not touched."""
    state = {k.replace(".base_layer.", "."): v.clone() for k, v in unet.state_dict().items() if ".lora_" not in k}
    for name, layer in lora_layers(unet).items():
        for adapter in layer.active_adapters:
            state[f"{name}.weight"] += layer.get_delta_weight(adapter).to(state[f"{name}.weight"])
    plain = type(unet).from_config(unet.config)
    plain.load_state_dict(state, strict=True)
    return plain.eval()


def save_lora(unet: DiffusionUNet3D, folder: str | Path) -> None:
    """Write the adapters alone as diffusers does: keys with the prefix `unet.`, the LoraConfig in the metadata."""
    config = unet.peft_config["default"].to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    tensors = {PREFIX + k: v.detach().cpu().contiguous() for k, v in get_peft_model_state_dict(unet).items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps({PREFIX + k: v for k, v in config.items()})}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / LORA_FILE, metadata=metadata)


def load_lora(unet: DiffusionUNet3D, folder: str | Path) -> None:
    """Inject the adapters that `save_lora` wrote into a base UNet, in place.

    Raises:
        ValueError: if the file does not fill exactly the adapters of this network.
    """
    with safe_open(Path(folder) / LORA_FILE, framework="pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
        tensors = {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}
    add_lora(unet, LoraConfig(**{key.removeprefix(PREFIX): value for key, value in config.items()}))
    expected = {key: tensor.shape for key, tensor in get_peft_model_state_dict(unet).items()}
    found = {key: tensor.shape for key, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        raise ValueError(f"{LORA_FILE} does not fit this UNet: {len(wrong)} tensors differ, such as {wrong[:3]}.")
    with torch.no_grad():
        set_peft_model_state_dict(unet, tensors)
