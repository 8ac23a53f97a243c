"""Networks: MONAI's, behind diffusers' ModelMixin and ConfigMixin."""

from .autoencoder import AutoencoderKL3D
from .unet import DiffusionUNet3D, DiffusionUNet3DOutput
from .vq_model import VQModel3D

__all__ = ["AutoencoderKL3D", "DiffusionUNet3D", "DiffusionUNet3DOutput", "VQModel3D"]
