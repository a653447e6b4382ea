"""Declare functions as workers: of independent parts, or of the map and the reduce of a job.

    app = Pipeline("words")

    @mapper(app, "words", run_in="process", concurrency=2)
    def count(text: str) -> dict[str, int]: ...      # a part → key → value

    @reducer(app, "words")
    def add(word: str, counts: list[int]) -> int: ...     # all values of a key, in the order of their parts

    @worker(app, "trials")
    def trial(parameters: dict) -> float: ...             # a part → its result

Values are what JSON has, numpy arrays (they arrive read-only), or dictionaries of both. `publishers.mapreduce` asks.
A function may be called twice for one part (after a crash, or as a backup of a straggler); one of its results counts.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pipeline import Channel, Pipeline, RetryPolicy
from pipeline.catalog import Task, TaskResult, Value, map_tasks, reduce_tasks
from pipeline.errors import ConfigurationError, Reject
from pipeline.executors import RunIn

__all__ = ["mapper", "reducer", "worker"]

Function = TypeVar("Function", bound=Callable[..., Any])

RETRY = RetryPolicy(attempts=3)


def mapper(
    app: Pipeline, name: str, *, run_in: RunIn = "thread", concurrency: int = 1, lease: float = 15.0,
    retry: RetryPolicy = RETRY,
) -> Callable[[Function], Function]:  # fmt: skip
    """Declare `function(part) → {key: value}`. What it raises is retried, then told to who asked."""

    def work(function: Function, task: Task) -> dict[str, Any]:
        found = function(_only(task))
        if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
            raise Reject(
                f"map {name!r}: part {task.part} became {type(found).__name__}; expected a dict of str → value"
            )
        return dict(found)

    return _declare(app, map_tasks(name), "map", work, run_in, concurrency, lease, retry)


def reducer(
    app: Pipeline, name: str, *, run_in: RunIn = "thread", concurrency: int = 1, lease: float = 15.0,
    retry: RetryPolicy = RETRY,
) -> Callable[[Function], Function]:  # fmt: skip
    """Declare `function(key, values) → value`."""

    def work(function: Function, task: Task) -> dict[str, Any]:
        return {"": function(task.key, [value.get() for value in task.values])}

    return _declare(app, reduce_tasks(name), "reduce", work, run_in, concurrency, lease, retry)


def worker(
    app: Pipeline, name: str, *, run_in: RunIn = "thread", concurrency: int = 1, lease: float = 15.0,
    retry: RetryPolicy = RETRY,
) -> Callable[[Function], Function]:  # fmt: skip
    """Declare `function(part) → value`, a map without a reduce."""

    def work(function: Function, task: Task) -> dict[str, Any]:
        return {"": function(_only(task))}

    return _declare(app, map_tasks(name), "map", work, run_in, concurrency, lease, retry)


def _declare(
    app: Pipeline, channel: Channel[Task], group: str, work: Callable[[Any, Task], dict[str, Any]],
    run_in: RunIn, concurrency: int, lease: float, retry: RetryPolicy,
) -> Callable[[Function], Function]:  # fmt: skip
    def decorate(function: Function) -> Function:
        if inspect.iscoroutinefunction(function):
            raise ConfigurationError(f"{function.__name__} is async; map and reduce compute: make it a plain function")

        @functools.wraps(function)  # by its name, processes find this in the function's module
        def handle(*arguments: Any) -> Any:
            if not (len(arguments) == 1 and isinstance(arguments[0], Task)):
                return function(*arguments)
            started = time.perf_counter()
            found = work(function, arguments[0])
            seconds = time.perf_counter() - started
            return TaskResult(values={key: Value.of(value) for key, value in found.items()}, seconds=seconds)

        options: Any = {"run_in": run_in, "concurrency": concurrency, "lease": lease, "retry": retry}
        return app.subscriber(channel, group=group, **options)(handle)  # type: ignore[return-value]

    return decorate


def _only(task: Task) -> Any:
    if len(task.values) != 1:
        raise Reject(f"part {task.part} of job {task.job!r} has {len(task.values)} values; a map takes one")
    return task.values[0].get()
