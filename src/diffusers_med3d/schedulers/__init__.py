"""Rectified flow and the forward process; diffusers' schedulers do the rest."""

from .flow import flow_scheduler, is_flow

__all__ = ["flow_scheduler", "is_flow"]
