"""What Redis knows of tensors that travel beside their frames: where they are wanted, and when they may go."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import redis

from .client import SILENCE, LinkLost, ReplyError, address
from .scripts import Keys
from .streams import Streams

__all__ = ["RedisPayloadStore"]

UPLOAD_TTL = 60
"""Seconds a blob lives without a frame that refers to it. Publishing makes it permanent, or says that it is gone."""
PRESENCE = 60.0
"""Seconds for which a reader's announcement of its host holds."""
PATIENCE = 30.0
THREADS = 2

T = TypeVar("T")


class RedisPayloadStore:
    """See pipeline.transports.PayloadStore."""

    def __init__(self, streams: Streams, url: str, name: str) -> None:
        where = address(url)
        self._streams = streams
        self._pool: Any = redis.ConnectionPool.from_url(url, socket_timeout=SILENCE, socket_connect_timeout=5)
        self._threads = ThreadPoolExecutor(THREADS, f"{name}-payloads")
        self.same_host = "path" in where or where.get("host", "127.0.0.1") in ("127.0.0.1", "localhost", "::1")

    async def deployment(self) -> str:
        fresh = secrets.token_hex(8)

        async def ask() -> str:
            reply = await self._streams.client.call("GET", "pipeline:deployment")  # passes where memory is used up
            if reply is None:
                reply = await self._streams.client.call("SET", "pipeline:deployment", fresh, "NX", "GET")
            return fresh if reply is None else reply.decode()

        return await self._streams.client.persist(ask, patience=PATIENCE, what="payloads")

    async def announce(self, channel: str, host: str) -> None:
        async def say() -> None:
            now = time.time()
            await self._streams.run("announce", [f"{Keys.of(channel).base}:hosts"], now, now + PRESENCE, host)

        await self._streams.client.persist(say, patience=PATIENCE, what=f"readers of {channel!r}")

    async def hosts(self, channel: str) -> set[str]:
        async def ask() -> list[bytes]:
            where = f"{Keys.of(channel).base}:hosts"
            reply: list[bytes] = await self._streams.client.call("ZRANGEBYSCORE", where, time.time(), "+inf")
            return reply

        reply = await self._streams.client.persist(ask, patience=PATIENCE, what=f"readers of {channel!r}")
        return {item.decode() for item in reply}

    async def collect(self, channel: str, partition: int, owner: str, asked: Sequence[str]) -> list[str]:
        base = Keys.of(channel, partition)
        names = [base.stream, base.meta, base.groups, f"{base.base}:p:{owner}", f"{base.base}:p:blobs"]
        found = await self._streams.run("collect", names, f"{base.base}:b:", *asked)
        return [reference.decode() for reference in found]

    def place(self, channel: str, partition: int) -> str:
        return Keys.of(channel, partition).base

    async def upload(self, place: str, name: str, chunks: Sequence[Sequence[memoryview]]) -> None:
        await self._in_thread(lambda: self._set(f"{place}:b:{name}", chunks), place, PATIENCE)

    async def download(self, place: str, name: str, chunks: int, *, last: bool = False) -> list[bytes | None]:
        keys = [f"{place}:b:{name}:{i}" for i in range(1, chunks + 1)]
        return await self._in_thread(lambda: self._get(keys, last=last), place, None)

    async def _in_thread(self, work: Callable[[], T], place: str, patience: float | None) -> T:
        """Megabytes block: sockets of their own, and threads to wait in, keep them from events and from the loop."""

        async def once() -> T:
            try:
                return await asyncio.get_running_loop().run_in_executor(self._threads, work)
            except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
                raise LinkLost(str(error)) from None
            except redis.ResponseError as error:
                raise ReplyError(str(error)) from None

        return await self._streams.client.persist(once, patience=patience, what=f"payload at {place}")

    def _set(self, prefix: str, chunks: Sequence[Sequence[memoryview]]) -> None:
        with self._connection() as connection:
            for number, parts in enumerate(chunks, 1):
                key, size = f"{prefix}:{number}".encode(), sum(map(len, parts))
                # NX: what a frame refers to already, and so has no end, stays as it is.
                head = b"*6\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, size)
                tail = b"\r\n$2\r\nNX\r\n$2\r\nEX\r\n$%d\r\n%d\r\n" % (len(str(UPLOAD_TTL)), UPLOAD_TTL)
                connection.send_packed_command([head, *parts, tail])
                connection.read_response()

    def _get(self, keys: list[str], *, last: bool) -> list[bytes | None]:
        with self._connection() as connection:
            commands = [("GET", key) for key in keys] + [("UNLINK", key) for key in keys if last]
            connection.send_packed_command([_command(*command) for command in commands])
            return [connection.read_response(disable_decoding=True) for _ in commands][: len(keys)]

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Any]:
        pool = self._pool
        connection = pool.get_connection()
        try:
            yield connection
        except BaseException:
            connection.disconnect()
            raise
        finally:
            pool.release(connection)

    async def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._pool.disconnect()


def _command(name: str, key: str) -> bytes:
    return b"*2\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (len(name), name.encode(), len(key.encode()), key.encode())
