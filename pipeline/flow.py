"""How much a subscriber takes ahead of its handlers: enough to stay busy, little enough to share and to fit."""

from __future__ import annotations

import asyncio
import time

__all__ = ["Flow"]

AHEAD_SECONDS = 0.25
"""Work to hold ahead, at the measured rate. Slow jobs are thus spread over workers; fast ones come in many frames."""
MOST_EVENTS = 8192
MOST_FRAMES = 64


class Flow:
    """Credits of one subscriber, in events and bytes.

    least       events it must be able to hold to fill its handlers once (concurrency × batch size)
    most_bytes  bound of the frames held, in bytes of the wire
    """

    def __init__(self, least: int, most_bytes: int) -> None:
        self.events = 0
        """Events in hand: prefetched, batching, running or committing."""
        self.nbytes = 0
        self._least = least
        self._most_bytes = most_bytes
        self._rate = 0.0
        self._frame_events = 1.0
        self._frame_bytes = 1.0
        self._settled = 0
        self._since = time.monotonic()
        self._room = asyncio.Event()
        self._room.set()

    @property
    def target(self) -> float:
        return min(max(self._least, self._rate * AHEAD_SECONDS), max(self._least, MOST_EVENTS))

    def take(self, events: int, nbytes: int) -> None:
        self.events += events
        self.nbytes += nbytes
        self._frame_events += 0.2 * (events - self._frame_events)
        self._frame_bytes += 0.2 * (nbytes - self._frame_bytes)
        self._judge()

    def give(self, events: int, nbytes: int) -> None:
        self.events -= events
        self.nbytes -= nbytes
        self._settled += events
        now = time.monotonic()
        if now - self._since > 0.02:
            rate = self._settled / (now - self._since)
            self._rate += (rate - self._rate) * min(1.0, 2 * (now - self._since) + 0.2)
            self._settled, self._since = 0, now
        self._judge()

    def _judge(self) -> None:
        if self.events < self.target and self.nbytes < self._most_bytes:
            self._room.set()
        else:
            self._room.clear()

    def frames(self) -> int:
        """Frames to ask for now."""
        by_events = (self.target - self.events) / max(1.0, self._frame_events)
        by_bytes = (self._most_bytes - self.nbytes) / max(1.0, self._frame_bytes)
        return max(1, min(MOST_FRAMES, int(by_events), int(by_bytes)))

    async def room(self) -> None:
        """Wait until more may be taken."""
        await self._room.wait()

    def open(self) -> None:
        """Let whoever waits for room go on, to stop."""
        self._room.set()
