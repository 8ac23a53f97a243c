"""Learned rewards, and the noise spectrum and the damage that they learn realism from."""

from .damage import DAMAGE_NAMES, damage
from .learned import SliceReward, VolumeReward
from .loading import load_reward
from .scoring import RewardFunc
from .spectrum import partial_noising, spectrum_loss
from .spectrum_dataset import SpectrumDataset, build_fold_spectra, build_spectrum
from .spectrum_scores import score_spectrum, summarise
from .stateful import StatefulReward
from .witness import WitnessReward

__all__ = [
    "DAMAGE_NAMES",
    "RewardFunc",
    "SliceReward",
    "SpectrumDataset",
    "StatefulReward",
    "VolumeReward",
    "WitnessReward",
    "build_fold_spectra",
    "build_spectrum",
    "damage",
    "load_reward",
    "partial_noising",
    "score_spectrum",
    "spectrum_loss",
    "summarise",
]
