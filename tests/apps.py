"""Helpers of the tests, most of which users have too."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from pipeline import Channel, Pipeline
from pipeline.testing import serving
from pipeline.testing import settled as idle
from pipeline.transports.client import LinkLost

__all__ = ["declare", "failing_once", "idle", "serving", "unanswered_once", "until"]


async def declare(app: Pipeline, *channels: Channel[Any]) -> None:
    """As who publishes or subscribes does."""
    for channel in channels:
        await app.registry.register(channel, app.codec(channel))


async def until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until `true()`; fail after `seconds`."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)


@contextlib.contextmanager
def failing_once(streams: Any, name: str) -> Iterator[None]:
    """The connection is lost the next time that this script is to run."""
    with _lossy(streams, name, done=False):
        yield


@contextlib.contextmanager
def unanswered_once(streams: Any, name: str) -> Iterator[None]:
    """The connection is lost the next time that this script has run."""
    with _lossy(streams, name, done=True):
        yield


@contextlib.contextmanager
def _lossy(streams: Any, name: str, *, done: bool) -> Iterator[None]:
    run, lost = streams.run, []

    async def lossy(script: str, *arguments: Any, **options: Any) -> Any:
        if script != name or lost:
            return await run(script, *arguments, **options)
        lost.append(script)
        if done:
            await run(script, *arguments, **options)
        raise LinkLost("injected")

    streams.run = lossy
    yield
    streams.run = run
    assert lost
