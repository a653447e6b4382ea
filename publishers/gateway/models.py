"""Predictions over HTTP, without a framework on their path: this is the part of the gateway that must be quick.

POST /predict                  the picture model, or the only one
POST /models/{name}/predict    any served model
    → {"success": true, "model": …, "version": …, "predictions": [{"label": …, "probability": …} × 5]}
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from pydantic_core import to_json

from pipeline import Pipeline, RequestFailed, RequestTimeout, ServerUnavailable, Tensor, catalog
from pipeline.catalog import Answer, Inputs, ModelStatus
from pipeline.errors import ChannelFull, PublishError
from pipeline.settings import Settings

from .admission import Admission, Overloaded
from .inputs import BadInput, needs_thread, read_input
from .measures import Measures

__all__ = ["Models"]

logger = logging.getLogger("publishers.gateway")

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

MOST_BODY = 32 << 20
GONE_AFTER = 0.05
"""Seconds after which we begin to look whether a waiting client is still there."""

_JSON = [(b"content-type", b"application/json")]


class Gone(Exception):
    """Raised when the client has hung up."""


class Refusal(Exception):
    """Raised to answer with a status."""

    def __init__(self, status: int, reason: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.headers = headers or []


class Patience:
    """With one client: how long its body may take, and whether it still waits for its answer.

    Both need a timer; most requests are through before it has ever gone off, so there is one, and nothing else is made
    before that.
    """

    def __init__(self, receive: Receive, seconds: float) -> None:
        self.receive = receive
        self.asking = False
        """The body is there; only the answer is missing."""
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._handle = self._loop.call_later(GONE_AFTER, self._look)
        self._until = self._loop.time() + seconds
        self._watching: asyncio.Task[None] | None = None
        self._verdict: Exception | None = None

    def _look(self) -> None:
        if self.asking:
            self._watching = self._loop.create_task(self._watch())
        elif self._loop.time() < self._until:
            self._handle = self._loop.call_later(GONE_AFTER, self._look)
        else:
            self._stop(Refusal(408, "the body came too slowly", [(b"connection", b"close")]))

    async def _watch(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            """Whatever else comes is not ours."""
        self._stop(Gone())

    def _stop(self, verdict: Exception) -> None:
        self._verdict = verdict
        if self._task is not None:
            self._task.cancel()

    def check(self) -> None:
        """When cancelled: raise why, if it was by us."""
        if self._verdict is not None:
            if self._task is not None:
                self._task.uncancel()
            raise self._verdict from None

    def end(self) -> None:
        self._handle.cancel()
        if self._watching is not None:
            self._watching.cancel()


class Models:
    """What is served, by whom, and the way there."""

    def __init__(self, pipeline: Pipeline, options: Settings, measures: Measures) -> None:
        self.statuses: dict[str, ModelStatus] = {}
        """The newest of each model that serves."""
        self.workers: dict[tuple[str, str], ModelStatus] = {}
        """(model, worker) → what it said last."""
        self.admissions: dict[str, Admission] = {}
        self._pipeline = pipeline
        self._options = options
        self._measures = measures
        self._decoders = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "decode")

    async def follow(self) -> None:
        """Learn from the workers' announcements what is served."""
        async with self._pipeline.watch(catalog.model_status, since=catalog.model_status.keep) as stream:
            async for message in stream:
                status = message.event
                self.workers[status.model, status.worker] = status
                if status.state == "serving":
                    self.statuses[status.model] = status

    def route(self, path: str) -> str | None:
        """The model a path asks, if it asks one."""
        if path == "/predict":
            if "imagenet" in self.statuses or not self.statuses:
                return "imagenet"
            return next(iter(self.statuses))
        if path.startswith("/models/") and path.endswith("/predict"):
            name = path[8:-8]
            return name if name != catalog.DIGIT_MODEL or name in self.statuses else None
        return None

    def admission(self, model: str) -> Admission:
        admission = self.admissions.get(model)
        if admission is None:
            options = self._options
            admission = self.admissions[model] = Admission(
                options.gateway_inflight, options.gateway_inflight_bytes, options.gateway_wait
            )
        return admission

    # -- one prediction ------------------------------------------------------------------------------------------

    async def handle(self, model: str, scope: Any, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        status = 200
        patience = Patience(receive, self._options.gateway_patience)
        try:
            answer = await self._predict(model, scope, patience)
            body, headers = _success(answer), _JSON
        except Gone:
            self._measures.prediction(model, 499, time.perf_counter() - began)
            return
        except Refusal as refusal:
            status, headers = refusal.status, _JSON + refusal.headers
            body = to_json({"success": False, "error": str(refusal)})
        finally:
            patience.end()
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, (b"content-length", b"%d" % len(body))],
            }
        )
        await send({"type": "http.response.body", "body": body})
        self._measures.prediction(model, status, time.perf_counter() - began)

    async def _predict(self, model: str, scope: Any, patience: Patience) -> Answer:
        """Raises Refusal, Gone."""
        if scope["method"] != "POST":
            raise Refusal(405, "POST is expected", [(b"allow", b"POST")])
        known = self.statuses.get(model)
        if known is None:
            served = ", ".join(sorted(self.statuses)) or "none yet"
            raise Refusal(404 if self.statuses else 503, f"no worker serves model {model!r}; served are: {served}")
        content_type, length, seconds, top = _headers(scope, self._options.gateway_deadline)
        if length > MOST_BODY:
            raise Refusal(
                413, f"the body has {length:,} bytes; the limit is {MOST_BODY:,}", [(b"connection", b"close")]
            )
        admission = self.admission(model)
        try:
            admission.enter(length)
        except Overloaded as error:
            raise Refusal(429, str(error), [(b"retry-after", b"%d" % error.after)]) from None
        answered = False
        try:
            body = await _body(patience)
            kind = content_type.partition(";")[0].strip().lower()
            try:
                if needs_thread(kind):
                    decode = asyncio.get_running_loop().run_in_executor(
                        self._decoders, read_input, kind, content_type, body, known
                    )
                    array = await decode
                else:
                    array = read_input(kind, content_type, body, known)
                inputs = Inputs(data=Tensor(array), deadline=time.time() + seconds, top=top)
            except BadInput as error:
                raise Refusal(error.status, str(error)) from None
            except (TypeError, ValueError) as error:
                raise Refusal(422, str(error)) from None
            answer = await self._ask(model, inputs, seconds, patience)
            answered = True
        finally:
            admission.leave(length, answered=answered)
        if answer.expired:
            raise Refusal(504, f"no worker came to it within {seconds:g} s")
        if answer.error:
            raise Refusal(422, answer.error)
        return answer

    async def _ask(self, model: str, inputs: Inputs, seconds: float, patience: Patience) -> Answer:
        """Raises Refusal, Gone."""
        patience.asking = True
        try:
            answer: Answer = await self._pipeline.request(catalog.requests_of(model), inputs, timeout=seconds)
        except asyncio.CancelledError:
            patience.check()
            raise
        except RequestTimeout:
            raise Refusal(504, f"no answer within {seconds:g} s") from None
        except RequestFailed as error:
            raise Refusal(500, str(error)) from None
        except (ServerUnavailable, ChannelFull) as error:
            raise Refusal(503, str(error), [(b"retry-after", b"1")]) from None
        except PublishError as error:
            raise Refusal(413, str(error)) from None
        return answer

    def close(self) -> None:
        self._decoders.shutdown(wait=False, cancel_futures=True)


def _headers(scope: Any, seconds: float) -> tuple[str, int, float, int]:
    """Content type, declared length (0: unknown), deadline, top. Raises Refusal."""
    content_type, length, top = "", 0, 5
    for name, value in scope["headers"]:
        if name == b"content-type":
            content_type = value.decode("latin-1")
        elif name == b"content-length":
            length = int(value) if value.isdigit() else 0
        elif name == b"x-deadline":
            with contextlib.suppress(ValueError):
                given = float(value)
                if 0 < given <= 3600:
                    seconds = given
                    continue
            raise Refusal(400, "x-deadline: seconds, above 0 and at most 3600")
    if query := scope["query_string"]:
        for part in query.split(b"&"):
            if part.startswith(b"top="):
                if not part[4:].isdigit() or not 1 <= int(part[4:]) <= 1000:
                    raise Refusal(400, "top: a number from 1 to 1000")
                top = int(part[4:])
    return content_type, length, seconds, top


async def _body(patience: Patience) -> bytes:
    """Raises Refusal, Gone."""
    parts: list[bytes] = []
    size = 0
    try:
        while True:
            message = await patience.receive()
            if message["type"] == "http.disconnect":
                raise Gone
            part = message.get("body", b"")
            if not parts and not message.get("more_body", False):
                return part  # type: ignore[no-any-return]  # the ASGI message is a dict
            size += len(part)
            if size > MOST_BODY:
                raise Refusal(413, f"the body exceeds the limit of {MOST_BODY:,} bytes", [(b"connection", b"close")])
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)
    except asyncio.CancelledError:
        patience.check()
        raise


def _success(answer: Answer) -> bytes:
    if answer.output is not None:
        return to_json(
            {
                "success": True,
                "model": answer.model,
                "version": answer.version,
                "output": np.asarray(answer.output).tolist(),
            }
        )
    predictions = [{"label": score.label, "probability": score.probability} for score in answer.predictions]
    return to_json(
        {
            "success": True,
            "model": answer.model,
            "version": answer.version,
            "predictions": predictions,
            "batch": answer.batch,
        }
    )
