"""Looks at a server's connections now and then: one timer for all of them, however many requests there are."""

from __future__ import annotations

import asyncio
from typing import Protocol

__all__ = ["Patrol"]

EVERY = 0.5
"""Seconds between rounds, at most."""


class Watched(Protocol):
    loop: asyncio.AbstractEventLoop

    def look(self, now: float, patience: float) -> None:
        """Give up what takes too long. `now` is the loop's time."""
        ...


class Patrol:
    """`patience`: seconds that a request's head, and then its body, may take."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._connections: set[Watched] = set()
        self._handle: asyncio.TimerHandle | None = None

    def add(self, connection: Watched) -> None:
        self._connections.add(connection)
        if self._handle is None:
            self._again(connection.loop)

    def discard(self, connection: Watched) -> None:
        self._connections.discard(connection)

    def _again(self, loop: asyncio.AbstractEventLoop) -> None:
        self._handle = loop.call_later(min(EVERY, self._patience / 4), self._go_round, loop)

    def _go_round(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for connection in list(self._connections):
            connection.look(now, self._patience)
        self._handle = None
        if self._connections:
            self._again(loop)
