"""The Redis (and Valkey) backend: streams, Pub/Sub, and the few keys beside them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeVar

from ..errors import ServerTooOld
from . import Entry, GroupStats, PartitionStats, Retried
from .client import Client, LinkLost, ReplyError
from .payload_store import RedisPayloadStore
from .pubsub import PubSub, connect_link
from .scripts import Keys
from .streams import PATIENCE, Streams

__all__ = ["LiveClient", "RedisBackend"]

T = TypeVar("T")
LiveClient = Literal["redis", "asyncio-redis"]

CHANNELS = "pipeline:channels"


class RedisBackend:
    def __init__(
        self, url: str, name: str, live_client: LiveClient = "redis", group_expires: float = 7 * 86400
    ) -> None:
        connect: Any = connect_link
        if live_client == "asyncio-redis":
            from .asyncio_redis import connect_asyncio_redis  # only who asks for it pays for it

            connect = connect_asyncio_redis
        self._streams = Streams(url, name, group_expires)
        self.durable = self._streams
        self.live = PubSub(self._streams, url, name, connect)
        self.payloads = RedisPayloadStore(self._streams, url, name)
        self._client = self._streams.client
        self._reply_client = Client(url, f"{name}-replies")

    @property
    def connected(self) -> bool:
        return self._client.current is not None

    async def open(self, patience: float | None) -> None:
        await self._client.persist(self._client.link, patience=patience, what="pipeline")
        reply = await self._client.call("INFO", "server")
        fields = dict(line.split(":", 1) for line in reply.decode().splitlines() if ":" in line)
        major = int(fields.get("redis_version", "0").partition(".")[0])
        if major < 7:
            raise ServerTooOld(f"the server is Redis {fields.get('redis_version')}; Redis 7.0 or any Valkey is needed")

    async def replies(self, address: str, wait: float) -> list[bytes]:
        reply = await self._reply_client.call("BLMPOP", f"{wait:.3f}", 1, address, "LEFT", "COUNT", 256)
        return list(reply[1]) if reply else []

    async def register(self, name: str, record: bytes) -> bytes | None:
        before = await self._client.persist(
            lambda: self._streams.run("register", [CHANNELS], name, record), patience=PATIENCE, what=f"channel {name!r}"
        )
        return bytes(before) if before is not None else None

    async def record(self, name: str, patience: float = 0.0) -> bytes | None:
        found: bytes | None = await self._client.persist(
            lambda: self._client.call("HGET", CHANNELS, name), patience=patience, what=f"channel {name!r}"
        )
        return found

    async def _ask(self, action: Callable[[], Awaitable[T]], what: str) -> T:
        """Once, for who calls a verb: a connection lost meanwhile is a server that is not there, as ever."""
        return await self._client.persist(action, patience=0.0, what=what)

    async def registered(self) -> dict[str, bytes]:
        reply = await self._ask(lambda: self._client.call("HGETALL", CHANNELS), "channels")
        return {name.decode(): record for name, record in zip(reply[::2], reply[1::2], strict=True)}

    async def ledger(self, channels: Mapping[str, tuple[bool, int]]) -> tuple[float, dict[str, list[PartitionStats]]]:
        wanted = [(name, part) for name, (_, partitions) in channels.items() for part in range(partitions)]

        async def walk() -> list[Any]:
            stats = (self._streams.stats(name, part) for name, part in wanted)
            return list(await asyncio.gather(self._client.call("TIME"), *stats))

        clock, *results = await self._ask(walk, "ledger")
        found: dict[str, list[PartitionStats]] = {name: [] for name in channels}
        for (name, _), result in zip(wanted, results, strict=True):
            found[name].append(_stats(result))
        return int(clock[0]) + int(clock[1]) / 1e6, found

    async def settle_letter(
        self, channel: str, partition: int, group: str, letter: str, again: Retried | None, ttl: float
    ) -> bool:
        settle = partial(self._streams.settle_letter, channel, partition, group, letter, again, ttl)
        return await self._ask(settle, f"dead letter of {channel!r}")

    async def settled_letters(self, channel: str, partition: int, group: str) -> set[str]:
        key = Keys.of(channel, partition).group(group, "settled")
        reply = await self._ask(lambda: self._client.call("SMEMBERS", key), f"dead letters of {channel!r}")
        return {item.decode() for item in reply}

    async def rewind(self, channel: str, partition: int, group: str, position: str) -> int:
        rewind = partial(self._streams.rewind, channel, partition, group, position)
        return await self._ask(rewind, f"rewind of {group!r}")

    async def newest(self, channel: str, partition: int, most: int, below: str | None) -> list[Entry]:
        newest = partial(self._streams.newest, channel, partition, most, below)
        return await self._ask(newest, f"channel {channel!r}")

    async def pause(self, channel: str, partition: int, group: str, paused: bool) -> bool:
        pause = partial(self._streams.pause, channel, partition, group, paused)
        return await self._ask(pause, f"group {group!r}")

    async def dropped(self, channel: str, group: str, count: int) -> None:
        await self._client.call("HINCRBY", Keys.of(channel).group(group, "h"), "dropped", count)

    async def turn(self, name: str, holder: str, seconds: float) -> bool:
        try:
            reply = await self._client.call("SET", f"pipeline:turn:{name}", holder, "NX", "PX", int(seconds * 1000))
        except (LinkLost, ReplyError):
            return False
        return reply is not None

    async def close(self) -> None:
        await self.payloads.close()
        await self._reply_client.close()
        await self._streams.close()


def _stats(result: list[Any]) -> PartitionStats:
    published, duplicates, entries, groups = result
    return PartitionStats(
        published,
        duplicates,
        entries,
        {name.decode(): _group(numbers) for name, *numbers in groups},
    )


def _group(numbers: list[int]) -> GroupStats:
    before, handled, dead, retried, suppressed, dropped, pending, lag, consumers, oldest, paused = numbers
    return GroupStats(
        before, handled, dead, retried, suppressed, dropped, pending, lag, consumers, oldest / 1000, bool(paused)
    )
