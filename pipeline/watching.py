"""Watching: a fan-out read of a channel by anyone, that never disturbs its groups."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import datetime
from typing import Any, Generic, TypeVar

from .channel import Channel
from .drafts import Gaps
from .errors import ConfigurationError, FrameError, PayloadGone
from .frame import Codec, Frame
from .message import Message
from .payloads import Payloads
from .transports import Entry, Tail, Transport

__all__ = ["Since", "Watch", "position"]

logger = logging.getLogger("pipeline.watching")

T = TypeVar("T")
Since = str | float | datetime | None

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
MOST_WAITING = 64
"""Frames of several partitions that may wait for a slow watcher."""


def seconds_ago(since: str) -> float | None:
    """ "5m" → 300.0; None when it is no duration."""
    for unit in sorted(_UNITS, key=len, reverse=True):
        number = since.removesuffix(unit)
        if number != since:
            try:
                return float(number) * _UNITS[unit]
            except ValueError:
                return None
    return None


def position(since: str | float | datetime) -> str | None:
    """The stream position of a time; None when `since` is a message id. Raises ValueError."""
    if isinstance(since, datetime):
        if since.tzinfo is None:
            raise ConfigurationError(
                "since= a datetime without a time zone is ambiguous; use datetime.now(UTC) and its kin"
            )
        moment = since.timestamp()
    elif isinstance(since, (int, float)):
        moment = _ago(since, since)
    else:
        ago = seconds_ago(since)
        if ago is None:
            if ":" in since and since.rpartition(":")[2].isdigit():
                return None
            raise ConfigurationError(f'since={since!r}: use "30s", "5m", "2h", seconds, a datetime, or a message id')
        moment = _ago(ago, since)
    return f"{max(0, int(moment * 1000))}-0"


def _ago(seconds: float, since: object) -> float:
    if not 0 <= seconds < math.inf:
        raise ConfigurationError(f"since={since!r}: a time in the past, so not negative")
    return time.time() - seconds


class Watch(Generic[T]):
    """`async with app.watch(channel, since=…) as stream: async for message in stream`. Listening begins on entry.

    `dropped` counts events this watcher is known to have missed.
    """

    def __init__(
        self,
        channel: Channel[T],
        codec: Codec[T],
        transport: Transport,
        payloads: Payloads,
        since: Since,
        prepare: Any,
    ) -> None:
        if since is not None and not channel.durable:
            raise ConfigurationError(f"channel {channel.name!r} is live: it has no past to watch since={since!r}")
        self._after = since if isinstance(since, str) and position(since) is None else None
        self._since = None if since is None else "0-0" if self._after else position(since)
        self._channel = channel
        self._codec = codec
        self._transport = transport
        self._payloads = payloads
        self._prepare = prepare
        self._tails: list[Tail] = []
        self._gaps = Gaps()
        self._missed = 0
        self._messages: AsyncIterator[Message[T]] | None = None

    @property
    def dropped(self) -> int:
        durable = self._channel.durable
        return self._missed + (sum(tail.dropped for tail in self._tails) if durable or self._channel.raw else 0)

    async def __aenter__(self) -> Watch[T]:
        await self._prepare()
        for partition in range(self._channel.partitions):
            self._tails.append(await self._transport.tail(self._channel, partition, self._since))
        return self

    async def __aexit__(self, *_: object) -> None:
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
                for index in range(len(frame.events)):
                    if index not in frame.invalid and self._is_after(frame, index):
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
        self._missed += self._gaps.note(frame)
        return frame

    def _is_after(self, frame: Frame[T], index: int) -> bool:
        """Skip up to and including the message whose id was given as since=."""
        if self._after is None:
            return True
        if frame.id(index) == self._after:
            self._after = None
        return False

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
