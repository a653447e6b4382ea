"""A logger for training loops that never blocks and never raises into them."""

from __future__ import annotations

import atexit
import contextlib
import logging
import queue
import threading
import time
from typing import Any, Self

from pipeline import Pipeline, catalog
from pipeline.blocking import BlockingPipeline
from pipeline.catalog import TrainingMetrics

__all__ = ["Metrics"]

logger = logging.getLogger("publishers.training")

MOST_AT_ONCE = 256
MOMENT = 0.02
"""Seconds for which steps gather: a quick loop's share one event frame."""
RECONNECT = 0.5


class Metrics:
    """Publishes a run's numbers on `catalog.training_metrics`, from a thread of its own.

    >>> metrics = Metrics("my-run")
    >>> metrics.log(step=1, loss=0.7, accuracy=0.5)

    What Redis cannot take now waits, up to `capacity` steps; what comes beyond is dropped and counted in `dropped`, and
    so are values that are no numbers. A process that ends gives the rest up to two seconds.
    """

    def __init__(self, run: str, *, url: str | None = None, capacity: int = 10_000) -> None:
        self.run = run
        self.dropped = 0
        """Values and steps that were not or will not be published."""
        self._url = url
        self._queue: queue.Queue[TrainingMetrics] = queue.Queue(capacity)
        self._closing = threading.Event()
        self._told: set[str] = set()
        self._thread = threading.Thread(target=self._publish_until_closed, name=f"metrics-{run}", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def log(self, *, step: int, **values: Any) -> None:
        """Numbers at a step: floats, ints, numpy scalars, one-element tensors. Returns at once, whatever happens."""
        try:
            numbers = {
                name: number for name, value in values.items() if (number := self._number(name, value)) is not None
            }
            if self._closing.is_set():
                raise queue.Full
            self._queue.put_nowait(TrainingMetrics(run=self.run, step=int(step), values=numbers))
        except queue.Full:
            self.dropped += 1
            self._tell("full", "the queue is full (is Redis gone?): steps are dropped")
        except Exception as error:  # the loop's own work must go on
            self.dropped += 1
            self._tell("step", f"step {step!r} cannot be logged: {error}")

    def close(self, timeout: float = 2.0) -> None:
        """Give what waits up to `timeout` seconds; what is left then is dropped and counted."""
        if self._closing.is_set():
            return
        self._closing.set()
        atexit.unregister(self.close)
        self._thread.join(timeout)
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
                self.dropped += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _number(self, name: str, value: Any) -> float | None:
        try:
            return float(value)
        except Exception as error:
            self.dropped += 1
            self._tell(name, f"value {name!r} is no number: {error}")
            return None

    def _tell(self, what: str, text: str) -> None:
        """Once each, not once a step."""
        if what not in self._told:
            self._told.add(what)
            logger.warning("metrics of run %r: %s", self.run, text)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _publish_until_closed(self) -> None:
        batch: list[TrainingMetrics] = []
        while not (self._closing.is_set() and self._queue.empty() and not batch):
            try:
                with Pipeline("metrics", self._url).blocking() as pipe:
                    self._publish_all(pipe, batch)
            except Exception as error:  # whatever it was, the next connection may do better
                self._tell("redis", f"waiting: {error}")
                if self._closing.wait(RECONNECT):
                    break
        self.dropped += len(batch)

    def _publish_all(self, pipe: BlockingPipeline, batch: list[TrainingMetrics]) -> None:
        """Publish what comes. `batch` is the caller's: what it holds when this raises is published by the next call."""
        while True:
            if not batch:
                with contextlib.suppress(queue.Empty):
                    batch.append(self._queue.get(timeout=0.1))
                    if not self._closing.is_set():
                        time.sleep(MOMENT)
                    while len(batch) < MOST_AT_ONCE:
                        batch.append(self._queue.get_nowait())
            if batch:
                pipe.publish(catalog.training_metrics, batch)
                batch.clear()
            elif self._closing.is_set():
                return
