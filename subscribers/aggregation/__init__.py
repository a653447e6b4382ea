"""Aggregation of training runs: `pipeline serve subscribers.aggregation:app`.

Everything a run's workers send has the run (and shard) as its key, so that it reaches one aggregator at a time, in
order: partitions are leased to processes and move when one dies. The contribution that completes a round returns the
Round, and both take effect in one commit. What an aggregator holds in memory it may lose: workers are asked for what is
missing with their next sign of life (see `runs`), and of two Rounds with one number the first on the channel counts.
"""

from __future__ import annotations

import asyncio
import logging
import time

from pipeline import Pipeline, Reject, catalog
from pipeline.catalog import Admission, Contribution, Round, State
from pipeline.errors import PipelineError, PublishUncertain, ServerUnavailable

from .runs import Answer, Run, Server

__all__ = ["Run", "Runs", "aggregate", "aggregate_live", "app", "runs"]

logger = logging.getLogger("subscribers.aggregation")

app = Pipeline("aggregation")

TICK = 0.05
FORGOTTEN = 600.0
"""Seconds after which a run that nobody speaks of is let go."""
IN_THREAD = 1 << 20
"""Bytes from which on a mean is not computed in the event loop."""

Key = tuple[str, int]


class Runs:
    """The runs of this process."""

    def __init__(self) -> None:
        self._runs: dict[Key, Run] = {}

    def of(self, sent: Contribution) -> Run:
        """The run of a message, made when it is the first one."""
        key = sent.run, sent.shard
        run = self._runs.get(key)
        if run is None or (not run.members and not run.begun and run.plan != sent.plan):
            kind = Server if sent.plan.mode in ("async", "dogwild") else Run
            run = self._runs[key] = kind(sent.run, sent.shard, sent.plan, time.monotonic())
        return run

    def known(self, sent: Contribution) -> Run | None:
        return self._runs.get((sent.run, sent.shard))

    async def take(self, sent: Contribution) -> list[Admission | Round | State]:
        """Raises Reject."""
        run = self.of(sent)
        try:
            answer: Answer = run.take(sent, time.monotonic())
        except ValueError as error:
            raise Reject(f"run {sent.run!r}, round {sent.round}, rank {sent.rank}: {error}") from error
        outputs = answer.outputs
        if sent.action == "join" and run.begun:
            state = run.state()
            if state is not None:
                outputs = [*outputs, state]
        if answer.close:
            outputs = [*outputs, await self.close(run)]
        return outputs

    async def close(self, run: Run) -> Round:
        now = time.monotonic()
        closed, summands = run.close(now)
        run.closing = True
        try:
            if run.plan.size * 4 >= IN_THREAD:
                done = await asyncio.to_thread(run.mean, closed, summands)
            else:
                done = run.mean(closed, summands)
        finally:
            run.closing = False
        done = done.model_copy(update={"seconds": closed.seconds + time.monotonic() - now})
        run.closed(done, time.monotonic())
        return done

    async def look(self, now: float) -> list[Round]:
        """By the clock: rounds whose time has come."""
        for key, run in list(self._runs.items()):
            if not run.members and now - run.heard > FORGOTTEN:
                del self._runs[key]
        return [await self.close(run) for run in list(self._runs.values()) if not run.closing and run.due(now)]


runs = Runs()


@app.on_start
async def start() -> None:
    app.spawn(watch_the_clock(), name="rounds by the clock")


async def watch_the_clock() -> None:
    unsaid: list[Round] = []
    while True:
        await asyncio.sleep(TICK)
        unsaid += await runs.look(time.monotonic())
        while unsaid:
            closed = unsaid[0]
            try:
                await app.publish(catalog.rounds, closed, key=closed.run)
            except (ServerUnavailable, PublishUncertain) as error:  # of two with one number the first counts
                logger.warning("run %s: round %d is not out yet: %s", closed.run, closed.round, error)
                break
            except PipelineError as error:
                logger.error("run %s: round %d cannot be published: %s", closed.run, closed.round, error)
            del unsaid[0]


@app.subscriber(
    catalog.contributions,
    group="aggregation",
    publishes=[catalog.rounds, catalog.admissions, catalog.states],
    concurrency=8,
    run_in="loop",
    ordered=True,
    lease=1.0,
)
async def aggregate(sent: Contribution) -> list[Admission | Round | State]:
    """What workers send; out come answers, and the Round when it was the last that the round waited for."""
    return await runs.take(sent)


@app.subscriber(catalog.contributions_live, group="aggregation", publishes=catalog.rounds_live, run_in="loop")
async def aggregate_live(sent: Contribution) -> Round | None:
    """Pushes of dogwild runs, which every aggregator hears; the one that has the run's weights applies them."""
    run = runs.known(sent)
    if not isinstance(run, Server) or sent.action != "push":
        return None
    try:
        answer = run.take_live(sent, time.monotonic())
    except (Reject, ValueError) as error:
        logger.warning("run %s: a push of rank %d is left out: %s", sent.run, sent.rank, error)
        return None
    return next((output for output in answer.outputs if isinstance(output, Round)), None)
