"""What the charts hold, as numbers for programs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pipeline.deadletters import internal

from .facts import channels, totals
from .rings import LEVELS, Ring
from .state import State

__all__ = ["numbers"]


def numbers(state: State) -> dict[str, Any]:
    """`counts`: for each channel what the server has `published`, the sum of its buckets (`held`), and what no bucket
    holds (`base`): published = base + held. `charts`: each kind's series as [[x…], [y…]], in buckets of a second."""
    known = state.ledger.channels if state.ledger else {}
    return {
        "totals": totals(state),
        "channels": channels(state),
        "counts": {
            name: {"published": one.published, "held": _held(state, name), "base": state.base.get(name, 0)}
            for name, one in known.items()
        },
        "charts": {
            kind: {name: _points(ring) for name, ring in held.items() if not internal(name)}
            for kind, held in state.kinds().items()
        },
        "runs": {
            run.name: {name: trace.last for name, trace in run.traces.items()} for run in state.runs.by_name.values()
        },
    }


def _held(state: State, channel: str) -> int:
    """From the widest buckets, which reach back furthest."""
    ring = state.sums["published"].get(channel)
    return int(np.nansum(_read(ring, len(LEVELS) - 1)[1])) if ring is not None else 0


def _read(ring: Ring, level: int) -> tuple[Any, Any]:
    width, slots = LEVELS[level]
    last = ring.newest(level) + 1
    return np.arange(last - slots, last) * width, ring.values(level, last - slots, last)[:, 0]


def _points(ring: Ring) -> list[list[float]]:
    x, y = _read(ring, 0)
    heard = ~np.isnan(y) & (y < math.inf)
    return [x[heard].tolist(), y[heard].tolist()]
