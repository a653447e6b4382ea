"""What happens when Redis, the network or a worker fails: nothing acknowledged is lost, and everybody goes on."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

from pipeline import Channel, Event, Message, Pipeline, Reject, RetryPolicy, ServerUnavailable, Tensor
from pipeline.errors import PublishUncertain
from pipeline.server import Server
from pipeline.transports import CHANCES, SUSPICION, Commit, Group, Outgoing, Retried, Segment, client, streams
from pipeline.transports.redis import RedisBackend

from .apps import idle, serving, until
from .workers import Worker, ended_or


class Number(Event):
    n: int


class Picture(Event):
    n: int
    pixels: Tensor


numbers = Channel("numbers", Number)


@pytest.fixture(params=["valkey", "redis7"])
def own(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of the test's own, to be killed; every write is on disk before it is acknowledged."""
    binary: Path | None = request.getfixturevalue("redis7_binary") if request.param == "redis7" else None
    with Server(binary=binary, appendonly=True, appendfsync="always") as server:
        yield server


async def test_without_a_redis_a_script_is_told_what_to_do() -> None:
    began = time.monotonic()
    with pytest.raises(ServerUnavailable, match=r"no Redis answers at redis://127\.0\.0\.1:9/0 .*`pipeline server`"):
        async with Pipeline("script", "redis://user:secret@127.0.0.1:9/0".replace("user:secret@", "")):
            pass
    assert time.monotonic() - began < 5


async def test_a_server_that_is_killed_and_restarted_loses_nothing(own: Server) -> None:
    app, handled = Pipeline("app", own.url), []

    @app.subscriber(numbers, group="g", lease=2.0)
    async def work(event: Number) -> None:
        handled.append(event.n)

    publisher = Pipeline("publisher", own.url)
    async with publisher, serving(app):
        acknowledged = 0

        async def publish() -> None:
            nonlocal acknowledged
            for n in range(3000):
                await publisher.publish(numbers, Number(n=n))
                acknowledged += 1

        publishing = asyncio.create_task(publish())
        for _ in range(3):
            await asyncio.sleep(0.3)
            own.kill()
            await asyncio.sleep(0.1)
            await asyncio.to_thread(own.start)
        async with asyncio.timeout(60):
            await publishing
        ledger = await idle(publisher, "numbers", 30)
    assert ledger.published == 3000, "a repeated publish must not count twice"
    assert ledger.groups["g"].handled == 3000
    assert set(handled) == set(range(3000))


async def _under_way(client: redis.Redis) -> None:
    """From now on what writes waits in the server, until it is let go on or its connection ends."""
    client.execute_command("CLIENT", "PAUSE", 10_000, "WRITE")
    await asyncio.sleep(0.2)


async def test_who_waits_for_room_loses_no_patience_with_it(own: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "PATIENCE", 0.5)
    monkeypatch.setattr(client, "TALKED", 0.2)
    full = Channel("full", Number, capacity=1)
    app = Pipeline("app", own.url)
    app.subscriber(full, group="g")(lambda event: None)
    async with app:
        await app.publish(full, Number(n=0))
        waiting = asyncio.create_task(app.publish(full, Number(n=1)))
        await asyncio.sleep(0.8)
        with redis.Redis.from_url(own.url) as other:
            await _under_way(other)
            for each in other.client_list():
                if each["name"] == "pipeline-app":
                    other.client_kill_filter(_id=each["id"])
            other.execute_command("CLIENT", "UNPAUSE")
        async with serving(app):
            await waiting
            assert (await idle(app, full)).published == 2


async def test_a_publish_that_was_under_way_when_redis_went_for_good_is_uncertain(
    own: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its first answer was that the channel is full, and it came again."""
    monkeypatch.setattr(streams, "PATIENCE", 0.5)
    full = Channel("full", Number, capacity=1)
    async with Pipeline("app", own.url) as app:
        await app.publish(full, Number(n=0))
        waiting = asyncio.create_task(app.publish(full, Number(n=1)))
        await asyncio.sleep(0.1)
        with redis.Redis.from_url(own.url) as other:
            await _under_way(other)
        own.kill()
        with pytest.raises(PublishUncertain, match="may or may not be there"):
            await waiting


def _connected(url: str, name: str) -> int:
    with redis.Redis.from_url(url) as other:
        return sum(each["name"].startswith(name) for each in other.client_list())


async def test_a_connection_lost_under_a_verb_is_an_error_of_the_tree_or_none(own: Server) -> None:
    """What can be asked again for long is: a watch of tensors begins with a question. The rest says what happened."""
    pictures = Channel("pictures", Picture)
    app = Pipeline("app", own.url)
    app.subscriber(numbers, group="g")(lambda event: None)
    async with app, serving(app), Pipeline("tool", own.url) as tool:
        await app.registry.register(pictures, app.codec(pictures))
        verbs = {
            tool.stats: (),
            tool.pause: ("numbers", "g"),
            tool.rewind: ("numbers", "g", 60),
            tool.watch(pictures).__aenter__: (),
        }
        with redis.Redis.from_url(own.url) as other:
            outcomes = []
            for verb, arguments in verbs.items():
                await tool.registry.records()  # it is connected
                asked = asyncio.create_task(verb(*arguments))
                await _under_way(other)
                for each in other.client_list():
                    if each["name"] == "pipeline-tool":
                        other.client_kill_filter(_id=each["id"])
                other.execute_command("CLIENT", "UNPAUSE")
                (outcome,) = await asyncio.gather(asked, return_exceptions=True)
                outcomes.append(outcome)
        *said, watch = outcomes
        assert [type(outcome) for outcome in said] == [ServerUnavailable] * 3
        await watch.__aexit__()


async def test_who_opens_an_app_beside_others_shares_it_and_the_last_one_closes_it(valkey_url: str) -> None:
    app = Pipeline("shared", valkey_url)
    app.subscriber(numbers, group="g")(lambda event: None)

    async def use(n: int) -> None:
        await asyncio.sleep(n * 0.002)  # some begin while others end
        async with app:
            await app.publish(numbers, Number(n=n))
            await asyncio.sleep(0.003)
            await app.publish(numbers, Number(n=n))

    for _ in range(3):
        await asyncio.gather(*map(use, range(20)))
        async with app, serving(app):
            assert _connected(valkey_url, "pipeline-shared") <= 3
        leaving = asyncio.create_task(use(0))
        await asyncio.sleep(0.02)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
    await asyncio.sleep(0.2)
    assert _connected(valkey_url, "pipeline-shared") == 0
    assert len(asyncio.all_tasks()) == 1


async def test_an_app_is_closed_though_its_closing_is_cancelled(valkey_url: str) -> None:
    for turns in range(1, 30):
        app = Pipeline("closed", valkey_url)
        await app.__aenter__()
        await app.publish(numbers, Number(n=turns))
        closing = asyncio.create_task(app.__aexit__())
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
    await asyncio.sleep(0.2)
    assert _connected(valkey_url, "pipeline-closed") == 0


async def test_an_opening_that_is_cancelled_leaves_nothing_open(valkey_url: str) -> None:
    for turns in range(40):
        app = Pipeline(f"opened{turns}", valkey_url)
        opening = asyncio.create_task(app.__aenter__())
        for _ in range(turns):
            await asyncio.sleep(0)
        if opening.cancel():
            with pytest.raises(asyncio.CancelledError):
                await opening
        else:
            await app.__aexit__()
    await asyncio.sleep(0.1)
    assert _connected(valkey_url, "pipeline-opened") == 0


async def test_a_connection_lost_while_the_disk_is_waited_for_is_no_error_and_no_false_promise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new connection has written nothing, so it would be told at once that all it wrote is on disk."""
    safe = Channel("safe", Number, fsync=True)
    with Server(appendonly=True) as server:
        async with Pipeline("app", server.url) as app:
            await app.publish(safe, Number(n=0))
            streams: Any = app.backend.durable
            (publication,) = (one for channel, one in streams._publications.items() if channel[0] is safe)
            sync, links = publication.sync, []

            async def lossy(link: Any) -> None:
                links.append(link)
                if len(links) == 1:
                    link.close()
                await sync(link)

            monkeypatch.setattr(publication, "sync", lossy)
            await app.publish(safe, Number(n=1))
            ledger = (await app.stats()).channels["safe"]
    assert len(set(links)) == 2
    assert ledger.published == 2
    assert ledger.duplicates > 0, "written again over the new connection, and recognised"


async def test_after_flushall_and_after_a_restart_without_data_work_goes_on(own: Server) -> None:
    app, handled = Pipeline("app", own.url), set()

    @app.subscriber(numbers, group="g")
    async def work(event: Number) -> None:
        handled.add(event.n)

    async with app, serving(app):
        await app.publish(numbers, [Number(n=n) for n in range(10)])
        await until(lambda: len(handled) == 10)
        with redis.Redis.from_url(own.url) as client:
            client.flushall()
        await app.publish(numbers, [Number(n=n) for n in range(10, 20)])
        await until(lambda: len(handled) == 20)
        ledger = await idle(app, "numbers")
        assert (ledger.published, ledger.groups["g"].handled) == (10, 10)


async def test_a_live_group_is_in_the_ledger_again_with_the_first_it_handles_after_flushall(own: Server) -> None:
    app, lively, handled = Pipeline("app", own.url), Channel("lively", Number, durable=False), []

    @app.subscriber(lively, group="g")
    async def work(event: Number) -> None:
        handled.append(event.n)
        if event.n:
            raise Reject

    async with app, serving(app):
        for n in range(2):
            with redis.Redis.from_url(own.url) as client:
                client.flushall()
            await app.publish(lively, Number(n=n))
            ledger = await idle(app, lively)
            assert (ledger.groups["g"].handled, ledger.groups["g"].dead) == (1 - n, n)
    assert handled == [0, 1]


async def test_connections_cut_by_the_server_are_made_anew(valkey_url: str) -> None:
    app, handled = Pipeline("app", valkey_url), []

    @app.subscriber(numbers, group="g")
    async def work(event: Number) -> None:
        handled.append(event.n)

    async with app, serving(app):
        with redis.Redis.from_url(valkey_url) as client:
            for n in range(200):
                await app.publish(numbers, Number(n=n))
                if n % 20 == 0:
                    client.client_kill_filter(_type="normal", skipme=True)
        ledger = await idle(app, "numbers")
    assert ledger.published == ledger.groups["g"].handled == 200
    assert set(handled) == set(range(200))


async def test_a_publisher_waits_while_memory_is_full_and_commits_pass() -> None:
    with Server(config={"maxmemory": "64mb", "maxmemory-policy": "noeviction"}) as server:
        app, handled, full = Pipeline("app", server.url), [], asyncio.Event()

        @app.subscriber(numbers, group="g")
        async def work(event: Number) -> None:
            await full.wait()
            handled.append(event.n)

        async with app, serving(app):
            with redis.Redis.from_url(server.url) as client:
                await app.publish(numbers, [Number(n=n) for n in range(100)])
                client.config_set("maxmemory", "1mb")
                full.set()
                await until(lambda: len(handled) == 100)
                ledger = await idle(app, "numbers")
                assert ledger.groups["g"].handled == 100
                waiting = asyncio.create_task(app.publish(numbers, Number(n=100)))
                await asyncio.sleep(0.3)
                assert not waiting.done()
                client.config_set("maxmemory", "64mb")
                async with asyncio.timeout(5):
                    await waiting
                await until(lambda: handled[-1] == 100)


async def test_a_backlog_in_frames_drains_while_memory_is_full(own: Server) -> None:
    """Unread events are what fills it, so reading, retrying and committing parts of frames must go on."""
    app, handled, full = Pipeline("app", own.url), set(), asyncio.Event()

    @app.subscriber(numbers, group="g", concurrency=8, lease=1.0, retry=RetryPolicy(attempts=3, base=0.01))
    async def work(message: Message[Number]) -> None:
        await full.wait()
        await asyncio.sleep(0.002)
        if message.event.n % 100 == 0 and message.attempt == 1:
            raise ValueError("try again")
        handled.add(message.event.n)

    async with app, serving(app):
        with redis.Redis.from_url(own.url) as client:
            await app.publish(numbers, [Number(n=n) for n in range(1024)])
            client.config_set("maxmemory", "1mb")
            full.set()
            ledger = await idle(app, "numbers")
            with pytest.raises(redis.OutOfMemoryError):
                client.set("still", "full")
    assert handled == set(range(1024))
    assert (ledger.groups["g"].handled, ledger.groups["g"].retried) == (1024, 11)


async def test_a_worker_that_starts_while_memory_is_full_drains_it(own: Server) -> None:
    """The one that could make room must not be kept out: with its channels' registry, tensors and partitions."""
    pictures = Channel("pictures", Picture, partitions=2)
    async with Pipeline("before", own.url) as publisher:
        await publisher.publish(pictures, [Picture(n=n, pixels=np.full(100_000, n, np.uint8)) for n in range(20)])
    app, seen = Pipeline("app", own.url), []

    @app.subscriber(pictures, group="g", ordered=True, publishes=numbers)
    async def look(picture: Picture) -> None:
        seen.append((picture.n, int(np.asarray(picture.pixels)[-1])))

    with redis.Redis.from_url(own.url) as client:
        client.config_set("maxmemory", "1mb")
        async with app, serving(app):
            ledger = await idle(app, "pictures")
            with pytest.raises(redis.OutOfMemoryError):
                client.set("still", "full")
    assert ledger.groups["g"].handled == 20
    assert sorted(seen) == [(n, n) for n in range(20)]


async def test_while_memory_is_full_workers_join_keep_their_leases_hand_back_and_conflict(own: Server) -> None:
    spread: Channel[Number] = Channel("spread", Number, partitions=2)
    backend = RedisBackend(own.url, "worker")
    await backend.open(1.0)
    transport = backend.durable
    await transport.publish(spread, 0, [Outgoing(b"two", 2, "s", 1)])
    with redis.Redis.from_url(own.url) as client:
        client.config_set("maxmemory", "1mb")
    async with asyncio.timeout(5):
        owner = await transport.join(spread, 0, Group("ordered", "a", 1.0, exclusive=True))
        (entry,) = await owner.read(1, 1.0)
        one, two = [await transport.join(spread, 0, Group("g", name, 1.0)) for name in "ab"]
        (entry,) = await one.read(1, 1.0)
        apart = Commit([Segment(entry.id, 2, 0, 1)], retried=2, retries=[Retried(0.0, b"one"), Retried(0.0, b"other")])
        assert await one.commit(apart) == []
        one.settled(entry.id)
        held = {entry.id for entry in await one.read(2, 1.0)}
        assert len(held) == 2
        assert await one.commit(apart) == [""], "settled before"
        for _ in range(3):
            assert await two.read(2, 0.4) == [], "its leases are renewed"
        await one.release(list(held))
        assert {entry.id for entry in await two.read(2, 0.5)} == held
    for reader in (owner, one, two):
        await reader.close()
    await backend.close()


async def test_a_reader_that_is_refused_says_so_once(own: Server, caplog: pytest.LogCaptureFixture) -> None:
    backend = RedisBackend(own.url, "worker")
    await backend.open(1.0)
    reader = await backend.durable.join(numbers, 0, Group("g", "a", 1.0))
    with redis.Redis.from_url(own.url) as client:
        client.config_set("min-replicas-to-write", 1)
        reading = asyncio.create_task(reader.read(1, 0.0))
        await asyncio.sleep(0.5)
        client.config_set("min-replicas-to-write", 0)
        assert await reading == []
    await reader.close()
    await backend.close()
    assert caplog.text.count("is held up: Redis refuses to be read: NOREPLICAS") == 1


async def test_work_of_a_killed_worker_is_taken_over_within_its_lease_and_a_second(url: str) -> None:
    app, taken = Pipeline("app", url), []

    @app.subscriber(Channel("jobs", Number, frame=1), group="g", lease=1.0)
    async def work(message: Message[Number]) -> None:
        taken.append((message.event.n, message.attempt))

    async with app:
        with Worker("holds", url) as worker:
            await app.publish(Channel("jobs", Number, frame=1), Number(n=1))
            worker.wait_for("holding 1")
            worker.kill()
            killed = time.monotonic()
            async with serving(app):
                await until(lambda: taken)
                assert time.monotonic() - killed < 2.0
                ledger = await idle(app, "jobs")
    assert taken == [(1, 2)], "the attempt of the dead worker counts"
    assert ledger.groups["g"].handled == 1


async def test_a_paused_worker_that_wakes_up_late_changes_nothing(url: str) -> None:
    app, taken = Pipeline("app", url), []

    @app.subscriber(Channel("jobs", Number, frame=1), group="g", lease=1.0)
    async def work(event: Number) -> None:
        taken.append(event.n)

    async with app:
        with Worker("finishes", url) as worker:
            await app.publish(Channel("jobs", Number, frame=1), Number(n=1))
            worker.wait_for("holding 1")
            worker.signal(signal.SIGSTOP)
            async with serving(app):
                await until(lambda: taken == [1])
                worker.signal(signal.SIGCONT)
                worker.wait_for("finished 1")
                async with asyncio.timeout(5):
                    while (await app.stats()).channels["jobs"].groups["g"].duplicates_suppressed == 0:
                        await asyncio.sleep(0.02)
                ledger = await idle(app, "jobs")
    assert ledger.groups["g"].handled == 1


async def test_an_event_that_kills_its_workers_ends_as_a_dead_letter(url: str) -> None:
    app = Pipeline("app", url)
    deadly = Channel("deadly", Number)
    async with app:
        await app.publish(deadly, [Number(n=n) for n in range(20)])
        deaths, ledger = 0, None
        while ledger is None and deaths < 20:
            with Worker("deadly", url) as worker:
                waiting = asyncio.create_task(idle(app, "deadly", 30))
                code = await asyncio.to_thread(ended_or, worker, waiting)
                if code is None:
                    ledger = await waiting
                else:
                    waiting.cancel()
                    await asyncio.gather(waiting, return_exceptions=True)
                    deaths += 1
        assert ledger is not None
        (letter,) = await app.dead_letters("deadly")
    assert (ledger.groups["g"].handled, ledger.groups["g"].dead) == (19, 1)
    assert "its worker died" in letter.event.reason
    assert deaths == SUSPICION + CHANCES


async def test_a_worker_outlives_a_redis_that_is_absent_at_its_start(own: Server) -> None:
    own.stop()
    app, handled = Pipeline("app", own.url), []

    @app.subscriber(numbers, group="g", retry=RetryPolicy(attempts=1))
    async def work(event: Number) -> None:
        handled.append(event.n)

    stop = asyncio.Event()
    task = asyncio.create_task(app.serve(stop))
    await asyncio.sleep(0.3)
    await asyncio.to_thread(own.start)
    async with asyncio.timeout(10):
        await app.ready.wait()
    async with app:
        await app.publish(numbers, Number(n=1))
        await until(lambda: handled == [1])
    stop.set()
    await task


async def test_a_worker_is_stopped_while_redis_is_gone(own: Server) -> None:
    app = Pipeline("app", own.url)

    @app.subscriber(numbers, group="g")
    async def work(event: Number) -> None:
        """Nothing comes."""

    stop = asyncio.Event()
    running = asyncio.create_task(app.serve(stop))
    await asyncio.wait_for(app.ready.wait(), 10)
    own.kill()
    await asyncio.sleep(0.5)
    stop.set()
    await asyncio.wait_for(running, 10)


async def test_a_server_that_pauses_hides_no_dead_letters(url: str) -> None:
    app = Pipeline("app", url)
    spread: Channel[Number] = Channel("spread", Number, frame=1)

    @app.subscriber(spread, group="g")
    async def work(event: Number) -> None:
        raise Reject("no")

    async with app, serving(app):
        for n in range(300):  # so many frames take several reads
            await app.publish(spread, Number(n=n))
            if n % 20 == 0:
                await asyncio.sleep(0.005)
        await idle(app, spread)
        looking = asyncio.create_task(app.dead_letters("spread"))
        with redis.Redis.from_url(url) as client:
            for _ in range(3):
                await asyncio.sleep(0.002)
                client.client_pause(500)
        assert sorted(letter.event.event_id for letter in await looking) == sorted(
            f"{app.source}:{n}" for n in range(1, 301)
        )
