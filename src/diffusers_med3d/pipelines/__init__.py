"""`MedDiffusion3DPipeline`: from noise, classes and conditions to volumes; its LoRA adapters."""

from .med_diffusion_3d import MedDiffusion3DPipeline, MedDiffusion3DPipelineOutput, guided_prediction

__all__ = ["MedDiffusion3DPipeline", "MedDiffusion3DPipelineOutput", "guided_prediction"]
