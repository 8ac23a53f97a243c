"""3D latent diffusion for medical volumes in the Hugging Face stack, fine-tuned by reinforcement learning. Never for
clinical use.
"""

import importlib
from typing import TYPE_CHECKING, Any

import diffusers
from diffusers import ModelMixin, SchedulerMixin  # not our API: diffusers looks base classes up in the package
from diffusers.pipelines import pipeline_loading_utils

from .models import AutoencoderKL3D, AutoencoderKLMaisi3D, DiffusionUNet3D, DiffusionUNetMaisi3D, VQModel3D
from .models.reward import SliceRewardModel, VolumeRewardModel
from .models.witness import WitnessRewardModel
from .pipelines.med_diffusion_3d import MedDiffusion3DPipeline, MedDiffusion3DPipelineOutput, guided_prediction
from .rewards.learned import SliceReward, VolumeReward
from .rewards.witness import WitnessReward

if TYPE_CHECKING:
    from .trainers.autoencoder import AutoencoderConfig, AutoencoderTrainer
    from .trainers.ddpo import DDPOTrainer
    from .trainers.ddpo_config import DDPOConfig
    from .trainers.diffusion import LatentDiffusionConfig, LatentDiffusionTrainer
    from .trainers.reward import RewardModelConfig, RewardModelTrainer

__version__ = "0.2.0"

# diffusers finds components of a library that it lists, and pipelines among its own attributes. This is the one place
# that touches its private loading code (docs/pitfalls.md, P1): it makes local folders, the Hub, DiffusionPipeline and
# AutoModel find our classes, and model_index.json name them as ["diffusers_med3d", "ClassName"].
pipeline_loading_utils.LOADABLE_CLASSES.setdefault(
    __name__, {base.__name__: ["save_pretrained", "from_pretrained"] for base in (ModelMixin, SchedulerMixin)}
)
for _class in (
    AutoencoderKL3D,
    AutoencoderKLMaisi3D,
    DiffusionUNet3D,
    DiffusionUNetMaisi3D,
    MedDiffusion3DPipeline,
    SliceRewardModel,
    VQModel3D,
    VolumeRewardModel,
    WitnessRewardModel,
):
    setattr(diffusers, _class.__name__, _class)

# The trainers pull in TRL and transformers, so they are imported on first use.
_TRAINERS = {
    "AutoencoderConfig": ".trainers.autoencoder",
    "AutoencoderTrainer": ".trainers.autoencoder",
    "DDPOTrainer": ".trainers.ddpo",
    "DDPOConfig": ".trainers.ddpo_config",
    "LatentDiffusionConfig": ".trainers.diffusion",
    "LatentDiffusionTrainer": ".trainers.diffusion",
    "RewardModelConfig": ".trainers.reward",
    "RewardModelTrainer": ".trainers.reward",
}

_SUBPACKAGES = (
    *("app", "conversion", "data", "evaluation", "hub", "metrics", "models", "pipelines", "rewards", "rl"),
    *("schedulers", "trainers", "utils", "viz"),
)

__all__ = [
    "AutoencoderConfig",
    "AutoencoderKL3D",
    "AutoencoderKLMaisi3D",
    "AutoencoderTrainer",
    "DDPOConfig",
    "DDPOTrainer",
    "DiffusionUNet3D",
    "DiffusionUNetMaisi3D",
    "LatentDiffusionConfig",
    "LatentDiffusionTrainer",
    "MedDiffusion3DPipeline",
    "MedDiffusion3DPipelineOutput",
    "RewardModelConfig",
    "RewardModelTrainer",
    "SliceReward",
    "SliceRewardModel",
    "VQModel3D",
    "VolumeReward",
    "VolumeRewardModel",
    "WitnessReward",
    "WitnessRewardModel",
    "guided_prediction",
]


def __dir__() -> list[str]:
    """What can be imported from here: the public names, the subpackages and the version."""
    return sorted([*__all__, *_SUBPACKAGES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _TRAINERS:
        return getattr(importlib.import_module(_TRAINERS[name], __name__), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
