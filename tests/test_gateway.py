"""The gateway: events over HTTP, and a status with a reason for everything that can go wrong."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
import redis
from sklearn.datasets import load_digits

from pipeline import Batch, Channel, Event, Pipeline, Reject, Tensor, catalog
from pipeline.catalog import Digit, Prediction
from pipeline.ledger import ChannelLedger, GroupLedger, Ledger
from pipeline.server import Server
from pipeline.settings import settings
from publishers import gateway as gateway_module
from publishers.gateway.app import Gateway, create
from publishers.gateway.measures import Measures
from publishers.stress import stress_test
from subscribers import inference

from .apps import declare, idle, serving, until
from .processes import line_with
from .programs import collect, events, finished, program, served


class Song(Event):
    title: str
    plays: int = 0
    samples: Tensor | None = None


songs = Channel("songs", Song)
ragas = Channel("music/ragas", str, durable=False)


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway in this process, once that is ready."""
    app = create(Pipeline("gateway", url))
    async with (
        app.fastapi.router.lifespan_context(app.fastapi),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client,
    ):
        async with asyncio.timeout(5):
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.01)
        yield client


@contextmanager
def running(url: str, **environment: str) -> Iterator[str]:
    """The base URL of a gateway in a process of its own."""
    with program("-m", "publishers.gateway", "--port", "0", url=url, **environment) as process:
        yield line_with("gateway: http", process).split()[-1]


@pytest.fixture
async def app(valkey_url: str) -> AsyncIterator[Pipeline]:
    async with Pipeline("t", valkey_url) as app:
        await declare(app, songs, ragas)
        yield app


@pytest.fixture
async def client(valkey_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(valkey_url) as client:
        yield client


def pixels(number: int = 0) -> list[list[float]]:
    data: Any = load_digits()
    rows: list[list[float]] = data.images[number].tolist()
    return rows


# -- publish -------------------------------------------------------------------------------------------------------


async def test_an_event_posted_is_an_event_published(app: Pipeline, client: httpx.AsyncClient) -> None:
    async with app.watch(songs) as stream:
        response = await client.post("/channels/songs?key=k", json={"title": "Yaman", "samples": [1.5, 2.5]})
        message = await anext(aiter(stream))
    assert (response.status_code, response.json()) == (202, {"id": message.id})
    assert message.event.title == "Yaman"
    assert message.event.samples.tolist() == [1.5, 2.5]
    assert message.key == "k"


async def test_many_events_posted_at_once_all_arrive_with_ids_of_their_own(
    app: Pipeline, client: httpx.AsyncClient
) -> None:
    responses = await asyncio.gather(
        *(client.post("/channels/songs", json={"title": str(number)}) for number in range(200))
    )
    assert len({response.json()["id"] for response in responses}) == 200
    arrived = events(await collect(app, songs, 200))
    assert {song.title for song in arrived} == {str(number) for number in range(200)}


async def test_a_channel_of_the_catalog_takes_events_before_any_process_declared_it(
    app: Pipeline, client: httpx.AsyncClient
) -> None:
    body = {"source": "curl", "row": 1, "values": {"x": 1.5, "y": None}}
    assert (await client.post("/channels/records", json=body)).status_code == 202
    [record] = events(await collect(app, catalog.records, 1))
    assert record == catalog.Record(source="curl", row=1, values={"x": 1.5, "y": None})


async def test_raw_text_goes_out_as_text_on_live_channels(app: Pipeline, client: httpx.AsyncClient) -> None:
    async with app.watch(ragas) as stream:
        assert (await client.post("/channels/music/ragas", json="Vairabi")).status_code == 202
        assert (await anext(aiter(stream))).event == "Vairabi"


async def test_bytes_are_base64_in_json_both_ways(app: Pipeline, client: httpx.AsyncClient) -> None:
    raw = Channel("raw", bytes)
    await declare(app, raw)
    assert (await client.post("/channels/raw", json="aGVsbG8_")).status_code == 202
    assert events(await collect(app, raw, 1)) == [b"hello?"]
    assert app.codec(raw).to_json(b"hello?") == "aGVsbG8_"
    refused = await client.post("/channels/raw", json="no base64!")
    assert (refused.status_code, "Data should be valid base64" in refused.json()["error"]) == (422, True)


@pytest.mark.parametrize(
    ("channel", "body", "status", "reasons"),
    [
        ("songs", b"{", 400, ["not JSON"]),
        ("songs", b"", 400, ["not JSON"]),
        ("songs", b"[" * 100_000, 400, ["not JSON"]),
        ("songs", b'{"title": "\\ud800"}', 400, ["not JSON: "]),
        ("songs", b'{"plays": "many", "extra": 1}', 422, ["'title' is a required property", "plays", "extra"]),
        ("songs", b"[]", 422, ["is not of type 'object'"]),
        ("digits", b'{"image": [[1, 2], [3]]}', 422, ["image: Value error, a tensor given as nested lists must be"]),
        ("digits", b'{"image": {"dtype": "object", "shape": [1], "data": ""}}', 422, ["unknown tensor dtype 'object'"]),
        ("digits", b"nonsense", 400, ["Invalid JSON"]),
        ("sogns", b"{}", 404, ["no channel 'sogns' is registered (known: ", "songs"]),
        ("pipeline.metrics", b"{}", 403, ["the framework's own"]),
        ("songs.dead", b"{}", 403, ["the framework's own"]),
        ("music/ragas", b'"\\ud800"', 400, ["not JSON"]),
    ],
)
async def test_what_cannot_be_published_is_answered_with_every_reason(
    channel: str, body: bytes, status: int, reasons: list[str], app: Pipeline, client: httpx.AsyncClient
) -> None:
    response = await client.post(f"/channels/{channel}", content=body)
    assert response.status_code == status
    for reason in reasons:
        assert reason in response.json()["error"]
    assert (await app.stats()).channels["songs"].published == 0


async def test_what_asks_for_another_protocol_is_answered_in_this_one(app: Pipeline) -> None:
    """As `curl --http2`, Java's HttpClient and browsers ask; a body may come in a segment of its own."""
    asked = [
        ("POST /channels/songs", "h2c", b'{"title": "Yaman"}', b"202"),
        ("POST /models/songs/predict", "h2c", b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n", b"503"),
        ("GET /readyz", "websocket", b"", b"200"),
        ("GET /predict", "websocket", b"", b"405"),
        ("CONNECT x:80", "h2c", b"", b"400"),
    ]
    with running(app.url) as base:
        async with httpx.AsyncClient(base_url=base) as client:
            await until_ready(client)
        reader, writer = await asyncio.open_connection(*base.removeprefix("http://").split(":"))
        for request, protocol, body, status in asked:
            head = f"host: x\r\nconnection: upgrade\r\nupgrade: {protocol}\r\ncontent-length: {len(body)}\r\n\r\n"
            writer.write(f"{request} HTTP/1.1\r\n{head}".encode())
            await asyncio.sleep(0.02)
            writer.write(body)
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert answer.startswith(b"HTTP/1.1 " + status), request
            await reader.readexactly(int(answer.partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        assert await reader.read() == b""
        writer.close()
    assert events(await collect(app, songs, 1)) == [Song(title="Yaman")]


async def test_a_body_beyond_the_limit_is_refused_unread(app: Pipeline, client: httpx.AsyncClient) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 1 << 30:
            sent += 1 << 20
            yield bytes(1 << 20)

    declared = await client.post("/channels/records", content=b"x", headers={"content-length": str(1 << 40)})
    streamed = await client.post("/channels/records", content=endless())
    assert (declared.status_code, streamed.status_code) == (413, 413)
    assert "limit" in streamed.json()["error"]
    assert sent < 16 << 20


async def test_a_channel_that_changes_its_schema_is_validated_by_the_new_one(
    app: Pipeline, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("publishers.directory.FRESH", 0.0)

    class Other(Event):
        name: str

    assert (await client.post("/channels/songs", json={"title": "a"})).status_code == 202
    async with Pipeline("u", app.url) as later:
        await declare(later, Channel("songs", Other))
        assert (await client.post("/channels/songs", json={"title": "a"})).status_code == 422
        assert (await client.post("/channels/songs", json={"name": "a"})).status_code == 202
    assert (await app.stats()).channels["songs"].published == 2


# -- watch ---------------------------------------------------------------------------------------------------------


async def heard(lines: AsyncIterator[str], count: int) -> list[tuple[str, Any]]:
    """(id, data) of the next events of a stream."""
    found, id_ = [], ""
    async with asyncio.timeout(10):
        while len(found) < count:
            line = await anext(lines)
            if line.startswith("id: "):
                id_ = line[4:]
            elif line.startswith("data: "):
                found.append((id_, json.loads(line[6:])))
    return found


@asynccontextmanager
async def streamed(base: str, path: str, **headers: str) -> AsyncIterator[AsyncIterator[str]]:
    """The lines of a stream of events, from after its greeting: from then on nothing is missed."""
    async with httpx.AsyncClient(base_url=base, timeout=10) as client:
        await until_ready(client)
        async with client.stream("GET", f"/channels/{path}", headers=headers) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = response.aiter_lines()
            assert await anext(lines) == ": connected"
            yield lines


@asynccontextmanager
async def connected(base: str) -> AsyncIterator[asyncio.StreamWriter]:
    """A connection to a gateway, closed with the block."""
    _, writer = await asyncio.open_connection(*base.removeprefix("http://").split(":"))
    try:
        yield writer
    finally:
        writer.close()
        await writer.wait_closed()


async def test_events_are_streamed_as_they_come_and_from_the_past_and_resumed(app: Pipeline) -> None:
    def song(title: str) -> dict[str, Any]:
        return {"title": title, "plays": 0, "samples": None}

    first, second = (await app.publish(songs, [Song(title="a"), Song(title="b")])).ids
    with running(app.url) as base:
        async with streamed(base, "songs/events?since=5m") as lines:
            assert await heard(lines, 2) == [(first, song("a")), (second, song("b"))]
        async with streamed(base, "songs/events", **{"last-event-id": first}) as lines:
            assert await heard(lines, 1) == [(second, song("b"))]
        async with streamed(base, "songs/events") as lines:
            receipt = await app.publish(songs, Song(title="c"))
            assert await heard(lines, 1) == [(receipt.id, song("c"))]


async def test_tensors_are_streamed_as_dtype_shape_and_base64(app: Pipeline) -> None:
    await app.publish(catalog.records, catalog.Record(source="s", row=0, tensor=Tensor([1.0])))
    with running(app.url) as base:
        async with streamed(base, "records/events?since=5m") as lines:
            [(_, record)] = await heard(lines, 1)
    assert record["tensor"] == {"dtype": "float64", "shape": [1], "data": "AAAAAAAA8D8="}


async def test_viewers_that_went_leave_no_connection_behind(app: Pipeline) -> None:
    with running(app.url) as base, redis.Redis.from_url(app.url) as bare:
        for _ in range(3):
            async with streamed(base, "music/ragas/events"):
                assert bare.pubsub_numsub(ragas.name) == [(b"music/ragas", 1)]
            await until(lambda: bare.pubsub_numsub(ragas.name) == [(b"music/ragas", 0)], 3)
        async with connected(base) as writer:  # one who has asked for more than he waits for
            writer.write(b"GET /channels/music/ragas/events HTTP/1.1\r\nhost: x\r\n\r\n" * 2)
            await until(lambda: bare.pubsub_numsub(ragas.name) == [(b"music/ragas", 1)], 3)
        await until(lambda: bare.pubsub_numsub(ragas.name) == [(b"music/ragas", 0)], 3)


async def test_a_gateway_with_open_streams_stops_promptly(app: Pipeline) -> None:
    with program("-m", "publishers.gateway", "--port", "0", url=app.url) as process:
        base = line_with("gateway: http", process).split()[-1]
        async with streamed(base, "songs/events"):
            process.terminate()
            assert await asyncio.to_thread(process.wait, 4) is not None


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("sogns/events", 404, "no channel 'sogns'"),
        ("songs/events?since=yesterday", 400, "since='yesterday': use"),
        ("music/ragas/events?since=5m", 400, "is live: it has no past"),
    ],
)
async def test_what_cannot_be_watched_is_answered_with_the_reason(
    path: str, status: int, reason: str, app: Pipeline, client: httpx.AsyncClient
) -> None:
    response = await client.get(f"/channels/{path}")
    assert response.status_code == status
    assert reason in response.json()["error"]


# -- predict -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def front(valkey: Server) -> Iterator[str]:
    """The base URL of a gateway whose Redis is emptied between tests."""
    with running(valkey.url) as base:
        yield base


@asynccontextmanager
async def predicting(base: str, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=base, timeout=10, headers=headers) as client:
        await until_ready(client)
        yield client


def slow_digits(url: str, seconds: float) -> Pipeline:
    """Classifies digits, so many seconds each."""
    app = Pipeline("slow", url)

    @app.subscriber(catalog.digits, group="inference", batch=Batch(8), run_in="thread")
    def classify(batch: list[Digit]) -> list[Prediction]:
        time.sleep(seconds * len(batch))
        return [Prediction(model="digits", version=1, label=0, probabilities=[1.0], batch=len(batch)) for _ in batch]

    return app


async def test_a_digit_is_classified_by_the_inference_subscriber(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "served", inference.Served())
    with running(valkey_url) as base:
        async with served(inference.app, valkey_url), predicting(base) as client:
            answers = await asyncio.gather(
                *(client.post("/models/digits/predict", json={"pixels": pixels(number)}) for number in range(50))
            )
            assert 'gateway_predictions_total{model="digits",status="200"} 50.0' in (await client.get("/metrics")).text
    for response in answers:
        body = response.json()
        assert (response.status_code, body["success"], body["version"]) == (200, True, 0)
        probabilities = [one["probability"] for one in body["predictions"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert sorted(one["label"] for one in body["predictions"]) == list(range(10))
    assert len({tuple(map(str, response.json()["predictions"])) for response in answers}) > 1


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 400, "Invalid JSON"),
        (b"{}", 422, "pixels: Field required"),
        (b'{"pixels": [[1, 2], [3, 4]]}', 422, "pixels: expected 8 rows of 8 numbers each"),
        (json.dumps({"pixels": [[0] * 8] * 7 + [[255] * 8]}).encode(), 422, "pixels: expected numbers from 0 to 16"),
        (b'{"pixels": [["NaN"]]}', 422, "pixels"),
        (b'{"pixels": "abc"}', 422, "pixels"),
        (b" " * 100_000, 413, "limit"),
    ],
)
async def test_what_is_no_digit_is_answered_with_what_one_is(body: bytes, status: int, reason: str, front: str) -> None:
    async with predicting(front) as client:
        response = await client.post("/models/digits/predict", content=body)
    assert (response.status_code, response.json()["success"]) == (status, False)
    assert reason in response.json()["error"]


async def test_a_digit_is_waited_for_until_its_deadline(front: str) -> None:
    async with predicting(front, **{"x-deadline": "0.2"}) as client:
        began = time.monotonic()
        response = await client.post("/models/digits/predict", json={"pixels": pixels()})
        assert time.monotonic() - began < 1.5
    assert (response.status_code, response.json()["success"]) == (504, False)
    assert response.json()["error"] == "no answer within 0.2 s; is a subscriber of channel 'digits' running?"
    async with predicting(front, **{"x-deadline": "soon"}) as client:
        assert (await client.post("/models/digits/predict", json={"pixels": pixels()})).status_code == 400


@pytest.mark.parametrize("top", ["0", "1001", "nine", "9" * 5000])
async def test_who_asks_for_impossibly_many_labels_is_told_how_many_there_may_be(top: str, front: str) -> None:
    path, body = f"/models/digits/predict?top={top}", {"pixels": pixels()}
    async with predicting(front) as client:
        response = await client.post(path, json=body)
    assert (response.status_code, response.json().get("error")) == (400, "top: a number from 1 to 1000")
    outcome = await stress_test(front + path, [("application/json", json.dumps(body).encode())], requests=1)
    assert outcome.statuses == {400: 1}


async def test_a_model_that_refuses_is_a_422_with_its_reason(valkey_url: str) -> None:
    app = Pipeline("picky", valkey_url)

    @app.subscriber(catalog.digits, group="inference", batch=Batch(8), run_in="thread")
    def refuse(batch: list[Digit]) -> list[Prediction | Reject]:
        return [Reject("not my day") for _ in batch]

    with running(valkey_url) as base:
        async with serving(app), predicting(base) as client:
            response = await client.post("/models/digits/predict", json={"pixels": pixels()})
    assert (response.status_code, response.json()["success"]) == (422, False)
    assert "not my day" in response.json()["error"]


async def test_digits_whose_clients_hung_up_are_not_waited_for_and_count_until_they_are_answered(
    valkey_url: str,
) -> None:
    with running(valkey_url, PIPELINE_GATEWAY_INFLIGHT="4") as base:
        async with predicting(base) as client:

            async def status() -> int:
                answer = await client.post("/models/digits/predict", json={"pixels": pixels()}, timeout=0.5)
                assert answer.status_code == 200 or int(answer.headers["retry-after"]) >= 1
                return answer.status_code

            found = await asyncio.gather(*(status() for _ in range(4)), return_exceptions=True)
            assert [type(one) for one in found] == [httpx.ReadTimeout] * 4
            assert await status() == 429
            async with serving(slow_digits(valkey_url, 0.0)), Pipeline("t", valkey_url) as app:
                await idle(app, "digits")
                assert await status() == 200
            page = (await client.get("/metrics")).text
    assert 'gateway_inflight{model="digits"} 0.0' in page
    for code, count in ((499, 4), (429, 1), (200, 1)):
        assert f'gateway_predictions_total{{model="digits",status="{code}"}} {count}.0' in page


async def test_digits_asked_for_on_one_connection_are_given_up_with_it(valkey_url: str) -> None:
    body = json.dumps({"pixels": pixels()})
    head = f"POST /models/digits/predict HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    with running(valkey_url) as base:
        async with serving(slow_digits(valkey_url, 0.3)), predicting(base) as client:
            async with connected(base) as writer:
                writer.write((head + body).encode() * 3)
                await writer.drain()
                await asyncio.sleep(0.1)
            async with asyncio.timeout(3):  # with the first one's answer it is seen that nobody is there
                while '{model="digits",status="499"} 2.0' not in (await client.get("/metrics")).text:
                    await asyncio.sleep(0.05)


async def test_more_digits_than_can_be_classified_are_refused_at_once(valkey_url: str) -> None:
    body = "application/json", json.dumps({"pixels": pixels()}).encode()
    with running(valkey_url) as base:
        async with serving(slow_digits(valkey_url, 0.03)), predicting(base) as client, Pipeline("t", valkey_url) as app:
            target = f"{base}/models/digits/predict"
            calm = await stress_test(target, [body], requests=24)
            flood = await stress_test(target, [body], rate=100.0, seconds=3.0)
            await idle(app, "digits", 5.0)
            assert 'gateway_inflight{model="digits"} 0.0' in (await client.get("/metrics")).text
    assert set(flood.statuses) == {200, 429}
    assert flood.statuses[200] > 50, "the worker is kept busy: 33 a second"
    assert sorted(flood.refusals)[len(flood.refusals) // 2] < calm.quantile(0.5)
    assert flood.quantile(0.5) < 4 * calm.quantile(0.5)


# -- health and safety ---------------------------------------------------------------------------------------------


async def until_ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(10):
        while (await client.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.02)


async def test_without_redis_the_gateway_lives_says_so_and_recovers() -> None:
    with Server() as server:
        port, url = int(server.url.rsplit(":", 1)[1].removesuffix("/0")), server.url
    with running(url) as base:
        async with httpx.AsyncClient(base_url=base, timeout=10) as client:
            assert (await client.get("/healthz")).status_code == 200
            for _ in range(2):
                responses = [
                    await client.get("/readyz"),
                    await client.get("/channels"),
                    await client.post("/models/digits/predict", json={"pixels": pixels()}, headers={"x-deadline": "1"}),
                ]
                assert [response.status_code for response in responses] == [503] * 3
                assert responses[2].json()["success"] is False
                assert responses[0].headers["retry-after"] == "1"
                with Server(port=port):
                    await until_ready(client)
                    body = {"source": "s", "row": 0}
                    assert (await client.post("/channels/records", json=body)).status_code == 202
                async with asyncio.timeout(5):
                    while (await client.get("/readyz")).status_code != 503:
                        await asyncio.sleep(0.02)


async def test_with_a_token_everything_but_health_asks_for_it(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_TOKEN", "s3cret")
    settings.cache_clear()
    try:
        async with client_of(valkey_url) as client:
            assert (await client.get("/healthz")).status_code == 200
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
                refused = await client.get("/channels", headers=headers)
                assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
                assert "s3cret" not in refused.text
            assert (await client.get("/channels", headers={"authorization": "Bearer s3cret"})).status_code == 200
    finally:
        monkeypatch.undo()
        settings.cache_clear()


@pytest.mark.parametrize("token", [None, "s3cret"])
async def test_pages_of_other_origins_may_look_and_not_act(valkey_url: str, token: str | None) -> None:
    event = {"source": "page", "row": 0, "values": {}}
    environment = {"PIPELINE_TOKEN": token} if token else {}
    bearer = {"authorization": f"Bearer {token}"} if token else {}
    rebound = {"origin": "http://evil.example", "host": "evil.example"}
    with running(valkey_url, **environment) as base:
        async with httpx.AsyncClient(base_url=base, headers=bearer) as client:
            async with asyncio.timeout(10):
                while (await client.get("/readyz")).status_code != 200:
                    await asyncio.sleep(0.05)
            for path in ("/channels/records", "/models/imagenet/load", "/predict"):
                foreign = [{"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://["}]
                for headers in foreign if token else [*foreign, rebound]:
                    answer = await client.post(path, json=event, headers=headers)
                    assert (answer.status_code, "may act" in answer.text or "may not act" in answer.text) == (403, True)
            assert (await client.get("/models", headers=foreign[0])).status_code == 200
            taken: list[dict[str, str]] = [{}, {"origin": base}, *([rebound] if token else [])]
            for headers in taken:
                assert (await client.post("/channels/records", json=event, headers=headers)).status_code == 202
                assert (await client.post("/predict", json=event, headers=headers)).status_code == 503


async def test_a_version_that_is_none_is_refused(valkey_url: str) -> None:
    async with client_of(valkey_url) as client:
        answer = await client.post("/models/toy/load", json={"source": "toy.json", "version": -1})
    assert (answer.status_code, "version: Input should be greater than or equal to 0" in answer.text) == (422, True)


async def test_the_channels_and_the_api_describe_themselves(app: Pipeline, client: httpx.AsyncClient) -> None:
    listed = (await client.get("/channels")).json()
    assert listed["songs"]["type"] == "Song"
    assert "title" in listed["songs"]["schema"]["properties"]
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/channels/{name}", "/channels/{name}/events", "/models/digits/predict", "/healthz", "/readyz"} <= {*paths}
    digit = paths["/models/digits/predict"]["post"]
    assert digit["requestBody"]["content"]["application/json"]["schema"]["required"] == ["pixels"]
    assert [parameter["name"] for parameter in digit["parameters"]] == ["x-deadline"]
    assert {"200", "422", "429", "504"} <= {*digit["responses"]}
    for path in ("/predict", "/models/{name}/predict"):
        asked = paths[path]["post"]
        assert {"image/jpeg", "multipart/form-data", "application/x-npy"} <= {*asked["requestBody"]["content"]}
        assert {"200", "422", "429", "504"} <= {*asked["responses"]}


async def test_every_reference_of_the_asyncapi_document_leads_to_what_it_names(
    app: Pipeline, client: httpx.AsyncClient
) -> None:
    def other() -> Channel[Any]:
        class Song(Event):
            lines: list[str]

        return Channel("poems/sung", Song)

    await declare(app, other(), catalog.answers)
    document = (await client.get("/schemas")).json()

    def references(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            yield from [part["$ref"]] if isinstance(part.get("$ref"), str) else []
        for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            yield from references(value)

    found = list(references(document))
    assert any(reference.endswith("/$defs/Score") for reference in found)
    for reference in found:
        place = document
        for step in unquote(reference.removeprefix("#/")).split("/"):
            place = place[step.replace("~1", "/").replace("~0", "~")]
        assert place["type"]
    fields = [
        set(document["channels"][name]["messages"]["Song"]["payload"]["properties"]) for name in ("songs", "poems/sung")
    ]
    assert fields == [{"title", "plays", "samples"}, {"lines"}]


def test_the_drain_time_is_absent_while_nobody_knows_it() -> None:
    measures = Measures()

    def drain(seconds: float | None) -> bool:
        group = GroupLedger(lag=5, drain_seconds=seconds)
        ledger = Ledger(time=1.0, channels={"c": ChannelLedger(groups={"g": group})})
        page, _ = measures.page(ledger, {})
        return b'pipeline_group_drain_seconds{channel="c",group="g"}' in page

    assert [drain(seconds) for seconds in (0.0, None, 2.0)] == [True, False, True]


def test_groups_that_are_gone_are_told_of_no_more() -> None:
    measures = Measures()

    def told(groups: dict[str, GroupLedger]) -> set[str]:
        page, _ = measures.page(Ledger(time=1.0, channels={"c": ChannelLedger(groups=groups)}), {})
        return {line.partition("{")[0] for line in page.decode().splitlines() if 'group="g"' in line}

    assert len(told({"g": GroupLedger(lag=5, drain_seconds=1.0)})) == 5
    assert told({"h": GroupLedger()}) == set()


def test_a_port_that_is_taken_is_an_error_that_says_what_to_do(valkey_url: str) -> None:
    with running(valkey_url) as base:
        port = base.rsplit(":", 1)[1]
        result = finished("-m", "publishers.gateway", url=valkey_url, GATEWAY_PORT=port)
    assert result.returncode == 2
    assert result.stderr == f"error: cannot listen on 127.0.0.1:{port}: Address already in use; set GATEWAY_PORT\n"


async def test_a_gateway_that_never_saw_redis_stops_at_once() -> None:
    gateway = Gateway(Pipeline("gateway", "redis://127.0.0.1:1"))
    async with asyncio.timeout(2), gateway.lifespan(gateway_module.create(gateway.pipeline)):
        await until(lambda: not gateway._open)
