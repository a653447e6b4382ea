"""The in-memory backend, `memory://NAME`: real, for tests and for trying things out in one process.

The same URL is the same store for all pipelines of a process, whatever loop or thread they run in; it is forgotten
when the last of them closes. Leases, due times and ages go by the store's clock, which tests move on; see
pipeline.testing.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeVar

from ..channel import Channel
from ..errors import ServerUnavailable
from . import Commit, Entry, Group, Guarantees, Holding, Outgoing, PartitionStats, Retried
from .client import LinkLost
from .store import Partition, Position, Store, parse

__all__ = ["MemoryBackend"]

T = TypeVar("T")

STEP = 0.002
"""Seconds between looks, for who waits."""
RING_FRAMES = 8192

_stores: dict[str, Store] = {}


class MemoryBackend:
    def __init__(self, url: str, store: Store) -> None:
        self.store = store
        self.durable = _Durable(store)
        self.live = _Live(store)
        self.payloads = None
        self._url = url
        self._open = False

    @classmethod
    def at(cls, url: str) -> MemoryBackend:
        return cls(url, _stores.setdefault(url, Store()))

    @property
    def connected(self) -> bool:
        return self._open

    async def open(self, patience: float | None) -> None:
        self._open = True
        self.store.users += 1

    async def replies(self, address: str, wait: float) -> list[bytes]:
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline:
            with self.store.lock:
                if found := self.store.replies.pop(address, None):
                    return list(found)
            await asyncio.sleep(STEP)
        return []

    async def register(self, name: str, record: bytes) -> bytes | None:
        """See register.lua."""
        with self.store.lock:
            before = self.store.channels.get(name)
            if before is None or _shape(before) == _shape(record):
                self.store.channels[name] = record
            return before

    async def record(self, name: str, patience: float = 0.0) -> bytes | None:
        return self.store.channels.get(name)

    async def registered(self) -> dict[str, bytes]:
        return dict(self.store.channels)

    async def ledger(self, channels: Mapping[str, tuple[bool, int]]) -> tuple[float, dict[str, list[PartitionStats]]]:
        with self.store.lock:
            return self.store.clock.now(), {
                name: [self._stats(name, part, durable) for part in range(partitions)]
                for name, (durable, partitions) in channels.items()
            }

    def _stats(self, name: str, part: int, durable: bool) -> PartitionStats:
        return self.store.partition(name, part).stats()

    async def settle_letter(
        self, channel: str, partition: int, group: str, letter: str, again: Retried | None, ttl: float
    ) -> bool:
        with self.store.lock:
            return self.store.partition(channel, partition).settle_letter(group, letter, again)

    async def settled_letters(self, channel: str, partition: int, group: str) -> set[str]:
        found = self.store.partition(channel, partition).groups.get(group)
        return set(found.settled) if found else set()

    async def rewind(self, channel: str, partition: int, group: str, position: str) -> int:
        with self.store.lock:
            return self.store.partition(channel, partition).rewind(group, parse(position))

    async def newest(self, channel: str, partition: int, most: int, below: str | None) -> list[Entry]:
        with self.store.lock:
            return self.store.partition(channel, partition).newest_entries(most, parse(below) if below else None)

    async def pause(self, channel: str, partition: int, group: str, paused: bool) -> bool:
        with self.store.lock:
            return self.store.partition(channel, partition).pause(group, paused)

    async def dropped(self, channel: str, group: str, count: int) -> None:
        with self.store.lock:
            if (found := self.store.partition(channel).groups.get(group)) is not None:
                found.dropped += count

    async def turn(self, name: str, holder: str, seconds: float) -> bool:
        with self.store.lock:
            now = time.time()
            if self.store.turns.get(name, 0.0) > now:
                return False
            self.store.turns[name] = now + seconds
            return True

    async def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self.durable.closed = True
        self.store.users -= 1
        if self.store.users == 0:
            _stores.pop(self._url, None)


def _shape(record: bytes) -> tuple[bool, int]:
    """What all who use a channel must agree on."""
    values = json.loads(record)
    return values["durable"], values["limits"]["partitions"]


class _Durable:
    guarantees = Guarantees(durable=True, replay=True, counts_gaps=True, survives_restart=False)

    def __init__(self, store: Store) -> None:
        self.closed = False
        self._store = store

    async def publish(self, channel: Channel[Any], partition: int, frames: Sequence[Outgoing]) -> None:
        place = self._store.partition(channel.name, partition)
        for frame in frames:
            await self._publish_one(channel, place, frame)
            frame.taken = True
        with self._store.lock:
            place.trim(channel.keep)

    async def _publish_one(self, channel: Channel[Any], place: Partition, frame: Outgoing) -> None:
        def work() -> bool:
            return place.publish(frame, channel)

        while True:
            if await self._insist(work, "publish"):
                return
            if self.closed:
                raise ServerUnavailable("this pipeline is closed")
            await asyncio.sleep(STEP)

    async def _insist(self, work: Callable[[], T], operation: str, commit: Commit | None = None) -> T:
        """As the Redis transport does: what is idempotent is repeated when its answer is lost."""
        while True:
            try:
                with self._store.lock:
                    result: T = self._store.faults.run(operation, work)
                return result
            except LinkLost:
                if commit is not None:
                    commit.uncertain = True
                await asyncio.sleep(STEP * random.random())

    async def full(self, channel: Channel[Any], partition: int) -> bool:
        with self._store.lock:
            place = self._store.partition(channel.name, partition)
            return place.outstanding() >= place.in_events(channel.limit)

    async def join(self, channel: Channel[Any], partition: int, group: Group) -> _Reader:
        with self._store.lock:
            self._store.partition(channel.name, partition).join(group.name, group.start, group.consumer)
        return _Reader(self, self._store, channel, partition, group)

    async def tail(self, channel: Channel[Any], partition: int, since: str | None) -> _Tail:
        place = self._store.partition(channel.name, partition)
        return _Tail(self._store, channel.name, partition, parse(since) if since else place.newest)

    async def commit(self, place: Partition, group: str, commit: Commit) -> list[str | None]:
        def work() -> list[str | None]:
            if statuses := place.check(group, commit.segments):
                return statuses
            place.settle(group, commit)
            self.emit(commit)
            return []

        return await self._insist(work, "commit", commit)

    def emit(self, commit: Commit) -> None:
        for output in commit.outputs:
            place = self._store.partition(output.channel.name, output.partition)
            if output.channel.durable:
                if output.channel.drops_oldest:
                    place.drop_oldest(output.channel.limit, output.count)
                place.add(output.count, output.body)
            else:
                place.published += output.count
                self._store.tell(output.channel.name, output.body)
        for reply in commit.replies:
            self._store.replies.setdefault(reply.address, deque()).append(reply.body)

    async def close(self) -> None:
        """Nothing is open."""


class _Reader:
    def __init__(self, durable: _Durable, store: Store, channel: Channel[Any], partition: int, group: Group) -> None:
        self._durable = durable
        self._store = store
        self._where = (channel.name, partition)
        self._keep = channel.keep
        self._partitions = channel.partitions
        self._group = group
        self._held: dict[str, float] = {}
        self._lost: list[str] = []
        self._stopping = False
        self._paused = False
        self._alone = ""

    @property
    def _place(self) -> Partition:
        place = self._store.partition(*self._where)
        if self._group.name not in place.groups:  # flushed: made anew, as on Redis
            self._lost += self._held
            self._held.clear()
            place.join(self._group.name, self._group.start, self._group.consumer)
        return place

    async def read(self, entries: int, wait: float) -> list[Entry]:
        deadline = time.monotonic() + wait
        while not self._stopping:
            try:
                with self._store.lock:
                    found = self._store.faults.run("read", lambda: self._look(entries))
            except LinkLost:
                found = []
            if found or time.monotonic() >= deadline:
                return list(found)
            await asyncio.sleep(STEP)
        return []

    def _look(self, entries: int) -> list[Entry]:
        place, group = self._place, self._group
        if group.exclusive and not self._may_read():
            return []
        self._lost += (lost := place.renew(group.name, group.consumer, group.lease, list(self._held)))
        for id_ in lost:
            self._held.pop(id_, None)
        self._paused = place.groups[group.name].paused
        if self._paused or self._alone in self._held:
            return []
        found, suspects = place.take_due(group.name, group.lease, max(16, entries), not self._held)
        if suspects and found:
            self._alone = found[-1].id
        if not suspects:
            found += place.claim(group.name, group.consumer, group.lease, entries)
            found = found or place.read(group.name, group.consumer, entries)
        found = [entry for entry in found if entry.id not in self._held]
        self._held.update(dict.fromkeys((entry.id for entry in found), self._store.clock.now()))
        return found

    def _may_read(self) -> bool:
        """Own the partition, or come to own it; give it up when this process has more than its share."""
        (channel, partition), group = self._where, self._group
        owners = self._store.owners.setdefault((channel, group.name), {})
        members = self._store.partition(channel).groups[group.name].consumers
        most = math.ceil(self._partitions / max(1, len(members)))
        mine = sorted(part for part, owner in owners.items() if owner == group.consumer)
        if partition in mine:
            if partition not in mine[most:]:
                return True
            if not self._held:
                del owners[partition]
            return False
        if partition in owners or len(mine) >= most:
            return False
        owners[partition] = group.consumer
        return True

    async def commit(self, commit: Commit) -> list[str | None]:
        return await self._durable.commit(self._place, self._group.name, commit)

    def settled(self, entry: str) -> None:
        self._held.pop(entry, None)

    def holding(self) -> Holding:
        since = next(iter(self._held.values()), None)
        oldest = 0.0 if since is None else self._store.clock.now() - since
        return Holding(len(self._held), oldest, self._paused)

    def lost(self) -> list[str]:
        lost, self._lost = self._lost, []
        return lost

    async def release(self, entries: Sequence[str]) -> None:
        with self._store.lock:
            self._place.release(self._group.name, self._group.consumer, list(entries))
        for id_ in entries:
            self._held.pop(id_, None)

    async def stop(self) -> None:
        self._stopping = True

    async def close(self) -> None:
        with self._store.lock:
            place = self._store.partition(*self._where)
            place.trim(self._keep)
            if (group := place.groups.get(self._group.name)) is not None:
                group.consumers.discard(self._group.consumer)
            owners = self._store.owners.get((self._where[0], self._group.name), {})
            if owners.get(self._where[1]) == self._group.consumer:
                del owners[self._where[1]]


class _Tail:
    def __init__(self, store: Store, channel: str, partition: int, since: Position) -> None:
        self.dropped = 0
        self._store = store
        self._where = (channel, partition)
        self._since = since

    async def __aiter__(self) -> AsyncIterator[Entry]:
        while True:
            with self._store.lock:
                found = self._store.partition(*self._where).after(self._since)
            for entry in found:
                self._since = parse(entry.id)
                yield entry
            await asyncio.sleep(STEP)

    async def close(self) -> None:
        """Nothing is open."""


class _Live:
    guarantees = Guarantees(durable=False, replay=False, counts_gaps=True, survives_restart=False)

    def __init__(self, store: Store) -> None:
        self._store = store
        self.ring_frames = RING_FRAMES

    async def publish(self, channel: Channel[Any], partition: int, frames: Sequence[Outgoing]) -> None:
        with self._store.lock:
            for frame in frames:
                self._store.partition(channel.name).published += frame.count
                self._store.tell(channel.name, frame.body)

    async def full(self, channel: Channel[Any], partition: int) -> bool:
        return False

    async def join(self, channel: Channel[Any], partition: int, group: Group) -> _LiveReader:
        with self._store.lock:
            self._store.partition(channel.name).join(group.name, "latest", group.consumer)
        return _LiveReader(self, self._store, channel, group)

    async def tail(self, channel: Channel[Any], partition: int, since: str | None) -> _Listener:
        return _Listener(self, self._store, channel.name)

    async def close(self) -> None:
        """Nothing is open."""


class _Listener:
    """A ring of one listener; also the tail of a live channel."""

    def __init__(self, live: _Live, store: Store, channel: str) -> None:
        self.dropped = 0
        """Frames the ring lost."""
        self._store = store
        self._channel = channel
        self._number = 0
        self._ring: deque[bytes] = deque(maxlen=live.ring_frames)
        store.listeners.setdefault(channel, []).append(self.put)

    def put(self, body: bytes) -> None:
        self.dropped += len(self._ring) == self._ring.maxlen
        self._ring.append(body)

    def take(self, most: int) -> list[Entry]:
        with self._store.lock:
            bodies = [self._ring.popleft() for _ in range(min(most, len(self._ring)))]
        self._number += len(bodies)
        return [Entry(f"l{self._number - len(bodies) + i}", body, -1) for i, body in enumerate(bodies)]

    async def __aiter__(self) -> AsyncIterator[Entry]:
        while True:
            for entry in self.take(256):
                yield entry
            await asyncio.sleep(STEP)

    async def close(self) -> None:
        with self._store.lock:
            self._store.listeners[self._channel].remove(self.put)


class _LiveReader:
    def __init__(self, live: _Live, store: Store, channel: Channel[Any], group: Group) -> None:
        self._store = store
        self._channel = channel
        self._group = group
        self._listener = _Listener(live, store, channel.name)
        self._overwritten = 0
        self._waiting: list[tuple[float, Retried]] = []
        self._retries = 0
        self._stopping = False

    async def read(self, entries: int, wait: float) -> list[Entry]:
        deadline = time.monotonic() + wait
        while not self._stopping:
            found = self._due() + self._listener.take(entries)
            if found or time.monotonic() >= deadline:
                return found
            await asyncio.sleep(STEP)
        return []

    def _due(self) -> list[Entry]:
        now = self._store.clock.now()
        ready = [retry for at, retry in self._waiting if at <= now]
        self._waiting = [(at, retry) for at, retry in self._waiting if at > now]
        self._retries += len(ready)
        return [Entry(f"r{self._retries - i}", retry.body, retry.count) for i, retry in enumerate(ready)]

    async def commit(self, commit: Commit) -> list[str | None]:
        with self._store.lock:
            place = self._store.partition(self._channel.name)
            place.join(self._group.name, "latest", self._group.consumer)
            place.count(self._group.name, commit)
            _Durable(self._store).emit(commit)
        now = self._store.clock.now()
        self._waiting += [(now + retry.delay, retry) for retry in commit.retries]
        return []

    def settled(self, entry: str) -> None:
        """A live entry has no lease."""

    def holding(self) -> Holding:
        return Holding()

    def lost(self) -> list[str]:
        return []

    def overwritten(self) -> int:
        """Frames the ring lost since the last call."""
        lost, self._overwritten = self._listener.dropped - self._overwritten, self._listener.dropped
        return lost

    async def release(self, entries: Sequence[str]) -> None:
        """A live entry cannot be handed back."""

    async def stop(self) -> None:
        self._stopping = True

    async def close(self) -> None:
        await self._listener.close()
