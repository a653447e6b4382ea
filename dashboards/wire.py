"""Frames for browsers: a JSON head, then the columns of every series as float64.

    uint32 n, little-endian · n bytes of JSON, padded with spaces so that what follows is aligned to 8 · float64 …

`head["series"]` lists what the numbers are, in order: `[figure, name, first, width, rows, columns, whole]`. Row i of a
series in buckets of time is at x = first + i · width (the start of the bucket, Unix seconds). With width 0 the first of
its columns is x. Numbers come column by column. `whole`: it replaces what the browser holds, as all of a snapshot does;
else points at or after the first x replace what it held there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Series", "decode", "encode"]


@dataclass(frozen=True, slots=True)
class Series:
    """Rows of one series on their way to the browser."""

    figure: str
    name: str
    first: float
    width: float
    rows: npt.NDArray[np.float64]
    whole: bool = False


def encode(head: dict[str, Any], series: list[Series]) -> bytes:
    """One frame."""
    head = {
        **head,
        "series": [[one.figure, one.name, one.first, one.width, *one.rows.shape, int(one.whole)] for one in series],
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 4) % 8)
    columns = (np.ascontiguousarray(one.rows.T, "<f8").tobytes() for one in series)
    return b"".join([len(text).to_bytes(4, "little"), text, *columns])


def decode(frame: bytes) -> tuple[dict[str, Any], list[Series]]:
    """What `encode` was given; for clients in Python."""
    size = int.from_bytes(frame[:4], "little")
    head = json.loads(frame[4 : 4 + size])
    at, series = 4 + size, []
    for figure, name, first, width, rows, columns, whole in head.pop("series"):
        values = np.frombuffer(frame, "<f8", rows * columns, at).reshape(columns, rows).T
        series.append(Series(figure, name, first, width, values, bool(whole)))
        at += 8 * rows * columns
    return head, series
