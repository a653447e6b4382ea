"""Fixed rings of buckets: what a time chart holds, at four widths of bucket, in numpy arrays that never grow."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.metrics import LATENCY_BOUNDS

__all__ = ["LEVELS", "MOST_POINTS", "Gauge", "Histogram", "Ring", "Sum", "level_of", "quantiles", "spread"]

LEVELS = ((1.0, 1200), (5.0, 720), (15.0, 960), (60.0, 720))
"""Seconds a bucket, and buckets held: 20 minutes, an hour, four hours, twelve."""
MOST_POINTS = 400
"""Points at most that a series sends for a window."""
GAP = 5.0
"""Seconds between two readings of a counter beyond which nobody knows when it grew: it all counts at the end."""

Array = npt.NDArray[Any]


def level_of(span: float, age: float) -> int:
    """The finest level that covers `span` seconds in MOST_POINTS, of which the oldest is `age` seconds old."""
    for level, (width, slots) in enumerate(LEVELS):
        if span <= width * MOST_POINTS and age <= width * slots:
            return level
    return len(LEVELS) - 1


class Ring:
    """One series: at each level the newest buckets, each a row. Buckets may be filled in any order.

    `changed` is the earliest moment touched since it was last set to infinity: from there on a reader reads again.
    """

    __slots__ = ("_data", "_empty", "_heads", "changed")

    def __init__(self, columns: int, empty: float, dtype: Any = np.float64) -> None:
        self._empty = empty
        self._heads = [-1] * len(LEVELS)
        fill = np.zeros if empty == 0 else partial(np.full, fill_value=empty)  # zeros take no memory until written to
        self._data: list[Array] = [fill((slots, columns), dtype=dtype) for _, slots in LEVELS]
        self.changed = math.inf

    def _rows(self, moment: float) -> list[Array]:
        """The row of each level that a moment belongs to, where it is still held."""
        self.changed = min(self.changed, moment)
        rows = []
        for level, (width, slots) in enumerate(LEVELS):
            index, head, data = int(moment // width), self._heads[level], self._data[level]
            if index > head:
                if index - head >= slots:
                    data[:] = self._empty
                else:
                    data[np.arange(head + 1, index + 1) % slots] = self._empty
                self._heads[level] = index
            elif index <= head - slots:
                continue
            rows.append(data[index % slots])
        return rows

    def newest(self, level: int) -> int:
        """Its newest bucket; -1 without any."""
        return self._heads[level]

    def read(self, level: int, first: int, last: int) -> Array:
        """Buckets first…last-1 of a level, shape [last - first, columns]; empty rows where nothing is held."""
        data, head = self._data[level], self._heads[level]
        slots = len(data)
        low, high = max(first, head - slots + 1), min(last, head + 1)
        found = np.full((max(0, last - first), data.shape[1]), self._empty, data.dtype)
        if low < high:
            found[low - first : high - first] = data[np.arange(low, high) % slots]
        return found

    def values(self, level: int, first: int, last: int) -> Array:
        """What a chart shows of these buckets, float64; NaN where nothing was heard."""
        return self.read(level, first, last)


class Sum(Ring):
    """How many in each bucket; NaN where nobody counted. What is no number is left out."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(1, math.nan)

    def add(self, moment: float, count: float) -> None:
        if not math.isfinite(count):
            return
        for row in self._rows(moment):
            row[0] = count if math.isnan(row[0]) else row[0] + count


class Gauge(Ring):
    """The last value of each bucket, the lowest and the highest. What is no number is left out."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(3, math.nan)

    def set(self, moment: float, value: float) -> None:
        if not math.isfinite(value):
            return
        for row in self._rows(moment):
            row[0] = value
            row[1] = value if math.isnan(row[1]) else min(row[1], value)
            row[2] = value if math.isnan(row[2]) else max(row[2], value)


class Histogram(Ring):
    """Counts of durations in the bins of LATENCY_BOUNDS (20 a decade) in each bucket; shown as p50, p95 and p99."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(len(LATENCY_BOUNDS) + 1, 0, np.uint32)

    def add(self, moment: float, bins: dict[int, int]) -> None:
        if not bins:
            return
        where, counts = list(bins), np.fromiter(bins.values(), np.uint32, len(bins))
        for row in self._rows(moment):
            row[where] += counts

    def values(self, level: int, first: int, last: int) -> Array:
        return quantiles(self.read(level, first, last))


_UPPER = np.array([*LATENCY_BOUNDS, LATENCY_BOUNDS[-1]])
_LOWER = np.array([LATENCY_BOUNDS[0] / 10 ** (1 / 20), *LATENCY_BOUNDS])


def quantiles(counts: Array, wanted: tuple[float, ...] = (0.5, 0.95, 0.99)) -> Array:
    """Quantiles in seconds of histograms [n, bins], shape [n, len(wanted)]; NaN of empty ones.

    Within a bin, durations count as spread evenly over its logarithm.
    """
    totals = counts.sum(axis=1)
    below = np.cumsum(counts, axis=1)
    found = np.full((len(counts), len(wanted)), math.nan)
    rows = np.flatnonzero(totals)
    for column, share in enumerate(wanted):
        rank = share * totals[rows]
        at = (below[rows] >= rank[:, None]).argmax(axis=1)
        inside = counts[rows, at]
        part = (rank - (below[rows, at] - inside)) / inside
        found[rows, column] = _LOWER[at] * (_UPPER[at] / _LOWER[at]) ** part
    return found


def spread(ring: Sum, since: float, until: float, count: int) -> None:
    """Count what came between two moments, in whole numbers, over the seconds it may have come in."""
    if not GAP >= until - since > 0:
        since = until - 1.0
    placed, at = 0, since
    while at < until:
        at = min(until, math.floor(at) + 1.0)
        share = round(count * (at - since) / (until - since)) - placed
        ring.add(at - 1e-6, share)
        placed += share
