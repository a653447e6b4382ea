"""What viewers look at, and what has to be sent to keep them up to date: a snapshot, then deltas."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.deadletters import internal

from .facts import facts
from .figures import PAGES, Figure, on_page
from .rings import LEVELS, Histogram, Ring, level_of
from .runs import Axis, Trace, nice
from .state import State
from .wire import Series, dumps, encode

__all__ = ["Stream", "View", "closed", "left_out", "series_of"]

LATE = 0.3
"""Seconds a report may be on its way before its bucket counts as finished."""
INTERVAL = 1.0
"""Seconds that a worker's report covers."""
RUN_POINTS = 300
"""Buckets at most of a run's value when it is first sent; twice as many, and it is sent anew, in wider ones."""
MOST = 1e15
"""Beyond which numbers of a view make no sense."""
FACTS_EVERY = {"matmul": 0.1}
"""Seconds between two looks at a page's tables; half a second elsewhere."""
FROM_LEDGER = {"published", "handled", "dead", "retried", "waiting", "lag", "pending", "oldest", "retained"}
REPORTED = {"latency", "batches", "released"}
_BAND = {"last": 0, "p50": 0, "p95": 1, "p99": 2}


@dataclass(frozen=True, slots=True)
class View:
    """What a viewer looks at. Viewers of the same share the same bytes.

    window   seconds
    end      Unix seconds where the window ends; None: now, and it moves
    axis     of the training page
    low, high  steps the training page is zoomed to
    channel  that the channels page shows in detail
    """

    page: str
    window: float = 300.0
    end: float | None = None
    axis: Axis = "step"
    low: float | None = None
    high: float | None = None
    channel: str | None = None

    @classmethod
    def parse(cls, values: Any) -> View:
        """From what a browser sends. Raises ValueError that says what is wrong."""
        if not isinstance(values, dict):
            raise ValueError("a view is an object")
        page, axis = str(values.get("page")), values.get("axis") or "step"
        if page not in PAGES:
            raise ValueError(f"page {page!r}: one of {', '.join(PAGES)}")
        if axis not in ("step", "time"):
            raise ValueError(f"axis {axis!r}: step or time")
        window = _number(values, "window") or 300.0
        if not 1.0 <= window <= 86400.0:
            raise ValueError(f"window {window!r}: 1 to 86400 seconds")
        channel = values.get("channel")
        known: Literal["step", "time"] = "time" if axis == "time" else "step"
        return cls(
            page, window, _number(values, "end"), known, _number(values, "low"), _number(values, "high"),
            str(channel) if channel else None,
        )  # fmt: skip

    def span(self, now: float) -> tuple[float, float]:
        end = now if self.end is None else self.end
        return end - self.window, end


def _number(values: dict[str, Any], name: str) -> float | None:
    value = values.get(name)
    if value is None or value == "":
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) < MOST:
        raise ValueError(f"{name} {value!r}: a number")
    return number


def closed(state: State, kind: str, now: float) -> float:
    """The moment up to which nothing more of this kind is expected. The bucket it is in is not drawn."""
    if kind in FROM_LEDGER:
        return state.ledger.time if state.ledger else 0.0
    if kind in REPORTED:  # when every worker has told of it; one that is slow or dead does not hold it up for long
        return max(now - LATE - INTERVAL, min(now - LATE, state.reported))
    return now - LATE


def series_of(state: State, figure: Figure, view: View) -> Iterator[tuple[str, Ring]]:
    """The rings a chart shows, by name, in the order of names."""
    for name, ring in sorted(state.kinds()[figure.kind].items()):
        if shown := _shown_as(figure, view, name):
            yield shown, ring


def left_out(state: State, view: View) -> dict[str, int]:
    """Chart → how many series it would show had there been room for them."""
    kinds = state.kinds()
    counts = {
        figure.name: sum(_shown_as(figure, view, name) is not None for name in kinds[figure.kind].refused())
        for figure in on_page(view.page)
        if not figure.run
    }
    return {name: count for name, count in counts.items() if count}


def _shown_as(figure: Figure, view: View, name: str) -> str | None:
    """What a series is called in a chart; None where it is not shown."""
    if figure.match == "channel":
        channel, _, group = name.partition(" → ")
        return (group or name) if channel == view.channel else None
    return name if name.startswith(figure.match) and not internal(name) else None


class Stream:
    """One view's charts, tables and marks. `delta` says what has changed since the last `delta` or `restart`."""

    def __init__(self, view: View, state: State) -> None:
        self.view = view
        self._state = state
        self._figures = on_page(view.page)
        self._level = 0
        self._through: dict[tuple[str, str], int] = {}
        """(figure, series) → the first bucket not sent."""
        self._widths: dict[tuple[str, str], tuple[float, int]] = {}
        """(figure, series) of runs → width of its buckets, and which was the first sent."""
        self._traces_sent: dict[tuple[str, str], Trace] = {}
        """(figure, series) of runs → where its points came from: a run of the same name may have begun anew."""
        self._facts: dict[str, str] = {}
        self._next_facts = 0.0
        self._changes = -1
        self._started = False
        self._turn = 0

    # -- out -----------------------------------------------------------------------------------------------------

    def delta(self, now: float, status: dict[str, Any]) -> bytes | None:
        """The frame for all viewers that have had everything before; None when nothing is new."""
        if not self._started:
            self._restart(now)
        series = [] if self.view.end is not None else list(self._new(now, self._turn))
        self._turn += 1
        changed = self._changed_facts(now)
        if not series and not changed:
            return None
        return self._frame("delta", now, status, series, changed)

    def status(self, now: float, status: dict[str, Any]) -> bytes:
        """A frame with nothing but the state of things, so that browsers know the dashboard lives."""
        return self._frame("delta", now, status, [], {})

    def snapshot(self, now: float, status: dict[str, Any]) -> bytes:
        """All that has been sent so far, for a viewer that has nothing."""
        if not self._started:
            self._restart(now)
        self._changed_facts(now, at_once=True)
        facts_now = {name: json.loads(text) for name, text in self._facts.items()}
        return self._frame("snapshot", now, status, list(self._whole(now)), facts_now)

    def _frame(
        self, kind: str, now: float, status: dict[str, Any], series: list[Series], changed: dict[str, Any]
    ) -> bytes:
        view = self.view
        head = {
            "kind": kind, "now": now, "page": view.page, "window": view.window, "end": view.end, "axis": view.axis,
            **status, "facts": changed,
        }  # fmt: skip
        return encode(head, series)

    def _changed_facts(self, now: float, at_once: bool = False) -> dict[str, Any]:
        if not at_once and (now < self._next_facts):
            return {}
        if self._changes == self._state.changes and not at_once:
            return {}
        self._next_facts, self._changes = now + FACTS_EVERY.get(self.view.page, 0.5), self._state.changes
        found = {}
        known = facts(self._state, self.view.page, self.view.channel, now)
        known["left_out"] = left_out(self._state, self.view)
        for name, value in known.items():
            text = dumps(value)
            if self._facts.get(name) != text:
                self._facts[name] = text
                found[name] = value
        return found

    # -- series --------------------------------------------------------------------------------------------------

    def _restart(self, now: float) -> None:
        """Everything up to here counts as sent."""
        self._started = True
        low, _ = self.view.span(now)
        self._level = level_of(self.view.window, now - low)
        for _ in self._new(now, None):
            pass

    def _new(self, now: float, turn: int | None) -> Iterator[Series]:
        """What nobody has had. Charts of runs take turns, one a tick (all with None), so that the browser never has to
        draw twenty lines in seven charts at once."""
        width = LEVELS[self._level][0]
        runs = [figure for figure in self._figures if figure.run]
        for figure in runs if turn is None else runs and [runs[turn % len(runs)]]:
            yield from self._new_of_runs(figure, now)
        for figure in self._figures:
            if figure.run:
                continue
            last = int(closed(self._state, figure.kind, now) // width)
            for name, ring in series_of(self._state, figure, self.view):
                key = (figure.name, name)
                first = self._through.get(key)
                if first is None:
                    first = self._first(now, width)
                elif ring.changed < first * width:
                    first = max(self._first(now, width), int(ring.changed // width))
                if last > first:
                    self._through[key] = last
                    yield from self._read(figure, name, ring, first, last)

    def _first(self, now: float, width: float) -> int:
        return int(self.view.span(now)[0] // width)

    def _whole(self, now: float) -> Iterator[Series]:
        width = LEVELS[self._level][0]
        low, high = self.view.span(now)
        for figure in self._figures:
            if figure.run:
                yield from self._whole_runs(figure, now)
                continue
            for name, ring in series_of(self._state, figure, self.view):
                last = self._through.get((figure.name, name), 0)
                if self.view.end is not None:
                    last = min(int(high // width), int(closed(self._state, figure.kind, now) // width))
                yield from self._read(figure, name, ring, int(low // width), last)

    def _read(self, figure: Figure, name: str, ring: Ring, first: int, last: int) -> Iterator[Series]:
        width, slots = LEVELS[self._level]
        after = ring.newest(self._level) + 1
        first, last = max(first, after - slots), min(last, after)  # what it holds: views may ask for any time
        values = ring.values(self._level, first, last)
        heard = np.flatnonzero(~np.isnan(values[:, 0]))
        if not len(heard):
            return
        values = values[heard[0] : heard[-1] + 1]
        first += int(heard[0])
        scale = figure.scale / (width if figure.per_second else 1.0)
        if not isinstance(ring, Histogram):
            yield Series(figure.name, name, first * width, width, values * scale)
            return
        for column in figure.columns:
            ending = f" {column}" if len(figure.columns) > 1 else ""
            rows = values[:, _BAND[column] : _BAND[column] + 1] * scale
            yield Series(figure.name, name + ending, first * width, width, rows)

    # -- runs ----------------------------------------------------------------------------------------------------

    def _traces(self, figure: Figure) -> Iterator[tuple[str, Trace]]:
        yield from sorted(self._state.runs.traces(figure.kind).items())
        if figure.other:
            for run, trace in sorted(self._state.runs.traces(figure.other).items()):
                yield f"{run} {figure.other}", trace

    def _limits(self, trace: Trace, now: float) -> tuple[float, float]:
        """What part of a run is looked at, in steps or seconds."""
        if self.view.axis == "time":
            return self.view.span(now)
        low = trace.span("step")[0]
        return (low if self.view.low is None else self.view.low), (
            math.inf if self.view.high is None else self.view.high
        )

    def _width(self, trace: Trace, now: float) -> float:
        if self.view.axis == "time":
            return nice(self.view.window / RUN_POINTS)
        low, high = self._limits(trace, now)
        high = min(high, trace.span("step")[1])
        return max(1.0, nice((high - low) / RUN_POINTS))

    def _new_of_runs(self, figure: Figure, now: float) -> Iterator[Series]:
        for name, trace in self._traces(figure):
            key = (figure.name, name)
            if self._traces_sent.get(key) is not trace:
                self._begin(key, trace, now)
            elif not trace.ordered and (figure.kind, name) in self._state.runs.changed:
                self._begin(key, trace, now)  # steps went back: what was sent may be wrong
            width, start = self._widths[key]
            low, high = self._limits(trace, now)
            first = self._through[key]
            found = trace.read(self.view.axis, width, first, low, high, now)
            if not len(found.columns) and first > start:
                continue
            if found.through - start > 2 * RUN_POINTS:
                self._begin(key, trace, now)
                width, start = self._widths[key]
                found = trace.read(self.view.axis, width, start, low, high, now)
                first = start
            self._through[key] = found.through
            if len(found.columns):
                yield Series(figure.name, name, 0.0, 0.0, self._scaled(figure, found.columns), whole=first == start)

    def _begin(self, key: tuple[str, str], trace: Trace, now: float) -> None:
        width = self._width(trace, now)
        start = int(self._limits(trace, now)[0] // width)
        self._traces_sent[key] = trace
        self._widths[key] = (width, start)
        self._through[key] = start

    def _whole_runs(self, figure: Figure, now: float) -> Iterator[Series]:
        for name, trace in self._traces(figure):
            key = (figure.name, name)
            if key not in self._widths:
                continue
            width, _ = self._widths[key]
            low, high = self._limits(trace, now)
            if self.view.end is None and (self.view.high is None or self.view.axis == "time"):
                high = min(high, math.nextafter(self._through[key] * width, -math.inf))
            found = trace.read(self.view.axis, width, int(low // width), low, high, now)
            if len(found.columns):
                yield Series(figure.name, name, 0.0, 0.0, self._scaled(figure, found.columns), whole=True)

    @staticmethod
    def _scaled(figure: Figure, columns: Any) -> Any:
        return columns * np.array([1.0, *[figure.scale] * 3])
