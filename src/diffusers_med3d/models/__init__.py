"""Networks: MONAI's, behind diffusers' ModelMixin and ConfigMixin."""

from .autoencoder import AutoencoderKL3D
from .autoencoder_maisi import AutoencoderKLMaisi3D
from .unet import DiffusionUNet3D, DiffusionUNet3DOutput
from .unet_maisi import DiffusionUNetMaisi3D
from .vq_model import VQModel3D

__all__ = [
    "AutoencoderKL3D",
    "AutoencoderKLMaisi3D",
    "DiffusionUNet3D",
    "DiffusionUNet3DOutput",
    "DiffusionUNetMaisi3D",
    "VQModel3D",
]
