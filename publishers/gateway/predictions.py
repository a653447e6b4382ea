"""One prediction over HTTP, without a framework on its path: this is the part of the gateway that must be quick.

    head → admission → body → input (pictures in threads) → question → answer

Nothing here waits: each step is called by what it needed, so a request costs neither a task nor a timer of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from math import isfinite
from typing import Any, Protocol

import numpy as np
from pydantic import TypeAdapter
from pydantic_core import to_json

from pipeline import Channel, RequestFailed, RequestTimeout, ServerUnavailable, Tensor, catalog
from pipeline.catalog import Answer, Inputs, Score
from pipeline.errors import ChannelFull, PublishError
from pipeline.requests import Question

from .admission import Admission, Overloaded
from .bodies import Objection
from .inputs import BadInput, needs_thread, read_input
from .models import Models

__all__ = ["Connection", "Headers", "Prediction", "Refusal", "Wanted"]

logger = logging.getLogger("publishers.gateway")

MOST_BODY = 32 << 20
Headers = list[tuple[bytes, bytes]]

_scores = TypeAdapter(list[Score]).serializer


class Refusal(Exception):
    """Raised to answer with a status."""

    def __init__(self, status: int, reason: str, headers: Headers | None = None, *, close: bool = False) -> None:
        super().__init__(reason)
        self.status = status
        self.headers = headers or []
        self.close = close


class Connection(Protocol):
    """What a prediction needs of the connection it came on."""

    def respond(self, status: int, headers: Headers, body: bytes, *, keep_alive: bool) -> None:
        """Write the whole response; whatever is next on the connection may begin."""
        ...

    def proceed(self) -> None:
        """Tell a client that waits for it (100-continue) to send its body."""
        ...


class _Nobody:
    def set(self) -> None:
        """Nobody waits: see Prediction."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a head says of a prediction."""

    content_type: str
    kind: str
    """The content type without its parameters."""
    length: int
    """Declared bytes; 0: none."""
    waits: bool
    """For 100-continue."""
    seconds: float
    """Until the deadline."""
    top: int

    @classmethod
    def read(cls, headers: Headers, query: bytes, seconds: float) -> Wanted:
        """`seconds`: where the client says no other. Raises Refusal."""
        content_type, length, waits, top = "", 0, False, 5
        for name, value in headers:
            if name == b"content-type":
                content_type = value.decode("latin-1")
            elif name == b"content-length":
                length = int(value) if value.isdigit() else 0
            elif name == b"expect":
                waits = value.lower() == b"100-continue"
            elif name == b"x-deadline":
                seconds = _deadline(value)
        for part in query.split(b"&") if query else ():
            if part.startswith(b"top="):
                if not part[4:].isdigit() or len(part) > 8 or not 1 <= int(part[4:]) <= 1000:
                    raise Refusal(400, "top: a number from 1 to 1000")
                top = int(part[4:])
        return cls(content_type, content_type.partition(";")[0].strip().lower(), length, waits, seconds, top)


class Prediction:
    """From a request's head to its answer.

    It takes the place of a cycle of uvicorn's protocol, which looks at `response_complete`, `keep_alive` and
    `disconnected` and wakes who waits for `message_event`.
    """

    __slots__ = (
        "_admission", "_began", "_connection", "_decoding", "_headers", "_length", "_method", "_models", "_parts",
        "_query", "_question", "_seconds", "_size", "_started", "_status", "_ticket", "_whole", "disconnected",
        "keep_alive", "model", "objection", "response_complete", "wanted",
    )  # fmt: skip

    message_event = _Nobody()
    most_body = MOST_BODY

    def __init__(
        self,
        connection: Connection,
        models: Models,
        model: str,
        method: bytes,
        query: bytes,
        headers: Headers,
        *,
        keep_alive: bool,
    ) -> None:
        self.model = model
        self.keep_alive = keep_alive
        self.disconnected = False
        self.response_complete = False
        self.objection: Objection | None = None
        """Set by whoever looked at who asks."""
        self.wanted: Wanted | None = None
        """Set by whoever has read these headers before."""
        self._connection = connection
        self._models = models
        self._method = method
        self._query = query
        self._headers = headers
        self._began = time.perf_counter()
        self._seconds = models.options.gateway_deadline
        self._parts: list[bytes] = []
        self._size = 0
        self._length = 0
        """Bytes that are counted at admission: as many as were declared, or came."""
        self._started = False
        self._whole = False
        self._admission: Admission | None = None
        """Set while it counts as under way there, by its ticket."""
        self._ticket = 0
        self._decoding: asyncio.Future[Any] | None = None
        self._question: asyncio.Future[Any] | None = None

    # -- steps ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """What came before it on its connection is answered."""
        self._started = True
        try:
            self._admit()
            if self._whole:
                self._go()
        except Exception as error:
            self._refuse(error)

    def feed(self, part: bytes) -> None:
        """A part of the body."""
        if self.response_complete:
            return
        self._size += len(part)
        if self._size <= self.most_body:
            self._parts.append(part)
            if self._admission is not None and self._size > self._length:
                self._grow(self._admission)
        elif self._started:
            self._refuse(self._too_big())

    def _grow(self, admission: Admission) -> None:
        """It did not say how long it is."""
        try:
            admission.grow(self._size - self._length)
            self._length = self._size
        except Overloaded as error:
            self._refuse(_overload(error))

    def complete(self) -> None:
        """The body is there."""
        self._whole = True
        if self._started and not self.response_complete:
            try:
                self._go()
            except Exception as error:
                self._refuse(error)

    def look(self, patience: float) -> None:
        """Called now and then: a body that trickles is not waited for, nor a decoder beyond the deadline."""
        if not self._started or self.response_complete or self._question is not None:
            return
        waited = time.perf_counter() - self._began
        if not self._whole and waited > patience:
            self._refuse(Refusal(408, "the body came too slowly", close=True))
        elif waited > self._seconds:
            self._refuse(self._late(close=not self._whole))

    def _late(self, *, close: bool = False) -> Refusal:
        return Refusal(504, f"{self._seconds:g} s had passed before a worker could be asked", close=close)

    def _too_big(self) -> Refusal:
        return Refusal(413, f"the body exceeds the limit of {self.most_body:,} bytes", close=True)

    def gone(self) -> None:
        """The client has hung up. Workers are told of what is on its way to them; until they have answered it counts as
        under way."""
        self.disconnected = True
        if self.response_complete:
            return
        question = self._question
        if isinstance(question, Question) and question.id:
            self._end(499, answered=False, under_way=True)
            self._models.cancel(self.model, question.event)
            return
        self._end(499, answered=False)
        if question is not None:
            question.cancel()

    def _admit(self) -> None:
        """Raises Refusal."""
        if self.objection is not None:
            raise Refusal(self.objection.status, self.objection.reason, [*self.objection.headers])
        if self._method != b"POST":
            raise Refusal(405, "POST is expected", [(b"allow", b"POST")])
        self._find()
        wanted = self.wanted
        if wanted is None:
            wanted = self.wanted = Wanted.read(self._headers, self._query, self._seconds)
        self._seconds = wanted.seconds
        self._length = max(wanted.length, self._size)
        if self._length > self.most_body:
            raise Refusal(413, f"the body has {self._length:,} bytes; the limit is {self.most_body:,}", close=True)
        admission = self._models.admission(self.model)
        try:
            self._ticket = admission.enter(self._length)
        except Overloaded as error:
            raise _overload(error) from None
        self._admission = admission
        if wanted.waits and not self._whole:
            self._connection.proceed()

    def _find(self) -> None:
        """What the model takes. Raises Refusal when nobody serves it."""
        statuses = self._models.statuses
        self._status = statuses.get(self.model)
        if self._status is None:
            served = ", ".join(sorted(statuses)) or "none yet"
            status = 404 if statuses and self.model not in self._models.known else 503
            raise Refusal(status, f"no worker serves model {self.model!r}; served are: {served}")

    def _go(self) -> None:
        """Raises Refusal, BadInput."""
        if self._size > self.most_body:
            raise self._too_big()
        body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._read(body)

    def _read(self, body: bytes) -> None:
        """Make of it what is to be asked. Raises Refusal, BadInput."""
        status, wanted = self._status, self.wanted
        assert status is not None
        assert wanted is not None
        if not needs_thread(wanted.kind):
            self._ask(read_input(wanted.kind, wanted.content_type, body, status), wanted)
            return
        self._decoding = decoding = asyncio.get_running_loop().run_in_executor(
            self._models.decoders, read_input, wanted.kind, wanted.content_type, body, status
        )
        decoding.add_done_callback(self._decoded)

    def _decoded(self, decoding: asyncio.Future[Any]) -> None:
        if decoding.cancelled() or self.response_complete:
            return
        try:
            assert self.wanted is not None
            self._ask(decoding.result(), self.wanted)
        except Exception as error:
            self._refuse(error)

    def _ask(self, array: Any, wanted: Wanted) -> None:
        """Raises Refusal."""
        left = self._left()
        try:
            inputs = Inputs(data=Tensor(array), deadline=time.time() + left, top=wanted.top)
        except (TypeError, ValueError) as error:
            raise Refusal(422, str(error)) from None
        self._put(catalog.requests_of(self.model), inputs, left)

    def _left(self) -> float:
        """Seconds until the deadline. Raises Refusal."""
        left = self._began + self._seconds - time.perf_counter()
        if left <= 0:
            raise self._late()
        return left

    def _put(self, channel: Channel[Any], event: Any, left: float) -> None:
        self._question = question = self._models.pipeline.ask(channel, event, timeout=left)
        question.add_done_callback(self._heard)

    def _heard(self, question: asyncio.Future[Any]) -> None:
        if self.response_complete:
            answered = not question.cancelled() and question.exception() is None
            spared = answered and self._spared(question.result())
            self._leave(answered=answered and not spared)
            if spared:
                self._models.measures.spared(self.model)
            return
        try:
            answer = question.result()
        except (Exception, asyncio.CancelledError) as error:
            self._refuse(error)
            return
        self._tell(answer)

    def _spared(self, answer: Any) -> bool:
        """Whether it was not computed."""
        return bool(answer.expired)

    def _tell(self, answer: Any) -> None:
        if answer.expired:
            self._refuse(Refusal(504, f"no worker came to it within {self._seconds:g} s"), answered=True)
        elif answer.error:
            self._refuse(Refusal(422, answer.error), answered=True)
        else:
            self._succeed(_success(answer))

    def _succeed(self, body: bytes) -> None:
        self._end(200, answered=True, computed=True)
        self._connection.respond(200, [], body, keep_alive=self.keep_alive)

    # -- the end -------------------------------------------------------------------------------------------------

    def _refuse(self, error: BaseException, *, answered: bool = False) -> None:
        if self.response_complete:
            return
        refusal = self._refusal(error)
        self._end(refusal.status, answered=answered)
        body = b"" if self._method == b"HEAD" else to_json({"success": False, "error": str(refusal)})
        keep_alive = self.keep_alive and not refusal.close
        self._connection.respond(refusal.status, refusal.headers, body, keep_alive=keep_alive)

    def _refusal(self, error: BaseException) -> Refusal:
        if isinstance(error, Refusal):
            return error
        if isinstance(error, BadInput):
            return Refusal(error.status, str(error))
        if isinstance(error, RequestTimeout):
            if not self._models.pipeline.connected:
                return Refusal(503, "Redis does not answer", [(b"retry-after", b"1")])
            return Refusal(504, f"no answer within {self._seconds:g} s")
        if isinstance(error, RequestFailed):
            return Refusal(500, str(error))
        if isinstance(error, (ServerUnavailable, ChannelFull)):
            return Refusal(503, str(error), [(b"retry-after", b"1")])
        if isinstance(error, PublishError):
            return Refusal(413, str(error))
        logger.error("a prediction failed", exc_info=error)
        return Refusal(500, "the gateway failed on it; its log says why")

    def _end(self, status: int, *, answered: bool, computed: bool = False, under_way: bool = False) -> None:
        """Once. `under_way`: it leaves when its question is answered."""
        self.response_complete = True
        self._parts.clear()
        if self._decoding is not None:
            self._decoding.cancel()
        if not under_way:
            self._leave(answered=answered, computed=computed)
        self._models.measures.prediction(self.model, status, time.perf_counter() - self._began)

    def _leave(self, *, answered: bool, computed: bool = False) -> None:
        if self._admission is not None:
            self._admission.leave(self._ticket, self._length, answered=answered, computed=computed)
            self._admission = None


def _overload(error: Overloaded) -> Refusal:
    return Refusal(429, str(error), [(b"retry-after", b"%d" % error.after)])


def _deadline(value: bytes) -> float:
    """Raises Refusal."""
    with contextlib.suppress(ValueError):
        given = float(value)
        if 0 < given <= 3600:
            return given
    raise Refusal(400, "x-deadline: seconds, above 0 and at most 3600")


def _success(answer: Answer) -> bytes:
    if answer.output is not None:
        head = {"success": True, "model": answer.model, "version": answer.version}
        return to_json({**head, "output": np.asarray(answer.output).tolist()}, inf_nan_mode="null")
    ranked = answer.predictions
    if not ranked or (isfinite(ranked[0].probability) and isfinite(ranked[-1].probability)):
        scores = _scores.to_json(ranked)
    else:  # infinity comes first, NaN last: in events they are strings
        scores = to_json([score.model_dump() for score in ranked], inf_nan_mode="null")
    return b'{"success":true,"model":%s,"version":%d,"predictions":%s,"batch":%d}' % (
        to_json(answer.model), answer.version, scores, answer.batch,
    )  # fmt: skip
