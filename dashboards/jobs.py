"""Matrix products under way: how many tiles are done, and the wavefront of a systolic array."""

from __future__ import annotations

import base64
from collections import OrderedDict
from typing import Any

import numpy as np

from pipeline.catalog import SystolicCycle, TileProgress

__all__ = ["Jobs"]

MOST_JOBS = 12
MOST_CELLS = 128 * 128
"""Bigger arrays are shown by every second, third … cell."""


class Jobs:
    """The last jobs in tiles, and the last systolic one."""

    def __init__(self) -> None:
        self._tiles: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._systolic: dict[str, Any] | None = None

    def on_tile(self, tile: TileProgress, moment: float) -> None:
        job = self._tiles.setdefault(
            tile.job, {"job": tile.job, "shape": [tile.m, tile.k, tile.n], "total": tile.total, "done": 0,
                       "started": moment - tile.seconds, "workers": {}}
        )  # fmt: skip
        job["done"] = max(job["done"], tile.done)
        job["heard"] = moment
        job["workers"][tile.worker] = job["workers"].get(tile.worker, 0) + 1
        self._tiles.move_to_end(tile.job)
        if len(self._tiles) > MOST_JOBS:
            self._tiles.popitem(last=False)

    def on_cycle(self, cycle: SystolicCycle) -> None:
        active = np.asarray(cycle.active, bool)
        if active.ndim != 2 or not active.size:  # by somebody who is no systolic array
            return
        rows, columns = active.shape
        step = 1
        while (rows // step) * (columns // step) > MOST_CELLS:
            step += 1
        shown = active[::step, ::step]
        same = self._systolic is not None and self._systolic["job"] == cycle.job
        curve = self._systolic["curve"] if same and self._systolic is not None else {}
        curve[cycle.cycle] = round(float(active.mean()), 4)
        while len(curve) > 1000:
            del curve[next(iter(curve))]
        self._systolic = {
            "job": cycle.job, "cycle": cycle.cycle, "cycles": cycle.cycles, "size": [rows, columns],
            "shown": list(shown.shape), "curve": curve,
            "active": base64.b64encode(np.packbits(shown).tobytes()).decode(),
        }  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """What the matmul page shows of them, the newest job first."""
        systolic = self._systolic
        return {
            "tiles": list(reversed(self._tiles.values())),
            "systolic": systolic and {**systolic, "curve": sorted(systolic["curve"].items())},
        }
