"""Fixed rings of points: what a chart holds, and what it has got since the last tick."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["MOST", "Chart", "Points", "Ring"]

MOST = 600
"""Points a series holds."""

Points = tuple[list[float], list[float]]


class Ring:
    """The last MOST (x, y) points of one series, in numpy arrays of fixed size."""

    __slots__ = ("_count", "_x", "_y")

    def __init__(self) -> None:
        self._x: npt.NDArray[np.float64] = np.zeros(MOST)
        self._y: npt.NDArray[np.float64] = np.zeros(MOST)
        self._count = 0

    def add(self, x: float, y: float) -> None:
        self._x[self._count % MOST] = x
        self._y[self._count % MOST] = y
        self._count += 1

    def points(self) -> Points:
        """Oldest first."""
        order = np.arange(max(0, self._count - MOST), self._count) % MOST
        return self._x[order].tolist(), self._y[order].tolist()


@dataclass
class Chart:
    """The series of one chart, by name."""

    rings: dict[str, Ring] = field(default_factory=dict)
    fresh: dict[str, Points] = field(default_factory=dict)
    """Points since the last tick."""
    most_series: int = 24
    order: deque[str] = field(default_factory=deque)

    def add(self, series: str, x: float, y: float) -> None:
        if series not in self.rings:
            self.rings[series] = Ring()
            self.order.append(series)
            if len(self.order) > self.most_series:
                oldest = self.order.popleft()
                del self.rings[oldest]
                self.fresh.pop(oldest, None)
        self.rings[series].add(x, y)
        xs, ys = self.fresh.setdefault(series, ([], []))
        xs.append(x)
        ys.append(y)

    def snapshot(self) -> dict[str, Points]:
        return {name: ring.points() for name, ring in self.rings.items()}

    def delta(self) -> dict[str, Points]:
        fresh, self.fresh = self.fresh, {}
        return fresh
