"""LoRA adapters on the UNet of a pipeline: diffusers' own methods, which here load an adapter whole or not at all.

The file is `pytorch_lora_weights.safetensors` as diffusers writes it: keys with the prefix `unet.`, the LoraConfig as
JSON in the metadata.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders import CogVideoXLoraLoaderMixin, PeftAdapterMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from ..hub.publish import LORA_FILE
from ..hub.resolve import resolve
from ..utils.files import whole_file
from ..utils.wrappers import unwrapped

PREFIX = "unet."
FACTORS = (".lora_A.weight", ".lora_B.weight")


def is_pointwise(module: nn.Module) -> bool:
    """1x1x1 convolutions (MONAI's skip connections): PEFT trains an adapter on them but cannot merge it."""
    return isinstance(module, nn.Conv3d) and set(module.kernel_size) == {1}


def lora_layers(unet: nn.Module) -> dict[str, LoraLayer]:
    """Name -> layer that carries an adapter."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}


def adapter_names(unet: nn.Module) -> list[str]:
    """Names of the adapters that a UNet carries, sorted."""
    return sorted({name for layer in lora_layers(unet).values() for name in layer.lora_A})


def write_lora(unet: ModelMixin, folder: str | os.PathLike, adapter_name: str) -> Path:
    """Write one adapter of `unet` alone to `folder/pytorch_lora_weights.safetensors`, whole or not at all."""
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in unet.peft_config[adapter_name].to_dict().items()}
    state = get_peft_model_state_dict(unet, adapter_name=adapter_name)
    tensors = {PREFIX + key: value.detach().cpu().contiguous() for key, value in state.items()}
    # no second entry ("format"): safetensors writes several in a random order, and equal adapters are equal files here
    metadata = {"lora_adapter_metadata": json.dumps({PREFIX + k: v for k, v in config.items()})}
    path = Path(folder) / LORA_FILE
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return path


def _misfits(unet: nn.Module, tensors: dict[str, torch.Tensor]) -> list[str]:
    """What is wrong with an adapter for this UNet: names of modules, with the reason. Keys come without the prefix."""
    modules = dict(unet.named_modules())
    found = []
    for name in sorted({key.split(".lora_")[0] for key in tensors}):
        module = modules.get(name)
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        down, up = (tensors.get(name + factor) for factor in FACTORS)
        if not isinstance(base, nn.Linear | nn.Conv3d):
            found.append(f"{name} is no linear layer or 3D convolution of this UNet")
        elif is_pointwise(base):
            found.append(f"{name} is a 1x1x1 convolution, whose adapter PEFT cannot merge")
        elif down is None or up is None:
            found.append(f"{name} lacks one of its two factors")
        elif down.shape[1:] != base.weight.shape[1:] or up.shape[:2] != (base.weight.shape[0], down.shape[0]):
            found.append(f"{name} has factors {tuple(down.shape)}, {tuple(up.shape)} for {tuple(base.weight.shape)}")
    return found


class UNetLoraMixin(LoraBaseMixin):
    """`load_lora_weights`, `save_lora_weights`, `fuse_lora`, `unload_lora_weights`, ... of a pipeline with a `unet`.

    `set_adapters`, `disable_lora`, `enable_lora`, `delete_adapters`, `get_active_adapters`, `get_list_adapters` and
    `unload_lora_weights` are diffusers' own, which do nothing to a compiled UNet; here they see the one inside.
    """

    _lora_loadable_modules = ["unet"]
    unet_name = "unet"
    unet: PeftAdapterMixin

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor], **kwargs: Any
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
        """Read an adapter file, never a pickle: tensors with the prefix `unet.`, and its LoraConfig if it holds one."""
        source = pretrained_model_name_or_path_or_dict
        source = source if isinstance(source, dict) else resolve(source)
        options = {"weight_name": LORA_FILE, "use_safetensors": True, **kwargs, "return_lora_metadata": True}
        return CogVideoXLoraLoaderMixin.lora_state_dict(source, **options)  # diffusers' plain reader, for any network

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Put an adapter on the UNet and make it the active one; `set_adapters` weighs several.

        Args:
            pretrained_model_name_or_path_or_dict: folder or Hub id that holds `pytorch_lora_weights.safetensors` (or
                `weight_name=`), such a file, or its tensors.
            adapter_name: by default "default_0", "default_1", ...
            hotswap: replace the weights of the adapter `adapter_name` in place, which a compiled UNet survives. The new
                one must have the same layers and ranks.
            **kwargs: diffusers' and the Hub's, such as `weight_name`, `subfolder`, `revision`, `token`.

        Raises:
            ValueError: tensors that do not fit this UNet (nothing is loaded then), a name that is taken, a hot swap of
                unequal adapters.
            OSError: no such file.
        """
        state, metadata = self.lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        foreign = sorted(key for key in state if not (key.startswith(PREFIX) and key.endswith(FACTORS)))
        if foreign or not state:
            raise ValueError(
                f"A LoRA file for this pipeline holds only unet.<layer>{FACTORS[0]} and {FACTORS[1][1:]}; found "
                f"{len(state)} tensors, among them {foreign[:3]}."
            )
        tensors = {key.removeprefix(PREFIX): value for key, value in state.items()}
        unet = unwrapped(self.unet)
        misfits = _misfits(unet, tensors)
        if misfits:
            raise ValueError(f"The LoRA file does not fit this UNet: {len(misfits)} layers, such as: {misfits[0]}.")
        if hotswap:
            self._check_hotswap(tensors, metadata, adapter_name)
        unet.load_lora_adapter(
            dict(sorted(state.items())),  # diffusers tells the format by the first key, which must be a lora_A
            prefix=self.unet_name,
            adapter_name=adapter_name,
            metadata=metadata,
            hotswap=hotswap,
            _pipeline=self,
        )
        if hotswap and metadata is not None:  # PEFT swaps weights and scaling, but not what would be saved with them
            config = {key.removeprefix(PREFIX): value for key, value in metadata.items()}
            unet.peft_config[adapter_name] = LoraConfig(**config)

    def _check_hotswap(
        self, tensors: dict[str, torch.Tensor], metadata: dict[str, Any] | None, adapter_name: str | None
    ) -> None:
        if metadata is None:
            raise ValueError("A hot swap needs the LoraConfig of the new adapter, as save_lora_weights writes it.")
        unet = unwrapped(self.unet)
        if adapter_name not in adapter_names(unet):
            raise ValueError(f"No adapter {adapter_name!r} to swap; loaded are {adapter_names(unet)}.")
        present = {k: v.shape for k, v in get_peft_model_state_dict(unet, adapter_name=adapter_name).items()}
        given = {k: v.shape for k, v in tensors.items()}
        if present != given:  # PEFT would zero layers that are missing, and stop half-way at a smaller rank
            unequal = sorted(k for k in present.keys() | given.keys() if present.get(k) != given.get(k))
            raise ValueError(
                f"A hot swap needs the layers and ranks of {adapter_name!r}; {len(unequal)} tensors differ, such as "
                f"{unequal[0]}. Load it under another name, or delete_adapters({adapter_name!r}) first."
            )

    def save_lora_weights(self, save_directory: str | os.PathLike, adapter_name: str | None = None) -> Path:
        """Write one adapter to `save_directory/pytorch_lora_weights.safetensors`.

        Args:
            save_directory: created if missing.
            adapter_name: by default the only one there is.

        Returns:
            The file.

        Raises:
            ValueError: no adapter of that name, or several and no name.
        """
        names = adapter_names(unwrapped(self.unet))
        if adapter_name is None and len(names) == 1:
            adapter_name = names[0]
        if adapter_name not in names:
            raise ValueError(f"adapter_name must be one of the loaded adapters, {names}; got {adapter_name!r}.")
        return write_lora(unwrapped(self.unet), save_directory, adapter_name)

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the active adapters to the weights, as diffusers does; `unload_lora_weights` then leaves a plain UNet."""
        with self._plain_unet():
            parts = components or self._lora_loadable_modules
            super().fuse_lora(parts, lora_scale, safe_fusing, adapter_names, **kwargs)

    def unfuse_lora(self, components: list[str] | None = None, **kwargs: Any) -> None:
        """Take fused adapters out of the weights again (to rounding)."""
        with self._plain_unet():
            super().unfuse_lora(components or self._lora_loadable_modules, **kwargs)

    def set_adapters(self, *args: Any, **kwargs: Any) -> None:
        """Choose and weigh the active adapters, as diffusers does."""
        with self._plain_unet():
            super().set_adapters(*args, **kwargs)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Take adapters away, as diffusers does."""
        with self._plain_unet():
            super().delete_adapters(adapter_names)

    def disable_lora(self) -> None:
        """Switch all adapters off, as diffusers does."""
        with self._plain_unet():
            super().disable_lora()

    def enable_lora(self) -> None:
        """Switch the adapters on again, as diffusers does."""
        with self._plain_unet():
            super().enable_lora()

    def unload_lora_weights(self) -> None:
        """Take all adapters away, as diffusers does."""
        with self._plain_unet():
            super().unload_lora_weights()

    def get_active_adapters(self) -> list[str]:
        """Return the names of the active adapters, as diffusers does."""
        with self._plain_unet():
            return super().get_active_adapters()

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return component -> names of its adapters, as diffusers does."""
        with self._plain_unet():
            return super().get_list_adapters()

    @contextmanager
    def _plain_unet(self) -> Iterator[None]:
        """Inside, `self.unet` is the network without its wrappers."""
        wrapped = self.unet
        self.unet = unwrapped(wrapped)
        try:
            yield
        finally:
            self.unet = wrapped

    def _check_without_adapters(self) -> None:
        names = adapter_names(unwrapped(self.unet))
        if names:
            raise ValueError(
                f"The UNet carries LoRA adapters {names}, and from_pretrained reads plain networks. "
                "Write them with save_lora_weights, or make them part of the network: fuse_lora(), then "
                "unload_lora_weights()."
            )
