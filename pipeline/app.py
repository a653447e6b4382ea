"""The Pipeline: one name, one Redis, and the verbs publish, request, watch and serve."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import signal
import socket
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from datetime import datetime
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from .batching import Batch
from .blocking import BlockingPipeline
from .channel import Channel, check_name
from .deadletters import DeadLetter, dead_channel, fits
from .errors import ConfigurationError, FrameError, PipelineError, UnknownChannel
from .executors import RunIn
from .frame import Codec, Frame, holds
from .ledger import Ledger, ledger_channel
from .lifecycle import drain, first_failure, on_signals, run, settle_memory, unless
from .message import Message, Receipt
from .metrics import GroupMetrics, GroupSample, WorkerSample, metrics_channel
from .middleware import Middleware
from .payloads import Payloads
from .publishing import Outbox, check_delay, check_envelope
from .registry import Registry
from .reporting import Reporter, read_ledger, with_drain
from .requests import Question, Replies
from .retries import RetryPolicy
from .router import Context, Router
from .settings import Settings, settings
from .subscriber import Subscriber, declare
from .transports import Backend, Entry, Retried, Transport
from .transports.client import LinkLost, ReplyError
from .watching import Beginning, Since, Watch, before, position

__all__ = ["Pipeline"]

logger = logging.getLogger("pipeline")

T = TypeVar("T")
Handler = TypeVar("Handler", bound=Callable[..., Any])
Hook = Callable[[], Awaitable[None]]

LEDGER_SPAN = 1.0
"""Seconds at least over which rates are taken between two ledgers."""
SETTLED_AT_ONCE = 64
"""Dead letters under way to Redis together."""
QUIET = 5.0
"""Seconds without a frame after which a channel that lost its end (it was flushed meanwhile) counts as read."""
STEP = 8
"""Frames that are read at once on the way back from the end of a channel."""
OPEN_PATIENCE = 3.0
"""Seconds `async with app` waits for a Redis before it says that there is none. `serve` waits for ever."""


class Pipeline:
    """An app: declares subscribers, publishes, requests, watches.

    name         of the app, in events and statistics
    url          redis://, rediss://, unix:// or memory://; else PIPELINE_REDIS_URL, else redis://127.0.0.1:6379/0
    middleware   functions from handler to handler, the first outermost
    live_client  who carries Pub/Sub: "redis", or "asyncio-redis"

    Used as `async with app:`, or through `serve`, `run` and `blocking`, which open and close it themselves.
    """

    def __init__(
        self,
        name: str,
        url: str | None = None,
        *,
        middleware: Sequence[Middleware] = (),
        live_client: Literal["redis", "asyncio-redis"] = "redis",
    ) -> None:
        self.name = check_name("pipeline", name)
        self.settings: Settings = settings()
        self.url = url or self.settings.redis_url
        self._identify()
        self.subscribers: list[Subscriber] = []
        self._ready, self._joining = asyncio.Event(), asyncio.Event()
        self._middleware = list(middleware)
        self._live_client = live_client
        self._hooks: list[Hook] = []
        self._stop_hooks: list[Hook] = []
        self._codecs: dict[Channel[Any], Codec[Any]] = {}
        self._outboxes: dict[tuple[Channel[Any], int], Outbox] = {}
        self._turns: dict[Channel[Any], int] = {}
        self._routers: list[tuple[Router, GroupMetrics]] = []
        self._spawned: set[asyncio.Task[Any]] = set()
        self._backend: Backend | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._gate = asyncio.Lock()
        """Openings and closings come one after the other: the backend is made, and closed, once."""
        self._closing: set[asyncio.Task[None]] = set()
        self._registry: Registry | None = None
        self._replies: Replies | None = None
        self._payloads: Payloads | None = None
        self._reporter: Reporter | None = None
        self._reporting: asyncio.Task[None] | None = None
        self._ledger: Ledger | None = None
        self._opened = 0
        self._opened_by = os.getpid()
        """The process; 0 once it has opened this: who opens it next is somebody else."""
        self._process = 0
        """That has opened the backend."""
        self._stop: asyncio.Event | None = None

    def _identify(self) -> None:
        """Sequences begin at 1 with each opening, and in each process that was forked: ids must not come again."""
        self.source = f"{self.name}.{secrets.token_hex(4)}"
        """Who events published by this process are from; ids are `source:sequence`."""
        self.consumer = f"{socket.gethostname()}-{os.getpid()}-{self.source}"

    # -- declare -------------------------------------------------------------------------------------------------

    def subscriber(
        self,
        channel: Channel[Any],
        *,
        group: str,
        publishes: Channel[Any] | Sequence[Channel[Any]] | None = None,
        batch: Batch | None = None,
        concurrency: int = 1,
        retry: RetryPolicy = RetryPolicy(),  # noqa: B008  # immutable
        lease: float = 15.0,
        run_in: RunIn | None = None,
        ordered: bool = False,
        start: Literal["oldest", "latest"] = "oldest",
    ) -> Callable[[Handler], Handler]:
        """Declare a handler of a channel's events. The function itself is returned unchanged.

        The handler takes one event (or a Message, if so annotated), or with `batch=` a list of them, and returns what
        is to be published: nothing, an event, or a list of events; with `batch=` a list with one such result an event,
        in order. Return acknowledges; `raise Retry`, `raise Reject`, or any other exception (see RetryPolicy) do not.

        publishes    one channel, or several, chosen by the type of what is returned
        concurrency  calls at the same time in this process
        lease        seconds after which other workers take over, should this process die; renewed while it lives
        run_in       "loop" (async def), "thread" (def), "process" (def at the top of a module; for what holds the GIL)
        ordered      events of one key one after the other, retries in place
        start        where a new group begins
        """

        def decorate(handler: Handler) -> Handler:
            subscriber = declare(
                handler,
                channel,
                group=group,
                publishes=publishes,
                batch=batch,
                concurrency=concurrency,
                retry=retry,
                lease=lease,
                run_in=run_in,
                ordered=ordered,
                start=start,
            )
            for other in self.subscribers:
                if (other.channel.name, other.group) == (channel.name, group):
                    raise ConfigurationError(
                        f"group {group!r} of channel {channel.name!r} has a handler in this app already; a group "
                        "shares its channel's work, so give the second handler a group of its own"
                    )
            self.subscribers.append(subscriber)
            return handler

        return decorate

    def on_start(self, hook: Hook) -> Hook:
        """Declare an async function that `serve` awaits before the first event is handled."""
        self._hooks.append(hook)
        return hook

    def on_stop(self, hook: Hook) -> Hook:
        """Declare an async function that `serve` awaits when it begins to drain: let go of what handlers wait for."""
        self._stop_hooks.append(hook)
        return hook

    def spawn(self, work: Coroutine[Any, Any, T], *, name: str | None = None) -> asyncio.Task[T]:
        """Run a background task that is cancelled and awaited when the app stops. Its failure is logged."""
        task = asyncio.create_task(work, name=name)
        self._spawned.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._spawned.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("background task %s failed", task.get_name(), exc_info=error)

    @property
    def ready(self) -> asyncio.Event:
        """Set while `serve` runs and every subscriber has joined its group."""
        self._belong()
        return self._ready

    def _belong(self) -> None:
        """While it is not open it is whatever loop's that uses it: what waits in one serves no other."""
        loop = _running_loop()
        if loop in (self._loop, None) or self._opened or self._gate.locked():
            return
        self._loop, self._gate = loop, asyncio.Lock()
        self._ready, self._joining = asyncio.Event(), asyncio.Event()

    # -- open and close ------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Pipeline:
        await self._open(OPEN_PATIENCE)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def _open(self, patience: float | None) -> None:
        self._belong()
        if self._loop is not asyncio.get_running_loop():
            raise self._elsewhere()
        async with self._gate:
            if self._backend is None:
                await self._connect(patience)
            self._opened += 1

    async def _connect(self, patience: float | None) -> None:
        backend = self._make_backend()
        try:
            await backend.open(patience)
        except BaseException:
            await backend.close()
            raise
        if self._opened_by != os.getpid():
            self._identify()
        self._opened_by, self._process = 0, os.getpid()
        self._backend = backend
        self._registry = Registry(backend)
        self._payloads = Payloads(
            backend.payloads, self.settings.payloads, self.settings.inline_bytes, self.settings.max_frame_bytes,
            self.settings.shm_bytes, self.settings.shm_dir,
        )  # fmt: skip
        self._replies = Replies(backend, self._payloads, self.source)
        self._reporter = Reporter(
            self.name, self.consumer, self.settings.metrics_interval,
            lambda: self._routers, self._take_published, self._report, self._report_ledger,
        )  # fmt: skip
        self._reporting = asyncio.create_task(self._reporter.run(), name="reporter")

    async def _close(self) -> None:
        """Who is cancelled meanwhile does not wait for the rest, but that is closed, too."""
        if self._process != os.getpid():
            return  # forked within the block: connections, memory and what is under way are the parent's
        self._opened -= 1
        closing = asyncio.create_task(self._disconnect(), name=f"close {self.name}")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        await asyncio.shield(closing)

    async def _disconnect(self) -> None:
        async with self._gate:
            if self._opened or self._backend is None:
                return
            backend = self._backend
            try:
                await self._finish()
            finally:
                self._routers.clear()
                self._outboxes.clear()
                self._backend = self._registry = self._replies = self._payloads = None
                await backend.close()

    async def _finish(self) -> None:
        """All that needs the backend yet."""
        for task in list(self._spawned):
            task.cancel()
        await asyncio.gather(*self._spawned, return_exceptions=True)
        if self._reporting is not None:
            self._reporting.cancel()
            await asyncio.gather(self._reporting, return_exceptions=True)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(2):
                await asyncio.gather(*(outbox.drain() for outbox in self._outboxes.values()))
                await self._send_last_report()
        if self._replies is not None:
            await self._replies.close()
        if self._payloads is not None:
            await self._payloads.close()

    def _make_backend(self) -> Backend:
        if self.url.startswith("memory:"):
            from .transports.memory import MemoryBackend  # most apps never need it

            return MemoryBackend.at(self.url)
        from .transports.redis import RedisBackend

        return RedisBackend(self.url, f"pipeline-{self.name}", self._live_client, self.settings.group_expires)

    def _need_backend(self) -> Backend:
        """For a verb, in the loop that it is called in."""
        backend = self.backend
        if _running_loop() not in (self._loop, None):
            raise self._elsewhere()
        return backend

    def _elsewhere(self) -> ConfigurationError:
        return ConfigurationError(
            f"pipeline {self.name!r} is open in another event loop: use it there, or make one more for this loop"
        )

    @property
    def backend(self) -> Backend:
        """For tools: the open backend. Raises ConfigurationError when the pipeline is not open."""
        if self._backend is None:
            raise ConfigurationError(
                f"pipeline {self.name!r} is not open; use `async with app:` (or `with app.blocking()`)"
            )
        return self._backend

    @property
    def connected(self) -> bool:
        """Whether it is open, and Redis was there when it was last needed."""
        return self._backend is not None and self._backend.connected

    @property
    def registry(self) -> Registry:
        """What channels there are. Raises ConfigurationError when the pipeline is not open."""
        self._need_backend()
        assert self._registry is not None
        return self._registry

    @property
    def payloads(self) -> Payloads:
        """How big tensors travel, for any thread. Raises ConfigurationError when the pipeline is not open."""
        assert self.backend
        assert self._payloads is not None
        return self._payloads

    def codec(self, channel: Channel[Any]) -> Codec[Any]:
        """How a channel's frames are written and read."""
        codec = self._codecs.get(channel)
        if codec is None:
            if not isinstance(channel, Channel):
                raise ConfigurationError(f"{channel!r} is not a Channel")
            codec = self._codecs[channel] = Codec(channel)
        return codec

    def _transport(self, channel: Channel[Any]) -> Transport:
        backend = self._need_backend()
        return backend.durable if channel.durable else backend.live

    # -- publish and request -------------------------------------------------------------------------------------

    async def publish(
        self,
        channel: Channel[T],
        event: T | Sequence[T],
        *,
        key: str | None = None,
        delay: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Receipt:
        """Publish one event, or a list of them in as few frames as their channel allows. Resolves when Redis has them.

        key      orders events of one key (with `ordered=True`), and chooses the partition
        delay    seconds before any handler sees them (durable channels, and live ones while a subscriber lives)
        headers  strings that travel along; a handler's outputs take over `traceparent` and `tracestate`

        Raises ConfigurationError when these cannot travel; EventTypeError, PayloadTooLarge, ChannelFull,
        ServerUnavailable, PublishUncertain.
        """
        events = list(event) if isinstance(event, (list, tuple)) else [event]
        if not events:
            return Receipt(())
        if not isinstance(channel, Channel):
            raise ConfigurationError(f"publish(channel, event): {channel!r} is not a Channel")
        return await self._publish(channel, events, key=key, due=check_delay(delay), headers=headers, reply=None)

    async def _publish(
        self,
        channel: Channel[Any],
        events: list[Any],
        *,
        key: str | None,
        due: float | None,
        headers: Mapping[str, str] | None,
        reply: str | None,
    ) -> Receipt:
        if asyncio.get_running_loop() is not self._loop:
            self._need_backend()  # before anything is handed over: it would be written, and its caller never hear of it
        if key is not None or headers:
            check_envelope(key, headers)
        if channel.partitions == 1 or key is not None:
            outbox = self._outboxes.get((channel, channel.partition(key))) or await self._outbox(channel, key)
            return await outbox.publish(events, key=key, headers=headers, due=due, reply=reply)
        outbox = await self._outbox(channel, None, self._turn(channel))
        return await outbox.publish(events, key=None, headers=headers, due=due, reply=reply)

    def _turn(self, channel: Channel[Any]) -> int:
        turn = self._turns[channel] = self._turns.get(channel, 0) + 1
        return turn

    async def _outbox(self, channel: Channel[Any], key: str | None, turn: int = 0) -> Outbox:
        partition = channel.partition(key, turn)
        outbox = self._outboxes.get((channel, partition))
        if outbox is None:
            codec = self.codec(channel)
            await self.registry.register(channel, codec)
            outbox = self._outboxes.get((channel, partition)) or self._open_outbox(channel, partition, codec)
        return outbox

    def _open_outbox(self, channel: Channel[Any], partition: int, codec: Codec[Any]) -> Outbox:
        """Channels of one name, declared more than once, number their events each from a source of its own."""
        others = sum((other.name, part) == (channel.name, partition) for other, part in self._outboxes)
        source, limit = f"{self.source}~{others}" if others else self.source, self.settings.max_frame_bytes
        outbox = Outbox(channel, partition, codec, self._transport(channel), self.payloads, source, limit)
        self._outboxes[channel, partition] = outbox
        return outbox

    async def request(
        self,
        channel: Channel[Any],
        event: Any,
        *,
        timeout: float = 5.0,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        """Publish an event and wait for the subscriber's returned event, of the channel's `reply` type.

        The answer is part of the subscriber's commit; the first group's answer wins. `timeout` is in seconds.
        Raises RequestTimeout; RequestFailed when the event was rejected, died, or None was returned; and what `publish`
        raises.
        """
        return await self.ask(channel, event, timeout=timeout, key=key, headers=headers)

    def ask(
        self,
        channel: Channel[Any],
        event: Any,
        *,
        timeout: float = 5.0,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> asyncio.Future[Any]:
        """`request` without awaiting it: a future, to be awaited, given a callback, or cancelled. For what asks often:
        no coroutine waits with it, and all that is asked in one turn of the event loop travels together.
        """
        self._need_backend()
        assert self._replies is not None
        self.codec(channel).check([event])
        if key is not None or headers:
            check_envelope(key, headers)
        question = self._replies.question(channel, timeout)
        reply = self._replies.address(channel)
        outbox = self._outboxes.get((channel, channel.partition(key))) if channel.partitions == 1 or key else None
        if outbox is not None:
            outbox.put(event, question, key=key, headers=headers, reply=reply)
        else:
            self.spawn(self._put(channel, event, question, key, headers, reply), name="ask")
        return question

    async def _put(
        self,
        channel: Channel[Any],
        event: Any,
        question: Question,
        key: str | None,
        headers: Mapping[str, str] | None,
        reply: str,
    ) -> None:
        """Where the channel is new to this process, or has partitions to choose from."""
        try:
            outbox = await self._outbox(channel, key, self._turn(channel))
            outbox.put(event, question, key=key, headers=headers, reply=reply)
        except Exception as error:
            question.failed(error)

    def empty(self, shape: int | Sequence[int], dtype: Any = "float32") -> npt.NDArray[Any]:
        """A writable array of undefined values, where readers on this host find it: to publish an event, or to answer
        with one, whose first tensor it is (and whole) copies nothing.

        To be filled, sent once, and then left as it is: readers see later changes. It is ordinary memory, which is
        copied, below `PIPELINE_INLINE_BYTES`, before this process has sent or read its first big tensor, and where no
        memory can be shared. May be called in any thread while the pipeline is open.
        """
        kind = np.dtype(dtype)
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        nbytes = math.prod(sizes) * kind.itemsize
        found: npt.NDArray[Any] = self.payloads.empty(nbytes).view(kind).reshape(sizes)
        return found

    # -- watch ---------------------------------------------------------------------------------------------------

    def watch(self, channel: Channel[T], since: Since = None, *, declare: bool = True) -> Watch[T]:
        """Read a channel beside its groups, from now, or on durable channels from `since`: "5m", seconds, a datetime,
        or a message id (which is left out; when the channel keeps it no more, all that it does keep comes). Listening
        begins when the context is entered. `declare=False` is for tools that only guess what a channel is.

        Raises ConfigurationError; on entry ChannelConflict, and ServerUnavailable.
        """
        codec = self.codec(channel)
        at = None if since is None else position(since)
        if since is not None and not channel.durable:
            raise ConfigurationError(f"channel {channel.name!r} is live: it has no past to watch since={since!r}")
        transport = self.backend.durable if channel.durable else self.backend.live

        async def begin() -> Beginning:
            self._need_backend()
            if declare:
                await self.registry.register(channel, codec)
            else:
                await self.registry.check(channel)
            if codec.tensors:
                await self.payloads.announce(channel, watched=True)
            if since is None or at is not None:
                return Beginning([at] * channel.partitions)
            positions = await self._before_message(channel, str(since))
            if positions is not None:
                return Beginning(positions, str(since))
            logger.warning("channel %r keeps no message %s any more; all that it keeps follows", channel.name, since)
            return Beginning(["0-0"] * channel.partitions)

        return Watch(channel, codec, transport, self.payloads, begin)

    async def kept(self, channel: Channel[T]) -> AsyncIterator[Message[T]]:
        """What a durable channel holds at this moment, partition after partition, the oldest first; then it ends."""
        codec = self.codec(channel)
        for partition in range(channel.partitions):
            async for entry in self._held(channel, partition):
                for message in _messages(await self._decode(channel, partition, codec, entry)):
                    yield message

    async def newest(self, channel: Channel[T], count: int) -> list[Message[T]]:
        """The newest messages that a durable channel keeps, at most so many, the newest first. It reads backwards, so
        a long channel takes no longer than a short one.

        Raises ConfigurationError, ChannelConflict, ServerUnavailable."""
        if not channel.durable:
            raise ConfigurationError(f"channel {channel.name!r} is live: it keeps nothing; watch it instead")
        codec = self.codec(channel)
        await self.registry.check(channel)
        if codec.tensors:
            await self.payloads.announce(channel, watched=True)
        found: list[tuple[int, Message[T]]] = []
        """With the server's time, by which partitions are merged."""
        for partition in range(channel.partitions):
            below: str | None = None
            wanted = count
            while wanted > 0 and (entries := await self._need_backend().newest(channel.name, partition, STEP, below)):
                below = entries[-1].id
                for entry in entries:
                    messages = _messages(await self._decode(channel, partition, codec, entry))
                    moment = int(entry.id.partition("-")[0])
                    found += [(moment, message) for message in messages[::-1]]
                    wanted -= len(messages)
                    if wanted <= 0:
                        break
        found.sort(key=lambda one: -one[0])
        return [message for _, message in found[:count]]

    async def _decode(self, channel: Channel[T], partition: int, codec: Codec[T], entry: Entry) -> Frame[T] | None:
        try:
            beside = await self.payloads.open(channel, partition, entry.body)
            return codec.decode(entry.body, count=entry.count, position=entry.position, beside=beside)
        except FrameError as error:
            logger.warning("channel %r: a frame cannot be read and is left out: %s", channel.name, error)
            return None

    # -- serve ---------------------------------------------------------------------------------------------------

    async def serve(self, stop: asyncio.Event | None = None) -> None:
        """Run this app's subscribers until `stop` is set, or the task is cancelled; then drain. Waits for Redis."""
        if not self.subscribers and not self._hooks:
            raise ConfigurationError(f"pipeline {self.name!r} declares no subscriber, so there is nothing to serve")
        self._stop = stop = stop or asyncio.Event()
        opened = False

        async def start() -> None:
            nonlocal opened
            await self._open(None)
            opened = True
            await self._start()

        try:
            if await unless(stop, start()):
                self._ready.set()
                tasks = [task for router, _ in self._routers for task in router.tasks()]
                await first_failure(tasks, stop)
        finally:
            if opened:
                self._ready.clear()
                self._joining.clear()
                self._stop = None
                await self._wind_up()

    async def _wind_up(self) -> None:
        """Each step, whatever becomes of those before it; then the first failure."""

        async def let_go() -> None:
            await drain([router for router, _ in self._routers], self.settings.drain_seconds)

        failures = []
        for step in (*self._stop_hooks, let_go, self._close):
            try:
                await step()
            except Exception as error:
                name = getattr(step, "__qualname__", step)
                logger.error("pipeline %r stops, though %s failed", self.name, name, exc_info=error)
                failures.append(error)
        if failures:
            raise failures[0]

    def stop(self) -> None:
        """Let `serve` drain and return."""
        if self._stop is not None:
            self._stop.set()

    async def _start(self) -> None:
        for subscriber in self.subscribers:
            for channel in (subscriber.channel, *subscriber.publishes, dead_channel(subscriber.channel.name)):
                await self.registry.register(channel, self.codec(channel))
        for hook in self._hooks:
            await hook()
        self._joining.set()
        self._routers.clear()  # of a `serve` before, while the app stayed open
        for subscriber in self.subscribers:
            metrics = GroupMetrics()
            context = Context(
                transport=self._transport,
                codec=self.codec,
                source=self.source,
                consumer=self.consumer,
                payloads=self.payloads,
                prefetch_bytes=self.settings.prefetch_bytes,
                subscribers=self.subscribers,
                middleware=self._middleware,
                metrics=metrics,
            )
            router = Router(subscriber, context)
            self._routers.append((router, metrics))
            await router.start()
        logger.info("%s serves %s", self.name, ", ".join(f"{s.channel.name} ({s.group})" for s in self.subscribers))

    def run(self) -> None:
        """`serve`, in the foreground: SIGTERM and SIGINT drain, a second one stops now. See lifecycle."""

        async def main() -> None:
            self._belong()
            stop = asyncio.Event()
            serving = asyncio.create_task(self.serve(stop))
            joining = asyncio.create_task(self._joining.wait())
            await asyncio.wait({serving, joining}, return_when=asyncio.FIRST_COMPLETED)
            joining.cancel()
            restore = on_signals(stop, serving.cancel)
            settling = asyncio.create_task(self._settle_memory())
            try:
                with contextlib.suppress(asyncio.CancelledError):
                    await serving
            finally:
                settling.cancel()
                restore()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        run(main())

    async def _settle_memory(self) -> None:
        await self.ready.wait()
        settle_memory()

    def blocking(self) -> BlockingPipeline:
        """The same verbs for scripts and notebooks: `with app.blocking() as pipe: pipe.publish(…)`."""
        return BlockingPipeline(self)

    # -- look after ----------------------------------------------------------------------------------------------

    async def stats(self) -> Ledger:
        """The ledger of every registered channel, walked now. The second one knows how long backlogs will take."""
        ledger = with_drain(await read_ledger(self._need_backend(), self.registry), self._ledger)
        if self._ledger is None or ledger.time - self._ledger.time >= LEDGER_SPAN:
            self._ledger = ledger
        return ledger

    async def dead_letters(
        self,
        channel: str,
        group: str | None = None,
        *,
        ids: Collection[str] | None = None,
        reason: str | None = None,
    ) -> list[Message[DeadLetter]]:
        """Dead letters of a channel that were neither replayed nor dropped, oldest first: all, or those of a group,
        with one of `ids`, with `reason` in their own."""
        found: list[Message[DeadLetter]] = []
        settled: dict[tuple[int, str], set[str]] = {}
        async for message in self.kept(dead_channel(channel)):
            if not fits(message, group, ids, reason):
                continue
            where = (message.event.partition, message.event.group)
            if where not in settled:
                settled[where] = await self._need_backend().settled_letters(channel, *where)
            if message.id not in settled[where]:
                found.append(message)
        return found

    async def settle_dead(self, letters: Iterable[Message[DeadLetter]], *, replay: bool) -> int:
        """Replay dead letters (to their own group alone, with their own ids) or drop them. Each once, however often
        it is asked. Returns how many this call settled. Raises ConfigurationError for replays on a live channel."""
        backend, waiting, settled = self._need_backend(), list(letters), 0
        if replay:
            records = await self.registry.records()
            for name in {message.event.channel for message in waiting}:
                if name in records and not records[name].durable:
                    raise ConfigurationError(
                        f"channel {name!r} is live: nothing waits there, so its dead letters cannot be replayed; "
                        "publish their events again, or drop them"
                    )

        async def settle(message: Message[DeadLetter]) -> bool:
            letter = message.event
            again = Retried(0.0, letter.original, letter.count, origin=letter.origin) if replay else None
            ttl = dead_channel(letter.channel).keep * 2
            return await backend.settle_letter(letter.channel, letter.partition, letter.group, message.id, again, ttl)

        for at in range(0, len(waiting), SETTLED_AT_ONCE):
            settled += sum(await asyncio.gather(*map(settle, waiting[at : at + SETTLED_AT_ONCE])))
        return settled

    async def pause(self, channel: str, group: str) -> bool:
        """Let all workers of a group, also those that start later, read nothing more; what they hold they finish.

        They notice within 0.1 s. It lasts until `resume`, whatever is restarted. Returns False when it was paused
        already. Raises UnknownChannel; ConfigurationError for a group there is not, or of a live channel.
        """
        return await self._set_paused(channel, group, True)

    async def resume(self, channel: str, group: str) -> bool:
        """Let a paused group go on. Returns False when it was not paused. Raises as `pause` does."""
        return await self._set_paused(channel, group, False)

    async def _set_paused(self, channel: str, group: str, paused: bool) -> bool:
        record = await self.registry.record(channel)
        if not record.durable:
            raise ConfigurationError(
                f"channel {channel!r} is live: nothing waits there, so its groups cannot be paused; stop their workers"
            )
        changed = [
            await self._need_backend().pause(channel, partition, group, paused)
            for partition in range(int(record.limits["partitions"]))
        ]
        return any(changed)

    async def rewind(self, channel: str, group: str, since: str | float | datetime) -> int:
        """Let a group read again what was published since a time, or since a message (from its frame on; what lies in
        other partitions, from its time on).

        Returns the events now unread. Raises UnknownChannel, ConfigurationError.
        """
        record = await self.registry.record(channel)
        if not record.durable:
            raise UnknownChannel(f"channel {channel!r} is live: it keeps nothing to replay")
        at = position(since)
        view = record.channel()
        positions = [at] * view.partitions if at else await self._before_message(view, str(since))
        if positions is None:
            raise ConfigurationError(
                f"channel {channel!r} keeps no message {since!r} (it keeps them for {view.keep:g} s); give a time"
            )
        unread = 0
        for partition, start in enumerate(positions):
            unread += await self._need_backend().rewind(channel, partition, group, start)
        return unread

    async def _before_message(self, channel: Channel[Any], id_: str) -> list[str] | None:
        """The position in each partition before the frame that holds a message, or before its time; None: not kept."""
        for partition in range(channel.partitions):
            async with contextlib.aclosing(self._held(channel, partition)) as entries:
                async for entry in entries:
                    try:
                        if not holds(entry.body, entry.count, entry.position, id_):
                            continue
                    except FrameError:
                        continue
                    moment = entry.id.partition("-")[0]
                    positions = [f"{moment}-0"] * channel.partitions
                    positions[partition] = before(entry.id)
                    return positions
        return None

    async def _held(self, channel: Channel[Any], partition: int) -> AsyncGenerator[Entry]:
        """The frames that a durable channel holds at this moment, the oldest first, however long reading takes."""
        backend = self._need_backend()
        _, stats = await backend.ledger({channel.name: (True, channel.partitions)})
        here = stats[channel.name][partition]
        if not here.entries:
            return
        tail = await backend.durable.tail(channel, partition, "0-0")
        try:
            async for entry in until_quiet(tail):
                yield entry
                if (entry.position or 0) >= here.published:
                    return
        finally:
            await tail.close()

    # -- report --------------------------------------------------------------------------------------------------

    def _take_published(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for (channel, _), outbox in self._outboxes.items():
            if outbox.published and channel not in (metrics_channel, ledger_channel):
                counts[channel.name] = counts.get(channel.name, 0) + outbox.published
                outbox.published = 0
        return counts

    async def _report(self, sample: WorkerSample) -> None:
        await self.publish(metrics_channel, sample)
        for group in sample.groups:
            if group.dropped:
                await self._count_dropped(group)

    async def _count_dropped(self, group: GroupSample) -> None:
        with contextlib.suppress(PipelineError, LinkLost, ReplyError):  # the sample is sent, and must not be again
            await self._need_backend().dropped(group.channel, group.group, group.dropped)

    async def _report_ledger(self) -> None:
        interval = self.settings.metrics_interval
        await self.registry.keep()
        if await self._need_backend().turn("ledger", self.consumer, interval * 0.9):
            await self.publish(ledger_channel, await self.stats())

    async def _send_last_report(self) -> None:
        """Who has reported, or did something worth it, says that this was the last of it."""
        reporter = self._reporter
        worth_it = self._routers or any(outbox.published for outbox in self._outboxes.values())
        if reporter is not None and (reporter.reported or worth_it):
            await self._report(reporter.sample(last=True))


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _messages(frame: Frame[T] | None) -> list[Message[T]]:
    """The valid ones; none of a frame that could not be read."""
    if frame is None:
        return []
    return [frame.message(index) for index in range(len(frame.events)) if index not in frame.invalid]


async def until_quiet(stream: AsyncIterable[T]) -> AsyncIterator[T]:
    """Items until none comes for a moment."""
    items = aiter(stream)
    while True:
        try:
            async with asyncio.timeout(QUIET):
                item = await anext(items)
        except (TimeoutError, StopAsyncIteration):
            return
        yield item
