"""Requests: an event whose answer comes back to the process that published it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import ValidationError

from .channel import Channel
from .drafts import Failure, failures, reply_codec
from .errors import ConfigurationError, FrameError, RequestFailed, RequestTimeout, ServerUnavailable
from .frame import REPLIES, Header, split
from .transports import Backend
from .transports.client import LinkLost, ReplyError

__all__ = ["Replies"]

logger = logging.getLogger("pipeline.requests")

WAIT = 1.0
MOST_EARLY = 4096
"""Answers kept that nobody waits for yet. Those that come too late look the same; the oldest are forgotten."""


class _Answers:
    """A frame of answers, decoded once, for the first who waits for one of them."""

    def __init__(self, kind: str, body: bytes) -> None:
        self._kind = kind
        self._body = body
        self._events: list[Any] | None = None

    def of(self, channel: Channel[Any]) -> list[Any]:
        """Raises FrameError."""
        if self._events is None:
            codec = failures if self._kind == "Failure" else reply_codec(channel.reply)
            self._events = codec.decode(self._body).events
        return self._events


class Replies:
    """One list in Redis a process, read by one task; answers find their request by its event's id."""

    def __init__(self, backend: Backend, source: str) -> None:
        self.address = f"{REPLIES}{source}:{secrets.token_hex(4)}"
        self._backend = backend
        self._waiting: dict[str, tuple[asyncio.Future[Any], Channel[Any]]] = {}
        self._early: dict[str, tuple[_Answers, int]] = {}
        self._expected = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._publishing = 0

    async def ask(self, channel: Channel[Any], publish: Callable[[], Awaitable[str]], timeout: float) -> Any:
        """`publish` resolves to the request's id. Raises RequestTimeout, RequestFailed."""
        if channel.reply is None:
            raise ConfigurationError(f"channel {channel.name!r} declares no reply=, so nothing on it can be requested")
        if self._task is None:
            self._task = asyncio.create_task(self._listen(), name="replies")
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        id_ = ""
        self._publishing += 1
        self._expected.set()
        try:
            async with asyncio.timeout(timeout):
                id_ = f"{channel.name}/{await publish()}"
                self._publishing -= 1
                self._waiting[id_] = (future, channel)
                if id_ in self._early:
                    self._settle(id_, *self._early.pop(id_))
                return await future
        except TimeoutError:
            raise RequestTimeout(
                f"no answer on channel {channel.name!r} within {timeout:g} s; is a subscriber of it running?"
            ) from None
        finally:
            if not id_:
                self._publishing -= 1
            self._waiting.pop(id_, None)
            if not self._publishing:
                self._early.clear()
            if not self._waiting and not self._publishing:
                self._expected.clear()

    async def _listen(self) -> None:
        while True:
            await self._expected.wait()
            try:
                for body in await self._backend.replies(self.address, WAIT):
                    self._take(body)
            except (ServerUnavailable, LinkLost, ReplyError) as error:
                logger.debug("replies: %s", error)
                await asyncio.sleep(0.1)

    def _take(self, body: bytes) -> None:
        try:
            text, _ = split(body)
            header = Header.model_validate_json(text)
        except (FrameError, ValidationError) as error:
            logger.error("an answer cannot be read: %s", error)
            return
        answers = _Answers(header.type, body)
        for index, id_ in enumerate(header.keys or []):
            self._settle(id_ or "", answers, index)

    def _settle(self, id_: str, answers: _Answers, index: int) -> None:
        waiting = self._waiting.get(id_)
        if waiting is None:
            if self._publishing:  # the answer overtook the acknowledgement of its question
                if len(self._early) >= MOST_EARLY:
                    del self._early[next(iter(self._early))]
                self._early[id_] = (answers, index)
            return
        future, channel = waiting
        if future.done():
            return
        try:
            event = answers.of(channel)[index]
        except FrameError as error:
            future.set_exception(RequestFailed(f"request on channel {channel.name!r}: unreadable answer: {error}"))
            return
        if isinstance(event, Failure):
            future.set_exception(RequestFailed(f"request on channel {channel.name!r}: {event.reason}"))
        else:
            future.set_result(event)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
