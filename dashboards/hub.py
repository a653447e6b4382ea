"""Viewers: a snapshot first, then the same delta bytes to all, and a fresh snapshot for whoever could not keep up."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

from .feed import Feed

__all__ = ["Hub", "Viewer"]

TICK = 0.5


@dataclass(eq=False)
class Viewer:
    """A mailbox of one frame. A frame that is not fetched in time is replaced by a snapshot."""

    frame: bytes | None = None
    behind: bool = False
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, frame: bytes) -> None:
        if self.frame is not None:
            self.behind = True
        self.frame = frame
        self.arrived.set()

    def clear(self) -> None:
        self.frame, self.behind = None, False
        self.arrived.clear()

    async def take(self) -> tuple[bytes, bool]:
        await self.arrived.wait()
        self.arrived.clear()
        frame, self.frame = self.frame, None
        behind, self.behind = self.behind, False
        assert frame is not None
        return frame, behind


class Hub:
    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._viewers: set[Viewer] = set()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._tick()

    def _tick(self) -> None:
        state = self._feed.state
        state.close_seconds(time.time())
        more = {"pictures": state.pictures.shown()} if state.pictures.changed else {}
        delta = self._frame("delta", {name: chart.delta() for name, chart in state.charts.items()}, **more)
        for viewer in self._viewers:
            viewer.put(delta)

    def join(self) -> Viewer:
        """A new viewer, with a snapshot in its mailbox. What is in that is in no delta to come."""
        self._tick()
        viewer = Viewer()
        viewer.put(self.snapshot())
        self._viewers.add(viewer)
        return viewer

    def refresh(self, viewer: Viewer) -> bytes:
        """A snapshot for who could not keep up, instead of what was missed."""
        self._tick()
        viewer.clear()
        return self.snapshot()

    def leave(self, viewer: Viewer) -> None:
        self._viewers.discard(viewer)

    def snapshot(self) -> bytes:
        state = self._feed.state
        charts = {name: chart.snapshot() for name, chart in state.charts.items()}
        return self._frame("snapshot", charts, pictures=state.pictures.shown())

    def _frame(self, kind: str, charts: dict[str, Any], **more: Any) -> bytes:
        return json.dumps(
            {"kind": kind, **self.facts(), **more, "charts": {name: one for name, one in charts.items() if one}},
            separators=(",", ":"),
        ).encode()

    def facts(self) -> dict[str, Any]:
        """Everything that is small enough to be sent whole each time."""
        now, state = time.time(), self._feed.state
        return {
            "now": now,
            "live": self._feed.live,
            "trouble": None if self._feed.live else self._feed.trouble,
            "tiles": state.tiles(now),
            "workers": state.workers(now),
            "channels": state.channels(),
            "reasons": state.reasons(),
            "base": state.base,
        }
