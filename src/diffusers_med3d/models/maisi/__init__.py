"""Networks of NVIDIA's MAISI and NV-Generate, with classes of their own for their extra inputs."""

from .autoencoder import AutoencoderKLMaisi3D
from .unet import DiffusionUNetMaisi3D

__all__ = ["AutoencoderKLMaisi3D", "DiffusionUNetMaisi3D"]
