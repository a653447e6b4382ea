"""The same verbs without async: an event loop in a thread, for scripts, notebooks and training loops."""

from __future__ import annotations

import asyncio
import contextlib
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

    def __enter__(self) -> BlockingPipeline:
        if self._thread is not None:
            raise ConfigurationError(f"pipeline {self._app.name!r} is open already; use app.blocking() once more")
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=f"pipeline-{self._app.name}", daemon=True)
        self._thread.start()
        try:
            self.call(self._app.__aenter__())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.call(self._app.__aexit__())
        finally:
            self._end()

    def _end(self) -> None:
        assert self._thread is not None
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)
        self._thread = None
        self.loop.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the pipeline's loop and wait for it."""
        if self._thread is None:
            work.close()
            raise ConfigurationError(f"pipeline {self._app.name!r} is not open; use `with app.blocking() as pipe:`")
        if threading.current_thread() is self._thread:
            work.close()
            raise PipelineError("a blocking verb was called on the pipeline's own loop; use the async one there")
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
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


class BlockingWatch(Generic[T]):
    def __init__(self, pipe: BlockingPipeline, watch: Watch[T]) -> None:
        self._pipe = pipe
        self._watch = watch

    def __enter__(self) -> BlockingWatch[T]:
        self._pipe.call(self._watch.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
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
