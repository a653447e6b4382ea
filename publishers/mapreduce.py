"""Ask workers for the parts of a job, and for what their results come to.

    async with Pipeline("client") as app:
        scores = await scatter(app, "trials", [{"depth": 3}, {"depth": 5}])      # one result a part, in order
        counts = await mapreduce(app, "words", texts)                           # key → value

The functions are declared with `subscribers.mapreduce`, in any process on any host. Every part is a request: its result
is part of the worker's commit, and a dead worker's parts are handed to another when its lease ends. What counts is the
first result of each (job, part), so a part that is handed out twice counts once. A part that takes a multiple of the
median is published again: a backup task (Dean & Ghemawat 2004, MapReduce). Without async:
`with app.blocking() as pipe: pipe.call(mapreduce(pipe.app, …))`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

from pipeline import Channel, Pipeline
from pipeline.catalog import Task, TaskResult, Value, map_tasks, reduce_tasks
from pipeline.errors import ConfigurationError, RequestTimeout

__all__ = ["mapreduce", "scatter"]

logger = logging.getLogger("publishers.mapreduce")

BACKUP = 3.0
DAY = 86400.0
TICK = 0.1
"""Seconds between two looks for stragglers."""
LEAST_PATIENCE = 0.5
"""Seconds; workers hold up to a quarter of a second of work ahead, which is not late."""


async def scatter(
    app: Pipeline, name: str, parts: Sequence[Any], *, job: str | None = None, backup: float = BACKUP,
    timeout: float = DAY,
) -> list[Any]:  # fmt: skip
    """What the worker `name` makes of each part, in the order of the parts. See `mapreduce`."""
    results = await _map(app, name, parts, job or _new_job(), backup, timeout)
    return [result.values[""].get() for result in results]


async def mapreduce(
    app: Pipeline, name: str, parts: Sequence[Any], *, job: str | None = None, backup: float = BACKUP,
    timeout: float = DAY,
) -> dict[str, Any]:  # fmt: skip
    """Key → what the reducer `name` makes of the values that the mapper `name` found for it, in the order of the parts.

    parts    what JSON has, arrays (numpy, torch, Tensor), or dictionaries of both
    job      its name in events
    backup   a part is late, and published again, when it takes this many times the median; 0: never
    timeout  seconds for the map, and for the reduce

    Raises RequestFailed, with the reason, when a function fails on a part in all its attempts; RequestTimeout.
    """
    job = job or _new_job()
    values: dict[str, list[Value]] = {}
    for result in await _map(app, name, parts, job, backup, timeout):
        for key, value in result.values.items():
            values.setdefault(key, []).append(value)
    tasks = [Task(job=job, part=part, key=key, values=values[key]) for part, key in enumerate(sorted(values))]
    reduced = await _Job(app, reduce_tasks(name), tasks, backup, timeout).results()
    return {str(task.key): result.values[""].get() for task, result in zip(tasks, reduced, strict=True)}


async def _map(
    app: Pipeline, name: str, parts: Sequence[Any], job: str, backup: float, timeout: float
) -> list[TaskResult]:
    tasks = [Task(job=job, part=part, values=[Value.of(value)]) for part, value in enumerate(parts)]
    return await _Job(app, map_tasks(name), tasks, backup, timeout).results()


def _new_job() -> str:
    return secrets.token_hex(4)


class _Job:
    """Requests of all tasks at once; the first answer to each counts."""

    def __init__(self, app: Pipeline, channel: Channel[Task], tasks: list[Task], backup: float, timeout: float) -> None:
        if not backup >= 0 or not timeout > 0:
            raise ConfigurationError(f"backup={backup}, timeout={timeout}: expected at least 0, and above 0")
        self._app = app
        self._channel = channel
        self._tasks = tasks
        self._backup = backup
        self._timeout = timeout
        self._results: dict[int, TaskResult] = {}
        self._finished: dict[int, float] = {}
        self._published = [0.0] * len(tasks)
        self._tries = [0] * len(tasks)
        self._asking: dict[int, set[asyncio.Task[Any]]] = {}
        self._answers: asyncio.Queue[tuple[int, asyncio.Task[Any]]] = asyncio.Queue()

    async def results(self) -> list[TaskResult]:
        try:
            async with asyncio.timeout(self._timeout):
                for part in range(len(self._tasks)):
                    self._ask(part)
                while len(self._results) < len(self._tasks):
                    await self._take()
                    for part in list(self._late(time.monotonic())):
                        logger.info("job %s: part %d is late; published again", self._tasks[part].job, part)
                        self._ask(part)
        except TimeoutError:
            raise RequestTimeout(
                f"{len(self._tasks) - len(self._results)} of {len(self._tasks)} parts on channel "
                f"{self._channel.name!r} have no result after {self._timeout:g} s; is a worker of it running?"
            ) from None
        finally:
            left = [asking for several in self._asking.values() for asking in several]
            for asking in left:
                asking.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        return [self._results[part] for part in range(len(self._tasks))]

    def _ask(self, part: int) -> None:
        task = self._tasks[part].model_copy(update={"backup": self._tries[part]})
        self._tries[part] += 1
        self._published[part] = time.monotonic()
        asking = asyncio.create_task(self._app.request(self._channel, task, timeout=2 * self._timeout))
        asking.add_done_callback(lambda done: self._answers.put_nowait((part, done)))
        self._asking.setdefault(part, set()).add(asking)

    async def _take(self) -> None:
        """All answers that are there, or the next. Raises what a request raised."""
        try:
            async with asyncio.timeout(TICK):
                arrived = [await self._answers.get()]
        except TimeoutError:
            return
        while not self._answers.empty():
            arrived.append(self._answers.get_nowait())
        for part, asking in arrived:
            if part in self._results:
                _ = asking.cancelled() or asking.exception()
                continue
            self._results[part] = asking.result()
            self._finished[part] = time.monotonic()
            for other in self._asking.pop(part) - {asking}:
                other.cancel()

    def _late(self, now: float) -> Iterator[int]:
        """Tasks are taken in the order they were published, so one has begun, at the latest, when one published after
        it is finished; or, if there is none, when the last result came."""
        if not self._results or not self._backup or len(self._results) == len(self._tasks):
            return
        median = statistics.median(result.seconds for result in self._results.values())
        patience = max(LEAST_PATIENCE, self._backup * median)
        begun = max(self._finished.values())
        for part in reversed(range(len(self._tasks))):
            if part in self._results:
                begun = min(begun, self._finished[part])
            elif now - max(begun, self._published[part]) > patience * 2 ** (self._tries[part] - 1):
                yield part
