"""A multiplexed connection to Redis: many commands in flight on one socket, replies in order.

redis-py carries everything off the hot path here (URLs, TLS settings, the lease thread). The event path needs what its
asyncio client does not offer: writing a command without awaiting the one before it, and cancelling a caller without
harming the connection. The protocol itself is hiredis's, in C.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import ssl
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar, cast

import hiredis
from redis.connection import parse_url

from ..errors import ConfigurationError, ServerTooOld, ServerUnavailable
from ..settings import check_url, redact

__all__ = ["Client", "Link", "LinkLost", "ReplyError", "address"]

logger = logging.getLogger("pipeline.client")

Argument = str | bytes | int | float | memoryview
ReplyError = hiredis.ReplyError
T = TypeVar("T")

_NOTHING = object()
SILENCE = 10.0
"""Seconds without a byte, while a reply is due, after which a connection is taken for dead."""
TALKED = 1.0
"""Seconds for which a Redis must have answered to count as having been there: more than it takes to connect."""
_TRANSIENT = ("LOADING", "BUSY", "MASTERDOWN", "READONLY", "TRYAGAIN", "CLUSTERDOWN")


class LinkLost(ConnectionError):
    """Raised to callers whose reply will never come: the command may or may not have been executed."""


def address(url: str) -> dict[str, Any]:
    """The parts of a Redis URL, as redis-py reads them. Raises ConfigurationError."""
    try:
        return dict(parse_url(check_url(url)))  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise ConfigurationError(f"not a Redis URL: {redact(url)!r} ({error}); e.g. redis://127.0.0.1:6379/0") from None


class Link(asyncio.Protocol):
    """One connection. `call` writes at once and returns a future; cancelling that future leaves the link sound."""

    def __init__(self, on_push: Callable[[list[Any]], None] | None = None) -> None:
        self.id = 0
        self.closed = False
        self._reader = hiredis.Reader(notEnoughData=_NOTHING)
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._transport: asyncio.Transport | None = None
        self.on_push = on_push
        self._writable = asyncio.Event()
        self._writable.set()
        self._heard = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._watch: asyncio.TimerHandle | None = None

    @classmethod
    async def open(cls, url: str, name: str, on_push: Callable[[list[Any]], None] | None = None) -> Link:
        """Connect, authenticate, select the database. Raises OSError or ReplyError."""
        where = address(url)
        link = cls(on_push)
        try:
            await link._connect(where, tls=url.startswith("rediss:"))
            *_, link.id = await asyncio.gather(*(link.call(*command) for command in _handshake(where, name)))
        except BaseException:
            link.close()
            raise
        return link

    async def _connect(self, where: dict[str, Any], *, tls: bool) -> None:
        if "path" in where:
            await self._loop.create_unix_connection(lambda: self, where["path"])
            return
        context = _tls(where) if "ssl_cert_reqs" in where or tls else None
        host, port = where.get("host", "127.0.0.1"), where.get("port", 6379)
        async with asyncio.timeout(5):  # Python 3.11's wait_for would lose a cancellation that comes as it connects
            await self._loop.create_connection(lambda: self, host, port, ssl=context)

    @property
    def heard(self) -> float:
        """When the last byte came (monotonic)."""
        return self._heard

    def call(self, *arguments: Argument) -> asyncio.Future[Any]:
        """Write one command; the future has its reply, or ReplyError, or LinkLost."""
        return self.send(_pack(arguments))

    def send(self, packed: bytes) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = self._loop.create_future()
        if self._transport is None or self.closed:
            future.set_exception(LinkLost("the connection is closed"))
            return future
        if not self._waiting:
            self._heard = time.monotonic()
        self._waiting.append(future)
        self._transport.write(packed)
        return future

    async def writable(self) -> None:
        """Wait while the socket's buffer is full."""
        await self._writable.wait()

    def write(self, *arguments: Argument) -> None:
        """Write one command whose replies come as pushes (SUBSCRIBE and its kin)."""
        if self._transport is not None and not self.closed:
            self._transport.write(_pack(arguments))

    def close(self) -> None:
        self._lose(LinkLost("the connection was closed"))
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its base class
        self._transport.set_write_buffer_limits(high=4 << 20)
        self._watch = self._loop.call_later(SILENCE / 2, self._check)

    def data_received(self, data: bytes) -> None:
        self._heard = time.monotonic()
        reader = self._reader
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _NOTHING:
                self._take(reply)
        except hiredis.ProtocolError as error:
            logger.error("not Redis at the other end: %s", error)
            self.close()

    def _take(self, reply: Any) -> None:
        if self.on_push is not None and isinstance(reply, list):
            self.on_push(reply)
            return
        if not self._waiting:
            return
        future = self._waiting.popleft()
        if future.done():
            return
        if isinstance(reply, hiredis.ReplyError):
            future.set_exception(reply)
        else:
            future.set_result(reply)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._lose(LinkLost(f"the connection was lost: {error or 'closed by the server'}"))

    def _check(self) -> None:
        """A half-open connection delivers neither data nor an error: give it up after SILENCE."""
        if self.closed:
            return
        quiet = time.monotonic() - self._heard
        if self._waiting and quiet > SILENCE:
            logger.warning("no answer from Redis for %.0f s; reconnecting", quiet)
            self.close()
            return
        if not self._waiting and quiet > SILENCE / 2 and self.on_push is None:
            self.call("PING").add_done_callback(_ignore)
        self._watch = self._loop.call_later(SILENCE / 2, self._check)

    def _lose(self, error: LinkLost) -> None:
        self.closed = True
        self._writable.set()
        if self._watch is not None:
            self._watch.cancel()
        if self.on_push is not None:
            push, self.on_push = self.on_push, None
            push([])
        while self._waiting:
            future = self._waiting.popleft()
            if not future.done():
                future.set_exception(error)
                future.add_done_callback(_ignore)


class Client:
    """A link that is there again after the server was away."""

    def __init__(self, url: str, name: str, scripts: Sequence[str] = ()) -> None:
        self.url = url
        self.name = name
        self._scripts = scripts
        self._link: Link | None = None
        self._connecting: asyncio.Task[Link] | None = None
        self.closed = False

    @property
    def current(self) -> Link | None:
        """The connection, when there is one."""
        return self._link if self._link is not None and not self._link.closed else None

    async def link(self) -> Link:
        """The connection, opened anew when the last one was lost. Raises ServerUnavailable."""
        if self._link is not None and not self._link.closed:
            return self._link
        if self.closed:
            raise ServerUnavailable("this pipeline is closed")
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.ensure_future(self._open())
            self._connecting.add_done_callback(_ignore)
        return await asyncio.shield(self._connecting)

    async def _open(self) -> Link:
        link = None
        try:
            link = await Link.open(self.url, self.name)
            await asyncio.gather(*(link.call("SCRIPT", "LOAD", script) for script in self._scripts))
        except BaseException as error:
            if link is not None:
                link.close()
            if isinstance(error, (OSError, TimeoutError)):
                raise ServerUnavailable(
                    f"no Redis answers at {redact(self.url)} ({error or type(error).__name__}): start one with "
                    "`pipeline server`, or set PIPELINE_REDIS_URL"
                ) from None
            if isinstance(error, ReplyError):
                raise ServerUnavailable(f"Redis at {redact(self.url)} refuses: {error}") from None
            raise
        self._link = link
        return link

    async def call(self, *arguments: Argument) -> Any:
        """One command, once. Raises ServerUnavailable, LinkLost (it may have been executed) or ReplyError."""
        link = await self.link()
        return await link.call(*arguments)

    async def persist(self, action: Callable[[], Awaitable[T]], *, patience: float | None, what: str) -> T:
        """Repeat an idempotent action through lost connections, for `patience` seconds (None: for ever).

        An action may last (a channel is full): while Redis answers, it costs no patience."""
        started = time.monotonic()
        delay = 0.02
        told = False
        while True:
            began = time.monotonic()
            try:
                result = await action()
            except (ServerUnavailable, LinkLost, ReplyError) as error:
                if self.closed or not transient(error):
                    raise
                heard = self._link.heard if self._link is not None else 0.0
                if heard - began > TALKED:
                    started, delay = heard, 0.02
                waited = time.monotonic() - started
                if patience is not None and waited + delay > patience:
                    if isinstance(error, ServerUnavailable):
                        raise
                    raise ServerUnavailable(f"{what}: {error} (gave up after {waited:.0f} s)") from None
                if not told and waited > 0.5:
                    told = True
                    logger.warning("%s is waiting for Redis: %s", what, error)
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))
                delay = min(1.0, delay * 2)
            else:
                if told:
                    logger.warning("%s goes on: Redis is back", what)
                return result

    async def close(self) -> None:
        self.closed = True
        if self._connecting is not None and not self._connecting.done():
            self._connecting.cancel()
            with contextlib.suppress(asyncio.CancelledError, ServerUnavailable):
                await self._connecting
        if self._link is not None:
            self._link.close()


_pack: Callable[[tuple[Argument, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]  # any length, in truth


def transient(error: BaseException) -> bool:
    """True when the same command may succeed later: nobody answers, it is loading, it is full."""
    if isinstance(error, ServerTooOld):
        return False
    if isinstance(error, ReplyError):
        return str(error).startswith((*_TRANSIENT, "OOM", "NOSCRIPT", "MISCONF", "NOREPLICAS"))
    if isinstance(error, ServerUnavailable):
        return "refuses: NOAUTH" not in str(error) and "refuses: WRONGPASS" not in str(error)
    return isinstance(error, LinkLost)


def _handshake(where: dict[str, Any], name: str) -> list[Sequence[Argument]]:
    commands: list[Sequence[Argument]] = []
    if where.get("password"):
        user = [where["username"]] if where.get("username") else []
        commands.append(["AUTH", *user, where["password"]])
    if where.get("db"):
        commands.append(["SELECT", where["db"]])
    return [*commands, ["CLIENT", "SETNAME", name], ["CLIENT", "ID"]]


def _tls(where: dict[str, Any]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=where.get("ssl_ca_certs"), capath=where.get("ssl_ca_path"))
    if where.get("ssl_certfile"):
        context.load_cert_chain(where["ssl_certfile"], where.get("ssl_keyfile"))
    if str(where.get("ssl_check_hostname", "true")).lower() in ("false", "0"):
        context.check_hostname = False
    if where.get("ssl_cert_reqs") in ("none", "CERT_NONE"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _ignore(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
