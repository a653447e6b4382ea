"""The rate at which a publisher goes, which a `catalog.SetRate` event may change while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from pipeline import Pipeline, PipelineError, catalog
from pipeline.blocking import BlockingPipeline
from pipeline.catalog import PublisherRate, SetRate

__all__ = ["Pace"]

logger = logging.getLogger("publishers")

ANNOUNCE_EVERY = 30.0
LOOK = 0.05
"""Seconds between looks at the rate, for who waits in a thread of its own."""


class Pace:
    """`rate` as it is now: events (or rounds) a second; 0: held; None: as fast as it goes."""

    def __init__(self, publisher: str, rate: float | None) -> None:
        self.publisher = publisher
        self.rate = rate
        self.changed = asyncio.Event()
        """Set with each new rate; whoever waits for it clears it."""
        self._initial = rate

    async def follow(self, app: Pipeline) -> None:
        """For ever: announce the rate, and take what is set from now on. Outages are waited through."""
        while True:
            try:
                async with app.watch(catalog.rate_settings) as stream, asyncio.TaskGroup() as group:
                    group.create_task(self._announce_again(app))
                    async for message in stream:
                        await self._set(app, message.event)
            except* (PipelineError, OSError) as errors:
                logger.debug("rates are not followed: %s", errors.exceptions[0])
            await asyncio.sleep(0.5)

    def follow_in_thread(self, app: Pipeline, pipe: BlockingPipeline) -> Pace:
        """`follow` on the loop of an app that is used without async. Returns itself."""

        async def spawn() -> None:
            app.spawn(self.follow(app), name="rate")

        pipe.call(spawn())
        return self

    async def _announce_again(self, app: Pipeline) -> None:
        while True:
            await self._announce(app)
            await asyncio.sleep(ANNOUNCE_EVERY)

    async def _announce(self, app: Pipeline) -> None:
        event = PublisherRate(publisher=self.publisher, worker=app.consumer, rate=self.rate, initial=self._initial)
        await app.publish(catalog.publisher_rates, event)

    async def _set(self, app: Pipeline, event: SetRate) -> None:
        if event.publisher != self.publisher:
            return
        logger.info("%s: rate %s → %s", self.publisher, _text(self.rate), _text(event.rate))
        self.rate = event.rate
        self.changed.set()
        await self._announce(app)

    async def turn(self, began: float) -> None:
        """Wait until what begins after `began` (time.monotonic()) is due; while the rate is 0, for another."""
        while (left := self._left(began)) > 0:
            self.changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self.changed.wait()

    def turn_in_thread(self, began: float) -> None:
        """`turn`, for a loop without async."""
        while (left := self._left(began)) > 0:
            time.sleep(min(LOOK, left))

    def _left(self, began: float) -> float:
        rate = self.rate
        if rate is None:
            return 0.0
        return 3600.0 if rate == 0 else began + 1 / rate - time.monotonic()


def _text(rate: float | None) -> str:
    return "as fast as it goes" if rate is None else "held" if rate == 0 else f"{rate:g}/s"
