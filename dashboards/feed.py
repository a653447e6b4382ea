"""One reader a process: watches the channels (never in a group), history first, and keeps on through outages."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pipeline import Channel, Message, Pipeline, PipelineError, catalog
from pipeline.catalog import ModelStatus
from pipeline.errors import ChannelConflict
from pipeline.ledger import ledger_channel
from pipeline.message import utc
from pipeline.metrics import WorkerSample, metrics_channel
from pipeline.transports.client import LinkLost, ReplyError

from .markers import Subscription, once
from .state import State

__all__ = ["Feed"]

logger = logging.getLogger("dashboards.feed")

PICTURES = "imagenet"
"""A model whose inputs are shown; those of others are when they tell that they take pictures."""
MOST_PICTURED = 8
"""Models at most whose inputs are read for that."""
HISTORY = 6 * 3600.0
"""Seconds back that are read at the start, where the streams still have them."""
RECONNECT = 0.5
STALE = 4.0
"""Seconds without a ledger, which comes every second, after which Redis counts as gone."""
OFF = 1.0
"""Seconds by which a report may be late; beyond that its sender's clock is off, by which it says when it began."""
ASK = 5.0
"""Seconds between two looks at the server's clock."""
TURN = 200
"""Messages after which the loop is given to others, while history is read."""


class Feed:
    """What processes count comes ready-made, once a second (`pipeline.ledger`, `pipeline.metrics`): the cost of looking
    does not grow with the events that flow. Only events whose content is drawn are read themselves.

    One clock counts, the server's: those of the processes, and this one's, may be wrong by seconds or hours, and what
    one of them says of the time must not make the others look late."""

    def __init__(self, app: Pipeline, state: State, more: Sequence[Subscription] = ()) -> None:
        self.app = app
        self.state = state
        self._heard = -math.inf
        """When, on the monotonic clock, the last ledger arrived that was no history."""
        self._ahead = time.time() - time.monotonic()
        """Of the monotonic clock, the server's."""
        self.loaded = False
        """The past has been read."""
        self.trouble = "waiting for Redis"
        self._group: asyncio.TaskGroup | None = None
        self._pictured: set[str] = set()
        self._followed: dict[Channel[Any], list[Subscription]] = {}
        for one in (*self._subscriptions(), *state.happened.subscriptions(), *more):
            self._followed.setdefault(one.channel, []).append(one)
        self._picture(PICTURES)

    def _subscriptions(self) -> list[Subscription]:
        state = self.state
        handlers: dict[Channel[Any], Callable[[Message[Any]], None]] = {
            metrics_channel: lambda m: state.on_worker(m.event, m.time.timestamp()),
            catalog.training_metrics: lambda m: state.on_training(m.event, m.time.timestamp()),
            catalog.predictions: lambda m: state.on_prediction(m.event, m.time.timestamp()),
            catalog.matmul_results: lambda m: state.on_matmul(m.event, m.time.timestamp()),
            catalog.model_status: self._on_model,
            catalog.answers: lambda m: state.on_answer(m.event, m.time.timestamp()),
            catalog.matmul_progress: lambda m: state.jobs.on_tile(m.event, m.time.timestamp()),
            catalog.systolic_cycles: lambda m: state.jobs.on_cycle(m.event),
            ledger_channel: self._on_ledger,
        }
        return [
            Subscription(channel, once(handler), HISTORY if channel.durable else 0.0)
            for channel, handler in handlers.items()
        ]

    def _on_model(self, message: Message[ModelStatus]) -> None:
        status = message.event
        self.state.on_model(status, message.time.timestamp())
        if status.dtype == "uint8" and len(status.shape) == 3 and status.shape[2] == 3:
            self._picture(status.model)

    def _picture(self, model: str) -> None:
        """Follow a model's inputs."""
        if model in self._pictured or len(self._pictured) == MOST_PICTURED:
            return
        self._pictured.add(model)
        channel, pictures = catalog.requests_of(model), self.state.pictures
        handler = once(lambda message: pictures.on_inputs(message.id, message.event))
        self._followed[channel] = [Subscription(channel, handler, HISTORY)]
        if self._group is not None:
            following = self._follow(self.app, channel, self._followed[channel])
            self._group.create_task(following, name=f"follow {channel.name}")

    def _on_ledger(self, message: Message[Any]) -> None:
        self.state.on_ledger(message.event)
        if self.now() - message.event.time < STALE:
            self._heard = time.monotonic()
            self.loaded = True

    @property
    def live(self) -> bool:
        return time.monotonic() - self._heard < STALE

    def now(self) -> float:
        """Unix seconds by the server's clock."""
        return time.monotonic() + self._ahead

    async def _read_clock(self, app: Pipeline) -> None:
        """What is known of the server's clock is corrected no further than the answer, between whose two ends it was
        read, leaves no other choice."""
        with contextlib.suppress(TimeoutError, PipelineError, LinkLost, ReplyError, OSError):
            async with asyncio.timeout(STALE):
                asked = time.monotonic()
                moment, _ = await app.backend.ledger({})
                self._ahead = min(max(self._ahead, moment - time.monotonic()), moment - asked)

    async def _keep_time(self, app: Pipeline) -> None:
        while True:
            await asyncio.sleep(ASK)
            await self._read_clock(app)

    async def run(self) -> None:
        """For ever: open, watch all, and begin again when Redis was not there."""
        while True:
            try:
                async with self.app as app:
                    self.trouble = "Redis does not answer"
                    await self._read_clock(app)
                    async with asyncio.TaskGroup() as group:
                        self._group = group
                        group.create_task(self._keep_time(app), name="follow the clock")
                        for channel, subscriptions in self._followed.items():
                            group.create_task(self._follow(app, channel, subscriptions), name=f"follow {channel.name}")
            except* (PipelineError, OSError) as errors:
                self.trouble = str(errors.exceptions[0])
                logger.debug("feed: %s", self.trouble)
            await asyncio.sleep(RECONNECT)

    def _placed(self, message: Message[Any], stored: float | None) -> Message[Any]:
        """With the time at which the server took it, or at which it arrived."""
        moment = self.now() if stored is None else stored
        off = moment - message.time.timestamp()
        event = message.event
        if isinstance(event, WorkerSample) and abs(off) > OFF:
            event = event.model_copy(update={"started": event.started + off})
        return replace(message, event=event, time=utc(moment))

    @staticmethod
    def _hand(one: Subscription, message: Message[Any]) -> None:
        """An event that cannot be shown costs itself, and not the page."""
        try:
            one.handler(message)
        except Exception:
            logger.exception("an event of %s is left out: %s", message.channel, message.id)

    async def _follow(self, app: Pipeline, channel: Channel[Any], subscriptions: list[Subscription]) -> None:
        """The stream position survives outages inside `watch`; what is read again after a new beginning is left out."""
        since = max(one.since for one in subscriptions)
        try:
            async with app.watch(channel, since=since if since and channel.durable else None) as stream:
                count = 0
                async for message in stream:
                    placed = self._placed(message, stream.stored)
                    for one in subscriptions:
                        self._hand(one, placed)
                    count += 1
                    if count % TURN == 0:
                        await asyncio.sleep(0)
        except ChannelConflict as error:
            logger.warning("left out: %s", error)
