"""Our side of the benchmarks: `python -m benchmarks.ours ROLE URL EVENTS`. Prints one JSON line when it is done."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from pipeline import Batch, Pipeline

from .sample import Reading, live, outputs, readings, sample

LIST = 4096


class Counter:
    """Counts handled events; stops the app at the last one."""

    def __init__(self, app: Pipeline, events: int) -> None:
        self.began = 0.0
        self._app = app
        self._left = events
        self._loop: asyncio.AbstractEventLoop | None = None

    def count(self, events: int = 1) -> None:
        if not self.began:
            self.began = time.time()
        self._left -= events
        if self._left == 0:
            self._app.stop()


def one_async(app: Pipeline, counter: Counter) -> None:
    @app.subscriber(readings, group="bench")
    async def handle(event: Reading) -> None:
        counter.count()


def one_plain(app: Pipeline, counter: Counter) -> None:
    @app.subscriber(readings, group="bench", run_in="loop")
    def handle(event: Reading) -> None:
        counter.count()


def batches(app: Pipeline, counter: Counter) -> None:
    @app.subscriber(readings, group="bench", batch=Batch(1024), run_in="loop")
    def handle(batch: list[Reading]) -> None:
        counter.count(len(batch))


def through(app: Pipeline, counter: Counter) -> None:
    @app.subscriber(readings, group="bench", publishes=outputs, run_in="loop")
    def handle(event: Reading) -> Reading:
        counter.count()
        return event


def on_live(app: Pipeline, counter: Counter) -> None:
    @app.subscriber(live, group="bench", batch=Batch(1024), run_in="loop")
    def handle(batch: list[Reading]) -> None:
        counter.count(len(batch))


WORKERS: dict[str, Callable[[Pipeline, Counter], None]] = {
    "one-async": one_async,
    "one-plain": one_plain,
    "batches": batches,
    "through": through,
    "live": on_live,
}


def work(role: str, url: str, events: int) -> dict[str, Any]:
    app = Pipeline("bench-worker", url)
    counter = Counter(app, events)
    WORKERS[role](app, counter)

    async def main() -> None:
        serving = asyncio.create_task(app.serve())
        await app.ready.wait()
        print("ready", flush=True)
        await serving

    asyncio.run(main())
    return {"began": counter.began, "ended": time.time(), "cpu": time.process_time()}


def produce(role: str, url: str, events: int) -> dict[str, Any]:
    """Lists of events, one after the other; on a live channel with short rests, since nobody is held back there."""
    channel = live if role == "live" else readings
    many = [sample(n) for n in range(LIST)]

    async def main() -> float:
        async with Pipeline("bench-producer", url) as app:
            began = time.time()
            for start in range(0, events, LIST):
                await app.publish(channel, many[: events - start])
                if role == "live" and start % (8 * LIST) == 0:
                    await asyncio.sleep(0.05)
            return began

    began = asyncio.run(main())
    return {"began": began, "ended": time.time(), "cpu": time.process_time()}


if __name__ == "__main__":
    side, role, url, events = sys.argv[1:5]
    print(json.dumps((work if side == "work" else produce)(role, url, int(events))), flush=True)
