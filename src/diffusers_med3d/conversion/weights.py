"""Weights of MONAI networks in every published layout, to the keys of the installed MONAI.

Layouts: GenerativeModels (``to_q`` and ``proj_attn`` beside the norm, ``to_out.0``, ``upsampler.conv``), the time of
MONAI 1.3, and MONAI 1.4 to 1.6 (``attn.to_q``, ``out_proj``, ``postconv``; one ``qkv`` where the config asks for
it). GenerativeModels creates ``proj_attn`` and never applies it; MONAI 1.4 does the same with ``out_proj`` where
``include_fc`` is False. Such tensors are left out, so that the network stays the one that was trained.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..utils.wrappers import without_prefixes

WRAPPERS = ("unet_state_dict", "autoencoder_state_dict", "state_dict", "model")
NEVER_APPLIED = re.compile(r"\.proj_attn\.(weight|bias)$|\.attn1?\.out_proj\.(weight|bias)$")
COMBINED = re.compile(r"(.*)\.qkv\.(weight|bias)")


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], float | None]:
    """Read a checkpoint: the state dict, and the ``scale_factor`` beside it if there is one (MAISI).

    Safetensors, or what ``torch.load(weights_only=True)`` takes: a pickle is never run.

    Raises:
        ValueError: a file that holds more than tensors, or no state dict.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        content: Any = load_file(path)
    else:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError) as error:
            raise ValueError(
                f"{path.name} holds more than tensors and plain values, and a pickle is never run here. Load it where "
                f"you trust it and save its state dict alone with safetensors. ({str(error).splitlines()[0]})"
            ) from error
    scale_factor = content.get("scale_factor") if isinstance(content, Mapping) else None
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not content or not all(torch.is_tensor(v) for v in content.values()):
        raise ValueError(f"{path.name} holds no state dict: expected tensors by name, at the top or under {WRAPPERS}.")
    return without_prefixes(content), None if scale_factor is None else float(scale_factor)


def attention_without_fc(state: Mapping[str, Tensor]) -> bool:
    """Whether this is a network of GenerativeModels with self-attention, whose last linear layer is never applied."""
    return any(".proj_attn." in key for key in state)


def current_keys(state: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Rename to the keys of ``target``; also gives the keys that were left out because no network applies them."""
    renamed, left_out = {}, []
    for key, value in state.items():
        match = COMBINED.fullmatch(key)
        if match and key not in target:
            for name, part in zip(("to_q", "to_k", "to_v"), value.chunk(3), strict=True):
                renamed[f"{match[1]}.{name}.{match[2]}"] = part
            continue
        candidates = [key]
        candidates.append(re.sub(r"\.(to_[qkv])\.", r".attn.\1.", key))
        candidates.append(key.replace(".to_out.0.", ".out_proj."))
        candidates.append(key.replace(".conv.conv.", ".postconv.conv."))
        fitting = [name for name in candidates if name in target]
        if not fitting and NEVER_APPLIED.search(key):
            left_out.append(key)
            continue
        renamed[fitting[0] if fitting else key] = value
    return renamed, left_out


def load_exactly(model: nn.Module, state: Mapping[str, Tensor], what: str) -> list[str]:
    """Load every tensor of a checkpoint and refuse anything that does not match; gives the keys left out.

    Raises:
        ValueError: lists the keys that are missing, unexpected or of another shape.
    """
    target = model.state_dict()
    renamed, left_out = current_keys(state, target)
    shapes = [
        f"{key}: {tuple(renamed[key].shape)} instead of {tuple(target[key].shape)}"
        for key in renamed
        if key in target and renamed[key].shape != target[key].shape
    ]
    problems = {
        "missing": sorted(set(target) - set(renamed)),
        "unexpected": sorted(set(renamed) - set(target)),
        "of another shape": shapes,
    }
    if any(problems.values()):
        lines = [
            f"{len(keys)} {problem}: " + ", ".join(keys[:20]) + (" ..." if len(keys) > 20 else "")
            for problem, keys in problems.items()
            if keys
        ]
        raise ValueError(f"the weights do not fit the {what} of the config.\n" + "\n".join(lines))
    model.load_state_dict({key: value.to(target[key].dtype) for key, value in renamed.items()})
    return left_out
