"""Leases: what is held is renewed while its worker lives, whatever it does, and only what is abandoned is claimed."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
import redis

from pipeline import Batch, Channel, Pipeline
from pipeline.transports import SUSPICION, Commit, Group, Outgoing, Retried, Segment, client
from pipeline.transports.streams import Streams

from .apps import failing_once, idle, serving, until
from .workers import Number, Worker, hogs

jobs = Channel("jobs", Number, frame=1)


@pytest.fixture
async def streams(url: str) -> AsyncIterator[Streams]:
    streams = Streams(url, "test")
    yield streams
    await streams.close()


async def test_a_long_handler_that_holds_the_gil_is_delivered_once(url: str) -> None:
    """Four leases long; C code keeps the interpreter for more than a quarter of a lease at a time."""
    await _delivered_once(url, "hogs", stretch=0.4)


@pytest.mark.soak
async def test_a_minute_long_handler_that_holds_the_gil_is_delivered_once(url: str) -> None:
    await _delivered_once(url, "hogs-long", stretch=2.0)


async def _delivered_once(url: str, name: str, stretch: float) -> None:
    app = Pipeline("app", url)
    async with app:
        with Worker(name, url) as first:
            await app.publish(hogs, Number(n=1), headers={"stretch": str(stretch)})
            first.wait_for("begins 1")
            with Worker(name, url):
                await asyncio.to_thread(first.wait_for, "ends 1")
                ledger = (await idle(app, "hogs", 30)).groups["g"]
    assert (ledger.handled, ledger.duplicates_suppressed, ledger.retried) == (1, 0, 0)


def holds_the_gil_throughout(event: Number) -> None:
    """For four leases, in a process of its own."""
    deadline = time.monotonic() + 4.0
    while time.monotonic() < deadline:
        sum(range(60_000_000))


async def test_in_a_process_a_handler_may_hold_the_gil_throughout(valkey_url: str) -> None:
    app = Pipeline("app", valkey_url)
    other = Pipeline("other", valkey_url)
    taken = []
    app.subscriber(jobs, group="g", lease=1.0, run_in="process")(holds_the_gil_throughout)

    @other.subscriber(jobs, group="g", lease=1.0)
    async def take(event: Number) -> None:
        taken.append(event)

    async with app, serving(app):
        await app.publish(jobs, Number(n=1))
        await until(lambda: app._routers[0][0].flow.events == 1)
        async with serving(other):
            ledger = (await idle(app, "jobs", 30)).groups["g"]
    assert (ledger.handled, ledger.duplicates_suppressed, taken) == (1, 0, [])


async def test_what_waits_in_a_buffer_or_a_batch_is_renewed_too(url: str) -> None:
    app, other, calls, taken = Pipeline("app", url), Pipeline("other", url), [], []

    @app.subscriber(jobs, group="g", lease=0.5, batch=Batch(10, wait=2.0))
    async def gather(batch: list[Number]) -> None:
        calls.append(len(batch))

    @other.subscriber(jobs, group="g", lease=0.5)
    async def take(event: Number) -> None:
        taken.append(event)

    async with app, serving(app):
        await app.publish(jobs, [Number(n=n) for n in range(5)])
        await until(lambda: app._routers[0][0].flow.events == 5)
        async with serving(other):
            ledger = (await idle(app, "jobs")).groups["g"]
    assert (calls, taken, ledger.handled) == ([5], [], 5)


async def test_a_hundred_stale_entries_behind_thousands_of_live_ones_are_found(streams: Streams, url: str) -> None:
    lease = 1.0
    holder = await streams.join(jobs, 0, Group("g", "holder", lease))
    streams.renewer.discard(holder)
    app = Pipeline("app", url)
    async with app:
        await app.publish(jobs, [Number(n=n) for n in range(3000)])
    held: list[str] = []
    while len(held) < 3000:
        held += [entry.id for entry in await holder.read(500, 1.0)]
    stale, live = set(held[-100:]), held[:-100]
    finder = await streams.join(jobs, 0, Group("g", "finder", lease))
    began = time.monotonic()
    found: set[str] = set()
    keys = holder.keys
    while found != stale:
        names = [keys.stream, keys.group("g", "due"), ""]
        await streams.run("renew", names, "g", "holder", int(lease * 1000), len(live), *live)
        found |= {entry.id for entry in await finder.read(64, 0.1)}
        assert found <= stale, "a live entry was claimed"
        assert time.monotonic() - began < lease + 3 * lease / 2, "three sweeps are enough"
    for reader in (holder, finder):
        await reader.close()


async def test_an_entry_whose_settlement_is_on_its_way_was_not_taken_away(streams: Streams, url: str) -> None:
    """Redis acknowledges, the lease is renewed, and only then does the worker read that it was acknowledged."""

    class Held(dict[str, float]):
        """What lies in it under `late` is let go of once the renewal has asked for it."""

        late = ""

        def __contains__(self, id_: object) -> bool:
            here = super().__contains__(id_)
            if id_ == self.late:
                self.pop(self.late, None)
            return here

    reader = await streams.join(jobs, 0, Group("g", "one", lease=0.3))
    app = Pipeline("app", url)
    async with app:
        await app.publish(jobs, [Number(n=n) for n in range(2)])
    entries = [entry.id for _ in range(2) for entry in await reader.read(1, 1.0)]
    held = Held(reader.held)
    held.late, other = entries
    reader.held = held
    bare = redis.Redis.from_url(url)
    bare.xack(reader.keys.stream, "g", held.late)
    bare.xclaim(reader.keys.stream, "g", "two", 0, [other])
    await until(lambda: bool(reader.taken_away), 3.0)
    assert (reader.lost(), list(held)) == ([other], [other])
    await reader.close()


async def test_what_was_taken_is_handed_out_though_the_same_look_fails(streams: Streams, url: str) -> None:
    """Nobody else may have it while it is renewed here; and were it a suspect, nothing would be read beside it."""
    reader = await streams.join(jobs, 0, Group("g", "one", lease=1.0))
    async with Pipeline("app", url) as app:
        await app.publish(jobs, Number(n=1))
    (entry,) = await reader.read(1, 1.0)
    apart = Commit([Segment(entry.id, 1, 0, 0)], retries=[Retried(0.0, entry.body, deliveries=SUSPICION)])
    assert await reader.commit(apart) == []
    reader.settled(entry.id)
    reader._due_at = reader._claim_at = 0.0  # one look does both
    with failing_once(streams, "claim"):
        (suspect,) = await reader.read(1, 1.0)
    assert suspect.apart
    await reader.close()


async def test_a_stranger_in_the_stream_costs_nothing_though_refusing_it_fails(streams: Streams, url: str) -> None:
    reader = await streams.join(jobs, 0, Group("g", "one", lease=30.0))
    async with Pipeline("app", url) as app:
        await app.publish(jobs, Number(n=1))
        redis.Redis.from_url(url).xadd(reader.keys.stream, {"a": "stranger"})
        await asyncio.sleep(0.002)
        await app.publish(jobs, Number(n=2))
    with failing_once(streams, "refuse"):
        assert len(await reader.read(9, 1.0)) == 2
    await reader.close()


async def test_one_group_whose_stream_is_gone_ends_no_leases_of_others(streams: Streams, url: str) -> None:
    ruined = await streams.join(Channel("ruined", bytes), 0, Group("g", "one", lease=5.0))
    reader = await streams.join(jobs, 0, Group("g", "one", lease=0.5))
    await streams.publish(ruined.channel, 0, [Outgoing(b"1", 1, "s", 1)])
    await streams.publish(jobs, 0, [Outgoing(b"1", 1, "s", 1)])
    assert len(await ruined.read(1, 1.0) + await reader.read(1, 1.0)) == 2
    with redis.Redis.from_url(url) as bare:
        bare.delete(ruined.keys.stream)
        await asyncio.sleep(1.2)
        (pending,) = bare.xpending_range(reader.keys.stream, "g", "-", "+", 1)
    assert pending["time_since_delivered"] < 500
    await ruined.close()
    await reader.close()


async def test_a_group_is_served_by_who_has_no_hand_free_to_look(url: str) -> None:
    """One reader is busy for longer than a group lasts that nobody serves; the other has nothing, and does not look."""
    streams = Streams(url, "test", group_expires=0.6)
    busy, idle = [await streams.join(Channel("long", bytes, partitions=2), n, Group("g", "one", 0.3)) for n in (0, 1)]
    await streams.publish(busy.channel, 0, [Outgoing(b"1", 1, "s", 1)])
    await streams.publish(busy.channel, 1, [Outgoing(b"1", 1, "s", 1)])
    assert len(await busy.read(1, 1.0)) == 1
    await asyncio.sleep(1.0)
    for reader in (busy, idle):
        await streams._trim(reader.keys, 60.0)
    with redis.Redis.from_url(url) as bare:
        assert [len(bare.xinfo_groups(reader.keys.stream)) for reader in (busy, idle)] == [1, 1]
    for reader in (busy, idle):
        await reader.close()
    await streams.close()


async def test_a_suspect_that_waits_for_an_empty_hand_is_asked_after_calmly(streams: Streams) -> None:
    reader = await streams.join(jobs, 0, Group("g", "one", lease=5.0))
    await streams.publish(jobs, 0, [Outgoing(b"%d" % n, 1, "s", n) for n in (1, 2)])
    one, two = await reader.read(2, 1.0)
    apart = Commit([Segment(two.id, 1, 0, 0)], retries=[Retried(0.0, b"2", deliveries=SUSPICION)])
    assert await reader.commit(apart) == []
    reader.settled(two.id)
    run, calls = streams.run, []

    async def counted(script: str, *arguments: Any, **options: Any) -> Any:
        calls.append(script)
        return await run(script, *arguments, **options)

    streams.run = counted  # type: ignore[method-assign]
    assert await reader.read(1, 0.5) == []
    assert len(calls) < 20
    reader.settled(one.id)
    assert [entry.body for entry in await reader.read(1, 0.5)] == [b"2"]
    await reader.close()


async def test_a_connection_that_falls_silent_is_given_up_and_nothing_is_lost(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half open: the network swallows everything and nobody is told."""
    monkeypatch.setattr(client, "SILENCE", 0.6)
    proxy = await Proxy.start(valkey_url)
    app, publisher, handled = Pipeline("app", proxy.url), Pipeline("publisher", proxy.url), set()

    @app.subscriber(jobs, group="g", lease=2.0)
    async def work(event: Number) -> None:
        handled.add(event.n)

    async with publisher, serving(app):
        for n in range(60):
            if n in (20, 40):
                proxy.swallow()
            await publisher.publish(jobs, Number(n=n))
        await until(lambda: len(handled) == 60)
        ledger = await idle(publisher, "jobs", 20)
    await proxy.stop()
    assert ledger.published == ledger.groups["g"].handled == 60


async def test_threads_may_take_work_while_a_lost_lease_is_sorted_out() -> None:
    """A deque that changes while it is looked through raises, which ended the worker."""
    app = Pipeline("app", "memory://threads")

    @app.subscriber(jobs, group="g")
    def work(event: Number) -> None:
        """Nothing."""

    async with serving(app):
        router: Any = app._routers[0][0]
        reader, units, stop = router._readers[0], router._lanes[0].units, threading.Event()
        lost, other = (SimpleNamespace(open=10**9, frame=SimpleNamespace(nbytes=0)) for _ in range(2))
        router._held[id(reader), "lost"] = lost

        def take() -> None:
            while not stop.is_set():
                with contextlib.suppress(IndexError):
                    units.popleft()

        taker, interval = threading.Thread(target=take), sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        taker.start()
        try:
            for _ in range(300):
                units.extend([(lost, 0), (other, 0)] * 50)
                router._lose(reader, "lost")
        finally:
            sys.setswitchinterval(interval)
            stop.set()
            taker.join()
            router._held.clear()
            units.clear()


class Proxy:
    """Forwards to a Redis, until it swallows: then what is open stays open, and silent; new connections work."""

    def __init__(self, port: int, database: str) -> None:
        self._port = port
        self._database = database
        self._silent: list[asyncio.Event] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: Any = None

    @classmethod
    async def start(cls, url: str) -> Proxy:
        where = redis.connection.parse_url(url)
        self = cls(where["port"], str(where["db"]))
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/{self._database}"

    def swallow(self) -> None:
        for silent in self._silent:
            silent.set()
        self._silent.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self._port)
        silent = asyncio.Event()
        self._silent.append(silent)
        for one, other in ((reader, there_writer), (there_reader, writer)):
            task = asyncio.create_task(self._pump(one, other, silent))
            self._tasks.add(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, silent: asyncio.Event) -> None:
        try:
            while data := await reader.read(65536):
                if not silent.is_set():
                    writer.write(data)
                    await writer.drain()
        except ConnectionError:
            """The other side is gone."""
        finally:
            writer.close()

    async def stop(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
