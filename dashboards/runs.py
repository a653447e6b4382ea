"""What training runs have logged: bounded however long they last, and read by step or by time."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["MOST_RUNS", "Axis", "Buckets", "Run", "Runs", "Trace", "nice"]

Axis = Literal["step", "time"]
Array = npt.NDArray[np.float64]

MOST_RUNS = 32
MOST_VALUES = 24
"""Names that a run may log."""
SLOTS = 2048
"""Points that a value holds; room for all is taken at once, so that memory is flat from the start."""
SETTLED = 2.0
"""Seconds without a new value after which the last bucket counts as finished."""

AGAIN = 3.0
"""Seconds without news after which a lower step is that of a run that began again; workers' reports may come in a
slightly different order before."""

STEP, TIME, LAST, LOW, HIGH = range(5)


@dataclass(frozen=True, slots=True)
class Buckets:
    """Columns x (where a bucket's last value stood), last, low, high; and the bucket that follows them."""

    columns: Array
    through: int


class Trace:
    """One value of one run. When its SLOTS are used up neighbours are merged: half the detail, the same span.

    A slot holds the step, the time and the value of its last point, and the lowest and highest of all its points.
    """

    __slots__ = ("_count", "_data", "_inside", "_per", "heard", "ordered")

    def __init__(self) -> None:
        self._data: Array = np.full((SLOTS, 5), math.nan)
        self._count = 0
        self._per = 1
        self._inside = 0
        self.heard = 0.0
        self.ordered = True
        """Steps have never gone back."""

    def add(self, step: float, moment: float, value: float) -> None:
        if self._count and step < self._data[self._count - 1, STEP]:
            self.ordered = False
        if self._count and self._inside < self._per:
            row = self._data[self._count - 1]
            row[:] = step, moment, value, min(row[LOW], value), max(row[HIGH], value)
            self._inside += 1
        else:
            self._room()
            self._data[self._count] = step, moment, value, value, value
            self._count += 1
            self._inside = 1
        self.heard = max(self.heard, moment)

    def _room(self) -> None:
        if self._count < SLOTS:
            return
        first, second = self._data[0::2], self._data[1::2]
        merged = second.copy()
        merged[:, LOW] = np.minimum(first[:, LOW], second[:, LOW])
        merged[:, HIGH] = np.maximum(first[:, HIGH], second[:, HIGH])
        self._count = len(merged)
        self._data[: self._count] = merged
        self._per *= 2

    @property
    def last(self) -> float:
        return float(self._data[self._count - 1, LAST]) if self._count else math.nan

    @property
    def step(self) -> int:
        """The highest."""
        if not self._count:
            return -1
        steps = self._data[: self._count, STEP]
        return int(steps[-1] if self.ordered else steps.max())

    def span(self, axis: Axis) -> tuple[float, float]:
        """The lowest and the highest x; (0, 0) without points."""
        if not self._count:
            return 0.0, 0.0
        xs = self._data[: self._count, TIME if axis == "time" else STEP]
        return float(xs.min()), float(xs.max())

    def read(self, axis: Axis, width: float, first: int, low: float, high: float, now: float) -> Buckets:
        """Finished buckets from number `first` on, of `width` steps or seconds, within low…high."""
        column = TIME if axis == "time" else STEP
        data = self._data[: self._count]
        start = max(low, first * width)
        if axis == "time" or self.ordered:
            data = data[np.searchsorted(data[:, column], start) : np.searchsorted(data[:, column], high, "right")]
        else:
            data = data[(data[:, column] >= start) & (data[:, column] <= high)]
            data = data[np.argsort(data[:, column], kind="stable")]
        if not len(data):
            return Buckets(np.zeros((0, 4)), first)
        numbers = np.floor_divide(data[:, column], width).astype(np.int64)
        finished = self._finished(axis, width, now)
        data, numbers = data[numbers < finished], numbers[numbers < finished]
        if not len(data):
            return Buckets(np.zeros((0, 4)), first)
        starts = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 1))
        ends = np.append(starts[1:], len(data)) - 1
        columns = np.column_stack(
            [
                data[ends, column],
                data[ends, LAST],
                np.minimum.reduceat(data[:, LOW], starts),
                np.maximum.reduceat(data[:, HIGH], starts),
            ]
        )
        return Buckets(columns, int(numbers[-1]) + 1)

    def _finished(self, axis: Axis, width: float, now: float) -> int:
        """The first bucket that may still get values."""
        if now - self.heard > SETTLED:
            return 1 << 62
        if axis == "time":
            return int((now - 0.3) // width)
        return int((self.step + 1) // width)


@dataclass
class Run:
    """One training run."""

    name: str
    started: float
    first: int
    """The step it began with."""
    heard: float = 0.0
    step: int = -1
    away: float = 0.0
    """Seconds in which it did not run, before it was taken up again."""
    traces: dict[str, Trace] = field(default_factory=dict)

    def facts(self, now: float) -> dict[str, Any]:
        """A row of the runs' table."""
        last = {name: trace.last for name, trace in self.traces.items()}
        sent, raw = last.get("bytes_sent"), last.get("bytes_raw")
        return {
            "run": self.name,
            "step": self.step,
            "started": self.started,
            "heard": self.heard,
            "live": now - self.heard < 10.0,
            "seconds": self.heard - self.started - self.away,
            "ratio": raw / sent if sent and raw else None,
            **{name: value if math.isfinite(value) else None for name, value in last.items()},
        }


class Runs:
    """The runs heard of last, by name."""

    def __init__(self) -> None:
        self.by_name: OrderedDict[str, Run] = OrderedDict()
        self.changed: set[tuple[str, str]] = set()
        """(value, run) that have got points since the last tick."""

    def add(self, name: str, step: int, values: dict[str, float], moment: float) -> None:
        run = self.by_name.get(name)
        if run is not None and step < run.step and moment - run.heard > AGAIN:
            if step <= run.first:  # from its beginning: another run of this name
                del self.by_name[name]
                run = None
            else:
                run.away += moment - run.heard
                run.step = step
        if run is None:
            run = self.by_name[name] = Run(name, moment, step)
            if len(self.by_name) > MOST_RUNS:
                del self.by_name[min(self.by_name.values(), key=lambda one: one.heard or one.started).name]
        run.heard, run.step = max(run.heard, moment), max(run.step, step)
        for value, number in values.items():
            if not math.isfinite(number):
                continue
            trace = run.traces.get(value)
            if trace is None:
                if len(run.traces) >= MOST_VALUES:
                    continue
                trace = run.traces[value] = Trace()
            trace.add(step, moment, number)
            self.changed.add((value, name))

    def traces(self, value: str) -> dict[str, Trace]:
        """Run → what it logged of a value."""
        return {name: run.traces[value] for name, run in self.by_name.items() if value in run.traces}


def nice(width: float) -> float:
    """The next of 1, 2, 5, 10, 20, 50 … (and below 1: 0.5, 0.2, 0.1 …) that is not smaller."""
    if width <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(width))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= width * (1 - 1e-9))
