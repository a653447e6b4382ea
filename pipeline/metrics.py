"""What processes report once a second, as ordinary events that dashboards and Prometheus read."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

from .channel import Channel
from .events import Event
from .transports import Holding

__all__ = [
    "LATENCY_BOUNDS",
    "GpuSample",
    "GroupMetrics",
    "GroupSample",
    "Histogram",
    "WorkerSample",
    "merged",
    "metrics_channel",
    "quantile",
]

LATENCY_BOUNDS: tuple[float, ...] = tuple(1e-5 * 10 ** (i / 20) for i in range(141))
"""Upper bounds in seconds of the latency histogram's bins: 20 a decade, 10 µs to 100 s. One overflow bin follows."""


class GroupSample(Event):
    """One group's work in one process during one interval. Counts are of events, in this interval only."""

    channel: str
    group: str
    handled: int
    dead: int
    retried: int
    suppressed: int
    in_hand: int
    """Events prefetched, batching or running at the end of the interval."""
    busy: float
    """Seconds spent in handlers during the interval (more than its length with concurrency)."""
    batches: dict[str, int]
    """Why batches were released → how many: size, timeout, idle, flush."""
    batch_sizes: dict[int, int]
    """Batch size rounded down to a power of two → how many batches."""
    latency: dict[int, int]
    """Bin of LATENCY_BOUNDS → events, from publish to the handler's end, in seconds."""
    leases: int = 0
    """Stream entries held by lease at the end of the interval."""
    oldest_lease: float = 0.0
    """Seconds for which this process has had the oldest of them."""
    paused: bool = False
    """Its group was paused when this process last looked."""
    dropped: int = 0
    """Events of a live channel known to be lost to it."""


class GpuSample(Event):
    """One GPU of the process's host, whoever uses it."""

    index: int
    name: str
    utilisation: float
    """0…1: the share of the last moments in which a kernel ran."""
    memory_used: int
    """Bytes."""
    memory_total: int


class WorkerSample(Event):
    """One process during one interval."""

    app: str
    worker: str
    host: str
    pid: int
    version: str
    started: float
    """Unix time of the start of the process's app."""
    interval: float
    """Seconds this sample covers."""
    rss: int
    """Resident memory, bytes."""
    cpu: float
    """Cores' worth of CPU time used during the interval."""
    published: dict[str, int]
    """Channel → events published by this process in the interval (outputs of handlers included)."""
    dropped: dict[str, int]
    """Live channel → events known to be lost to this process in the interval."""
    groups: list[GroupSample]
    """Its subscribers."""
    threads: int = 0
    """Of the operating system, those of libraries included."""
    files: int | None = None
    """Open file descriptors, sockets included; None where the system does not tell."""
    gpus: list[GpuSample] | None = None
    """None without a GPU, or without the extra `gpu`."""
    last: bool = False
    """The process's app was closed in order after this. Who falls silent without it was killed, or cut off."""


def merged(earlier: WorkerSample, later: WorkerSample) -> WorkerSample:
    """One sample of both intervals; what is not counted is as it was at the end."""
    before = {(group.channel, group.group): group for group in earlier.groups}
    groups = [
        _added(before.pop((group.channel, group.group), None), group, _GROUP_COUNTS, _GROUP_BINS)
        for group in later.groups
    ]
    whole = later.model_copy(update={"groups": [*groups, *before.values()]})
    return _added(earlier, whole, ("interval",), ("published", "dropped"))


_GROUP_COUNTS = ("handled", "dead", "retried", "suppressed", "busy", "dropped")
_GROUP_BINS = ("batches", "batch_sizes", "latency")
Sample = TypeVar("Sample", GroupSample, WorkerSample)


def _added(one: Sample | None, other: Sample, counts: Sequence[str], bins: Sequence[str]) -> Sample:
    if one is None:
        return other
    sums: dict[str, Any] = {name: getattr(one, name) + getattr(other, name) for name in counts}
    sums |= {name: dict(Counter(getattr(one, name)) + Counter(getattr(other, name))) for name in bins}
    return other.model_copy(update=sums)


metrics_channel: Channel[WorkerSample] = Channel("pipeline.metrics", WorkerSample, keep=900.0)


class Histogram:
    """Counts of seconds in logarithmic bins; sparse, so that idle seconds cost nothing on the wire."""

    __slots__ = ("bins",)

    def __init__(self) -> None:
        self.bins: dict[int, int] = {}

    def add(self, seconds: float, count: int = 1) -> None:
        index = bisect_left(LATENCY_BOUNDS, seconds)
        self.bins[index] = self.bins.get(index, 0) + count


def quantile(bins: dict[int, int], q: float) -> float:
    """The q-quantile (0…1) in seconds of a sparse histogram: its bin's upper bound; NaN when empty."""
    rank = q * sum(bins.values())
    for index in sorted(bins):
        rank -= bins[index]
        if rank <= 0:
            return LATENCY_BOUNDS[min(index, len(LATENCY_BOUNDS) - 1)]
    return math.nan


class GroupMetrics:
    """What one router counts between two samples."""

    __slots__ = (
        "batch_sizes", "batches", "busy", "dead", "dropped", "handled", "latency", "published", "retried", "suppressed",
    )  # fmt: skip

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.handled = 0
        self.dead = 0
        self.retried = 0
        self.suppressed = 0
        self.dropped = 0
        self.busy = 0.0
        self.latency = Histogram()
        self.published: dict[str, int] = {}
        self.batches: dict[str, int] = {}
        self.batch_sizes: dict[int, int] = {}

    def batch(self, size: int, reason: str) -> None:
        self.batches[reason] = self.batches.get(reason, 0) + 1
        power = 1 << (size.bit_length() - 1)
        self.batch_sizes[power] = self.batch_sizes.get(power, 0) + 1

    def sample(self, channel: str, group: str, in_hand: int, holding: Holding) -> GroupSample:
        """What was counted since the last sample; counting begins anew."""
        sample = GroupSample(
            channel=channel,
            group=group,
            handled=self.handled,
            dead=self.dead,
            retried=self.retried,
            suppressed=self.suppressed,
            in_hand=in_hand,
            busy=self.busy,
            batches=self.batches,
            batch_sizes=self.batch_sizes,
            latency=self.latency.bins,
            leases=holding.leases,
            oldest_lease=holding.oldest,
            paused=holding.paused,
            dropped=self.dropped,
        )
        self.reset()
        return sample
