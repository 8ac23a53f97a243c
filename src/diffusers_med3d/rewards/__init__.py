"""Learned rewards, and the noise spectrum and the damage that they learn realism from."""

from .learned import SliceReward, VolumeReward

__all__ = ["SliceReward", "VolumeReward"]
