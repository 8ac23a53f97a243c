"""One trainer and one config for each stage, on TRL's base."""

from .autoencoder import AutoencoderConfig, AutoencoderTrainer
from .base import Med3DConfig, Med3DTrainer
from .ddpo import DDPOTrainer
from .ddpo_config import DDPOConfig
from .diffusion import LatentDiffusionConfig, LatentDiffusionTrainer
from .reward import RewardModelConfig, RewardModelTrainer

__all__ = [
    "AutoencoderConfig",
    "AutoencoderTrainer",
    "DDPOConfig",
    "DDPOTrainer",
    "LatentDiffusionConfig",
    "LatentDiffusionTrainer",
    "Med3DConfig",
    "Med3DTrainer",
    "RewardModelConfig",
    "RewardModelTrainer",
]
