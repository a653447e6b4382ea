"""Live channels, and interoperation with any plain Redis client; with both Pub/Sub clients."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, Literal

import anyio
import numpy as np
import pytest
import redis

from pipeline import Batch, Channel, Event, Pipeline, Reject, RetryPolicy, ServerUnavailable, Tensor
from pipeline.errors import ConfigurationError
from pipeline.server import Server
from pipeline.testing import first

from .apps import idle, serving, unanswered_once, until

LiveClient = Literal["redis", "asyncio-redis"]


class Alert(Event):
    sensor: str
    level: float = 0.0
    picture: Tensor | None = None


alerts = Channel("alerts", Alert, durable=False)
music = Channel("classical_music", str, durable=False)
RAGA = "Raga Vairabi - Pt. Ajoy Chakrabarty"


@pytest.fixture(params=["redis", "asyncio-redis"])
def live_client(request: pytest.FixtureRequest) -> LiveClient:
    client: LiveClient = request.param
    return client


async def test_a_bare_client_and_the_pipeline_understand_each_others_text(url: str, live_client: LiveClient) -> None:
    app, heard = Pipeline("listener", url, live_client=live_client), []

    @app.subscriber(music, group="radio")
    async def listen(text: str) -> None:
        heard.append(text)

    with redis.Redis.from_url(url) as bare, bare.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe("classical_music")
        pubsub.get_message(timeout=1)
        async with app, serving(app):
            await asyncio.to_thread(bare.publish, "classical_music", RAGA)
            await until(lambda: heard == [RAGA])
            await app.publish(music, ["ragas", "talas"])
            await until(lambda: heard == [RAGA, "ragas", "talas"])
        received = [_next(pubsub) for _ in range(3)]
    assert received == [RAGA.encode(), b"ragas", b"talas"]


def _next(pubsub: Any) -> bytes:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if (message := pubsub.get_message(timeout=0.5)) is not None:
            return bytes(message["data"])
    raise AssertionError("no message came")


async def test_an_event_comes_out_as_json_and_plain_json_goes_in(url: str, live_client: LiveClient) -> None:
    app, heard = Pipeline("listener", url, live_client=live_client), []

    @app.subscriber(alerts, group="g")
    async def listen(alert: Alert) -> None:
        heard.append(alert)

    with redis.Redis.from_url(url) as bare, bare.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe("alerts")
        pubsub.get_message(timeout=1)
        async with app, serving(app):
            await app.publish(alerts, Alert(sensor="a", level=1.5))
            frame = json.loads(await asyncio.to_thread(_next, pubsub))
            assert frame["data"] == [{"sensor": "a", "level": 1.5, "picture": None}]
            assert (frame["source"], frame["sequence"], frame["type"]) == (app.source, 1, "Alert")
            bare.publish("alerts", '{"sensor": "b"}')
            bare.publish("alerts", ' [{"sensor": "c"}, {"sensor": "d", "picture": [[1, 2], [3, 4]]}]')
            await until(lambda: len(heard) == 4)
    assert [alert.sensor for alert in heard] == ["a", "b", "c", "d"]
    assert np.asarray(heard[3].picture).tolist() == [[1, 2], [3, 4]]


async def test_an_object_with_a_field_called_pipeline_is_no_frame(valkey_url: str) -> None:
    class Deploy(Event):
        pipeline: str | int
        data: str = ""

    app, heard = Pipeline("listener", valkey_url), []

    @app.subscriber(Channel("deploys", Deploy, durable=False), group="g")
    async def listen(deploy: Deploy) -> None:
        heard.append(deploy.pipeline)

    with redis.Redis.from_url(valkey_url) as bare:
        async with app, serving(app):
            for text in ('{"pipeline":"prod","data":"x"}', '{"pipeline":1}', '{"data":"y","pipeline":"test"}'):
                bare.publish("deploys", text)
            bare.publish("deploys", '{"pipeline":2,"data":[{"pipeline":"of a later release"}]}')
            async with asyncio.timeout(5):
                while not (letters := await app.dead_letters("deploys")):
                    await asyncio.sleep(0.01)
    assert heard == ["prod", 1, "test"]
    assert "frame version 2" in letters[0].event.reason


async def test_who_watches_is_told_of_invalid_events(valkey_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async with Pipeline("watcher", valkey_url) as app, app.watch(alerts) as stream:
        with redis.Redis.from_url(valkey_url) as bare:
            for _ in range(2):
                bare.publish("alerts", '{"pipeline":1,"data":[5,{"sensor":"a"},{"sensor":6}]}')
        assert [(await first(stream)).event.sensor for _ in range(2)] == ["a", "a"]
        assert stream.dropped == 4
    assert caplog.text.count("channel 'alerts': invalid events are left out: event: Input should be an object") == 1


async def test_what_a_publisher_repeats_because_it_had_no_answer_is_heard_once(url: str) -> None:
    app, heard = Pipeline("listener", url), []

    @app.subscriber(alerts, group="g")
    async def listen(alert: Alert) -> None:
        heard.append(alert.sensor)

    with redis.Redis.from_url(url) as bare, bare.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe("alerts")
        pubsub.get_message(timeout=1)
        async with app, serving(app), app.watch(alerts) as stream:
            written = []
            for sensors in ("ab", "c"):
                await app.publish(alerts, [Alert(sensor=sensor) for sensor in sensors])
                written.append(await asyncio.to_thread(_next, pubsub))
            for frame in written:  # in the order in which a connection was lost with them
                await asyncio.to_thread(bare.publish, "alerts", frame)
            await app.publish(alerts, [Alert(sensor="d")])
            await until(lambda: len(heard) >= 4)
            watched = [(await first(stream)).event.sensor for _ in range(4)]
            ledger = await app.stats()
    assert heard == watched == ["a", "b", "c", "d"]
    assert (stream.dropped, ledger.channels["alerts"].groups["g"].dropped) == (0, 0)


async def test_nonsense_on_a_live_channel_becomes_a_dead_letter(url: str) -> None:
    app, heard = Pipeline("listener", url), []

    @app.subscriber(alerts, group="g")
    async def listen(alert: Alert) -> None:
        heard.append(alert)

    with redis.Redis.from_url(url) as bare:
        async with app, serving(app):
            for nonsense in ('{"sensor": 5}', "not json", "", '{"pipeline":9,"data":[]}'):
                bare.publish("alerts", nonsense)
            bare.publish("alerts", '{"sensor": "good"}')
            await until(lambda: heard == [Alert(sensor="good")])
            letters = await app.dead_letters("alerts")
            with pytest.raises(ConfigurationError, match="publish their events again, or drop them"):
                await app.settle_dead(letters, replay=True)
            assert await app.settle_dead(letters, replay=False) == 4
            ledger = (await app.stats()).channels["alerts"].groups["g"]
    assert len(letters) == 4
    assert "version" in letters[3].event.reason
    assert (ledger.handled, ledger.dead) == (1, 4)


async def test_a_user_of_the_url_logs_in_or_is_refused_by_the_client_that_cannot() -> None:
    """asyncio-redis would send the password alone, for another user, and without TLS whatever the URL says."""
    with Server() as server:
        with redis.Redis.from_url(server.url) as admin:
            admin.acl_setuser("ml", enabled=True, passwords=["+s3cr%t"], keys=["*"], channels=["*"], commands=["+@all"])
            admin.acl_setuser("default", enabled=False)
        url = server.url.replace("redis://", "redis://ml:s3cr%25t@")
        async with Pipeline("app", url) as app, app.watch(alerts) as stream:
            await app.publish(alerts, Alert(sensor="a"))
            assert (await first(stream)).event == Alert(sensor="a")
        async with Pipeline("app", url, live_client="asyncio-redis") as app:
            with pytest.raises(ConfigurationError, match="live_client='redis'") as raised:
                await app.watch(alerts).__aenter__()
        assert "s3cr" not in str(raised.value)
        with pytest.raises(ServerUnavailable) as wrong:
            async with Pipeline("app", url.replace("s3cr", "wr0ng")):
                pass
        assert "WRONGPASS" in str(wrong.value)
        assert "wr0ng" not in str(wrong.value)


async def test_what_a_bare_payload_cannot_carry_is_refused(anywhere: str) -> None:
    options: list[dict[str, Any]] = [{"delay": 1.0}, {"key": "k"}, {"headers": {"a": "b"}}]
    async with Pipeline("app", anywhere) as app:
        for option in options:
            with pytest.raises(ConfigurationError, match="travels alone"):
                await app.publish(music, "raga", **option)
    with pytest.raises(ConfigurationError, match="reply"):
        Channel("questions", str, durable=False, reply=str)


async def test_every_subscriber_process_receives_everything(url: str, live_client: LiveClient) -> None:
    heard: dict[int, list[str]] = {0: [], 1: []}
    apps = [Pipeline(f"app{n}", url, live_client=live_client) for n in range(2)]
    for n, app in enumerate(apps):

        @app.subscriber(alerts, group="same", batch=Batch(64))
        def listen(batch: list[Alert], n: int = n) -> None:
            heard[n].extend(alert.sensor for alert in batch)

    async with apps[0], serving(*apps):
        await apps[0].publish(alerts, [Alert(sensor=str(n)) for n in range(500)])
        await until(lambda: len(heard[0]) == len(heard[1]) == 500)
    assert heard[0] == heard[1] == [str(n) for n in range(500)]


async def test_a_retry_waits_in_the_process_and_a_rejected_event_is_kept(url: str) -> None:
    app, attempts = Pipeline("app", url), []

    @app.subscriber(alerts, group="g", retry=RetryPolicy(attempts=3, base=0.01))
    async def flaky(alert: Alert) -> None:
        attempts.append(alert.sensor)
        if alert.sensor == "no":
            raise Reject("no")
        if attempts.count("twice") == 1:
            raise OSError

    async with app, serving(app):
        await app.publish(alerts, [Alert(sensor="twice"), Alert(sensor="no")])
        await until(lambda: attempts.count("twice") == 2)
        async with asyncio.timeout(5):
            while len(letters := await app.dead_letters("alerts")) < 1:
                await asyncio.sleep(0.05)
    assert letters[0].event.reason == "no"


async def test_a_slow_subscriber_loses_the_oldest_and_knows_how_many(anywhere: str) -> None:
    app, go, heard = Pipeline("app", anywhere), asyncio.Event(), []

    @app.subscriber(Channel("fast", Alert, durable=False, frame=10), group="g")
    async def slow(alert: Alert) -> None:
        heard.append(int(alert.sensor))
        await go.wait()

    async with app:
        app.backend.live.ring_frames = 20  # type: ignore[attr-defined]  # of every backend's, beside the contract
        async with serving(app):
            fast = Channel("fast", Alert, durable=False, frame=10)
            for n in range(100):
                await app.publish(fast, [Alert(sensor=str(10 * n + i)) for i in range(10)])
                await until(lambda: heard)  # a source is counted from the first that is heard of it
            await asyncio.sleep(0.2)
            go.set()
            await until(lambda: heard and heard[-1] == 999)
            dropped = app._routers[0][1].dropped
    assert len(heard) + dropped == 1000
    assert dropped >= 500
    assert heard == sorted(heard)


async def test_a_lost_connection_is_made_anew_and_the_gap_is_counted(url: str, live_client: LiveClient) -> None:
    app, other, heard = Pipeline("app", url, live_client=live_client), Pipeline("other", url), []

    @app.subscriber(alerts, group="g")
    async def listen(alert: Alert) -> None:
        heard.append(alert.sensor)

    async with app, other, serving(app):
        await other.publish(alerts, Alert(sensor="before"))
        await until(lambda: heard == ["before"])
        with redis.Redis.from_url(url) as bare:
            bare.client_kill_filter(_type="pubsub")
            await other.publish(alerts, [Alert(sensor="missed")] * 3)
            await until(lambda: any(client["sub"] == "1" for client in bare.client_list()))
        await other.publish(alerts, Alert(sensor="after"))
        await until(lambda: heard == ["before", "after"])


async def test_a_watcher_whose_scope_is_cancelled_leaves_no_subscription(url: str, live_client: LiveClient) -> None:
    parted: Channel[Any] = Channel("parted", Alert, partitions=3)
    with redis.Redis.from_url(url) as bare:
        async with Pipeline("viewer", url, live_client=live_client) as app:
            for channel in (music, parted):
                with anyio.CancelScope() as scope:  # it cancels at every await, as when a server's client has gone
                    async with app.watch(channel) as stream:
                        following = asyncio.create_task(anext(aiter(stream)))
                        await asyncio.sleep(0.05)
                        following.cancel()
                        await asyncio.wait([following])
                        scope.cancel()
                await until(lambda: not _watching(bare), 3)


def _watching(bare: Any) -> bool:
    return any(client["sub"] != "0" or client["name"] == "pipeline-viewer-watch" for client in bare.client_list())


async def test_a_listener_that_is_refused_for_a_while_hears_again(
    live_client: LiveClient, caplog: pytest.LogCaptureFixture
) -> None:
    with Server() as server:
        app, other, heard = Pipeline("app", server.url, live_client=live_client), Pipeline("other", server.url), []

        @app.subscriber(alerts, group="g")
        async def listen(alert: Alert) -> None:
            heard.append(alert.sensor)

        async with other, app, serving(app):
            with redis.Redis.from_url(server.url) as bare:
                bare.config_set("requirepass", "secret")
                bare.client_kill_filter(_type="pubsub")
                await until(lambda: "cannot be heard" in caplog.text or "was lost" in caplog.text)
                await asyncio.sleep(0.3)
                bare.config_set("requirepass", "")
                await until(lambda: any(client["sub"] != "0" for client in bare.client_list()))
            await other.publish(alerts, Alert(sensor="after"))
            await until(lambda: heard == ["after"])


async def test_a_live_commit_whose_answer_is_lost_counts_once_and_publishes_once(url: str) -> None:
    app, other = Pipeline("app", url), Pipeline("other", url)
    kept: Channel[Alert] = Channel("kept", Alert)
    calls = []

    @app.subscriber(alerts, group="g", publishes=kept)
    async def pass_on(alert: Alert) -> Alert:
        calls.append(alert)
        return alert

    async with other, app, serving(app):
        with unanswered_once(app.backend.durable, "commit"):
            for n in range(2):
                await other.publish(alerts, Alert(sensor=str(n)))
                await until(lambda n=n: len(calls) == n + 1)  # type: ignore[misc]
            async with asyncio.timeout(5):
                while (counts := (await other.stats()).channels["alerts"].groups["g"]).handled < 2:
                    await asyncio.sleep(0.02)
        passed_on = [message.event.sensor for message in await other.newest(kept, 10)]
    assert (counts.handled, sorted(passed_on)) == (2, ["0", "1"])


async def test_no_two_live_events_have_one_id_though_the_answer_to_a_commit_is_lost(url: str) -> None:
    app, kept, ids = Pipeline("app", url), Channel("kept", Alert), []

    @app.subscriber(kept, group="g", publishes=alerts)
    async def pass_on(alert: Alert) -> Alert:
        return alert

    async with app, serving(app), app.watch(alerts) as stream:
        heard = aiter(stream)
        with unanswered_once(app.backend.durable, "commit"):
            for n in range(3):
                await app.publish(kept, Alert(sensor=str(n)))
                async with asyncio.timeout(5):
                    ids.append((await anext(heard)).id)
                await idle(app, kept)
    assert len(set(ids)) == 3


async def test_while_memory_is_full_live_channels_go_on() -> None:
    """They take no room: a text is heard once, groups join, what they handle is counted."""
    with Server() as server, redis.Redis.from_url(server.url) as bare:
        app, heard = Pipeline("app", server.url), []

        @app.subscriber(music, group="radio")
        async def listen(text: str) -> None:
            heard.append(text)

        async with app:
            bare.config_set("maxmemory", "1mb")
            async with asyncio.timeout(5), serving(app):
                await app.publish(music, "one")
                await app.publish(music, "two")
                await until(lambda: len(heard) == 2)
                while (ledger := (await app.stats()).channels["classical_music"]).groups["radio"].handled < 2:
                    await asyncio.sleep(0.02)
            with pytest.raises(redis.OutOfMemoryError):
                bare.set("still", "full")
            bare.config_set("maxmemory", "0")
    assert heard == ["one", "two"]
    assert ledger.published == 2


async def test_what_two_groups_of_a_channel_missed_is_counted_for_each_once(url: str) -> None:
    app, heard = Pipeline("app", url), []
    app.settings = app.settings.model_copy(update={"metrics_interval": 0.1})
    for group in ("one", "two"):

        @app.subscriber(alerts, group=group)
        async def listen(alert: Alert) -> None:
            heard.append(alert)

    async with app, serving(app):
        with redis.Redis.from_url(url) as bare:
            for sequence in (1, 7):
                frame = {"pipeline": 1, "source": "s", "sequence": sequence, "time": 1.0, "data": [{"sensor": "a"}]}
                bare.publish("alerts", json.dumps(frame))
        await until(lambda: len(heard) == 4)
        async with asyncio.timeout(5):
            while not all((dropped := await _dropped(app)).values()):
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)
        assert dropped == await _dropped(app) == {"one": 5, "two": 5}


async def _dropped(app: Pipeline) -> dict[str, int]:
    return {name: group.dropped for name, group in (await app.stats()).channels["alerts"].groups.items()}


async def test_scripts_use_the_same_verbs_without_async(url: str) -> None:
    with Pipeline("script", url).blocking() as pipe:
        with pipe.watch(alerts) as stream:
            assert stream.next(timeout=0.05) is None
            pipe.publish(alerts, [Alert(sensor=str(n)) for n in range(3)])
            assert [message.event.sensor for _, message in zip(range(3), stream, strict=False)] == ["0", "1", "2"]
        assert pipe.stats().channels["alerts"].published == 3
        with pytest.raises(ValueError, match="is live: it has no past"):
            pipe.watch(alerts, since="5m")


async def test_a_blocking_pipeline_may_be_used_again_and_says_where_it_cannot(url: str) -> None:
    app, kept = Pipeline("script", url), Channel("kept", Alert)
    pipe = app.blocking()

    def use() -> str:
        with pipe:
            return pipe.publish(kept, Alert(sensor="a")).id

    assert len({await asyncio.to_thread(use) for _ in range(2)}) == 2
    with pytest.raises(ConfigurationError, match="is not open"):
        pipe.stats()
    with pipe, pytest.raises(ConfigurationError, match="is open already"), pipe:
        pass
    async with app:
        with pytest.raises(ConfigurationError, match="is open in another event loop"):
            await asyncio.to_thread(use)
        await app.publish(kept, Alert(sensor="b"))


async def test_a_watch_that_is_cancelled_as_it_connects_is_cancelled(url: str, live_client: LiveClient) -> None:
    async with Pipeline("app", url, live_client=live_client) as app:
        await app.publish(alerts, Alert(sensor="a"))
        with redis.Redis.from_url(url) as other:
            before = len(other.client_list())
            for turns in range(30):
                watching = asyncio.create_task(app.watch(alerts).__aenter__())
                for _ in range(turns):
                    await asyncio.sleep(0)
                if watching.cancel():
                    with pytest.raises(asyncio.CancelledError):
                        await asyncio.wait_for(watching, 1)
                else:
                    await watching.result().__aexit__()
            await asyncio.sleep(0.1)
            assert len(other.client_list()) == before
