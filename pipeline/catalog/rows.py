"""Rows of files, as publishers.data reads them."""

from __future__ import annotations

from pydantic import Field

from ..channel import Channel
from ..events import Event
from ..tensors import Tensor

__all__ = [
    "Record",
    "records",
]


class Record(Event):
    """One row of a file or one line of JSON, as publishers.data reads them."""

    source: str
    row: int
    """From 0."""
    values: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    """Column → value."""
    tensor: Tensor | None = None
    """Rows of a `.npy` file: the row itself, with the file's dtype."""


records: Channel[Record] = Channel("records", Record)
