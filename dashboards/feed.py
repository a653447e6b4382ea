"""One reader a process: watches the channels (never in a group), history first, and keeps on through outages."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from pipeline import Channel, Message, Pipeline, PipelineError, catalog
from pipeline.ledger import ledger_channel
from pipeline.metrics import metrics_channel

from .markers import Subscription
from .state import State

__all__ = ["Feed"]

logger = logging.getLogger("dashboards.feed")

PICTURES = "imagenet"
"""The model whose inputs are shown."""
HISTORY = 15 * 60.0
RECONNECT = 0.5
STALE = 4.0
"""Seconds without a ledger, which comes every second, after which Redis counts as gone."""


class Feed:
    def __init__(self, app: Pipeline, state: State, more: Iterable[Subscription] = ()) -> None:
        self.state = state
        self.heard = 0.0
        """Unix time of the last ledger that arrived."""
        self.trouble = "waiting for Redis"
        self._app = app
        handlers: dict[Channel[Any], Callable[[Message[Any]], None]] = {
            metrics_channel: lambda m: state.on_worker(m.event, m.time.timestamp()),
            catalog.training_metrics: lambda m: state.on_training(m.event),
            catalog.rounds: lambda m: state.on_round(m.event),
            catalog.predictions: lambda m: state.on_prediction(m.event, m.time.timestamp()),
            catalog.matmul_results: lambda m: state.on_matmul(m.event, m.time.timestamp()),
            catalog.requests_of(PICTURES): lambda m: state.pictures.on_inputs(m.id, m.event),
            catalog.answers: lambda m: state.on_answer(m.event, m.time.timestamp()),
            ledger_channel: self._on_ledger,
        }
        own = [Subscription(channel, handler, HISTORY) for channel, handler in handlers.items()]
        self._subscriptions: dict[Channel[Any], list[Subscription]] = {}
        for one in [*own, *more]:
            self._subscriptions.setdefault(one.channel, []).append(one)

    def _on_ledger(self, message: Message[Any]) -> None:
        self.state.on_ledger(message.event)
        self.heard = time.time()

    @property
    def live(self) -> bool:
        return time.time() - self.heard < STALE

    async def run(self) -> None:
        """For ever: open, watch all, and begin again when Redis was not there."""
        while True:
            try:
                async with self._app as app:
                    self.trouble = "Redis does not answer"
                    async with asyncio.TaskGroup() as group:
                        for channel, subscriptions in self._subscriptions.items():
                            group.create_task(self._follow(app, channel, subscriptions), name=f"follow {channel.name}")
            except* (PipelineError, OSError) as errors:
                self.trouble = str(errors.exceptions[0])
                logger.debug("feed: %s", self.trouble)
            await asyncio.sleep(RECONNECT)

    async def _follow(self, app: Pipeline, channel: Channel[Any], subscriptions: list[Subscription]) -> None:
        """The stream position survives outages inside `watch`, so nothing is counted twice and nothing is missed."""
        since = max(one.since for one in subscriptions)
        async with app.watch(channel, since=since if channel.durable else None) as stream:
            count = 0
            async for message in stream:
                for one in subscriptions:
                    one.handler(message)
                count += 1
                if count % 500 == 0:
                    await asyncio.sleep(0)
