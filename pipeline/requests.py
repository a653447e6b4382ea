"""Requests: an event whose answer comes back to the process that published it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from .channel import Channel
from .drafts import Failure, failures, reply_codec
from .errors import ConfigurationError, FrameError, RequestFailed, RequestTimeout, ServerUnavailable
from .frame import REFERENCE, REPLIES, Address, Codec, Header, Invalid, split
from .payloads import Payloads
from .tensors import TensorBytes
from .transports import Backend
from .transports.client import LinkLost, ReplyError

__all__ = ["Question", "Replies"]

logger = logging.getLogger("pipeline.requests")

WAIT = 1.0


class _Answers:
    """A frame of answers, decoded once: at once where its type is among those that are known, else for the first who
    waits for one of them."""

    def __init__(self, body: bytes, beside: TensorBytes | FrameError | None, known: Iterable[Codec[Any]]) -> None:
        """Raises FrameError, ValidationError."""
        self._body = body
        self._beside = beside
        self._codec: Codec[Any] | None = None
        self._events: list[Any] = []
        header = self._read(known) or Header.model_validate_json(split(body)[0])
        self._failed = header.type == "Failure" and header.fingerprint == failures.fingerprint
        self.ids = header.keys or []

    def _read(self, known: Iterable[Codec[Any]]) -> Header | None:
        for codec in known:
            if codec.wrote(self._body):
                with contextlib.suppress(FrameError):  # whose ids may be readable, though its events are not
                    frame = codec.decode(self._body)
                    self._codec, self._events = codec, frame.events
                    return frame.header
        return None

    def of(self, channel: Channel[Any]) -> list[Any]:
        """Raises FrameError."""
        if isinstance(self._beside, FrameError):
            raise self._beside
        codec = failures if self._failed else reply_codec(channel.reply)
        if codec is not self._codec:
            self._events, self._codec = codec.decode(self._body, beside=self._beside).events, codec
        return self._events


class _Waiting(dict[str, "Question"]):
    """Questions by their events' ids. `some` is set when there may be some."""

    def __init__(self) -> None:
        super().__init__()
        self.some = asyncio.Event()


class Question(asyncio.Future[Any]):
    """A request under way: a future that gets the answer, RequestTimeout, RequestFailed, or why it was not written.

    Cancel it to wait no longer: what is not on its way yet stays unwritten. It is registered under its event's id
    before that is written, so no answer comes early.
    """

    def __init__(self, channel: Channel[Any], waiting: _Waiting, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(loop=loop)
        self.channel = channel
        self.id = ""
        self._waiting = waiting
        self._timeout = timeout
        try:
            if math.isnan(timeout):
                raise TypeError
            self._timer = loop.call_later(timeout, self._expire)
        except TypeError:
            raise ConfigurationError(f"timeout={timeout!r}: in seconds; math.inf waits for ever") from None

    @property
    def event(self) -> str:
        """Id of the event that asks; "" while it is not on its way."""
        return self.id.removeprefix(f"{self.channel.name}/")

    def numbered(self, source: str, sequence: int) -> None:
        self._waiting.pop(self.id, None)
        if not self.done():
            self.id = f"{self.channel.name}/{source}:{sequence}"
            self._waiting[self.id] = self
            self._waiting.some.set()

    def failed(self, error: Exception) -> None:
        if not self.done():
            self.end()
            self.set_exception(error)

    def end(self) -> None:
        """Nobody need look for its answer any more."""
        self._timer.cancel()
        self._waiting.pop(self.id, None)

    def cancel(self, msg: Any = None) -> bool:
        self.end()
        return super().cancel(msg)

    def _expire(self) -> None:
        name = self.channel.name
        self.failed(
            RequestTimeout(f"no answer on channel {name!r} within {self._timeout:g} s; is a subscriber of it running?")
        )


class Replies:
    """One list in Redis a process, read by one task; answers find their request by its event's id."""

    def __init__(self, backend: Backend, payloads: Payloads, source: str) -> None:
        self._address = Address(f"{REPLIES}{source}:{secrets.token_hex(4)}")
        self._backend = backend
        self._payloads = payloads
        self._addresses: dict[Any, str] = {}
        """By type of the answer."""
        self._known: list[Codec[Any]] = [failures]
        self._waiting = _Waiting()
        self._task: asyncio.Task[None] | None = None
        self._opening: set[asyncio.Task[None]] = set()

    def address(self, channel: Channel[Any]) -> str:
        """Where answers to what is asked on a channel are to go."""
        found = self._addresses.get(channel.reply)
        if found is None:
            self._known.append(codec := reply_codec(channel.reply))
            beside = self._payloads.active and codec.tensors
            address = replace(self._address, host=self._payloads.host if beside else None)
            found = self._addresses[channel.reply] = str(address)
        return found

    def question(self, channel: Channel[Any], timeout: float) -> Question:
        """To be handed to an Outbox with its event. Raises ConfigurationError."""
        if channel.reply is None:
            raise ConfigurationError(f"channel {channel.name!r} declares no reply=, so nothing on it can be requested")
        if self._task is None:
            self._task = asyncio.create_task(self._listen(), name="replies")
        return Question(channel, self._waiting, timeout)

    async def _listen(self) -> None:
        while True:
            if not self._waiting:
                self._waiting.some.clear()
                await self._waiting.some.wait()
            await self._hear()
            await asyncio.sleep(0)  # who asked goes on before more is asked for

    async def _hear(self) -> None:
        try:
            for body in await self._backend.replies(self._address.key, WAIT):
                if body.startswith(REFERENCE):
                    task = asyncio.create_task(self._open(body), name="open an answer")
                    self._opening.add(task)
                    task.add_done_callback(self._opening.discard)
                else:
                    self._take(body)
        except (ServerUnavailable, LinkLost, ReplyError) as error:
            logger.debug("replies: %s", error)
            await asyncio.sleep(0.1)

    async def _open(self, body: bytes) -> None:
        """Though nobody may wait for it any more: who answered wants its memory back."""
        beside: TensorBytes | FrameError
        try:
            beside = await self._payloads.take(self._address, body)
        except FrameError as error:
            beside = error
        self._take(body, beside)

    def _take(self, body: bytes, beside: TensorBytes | FrameError | None = None) -> None:
        try:
            answers = _Answers(body, beside, self._known)
        except (FrameError, ValidationError) as error:
            logger.error("an answer cannot be read: %s", error)
            return
        for index, id_ in enumerate(answers.ids):
            question = self._waiting.get(id_ or "")
            if question is not None:
                self._settle(question, answers, index)

    def _settle(self, question: Question, answers: _Answers, index: int) -> None:
        channel = question.channel
        try:
            event = answers.of(channel)[index]
        except FrameError as error:
            event = Failure(reason=f"unreadable answer: {error}")
        if isinstance(event, Invalid):
            question.failed(RequestFailed(f"request on channel {channel.name!r}: not a valid answer: {event.reason}"))
        elif isinstance(event, Failure):
            question.failed(RequestFailed(f"request on channel {channel.name!r}: {event.reason}"))
        elif not question.done():
            question.end()
            question.set_result(event)

    async def close(self) -> None:
        if self._task is not None:
            tasks = [self._task, *self._opening]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
