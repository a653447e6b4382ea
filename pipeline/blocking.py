"""The same verbs without async: an event loop in a thread, for scripts, notebooks and training loops."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy.typing as npt

from .channel import Channel
from .errors import ConfigurationError, PipelineError
from .message import Message, Receipt
from .watching import Since, Watch

if TYPE_CHECKING:
    from .app import Pipeline
    from .ledger import Ledger

__all__ = ["BlockingPipeline", "BlockingWatch"]

T = TypeVar("T")


class BlockingPipeline:
    """`with app.blocking() as pipe:` — publish, request, watch, newest and stats, from any thread."""

    def __init__(self, app: Pipeline) -> None:
        self._app = app
        self.loop: asyncio.AbstractEventLoop
        """The pipeline's, in a thread of its own, while it is open."""
        self._thread: threading.Thread | None = None
        self._process = 0
        self._mutex = threading.Lock()
        """What is asked of the loop is asked before it is told to stop, or not at all."""
        self._watches: set[BlockingWatch[Any]] = set()

    def __enter__(self) -> BlockingPipeline:
        if self._thread is not None:
            raise ConfigurationError(f"pipeline {self._app.name!r} is open already; use app.blocking() once more")
        self.loop = asyncio.new_event_loop()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name=f"pipeline-{self._app.name}", daemon=True)
        self._thread.start()
        try:
            self.call(self._app.__aenter__())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_inherited():
            return  # the block ends in its parent, too
        try:
            for watch in list(self._watches):
                watch.__exit__()
            self.call(self._app.__aexit__())
        finally:
            self._end()

    def _run(self) -> None:
        """In the thread: whoever waits for something as the loop stops finds it cancelled."""
        try:
            self.loop.run_forever()
            self.loop.run_until_complete(_cancel_others())
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            self.loop.close()

    def _end(self) -> None:
        with self._mutex:
            thread, self._thread = self._thread, None
            assert thread is not None
            self.loop.call_soon_threadsafe(self.loop.stop)
        thread.join(5)

    def _is_inherited(self) -> bool:
        """This process was forked, and threads are not: nothing here would ever answer."""
        return self._thread is not None and self._process != os.getpid()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the pipeline's loop and wait for it."""
        future = self._ask(work)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise PipelineError(f"pipeline {self._app.name!r} was closed meanwhile") from None
        except BaseException:
            future.cancel()
            raise

    def _ask(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        try:
            if self._is_inherited():
                raise ConfigurationError(
                    f"pipeline {self._app.name!r} was opened before this process was forked; make one of its own here"
                )
            with self._mutex:
                if self._thread is None:
                    raise ConfigurationError(
                        f"pipeline {self._app.name!r} is not open; use `with app.blocking() as pipe:`"
                    )
                if threading.current_thread() is self._thread:
                    raise PipelineError(
                        "a blocking verb was called on the pipeline's own loop; use the async one there"
                    )
                return asyncio.run_coroutine_threadsafe(work, self.loop)
        except PipelineError:
            work.close()
            raise

    def publish(
        self,
        channel: Channel[T],
        event: T | Sequence[T],
        *,
        key: str | None = None,
        delay: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Receipt:
        """See Pipeline.publish."""
        return self.call(self._app.publish(channel, event, key=key, delay=delay, headers=headers))

    def request(self, channel: Channel[Any], event: Any, *, timeout: float = 5.0, key: str | None = None) -> Any:
        """See Pipeline.request."""
        return self.call(self._app.request(channel, event, timeout=timeout, key=key))

    def empty(self, shape: int | Sequence[int], dtype: Any = "float32") -> npt.NDArray[Any]:
        """See Pipeline.empty."""
        return self._app.empty(shape, dtype)

    def watch(self, channel: Channel[T], since: Since = None) -> BlockingWatch[T]:
        """`with pipe.watch(channel) as stream: for message in stream:`. See Pipeline.watch."""
        return BlockingWatch(self, self._app.watch(channel, since))

    def newest(self, channel: Channel[T], count: int) -> list[Message[T]]:
        """See Pipeline.newest."""
        return self.call(self._app.newest(channel, count))

    def stats(self) -> Ledger:
        """See Pipeline.stats."""
        return self.call(self._app.stats())


async def _cancel_others() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class BlockingWatch(Generic[T]):
    def __init__(self, pipe: BlockingPipeline, watch: Watch[T]) -> None:
        self._pipe = pipe
        self._watch = watch

    def __enter__(self) -> BlockingWatch[T]:
        self._pipe.call(self._watch.__aenter__())
        self._pipe._watches.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        """The pipeline's block closes what is left open, too, and whoever waits there finds that there is no more."""
        if self in self._pipe._watches and not self._pipe._is_inherited():
            self._pipe._watches.discard(self)
            self._pipe.call(self._watch.__aexit__())

    @property
    def dropped(self) -> int:
        return self._watch.dropped

    def __iter__(self) -> Iterator[Message[T]]:
        while (message := self.next()) is not None:
            yield message

    def next(self, timeout: float | None = None) -> Message[T] | None:
        """The next message; None when none came within `timeout` seconds, or there will be no more."""

        async def one() -> Message[T] | None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    return await anext(self._watch, None)
            return None

        return self._pipe.call(one())
