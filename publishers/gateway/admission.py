"""How many predictions may be under way: a bound by count, by bytes, and by how long a new one would wait.

How long is too long follows from what is measured: the rate of answers, and what a prediction takes alone. By Little's
law so many under way over the rate is what each takes, whatever the batches, the workers and the other gateways are.

    calm        any crowd may come, until predictions would take, and do take, far longer than alone, and more come
                than were answered;
    overloaded  from then on they are admitted only while they would take `slowdown` times what one takes alone, and the
                rest is refused at once; until nobody had to be refused for CALM seconds.

Clients that ask again when they have their answer do not get there: their number bounds what is under way. Whoever asks
at a rate beyond the workers' does, within a fraction of a second, however quick or slow the model is. While no worker
lives nothing is an overload: what is asked then waits for the next one, within the bounds.
"""

from __future__ import annotations

import math
import time

__all__ = ["Admission", "Overloaded"]

WINDOW = 0.2
"""Seconds over which the rate is taken, at least…"""
ENOUGH = 16
"""…with so many answers in it…"""
PATIENCE = 5.0
"""…unless it has become so long: a worker that starts or dies is not a model that is slow."""
SMOOTHING = 0.2
"""Of a rate that falls: that is soon so on a busy machine. One that rises, with bigger batches, counts at once."""

KNEE = 2.0
"""Predictions that take less than the slowdown by this again are no overload…"""
BRIEF = 0.2
"""…nor those that take less than so many seconds…"""
CROWD, QUICK = 72, 0.01
"""…nor so many of a model that takes less than so many seconds alone: clients that wait for their answers…"""
SEEN = 0.3
"""…or if the oldest has not been there for this part of it: the rate may be of a time with smaller batches."""
CALM = 1.0
STUCK = 0.1
"""Seconds by which later ones must have overtaken a prediction to show that its worker died or stalls: it is not ahead
of a new one. Or four times what one takes alone, should that be more."""


class Overloaded(Exception):
    """Raised when a request is not admitted. `after`: whole seconds until there should be room."""

    def __init__(self, reason: str, after: int) -> None:
        super().__init__(reason)
        self.after = after


class Admission:
    """Of one model in one gateway process. The rate counts only time in which something was under way: what the
    workers can do, not what is asked of them."""

    def __init__(self, most: int, most_bytes: int, wait: float, slowdown: float) -> None:
        self.nbytes = 0
        self.refused = 0
        self.alone = 0.0
        """Seconds a prediction takes when there is no other; 0 while unknown."""
        self._most = most
        self._most_bytes = most_bytes
        self._wait = wait
        self._slowdown = slowdown
        self._rate = 0.0
        self._done = 0
        self._busy = 0.0
        self._since = 0.0
        self._ticket = 0
        self._under_way: dict[int, float] = {}
        """Ticket → when it entered, the first first."""
        self._lonely = 0
        """The ticket that found nobody else; it was alone if there is no later one."""
        self._newest = 0.0
        """When the newest of those that are answered had entered."""
        self._moved = 0.0
        """When the last answer came."""
        self._credit = 0
        """Answers that no later prediction has made up for: so many clients may be about to ask again."""
        self._refused_at = -CALM

    @property
    def inflight(self) -> int:
        return len(self._under_way)

    @property
    def drain_seconds(self) -> float:
        """Until what is under way is answered, at the measured rate; 0 while none is measured."""
        return len(self._under_way) / self._rate if self._rate else 0.0

    def enter(self, nbytes: int) -> int:
        """A ticket to leave with. Raises Overloaded."""
        inflight, now = len(self._under_way), time.monotonic()
        if inflight >= self._most:
            raise self._overloaded(f"{inflight} predictions are under way, the limit of this gateway")
        if self.nbytes + nbytes > self._most_bytes and inflight:
            raise self._overloaded(f"{self.nbytes:,} bytes of inputs are under way")
        if inflight > 1 and self._rate and inflight > self._rate * min(self._wait, self._slowdown * self.alone):
            self._judge(now)
        self._ticket += 1
        self._credit = max(0, self._credit - 1)
        if not inflight:
            if now - self._moved > CALM:
                self._credit = 0
            self._since = now
            self._lonely = self._ticket
        self._under_way[self._ticket] = now
        self.nbytes += nbytes
        return self._ticket

    def _judge(self, now: float) -> None:
        """There are more than would be admitted in an overload; is it one? Raises Overloaded."""
        ahead, age = self._ahead(now)
        wait = ahead / self._rate
        if wait > self._wait:
            raise self._overloaded(f"a prediction would wait {wait:.1f} s; the limit is {self._wait:g} s")
        if not self._slowdown or not self.alone or ahead < 2:
            return
        if now - self._moved > wait + max(STUCK, 4 * self.alone):
            return  # all of them would have been answered by now: there is nobody to do it
        if now - self._refused_at < CALM:
            overloaded = wait > self._slowdown * self.alone
        else:
            limit = max(KNEE * self._slowdown * self.alone, CROWD / self._rate if self.alone < QUICK else BRIEF)
            overloaded = not self._credit and wait > limit and age > SEEN * limit
        if overloaded:
            self._refused_at = now
            raise self._overloaded(f"a prediction would take {wait:.2g} s, one alone takes {self.alone:.2g} s")

    def _ahead(self, now: float) -> tuple[int, float]:
        """How many are ahead of a new one, and for how long the oldest of them has been there."""
        overtaken = self._newest - max(STUCK, 4 * self.alone)
        for stuck, entered in enumerate(self._under_way.values()):
            if entered >= overtaken:
                return len(self._under_way) - stuck, now - entered
        return 0, 0.0

    def grow(self, nbytes: int) -> None:
        """One that entered has so many bytes more than it said. Raises Overloaded."""
        if self.nbytes + nbytes > self._most_bytes and len(self._under_way) > 1:
            raise self._overloaded(f"{self.nbytes:,} bytes of inputs are under way")
        self.nbytes += nbytes

    def _overloaded(self, reason: str) -> Overloaded:
        self.refused += 1
        return Overloaded(reason, max(1, math.ceil(self.drain_seconds)))

    def leave(self, ticket: int, nbytes: int, *, answered: bool, computed: bool = False) -> None:
        """`computed`: with what the model made of it, so that what it took tells something."""
        entered = self._under_way.pop(ticket)
        self.nbytes -= nbytes
        now = time.monotonic()
        if answered:
            self._credit += 1
            self._moved = now
            self._newest = max(self._newest, entered)
        if computed:
            self._learn(now - entered, lonely=ticket == self._lonely == self._ticket)
        self._done += answered
        self._busy += now - self._since
        self._since = now
        if (self._busy >= WINDOW and self._done >= ENOUGH) or self._busy >= PATIENCE:
            rate = self._done / self._busy
            self._rate = rate if rate > self._rate else self._rate + SMOOTHING * (rate - self._rate)
            self._done, self._busy = 0, 0.0

    def _learn(self, seconds: float, *, lonely: bool) -> None:
        """No prediction takes less than it would alone; only one that was alone shows that it takes more."""
        if not self.alone:
            self.alone = seconds
        elif seconds < self.alone:
            self.alone += 0.3 * (seconds - self.alone)
        elif lonely:
            self.alone += 0.1 * (seconds - self.alone)
