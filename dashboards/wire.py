"""Frames for browsers: a JSON head, then the columns of every series as float64.

    uint32 n, little-endian · n bytes of JSON, padded with spaces so that what follows is aligned to 8 · float64 …

`head["series"]` lists what the numbers are, in order: `[figure, name, first, width, rows, columns, whole]`. Row i of a
series in buckets of time is at x = first + i · width (the start of the bucket, Unix seconds). With width 0 the first of
its columns is x. Numbers come column by column. `whole`: it replaces what the browser holds, as all of a snapshot does;
else points at or after the first x replace what it held there.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from fastapi.responses import JSONResponse

__all__ = ["Json", "Series", "decode", "dumps", "encode"]


def dumps(value: Any) -> str:
    """JSON that browsers read: they refuse a text that has NaN or Infinity anywhere, so that one such number would take
    all others with it. It becomes null."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Json(JSONResponse):
    """An answer over HTTP."""

    def render(self, content: Any) -> bytes:
        return dumps(content).encode()


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
    text = dumps(head).encode()
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
