"""What Redis knows of tensors that travel beside their frames: where they are wanted, and when they may go."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Sequence

from ..errors import ServerUnavailable
from .client import Client, LinkLost, ReplyError, address
from .scripts import Keys
from .streams import Streams

__all__ = ["RedisPayloadStore"]

UPLOAD_TTL = 60
"""Seconds a blob lives without a frame that refers to it (publishing makes it permanent, see add.lua)."""
PRESENCE = 60.0
"""Seconds for which a reader's announcement of its host holds."""
PATIENCE = 30.0


class RedisPayloadStore:
    """See pipeline.transports.PayloadStore."""

    def __init__(self, streams: Streams, url: str, name: str) -> None:
        self._streams = streams
        self._client = Client(url, f"{name}-payloads")
        where = address(url)
        self.same_host = "path" in where or where.get("host", "127.0.0.1") in ("127.0.0.1", "localhost", "::1")

    async def deployment(self) -> str:
        fresh = secrets.token_hex(8)

        async def ask() -> str:
            reply = await self._streams.client.call("SET", "pipeline:deployment", fresh, "NX", "GET")
            return fresh if reply is None else reply.decode()

        return await self._streams.client.persist(ask, patience=PATIENCE, what="payloads")

    async def announce(self, channel: str, host: str) -> None:
        key, now = f"{Keys.of(channel).base}:hosts", time.time()
        link = await self._streams.client.link()
        await asyncio.gather(
            link.call("ZADD", key, now + PRESENCE, host), link.call("ZREMRANGEBYSCORE", key, "-inf", now)
        )

    async def hosts(self, channel: str) -> set[str]:
        reply = await self._streams.client.call("ZRANGEBYSCORE", f"{Keys.of(channel).base}:hosts", time.time(), "+inf")
        return {item.decode() for item in reply}

    async def collect(self, channel: str, partition: int, owner: str, asked: Sequence[str]) -> list[str]:
        base = Keys.of(channel, partition)
        names = [base.stream, base.meta, base.groups, f"{base.base}:p:{owner}", f"{base.base}:p:blobs"]
        found = await self._streams.run("collect", names, f"{base.base}:b:", *asked)
        return [reference.decode() for reference in found]

    async def upload(self, channel: str, partition: int, name: str, chunks: Sequence[memoryview | bytes]) -> None:
        prefix = f"{Keys.of(channel, partition).base}:b:{name}"

        async def write() -> None:
            link = await self._client.link()
            replies = []
            for number, chunk in enumerate(chunks, 1):
                replies.append(link.call("SET", f"{prefix}:{number}", bytes(chunk), "EX", UPLOAD_TTL))
                await link.writable()
            await asyncio.gather(*replies)

        await self._client.persist(write, patience=PATIENCE, what=f"payload of {channel!r}")

    async def download(self, channel: str, partition: int, name: str, chunks: int) -> list[bytes | None]:
        prefix = f"{Keys.of(channel, partition).base}:b:{name}"

        async def read() -> list[bytes | None]:
            link = await self._client.link()
            return list(await asyncio.gather(*(link.call("GET", f"{prefix}:{i}") for i in range(1, chunks + 1))))

        return await self._client.persist(read, patience=PATIENCE, what=f"payload of {channel!r}")

    async def close(self) -> None:
        with contextlib.suppress(LinkLost, ReplyError, ServerUnavailable):
            await self._client.close()
