"""Acting on the pipeline over HTTP: each request becomes events, and each action is recorded in an audit stream.

GET  /api/dead              200 {"channels": {NAME: {"open": n, "groups": {GROUP: n}, "reasons": {REASON: n}}}}
GET  /api/dead?channel=…    [&group= &reason= &limit=100 &tensors=false]
                            200 {"channel", "open": n, "letters": [LETTER, …]}, the newest first
POST /api/dead/replay       {"channel", "ids"?, "group"?, "reason"?, "all"?}        200 {"settled": n, "gone": n}
POST /api/dead/drop         the same                                                the same

POST /api/groups/pause      {"channel", "group"}                                  200 {"paused": true, "changed": bool}
POST /api/groups/resume     {"channel", "group"}                                  200 {"paused": false, "changed": bool}

GET  /api/publishers        200 {NAME: {"rate", "initial", "workers": {WORKER: {"rate", "initial"}}}}
POST /api/publishers/rate   {"publisher", "rate"}                                   202 {"id"}

GET  /api/models            200 {NAME: {"version", "source", "workers": {WORKER: {"version", "state", "reason"}},
                                 "history": [{"version", "source", "time"}, …],
                                 "previous": {"version", "source"} | null}}
POST /api/models/load       {"model", "version", "source"}                          202 {"id"}
POST /api/models/rollback   {"model"}                                               202 {"id", "version", "source"}

GET  /api/runs              200 [{"run", "id", "time", "state", "reason", "plan": {…}}, …], the newest first
POST /api/runs/start        {"run"?, "mode"?, "compress"?, "workers"?, "rounds"?, "learning_rate"?, "batch"?, "rate"?,
                            "seed"?}                                                202 {"id", "run"}

GET  /api/schemas           200 [{"channel", "type", "durable"}, …]: what may be published to
GET  /api/schemas?channel=… 200 {"channel", "type", "durable", "schema"}
GET  /api/channels/NAME     [?count=20]
                            200 {"channel", "type", "durable", "events": [{"id", "time", "key", "data", …}, …]}, the
                            newest first; of a live channel what comes within 1.5 s
POST /api/events            {"channel", "event", "key"?, "delay"?}                  202 {"id"}

GET  /api/audit             [?since=1h &limit=200]
                            200 [{"id", "time", "who", "address", "action", "subject", "parameters", "outcome",
                            "detail"}, …], the newest first
GET  /api/markers           [?since=UNIX SECONDS]
                            200 [{"time", "kind", "text", "subject"}, …], the oldest first; see markers.py

LETTER   {"id", "time", "channel", "group", "partition", "origin", "event_id", "key", "attempts", "reason", "traceback",
         "count", "events": [the payload, …] or null where nobody can read it}; tensors as "<float32 [8, 8]>", with
         tensors=true as {"dtype", "shape", "data": base64}. `reason` in queries: a part of the reason, in any case.
which    Of a channel's letters `ids` picks some, `group` and `reason` those that fit, all three together what fits all;
         "all": true, alone, means every one. A letter is settled once, however often one asks: `settled` counts what
         this call did, `gone` those of `ids` that were settled before, or are too old.
rate     Events a second and process; 0 holds a publisher until the next rate; null: as fast as it goes. It lasts until
         the process ends. Publishers without a PublisherRate cannot be set.
source   A specification within the workers' PIPELINE_MODELS_DIR or a built-in model; "": what they were started with.
         `previous` is where a roll-back goes: what was served before the newest load that was not refused.
state    waiting (no launcher has it yet), started, finished, failed, stopped (taken up again by the next launcher).
event    A JSON object as the schema says, tensors as nested lists or {"dtype", "shape", "data"}; for `str` and `bytes`
         channels a string. It is checked as `pipeline publish` checks it.

Errors are {"error": "what is wrong and what to do"}; 422 has "fields" beside it: {"sensor": "…", "window.0": "…",
"": "…"}, a reason for each place in the input (in the event, for /api/events).

401  a token is set, and it was not given (Authorization: Bearer …, or the cookie of /?token=…)
403  from a page of another origin; no token is set and the request is not from this machine; a channel of the framework
404  no such channel, group, publisher, model, address
409  nothing to roll back to; a run of that name is under way; a live channel's group (nothing waits there)
413  more than 8 MiB                                415  a POST that is not application/json
422  not as the table says                          503  Redis does not answer

Who may act. With a token (PIPELINE_TOKEN): who has it, from anywhere. Without: only who sits at the machine: the
connection comes from a loopback address, was made to a loopback name (a page on the internet can point its own name at
127.0.0.1) and passed no proxy (X-Forwarded-For, Forwarded); so a dashboard that is bound elsewhere and has no token
shows everything and lets nobody from outside act. In both cases pages of other origins are refused.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from pipeline import Channel, ChannelFull, Pipeline, PipelineError, ServerUnavailable, catalog
from pipeline.catalog import Action, LoadModel, SetRate, StartRun
from pipeline.deadletters import describe, internal
from pipeline.errors import ConfigurationError, PublishError, PublishUncertain, UnknownChannel
from pipeline.frame import outline
from pipeline.registry import Record
from pipeline.transports.client import LinkLost, ReplyError
from pipeline.watching import seconds_ago

from .access import Access, Denied
from .browse import events
from .controls import Controls
from .markers import Markers
from .wire import Json

__all__ = ["router"]

logger = logging.getLogger("dashboards.actions")

MOST_BYTES = 8 << 20
PATIENCE = 5.0
"""Seconds for an action, before Redis counts as gone."""
BULK_PATIENCE = 120.0
"""The same for many dead letters."""
AUDIT_PATIENCE = 2.0
OWN: dict[str, Channel[Any]] = {
    channel.name: channel for channel in (catalog.rate_settings, catalog.model_loads, catalog.run_starts)
}
"""Published to here with their classes. An app must use one Channel object a name: sequences hang on it."""

Wanted = TypeVar("Wanted", bound="_Input")
Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Refused(Exception):
    """Raised to answer with a status, a reason and, for input, a reason for each place in it."""

    def __init__(self, status: int, reason: str, fields: dict[str, str] | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.fields = fields


@dataclass(frozen=True, slots=True)
class Done:
    """An action's answer, and what the audit says of it."""

    body: dict[str, Any]
    detail: str
    status: int = 200


# -- what comes in -----------------------------------------------------------------------------------------------


class _Input(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def subject(self) -> str:
        raise NotImplementedError

    def parameters(self) -> dict[str, Any]:
        """For the audit: scalars alone, and no payloads."""
        return {}


class _Letters(_Input):
    channel: str
    ids: list[str] | None = Field(default=None, min_length=1)
    group: str | None = None
    reason: str | None = None
    all: bool = False

    @model_validator(mode="after")
    def _says_which(self) -> _Letters:
        chosen = (self.ids, self.group, self.reason) != (None, None, None)
        if chosen == self.all:
            raise ValueError('say which letters: "ids", "group" or "reason", or "all": true alone')
        return self

    @property
    def subject(self) -> str:
        return f"{self.channel}/{self.group}" if self.group else self.channel

    def parameters(self) -> dict[str, Any]:
        return {"ids": len(self.ids) if self.ids else None, "reason": self.reason, "all": self.all}


class _Group(_Input):
    channel: str
    group: str

    @property
    def subject(self) -> str:
        return f"{self.channel}/{self.group}"


class _Rate(_Input):
    publisher: str
    rate: float | None = Field(ge=0, le=1e6)

    @property
    def subject(self) -> str:
        return self.publisher

    def parameters(self) -> dict[str, Any]:
        return {"rate": self.rate}


class _Load(_Input):
    model: str
    version: int = Field(ge=0)
    source: str

    @property
    def subject(self) -> str:
        return self.model

    def parameters(self) -> dict[str, Any]:
        return {"version": self.version, "source": self.source}


class _Model(_Input):
    model: str

    @property
    def subject(self) -> str:
        return self.model


class _Run(StartRun, _Input):
    run: str = Field(
        default_factory=lambda: time.strftime("asked-%m%d-%H%M%S"),
        pattern=StartRun.model_fields["run"].metadata[0].pattern,
    )

    @property
    def subject(self) -> str:
        return self.run

    def parameters(self) -> dict[str, Any]:
        return self.model_dump(exclude={"run"})


class _TestEvent(_Input):
    channel: str
    event: dict[str, Any] | str
    key: str | None = None
    delay: float | None = Field(default=None, ge=0)

    @property
    def subject(self) -> str:
        return self.channel

    def parameters(self) -> dict[str, Any]:
        return {"key": self.key, "delay": self.delay}


# -- the endpoints -----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Actions:
    app: Pipeline
    controls: Controls
    markers: Markers
    access: Access
    clock: Callable[[], float]
    channels: dict[str, Channel[Any]] = field(default_factory=dict)
    """Of events published by hand, by name."""

    async def act(
        self, request: Request, action: str, kind: type[Wanted], work: Callable[[Wanted], Awaitable[Done]]
    ) -> Response:
        """Who? What? Do it, and write down what came of it."""
        try:
            who = self.access.actor(request)
        except Denied as error:
            address = request.client.host if request.client else "?"
            logger.warning("%s by %s is refused: %s", request.url.path, address, error)
            raise
        wanted = _parsed(kind, await _body(request))
        outcome, detail = "failed", ""
        try:
            done = await work(wanted)
            outcome, detail = "done", done.detail
        except Refused as error:
            outcome, detail = ("failed" if error.status == 503 else "refused"), str(error)
            raise
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
            raise
        finally:
            await self._write_down(request, who, action, wanted, outcome, detail)
        return Json(done.body, done.status)

    async def _write_down(
        self, request: Request, who: str, action: str, wanted: _Input, outcome: str, detail: str
    ) -> None:
        address = request.client.host if request.client else "?"
        logger.info("%s of %s by %s (%s): %s %s", action, wanted.subject, who, address, outcome, detail)
        event = Action.model_validate(
            {
                "who": who,
                "address": address,
                "action": action,
                "subject": wanted.subject,
                "parameters": {name: value for name, value in wanted.parameters().items() if value is not None},
                "outcome": outcome,
                "detail": detail[:2000],
            }
        )
        try:
            async with asyncio.timeout(AUDIT_PATIENCE):
                await self.app.publish(catalog.audit, event)
        except (PipelineError, OSError, LinkLost, ReplyError) as error:
            logger.error("not in the audit stream: %r: %s", event, error)

    # -- dead letters --------------------------------------------------------------------------------------------

    async def dead(self, request: Request) -> Response:
        query = request.query_params
        async with _redis(self.app, BULK_PATIENCE):
            if "channel" not in query:
                return Json({"channels": await self._open_letters()})
            channel, most = query["channel"], _whole(query.get("limit", "100"), "limit", 10_000)
            await self._record(channel)
            letters = await self.app.dead_letters(channel, query.get("group"), reason=query.get("reason"))
        shown = [describe(message) for message in letters[::-1][:most]]
        if query.get("tensors") not in ("true", "1"):
            shown = [{**letter, "events": outline(letter["events"])} for letter in shown]
        return Json({"channel": channel, "open": len(letters), "letters": shown})

    async def _open_letters(self) -> dict[str, Any]:
        ledger = await self.app.stats()
        names = [
            name.removesuffix(".dead")
            for name, one in ledger.channels.items()
            if name.endswith(".dead") and one.retained
        ]
        found: dict[str, Any] = {}
        for name, letters in zip(names, await asyncio.gather(*map(self.app.dead_letters, names)), strict=True):
            if letters:
                groups = _counts(message.event.group for message in letters)
                reasons = _counts(message.event.reason for message in letters)
                found[name] = {"open": len(letters), "groups": groups, "reasons": reasons}
        return found

    async def settle(self, wanted: _Letters, *, replay: bool) -> Done:
        async with _redis(self.app, BULK_PATIENCE):
            await self._record(wanted.channel)
            ids = set(wanted.ids) if wanted.ids is not None else None
            letters = await self.app.dead_letters(wanted.channel, wanted.group, ids=ids, reason=wanted.reason)
            try:
                settled = await self.app.settle_dead(letters, replay=replay)
            except ConfigurationError as error:
                raise Refused(422, str(error)) from None
        gone = len(ids) - settled if ids is not None else len(letters) - settled
        return Done({"settled": settled, "gone": gone}, f"{'replayed' if replay else 'dropped'} {settled}")

    # -- groups --------------------------------------------------------------------------------------------------

    async def pause(self, wanted: _Group, *, paused: bool) -> Done:
        async with _redis(self.app):
            record = await self._record(wanted.channel)
            if not record.durable:
                raise Refused(409, f"channel {wanted.channel!r} is live: nothing waits there, so it cannot be paused")
            verb = self.app.pause if paused else self.app.resume
            try:
                changed = await verb(wanted.channel, wanted.group)
            except ConfigurationError as error:
                raise Refused(404, str(error)) from None
        state = "paused" if paused else "goes on"
        return Done({"paused": paused, "changed": changed}, state if changed else f"{state} already")

    # -- publishers, models, runs --------------------------------------------------------------------------------

    async def publishers(self, _: Request) -> Response:
        return Json(self.controls.publishers())

    async def set_rate(self, wanted: _Rate) -> Done:
        known = self.controls.publishers()
        if wanted.publisher not in known:
            raise Refused(404, f"no publisher {wanted.publisher!r} runs (there are: {', '.join(known) or 'none'})")
        async with _redis(self.app):
            event = SetRate(publisher=wanted.publisher, rate=wanted.rate)
            receipt = await self.app.publish(catalog.rate_settings, event)
        rate = "as fast as it goes" if wanted.rate is None else "held" if wanted.rate == 0 else f"{wanted.rate:g}/s"
        return Done({"id": receipt.id}, rate, 202)

    async def models(self, _: Request) -> Response:
        return Json(self.controls.models())

    async def load(self, wanted: _Load) -> Done:
        known = self.controls.models()
        if wanted.model not in known:
            raise Refused(404, f"no worker serves model {wanted.model!r} (there are: {', '.join(known) or 'none'})")
        return await self._load(wanted.model, wanted.version, wanted.source)

    async def roll_back(self, wanted: _Model) -> Done:
        if wanted.model not in self.controls.models():
            raise Refused(404, f"no worker serves model {wanted.model!r}")
        before = self.controls.previous(wanted.model)
        if before is None:
            raise Refused(409, f"nothing is known that model {wanted.model!r} was before; load a version instead")
        return await self._load(wanted.model, before.version, before.source)

    async def _load(self, model: str, version: int, source: str) -> Done:
        async with _redis(self.app):
            receipt = await self.app.publish(
                catalog.model_loads, LoadModel(model=model, version=version, source=source)
            )
        detail = f"version {version} from {source or 'what the workers were started with'}"
        return Done({"id": receipt.id, "version": version, "source": source}, detail, 202)

    async def runs(self, _: Request) -> Response:
        return Json(self.controls.runs())

    async def start_run(self, wanted: _Run) -> Done:
        for run in self.controls.runs():
            if run["run"] != wanted.run:
                continue
            if run["state"] == "started":
                raise Refused(409, f"run {wanted.run!r} is under way; choose another name")
            if run["state"] == "waiting" and self.clock() - run["time"] < catalog.run_starts.keep:
                raise Refused(
                    409, f"run {wanted.run!r} is asked for and waits for a launcher: python -m publishers.training"
                )
        async with _redis(self.app):
            receipt = await self.app.publish(catalog.run_starts, StartRun.model_validate(wanted.model_dump()))
        return Done({"id": receipt.id, "run": wanted.run}, f"{wanted.mode}, {wanted.workers} workers", 202)

    # -- events by hand ------------------------------------------------------------------------------------------

    async def schemas(self, request: Request) -> Response:
        name = request.query_params.get("channel")
        async with _redis(self.app):
            if name is None:
                records = await self.app.registry.records()
                listed = [_summary(record) for record in records.values() if not internal(record.name)]
                return Json(listed)
            record = await self._record(name)
        return Json({**_summary(record), "schema": record.schema})

    async def channel(self, request: Request) -> Response:
        count = _whole(request.query_params.get("count", "20"), "count", 10_000)
        async with _redis(self.app):
            try:
                return Json(await events(self.app, request.path_params["name"], count))
            except UnknownChannel as error:
                raise Refused(404, str(error)) from None
            except PipelineError as error:
                raise Refused(503, str(error)) from None

    async def publish(self, wanted: _TestEvent) -> Done:
        if internal(wanted.channel):
            raise Refused(403, f"channel {wanted.channel!r} is the framework's own; it can be watched, not written")
        async with _redis(self.app):
            record = await self._record(wanted.channel)
            channel, event = self._event(record, wanted.event)
            try:
                receipt = await self.app.publish(channel, event, key=wanted.key, delay=wanted.delay)
            except ConfigurationError as error:
                raise Refused(422, str(error)) from None
        return Done({"id": receipt.id}, receipt.id, 202)

    def _event(self, record: Record, value: Any) -> tuple[Channel[Any], Any]:
        if record.name in OWN:
            return OWN[record.name], _parsed(OWN[record.name].type, value)
        channel = self.channels.get(record.name)
        if channel is None or channel.durable != record.durable:
            channel = self.channels[record.name] = record.channel()
        raw = record.type in ("str", "bytes")
        if raw != isinstance(value, str):
            raise Refused(
                422, f"channel {record.name!r} carries {record.type}: give {'a string' if raw else 'an object'}"
            )
        if raw:
            return channel, record.parse(value)
        if misfits := record.misfits(value):
            raise Refused(422, f"not a valid {record.type} for channel {record.name!r}", dict(reversed(misfits)))
        return channel, value

    async def _record(self, name: str) -> Record:
        try:
            return await self.app.registry.record(name)
        except UnknownChannel as error:
            raise Refused(404, str(error)) from None

    # -- what happened -------------------------------------------------------------------------------------------

    async def audit(self, request: Request) -> Response:
        since = request.query_params.get("since", "7d")
        ago = seconds_ago(since)
        if ago is None:
            raise Refused(422, f'since={since}: use "30s", "5m", "2h", "7d"', {"since": "not a duration"})
        most = _whole(request.query_params.get("limit", "200"), "limit", 2000)
        return Json(self.controls.actions(self.clock() - ago, most))

    async def marks(self, request: Request) -> Response:
        try:
            since = float(request.query_params.get("since", "0"))
        except ValueError:
            raise Refused(422, "since= is in Unix seconds", {"since": "not a number"}) from None
        shown = [
            {"time": one.time, "kind": one.kind, "text": one.text, "subject": one.subject}
            for one in self.markers.since(since)
        ]
        return Json(shown)


def router(
    app: Pipeline, controls: Controls, markers: Markers, access: Access, clock: Callable[[], float]
) -> APIRouter:
    """The endpoints. `app` is the feed's, opened and closed by it; `controls` and `markers` are fed by it; `clock` is
    the server's."""
    actions, routes = _Actions(app, controls, markers, access, clock), APIRouter(prefix="/api")

    def get(path: str, handler: Handler) -> None:
        async def look(request: Request) -> Response:
            if not access.knows(request):
                raise Denied(401, "a token is set: open /?token=…, or send Authorization: Bearer …")
            return await handler(request)

        routes.add_api_route(path, _answering(look), methods=["GET"])

    def post(path: str, action: str, kind: type[Wanted], work: Callable[[Wanted], Awaitable[Done]]) -> None:
        async def act(request: Request) -> Response:
            return await actions.act(request, action, kind, work)

        routes.add_api_route(path, _answering(act), methods=["POST"])

    get("/dead", actions.dead)
    post("/dead/replay", "replay", _Letters, partial(actions.settle, replay=True))
    post("/dead/drop", "drop", _Letters, partial(actions.settle, replay=False))
    post("/groups/pause", "pause", _Group, partial(actions.pause, paused=True))
    post("/groups/resume", "resume", _Group, partial(actions.pause, paused=False))
    get("/publishers", actions.publishers)
    post("/publishers/rate", "set-rate", _Rate, actions.set_rate)
    get("/models", actions.models)
    post("/models/load", "load-model", _Load, actions.load)
    post("/models/rollback", "roll-back", _Model, actions.roll_back)
    get("/runs", actions.runs)
    post("/runs/start", "start-run", _Run, actions.start_run)
    get("/schemas", actions.schemas)
    get("/channels/{name:path}", actions.channel)
    post("/events", "publish", _TestEvent, actions.publish)
    get("/audit", actions.audit)
    get("/markers", actions.marks)
    get("/{path:path}", _nowhere)
    return routes


async def _nowhere(request: Request) -> Response:
    """Dash would answer with a page."""
    raise Refused(404, f"there is no {request.url.path}; dashboards/actions.py lists what there is")


def _answering(handler: Handler) -> Handler:
    """Errors as their JSON."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except Denied as error:
            return Json({"error": str(error)}, error.status)
        except Refused as error:
            fields = {} if error.fields is None else {"fields": error.fields}
            return Json({"error": str(error), **fields}, error.status)

    return answer


@asynccontextmanager
async def _redis(app: Pipeline, patience: float = PATIENCE) -> AsyncIterator[None]:
    """Within it, a Redis that is not there, or takes longer than `patience` seconds, is a 503."""
    try:
        _ = app.backend
    except ConfigurationError:
        raise Refused(503, "Redis does not answer; start it (`pipeline server`), then try again") from None
    try:
        async with asyncio.timeout(patience):
            yield
    except TimeoutError:
        raise Refused(503, "Redis did not answer in time; whether it was done is not known, look again") from None
    except (ServerUnavailable, PublishUncertain, ChannelFull, LinkLost, ReplyError, OSError) as error:
        raise Refused(503, str(error)) from None
    except PublishError as error:
        raise Refused(422, str(error)) from None


async def _body(request: Request) -> Any:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refused(415, "send JSON, with content-type: application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise Refused(413, f"the body is above {MOST_BYTES >> 20} MiB")
    try:
        return from_json(bytes(body))
    except ValueError as error:
        raise Refused(422, f"not JSON: {error}", {"": "not JSON"}) from None


def _parsed(kind: Any, value: Any) -> Any:
    """A pydantic model from JSON. Raises Refused with the reason for each field."""
    try:
        return kind.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        fields = {".".join(map(str, one["loc"])): one["msg"].removeprefix("Value error, ") for one in errors}
        first = next(iter(fields.items()))
        raise Refused(422, f"{first[0]}: {first[1]}" if first[0] else first[1], fields) from None


def _summary(record: Record) -> dict[str, Any]:
    return {"channel": record.name, "type": record.type, "durable": record.durable}


def _counts(names: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _whole(text: str, name: str, most: int) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= most:
        raise Refused(422, f"{name}={text}: a whole number from 1 to {most}", {name: f"from 1 to {most}"})
    return int(text)
