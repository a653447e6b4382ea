"""Acting through the dashboard: real processes, over HTTP; who may, what it does, and that it is written down."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from dashboards.access import Access, Denied
from pipeline import Channel, Event, Pipeline, Reject, catalog
from pipeline.catalog import LoadModel, ModelStatus
from publishers.pace import Pace

from .apps import idle, serving
from .processes import line_with


class Reading(Event):
    sensor: str
    value: float


readings = Channel("readings", Reading)
shouts = Channel("shouts", Reading, durable=False)
notes = Channel("notes", str, durable=False)


@contextmanager
def dashboard(url: str, **environment: str) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "dashboards", "--port", "0", "--url", url],
        stdout=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    try:
        yield line_with("http://", process).split()[-1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


class Page:
    """What a page's script sends."""

    def __init__(self, address: str, **headers: str) -> None:
        self.http = httpx.AsyncClient(base_url=address, headers=headers, timeout=30)

    async def get(self, path: str) -> Any:
        answer = await self.http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def post(self, path: str, status: int = 200, **body: Any) -> Any:
        answer = await self.http.post(path, json=body)
        assert answer.status_code == status, (answer.status_code, answer.text)
        return answer.json()

    async def until(self, path: str, true: Any, seconds: float = 20) -> Any:
        found = None
        async with asyncio.timeout(seconds):
            while not ((answer := await self.http.get(path)).status_code == 200 and true(found := answer.json())):
                await asyncio.sleep(0.1)
        return found

    async def __aenter__(self) -> Page:
        await self.until("/api/schemas", lambda _: True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()


async def test_dead_letters_are_seen_replayed_dropped_once_each_and_written_down(valkey_url: str) -> None:
    app, broken, seen = Pipeline("app", valkey_url), True, []

    @app.subscriber(readings, group="g")
    async def work(event: Reading) -> None:
        if broken:
            raise Reject("too hot" if event.value > 100 else "no calibration")
        seen.append(event.sensor)

    @app.subscriber(shouts, group="g")
    async def listen(event: Reading) -> None:
        raise Reject("too loud")

    with dashboard(valkey_url) as address:
        async with app, serving(app), Page(address) as page:
            await app.publish(readings, [Reading(sensor=str(n), value=n * 30) for n in range(6)])
            await idle(app, readings)
            listed = await page.get("/api/dead")
            assert listed == {"channels": {"readings": {
                "open": 6, "groups": {"g": 6}, "reasons": {"no calibration": 4, "too hot": 2},
            }}}  # fmt: skip
            found = await page.get("/api/dead?channel=readings&reason=HOT")
            assert [one["events"][0]["sensor"] for one in found["letters"]] == ["5", "4"], "the newest first"
            broken = False
            id_ = found["letters"][0]["id"]
            for settled, gone in ((1, 0), (0, 1)):
                answer = await page.post("/api/dead/replay", channel="readings", ids=[id_])
                assert answer == {"settled": settled, "gone": gone}
            assert (await page.post("/api/dead/drop", channel="readings", reason="too hot"))["settled"] == 1
            assert (await page.post("/api/dead/replay", channel="readings", all=True))["settled"] == 4
            ledger = await idle(app, readings)
            assert sorted(seen) == ["0", "1", "2", "3", "5"]
            assert (ledger.groups["g"].handled, ledger.groups["g"].dead) == (5, 1)
            error = await page.post("/api/dead/replay", 422, channel="readings")
            assert "say which letters" in error["error"]
            await page.post("/api/dead/replay", 404, channel="nowhere", all=True)
            audit = await page.until("/api/audit", lambda found: len(found) == 5)
            assert [(one["action"], one["outcome"], one["detail"]) for one in audit[::-1]][:4] == [
                ("replay", "done", "replayed 1"), ("replay", "done", "replayed 0"), ("drop", "done", "dropped 1"),
                ("replay", "done", "replayed 4"),
            ]  # fmt: skip
            assert audit[0]["outcome"] == "refused"
            assert {(one["who"], one["address"]) for one in audit} == {("local", "127.0.0.1")}
            await app.publish(shouts, Reading(sensor="6", value=180))
            await page.until("/api/dead", lambda found: "shouts" in found["channels"])
            error = await page.post("/api/dead/replay", 422, channel="shouts", all=True)
            assert "publish their events again, or drop them" in error["error"]


async def test_groups_are_paused_and_resumed_and_marked(valkey_url: str) -> None:
    app, seen = Pipeline("app", valkey_url), []

    @app.subscriber(readings, group="g")
    @app.subscriber(notes, group="listeners")
    async def work(event: Any) -> None:
        seen.append(event)

    with dashboard(valkey_url) as address:
        async with app, serving(app), Page(address) as page:
            await app.publish(readings, Reading(sensor="a", value=1))
            await idle(app, readings)
            await asyncio.sleep(1.5)  # a ledger from before
            group = {"channel": "readings", "group": "g"}
            assert await page.post("/api/groups/pause", **group) == {"paused": True, "changed": True}
            assert await page.post("/api/groups/pause", **group) == {"paused": True, "changed": False}
            await asyncio.sleep(0.2)
            await app.publish(readings, Reading(sensor="b", value=1))
            ledger = (await app.stats()).channels["readings"].groups["g"]
            assert (ledger.paused, ledger.lag, len(seen)) == (True, 1, 1)
            await page.until("/api/markers", lambda found: any(one["kind"] == "pause" for one in found))
            assert await page.post("/api/groups/resume", **group) == {"paused": False, "changed": True}
            await idle(app, readings)
            marks = await page.until("/api/markers", lambda found: any(one["kind"] == "resume" for one in found))
            assert {one["subject"] for one in marks if one["kind"] == "pause"} == {"readings/g"}
            await page.post("/api/groups/pause", 404, channel="readings", group="x")
            await page.post("/api/groups/pause", 409, channel="notes", group="listeners")


async def test_events_are_published_from_a_form_or_refused_field_by_field(valkey_url: str) -> None:
    app, seen = Pipeline("app", valkey_url), []

    @app.subscriber(readings, group="g")
    async def work(event: Reading) -> None:
        seen.append(event)

    with dashboard(valkey_url) as address:
        async with app, serving(app), Page(address) as page:
            listed = await page.get("/api/schemas")
            assert {"channel": "readings", "type": "Reading", "durable": True} in listed
            schema = (await page.get("/api/schemas?channel=readings"))["schema"]
            assert set(schema["properties"]) == {"sensor", "value"}
            for n in range(3):
                event = {"sensor": "a", "value": n}
                answer = await page.post("/api/events", 202, channel="readings", event=event, key="k")
                assert ":" in answer["id"]
            await idle(app, readings)
            assert [event.value for event in seen] == [0, 1, 2]
            error = await page.post("/api/events", 422, channel="readings", event={"sensor": 5, "value": "x"})
            assert set(error["fields"]) == {"sensor", "value"}
            assert "not of type 'string'" in error["fields"]["sensor"]
            await page.post("/api/events", 422, channel="readings", event="text")
            await page.post("/api/events", 404, channel="nowhere", event={})
            assert (await page.http.get("/api/channels/nowhere")).status_code == 404
            assert [one["data"]["value"] for one in (await page.get("/api/channels/readings?count=2"))["events"]] == [
                2,
                1,
            ]
            await page.post("/api/events", 403, channel="pipeline.audit", event={})
            half = b'{"channel": "readings", "event": {"sensor": "\\ud800", "value": 1}}'
            answer = await page.http.post("/api/events", content=half, headers={"content-type": "application/json"})
            assert (answer.status_code, answer.json()["fields"]) == (422, {"": "not JSON"})
            error = await page.post("/api/events", 422, channel="readings", event={}, keey="k")
            assert "keey" in error["fields"]


async def test_rates_are_set_models_swapped_and_rolled_back_and_runs_asked_for(valkey_url: str) -> None:
    async with Pipeline("data", valkey_url) as app, app.watch(catalog.model_loads) as loads:
        with dashboard(valkey_url) as address:
            async with Page(address) as page:
                pace = Pace("data", 5.0)
                app.spawn(pace.follow(app))
                known = await page.until("/api/publishers", lambda found: "data" in found)
                assert (known["data"]["rate"], known["data"]["initial"]) == (5, 5)
                await page.post("/api/publishers/rate", 202, publisher="data", rate=0)
                await page.until("/api/publishers", lambda found: found["data"]["rate"] == 0)
                assert pace.rate == 0
                await page.post("/api/publishers/rate", 404, publisher="nobody", rate=1)
                await page.post("/api/publishers/rate", 422, publisher="data", rate=-1)

                async def serve(version: int, load: str = "", state: Any = "serving") -> None:
                    status = ModelStatus(model="digits", version=version, worker=app.consumer, state=state, load=load)
                    await app.publish(catalog.model_status, status)

                async def asked() -> tuple[str, LoadModel]:
                    message = await anext(aiter(loads))
                    return message.id, message.event

                await page.post("/api/models/load", 404, model="digits", version=2, source="two.json")
                await serve(1)
                await page.until("/api/models", lambda found: "digits" in found)
                await page.post("/api/models/rollback", 409, model="digits")
                for version, source in ((2, "two.json"), (3, "three.json")):
                    await page.post("/api/models/load", 202, model="digits", version=version, source=source)
                    id_, event = await asked()
                    assert (event.version, event.source) == (version, source)
                    await serve(version, id_, "serving" if version == 2 else "refused")
                await page.until("/api/models", lambda found: found["digits"]["workers"][app.consumer]["version"] == 3)
                previous = (await page.get("/api/models"))["digits"]["previous"]
                assert previous == {"version": 1, "source": ""}, "what was refused was never served"
                answer = await page.post("/api/models/rollback", 202, model="digits")
                assert (answer["version"], answer["source"]) == (1, "")
                id_, _ = await asked()
                await serve(1, id_)
                marks = await page.until(
                    "/api/markers", lambda found: [one["text"] for one in found if one["kind"] == "swap"][1:]
                )
                swaps = [one["text"] for one in marks if one["kind"] == "swap"]
                assert swaps == ["digits v1 → v2", "digits v2 → v1"]
                await page.post("/api/runs/start", 202, run="mine", workers=1, rounds=3)
                [run] = await page.until("/api/runs", bool)
                assert (run["run"], run["state"], run["plan"]["rounds"]) == ("mine", "waiting", 3)
                await page.post("/api/runs/start", 409, run="mine")
                error = await page.post(
                    "/api/runs/start", 422, run="--rank", workers=0, mode="hogwild", compress="int8"
                )
                assert set(error["fields"]) == {"run", "workers", "compress"}
                assert (await page.post("/api/runs/start", 202))["run"].startswith("asked-")


async def test_nobody_acts_without_the_token_or_from_a_foreign_page(valkey_url: str) -> None:
    body = {"publisher": "data", "rate": 1}
    async with Pipeline("data", valkey_url) as app:
        with dashboard(valkey_url, PIPELINE_TOKEN="s3cret") as address:
            async with Page(address, authorization="Bearer s3cret") as page:
                app.spawn(Pace("data", 5.0).follow(app))
                await page.until("/api/publishers", lambda found: "data" in found)
                async with httpx.AsyncClient(base_url=address) as stranger:
                    for headers in ({}, {"authorization": "Bearer wrong"}):
                        answer = await stranger.post("/api/publishers/rate", json=body, headers=headers)
                        assert answer.status_code == 401
                        assert (await stranger.get("/api/audit", headers=headers)).status_code == 401
                for origin in ("http://evil.example", "null"):
                    answer = await page.http.post("/api/publishers/rate", json=body, headers={"origin": origin})
                    assert answer.status_code == 403
                answer = await page.http.post(
                    "/api/publishers/rate", content="{}", headers={"content-type": "text/plain"}
                )
                assert answer.status_code == 415
                await page.http.post("/api/publishers/rate", json=body, headers={"origin": address})
                audit = await page.until("/api/audit", bool)
                assert [(one["who"], one["outcome"]) for one in audit] == [("token", "done")]


@pytest.mark.parametrize(
    ("headers", "knows"),
    [({"authorization": "bearer s3cret"}, True), ({"authorization": "s3cret"}, False), ({}, False),
     ({"authorization": "Basic eDp5", "cookie": "pipeline_token=s3cret"}, True),
     ({"authorization": "Bearer wrong", "cookie": "pipeline_token=wrong"}, False)],
)  # fmt: skip
def test_the_token_comes_as_a_bearers_or_in_the_cookie_whatever_a_proxy_adds(
    headers: dict[str, str], knows: bool
) -> None:
    from starlette.requests import HTTPConnection

    sent = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert Access("s3cret").knows(HTTPConnection({"type": "http", "headers": sent})) is knows


async def test_without_a_token_only_who_sits_at_the_machine_acts(valkey_url: str) -> None:
    with dashboard(valkey_url) as address:
        async with Page(address) as page:
            for headers in (
                {"host": "rebound.example"}, {"x-forwarded-for": "127.0.0.1"}, {"forwarded": "for=10.0.0.1"},
            ):  # fmt: skip
                answer = await page.http.post("/api/runs/start", json={}, headers=headers)
                assert answer.status_code == 403, headers
                assert "PIPELINE_TOKEN" in answer.json()["error"]
            assert await page.get("/api/runs") == []


@pytest.mark.parametrize(
    ("client", "host", "may"),
    [("127.0.0.1", "127.0.0.1:8050", True), ("::1", "[::1]:8050", True), ("::ffff:127.0.0.1", "localhost", True),
     ("10.0.0.7", "10.0.0.1:8050", False), ("10.0.0.7", "localhost", False), ("127.0.0.1", "", False)],
)  # fmt: skip
def test_sitting_at_the_machine_is_a_loopback_address_and_name(client: str, host: str, may: bool) -> None:
    from starlette.requests import HTTPConnection

    connection = HTTPConnection({"type": "http", "headers": [(b"host", host.encode())], "client": (client, 1)})
    if may:
        assert Access(None).actor(connection) == "local"
    else:
        with pytest.raises(Denied) as denied:
            Access(None).actor(connection)
        assert denied.value.status == 403


async def test_without_redis_an_action_fails_and_says_what_to_do() -> None:
    with dashboard("redis://127.0.0.1:9/0") as address:
        async with httpx.AsyncClient(base_url=address) as http:
            answer = await http.post("/api/groups/pause", json={"channel": "c", "group": "g"}, timeout=10)
            looked, nowhere = await http.get("/api/channels/readings"), await http.get("/api/nosuch")
    assert answer.status_code == looked.status_code == 503
    assert "pipeline server" in answer.json()["error"]
    assert nowhere.status_code == 404
    assert "/api/nosuch" in nowhere.json()["error"]
