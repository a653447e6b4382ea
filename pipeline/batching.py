"""Batches: several events to one handler call, released by size or time, and each says why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import ConfigurationError

__all__ = ["Batch", "Reason"]

Reason = Literal["size", "timeout", "idle", "flush"]
"""size: full · timeout: `wait` passed · idle: wait=0 and nothing more was queued · flush: asked for"""


@dataclass(frozen=True, slots=True)
class Batch:
    """Hand a handler lists of events.

    size  at most so many events
    wait  seconds the first event may wait for company; 0 takes what is queued at once
    """

    size: int
    wait: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 1 or self.wait < 0:
            raise ConfigurationError(f"{self!r}: size must be at least 1 and wait not negative")
