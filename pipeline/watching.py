"""Watching: a fan-out read of a channel by anyone, that never disturbs its groups."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

from .channel import Channel
from .drafts import Sequences
from .errors import ConfigurationError, FrameError, PayloadGone
from .frame import Codec, Frame
from .message import Message
from .payloads import Payloads
from .transports import Entry, Tail, Transport

__all__ = ["Beginning", "Since", "Watch", "before", "position", "undisturbed"]

logger = logging.getLogger("pipeline.watching")

T = TypeVar("T")
Since = str | float | datetime | None

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}
MOST_WAITING = 64
"""Frames of several partitions that may wait for a slow watcher."""


def seconds_ago(since: str) -> float | None:
    """ "5m" and "300" → 300.0; None when it is no duration."""
    unit = next(unit for unit in sorted(_UNITS, key=len, reverse=True) if since.endswith(unit))
    try:
        seconds = float(since.removesuffix(unit)) * _UNITS[unit]
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) else None


def position(since: str | float | datetime) -> str | None:
    """The stream position of a time; None when `since` is a message id. Raises ValueError."""
    given = since
    if isinstance(since, str):  # as the command line and URLs have it
        ago = seconds_ago(since)
        since = ago if ago is not None else _datetime(since) or since
    if isinstance(since, datetime):
        if since.tzinfo is None:
            raise ConfigurationError(
                f"since={given!r}: a datetime without a time zone is ambiguous; use datetime.now(UTC) and its kin"
            )
        moment = since.timestamp()
    elif isinstance(since, (int, float)):
        moment = _ago(since, given)
    elif isinstance(since, str) and ":" in since and since.rpartition(":")[2].isdigit():
        return None
    else:
        raise ConfigurationError(f'since={since!r}: use "30s", "5m", "2h", seconds, a datetime, or a message id')
    return f"{max(0, int(moment * 1000))}-0"


def _datetime(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def before(entry: str) -> str:
    """The position after which an entry is the first."""
    moment, _, events = entry.partition("-")
    return f"{moment}-{int(events) - 1}"


def _ago(seconds: float, since: object) -> float:
    if not 0 <= seconds < math.inf:
        raise ConfigurationError(f"since={since!r}: a time in the past, so not negative")
    return time.time() - seconds


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where a watch begins: after a position in each partition (None: with what is new), and there after a message."""

    positions: Sequence[str | None]
    message: str | None = None


_closing: set[asyncio.Task[None]] = set()
"""The event loop itself holds tasks weakly."""


async def undisturbed(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` in a task of its own. It goes on to its end when whoever awaits this is cancelled: once, or at each
    of its awaits, as within a cancelled scope of anyio (Starlette's, when a client has gone)."""
    task = asyncio.create_task(work)
    _closing.add(task)
    task.add_done_callback(_closing.discard)
    await asyncio.shield(task)


class Watch(Generic[T]):
    """`async with app.watch(channel, since=…) as stream: async for message in stream`. Listening begins on entry.

    `dropped` counts events this watcher is known to have missed, those among them that are not of the channel's type.
    `stored` is when the server took what was read last, in Unix seconds of its clock, which all publishers share while
    `Message.time` is by each one's own; None on live channels.
    """

    def __init__(
        self,
        channel: Channel[T],
        codec: Codec[T],
        transport: Transport,
        payloads: Payloads,
        begin: Callable[[], Awaitable[Beginning]],
    ) -> None:
        self._channel = channel
        self._codec = codec
        self._transport = transport
        self._payloads = payloads
        self._begin = begin
        self._message: str | None = None
        self._tails: list[Tail] = []
        self._sequences = Sequences()
        self._missed = 0
        self._said = False
        self.stored: float | None = None
        self._messages: AsyncIterator[Message[T]] | None = None

    @property
    def dropped(self) -> int:
        durable = self._channel.durable
        return self._missed + (sum(tail.dropped for tail in self._tails) if durable or self._channel.raw else 0)

    async def __aenter__(self) -> Watch[T]:
        beginning = await self._begin()
        self._message = beginning.message
        try:
            for partition, after in enumerate(beginning.positions):
                self._tails.append(await self._transport.tail(self._channel, partition, after))
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await undisturbed(self._close())

    async def _close(self) -> None:
        if self._messages is not None:
            await self._messages.aclose()  # type: ignore[attr-defined]
        for tail in self._tails:
            await tail.close()

    def __aiter__(self) -> AsyncIterator[Message[T]]:
        if self._messages is None:
            self._messages = self._read()
        return self._messages

    async def _read(self) -> AsyncIterator[Message[T]]:
        entries = self._only() if len(self._tails) == 1 else self._merge()
        try:
            async for partition, entry in entries:
                frame = await self._decode(partition, entry)
                if frame is None:
                    continue
                if frame.invalid:
                    self._leave_out([frame.events[index] for index in frame.invalid])
                self.stored = int(entry.id.partition("-")[0]) / 1000 if self._channel.durable else None
                for index in range(self._first(frame), len(frame.events)):
                    if index not in frame.invalid:
                        yield frame.message(index)
        finally:
            await entries.aclose()

    async def _decode(self, partition: int, entry: Entry) -> Frame[T] | None:
        try:
            if self._channel.durable:
                beside = await self._payloads.open(self._channel, partition, entry.body)
                return self._codec.decode(entry.body, count=entry.count, position=entry.position, beside=beside)
            frame = self._codec.decode_live(entry.body)
        except PayloadGone as error:
            logger.info("channel %r: %d events are left out: %s", self._channel.name, entry.count, error)
            self._missed += entry.count
            return None
        except FrameError as error:
            logger.warning("channel %r: a frame cannot be read and is left out: %s", self._channel.name, error)
            return None
        missed = self._sequences.missed(frame)
        if missed is None:
            return None
        self._missed += missed
        return frame

    def _leave_out(self, invalid: list[Any]) -> None:
        """Count them all, and say it once: who publishes another shape goes on."""
        self._missed += len(invalid)
        if not self._said:
            self._said = True
            logger.warning("channel %r: invalid events are left out: %s", self._channel.name, invalid[0].reason)

    def _first(self, frame: Frame[T]) -> int:
        """Skip, in the frame that holds it, up to and including the message whose id was given as since=."""
        if self._message is not None:
            for index in range(len(frame.events)):
                if frame.id(index) == self._message:
                    self._message = None
                    return index + 1
        return 0

    async def _only(self) -> AsyncGenerator[tuple[int, Entry]]:
        entries = aiter(self._tails[0])
        try:
            async for entry in entries:
                yield 0, entry
        finally:
            await entries.aclose()  # type: ignore[attr-defined]

    async def _merge(self) -> AsyncGenerator[tuple[int, Entry]]:
        queue: asyncio.Queue[tuple[int, Entry]] = asyncio.Queue(MOST_WAITING)

        async def pump(partition: int, tail: Tail) -> None:
            async for entry in tail:
                await queue.put((partition, entry))

        pumps = [
            asyncio.create_task(pump(partition, tail), name=f"watch {self._channel.name}")
            for partition, tail in enumerate(self._tails)
        ]
        try:
            while True:
                yield await queue.get()
        finally:
            for task in pumps:
                task.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
