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
from collections.abc import Callable
from concurrent.futures import Executor as PoolExecutor
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing.reduction import ForkingPickler
from types import CoroutineType, GeneratorType
from typing import Any, Literal

from .errors import ConfigurationError, HandlerError, Reject, Retry
from .middleware import Handler, Middleware, wrap

__all__ = ["Executor", "RunIn", "is_async", "make", "never_run", "undone"]

RunIn = Literal["loop", "thread", "process"]

SLICE = 0.002
"""Seconds of handler calls between returns to the event loop."""

Source = deque[Any]
Argument = Callable[[Any], Any]
"""From a queued unit to what the handler is called with."""
Results = list[tuple[Any, Any]]
"""(unit, what the handler returned or the exception it raised)"""


class Executor:
    async def each(self, source: Source, argument: Argument, results: Results) -> None:
        """Call the handler for units of `source`, one at a time, for a slice of time; `results` grow as it goes."""
        raise NotImplementedError

    async def once(self, argument: Any) -> Any:
        """Call the handler with one argument (a batch). Raises what it raises."""
        results: Results = []
        await self.each(deque([argument]), lambda unit: unit, results)
        outcome = results[0][1]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def close(self) -> None:
        """Give back threads or processes."""


def make(handler: Handler, run_in: RunIn, concurrency: int, middleware: list[Middleware]) -> Executor:
    if run_in == "process":
        return _Processes(handler, concurrency, middleware)
    wrapped = wrap(handler, middleware)
    if run_in == "thread":
        return _Threads(wrapped, concurrency)
    return _Loop(wrapped)


def is_async(handler: Handler) -> bool:
    """Whether it is an `async def`, or an object that is called like one."""
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(type(handler).__call__)


def _undone(kind: type) -> bool:
    return hasattr(kind, "__await__") or hasattr(kind, "__anext__") or issubclass(kind, GeneratorType)


undone: Callable[[type], bool] = lru_cache(1024)(_undone)
"""Whether what a handler returned is, by its type, no result but work: a coroutine, a future, or a generator."""


def never_run(result: Any) -> HandlerError:
    """What a handler returned is work that nobody would do: a failure, or its event would pass as handled."""
    if isinstance(result, CoroutineType):
        result.close()
    if hasattr(result, "__await__"):
        what = "nobody awaits it here; make the handler an `async def`, or declare it with run_in='loop'"
    else:
        what = "nobody runs it; return a list instead of `yield`"
    return HandlerError(f"the handler returned a {type(result).__name__}: {what}")


def _cancelled(error: asyncio.CancelledError) -> HandlerError:
    failure = HandlerError("what the handler waited for was cancelled")
    failure.__cause__ = error
    return failure


def _exited(error: SystemExit) -> HandlerError:
    """It is to end its event, not the worker, whose next one would end at the same event."""
    failure = HandlerError(f"the handler called sys.exit({error.code!r})")
    failure.__cause__ = error
    return failure


class _Loop(Executor):
    """`async def` handlers; also plain functions that are too short to be worth a thread."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._async = is_async(handler)

    async def each(self, source: Source, argument: Argument, results: Results) -> None:
        handler, waits = self._handler, self._async
        clock = time.perf_counter
        deadline = clock() + SLICE
        while source:
            unit = source.popleft()
            outcome: Any
            try:
                outcome = handler(argument(unit))
                if waits:
                    outcome = await outcome
                if outcome is not None and undone(type(outcome)):
                    outcome = await _finish(outcome)
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                outcome = _cancelled(error)
            except SystemExit as error:
                outcome = _exited(error)
            except Exception as error:
                outcome = error
            results.append((unit, outcome))
            if clock() > deadline:
                break


async def _finish(result: Any) -> Any:
    """What comes of a coroutine, such as a plain function returns around an `async def`."""
    while hasattr(result, "__await__"):
        result = await result
    if undone(type(result)):
        raise never_run(result)
    return result


class _Threads(Executor):
    def __init__(self, handler: Handler, concurrency: int) -> None:
        if is_async(handler):
            raise ConfigurationError(f"{_name(handler)} is async: it runs in the loop, not in a thread")
        self._handler = handler
        self._pool: PoolExecutor = ThreadPoolExecutor(concurrency, thread_name_prefix=f"handler-{_name(handler)}")

    async def each(self, source: Source, argument: Argument, results: Results) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._pool, _each, source, argument, results, self._handler)

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
            if outcome is not None and undone(type(outcome)):
                outcome = never_run(outcome)
        except asyncio.CancelledError as error:
            outcome = _cancelled(error)
        except SystemExit as error:
            outcome = _exited(error)
        except Exception as error:
            outcome = error
        results.append((unit, outcome))
        if clock() > deadline:
            return


class _Processes(Executor):
    """Spawned processes, for handlers that hold the GIL. A process that dies takes one call with it, not the worker.

    Arguments and results pass through the operating system's pipes between a process and its own children, pickled by
    multiprocessing; nothing of that reaches Redis.
    """

    def __init__(self, handler: Handler, concurrency: int, middleware: list[Middleware]) -> None:
        if is_async(handler):
            raise ConfigurationError(f"{_name(handler)} is async: it cannot run in a process; make it a plain function")
        if "<" in getattr(handler, "__qualname__", "<"):  # <locals>, <lambda>, or an object without a name
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
        outcomes = await self._run([argument(unit) for unit in units])
        self._seconds = max(1e-6, (time.perf_counter() - started) / max(1, len(units)))
        results.extend(zip(units, outcomes, strict=True))

    async def _run(self, arguments: list[Any]) -> list[Any]:
        pool = self._pool
        try:
            outcomes = await asyncio.get_running_loop().run_in_executor(pool, _child_each, arguments)
        except BrokenProcessPool:
            if self._pool is pool:
                pool.shutdown(wait=False)
                self._pool = self._spawn()
            return [HandlerError("the handler's process died while it ran (killed, or out of memory)")] * len(arguments)
        except Exception as error:
            return [HandlerError(f"the event cannot be passed to the handler's process: {error}")] * len(arguments)
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


def _child_one(argument: Any) -> bytes | _Died:
    try:
        result = _child_handler(argument)
        if result is not None and undone(type(result)):
            raise never_run(result)
        return bytes(ForkingPickler.dumps(result))  # here, where what fails has no neighbours
    except asyncio.CancelledError as error:
        return _Died.of(_cancelled(error))
    except SystemExit as error:
        return _Died.of(_exited(error))
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
        try:
            return ForkingPickler.loads(outcome)
        except Exception as broken:  # whatever a class does as it is made anew
            return HandlerError(f"what the handler returned cannot be read back: {type(broken).__name__}: {broken}")
    if outcome.kind == "Retry":
        return Retry(outcome.arguments[0], delay=outcome.arguments[1])
    if outcome.kind == "Reject":
        return Reject(outcome.arguments[0])
    error = HandlerError(f"{outcome.kind}: {outcome.arguments[0]}")
    error.__notes__ = [outcome.text]
    return error


def _name(handler: Handler) -> str:
    return getattr(handler, "__name__", type(handler).__name__)
