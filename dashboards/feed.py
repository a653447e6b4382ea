"""One reader a process: watches the channels (never in a group), history first, and keeps on through outages."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from pipeline import Channel, Message, Pipeline, PipelineError, catalog
from pipeline.catalog import ModelStatus
from pipeline.errors import ChannelConflict
from pipeline.ledger import ledger_channel
from pipeline.metrics import metrics_channel

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
TURN = 200
"""Messages after which the loop is given to others, while history is read."""


class Feed:
    """What processes count comes ready-made, once a second (`pipeline.ledger`, `pipeline.metrics`): the cost of looking
    does not grow with the events that flow. Only events whose content is drawn are read themselves."""

    def __init__(self, app: Pipeline, state: State, more: Sequence[Subscription] = ()) -> None:
        self.app = app
        self.state = state
        self.heard = 0.0
        """Unix time of the last ledger that arrived."""
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
        if time.time() - message.event.time < STALE:
            self.heard = time.time()
            self.loaded = True

    @property
    def live(self) -> bool:
        return time.time() - self.heard < STALE

    async def run(self) -> None:
        """For ever: open, watch all, and begin again when Redis was not there."""
        while True:
            try:
                async with self.app as app:
                    self.trouble = "Redis does not answer"
                    async with asyncio.TaskGroup() as group:
                        self._group = group
                        for channel, subscriptions in self._followed.items():
                            group.create_task(self._follow(app, channel, subscriptions), name=f"follow {channel.name}")
            except* (PipelineError, OSError) as errors:
                self.trouble = str(errors.exceptions[0])
                logger.debug("feed: %s", self.trouble)
            await asyncio.sleep(RECONNECT)

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
                    for one in subscriptions:
                        self._hand(one, message)
                    count += 1
                    if count % TURN == 0:
                        await asyncio.sleep(0)
        except ChannelConflict as error:
            logger.warning("left out: %s", error)
