"""`MedDiffusion3DPipeline`, which turns noise, classes and conditions into volumes, and its LoRA adapters."""

from .conditions import Conditions, call_arguments, encode_rows, scan_rows
from .lora import lora_layers, write_lora
from .med_diffusion_3d import MedDiffusion3DPipeline, MedDiffusion3DPipelineOutput, guided_prediction

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
