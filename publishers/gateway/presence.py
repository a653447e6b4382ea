"""Which workers are there, by what they report."""

from __future__ import annotations

import time

from pipeline.metrics import WorkerSample

__all__ = ["Presence"]

GONE = 30.0
"""Seconds of silence, while others are heard, after which a worker is gone: a replacement takes less to start, and what
was asked of its predecessor waits for it."""
FORGOTTEN = 3600.0
"""Seconds after which one that is gone does not come back."""


class Presence:
    """Told by this process's clock: others' may be wrong."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        """Worker → when it is gone unless it is heard again."""
        self._heard = time.monotonic()

    def begin(self, worker: str) -> None:
        """It announced something."""
        self._until[worker] = max(self._until.get(worker, 0.0), time.monotonic() + GONE)

    def report(self, sample: WorkerSample) -> None:
        now, patience = time.monotonic(), max(GONE, 3 * sample.interval)
        silence = now - self._heard
        if silence > patience / 2:  # nobody was heard: it is Redis that was away
            self._until = {worker: until + silence for worker, until in self._until.items()}
        self._heard = now
        self._until[sample.worker] = now + patience

    def lives(self, worker: str) -> bool:
        return self._until.get(worker, 0.0) > self._heard

    def forget(self) -> list[str]:
        """Those that will not come back, each told once."""
        found = [worker for worker, until in self._until.items() if self._heard - until > FORGOTTEN]
        for worker in found:
            del self._until[worker]
        return found
