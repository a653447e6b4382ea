"""Training as events: a metrics logger for any loop, and a data-parallel trainer (`python -m publishers.training`)."""

from .metrics import Metrics

__all__ = ["Metrics"]
