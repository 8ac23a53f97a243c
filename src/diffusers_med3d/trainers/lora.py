"""Training LoRA adapters on the 3D UNet: which layers, switching them off for the reference policy, merging a copy."""

from peft import LoraConfig
from torch import nn

from ..models import DiffusionUNet3D
from ..pipelines.lora import adapter_names, is_pointwise, lora_layers


def default_targets(unet: DiffusionUNet3D) -> list[str]:
    """Every linear layer and every convolution larger than 1x1x1 (LoRA on attention alone would be too little here)."""
    return [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv3d) and not is_pointwise(module))
    ]


def add_lora(unet: DiffusionUNet3D, config: LoraConfig) -> None:
    """Freeze `unet` and inject trainable adapters named "default" into it, in place; its output does not change yet.

    Args:
        unet: without adapters.
        config: with `target_modules=None` the targets are `default_targets`.

    Raises:
        ValueError: if `unet` carries adapters already, or the config asks for what cannot be merged into the weights.
    """
    check_no_lora(unet)
    if config.use_dora or config.modules_to_save or config.bias != "none":
        raise ValueError(
            "Only plain LoRA can be merged: expected use_dora=False, modules_to_save=None and bias='none', got "
            f"use_dora={config.use_dora}, modules_to_save={config.modules_to_save}, bias={config.bias!r}."
        )
    if config.target_modules is None:
        config.target_modules = default_targets(unet)
    unet.requires_grad_(False)
    unet.add_adapter(config)
    pointwise = [name for name, layer in lora_layers(unet).items() if is_pointwise(layer.get_base_layer())]
    if pointwise:
        raise ValueError(
            f"PEFT cannot merge an adapter on a 1x1x1 convolution; leave these out of target_modules: {pointwise}."
        )


def check_no_lora(unet: DiffusionUNet3D) -> None:
    """Refuse a UNet whose weights are not the whole policy."""
    if lora_layers(unet):
        raise ValueError(
            f"The UNet carries LoRA layers already ({adapter_names(unet)}). Make them part of it, with fuse_lora() and "
            "unload_lora_weights() of the pipeline, or only remove them, before training."
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
