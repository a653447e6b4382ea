"""Once a second: what this process did, and (by whichever process has the turn) the ledger of everything."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import cache
from importlib import metadata

import psutil

from .errors import PipelineError
from .gpu import Gpus
from .ledger import ChannelLedger, GroupLedger, Ledger
from .metrics import GpuSample, GroupMetrics, WorkerSample, merged
from .registry import Registry
from .router import Router
from .transports import Backend, PartitionStats
from .transports.client import LinkLost, ReplyError

__all__ = ["Reporter", "read_ledger", "with_drain"]

logger = logging.getLogger("pipeline.reporting")


async def read_ledger(backend: Backend, registry: Registry) -> Ledger:
    """The counters of every registered channel, each channel's at one moment."""
    records = await registry.records()
    shapes = {name: (record.durable, int(record.limits["partitions"])) for name, record in records.items()}
    moment, found = await backend.ledger(shapes)
    channels = {name: _channel(shapes[name][0], parts) for name, parts in found.items()}
    return Ledger(time=moment, channels=channels)


def with_drain(ledger: Ledger, before: Ledger | None) -> Ledger:
    """`ledger` with each group's `drain_seconds`, from what was handled since `before`."""
    if before is None or ledger.time <= before.time:
        return ledger
    seconds = ledger.time - before.time
    channels = {}
    for name, channel in ledger.channels.items():
        earlier = before.channels.get(name, ChannelLedger()).groups
        groups = {
            group: counts.model_copy(update={"drain_seconds": _drain(counts, earlier.get(group), seconds)})
            for group, counts in channel.groups.items()
        }
        channels[name] = channel.model_copy(update={"groups": groups})
    return ledger.model_copy(update={"channels": channels})


def _drain(now: GroupLedger, before: GroupLedger | None, seconds: float) -> float | None:
    left = now.lag + now.pending
    if not left:
        return 0.0
    settled = now.handled + now.dead - (before.handled + before.dead if before is not None else 0)
    return left * seconds / settled if settled > 0 else None


def _channel(durable: bool, parts: list[PartitionStats]) -> ChannelLedger:
    groups: dict[str, GroupLedger] = {}
    for name in sorted({name for part in parts for name in part.groups}):
        stats = [part.groups[name] for part in parts if name in part.groups]
        unjoined = sum(part.published for part in parts if name not in part.groups)  # it is about to begin there
        groups[name] = GroupLedger(
            before=sum(one.before for one in stats),
            handled=sum(one.handled for one in stats),
            dead=sum(one.dead for one in stats),
            retried=sum(one.retried for one in stats),
            duplicates_suppressed=sum(one.suppressed for one in stats),
            dropped=sum(one.dropped for one in stats),
            pending=sum(one.pending for one in stats),
            lag=sum(one.lag for one in stats) + unjoined if durable else 0,
            consumers=max(one.consumers for one in stats),
            oldest=max(one.oldest for one in stats),
            paused=any(one.paused for one in stats),
        )
    return ChannelLedger(
        durable=durable,
        published=sum(part.published for part in parts),
        duplicates=sum(part.duplicates for part in parts),
        dropped=sum(group.dropped for group in groups.values()),
        retained=sum(part.entries for part in parts),
        groups=groups,
    )


class Reporter:
    """Publishes a WorkerSample an interval. Never disturbs the work: what cannot be sent is sent with the next."""

    def __init__(
        self,
        app: str,
        worker: str,
        interval: float,
        routers: Callable[[], Iterable[tuple[Router, GroupMetrics]]],
        published: Callable[[], dict[str, int]],
        send: Callable[[WorkerSample], Awaitable[object]],
        ledger: Callable[[], Awaitable[None]],
    ) -> None:
        self._app = app
        self._worker = worker
        self._interval = interval
        self._routers = routers
        self._published = published
        self._send = send
        self._ledger = ledger
        self.reported = False
        """Something was sent, so others know of this process."""
        self._unsent: WorkerSample | None = None
        self._gpus = Gpus()
        self._seen_gpus: list[GpuSample] | None = None
        self._process = psutil.Process()
        self._cpu = time.process_time()
        self._started = time.time()
        self._last = time.monotonic()

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            try:
                self._seen_gpus = await self._gpus.read()
                sample = self.sample()
                await asyncio.sleep(0)  # events that came meanwhile go first
                try:
                    await self._send(sample)
                except Exception:
                    self._unsent = sample
                    raise
                self.reported = True
                await asyncio.sleep(0)
                await self._ledger()
            except (PipelineError, LinkLost, ReplyError) as error:
                logger.debug("metrics are late: %s", error)
            except Exception:
                logger.exception("metrics of this second could not be reported")

    def sample(self, *, last: bool = False) -> WorkerSample:
        """What was counted since the last one that was sent."""
        unsent, self._unsent = self._unsent, None
        return merged(unsent, self._sample(last)) if unsent is not None else self._sample(last)

    def _sample(self, last: bool) -> WorkerSample:
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        before, self._cpu = self._cpu, time.process_time()
        published, groups = self._published(), []
        dropped: dict[str, int] = {}
        for router, metrics in self._routers():
            channel = router.subscriber.channel.name
            for name, count in metrics.published.items():
                published[name] = published.get(name, 0) + count
            if metrics.dropped:
                dropped[channel] = dropped.get(channel, 0) + metrics.dropped
            groups.append(metrics.sample(channel, router.subscriber.group, router.flow.events, router.holding()))
        return WorkerSample(
            app=self._app,
            worker=self._worker,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=_version(),
            started=self._started,
            interval=elapsed,
            rss=self._process.memory_info().rss,
            threads=self._process.num_threads(),
            files=self._process.num_fds() if hasattr(self._process, "num_fds") else None,
            gpus=self._seen_gpus,
            cpu=(self._cpu - before) / elapsed,
            published=published,
            dropped=dropped,
            groups=groups,
            last=last,
        )


@cache
def _version() -> str:
    try:
        return metadata.version("redis-ml-pipeline")
    except metadata.PackageNotFoundError:
        return "unknown"
