"""Helpers of the tests: an app served beside the test, and waiting for what must come true."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from pipeline import Pipeline
from pipeline.ledger import ChannelLedger


@contextlib.asynccontextmanager
async def serving(*apps: Pipeline) -> AsyncIterator[None]:
    """Serve `apps`; on exit they drain, and what failed in them fails the test."""
    stop = asyncio.Event()
    tasks = [asyncio.create_task(app.serve(stop)) for app in apps]
    try:
        async with asyncio.timeout(10):
            await asyncio.gather(*(app.ready.wait() for app in apps))
        yield
    finally:
        stop.set()
        await asyncio.gather(*tasks)


async def until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until `true()`; fail after `seconds`."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)


async def idle(app: Pipeline, channel: str, seconds: float = 20.0) -> ChannelLedger:
    """Wait until every group of a channel has nothing unread and nothing pending; its ledger, which must balance."""
    async with asyncio.timeout(seconds):
        while True:
            await app.registry.keep()
            ledger = (await app.stats()).channels[channel]
            for name, group in ledger.groups.items():
                assert group.difference(ledger.published) == 0, f"group {name} does not balance: {group!r}"
            if ledger.groups and all(group.lag == 0 and group.pending == 0 for group in ledger.groups.values()):
                return ledger
            await asyncio.sleep(0.02)
