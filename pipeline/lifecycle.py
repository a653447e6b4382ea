"""The order in which an app starts and stops, written once.

start:  connect → register channels → on_start hooks → join groups → report
        Until groups are joined nothing is held, and a signal ends the process by its default action: a hook that loads
        a model in a thread, or imports for seconds, could not be stopped otherwise.
stop:   0. on_stop hooks           handlers that wait for each other are let go
        1. stop reading            nothing new comes in
        2. hand back               what no handler has begun goes to other workers at once, not when its lease ends
        3. finish                  running handlers end, within the deadline, and their outcomes are committed
        4. hand back the rest      frames that were under way and did not end
        5. cancel background tasks hooks' tasks may have served the handlers until now
        6. flush what the app itself published, send the last report
        7. close connections
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from .errors import PipelineError
from .router import Router

__all__ = ["drain", "first_failure", "on_signals", "run", "settle_memory", "unless"]

logger = logging.getLogger("pipeline.lifecycle")

COLLECT = (20_000, 10, 10)
"""New containers, and collections of younger ones, after which each generation is collected."""


def run(main: Coroutine[Any, Any, None]) -> None:
    """`asyncio.run`, on uvloop where there is one: a tenth less CPU time for a worker of small frames."""
    make_loop: Any = None
    with contextlib.suppress(ImportError):  # there is none for Windows
        from uvloop import new_event_loop as make_loop
    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(main)


def settle_memory() -> None:
    """For a process that has loaded what it needs. Modules and models stay for good: exempt them from garbage
    collections, which would stall handlers by tens of milliseconds a second to look at them (with torch loaded; p99 of
    small requests: 36 → 10 ms). And few of the events under way are garbage, so look at them less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT)


async def drain(routers: list[Router], seconds: float) -> None:
    """Steps 1 to 4, for all routers side by side."""
    deadline = asyncio.get_running_loop().time() + seconds
    await asyncio.gather(*(router.stop_reading() for router in routers))
    await asyncio.gather(*(router.hand_back() for router in routers))
    await asyncio.gather(*(router.finish(deadline) for router in routers))


async def first_failure(tasks: Iterable[asyncio.Task[None]], stop: asyncio.Event) -> None:
    """Wait for `stop`. A task that ends before it, however, ends the wait with an error: a broken worker must not look
    alive."""
    stopping = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait({*tasks, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stopping in done:
            return
        for task in done:
            if not task.cancelled():
                task.result()
        raise PipelineError(f"{' and '.join(task.get_name() for task in done)} ended, and nobody had stopped it")
    finally:
        stopping.cancel()


async def unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Await `work`; False when `stop` came first, and cancelled it."""
    task, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        return task.done()
    finally:
        task.cancel()
        stopping.cancel()
        await asyncio.gather(task, stopping, return_exceptions=True)


def on_signals(stop: asyncio.Event, now: Callable[[], object]) -> Callable[[], None]:
    """SIGTERM and SIGINT drain; a second one stops now. Returns what restores the handlers."""
    loop = asyncio.get_running_loop()

    def handle(name: str) -> None:
        if stop.is_set():
            logger.warning("second %s: stopping now; what is held comes free when its lease ends", name)
            now()
        else:
            logger.info("%s: draining", name)
            stop.set()

    numbers = (signal.SIGTERM, signal.SIGINT)
    for number in numbers:
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, handle, number.name)

    def restore() -> None:
        for number in numbers:
            with contextlib.suppress(NotImplementedError, ValueError):
                loop.remove_signal_handler(number)

    return restore
