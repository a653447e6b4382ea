"""Live channels on Redis Pub/Sub: at most once, fan-out.

Redis cuts off a subscriber that does not read, without telling the publisher. So a connection's only work here is to
move payloads into a ring bounded in frames and bytes; what a slow reader lets the ring overwrite is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import logging
import random
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any, Protocol

from ..channel import Channel
from ..errors import ServerUnavailable
from . import Commit, Entry, Group, Guarantees, Holding, Outgoing
from .client import Link, LinkLost, ReplyError
from .scripts import Keys
from .streams import PATIENCE, Streams

__all__ = ["LiveConnect", "LiveConnection", "LiveReader", "LiveTail", "PubSub", "connect_link"]

logger = logging.getLogger("pipeline.pubsub")

RING_FRAMES = 8192
RING_BYTES = 64 << 20
PING_EVERY = 5.0
DEAD_AFTER = 15.0


class LiveConnection(Protocol):
    """An open subscription of one connection."""

    async def lost(self) -> None:
        """Returns when the connection has failed."""
        ...

    async def close(self) -> None: ...


LiveConnect = Callable[[str, str, str, Callable[[bytes], None]], "asyncio.Future[LiveConnection]"]
"""(url, client name, Redis channel, sink) → a subscription that Redis has confirmed."""


class _LinkSubscription:
    """A Pub/Sub client on our own link."""

    def __init__(self, channel: str, sink: Callable[[bytes], None]) -> None:
        self._sink = sink
        self._channel = channel
        self._confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._lost = asyncio.Event()
        self._heard = time.monotonic()
        self._link: Link | None = None

    async def open(self, url: str, name: str) -> None:
        self._link = await Link.open(url, name)
        self._link.on_push = self._push
        self._link.write("SUBSCRIBE", self._channel)
        async with asyncio.timeout(5):
            await self._confirmed

    def _push(self, push: list[Any]) -> None:
        self._heard = time.monotonic()
        if not push:
            self._lost.set()
            if not self._confirmed.done():
                self._confirmed.set_exception(LinkLost("the connection was lost while subscribing"))
        elif push[0] == b"message":
            self._sink(push[2])
        elif push[0] == b"subscribe" and not self._confirmed.done():
            self._confirmed.set_result(None)

    async def lost(self) -> None:
        assert self._link is not None
        while not self._lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PING_EVERY):
                    await self._lost.wait()
                return
            if time.monotonic() - self._heard > DEAD_AFTER:
                return
            self._link.write("PING")

    async def close(self) -> None:
        if self._link is not None:
            self._link.close()


async def connect_link(url: str, name: str, channel: str, sink: Callable[[bytes], None]) -> LiveConnection:
    subscription = _LinkSubscription(channel, sink)
    try:
        await subscription.open(url, name)
    except BaseException:
        await subscription.close()
        raise
    return subscription


class _Ring:
    """Payloads in arrival order, bounded in frames and bytes. The oldest are overwritten, and counted."""

    def __init__(self, frames: int, nbytes: int) -> None:
        self.arrived = asyncio.Event()
        self.overwritten = 0
        self._items: deque[bytes] = deque()
        self._frames = frames
        self._room = nbytes

    def put(self, payload: bytes) -> None:
        self._items.append(payload)
        self._room -= len(payload)
        while len(self._items) > self._frames or (self._room < 0 and len(self._items) > 1):
            self._room += len(self._items.popleft())
            self.overwritten += 1
        self.arrived.set()

    def take(self, most: int) -> list[bytes]:
        items = self._items
        taken = [items.popleft() for _ in range(min(most, len(items)))]
        self._room += sum(map(len, taken))
        if not items:
            self.arrived.clear()
        return taken


class _Subscription:
    """A ring that a supervised connection fills; it resubscribes, with jitter, whenever the connection is lost."""

    def __init__(self, pubsub: PubSub, channel: Channel[Any]) -> None:
        self.ring = _Ring(pubsub.ring_frames, pubsub.ring_bytes)
        self._pubsub = pubsub
        self._channel = channel
        self._numbers = itertools.count(1)
        self._connection: LiveConnection | None = None
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        what = f"channel {self._channel.name!r}"
        self._connection = await self._pubsub.streams.client.persist(self._connect, patience=None, what=what)
        self._task = asyncio.create_task(self._supervise(), name=f"live {self._channel.name}")

    async def _connect(self) -> LiveConnection:
        pubsub = self._pubsub
        try:
            name = f"{pubsub.name}-live"
            connection: LiveConnection = await pubsub.connect(pubsub.url, name, self._channel.name, self.ring.put)
        except ReplyError as error:
            raise ServerUnavailable(f"Redis refuses: {error}") from None
        except (OSError, TimeoutError) as error:
            raise LinkLost(str(error) or type(error).__name__) from None
        return connection

    async def _supervise(self) -> None:
        while True:
            assert self._connection is not None
            await self._connection.lost()
            await self._connection.close()
            logger.warning(
                "channel %r: the connection was lost; what is published meanwhile is missed", self._channel.name
            )
            await asyncio.sleep(random.uniform(0, 0.05))
            self._connection = await self._reconnect()

    async def _reconnect(self) -> LiveConnection:
        """Until there is one, or this is closed: nobody would learn that this listener has gone deaf."""
        client, what = self._pubsub.streams.client, f"channel {self._channel.name!r}"
        while True:
            try:
                return await client.persist(self._connect, patience=None, what=what)
            except Exception as error:
                if client.closed:
                    raise
                logger.error("%s cannot be heard: %s", what, error)
                await asyncio.sleep(1.0)

    def take(self, most: int) -> list[Entry]:
        return [Entry(f"l{next(self._numbers)}", payload, -1) for payload in self.ring.take(most)]

    async def close(self) -> None:
        """The connection before anything is waited for: who closes may be cancelled there, again and again."""
        if self._task is not None:
            self._task.cancel()
        if self._connection is not None:
            await self._connection.close()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)


class PubSub:
    """The live transport. Outputs and counters of live subscribers go through the streams' commit."""

    guarantees = Guarantees(durable=False, replay=False, counts_gaps=True, survives_restart=False)

    def __init__(self, streams: Streams, url: str, name: str, connect: Any = connect_link) -> None:
        self.streams = streams
        self.url = url
        self.name = name
        self.connect = connect
        self.ring_frames = RING_FRAMES
        self.ring_bytes = RING_BYTES

    async def publish(self, channel: Channel[Any], partition: int, frames: Sequence[Outgoing]) -> None:
        count = sum(frame.count for frame in frames)
        meta = Keys.of(channel.name).meta
        client, what = self.streams.client, f"publish to {channel.name!r}"

        async def write() -> bool:
            link = await client.link()
            replies = [link.call("PUBLISH", channel.name, frame.body) for frame in frames]
            counted = link.call("HINCRBY", meta, "published", count)
            await link.writable()
            *heard, number = await asyncio.gather(*replies, counted, return_exceptions=True)
            for reply in heard:
                if isinstance(reply, BaseException):
                    raise reply
            return isinstance(number, int)

        if not await client.persist(write, patience=PATIENCE, what=what):
            # Full, most likely: what was heard is not to be said again because it cannot be counted.
            count_it = partial(self.streams.run, "count", [meta], count)
            await client.persist(count_it, patience=PATIENCE, what=what)

    async def full(self, channel: Channel[Any], partition: int) -> bool:
        return False  # a live channel keeps nothing

    async def join(self, channel: Channel[Any], partition: int, group: Group) -> LiveReader:
        keys = Keys.of(channel.name)
        enlist = partial(self.streams.run, "enlist", [keys.groups], group.name)
        await self.streams.client.persist(enlist, patience=None, what="join")
        reader = LiveReader(self, channel, keys, group)
        await reader.subscription.open()
        return reader

    async def tail(self, channel: Channel[Any], partition: int, since: str | None) -> LiveTail:
        tail = LiveTail(self, channel)
        await tail.subscription.open()
        return tail

    async def close(self) -> None:
        """Nothing of its own: readers and tails are closed by who opened them."""


class LiveReader:
    """A subscriber process's view of a live channel. Retries wait in this process: a live event is nobody else's."""

    def __init__(self, pubsub: PubSub, channel: Channel[Any], keys: Keys, group: Group) -> None:
        self.subscription = _Subscription(pubsub, channel)
        self._pubsub = pubsub
        self._keys = keys
        self._group = group
        self._waiting: list[tuple[float, int, Entry]] = []
        self._numbers = itertools.count(1)
        self._commits = itertools.count(1)
        self._committing = asyncio.Lock()
        self._name = secrets.token_hex(8)
        """Commits are told from their repetitions by it and their number; so there is one at a time."""
        self._stopping = asyncio.Event()
        self._overwritten = 0

    async def read(self, entries: int, wait: float) -> list[Entry]:
        deadline = time.monotonic() + wait
        while not self._stopping.is_set():
            found = self._due() + self.subscription.take(entries)
            now = time.monotonic()
            if found or now >= deadline:
                return found
            until = min(deadline, self._waiting[0][0]) if self._waiting else deadline
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(0.1, max(0.001, until - now))):
                    await self.subscription.ring.arrived.wait()
        return []

    def _due(self) -> list[Entry]:
        found = []
        while self._waiting and self._waiting[0][0] <= time.monotonic():
            found.append(heapq.heappop(self._waiting)[2])
        return found

    async def commit(self, commit: Commit) -> list[str | None]:
        effects = Commit(
            handled=commit.handled,
            dead=commit.dead,
            retried=commit.retried,
            outputs=commit.outputs,
            replies=commit.replies,
        )
        async with self._committing:
            token = f"{self._name}{next(self._commits)}"
            await self._pubsub.streams.commit(self._keys, self._group.name, effects, token)
        for retry in commit.retries:
            number = next(self._numbers)
            entry = Entry(f"r{number}", retry.body, retry.count)
            heapq.heappush(self._waiting, (time.monotonic() + retry.delay, number, entry))
        return []

    def settled(self, entry: str) -> None:
        """A live entry has no lease."""

    def holding(self) -> Holding:
        return Holding()

    def lost(self) -> list[str]:
        return []

    def overwritten(self) -> int:
        """Frames the ring lost since the last call; their events show as gaps where frames carry sequences."""
        total = self.subscription.ring.overwritten
        lost, self._overwritten = total - self._overwritten, total
        return lost

    async def release(self, entries: Sequence[str]) -> None:
        """A live entry cannot be handed back: nobody else may have it."""

    async def stop(self) -> None:
        self._stopping.set()
        self.subscription.ring.arrived.set()

    async def close(self) -> None:
        await self.subscription.close()


class LiveTail:
    def __init__(self, pubsub: PubSub, channel: Channel[Any]) -> None:
        self.subscription = _Subscription(pubsub, channel)

    @property
    def dropped(self) -> int:
        """Frames the ring lost."""
        return self.subscription.ring.overwritten

    async def __aiter__(self) -> AsyncIterator[Entry]:
        while True:
            await self.subscription.ring.arrived.wait()
            for entry in self.subscription.take(256):
                yield entry

    async def close(self) -> None:
        await self.subscription.close()
