"""What the publishers' command lines share: running until a signal, waiting for Redis, keeping a pace."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import math
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from pipeline import Pipeline, ServerUnavailable
from pipeline.blocking import BlockingPipeline
from pipeline.errors import ConfigurationError, PublishUncertain
from pipeline.settings import settings

from .pace import Pace

__all__ = ["fail", "insist", "opened", "opened_blocking", "paced", "positive", "run", "start_logging"]

logger = logging.getLogger("publishers")

T = TypeVar("T")

TICK = 0.02
"""Seconds: what falls due within one goes out together."""
MOST_DUE = 256
CATCH_UP = 1.0
"""Seconds a pace may lie behind and still make up for it; what a longer outage held back is not hurried after."""


def positive(text: str) -> float:
    """For argparse: a number above 0, and finite."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no finite number above 0")
    return number


def fail(error: object) -> int:
    """Say what is wrong on stderr; returns the exit status of a mistake in how a program was called."""
    print(f"error: {error}", file=sys.stderr)
    return 2


def start_logging() -> None:
    logging.basicConfig(level=settings().log_level, format="%(levelname)s %(name)s: %(message)s")


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Run `main` until it ends or SIGINT or SIGTERM comes. Returns the exit status."""

    async def until_signal() -> None:
        task = asyncio.ensure_future(main())
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    try:
        start_logging()
        asyncio.run(until_signal())
    except (ConfigurationError, OSError) as error:
        return fail(error)
    return 0


@asynccontextmanager
async def opened(app: Pipeline) -> AsyncIterator[Pipeline]:
    """`async with app`, except that it waits for a Redis that is not there yet, and says so."""
    await insist(app.__aenter__, app.name)
    try:
        yield app
    finally:
        await app.__aexit__(None, None, None)


@contextmanager
def opened_blocking(app: Pipeline) -> Iterator[BlockingPipeline]:
    """`with app.blocking()`, except that it waits for a Redis that is not there yet, and says so."""
    told = False
    while True:
        blocking = app.blocking()
        try:
            pipe = blocking.__enter__()
            break
        except ServerUnavailable as error:
            if not told:
                logger.warning("%s waits: %s", app.name, error)
            told = True
            time.sleep(0.5)
    try:
        yield pipe
    finally:
        blocking.__exit__(None, None, None)


async def insist(action: Callable[[], Awaitable[T]], what: str) -> T:
    """Repeat `action` until Redis is there for it. An event whose fate is unknown is published again."""
    told = False
    while True:
        try:
            result = await action()
        except (ServerUnavailable, PublishUncertain) as error:
            if not told:
                logger.warning("%s waits: %s", what, error)
            told = True
            await asyncio.sleep(0.5)
        else:
            if told:
                logger.warning("%s goes on", what)
            return result


async def paced(rate: float, count: int | None = None, app: Pipeline | None = None) -> AsyncIterator[int]:
    """How many events are due, again and again, until `count` in all. `rate` is in events/s; 0: as fast as it goes.

    With `app`, which publishes them, the rate is announced and can be set while it runs (catalog.SetRate), by its name.
    """
    pace = Pace(app.name if app else "", rate or None)
    if app is not None:
        app.spawn(pace.follow(app), name="rate")
    sent = 0
    while count is None or sent < count:
        pace.changed.clear()
        async for due in _at_one_rate(pace, None if count is None else count - sent):
            yield due
            sent += due


async def _at_one_rate(pace: Pace, count: int | None) -> AsyncIterator[int]:
    """As `paced`, until the rate changes."""
    loop, rate = asyncio.get_running_loop(), pace.rate
    started, sent = loop.time(), 0
    while not pace.changed.is_set() and (count is None or sent < count):
        if rate == 0:
            await pace.changed.wait()
            return
        left = MOST_DUE if count is None else min(MOST_DUE, count - sent)
        elapsed = loop.time() - started
        if rate and elapsed - sent / rate > CATCH_UP:
            started += elapsed - sent / rate
            continue
        due = left if rate is None else min(left, int(elapsed * rate) + 1 - sent)
        if rate is not None and due <= 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(TICK, sent / rate - elapsed)):
                    await pace.changed.wait()
            continue
        yield due
        sent += due
