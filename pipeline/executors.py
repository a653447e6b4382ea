"""Where handlers run: on the event loop, in threads, or in processes. One interface, chosen by a value.

An executor calls a handler for what it takes from a source, for a slice of time, and returns what came of it. Taking
as it goes keeps a slow event from holding up those queued behind it while other slots are free.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import multiprocessing
import sys
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor as PoolExecutor
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal, Protocol

from .errors import ConfigurationError, HandlerError, Reject, Retry
from .middleware import Handler, Middleware, wrap

__all__ = ["Executor", "RunIn", "make"]

RunIn = Literal["loop", "thread", "process"]

SLICE = 0.002
"""Seconds of handler calls between returns to the event loop."""

Source = deque[Any]
Argument = Callable[[Any], Any]
"""From a queued unit to what the handler is called with."""
Results = list[tuple[Any, Any]]
"""(unit, what the handler returned or the exception it raised)"""


class Executor(Protocol):
    async def each(self, source: Source, argument: Argument, results: Results) -> None:
        """Call the handler for units of `source`, one at a time, for a slice of time; `results` grow as it goes."""
        ...

    async def once(self, argument: Any) -> Any:
        """Call the handler with one argument (a batch). Raises what it raises."""
        ...

    def close(self) -> None: ...


def make(handler: Handler, run_in: RunIn, concurrency: int, middleware: list[Middleware]) -> Executor:
    if run_in == "process":
        return _Processes(handler, concurrency, middleware)
    wrapped = wrap(handler, middleware)
    if run_in == "thread":
        return _Threads(wrapped, concurrency)
    return _Loop(wrapped)


class _Loop:
    """`async def` handlers; also plain functions that are too short to be worth a thread."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._async = inspect.iscoroutinefunction(handler)

    async def each(self, source: Source, argument: Argument, results: Results) -> None:
        if not self._async:
            _each(source, argument, results, self._handler)
            return
        handler: Callable[[Any], Awaitable[Any]] = self._handler
        clock = time.perf_counter
        deadline = clock() + SLICE
        while source:
            unit = source.popleft()
            outcome: Any
            try:
                outcome = await handler(argument(unit))
            except Exception as error:
                outcome = error
            results.append((unit, outcome))
            if clock() > deadline:
                break

    async def once(self, argument: Any) -> Any:
        result = self._handler(argument)
        return await result if self._async else result

    def close(self) -> None:
        """Nothing to give back."""


class _Threads:
    def __init__(self, handler: Handler, concurrency: int) -> None:
        if inspect.iscoroutinefunction(handler):
            raise ConfigurationError(f"{handler.__name__} is async: it runs in the loop, not in a thread")
        self._handler = handler
        self._pool: PoolExecutor = ThreadPoolExecutor(concurrency, thread_name_prefix=f"handler-{_name(handler)}")

    async def each(self, source: Source, argument: Argument, results: Results) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._pool, _each, source, argument, results, self._handler)

    async def once(self, argument: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, _once, self._handler, argument)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _each(source: Source, argument: Argument, results: Results, handler: Handler) -> None:
    clock = time.perf_counter
    deadline = clock() + SLICE
    while True:
        try:
            unit = source.popleft()
        except IndexError:
            return
        outcome: Any
        try:
            outcome = handler(argument(unit))
        except Exception as error:
            outcome = error
        results.append((unit, outcome))
        if clock() > deadline:
            return


def _once(handler: Handler, argument: Any) -> Any:
    try:
        return handler(argument)
    except StopIteration as error:  # a future cannot carry it
        raise RuntimeError("the handler raised StopIteration") from error


class _Processes:
    """Spawned processes, for handlers that hold the GIL. A process that dies takes one call with it, not the worker.

    Arguments and results pass through the operating system's pipes between a process and its own children, pickled by
    multiprocessing; nothing of that reaches Redis.
    """

    def __init__(self, handler: Handler, concurrency: int, middleware: list[Middleware]) -> None:
        if inspect.iscoroutinefunction(handler):
            raise ConfigurationError(f"{_name(handler)} is async: it cannot run in a process; make it a plain function")
        if "<locals>" in handler.__qualname__:
            raise ConfigurationError(f"{_name(handler)}: run_in='process' needs a function at the top of a module")
        self._where = (handler.__module__, handler.__qualname__, middleware)
        self._concurrency = concurrency
        self._pool = self._spawn()
        self._seconds = SLICE

    def _spawn(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self._concurrency,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_child_start,
            initargs=self._where,
        )

    async def each(self, source: Source, argument: Argument, results: Results) -> None:
        many = max(1, min(256, int(SLICE / self._seconds)))
        units = [source.popleft() for _ in range(min(many, len(source)))]
        started = time.perf_counter()
        outcomes = await self._run(_child_each, [argument(unit) for unit in units], len(units))
        self._seconds = max(1e-6, (time.perf_counter() - started) / max(1, len(units)))
        results.extend(zip(units, outcomes, strict=True))

    async def once(self, argument: Any) -> Any:
        outcome = (await self._run(_child_once, argument, 1))[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _run(self, call: Callable[[Any], list[Any]], argument: Any, count: int) -> list[Any]:
        pool = self._pool
        try:
            outcomes = await asyncio.get_running_loop().run_in_executor(pool, call, argument)
        except BrokenProcessPool:
            if self._pool is pool:
                pool.shutdown(wait=False)
                self._pool = self._spawn()
            return [HandlerError("the handler's process died while it ran (killed, or out of memory)")] * count
        except Exception as error:
            return [HandlerError(f"the event cannot be passed to the handler's process: {error}")] * count
        return [_revive(outcome) for outcome in outcomes]

    def close(self) -> None:
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()


_child_handler: Handler


def _child_start(module: str, qualname: str, middleware: list[Middleware]) -> None:
    global _child_handler  # one handler a process, set once by its initializer
    scope: Any = sys.modules["__main__"] if module == "__main__" else importlib.import_module(module)
    for part in qualname.split("."):
        scope = getattr(scope, part)
    _child_handler = wrap(scope, middleware)


def _child_each(arguments: list[Any]) -> list[Any]:
    return [_child_one(argument) for argument in arguments]


def _child_once(argument: Any) -> list[Any]:
    return [_child_one(argument)]


def _child_one(argument: Any) -> bytes | _Died:
    try:
        return bytes(ForkingPickler.dumps(_child_handler(argument)))  # here, where what fails has no neighbours
    except Exception as error:
        return _Died.of(error)


class _Died:
    """An exception as it crosses from a child: its own class may not survive the way."""

    def __init__(self, kind: str, arguments: tuple[Any, ...], text: str) -> None:
        self.kind = kind
        self.arguments = arguments
        self.text = text

    @classmethod
    def of(cls, error: Exception) -> _Died:
        if isinstance(error, Retry):
            return cls("Retry", (error.reason, error.delay), "")
        if isinstance(error, Reject):
            return cls("Reject", (error.reason,), "")
        return cls(type(error).__name__, (str(error),), "".join(traceback.format_exception(error)))


def _revive(outcome: bytes | _Died) -> Any:
    if isinstance(outcome, bytes):
        return ForkingPickler.loads(outcome)
    if outcome.kind == "Retry":
        return Retry(outcome.arguments[0], delay=outcome.arguments[1])
    if outcome.kind == "Reject":
        return Reject(outcome.arguments[0])
    error = HandlerError(f"{outcome.kind}: {outcome.arguments[0]}")
    error.__notes__ = [outcome.text]
    return error


def _name(handler: Handler) -> str:
    return getattr(handler, "__name__", type(handler).__name__)
