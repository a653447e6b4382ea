"""A message's life, from the reader to the commit.

    read → accept (decode, skip what is settled, set aside what is late or poisonous) → queue → call the handler
    → resolve the outcome (outputs, reply, retry, dead letter) → draft → commit → settle

One Router runs one Subscriber in one process. Handlers' outcomes gather while a commit is in flight and go out with the
next one, so commits are few when work is fast and prompt when it is slow.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import zlib
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .batching import columns
from .channel import Channel
from .deadletters import reason_of
from .drafts import Draft, Held, Sequences, Sources, Unit, open_indexes, reply_codec, segments
from .errors import FrameError, HandlerError, PipelineError, Reject, Retry
from .executors import Executor, make, never_run, undone
from .flow import Flow
from .frame import Codec, header_of
from .metrics import GroupMetrics
from .middleware import Middleware
from .payloads import Flight, Payloads
from .subscriber import Subscriber
from .transports import (
    CHANCES,
    SUSPICION,
    Commit,
    Entry,
    Group,
    Holding,
    PayloadExpired,
    Reader,
    Retried,
    Segment,
    Transport,
)
from .transports.client import ReplyError

__all__ = ["Router"]

logger = logging.getLogger("pipeline.router")

MOST_PER_COMMIT = 4096
READER_PATIENCE = 1.0
"""Seconds for which a drain waits for a read to end, and to hand work back."""
LAST_COMMITS = 2.0
"""Seconds that what is done has at least to be committed in a drain."""
HELD_UP = 5.0
"""Seconds for which a full output keeps a group from reading before that is said."""
NOT_WRITTEN = (PipelineError, ValueError, TypeError)
"""What drafting a commit may raise, which talks to nobody: an outcome that cannot be put in bytes."""


class Lane:
    """Events waiting for a handler; one lane for all, or with `ordered=True` one a handler slot."""

    def __init__(self) -> None:
        self.units: deque[Unit] = deque()
        self.arrived = asyncio.Event()
        self.closed = False

    def empty(self) -> list[Unit]:
        """Take out all that no handler has begun. One by one: handlers' threads take some meanwhile."""
        taken = []
        with contextlib.suppress(IndexError):
            while True:
                taken.append(self.units.popleft())
        return taken

    async def available(self) -> bool:
        """Wait for something to do; False when there will be nothing more."""
        while not self.units:
            if self.closed:
                return False
            self.arrived.clear()
            await self.arrived.wait()
        return not self.closed


@dataclass(slots=True)
class Context:
    """What a router needs of its app."""

    transport: Callable[[Channel[Any]], Transport]
    codec: Callable[[Channel[Any]], Codec[Any]]
    source: str
    consumer: str
    payloads: Payloads
    prefetch_bytes: int
    subscribers: Sequence[Subscriber]
    """All of the app."""
    middleware: list[Middleware]
    metrics: GroupMetrics


class Router:
    def __init__(self, subscriber: Subscriber, context: Context) -> None:
        self.subscriber = subscriber
        self.flow = Flow(subscriber.least, context.prefetch_bytes)
        self._context = context
        self._codec = context.codec(subscriber.channel)
        self._executor: Executor = make(
            subscriber.handler, subscriber.run_in, subscriber.concurrency, context.middleware
        )
        self._lanes = [Lane() for _ in range(subscriber.concurrency if subscriber.ordered else 1)]
        self._held: dict[tuple[int, str], Held] = {}
        self._readers: list[Reader] = []
        self._done: list[tuple[Unit, Any]] = []
        self._wake = asyncio.Event()
        self._draining = asyncio.Event()
        self._sequences = Sequences()
        self._bounded = [
            channel
            for channel in subscriber.publishes
            if channel.capacity is not None
            and not channel.drops_oldest
            and not _leads_to(subscriber.channel.name, channel.name, context.subscribers)  # only reading empties it
        ]
        self._full_since: float | None = None
        self._told_of_full = False
        self._tensors = [channel for channel in subscriber.publishes if context.codec(channel).tensors]
        reply = subscriber.channel.reply
        self._tensors_in_answers = reply is not None and reply_codec(reply).tensors
        self._repeats = 0
        """Retries that happened in place, for the next commit to count."""
        self._sources = Sources(f"{subscriber.channel.name}.{subscriber.group}", context.source)
        self._reading: list[asyncio.Task[None]] = []
        self._working: list[asyncio.Task[None]] = []
        self._settling: asyncio.Task[None] | None = None
        self._finishing = False
        """No handler runs any more: settling ends with what there is."""
        self._exclusive = subscriber.ordered and subscriber.channel.partitions > 1
        self._argument: Callable[[Unit], Any] = _message if subscriber.messages else _event

    # -- start and stop ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        subscriber, channel = self.subscriber, self.subscriber.channel
        consumer, lease = self._context.consumer, subscriber.lease
        group = Group(subscriber.group, consumer, lease, subscriber.start, self._exclusive)
        transport = self._context.transport(channel)
        if self._codec.tensors:
            await self._context.payloads.announce(channel)
        for partition in range(channel.partitions):
            self._readers.append(await transport.join(channel, partition, group))
        name = f"{channel.name}/{subscriber.group}"
        self._settling = asyncio.create_task(self._settle(), name=f"settle {name}")
        work = self._work_in_order if subscriber.ordered else self._work
        if subscriber.batch is not None:
            work = self._work_in_batches
        for slot in range(subscriber.concurrency):
            lane = self._lanes[slot % len(self._lanes)]
            self._working.append(asyncio.create_task(work(lane), name=f"work {name}"))
        for partition, reader in enumerate(self._readers):
            self._reading.append(asyncio.create_task(self._read(reader, partition), name=f"read {name}"))

    def tasks(self) -> list[asyncio.Task[None]]:
        """All that run; none of them ends before `drain`, unless something is broken."""
        return [*self._reading, *self._working, *([self._settling] if self._settling else [])]

    def holding(self) -> Holding:
        """What its readers have in hand, together."""
        each = [reader.holding() for reader in self._readers]
        return Holding(
            sum(one.leases for one in each),
            max((one.oldest for one in each), default=0.0),
            any(one.paused for one in each),
        )

    async def stop_reading(self) -> None:
        self._draining.set()
        self.flow.open()
        for reader in self._readers:
            await reader.stop()
        if self._reading:
            _, late = await asyncio.wait(self._reading, timeout=READER_PATIENCE)
            for task in late:  # Redis is gone, and they wait for it
                task.cancel()
            await asyncio.gather(*self._reading, return_exceptions=True)

    async def hand_back(self) -> None:
        """Give unstarted work to others now. Of frames that are partly under way, the rest goes as retries go; but in
        ordered groups, where it follows in `finish`."""
        unstarted: dict[int, list[Unit]] = {}
        for lane in self._lanes:
            lane.closed = True
            for unit in lane.empty():
                unstarted.setdefault(id(unit[0]), []).append(unit)
            lane.arrived.set()
        whole = [units[0][0] for units in unstarted.values() if len(units) == units[0][0].open]
        await self._release(whole)
        if self.subscriber.ordered or not self.subscriber.channel.durable:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(READER_PATIENCE):
                for units in unstarted.values():
                    if units[0][0].open:
                        held = units[0][0]
                        await self._set_apart(held, 0.0, [index for _, index in units], held.entry.deliveries - 1)

    async def finish(self, deadline: float) -> None:
        """Let running handlers end and commit, until `deadline` (loop time); then hand back the rest and close."""
        running = [task for task in self._working if not task.done()]
        if running:
            loop = asyncio.get_running_loop()
            _, late = await asyncio.wait(running, timeout=max(0.0, deadline - loop.time()))
            for task in late:
                logger.warning("%s: a handler did not end in time; its events go to another worker", self._name)
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if self._settling is not None:
            self._finishing = True
            self._wake.set()
            await asyncio.wait(
                [self._settling], timeout=max(LAST_COMMITS, deadline - asyncio.get_running_loop().time())
            )
            self._settling.cancel()
            await asyncio.gather(self._settling, return_exceptions=True)
        with contextlib.suppress(PipelineError, OSError, TimeoutError):
            async with asyncio.timeout(2):
                await self._release(list(self._held.values()))
        self._executor.close()
        await asyncio.gather(*(reader.close() for reader in self._readers))

    async def _release(self, frames: list[Held]) -> None:
        for reader in self._readers:
            entries = [held.entry.id for held in frames if held.reader is reader]
            if entries:
                await reader.release(entries)
        for held in frames:
            self._forget(held, held.open)

    @property
    def _name(self) -> str:
        return f"group {self.subscriber.group!r} of channel {self.subscriber.channel.name!r}"

    # -- read and accept -----------------------------------------------------------------------------------------

    async def _read(self, reader: Reader, partition: int) -> None:
        while not self._draining.is_set():
            await self.flow.room()
            if self._draining.is_set():
                return
            if self._bounded and (full := await self._full_output()) is not None:
                self._tell_of(full)
                await asyncio.sleep(0.05)
                continue
            self._full_since = None
            entries = await reader.read(self.flow.frames(), 1.0)
            for id_ in reader.lost():
                self._lose(reader, id_)
            suspect = False
            for entry in entries:
                # Where order holds across processes, what follows a suspect waits behind it.
                suspect = (suspect and self._exclusive) or (not entry.apart and entry.deliveries > SUSPICION)
                await self._accept(entry, reader, partition, suspect)
            self._count_overwritten(reader)
            await asyncio.sleep(0)  # handlers begin before the next read is written…
            await asyncio.sleep(0)  # …and what the quick ones have done is committed

    async def _full_output(self) -> str | None:
        """Backpressure goes upstream: while a channel we publish to is full, nothing new is taken."""
        for channel in self._bounded:
            for partition in range(channel.partitions):
                try:
                    if await self._context.transport(channel).full(channel, partition):
                        return channel.name
                except (PipelineError, OSError, ReplyError):
                    return channel.name
        return None

    def _tell_of(self, channel: str) -> None:
        """Once: backpressure is no fault, but apps whose channels feed each other would wait for ever in silence."""
        now = time.monotonic()
        self._full_since = self._full_since or now
        if now - self._full_since > HELD_UP and not self._told_of_full:
            self._told_of_full = True
            logger.warning(
                "%s has read nothing for %.0f s, since channel %r, which it publishes to, is full: do its subscribers "
                "keep up, and do they wait for a channel that this one fills?", self._name, HELD_UP, channel,
            )  # fmt: skip

    async def _accept(self, entry: Entry, reader: Reader, partition: int, suspect: bool) -> None:
        codec, durable = self._codec, self.subscriber.channel.durable
        try:
            if durable or entry.apart:
                beside = await self._context.payloads.open(self.subscriber.channel, partition, entry.body)
                frame = codec.decode(entry.body, count=entry.count, position=entry.position, beside=beside)
            else:
                frame = codec.decode_live(entry.body)
                missed = self._sequences.missed(frame)
                if missed is None:
                    reader.settled(entry.id)
                    return
                self._context.metrics.dropped += missed
        except FrameError as error:
            await self._bury_frame(entry, reader, partition, error)
            return
        held = Held(entry, frame, reader, partition)
        self._held[id(reader), entry.id] = held
        self.flow.take(held.open, frame.nbytes)
        await self._queue(held, suspect)

    async def _queue(self, held: Held, suspect: bool) -> None:
        entry, header = held.entry, held.frame.header
        if (entry.apart and entry.count > 1) or suspect:
            await self._set_apart(held, 0.0, held.indexes(), max(SUSPICION, entry.deliveries - 1))
            return
        if entry.apart and entry.deliveries > SUSPICION + CHANCES:
            error = HandlerError(f"its worker died or lost its lease {entry.deliveries - 1} times while handling it")
            self._finish_unit((held, 0), error, final=True)
            return
        if header.due is not None and not entry.apart and (delay := header.due - time.time()) > 0:
            await self._set_apart(held, delay, held.indexes(), 0)
            return
        for index in held.frame.invalid:
            if not entry.done or entry.done[index] == "0":
                kind, reason = self.subscriber.channel.type.__name__, held.frame.events[index].reason
                self._finish_unit((held, index), Reject(f"not a valid {kind}: {reason}"))
        units = [(held, index) for index in held.indexes() if index not in held.frame.invalid]
        self._wake.set()
        if len(self._lanes) == 1:
            self._lanes[0].units.extend(units)
            self._lanes[0].arrived.set()
            return
        for unit in units:
            lane = self._lanes[_slot(held.frame.key(unit[1]), len(self._lanes))]
            lane.units.append(unit)
            lane.arrived.set()

    async def _set_apart(self, held: Held, delay: float, indexes: list[int], deliveries: int) -> None:
        """Move open events of a frame to the retries, each by itself: nothing was tried, nothing is counted."""
        bodies = [held.again(self._codec, index, held.frame.header.attempt) for index in indexes]
        retries = [Retried(delay, body, deliveries=deliveries, origin=held.entry.origin) for body in bodies]
        commit = Commit(segments=held.segments(indexes), retries=retries)
        if await self._insist(lambda: held.reader.commit(commit), len(indexes), while_draining=False):
            self._forget(held, len(indexes))

    async def _bury_frame(self, entry: Entry, reader: Reader, partition: int, error: FrameError) -> None:
        """Nobody can read this frame: a dead letter for its open events, and the worker goes on."""
        logger.error("%s: frame %s cannot be read: %s", self._name, entry.id, error)
        size = max(1, entry.count)
        indexes = open_indexes(entry, size)
        count = len(indexes)
        draft = self._draft()
        draft.bury(
            entry, partition, error,
            key=None, event_id=entry.id, attempts=entry.deliveries, original=entry.body, count=count,
        )  # fmt: skip
        header = header_of(entry.body)
        if header is not None and header.reply is not None and header.sequence is not None:
            for index in indexes:
                event_id = f"{header.source}:{header.sequence + index}"
                draft.refuse(header.reply, f"{self.subscriber.channel.name}/{event_id}", reason_of(error))
        commit = draft.commit()
        if self.subscriber.channel.durable or entry.apart:
            commit.segments += segments(entry.id, size, indexes)

        async def bury() -> None:
            if not await reader.commit(commit):  # else another worker was quicker
                self._context.metrics.dead += count

        if await self._insist(bury, count, while_draining=False):
            reader.settled(entry.id)
        else:
            await reader.release([entry.id])

    def _lose(self, reader: Reader, id_: str) -> None:
        """Another worker has this entry: drop what has not begun. What has will conflict at its commit, harmlessly."""
        held = self._held.get((id(reader), id_))
        if held is None:
            return
        logger.warning("%s: the lease of %s ended; another worker has it", self._name, id_)
        for lane in self._lanes:
            units = lane.empty()
            kept = [unit for unit in units if unit[0] is not held]
            lane.units.extend(kept)
            if len(kept) < len(units):
                self._forget(held, len(units) - len(kept))

    def _count_overwritten(self, reader: Reader) -> None:
        overwritten = getattr(reader, "overwritten", None)
        if overwritten is not None and self.subscriber.channel.raw:
            self._context.metrics.dropped += overwritten()

    # -- call the handler ----------------------------------------------------------------------------------------

    async def _work(self, lane: Lane) -> None:
        metrics = self._context.metrics
        while await lane.available():
            started = time.perf_counter()
            await self._executor.each(lane.units, self._argument, self._done)
            metrics.busy += time.perf_counter() - started
            self._wake.set()
            await asyncio.sleep(0)

    async def _work_in_order(self, lane: Lane) -> None:
        """One event after the other; a retry happens in place, so that nothing of its lane overtakes it."""
        metrics, retry = self._context.metrics, self.subscriber.retry
        while await lane.available():
            unit = lane.units.popleft()
            attempt = unit[0].attempt
            while True:
                results: list[tuple[Unit, Any]] = []
                started = time.perf_counter()
                await self._executor.each(deque([unit]), self._argument_at(attempt), results)
                metrics.busy += time.perf_counter() - started
                outcome = results[0][1]
                delay = None if isinstance(outcome, Reject) else _delay(outcome, attempt, retry.delay)
                if delay is None or attempt >= retry.attempts:
                    self._finish_unit(unit, outcome, final=delay is not None)
                    break
                attempt += 1
                self._repeats += 1
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._draining.wait()
                    return  # the frame is handed back from this event on

    def _argument_at(self, attempt: int) -> Callable[[Unit], Any]:
        if not self.subscriber.messages:
            return _event
        return lambda unit: replace(unit[0].message(unit[1]), attempt=attempt)

    async def _work_in_batches(self, lane: Lane) -> None:
        metrics = self._context.metrics
        while await lane.available():
            units, reason = await self._gather(lane)
            if lane.closed and reason != "size":
                await self._release_gathered(units)
                return
            metrics.batch(len(units), reason)
            started = time.perf_counter()
            await self._call(units)
            metrics.busy += time.perf_counter() - started

    async def _gather(self, lane: Lane) -> tuple[list[Unit], str]:
        batch = self.subscriber.batch
        assert batch is not None
        queue = lane.units
        units = [queue.popleft() for _ in range(min(batch.size, len(queue)))]
        if len(units) == batch.size:
            return units, "size"
        if batch.wait == 0:
            return units, "idle"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(batch.wait):
                while len(units) < batch.size and not lane.closed:
                    lane.arrived.clear()
                    await lane.arrived.wait()
                    units += [queue.popleft() for _ in range(min(batch.size - len(units), len(queue)))]
        return units, "size" if len(units) == batch.size else "timeout"

    async def _release_gathered(self, units: list[Unit]) -> None:
        """Whole frames; what is partly in another batch follows in `finish`, or it would be handled twice."""
        many = Counter(id(unit[0]) for unit in units)
        frames = {id(unit[0]): unit[0] for unit in units}
        await self._release([held for held in frames.values() if held.open == many[id(held)]])

    async def _call(self, units: list[Unit]) -> None:
        """Call a batch handler. A failing batch is halved until the offender is alone; the others are not punished."""
        outcomes: list[Any]
        try:
            result = await self._executor.once(self._batch([self._argument(unit) for unit in units]))
            outcomes = _outcomes(result, len(units))
        except (Retry, _WrongLength) as error:
            outcomes = [error.error if isinstance(error, _WrongLength) else error] * len(units)
        except Exception as error:
            if len(units) > 1:
                middle = len(units) // 2
                await self._call(units[:middle])
                await self._call(units[middle:])
                return
            outcomes = [error]
        self._done.extend(zip(units, outcomes, strict=True))
        self._wake.set()

    def _batch(self, events: list[Any]) -> Any:
        """What a batch handler is called with."""
        subscriber = self.subscriber
        assert subscriber.batch is not None
        return columns(subscriber.channel.type, events) if subscriber.batch.as_ == "columns" else events

    def _finish_unit(self, unit: Unit, outcome: Any, *, final: bool = False) -> None:
        self._done.append((unit, Final(outcome) if final else outcome))
        self._wake.set()

    # -- settle --------------------------------------------------------------------------------------------------

    async def _settle(self) -> None:
        loop = asyncio.get_running_loop()
        while self._done or not self._finishing:
            if not self._done:
                self._wake.clear()
                # Handlers in threads finish events without a word until their slice is over.
                look = loop.call_later(0.01, self._wake.set) if self.flow.events else None
                await self._wake.wait()
                if look is not None:
                    look.cancel()
            await self._flush()

    async def _flush(self) -> None:
        while self._done:
            items = self._done[:MOST_PER_COMMIT]
            del self._done[: len(items)]
            for reader in self._readers:
                own = items if len(self._readers) == 1 else [item for item in items if item[0][0].reader is reader]
                if own:
                    await self._insist(partial(self._commit, reader, own), len(own), while_draining=True)

    async def _insist(self, commit: Callable[[], Awaitable[Any]], outcomes: int, *, while_draining: bool) -> bool:
        """Commit; when Redis refuses (a key of the wrong type, say), keep the outcomes and try until it is mended.

        False when it still refused as the drain began, and so the work goes to another worker.
        """
        while True:
            try:
                await commit()
            except (PipelineError, ReplyError) as error:
                logger.error("%s: %d outcomes cannot be committed yet: %s", self._name, outcomes, error)
                if self._draining.is_set() and not while_draining:
                    return False
                await asyncio.sleep(1.0)
            else:
                return True

    async def _commit(self, reader: Reader, items: list[tuple[Unit, Any]]) -> None:
        everything = items
        while items:
            draft, flight = self._draft(), self._flight()
            try:
                if flight is not None:
                    await self._prepare()
                try:
                    for (held, index), outcome in items:
                        self._resolve(draft, held, index, outcome)
                    commit = draft.commit(flight)
                except NOT_WRITTEN as error:
                    items = self._blame(items, error)
                    continue
                repeats, self._repeats = self._repeats, 0
                commit.retried += repeats
                statuses = await self._write(reader, commit, flight)
            finally:
                if flight is not None:
                    flight.landed()
            if statuses:
                self._repeats += repeats
                if commit.uncertain:
                    draft.number()  # an id that may have been heard must not come again
            else:
                draft.applied(self._context.metrics)
                break
            before = len(items)
            items = _standing(items, commit.segments, statuses)
            self._context.metrics.suppressed += before - len(items)
        for (held, _), _ in everything:
            held.settle()
        for held in {id(item[0][0]): item[0][0] for item in everything}.values():
            self._forget(held, held.take_settled())

    async def _write(self, reader: Reader, commit: Commit, flight: Flight | None) -> list[str | None]:
        while True:
            if flight is not None:
                await flight.upload()
            try:
                return await reader.commit(commit)
            except PayloadExpired:  # it waited for Redis longer than what it had uploaded lived
                if flight is None:
                    raise

    def _flight(self) -> Flight | None:
        """For what may have big tensors."""
        return Flight(self._context.payloads) if self._tensors or self._tensors_in_answers else None

    async def _prepare(self) -> None:
        if self._tensors_in_answers:
            await self._context.payloads.start()
        for channel in self._tensors:
            for partition in range(channel.partitions):
                await self._context.payloads.prepare(channel, partition)

    def _draft(self) -> Draft:
        return Draft(self.subscriber, self._codec, self._context.codec, self._sources, self._context.payloads.limit)

    def _resolve(self, draft: Draft, held: Held, index: int, outcome: Any) -> None:
        final = isinstance(outcome, Final)
        if final:
            outcome = outcome.outcome
        if isinstance(outcome, BaseException):
            retry = self.subscriber.retry
            delay = _delay(outcome, held.attempt, retry.delay)
            if delay is not None and not final and held.attempt < retry.attempts:
                draft.retry(held, index, delay)
            else:
                draft.fail(held, index, outcome)
            return
        try:
            draft.handle(held, index, outcome)
        except HandlerError as error:
            self._resolve(draft, held, index, error)

    def _blame(self, items: list[tuple[Unit, Any]], error: Exception) -> list[tuple[Unit, Any]]:
        """An output could not be written: find whose it was, and fail that event alone."""
        judged, found = [], False
        for unit, outcome in items:
            alone, flight = self._draft(), self._flight()
            try:
                self._resolve(alone, unit[0], unit[1], outcome)
                alone.commit(flight)
            except NOT_WRITTEN as cause:
                if isinstance(outcome, (BaseException, Final)):
                    raise  # it has failed already, and nothing can be made of it
                judged.append((unit, HandlerError(f"its output cannot be published: {cause}")))
                found = True
            else:
                judged.append((unit, outcome))
            finally:
                if flight is not None:
                    flight.landed()
        if not found:
            raise error
        return judged

    def _forget(self, held: Held, events: int) -> None:
        """So many events of a frame need no further care here."""
        held.open -= events
        done = held.open == 0
        self.flow.give(events, held.frame.nbytes if done else 0)
        if done and self._held.get(where := (id(held.reader), held.entry.id)) is held:
            del self._held[where]  # after a rewind the same entry may have come again, and be in hand
            held.reader.settled(held.entry.id)


def _leads_to(here: str, channel: str, subscribers: Sequence[Subscriber]) -> bool:
    """Whether what is in `channel`, when it is handled, is published `here`, be it by several handlers in turn."""
    seen, ahead = {here}, [channel]
    while ahead and here not in ahead:
        name = ahead.pop()
        seen.add(name)
        ahead += [
            output.name
            for subscriber in subscribers
            if subscriber.channel.name == name
            for output in subscriber.publishes
            if output.name == here or output.name not in seen
        ]
    return here in ahead


@dataclass(slots=True)
class Final:
    """An outcome whose attempts are used up."""

    outcome: Any


class _WrongLength(Exception):
    def __init__(self, error: HandlerError) -> None:
        self.error = error


def _event(unit: Unit) -> Any:
    return unit[0].frame.events[unit[1]]


def _message(unit: Unit) -> Any:
    return unit[0].message(unit[1])


def _slot(key: str | None, lanes: int) -> int:
    return 0 if key is None else zlib.crc32(key.encode()) % lanes


def _outcomes(result: Any, count: int) -> list[Any]:
    if result is None:
        return [None] * count
    if not isinstance(result, (list, tuple)):
        raise _WrongLength(HandlerError(f"a batch handler returns a list or None, not {type(result).__name__}"))
    if len(result) != count:
        raise _WrongLength(
            HandlerError(
                f"the batch had {count} events and the handler returned {len(result)} results; one each, in order"
            )
        )
    return [item if item is None or not undone(type(item)) else never_run(item) for item in result]


def _delay(outcome: Any, attempt: int, backoff: Callable[[int], float]) -> float | None:
    """Seconds until this outcome asks to be tried again; None when it does not."""
    if isinstance(outcome, Retry):
        return backoff(attempt) if outcome.delay is None else outcome.delay
    if isinstance(outcome, BaseException) and not isinstance(outcome, Reject):
        return backoff(attempt)
    return None


def _standing(
    items: list[tuple[Unit, Any]], segments: list[Segment], statuses: list[str | None]
) -> list[tuple[Unit, Any]]:
    """The items that were not settled by somebody before."""
    settled = {segment.entry: status for segment, status in zip(segments, statuses, strict=True) if status is not None}
    standing = []
    for item in items:
        (held, index), _ = item
        status = settled.get(held.entry.id)
        if status is None or (status != "" and status[index] == "0"):
            standing.append(item)
    return standing
