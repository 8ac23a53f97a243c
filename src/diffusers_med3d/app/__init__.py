"""The page on which checkpoints are tried in a browser; needs the extra ``app``."""

from .work import Reward, Settings, compare, generate, prepare_scan, read_scan, score_volume

__all__ = ["Reward", "Settings", "compare", "generate", "prepare_scan", "read_scan", "score_volume"]
