"""Viewers: a snapshot first, then the same bytes to all of a view, and a new snapshot for who is too slow."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any

from .alerts import alerts
from .facts import totals
from .feed import Feed
from .streams import Stream, View

__all__ = ["Hub", "Viewer"]

logger = logging.getLogger("dashboards.hub")

TICK = 0.1
ALIVE = 1.0
"""Seconds between frames at most: a browser that hears nothing for longer knows that the dashboard is gone."""
STATUS_EVERY = 0.5


@dataclass(eq=False)
class Viewer:
    """A mailbox of one frame. One that is not fetched before the next is there is replaced by a snapshot."""

    view: View | None = None
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


class Hub:
    """Ticks ten times a second; each view with viewers is encoded once a tick, and only when it has news."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._viewers: dict[View, set[Viewer]] = {}
        self._streams: dict[View, Stream] = {}
        self._sent: dict[View, float] = {}
        self._status: dict[str, Any] = {}
        self._status_at = 0.0

    @property
    def viewers(self) -> int:
        return sum(map(len, self._viewers.values()))

    async def run(self) -> None:
        due = time.monotonic()
        while True:
            due = max(due + TICK, time.monotonic())
            await asyncio.sleep(due - time.monotonic())
            self._tick()

    def _tick(self) -> None:
        now, state = self._feed.now(), self._feed.state
        state.close_seconds(now)
        for view in list(self._streams):
            self._send(view, now)
        for kind in state.kinds().values():
            for ring in kind.values():
                ring.changed = math.inf
        state.runs.changed.clear()

    def _send(self, view: View, now: float) -> None:
        try:
            self._send_news(view, now)
        except Exception:  # of one view; the others go on
            logger.exception("%s cannot be sent", view)

    def _send_news(self, view: View, now: float) -> None:
        status = self.status(now)
        frame = self._streams[view].delta(now, status)
        if frame is None and now - self._sent[view] >= ALIVE:
            frame = self._streams[view].status(now, status)
        if frame is not None:
            self._sent[view] = now
            for viewer in self._viewers[view]:
                viewer.put(frame)

    # -- viewers -------------------------------------------------------------------------------------------------

    def show(self, viewer: Viewer, view: View) -> None:
        """Let a viewer look at this, a snapshot first. What is in that is in no delta to come."""
        self.leave(viewer)
        now = self._feed.now()
        if view not in self._streams:
            self._streams[view] = Stream(view, self._feed.state)
            self._viewers[view] = set()
            self._sent[view] = now
        self._send(view, now)
        viewer.view = view
        viewer.put(self._streams[view].snapshot(now, self.status(now)))
        self._viewers[view].add(viewer)

    def leave(self, viewer: Viewer) -> None:
        view, viewer.view = viewer.view, None
        viewer.clear()
        if view is None:
            return
        self._viewers[view].discard(viewer)
        if not self._viewers[view]:
            del self._viewers[view], self._streams[view], self._sent[view]

    async def next(self, viewer: Viewer) -> bytes:
        """The viewer's next frame: the delta that arrived, or a snapshot when it has missed one."""
        while True:
            await viewer.arrived.wait()
            view, frame, behind = viewer.view, viewer.frame, viewer.behind
            viewer.clear()
            if view is None or frame is None:
                continue
            if not behind:
                return frame
            now = self._feed.now()
            self._send(view, now)  # what is new goes to the others too
            viewer.clear()
            return self._streams[view].snapshot(now, self.status(now))

    def snapshot(self, view: View) -> bytes:
        """Everything of a view, once."""
        now = self._feed.now()
        return Stream(view, self._feed.state).snapshot(now, self.status(now))

    def status(self, now: float) -> dict[str, Any]:
        """How things are, for the title, the pill and the banner of every page."""
        if now - self._status_at >= STATUS_EVERY or self._status.get("live") != self._feed.live:
            state, live = self._feed.state, self._feed.live
            found = alerts(state, now)
            numbers = totals(state)
            self._status_at = now
            self._status = {
                "live": live,
                "trouble": None if live else self._feed.trouble,
                "alerts": len(found),
                "bad": sum(alert["level"] == "bad" for alert in found),
                "rate": numbers["rate"],
                "dead": numbers["dead"],
                "history": self._feed.loaded,
            }
        return self._status
