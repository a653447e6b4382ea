"""Publishing: what gathers while one write is in flight goes out with the next (no linger, no added latency)."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

from .channel import Channel
from .errors import (
    LONGEST_DELAY,
    ChannelFull,
    ConfigurationError,
    PayloadTooLarge,
    PublishUncertain,
    ServerUnavailable,
)
from .frame import Codec
from .message import Receipt
from .payloads import FRAME_BYTES as PAYLOAD_BYTES
from .payloads import Flight, Oversized, Payloads, too_large
from .transports import Outgoing, PayloadExpired, Transport

__all__ = ["Outbox", "Waiter"]

FRAME_BYTES = 256 * 1024
MOST_FRAMES = 64
"""Frames of one write."""
CROWD = 1024
"""Parcels in a queue from which on it is worth looking for those that nobody waits for any more."""


class _Ids(Sequence[str]):
    """Ids of consecutive events, made when they are looked at."""

    __slots__ = ("_count", "_first", "_source")

    def __init__(self, source: str, first: int, count: int) -> None:
        self._source = source
        self._first = first
        self._count = count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        numbers = range(self._first, self._first + self._count)
        if isinstance(index, slice):
            return [f"{self._source}:{number}" for number in numbers[index]]
        return f"{self._source}:{numbers[index]}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash((self._source, self._first, self._count))

    def __repr__(self) -> str:
        return repr(list(self))


class Waiter(Protocol):
    """Whoever does not wait for a write, but for what comes of it."""

    def numbered(self, source: str, sequence: int) -> None:
        """Its event has this id from now on: before it is written, and again should the first attempt fail."""
        ...

    def failed(self, error: Exception) -> None:
        """It was not written."""
        ...

    def done(self) -> bool:
        """It waits no longer: what is not on its way yet need not be written."""
        ...


@dataclass(slots=True, eq=False)
class _Parcel:
    """What one call of publish hands over."""

    events: list[Any]
    keys: list[str | None] | None
    headers: Mapping[str, str] | None
    due: float | None
    reply: str | None
    time: float
    written: asyncio.Future[int] | None
    waiter: Waiter | None = None
    first: int = 0

    def abandoned(self) -> bool:
        """Nobody waits for it any more: it need not be written, and whoever gave up may have tried again."""
        waits = self.written or self.waiter
        return waits is not None and waits.done()

    def done(self) -> None:
        if self.written is not None and not self.written.done():
            self.written.set_result(self.first)

    def fail(self, error: Exception) -> None:
        if self.written is not None and not self.written.done():
            self.written.set_exception(error)
        if self.waiter is not None:
            self.waiter.failed(error)


class Outbox:
    """One process's way to one partition of a channel. Writes are in order, one at a time, of one frame or more."""

    def __init__(
        self,
        channel: Channel[Any],
        partition: int,
        codec: Codec[Any],
        transport: Transport,
        payloads: Payloads,
        source: str,
        limit: int,
    ) -> None:
        self.channel = channel
        self.source = source if partition == 0 else f"{source}.{partition}"
        self.published = 0
        """Events written since somebody last looked (and set it to 0)."""
        self._partition = partition
        self._raw = channel.raw
        self._codec = codec
        self._transport = transport
        self._payloads = payloads if codec.tensors else None
        self._limit = limit
        self._next = 1
        self._last = 0
        """Sequence of the newest event that was taken."""
        self._queue: deque[_Parcel] = deque()
        self._crowd = CROWD
        self._writing = False
        self._writer: asyncio.Task[None] | None = None
        self._event_bytes = 0.0
        self._frame_bytes = FRAME_BYTES

    async def publish(
        self,
        events: list[Any],
        *,
        key: str | None,
        headers: Mapping[str, str] | None,
        due: float | None,
        reply: str | None,
        keys: list[str | None] | None = None,
    ) -> Receipt:
        """Resolves when the transport has the events."""
        self._codec.check(events)
        if self._raw and (key is not None or headers or due is not None):
            raise ConfigurationError(
                f"live channel {self.channel.name!r} of {self.channel.type.__name__}: its payload travels alone, "
                "without key, headers or delay; declare an Event, or durable=True"
            )
        if keys is None and key is not None:
            keys = [key] * len(events)
        parcel = _Parcel(events, keys, headers, due, reply, time.time(), None)
        if self._writing:
            parcel.written = asyncio.get_running_loop().create_future()
            self._enqueue(parcel)
            await parcel.written
        else:
            self._writing = True
            try:
                await self._write([parcel])
            except ChannelFull as error:
                raise self._full(error, parcel) from None
            finally:
                self._hand_over()
        return Receipt(_Ids(self.source, parcel.first, len(events)))  # type: ignore[arg-type]  # a lazy tuple

    def put(
        self, event: Any, waiter: Waiter, *, key: str | None, headers: Mapping[str, str] | None, reply: str | None
    ) -> None:
        """Hand over one event, of the channel's type, without waiting: what is put in one turn of the loop goes out
        together."""
        keys: list[str | None] | None = [key] if key is not None else None
        self._enqueue(_Parcel([event], keys, headers, None, reply, time.time(), None, waiter))
        if not self._writing:
            self._writing = True
            self._hand_over()

    def _enqueue(self, parcel: _Parcel) -> None:
        """While one write lasts (the channel may be full), callers may give up and come again without end."""
        self._queue.append(parcel)
        if len(self._queue) > self._crowd:
            self._queue = deque(parcel for parcel in self._queue if not parcel.abandoned())
            self._crowd = max(CROWD, 2 * len(self._queue))

    def _hand_over(self) -> None:
        if self._queue:
            self._writer = asyncio.create_task(self._drain(), name=f"publish {self.channel.name}")
        else:
            self._writing = False

    async def _drain(self) -> None:
        parcels: list[_Parcel] = []
        try:
            while self._queue:
                parcels = self._next_parcels()
                if parcels:
                    await self._settle(parcels)
        except BaseException:
            self._abandon(parcels)
            raise
        finally:
            self._writing = False

    def _next_parcels(self) -> list[_Parcel]:
        """What goes out with one write."""
        parcels: list[_Parcel] = []
        size = 0
        while self._queue and (not parcels or size < self.channel.frame * MOST_FRAMES):
            parcel = self._queue.popleft()
            if not parcel.abandoned():
                size += len(parcel.events)
                parcels.append(parcel)
        return parcels

    def _abandon(self, begun: list[_Parcel]) -> None:
        """The pipeline closes under a write: whoever waits must hear of it, for nobody goes on with this."""
        name = self.channel.name
        for parcel in begun:
            parcel.fail(
                PublishUncertain(
                    f"publish to {name!r}: the pipeline closed meanwhile; the events may or may not be there"
                )
            )
        for parcel in self._queue:
            parcel.fail(ServerUnavailable(f"publish to {name!r}: the pipeline is closed; nothing was written"))
        self._queue.clear()

    async def _settle(self, parcels: list[_Parcel]) -> None:
        """Write, and tell each caller. When a write of several fails, each is tried alone."""
        try:
            await self._write(parcels)
        except Exception as error:
            if len(parcels) > 1 and isinstance(error, (PayloadTooLarge, TypeError)):
                for parcel in parcels:
                    await self._settle([parcel])
                return
            for parcel in parcels:
                if not isinstance(error, ChannelFull):
                    parcel.fail(error)
                elif self._taken(parcel) == len(parcel.events):
                    parcel.done()
                else:
                    parcel.fail(self._full(error, parcel))
            return
        for parcel in parcels:
            parcel.done()

    def _taken(self, parcel: _Parcel) -> int:
        """How many of a parcel's events were taken by a write that failed."""
        return max(0, min(len(parcel.events), self._last - parcel.first + 1))

    def _full(self, error: ChannelFull, parcel: _Parcel) -> ChannelFull:
        return ChannelFull(str(error), published=self._taken(parcel))

    async def _write(self, parcels: list[_Parcel]) -> None:
        start = self._next
        frames: list[Outgoing] = []
        flight = None
        if self._payloads is not None:
            await self._payloads.prepare(self.channel, self._partition)
            flight = Flight(self._payloads)
        try:
            for group in _alike(parcels) if len(parcels) > 1 else (parcels,):
                frames.extend(self._frames(group, flight))
            await self._send(frames, flight)
        except BaseException as error:
            # Nothing was written, or it is unknown how much; a sequence that is reused would be taken for a repeat.
            if isinstance(error, (PayloadTooLarge, TypeError)):
                self._next = start
            raise
        finally:
            if flight is not None:
                flight.landed()

    async def _send(self, frames: list[Outgoing], flight: Flight | None) -> None:
        if flight is not None:
            await flight.upload()
        at = 0
        while at < len(frames):
            part = frames[at : at + MOST_FRAMES]
            try:
                await self._transport.publish(self.channel, self._partition, part)
            except (ChannelFull, PayloadExpired) as error:
                taken = [frame for frame in part if frame.taken]
                self._count(taken)
                if flight is None or isinstance(error, ChannelFull):
                    raise
                at += len(taken)
                await flight.upload()  # it waited longer than what it had uploaded lived
            else:
                self._count(part)
                at += len(part)

    def _count(self, taken: list[Outgoing]) -> None:
        if taken:
            self.published += sum(frame.count for frame in taken)
            self._last = taken[-1].first + taken[-1].count - 1

    def _frames(self, group: list[_Parcel], flight: Flight | None) -> list[Outgoing]:
        events: list[Any] = group[0].events
        keys, headers, times = group[0].keys, None, None
        if len(group) > 1:
            events = [event for parcel in group for event in parcel.events]
            if any(parcel.keys for parcel in group):
                keys = [key for parcel in group for key in (parcel.keys or [None] * len(parcel.events))]
            times = [parcel.time for parcel in group for _ in parcel.events]
        if any(parcel.headers for parcel in group):
            headers = [parcel.headers for parcel in group for _ in parcel.events]
        first = self._next
        for parcel in group:
            parcel.first = first
            if parcel.waiter is not None:
                parcel.waiter.numbered(self.source, first)
            first += len(parcel.events)
        return self._cut(events, keys, headers, times, group[0], flight)

    def _cut(
        self,
        events: list[Any],
        keys: list[str | None] | None,
        headers: list[Mapping[str, str] | None] | None,
        times: list[float] | None,
        model: _Parcel,
        flight: Flight | None,
    ) -> list[Outgoing]:
        """Frames within the channel's limits of events and bytes."""
        if self._raw:
            return [self._bare(event) for event in events]
        frames: list[Outgoing] = []
        place = flight.placer(self.channel, self._partition) if flight is not None else None
        at = 0
        while at < len(events):
            size = self._size(len(events) - at)
            part = slice(at, at + size)
            try:
                body = self._codec.encode(
                    events[part],
                    source=self.source,
                    sequence=self._next,
                    time=model.time,
                    times=times[part] if times else None,
                    keys=keys[part] if keys else None,
                    headers=headers[part] if headers else None,
                    due=model.due,
                    reply=model.reply,
                    place=place,
                )
            except Oversized as error:
                self._event_bytes, self._frame_bytes = error.nbytes / size, error.most
                continue
            beside = flight.take_placed() if flight is not None else 0
            self._event_bytes = (len(body) + beside) / size
            self._frame_bytes = PAYLOAD_BYTES if beside else FRAME_BYTES
            if size > 1 and len(body) > 2 * FRAME_BYTES:
                continue  # events are bigger than they were: cut smaller
            self._check_size(len(body))
            frames.append(Outgoing(body, size, self.source, self._next))
            self._next += size
            at += size
        return frames

    def _size(self, left: int) -> int:
        by_bytes = int(self._frame_bytes / self._event_bytes) if self._event_bytes else self.channel.frame
        return max(1, min(left, self.channel.frame, by_bytes))

    def _bare(self, event: Any) -> Outgoing:
        body = self._codec.bare(event)
        self._check_size(len(body))
        self._next += 1
        return Outgoing(body, 1, self.source, self._next - 1)

    def _check_size(self, size: int) -> None:
        if size > self._limit:
            raise too_large(self.channel.name, size, self._limit)

    async def drain(self) -> None:
        """Wait until everything handed over is written."""
        while self._writing:
            if self._writer is not None and not self._writer.done():
                await asyncio.gather(self._writer, return_exceptions=True)
            else:
                await asyncio.sleep(0.001)


def _alike(parcels: list[_Parcel]) -> list[list[_Parcel]]:
    """Runs that may share a frame: same due time, same reply address."""
    runs: list[list[_Parcel]] = []
    for parcel in parcels:
        if runs and runs[-1][0].due == parcel.due and runs[-1][0].reply == parcel.reply:
            runs[-1].append(parcel)
        else:
            runs.append([parcel])
    return runs


def check_envelope(key: object, headers: object) -> None:
    """Raise ConfigurationError unless these are what can travel: readers refuse a whole frame for one that is not."""
    if key is not None and not _is_text(key):
        raise ConfigurationError(f"key={key!r:.80}: a string, or None; use str(…)")
    if headers and not (
        isinstance(headers, Mapping) and all(_is_text(text) for pair in headers.items() for text in pair)
    ):
        raise ConfigurationError("headers: a dict of strings to strings; use str(…)")


def _is_text(value: object) -> bool:
    """Not every string is: half of a surrogate pair has no bytes."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_delay(delay: float | None) -> float | None:
    """The Unix time at which an event is due, or None. Raises ConfigurationError."""
    if delay is None:
        return None
    if not (isinstance(delay, (int, float)) and 0 <= delay < LONGEST_DELAY):
        raise ConfigurationError(f"delay={delay!r}: seconds, not negative, and less than ten years")
    return time.time() + delay if delay else None
