"""Bundled names, publishing to the Hub, and model cards."""

from .publish import PublishMixin, publish
from .resolve import bundled_names, resolve

__all__ = ["PublishMixin", "bundled_names", "publish", "resolve"]
