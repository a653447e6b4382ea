"""The gateway's routes.

POST /channels/{name}          a JSON event → 202 {"id": …}
GET  /channels/{name}/events   server-sent events, ?since=5m on durable channels
POST /models/digits/predict    {"pixels": [[…]]} → {"success": true, "predictions": [{"label", "probability"}, …]}
POST /predict                  a picture (form field `image`, or the body) → five labels
POST /models/{name}/predict    any served model: pictures, .npy, safetensors, raw bytes, JSON
POST /models/{name}/load       swap it for another version, or roll back
GET  /models · /channels · /schemas · /metrics · /healthz · /readyz · /openapi.json

Predictions do not come here: see server.py, predictions.py and digits.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline import ChannelFull, Pipeline, PipelineError, ServerUnavailable, catalog
from pipeline.deadletters import internal
from pipeline.errors import ConfigurationError, EventTypeError, PayloadTooLarge, PublishUncertain, UnknownChannel
from pipeline.settings import settings

from ..command import opened
from ..directory import BadEvent, Directory
from .asyncapi import document
from .bodies import BodyTooLarge, Guard, read_body
from .events import event_stream
from .measures import Measures
from .models import Models
from .openapi import Documented
from .patrol import Patrol

__all__ = ["create"]

MOST_EVENT_BYTES = 8 << 20
MOST_LOAD_BYTES = 64 << 10
PROBE_SECONDS = 1.0


class LoadRequest(BaseModel):
    """What `/models/{name}/load` takes."""

    model_config = ConfigDict(extra="forbid")

    source: str
    """A specification within the workers' PIPELINE_MODELS_DIR, or a built-in model."""
    version: int = Field(ge=0)


class Problem(Exception):
    """Raised to answer with a status and a reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Gateway:
    """The handlers, and the pipeline they speak to. It need not be there yet: until it is, answers are 503."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.directory = Directory(pipeline)
        self.measures = Measures()
        self.models = Models(pipeline, settings(), self.measures)
        self._open = False

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        stop = asyncio.Event()
        task = asyncio.create_task(self._keep_open(stop))
        yield
        stop.set()
        if not self._open:  # still waiting for Redis
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _keep_open(self, stop: asyncio.Event) -> None:
        async with opened(self.pipeline):
            self._open = True
            following = self.pipeline.spawn(self.models.follow(), name="model status")
            await stop.wait()
            following.cancel()
            self.models.close()
            self._open = False

    # -- channels ------------------------------------------------------------------------------------------------

    async def channels(self) -> Response:
        """Every registered channel with its schema."""
        with self._problems():
            records = await self.pipeline.registry.records()
        return JSONResponse(
            {
                name: {"type": record.type, "durable": record.durable, "reply": record.reply, "schema": record.schema}
                for name, record in records.items()
            }
        )

    async def publish(self, name: str, request: Request, key: str | None = None) -> Response:
        """Publish the body, one JSON event, on a channel; `key` orders events and chooses the partition."""
        with self._problems():
            if internal(name):
                raise Problem(403, f"channel {name!r} is the framework's own; it can be watched, not written")
            body = await read_body(request, MOST_EVENT_BYTES)
            known = await self.directory.find(name)
            receipt = await self.pipeline.publish(known.channel, known.parse(body), key=key)
        return JSONResponse({"id": receipt.id}, 202)

    async def events(self, name: str, request: Request, since: str | None = None) -> Response:
        """A channel's events as they come: server-sent events, whose data is the event and whose id resumes."""
        with self._problems():
            known = await self.directory.find(name)
            after = request.headers.get("last-event-id") if known.channel.durable else None
            watch = self.pipeline.watch(known.channel, after or since)
            codec = self.pipeline.codec(known.channel)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(event_stream(watch, codec), media_type="text/event-stream", headers=headers)

    # -- models --------------------------------------------------------------------------------------------------

    async def served(self) -> Response:
        """The models that are served: what they take, which versions, by which workers."""
        return JSONResponse(
            {
                name: {
                    **status.model_dump(include={"version", "kind", "shape", "dtype", "classes", "batch", "device"}),
                    "predict": f"/models/{name}/predict",
                    "workers": {
                        worker: one.model_dump(include={"version", "state", "reason"})
                        for (model, worker), one in self.models.workers.items()
                        if model == name
                    },
                }
                for name, status in sorted(self.models.statuses.items())
            }
        )

    async def load(self, name: str, request: Request) -> Response:
        """Have every worker that serves a model load another version of it: {"source": …, "version": …}."""
        with self._problems():
            body = await read_body(request, MOST_LOAD_BYTES)
            try:
                wanted = LoadRequest.model_validate_json(body)
            except ValidationError as error:
                raise Problem(422, _first(error)) from None
            if name not in self.models.statuses:
                raise Problem(404, f"no worker serves model {name!r}")
            event = catalog.LoadModel(model=name, version=wanted.version, source=wanted.source)
            receipt = await self.pipeline.publish(catalog.model_loads, event)
        return JSONResponse({"id": receipt.id}, 202)

    async def metrics(self) -> Response:
        """For Prometheus: this gateway's predictions, and every group's counts and drain time."""
        with self._problems():
            body, kind = self.measures.page(await self.pipeline.stats(), self.models.admissions)
        return Response(body, media_type=kind)

    async def schemas(self) -> Response:
        """The channels as an AsyncAPI 3 document."""
        with self._problems():
            records = await self.pipeline.registry.records()
        return JSONResponse(document(records, self.pipeline.url))

    # -- health --------------------------------------------------------------------------------------------------

    async def alive(self) -> Response:
        """200 while the process answers."""
        return JSONResponse({"status": "alive"})

    async def ready(self) -> Response:
        """200 while Redis answers."""
        with self._problems():
            await self._probe()
        return JSONResponse({"status": "ready"})

    async def _probe(self) -> None:
        """Raises Problem 503 when Redis does not answer."""
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await self.pipeline.registry.records()
        except TimeoutError:
            raise Problem(503, "Redis does not answer") from None

    @contextlib.contextmanager
    def _problems(self) -> Any:
        """Every error of the framework as the status that tells the client whose it is."""
        if not self._open:
            raise Problem(503, f"waiting for Redis at the URL the gateway was given; see `{self.pipeline.name}`'s log")
        try:
            yield
        except BodyTooLarge as error:
            raise Problem(413, str(error)) from None
        except BadEvent as error:
            raise Problem(400 if error.malformed else 422, str(error)) from None
        except UnknownChannel as error:
            raise Problem(404, str(error)) from None
        except PayloadTooLarge as error:
            raise Problem(413, str(error)) from None
        except EventTypeError as error:
            raise Problem(422, str(error)) from None
        except ConfigurationError as error:
            raise Problem(400, str(error)) from None
        except TimeoutError:
            raise Problem(408, "the body came too slowly") from None
        except (ServerUnavailable, ChannelFull, PublishUncertain, ConnectionError) as error:
            raise Problem(503, str(error)) from None
        except PipelineError as error:
            raise Problem(500, str(error)) from None


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}"


class Front:
    """The ASGI app, and what the server asks it for: predictions do not come here, see server.py."""

    def __init__(self, fastapi: FastAPI, models: Models, token: str | None) -> None:
        self.fastapi = fastapi
        self.models = models
        self.guard = Guard(token)
        self.patrol = Patrol(settings().gateway_patience)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        objection = None
        if scope["type"] == "http":
            objection = self.guard.objection(scope["path"], scope["headers"], scope["method"])
        if objection is None:
            await self.fastapi(scope, receive, send)
            return
        headers = {name.decode(): value.decode() for name, value in objection.headers}
        answer = JSONResponse({"success": False, "error": objection.reason}, objection.status, headers)
        await answer(scope, receive, send)


def create(pipeline: Pipeline | None = None) -> Front:
    """The ASGI app."""
    gateway = Gateway(pipeline or Pipeline("gateway"))
    app = Documented(title="Pipeline gateway", docs_url=None, redoc_url=None, lifespan=gateway.lifespan)
    add = app.add_api_route
    add("/channels", gateway.channels, methods=["GET"])
    add("/channels/{name:path}/events", gateway.events, methods=["GET"], response_class=StreamingResponse)
    add("/channels/{name:path}", gateway.publish, methods=["POST"], status_code=202, openapi_extra=_body({}))
    add("/models", gateway.served, methods=["GET"])
    load = LoadRequest.model_json_schema()
    add("/models/{name}/load", gateway.load, methods=["POST"], status_code=202, openapi_extra=_body(load))
    add("/metrics", gateway.metrics, methods=["GET"])
    add("/schemas", gateway.schemas, methods=["GET"])
    add("/healthz", gateway.alive, methods=["GET"])
    add("/readyz", gateway.ready, methods=["GET"])
    app.add_exception_handler(Problem, _answer)
    token = settings().token
    return Front(app, gateway.models, token.get_secret_value() if token else None)


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


async def _answer(request: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    status, headers = error.status, {"retry-after": "1"} if error.status == 503 else None
    if request.url.path.startswith("/models/"):
        return JSONResponse({"success": False, "error": str(error)}, status, headers)
    return JSONResponse({"error": str(error)}, status, headers)
