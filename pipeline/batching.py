"""Batches: several events to one handler call, released by size or time, and each says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from .channel import is_count, is_time
from .errors import ConfigurationError
from .events import Event

__all__ = ["Batch", "Columns", "Reason", "columns"]

As = Literal["events", "columns"]
Columns = dict[str, Any]
"""Field → numpy array of int64, float64 or bool, for fields declared int, float or bool; a list for all others."""

Reason = Literal["size", "timeout", "idle", "flush"]
"""size: full · timeout: `wait` passed · idle: wait=0 and nothing more was queued · flush: asked for"""


@dataclass(frozen=True, slots=True)
class Batch:
    """Hand a handler lists of events.

    size  at most so many events
    wait  seconds the first event may wait for company; 0 takes what is queued at once
    as_   "events": a list of them. "columns": a dict, each field of the events as one numpy array (see Columns)
    """

    size: int
    wait: float = 0.0
    as_: As = "events"

    def __post_init__(self) -> None:
        if not (is_count(self.size) and is_time(self.wait)):
            raise ConfigurationError(f"{self!r}: size is a whole number, at least 1; wait is in seconds, not negative")
        if self.as_ not in get_args(As):
            raise ConfigurationError(f"{self!r}: as_ is one of {get_args(As)}")


def columns(kind: type[Event], events: Sequence[Event]) -> Columns:
    """A batch by its fields. Raises OverflowError for an int beyond 64 bits."""
    table: Columns = {}
    for name, field in kind.model_fields.items():
        values = [event.__dict__[name] for event in events]
        dtype = _DTYPES.get(field.annotation)
        table[name] = values if dtype is None else np.array(values, dtype)
    return table


_DTYPES: dict[Any, type[np.generic]] = {int: np.int64, float: np.float64, bool: np.bool_}
