"""Networks, most of them MONAI's, as diffusers models that load and save themselves."""

from .autoencoder import AutoencoderKL3D
from .maisi import AutoencoderKLMaisi3D, DiffusionUNetMaisi3D
from .reward import SliceRewardModel, VolumeRewardModel
from .unet import DiffusionUNet3D, DiffusionUNet3DOutput
from .vq_model import VQModel3D

__all__ = [
    "AutoencoderKL3D",
    "AutoencoderKLMaisi3D",
    "DiffusionUNet3D",
    "DiffusionUNet3DOutput",
    "DiffusionUNetMaisi3D",
    "SliceRewardModel",
    "VQModel3D",
    "VolumeRewardModel",
]
