"""For the tests of those who use the framework.

    async def test_alerts():
        async with testing.serving(app):                       # an app made with Pipeline("…", "memory://test")
            async with app.watch(alerts) as stream:
                await app.publish(readings, Reading(…))
                assert (await testing.first(stream)).event == Alert(…)
            await testing.settled(app, readings)               # everything handled, and the ledger balances

`memory://NAME` is a real transport: leases, retries, dead letters, replay and exactly-once commit as on Redis.
`store(app)` gives its clock to move on (`clock.advance(60)`), faults to inject (`faults.drop_reply("commit")`),
`expire_leases()` and `flush()`. The time of the event loop itself, such as a batch's `wait`, stays real.
`embedded_server()` is a real Valkey.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from typing import Any, TypeVar

from .app import Pipeline
from .channel import Channel
from .errors import ConfigurationError
from .ledger import ChannelLedger
from .server import Server
from .transports.memory import MemoryBackend
from .transports.store import Clock, Faults, Store

__all__ = ["Clock", "Faults", "Store", "embedded_server", "first", "serving", "settled", "store"]

T = TypeVar("T")


def store(app: Pipeline) -> Store:
    """The store of an open app on `memory://`. Raises ConfigurationError on any other."""
    backend = app.backend
    if not isinstance(backend, MemoryBackend):
        raise ConfigurationError(f"pipeline {app.name!r} is not on memory://")
    return backend.store


@contextlib.asynccontextmanager
async def serving(*apps: Pipeline, seconds: float = 10.0) -> AsyncIterator[None]:
    """Open and serve apps within the block; they drain at its end, and what failed in them is raised."""
    stop = asyncio.Event()
    async with contextlib.AsyncExitStack() as stack:
        for app in apps:
            await stack.enter_async_context(app)
        tasks = [asyncio.create_task(app.serve(stop)) for app in apps]
        try:
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(app.ready.wait() for app in apps))
            yield
        finally:
            stop.set()
            await asyncio.gather(*tasks)


async def settled(app: Pipeline, channel: Channel[Any] | str, seconds: float = 20.0) -> ChannelLedger:
    """Wait until every group of a channel has nothing unread and nothing pending.

    Returns its ledger. Raises AssertionError when that does not balance, TimeoutError after `seconds`.
    """
    name = channel if isinstance(channel, str) else channel.name
    async with asyncio.timeout(seconds):
        while True:
            await app.registry.keep()  # the server may have been flushed
            ledger = (await app.stats()).channels[name]
            for group_name, group in ledger.groups.items():
                balances = not ledger.durable or group.difference(ledger.published) == 0
                assert balances, f"group {group_name!r} of {name!r} does not balance: {group!r}"
            if ledger.groups and all(group.lag == group.pending == 0 for group in ledger.groups.values()):
                return ledger
            await asyncio.sleep(0.005)


async def first(stream: AsyncIterable[T], seconds: float = 5.0) -> T:
    """The next item of a stream. Raises TimeoutError after `seconds`."""
    async with asyncio.timeout(seconds):
        return await anext(aiter(stream))


@contextlib.contextmanager
def embedded_server(**options: Any) -> Iterator[Server]:
    """A real Valkey on a free port, ended with the block; `options` as pipeline.server.Server takes them."""
    with Server(**options) as server:
        yield server
