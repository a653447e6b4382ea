"""How many predictions may be under way: a bound by count, by bytes, and by how long a new one would wait."""

from __future__ import annotations

import math
import time

__all__ = ["Admission", "Overloaded"]

WINDOW = 0.5
"""Seconds over which the rate is taken, at least…"""
ENOUGH = 16
"""…with so many answers in it…"""
PATIENCE = 5.0
"""…unless it has become so long: a worker that starts or dies is not a model that is slow."""
SMOOTHING = 0.5


class Overloaded(Exception):
    """Raised when a request is not admitted. `after`: whole seconds until there should be room."""

    def __init__(self, reason: str, after: int) -> None:
        super().__init__(reason)
        self.after = after


class Admission:
    """Of one model in one gateway process. The rate counts only time in which something was under way: what the
    workers can do, not what is asked of them."""

    def __init__(self, most: int, most_bytes: int, wait: float) -> None:
        self.inflight = 0
        self.nbytes = 0
        self.refused = 0
        self._most = most
        self._most_bytes = most_bytes
        self._wait = wait
        self._rate = 0.0
        self._done = 0
        self._busy = 0.0
        self._since = 0.0

    @property
    def drain_seconds(self) -> float:
        """Until what is under way is answered, at the measured rate; 0 while none is measured."""
        return self.inflight / self._rate if self._rate else 0.0

    def enter(self, nbytes: int) -> None:
        """Raises Overloaded."""
        if self.inflight >= self._most:
            raise self._overloaded(f"{self.inflight} predictions are under way, the limit of this gateway")
        if self.nbytes + nbytes > self._most_bytes and self.inflight:
            raise self._overloaded(f"{self.nbytes:,} bytes of inputs are under way")
        if self.drain_seconds > self._wait:
            raise self._overloaded(f"a prediction would wait {self.drain_seconds:.1f} s; the limit is {self._wait:g} s")
        if self.inflight == 0:
            self._since = time.monotonic()
        self.inflight += 1
        self.nbytes += nbytes

    def grow(self, nbytes: int) -> None:
        """One that entered has so many bytes more than it said. Raises Overloaded."""
        if self.nbytes + nbytes > self._most_bytes and self.inflight > 1:
            raise self._overloaded(f"{self.nbytes:,} bytes of inputs are under way")
        self.nbytes += nbytes

    def _overloaded(self, reason: str) -> Overloaded:
        self.refused += 1
        return Overloaded(reason, max(1, math.ceil(self.drain_seconds)))

    def leave(self, nbytes: int, *, answered: bool) -> None:
        self.inflight -= 1
        self.nbytes -= nbytes
        now = time.monotonic()
        self._done += answered
        self._busy += now - self._since
        self._since = now
        if (self._busy >= WINDOW and self._done >= ENOUGH) or self._busy >= PATIENCE:
            rate = self._done / self._busy
            self._rate = rate if not self._rate else self._rate + SMOOTHING * (rate - self._rate)
            self._done, self._busy = 0, 0.0
