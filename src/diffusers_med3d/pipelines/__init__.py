"""`MedDiffusion3DPipeline`, which turns noise, classes and conditions into volumes, and its LoRA adapters."""

import importlib
from typing import TYPE_CHECKING, Any

from .lora import lora_layers, write_lora
from .med_diffusion_3d import MedDiffusion3DPipeline, MedDiffusion3DPipelineOutput, guided_prediction

if TYPE_CHECKING:
    from .conditions import Conditions, call_arguments, encode_rows, scan_rows

# Tables of conditions pull in `datasets` and the readers of scans, which sampling does not need.
_CONDITIONS = ("Conditions", "call_arguments", "encode_rows", "scan_rows")

__all__ = [
    "Conditions",
    "MedDiffusion3DPipeline",
    "MedDiffusion3DPipelineOutput",
    "call_arguments",
    "encode_rows",
    "guided_prediction",
    "lora_layers",
    "scan_rows",
    "write_lora",
]


def __getattr__(name: str) -> Any:
    if name in _CONDITIONS:
        return getattr(importlib.import_module(".conditions", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
