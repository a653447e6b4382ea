"""Chaos: a chain of two durable channels while workers are killed and paused and the server is killed and restarted.

`python -m tests.chaos --seconds 60 --events 100000` prints what happened, as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline import Pipeline
from pipeline.server import Server
from pipeline.transports.client import ReplyError
from pipeline.transports.scripts import Keys

from .workers import Number, Worker, inputs, outputs

LEASE = 1.0


@dataclass
class Plan:
    seconds: float
    events: int
    workers: int = 3
    kill_every: float = 1.5
    pause_every: float = 10.0
    restarts: int = 5
    seed: int = 0


@dataclass
class Report:
    events: int = 0
    kills: int = 0
    pauses: int = 0
    restarts: int = 0
    lost: int = 0
    doubled: int = 0
    retried: int = 0
    suppressed: int = 0
    repeated_publishes: int = 0
    ledger_checks: int = 0
    unbalanced: list[str] = field(default_factory=list)
    seconds: float = 0.0
    drained_after: float = 0.0
    claims: int = 0
    """Entries that other workers took over from the dead."""
    recovery: list[float] = field(default_factory=list)
    """Seconds from a kill until all that the dead worker held was with others."""

    def summary(self) -> str:
        """As JSON, with quantiles in place of the list."""
        fields = asdict(self)
        recovery = sorted(fields.pop("recovery"))
        if recovery:
            fields["recovery_p50"] = round(recovery[len(recovery) // 2], 3)
            fields["recovery_p99"] = round(recovery[int(len(recovery) * 0.99)], 3)
        return json.dumps(fields)


class Chaos:
    def __init__(self, plan: Plan, server: Server) -> None:
        self.plan = plan
        self.report = Report()
        self._server = server
        self._random = random.Random(plan.seed)
        self._workers = [Worker("square", server.url) for _ in range(plan.workers)]
        self._app = Pipeline("chaos", server.url)
        self._published = 0
        self._seen: dict[int, int] = {}
        self._over = False
        self._recovering: set[asyncio.Task[None]] = set()
        self._restarted_at: list[float] = []

    async def run(self) -> Report:
        began = time.monotonic()
        try:
            async with self._app:
                counting = asyncio.create_task(self._count())
                troubles = [
                    asyncio.create_task(one) for one in (self._kill(), self._pause(), self._restart(), self._check())
                ]
                await self._publish(began + self.plan.seconds)
                self._over = True
                await asyncio.gather(*troubles)
                published = time.monotonic()
                await self._drained()
                self.report.drained_after = time.monotonic() - published
                counting.cancel()
                await asyncio.gather(counting, return_exceptions=True)
                await self._conclude()
        finally:
            for worker in self._workers:
                with worker:
                    """Ends it."""
        self.report.seconds = time.monotonic() - began
        return self.report

    async def _publish(self, deadline: float) -> None:
        """Frames of mixed size, spread over the time there is."""
        plan, began = self.plan, time.monotonic()
        while self._published < plan.events:
            size = min(self._random.choice([1, 2, 17, 256, 300, 1000]), plan.events - self._published)
            await self._app.publish(inputs, [Number(n=self._published + i) for i in range(size)])
            self._published += size
            due = began + (deadline - began) * self._published / plan.events
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _kill(self) -> None:
        while not self._over:
            await asyncio.sleep(self._random.uniform(0.5, 1.5) * self.plan.kill_every)
            index = self._random.randrange(len(self._workers))
            pid = self._workers[index].pid
            await asyncio.to_thread(self._workers[index].__exit__, None, None, None)
            recovering = asyncio.create_task(self._recover(pid, time.monotonic()))
            self._recovering.add(recovering)
            recovering.add_done_callback(self._recovering.discard)
            self._workers[index] = Worker("square", self._server.url)
            self.report.kills += 1

    async def _recover(self, pid: int, killed: float) -> None:
        """Watch what a dead worker held until others have it."""
        held = None
        while (left := await self._held_by(pid)) is not None:
            held = max(held or 0, left)
            if left == 0:
                break
            await asyncio.sleep(0.02)
        if held and left == 0 and self.report.restarts == self._restarts_seen(killed):
            self.report.claims += held
            self.report.recovery.append(time.monotonic() - killed)

    def _restarts_seen(self, moment: float) -> int:
        return sum(1 for when in self._restarted_at if when < moment)

    async def _held_by(self, pid: int) -> int | None:
        """Entries pending for a process; None when the server is down or has forgotten it."""
        try:
            backend: Any = self._app.backend
            rows = await backend._client.call("XINFO", "CONSUMERS", Keys.of("in").stream, "square")
        except (ConnectionError, ReplyError):
            return None
        for row in rows:
            consumer = dict(zip(row[::2], row[1::2], strict=True))
            if f"-{pid}-".encode() in consumer[b"name"]:
                return int(consumer[b"pending"])
        return None

    async def _pause(self) -> None:
        while not self._over:
            await asyncio.sleep(self.plan.pause_every)
            worker = self._random.choice(self._workers)
            worker.signal(signal.SIGSTOP)
            self.report.pauses += 1
            await asyncio.sleep(LEASE * 2)
            worker.signal(signal.SIGCONT)

    async def _restart(self) -> None:
        for _ in range(self.plan.restarts):
            await asyncio.sleep(self.plan.seconds / (self.plan.restarts + 1))
            if self._over:
                return
            await asyncio.to_thread(self._server.kill)
            await asyncio.sleep(0.1)
            await asyncio.to_thread(self._server.start)
            self._restarted_at.append(time.monotonic())
            self.report.restarts += 1

    async def _check(self) -> None:
        while not self._over:
            await asyncio.sleep(0.5)
            await self._audit()

    async def _audit(self) -> None:
        try:
            ledger = await self._app.stats()
        except (ConnectionError, ReplyError):  # the server is down just now
            return
        self.report.ledger_checks += 1
        for channel in ("in", "out"):
            one = ledger.channels.get(channel)
            for name, group in one.groups.items() if one else ():
                if group.difference(one.published if one else 0):
                    self.report.unbalanced.append(f"{channel}/{name}: {group!r}")

    async def _count(self) -> None:
        async with self._app.watch(outputs, since=3600) as stream:
            async for message in stream:
                n = message.event.n
                assert message.event.squared == n * n
                self._seen[n] = self._seen.get(n, 0) + 1

    async def _drained(self) -> None:
        async with asyncio.timeout(120):
            while True:
                channels = (await self._app.stats()).channels
                group = channels["in"].groups["square"]
                if group.lag == group.pending == 0 and sum(self._seen.values()) >= channels["out"].published:
                    return
                await asyncio.sleep(0.1)

    async def _conclude(self) -> None:
        await self._audit()
        channels = (await self._app.stats()).channels
        group = channels["in"].groups["square"]
        report = self.report
        report.events = self._published
        report.lost = self._published - len(self._seen)
        report.doubled = sum(1 for count in self._seen.values() if count > 1)
        report.retried, report.suppressed = group.retried, group.duplicates_suppressed
        report.repeated_publishes = channels["in"].duplicates
        assert channels["in"].published == self._published
        assert group.handled == self._published, f"{group.dead} dead, {group.dropped} dropped: {report.summary()}"


async def run(plan: Plan) -> Report:
    with Server(appendonly=True, appendfsync="always") as server:
        return await Chaos(plan, server).run()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--events", type=int, default=100_000)
    options = parser.parse_args()
    print(asyncio.run(run(Plan(seconds=options.seconds, events=options.events))).summary())
