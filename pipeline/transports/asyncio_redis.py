"""A second Pub/Sub client, on the package asyncio-redis. It has no stream commands, so it serves live channels only."""

from __future__ import annotations

import asyncio
import secrets
import warnings
from collections.abc import Callable
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import asyncio_redis
    from asyncio_redis.encoders import BytesEncoder
    from asyncio_redis.exceptions import Error as AsyncioRedisError

from ..errors import ConfigurationError
from ..settings import redact
from .client import Link, LinkLost, address

__all__ = ["connect_asyncio_redis"]


class _Subscription:
    def __init__(self, connection: Any, subscriber: Any, channel: bytes, sink: Callable[[bytes], None]) -> None:
        self._connection = connection
        self._drain = asyncio.create_task(self._run(subscriber, channel, sink), name="asyncio-redis")

    async def _run(self, subscriber: Any, channel: bytes, sink: Callable[[bytes], None]) -> None:
        while True:
            reply = await subscriber.next_published()
            if reply.channel == channel:
                sink(reply.value)

    async def lost(self) -> None:
        """The client neither tells nor fails a waiting reader, so look at its connection as well."""
        while not self._drain.done():
            await asyncio.wait([self._drain], timeout=0.2)
            if not self._connection.protocol.is_connected:
                return

    async def close(self) -> None:
        self._drain.cancel()
        self._connection.close()
        await asyncio.gather(self._drain, return_exceptions=True)


async def connect_asyncio_redis(url: str, name: str, channel: str, sink: Callable[[bytes], None]) -> _Subscription:
    """Subscribe; returns when Redis has confirmed. Raises LinkLost, ConfigurationError."""
    where = address(url)
    if where.get("username") or url.startswith("rediss:"):
        raise ConfigurationError(
            f"{redact(url)}: asyncio-redis knows neither users nor TLS; use live_client='redis' (the default)"
        )
    password = where.get("password")
    try:
        connection = await asyncio_redis.Connection.create(
            host=where.get("path", where.get("host", "127.0.0.1")),
            port=0 if "path" in where else where.get("port", 6379),
            password=password.encode() if password else None,
            db=where.get("db", 0),
            encoder=BytesEncoder(),
            auto_reconnect=False,
        )
    except (OSError, AsyncioRedisError) as error:
        raise LinkLost(str(error) or type(error).__name__) from None
    probe = f"pipeline:probe:{secrets.token_hex(8)}"
    try:
        subscriber = await connection.start_subscribe()
        await subscriber.subscribe([channel.encode(), probe.encode()])
    except BaseException:
        connection.close()
        raise
    subscription = _Subscription(connection, subscriber, channel.encode(), sink)
    try:
        await _confirmed(url, name, probe)
        await subscriber.unsubscribe([probe.encode()])
    except BaseException:
        await subscription.close()
        raise
    return subscription


async def _confirmed(url: str, name: str, probe: str) -> None:
    """Wait until Redis knows of the subscription: this client swallows the confirmation, so ask from beside it."""
    link = await Link.open(url, name)
    try:
        async with asyncio.timeout(5):
            while not await link.call("PUBLISH", probe, b""):  # noqa: ASYNC110  # only Redis knows
                await asyncio.sleep(0.002)
    finally:
        link.close()
