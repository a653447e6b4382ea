"""Worker processes for the tests that kill them: `python -m tests.workers NAME URL`."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np

from pipeline import Channel, Event, Message, Pipeline, Retry, RetryPolicy, Tensor

from .processes import line_with


class Number(Event):
    n: int


class Square(Event):
    n: int
    squared: int


class Picture(Event):
    n: int
    pixels: Tensor


images = Channel("images", Picture, capacity=20)
backlog = Channel("backlog", Number)
full = Channel("full", Number, capacity=10_000)
jobs = Channel("jobs", Number, frame=1)
deadly = Channel("deadly", Number)
inputs = Channel("in", Number)
outputs = Channel("out", Square)
ordered = Channel("ordered", Number, partitions=6, frame=4)
written = Channel("written", Number)
hogs = Channel("hogs", Number, frame=1)


class Worker:
    """One of the apps below in a process of its own."""

    def __init__(self, name: str, url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.workers", name, url], stdout=subprocess.PIPE, text=True
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_for(self, line: str) -> None:
        line_with(line, self._process)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def wait(self, seconds: float) -> int | None:
        """Its exit status, or None when it lives on."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGCONT)
        self.kill()
        if self._process.stdout is not None:
            self._process.stdout.close()


def ended_or(worker: Worker, done: asyncio.Task[Any]) -> int | None:
    """The worker's exit status, or None when it lived until the task was done."""
    code = None
    while code is None and not done.done():
        code = worker.wait(0.1)
    return code


def holds(app: Pipeline) -> None:
    @app.subscriber(jobs, group="g", lease=1.0)
    async def hold(event: Number) -> None:
        print("holding", event.n, flush=True)
        await asyncio.sleep(3600)


def finishes(app: Pipeline) -> None:
    @app.subscriber(jobs, group="g", lease=1.0)
    async def finish(event: Number) -> None:
        print("holding", event.n, flush=True)
        await asyncio.sleep(0.3)
        print("finished", event.n, flush=True)


def kills_itself(app: Pipeline) -> None:
    @app.subscriber(deadly, group="g", lease=0.5)
    async def die(event: Number) -> None:
        if event.n == 13:
            os.kill(os.getpid(), signal.SIGKILL)


def square(app: Pipeline) -> None:
    policy = RetryPolicy(attempts=50, base=0.02, cap=0.2)

    @app.subscriber(inputs, group="square", publishes=outputs, lease=1.0, concurrency=8, retry=policy)
    async def compute(message: Message[Number]) -> Square:
        n = message.event.n
        await asyncio.sleep(random.expovariate(500))  # 2 ms: a kill finds frames half done
        if n % 997 == 0 and message.attempt == 1:
            raise Retry(delay=0.05)
        return Square(n=n, squared=n * n)


def in_order(app: Pipeline) -> None:
    @app.subscriber(ordered, group="g", publishes=written, lease=1.0, ordered=True, concurrency=2)
    async def write(event: Number) -> Number:
        await asyncio.sleep(0.001)
        return event


def in_order_until_13(concurrency: int) -> Callable[[Pipeline], None]:
    """It takes so many events ahead, at least."""

    def declare(app: Pipeline) -> None:
        @app.subscriber(ordered, group="g", publishes=written, lease=0.4, ordered=True, concurrency=concurrency)
        async def write(event: Number) -> Number:
            if event.n == 13:
                await asyncio.sleep(0.1)  # what it follows is committed, and what follows it read
                os.kill(os.getpid(), signal.SIGKILL)
            return event

    return declare


def holds_the_gil(lease: float, seconds: float) -> Callable[[Pipeline], None]:
    def declare(app: Pipeline) -> None:
        @app.subscriber(hogs, group="g", lease=lease, run_in="thread")
        def hog(message: Message[Number]) -> None:
            print("begins", message.event.n, flush=True)
            began, size = time.monotonic(), 1_000_000
            while time.monotonic() - began < seconds:
                started = time.monotonic()
                sum(range(size))  # one C call: no other thread runs meanwhile
                size = int(size * min(2.0, float(message.headers["stretch"]) / max(1e-3, time.monotonic() - started)))
            print("ends", message.event.n, flush=True)

    return declare


def checks_images(app: Pipeline) -> None:
    @app.subscriber(images, group="g", lease=1.0, concurrency=4)
    async def check(picture: Picture) -> None:
        await asyncio.sleep(0.01)
        if not (np.asarray(picture.pixels) == picture.n % 251).all():
            raise AssertionError(f"torn: {picture.n}")


def publishes_images(app: Pipeline) -> None:
    async def publish() -> None:
        for n in range(100_000):
            await app.publish(images, Picture(n=n, pixels=np.full(300_000, n % 251, np.uint8)))

    @app.on_start
    async def begin() -> None:
        app.spawn(publish())


def dawdles(app: Pipeline) -> None:
    @app.subscriber(backlog, group="g", concurrency=64)
    async def dawdle(event: Number) -> None:
        await asyncio.sleep(1.0)


def publishes_without_end(app: Pipeline) -> None:
    """As fast as it can, by a task an event: what waits is bounded by the program's own 1,000 tasks."""

    async def publish(start: int) -> None:
        for n in range(start, 10**9):
            await app.publish(full, Number(n=n))

    @app.on_start
    async def begin() -> None:
        for task in range(1000):
            app.spawn(publish(task))


APPS = {
    "slow": dawdles,
    "unbounded_publisher": publishes_without_end,
    "images": checks_images,
    "images_publisher": publishes_images,
    "holds": holds,
    "finishes": finishes,
    "deadly": kills_itself,
    "square": square,
    "ordered": in_order,
    "ordered-deadly-1": in_order_until_13(1),
    "ordered-deadly-8": in_order_until_13(8),
    "hogs": holds_the_gil(1.5, 6.0),
    "hogs-long": holds_the_gil(6.0, 60.0),
}

if __name__ == "__main__":
    app = Pipeline(sys.argv[1], sys.argv[2])
    APPS[sys.argv[1]](app)
    app.run()
