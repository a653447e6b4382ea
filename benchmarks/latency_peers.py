"""Latency through frameworks (extra `bench`), each as its documentation recommends; see `latency`."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from .sample import Reading

__all__ = ["PEERS", "end", "sender", "work"]

PEERS = {
    name: text
    for name, text in {
        "faststream": "FastStream stream", "taskiq": "Taskiq stream", "dramatiq": "Dramatiq", "arq": "arq",
    }.items()
    if importlib.util.find_spec(name)
}  # fmt: skip

Send = Callable[[str, float], Awaitable[Any]]
"""An event as JSON, and the Unix seconds of its publishing."""


class Seen:
    def __init__(self, events: int) -> None:
        self.seconds: list[float] = []
        self.all = asyncio.Event()
        self._events = events
        self._loop = asyncio.get_running_loop()

    def note(self, data: str, moment: float) -> None:
        now = time.time()
        Reading.model_validate_json(data)
        self.seconds.append(now - moment)
        if len(self.seconds) == self._events:
            self._loop.call_soon_threadsafe(self.all.set)


@contextlib.asynccontextmanager
async def sender(side: str, url: str) -> AsyncIterator[Send]:
    """What publishes one event through a framework."""
    if side == "faststream":
        from faststream.redis import RedisBroker

        async with RedisBroker(url) as broker:
            yield lambda data, moment: broker.publish({"data": data, "moment": moment}, stream="timed")
    elif side == "taskiq":
        broker, handle = _taskiq(url, None)
        await broker.startup()
        yield handle.kiq
        await broker.shutdown()
    elif side == "dramatiq":
        actor = _dramatiq(url, None)[1]

        async def send(data: str, moment: float) -> None:
            actor.send(data, moment)

        yield send
    else:
        from arq import create_pool
        from arq.connections import RedisSettings

        pool = await create_pool(RedisSettings.from_dsn(url))
        yield lambda data, moment: pool.enqueue_job("handle", data, moment)
        await pool.aclose()


async def work(side: str, url: str, events: int) -> list[float]:
    """Handle so many events in this process. Prints `ready`. Returns the seconds that each was under way."""
    seen = Seen(events)
    task = asyncio.create_task({"faststream": _faststream, "arq": _arq}.get(side, _queue)(side, url, seen))
    await seen.all.wait()
    task.cancel()
    return seen.seconds


async def _faststream(side: str, url: str, seen: Seen) -> None:
    from faststream import FastStream
    from faststream.redis import RedisBroker, StreamSub

    broker = RedisBroker(url)
    app = FastStream(broker)

    @broker.subscriber(stream=StreamSub("timed", group="g", consumer="c", max_records=64))
    async def handle(data: str, moment: float) -> None:
        seen.note(data, moment)

    @app.after_startup
    async def ready() -> None:
        print("ready", flush=True)

    await app.run()


async def _arq(side: str, url: str, seen: Seen) -> None:
    from arq.connections import RedisSettings
    from arq.worker import Worker, func

    async def handle(_: Any, data: str, moment: float) -> None:
        seen.note(data, moment)

    worker = Worker(
        [func(handle, name="handle", keep_result=0)], redis_settings=RedisSettings.from_dsn(url), max_jobs=64,
        poll_delay=0.01, handle_signals=False,
    )  # fmt: skip
    working = asyncio.create_task(worker.main())
    await asyncio.sleep(0.5)
    print("ready", flush=True)
    await working


async def _queue(side: str, url: str, seen: Seen) -> None:
    if side == "dramatiq":
        import dramatiq

        dramatiq.Worker(_dramatiq(url, seen)[0], worker_threads=8).start()
        print("ready", flush=True)
        await asyncio.Event().wait()
    from taskiq.api import run_receiver_task

    broker, _ = _taskiq(url, seen)
    broker.is_worker_process = True
    receiving = asyncio.create_task(run_receiver_task(broker, run_startup=True))
    await asyncio.sleep(1.0)
    print("ready", flush=True)
    await receiving


def _taskiq(url: str, seen: Seen | None) -> tuple[Any, Any]:
    from taskiq_redis import RedisStreamBroker

    broker = RedisStreamBroker(url)

    @broker.task(task_name="handle")  # type: ignore[untyped-decorator]
    async def handle(data: str, moment: float) -> None:
        assert seen is not None
        seen.note(data, moment)

    return broker, handle


def _dramatiq(url: str, seen: Seen | None) -> tuple[Any, Any]:
    import dramatiq
    from dramatiq.brokers.redis import RedisBroker

    broker = RedisBroker(url=url, middleware=[])
    dramatiq.set_broker(broker)

    def handle(data: str, moment: float) -> None:
        assert seen is not None
        seen.note(data, moment)

    return broker, dramatiq.actor(handle, broker=broker)


def end() -> None:
    """Not every worker can be told to stop."""
    os._exit(0)
