"""HTTP in front of the pipeline: publish, watch, predict. `python -m publishers.gateway`."""

from .app import create

__all__ = ["create"]
