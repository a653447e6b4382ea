"""How many predictions may be under way: a bound by count, by bytes, and by how long a new one would wait.

How long is too long follows from what is measured: the rate of answers, and what a prediction takes alone. By Little's
law so many under way over the rate is what each takes, whatever the batches, the workers and the other gateways are.
When these are flooded a gateway's share of the answers falls quicker than the rate shows. The newest answer shows it:
so many were under way when it was asked for, and so long it took.

    calm        any crowd may come, until predictions would take, and do take, far longer than alone (with others of
                its size at the other gateways), and more come than were answered;
    overloaded  from then on they are admitted only while they would take `slowdown` times what one takes alone, and the
                rest is refused at once; until nobody had to be refused for CALM seconds.

Clients that ask again when they have their answer do not get there: their number bounds what is under way. Whoever asks
at a rate beyond the workers' does, within a fraction of a second, however quick or slow the model is. While no worker
lives nothing is an overload: what is asked then waits for the next one, within the bounds. One may always be under way:
with more gateways than `slowdown` + 1 before a worker that computes one at a time, predictions take as many times what
one takes alone as there are gateways.
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

FALL = 0.6
"""Of a pace that falls, answer by answer. One that rises counts at once: in a batch the last is right."""

KNEE = 2.0
"""Predictions that take less than the slowdown by this again are no overload…"""
BRIEF = 0.2
"""…nor those that take less than so many seconds…"""
CROWD, QUICK = 72, 0.01
"""…nor so many of a model that takes less than so many seconds alone: clients that wait for their answers…"""
SEEN = 0.3
"""…or if the oldest has not been there for this part of it: the rate may be of a time with smaller batches."""
CALM = 1.0
"""For each gateway: as much less often is one refused at each."""
STUCK = 0.1
"""Seconds by which later ones must have overtaken a prediction to show that its worker died or stalls: it is not ahead
of a new one. Or four times what one takes alone, should that be more."""
LEARN = 1000.0
"""Seconds in which what one takes alone rises, with other gateways: who finds nobody here may wait for theirs."""


class Overloaded(Exception):
    """Raised when a request is not admitted. `after`: whole seconds until there should be room."""

    def __init__(self, reason: str, after: int) -> None:
        super().__init__(reason)
        self.after = after


class Admission:
    """Of one model in one gateway process. The rate counts only time in which something was under way: what the
    workers can do, not what is asked of them."""

    def __init__(self, most: int, most_bytes: int, wait: float, slowdown: float) -> None:
        self.gateways = 1
        """How many there are, this one included."""
        self.nbytes = 0
        self.refused = 0
        self.alone = 0.0
        """Seconds a prediction takes when there is no other; 0 while unknown."""
        self._most = most
        self._most_bytes = most_bytes
        self._wait = wait
        self._slowdown = slowdown
        self._rate = 0.0
        self._pace = 0.0
        """As the newest answer shows it."""
        self._done = 0
        self._busy = 0.0
        self._since = 0.0
        self._ticket = 0
        self._under_way: dict[int, tuple[float, int]] = {}
        """Ticket → when it entered, and how many were under way with it; the first first."""
        self._lonely = 0
        """The ticket that found nobody else; it was alone if there is no later one."""
        self._newest = 0.0
        """When the newest of those that are answered had entered."""
        self._moved = 0.0
        """When the last answer came."""
        self._resumed = 0.0
        """When one came after nobody had been there to give any."""
        self._learned = 0.0
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
        if inflight > self._always and self._rate and inflight > min(self._rate * self._wait, self._room()):
            self._judge(now)
        self._ticket += 1
        self._credit = max(0, self._credit - 1)
        if not inflight:
            if now - self._moved > CALM:
                self._credit = 0
            self._since = now
            self._lonely = self._ticket
        self._under_way[self._ticket] = now, inflight + 1
        self.nbytes += nbytes
        return self._ticket

    @property
    def _always(self) -> int:
        """So many may be ahead: a worker has the next one when it has answered. With others, it may be theirs."""
        return 1 if self.gateways == 1 else 0

    def _shared(self) -> float:
        """The rate, by whatever shows least of it."""
        return min(self._rate, self._pace) if self.gateways > 1 and self._pace else self._rate

    def _room(self) -> float:
        """So many may be ahead of a new one in an overload."""
        rate, wait = self._shared(), self._slowdown * self.alone
        if self.gateways == 1:
            return rate * wait
        return min(rate * wait, rate * (wait + self.alone) - 1)  # it counts as well: they all round up

    def _judge(self, now: float) -> None:
        """There are more than would be admitted in an overload; is it one? Raises Overloaded."""
        ahead, age = self._ahead(now)
        wait = ahead / self._shared()
        if wait > self._wait:
            raise self._overloaded(f"a prediction would wait {wait:.1f} s; the limit is {self._wait:g} s")
        if not self._slowdown or not self.alone or ahead <= self._always:
            return
        if self._stands_still(now - self._moved):
            return  # all of them would have been answered by now: there is nobody to do it
        if now - self._refused_at < CALM * self.gateways:
            overloaded = ahead > self._room()
        else:
            crowd = CROWD / self._rate if self.alone < QUICK else BRIEF
            limit = max(KNEE * self._slowdown * self.alone, crowd) / self.gateways
            overloaded = not self._credit and wait > limit and age > SEEN * limit
        if overloaded:
            self._refused_at = now
            raise self._overloaded(f"a prediction would take {wait:.2g} s, one alone takes {self.alone:.2g} s")

    def _stands_still(self, silence: float) -> bool:
        return silence > len(self._under_way) / self._rate + self.gateways * max(STUCK, 4 * self.alone)

    def _ahead(self, now: float) -> tuple[int, float]:
        """How many are ahead of a new one, and for how long the oldest of them has been there."""
        overtaken = self._newest - max(STUCK, 4 * self.alone)
        for stuck, (entered, _) in enumerate(self._under_way.values()):
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
        entered, place = self._under_way.pop(ticket)
        self.nbytes -= nbytes
        now = time.monotonic()
        if answered:
            self._credit += 1
            if self._rate and self._stands_still(now - max(self._moved, entered)):
                self._resumed = now
            self._moved = now
            if entered >= self._newest:
                self._newest = entered
                if now > entered > self._resumed:
                    pace = place / (now - entered)
                    self._pace = pace if pace > self._pace else self._pace + FALL * (pace - self._pace)
        if computed:
            self._learn(now, now - entered, lonely=ticket == self._lonely == self._ticket)
        self._done += answered
        self._busy += now - self._since
        self._since = now
        if (self._busy >= WINDOW and self._done >= ENOUGH) or self._busy >= PATIENCE:
            rate = self._done / self._busy
            self._rate = rate if rate > self._rate else self._rate + SMOOTHING * (rate - self._rate)
            self._done, self._busy = 0, 0.0

    def _learn(self, now: float, seconds: float, *, lonely: bool) -> None:
        """No prediction takes less than it would alone; only one that was alone shows that it takes more."""
        learned, self._learned = self._learned, now if lonely else self._learned
        if not self.alone:
            self.alone = seconds
        elif seconds < self.alone:
            self.alone += 0.3 * (seconds - self.alone)
        elif lonely:
            part = 0.1 if self.gateways == 1 else min(0.1, (now - learned) / LEARN)
            self.alone += part * (seconds - self.alone)
