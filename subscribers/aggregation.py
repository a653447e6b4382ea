"""Synchronous gradient rounds: one mean a round, over all workers of a run, or after a deadline over a quorum of them.

The handler of a gradient waits until its round is closed. The first gradient's handler returns the Round, and only then
do the others return, so nothing is acknowledged before its round is published: a killed aggregator's gradients are all
delivered again. What arrives for a round that is closed, or twice, is acknowledged without effect. Should two
aggregators close the same round, the first Round in the channel's order is the one that every trainer applies.
"""

from __future__ import annotations

import asyncio
import logging
import time

import numpy as np
import numpy.typing as npt

from pipeline import Pipeline, Reject, Tensor, catalog
from pipeline.catalog import Gradient, Round, Weights

__all__ = ["ABANDONED", "OpenRound", "Rounds", "aggregate", "app"]

logger = logging.getLogger("subscribers.aggregation")

app = Pipeline("aggregation")

ABANDONED = 300.0
"""Seconds after which the gradients of a round that never reached its quorum are set aside."""
REMEMBERED = 1024
"""Runs whose last closed round is kept in mind."""


class OpenRound:
    """A round that gathers gradients. The handler of the first one leads: it waits for `ready` and makes the Round."""

    def __init__(self, first: Gradient) -> None:
        loop = asyncio.get_running_loop()
        self.first = first
        self.gradients: dict[int, Gradient] = {}
        self.ready: asyncio.Future[None] = loop.create_future()
        """The leader can go on. Cancelled: this process stops."""
        self.closed: asyncio.Future[None] = loop.create_future()
        """The others can go on: the Round is on its way (or a Reject, or cancelled)."""
        self.late = False
        self.elsewhere = False
        """Another aggregator has closed this round."""
        self._started = time.perf_counter()

    def add(self, gradient: Gradient) -> None:
        """Raises Reject when it does not fit the round."""
        first = self.first
        if gradient.gradient.shape != first.gradient.shape or gradient.workers != first.workers:
            raise Reject(
                f"run {gradient.run!r}, round {gradient.round}: rank {gradient.rank} of {gradient.workers} sent "
                f"{gradient.gradient!r}; expected {first.gradient!r} of {first.workers}, as from rank {first.rank}"
            )
        self.gradients[gradient.rank] = gradient
        self.consider()

    def consider(self) -> None:
        """Ready when all have contributed; after the deadline, when the quorum has."""
        enough = min(self.first.quorum, self.first.workers) if self.late else self.first.workers
        if (len(self.gradients) >= enough or self.elsewhere) and not self.ready.done():
            self.ready.set_result(None)

    def mean(self) -> Round:
        """Weighted by samples, summed in rank order in float64: the same gradients always give the same bits."""
        ranks = sorted(self.gradients)
        parts = [self.gradients[rank] for rank in ranks]
        samples = sum(part.samples for part in parts)
        total: npt.NDArray[np.float64] = np.zeros(self.first.gradient.shape)
        for part in parts:
            total += np.asarray(part.gradient).astype(np.float64) * part.samples
        return Round(
            run=self.first.run,
            round=self.first.round,
            ranks=ranks,
            gradient=Tensor((total / samples).astype(np.float32)),
            loss=sum(part.loss * part.samples for part in parts) / samples,
            accuracy=sum(part.accuracy * part.samples for part in parts) / samples,
            seconds=time.perf_counter() - self._started,
        )

    def weights(self) -> list[Weights]:
        """What the lowest rank that offers a model wants published."""
        offers = [self.gradients[rank].weights for rank in sorted(self.gradients)]
        return [offer for offer in offers if offer is not None][:1]


class Rounds:
    """Open and closed rounds, by run."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, int], OpenRound] = {}
        self._closed: dict[str, int] = {}
        self._stopped = False

    async def contribute(self, gradient: Gradient) -> list[Round | Weights] | None:
        """Returns when the gradient's round is closed: to the one that leads it the Round, to the others None.

        Raises Reject; CancelledError when the process stops, which hands the gradient to another aggregator.
        """
        if self._stopped:
            raise asyncio.CancelledError("this aggregator stops")
        if gradient.round <= self._closed.get(gradient.run, -1):
            return None
        current = self._open.get((gradient.run, gradient.round))
        if current is None:
            return await self._lead(OpenRound(gradient))
        if gradient.rank not in current.gradients:
            current.add(gradient)
            await asyncio.shield(current.closed)
        return None

    async def _lead(self, current: OpenRound) -> list[Round | Weights] | None:
        run, number = current.first.run, current.first.round
        self._open[run, number] = current
        current.add(current.first)
        try:
            await _ready(current)
            outputs: list[Round | Weights] = [] if current.elsewhere else [current.mean(), *current.weights()]
            self._close(run, number)
            current.closed.set_result(None)
            return outputs
        except Reject as reject:
            current.closed.set_exception(reject)
            current.closed.exception()  # nobody else may have waited for it
            raise
        finally:
            del self._open[run, number]
            current.closed.cancel()

    def learn(self, closed: Round) -> None:
        """Somebody (this process among others) published a round: what is still held for it has come too late."""
        self._close(closed.run, closed.round)
        current = self._open.get((closed.run, closed.round))
        if current is not None:
            current.elsewhere = True
            current.consider()

    def stop(self) -> None:
        """Let go of every open round; its gradients stay unacknowledged."""
        self._stopped = True
        for current in self._open.values():
            current.ready.cancel()

    def _close(self, run: str, number: int) -> None:
        self._closed[run] = max(number, self._closed.pop(run, -1))
        while len(self._closed) > REMEMBERED:
            del self._closed[next(iter(self._closed))]


async def _ready(current: OpenRound) -> None:
    """Raises Reject when the quorum never came."""
    await asyncio.wait({current.ready}, timeout=current.first.deadline)
    if not current.ready.done():
        current.late = True
        current.consider()
        await asyncio.wait({current.ready}, timeout=ABANDONED)
    if not current.ready.done():
        first = current.first
        raise Reject(
            f"run {first.run!r}, round {first.round}: {len(current.gradients)} of {first.workers} workers, below the "
            f"quorum of {first.quorum}, after {ABANDONED:g} s"
        )
    await current.ready


rounds = Rounds()


@app.on_start
async def start() -> None:
    app.spawn(follow_rounds(), name="rounds")


async def follow_rounds() -> None:
    async with app.watch(catalog.rounds, since=catalog.rounds.keep) as stream:
        async for message in stream:
            rounds.learn(message.event)


@app.on_stop
async def stop() -> None:
    """A round may wait for its deadline longer than a stopping process should."""
    rounds.stop()


@app.subscriber(
    catalog.gradients,
    group="aggregation",
    publishes=[catalog.rounds, catalog.weights],
    concurrency=256,
    run_in="loop",
    lease=5.0,
)
async def aggregate(gradient: Gradient) -> list[Round | Weights] | None:
    """Gradients in, their round's mean out, together with new weights for inference when a trainer offers some."""
    _check(gradient)
    return await rounds.contribute(gradient)


def _check(gradient: Gradient) -> None:
    """Raises Reject saying what was expected."""
    where = f"run {gradient.run!r}, round {gradient.round}, rank {gradient.rank}"
    if gradient.rank >= gradient.workers:
        raise Reject(f"{where}: ranks of {gradient.workers} workers are 0…{gradient.workers - 1}")
    tensor = gradient.gradient
    if tensor.dtype != "float32" or tensor.ndim != 1:
        raise Reject(f"{where}: the gradient is {tensor!r}, expected float32 of one dimension")
    if wrong := int(np.count_nonzero(~np.isfinite(np.asarray(tensor)))):
        raise Reject(f"{where}: {wrong} of {tensor.shape[0]} values are NaN or infinite")
    if not np.isfinite((gradient.loss, gradient.accuracy)).all():
        raise Reject(f"{where}: loss {gradient.loss}, accuracy {gradient.accuracy}, expected finite numbers")
