"""Drafts: what a commit will say, collected event by event; and the frames in hand that it settles."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from operator import is_
from typing import Any

from pydantic_core import from_json

from .channel import Channel
from .deadletters import DeadLetter, dead_channel, reason_of, traceback_of
from .errors import HandlerError, PublishError
from .events import Event
from .frame import Address, Codec, Dumped, Frame, Invalid, plain, split
from .message import Message, Reply
from .metrics import GroupMetrics
from .payloads import Flight, Oversized, too_large
from .subscriber import Subscriber
from .transports import Answered, Commit, Entry, Output, Reader, Retried, Segment

__all__ = [
    "Draft",
    "Failure",
    "Held",
    "Sequences",
    "Sources",
    "Unit",
    "failures",
    "open_indexes",
    "reply_codec",
    "segments",
]

FRAME_BYTES = 256 * 1024
MOST_SOURCES = 10_000
MOST_REPEATED = 64
"""Frames that a publisher may repeat together; see publishing.MOST_FRAMES."""


class Failure(Event):
    """The answer to a request that has none."""

    reason: str


failures: Codec[Failure] = Codec(Channel("failure", Failure))


@lru_cache
def reply_codec(kind: Any) -> Codec[Any]:
    """The codec of answers of a type."""
    return Codec(Channel("reply", kind))


class Sources:
    """Who a handler's outputs are from. On a durable channel they are numbered by their place in the stream; on a live
    one this process numbers them."""

    def __init__(self, durable: str, live: str) -> None:
        self.durable = durable
        self.live = f"{live}.{durable}"
        self.published: dict[str, int] = {}
        """Live channel → events published so far."""
        self._turns = itertools.count()

    def turn(self) -> int:
        """Whose turn it is among partitions, for an event without a key."""
        return next(self._turns)

    def of(self, channel: Channel[Any], partition: int) -> str:
        """Positions are of one partition, so an id needs it too."""
        if not channel.durable:
            return self.live
        return self.durable if channel.partitions == 1 else f"{self.durable}.{partition}"


def open_indexes(entry: Entry, size: int) -> list[int]:
    """Events, of the `size` of a frame, that were not committed when it was read."""
    if not entry.done:
        return list(range(size))
    return [index for index, mark in enumerate(entry.done) if mark == "0"]


def segments(entry: str, size: int, indexes: list[int]) -> list[Segment]:
    """`indexes` (ascending) of a frame of `size` events, as runs."""
    runs: list[Segment] = []
    low = previous = -2
    for index in indexes:
        if index != previous + 1:
            if low >= 0:
                runs.append(Segment(entry, size, low, previous))
            low = index
        previous = index
    if low >= 0:
        runs.append(Segment(entry, size, low, previous))
    return runs


class Held:
    """A frame in this process's hands."""

    __slots__ = ("_settled", "attempt", "entry", "frame", "open", "partition", "reader")

    def __init__(self, entry: Entry, frame: Frame[Any], reader: Reader, partition: int) -> None:
        self.entry = entry
        self.frame = frame
        self.reader = reader
        self.partition = partition
        self.attempt = frame.header.attempt + entry.deliveries - 1
        """Of the coming call: a worker that died with the frame may have called before."""
        self._settled = 0
        self.open = entry.done.count("0") if entry.done else len(frame.events)
        """Events neither settled nor given up."""

    def indexes(self) -> list[int]:
        """Events not committed when the frame was read."""
        return open_indexes(self.entry, len(self.frame.events))

    def message(self, index: int) -> Message[Any]:
        message = self.frame.message(index)
        if self.attempt != message.attempt:
            object.__setattr__(message, "attempt", self.attempt)
        return message

    def again(self, codec: Codec[Any], index: int, attempt: int) -> bytes:
        """A frame of one event, for a retry or a dead letter. An event that cannot be encoded goes as it came."""
        try:
            return codec.reencode(self.frame, index, attempt=attempt)
        except (PublishError, ValueError, TypeError) as error:
            events = list(self.frame.events)
            events[index] = Invalid(self._raw(index), str(error))
            return codec.reencode(replace(self.frame, events=events), index, attempt=attempt)

    def _raw(self, index: int) -> Any:
        """An event as plain JSON, from the entry's bytes."""
        raw = from_json(split(self.entry.body)[0])
        if isinstance(raw, dict) and isinstance(raw.get("pipeline"), int) and isinstance(raw.get("data"), list):
            raw = raw["data"]
        return plain(raw[index] if isinstance(raw, list) else raw, self.frame.buffers)

    def segments(self, indexes: list[int]) -> list[Segment]:
        """`indexes` (ascending) as runs."""
        return segments(self.entry.id, len(self.frame.events), indexes)

    def settle(self) -> None:
        self._settled += 1

    def take_settled(self) -> int:
        settled, self._settled = self._settled, 0
        return settled


Unit = tuple[Held, int]
"""One event in hand: its frame, and which of its events."""


class Draft:
    """Collects outcomes, then writes them as one Commit."""

    def __init__(
        self,
        subscriber: Subscriber,
        codec: Codec[Any],
        codecs: Callable[[Channel[Any]], Codec[Any]],
        sources: Sources,
        limit: int,
    ) -> None:
        self._subscriber = subscriber
        self._codec = codec
        self._codecs = codecs
        self._sources = sources
        self._limit = limit
        self._commit = Commit()
        self._outputs: dict[tuple[Channel[Any], int], tuple[list[Any], list[str | None]]] = {}
        self._traces: dict[tuple[Channel[Any], int], dict[int, dict[str, str]]] = {}
        """Of outputs, by their index."""
        self._letters: list[tuple[DeadLetter, str | None]] = []
        self._answers: dict[str, tuple[list[Any], list[str]]] = {}
        self._refusals: dict[str, tuple[list[Failure], list[str]]] = {}
        self._run: list[Any] = [None, -1, -1]
        self._dumped: tuple[list[Any], Dumped] | None = None
        """The last events that were dumped: an answer that is published, too, is dumped once."""
        self._durable = subscriber.channel.durable
        self._runs: list[tuple[Held, int, int]] = []

    # -- outcomes ------------------------------------------------------------------------------------------------

    def handle(self, held: Held, index: int, outcome: Any) -> None:
        """The handler returned. Raises HandlerError, changing nothing, when it returned what it may not publish."""
        address = held.frame.header.reply
        if outcome is None and address is None:
            self._mark(held, index)
            self._commit.handled += 1
            return
        events = outcome if isinstance(outcome, list) else [] if outcome is None else [outcome]
        answers = [event.event for event in events if type(event) is Reply]
        if answers:
            events = [event for event in events if type(event) is not Reply]
        targets = [self._target(event) for event in events] if self._subscriber.publishes else []
        self._mark(held, index)
        self._commit.handled += 1
        key = held.frame.key(index)
        trace = held.frame.trace(index)
        for event, channel in zip(events, targets, strict=False):
            where = (channel, channel.partition(key, self._sources.turn()) if channel.partitions > 1 else 0)
            published, keys = self._outputs.setdefault(where, ([], []))
            if trace:
                self._traces.setdefault(where, {})[len(published)] = trace
            published.append(event)
            keys.append(key)
        if address is not None:
            self._answer(address, self._request(held, index), answers or events)

    def retry(self, held: Held, index: int, delay: float) -> None:
        self._mark(held, index)
        self._commit.retried += 1
        body = held.again(self._codec, index, held.attempt + 1)
        self._commit.retries.append(Retried(delay, body, origin=held.entry.origin))

    def fail(self, held: Held, index: int, error: BaseException) -> None:
        self._mark(held, index)
        frame = held.frame
        original = held.again(self._codec, index, 1)
        self.bury(
            held.entry, held.partition, error,
            key=frame.key(index), event_id=frame.id(index), attempts=held.attempt, original=original, count=1,
        )  # fmt: skip
        if frame.header.reply is not None:
            self.refuse(frame.header.reply, self._request(held, index), reason_of(error))

    def bury(
        self,
        entry: Entry,
        partition: int,
        error: BaseException,
        *,
        key: str | None,
        event_id: str,
        attempts: int,
        original: bytes,
        count: int,
    ) -> None:
        self._commit.dead += count
        letter = DeadLetter(
            channel=self._subscriber.channel.name,
            group=self._subscriber.group,
            partition=partition,
            origin=entry.origin,
            event_id=event_id,
            key=key,
            attempts=attempts,
            reason=reason_of(error)[:2000],
            traceback=traceback_of(error),
            count=count,
            original=original,
        )
        self._letters.append((letter, key))

    def _mark(self, held: Held, index: int) -> None:
        run = self._run
        if held is run[0] and index == run[2] + 1:
            run[2] = index
            return
        self._close_run()
        self._run = [held, index, index]

    def _close_run(self) -> None:
        held, low, high = self._run
        if held is not None:
            self._runs.append((held, low, high))

    def _target(self, event: Any) -> Channel[Any]:
        kind = type(event)
        for channel in self._subscriber.publishes:
            if channel.type is kind:
                return channel
        names = ", ".join(f"{channel.name} ({channel.type.__name__})" for channel in self._subscriber.publishes)
        raise HandlerError(f"the handler returned a {kind.__name__}; it publishes {names}")

    def _request(self, held: Held, index: int) -> str:
        """What a requester knows its request by: event ids are unique within a channel."""
        return f"{self._subscriber.channel.name}/{held.frame.id(index)}"

    def _answer(self, address: str, id_: str, events: list[Any]) -> None:
        reply = self._subscriber.channel.reply
        if not events:
            self.refuse(address, id_, "the subscriber returned None")
        elif type(events[0]) is not reply:
            wanted = getattr(reply, "__name__", "no reply")
            self.refuse(address, id_, f"the subscriber returned a {type(events[0]).__name__}, not {wanted}")
        else:
            answers, ids = self._answers.setdefault(address, ([], []))
            answers.append(events[0])
            ids.append(id_)

    def refuse(self, address: str, id_: str, reason: str) -> None:
        """The request will have no answer, and who waits for it is told."""
        refusals, ids = self._refusals.setdefault(address, ([], []))
        refusals.append(Failure(reason=reason))
        ids.append(id_)

    # -- writing -------------------------------------------------------------------------------------------------

    def commit(self, flight: Flight | None = None) -> Commit:
        """The commit; big tensors of its outputs go with `flight`. Raises PublishError when one cannot be encoded."""
        commit, now = self._commit, time.time()
        self._close_run()
        self._run = [None, -1, -1]
        if self._durable:
            commit.segments = [
                Segment(held.entry.id, len(held.frame.events), low, high) for held, low, high in self._runs
            ]
        for where, (events, keys) in self._outputs.items():
            commit.outputs.extend(self._frames(*where, events, keys, now, flight, self._traces.get(where)))
        for output in commit.outputs:
            self._check_size(output.channel, output.body)
        if self._letters:
            channel = dead_channel(self._subscriber.channel.name)
            letters, keys = [letter for letter, _ in self._letters], [key for _, key in self._letters]
            commit.outputs.extend(self._frames(channel, 0, letters, keys, now, None))
        for address, (answers, ids) in self._answers.items():
            self._reply(Address.of(address), reply_codec(self._subscriber.channel.reply), answers, ids, now, flight)
        for address, (refusals, ids) in self._refusals.items():
            self._reply(Address.of(address), failures, refusals, ids, now, None)
        return commit

    def _reply(
        self, address: Address, codec: Codec[Any], answers: list[Any], ids: list[str], now: float,
        flight: Flight | None,
    ) -> None:  # fmt: skip
        channel, source = self._subscriber.channel, self._sources.durable
        place = flight.answer_placer(channel, address) if flight is not None else None

        def encode(start: int, end: int) -> bytes:
            part, keys = answers[start:end], ids[start:end]
            dumped = self._dump(codec, part)
            return codec.encode(part, source=source, sequence=None, time=now, keys=keys, place=place, dumped=dumped)

        for body, _ in self._cut(len(answers), len(answers), encode):
            self._check_size(channel, body)
            self._commit.replies.append(Answered(address.key, body))

    def _dump(self, codec: Codec[Any], events: list[Any]) -> Dumped:
        if self._dumped is not None:
            before, dumped = self._dumped
            if len(before) == len(events) and all(map(is_, before, events)):
                return dumped
        dumped = codec.dump(events)
        self._dumped = events, dumped
        return dumped

    def _check_size(self, channel: Channel[Any], body: bytes) -> None:
        if len(body) > self._limit:
            raise too_large(channel.name, len(body), self._limit)

    def _frames(
        self,
        channel: Channel[Any],
        partition: int,
        events: list[Any],
        keys: list[Any],
        now: float,
        flight: Flight | None,
        traces: dict[int, dict[str, str]] | None = None,
    ) -> Iterator[Output]:
        codec = self._codecs(channel)
        if channel.raw:
            yield from (Output(channel, 0, codec.bare(event), 1) for event in events)
            return
        place = flight.placer(channel, partition) if flight is not None else None
        base = None if channel.durable else self._sources.published.get(channel.name, 0) + 1
        source = self._sources.of(channel, partition)

        def encode(start: int, end: int) -> bytes:
            part = events[start:end]
            return codec.encode(
                part,
                source=source,
                sequence=None if base is None else base + start,
                time=now,
                keys=keys[start:end],
                headers=[traces.get(index) for index in range(start, end)] if traces else None,
                place=place,
                dumped=self._dump(codec, part),
            )

        for body, count in self._cut(len(events), channel.frame, encode):
            yield Output(channel, partition, body, count)

    def _cut(self, count: int, size: int, encode: Callable[[int, int], bytes]) -> Iterator[tuple[bytes, int]]:
        """Frames of so many events, `size` in each at most, as (body, its events)."""
        start, nbytes = 0, min(FRAME_BYTES, self._limit // 2)
        while start < count:
            end = min(start + size, count)
            try:
                body = encode(start, end)
            except Oversized as error:
                size = max(1, (end - start) * error.most // error.nbytes)
                continue
            if len(body) > 2 * nbytes and end - start > 1:
                size = max(1, (end - start) * nbytes // len(body))
                continue
            yield body, end - start
            start = end

    def number(self) -> None:
        """The numbers of its live outputs are taken."""
        for output in self._commit.outputs:
            if not output.channel.durable:
                name = output.channel.name
                self._sources.published[name] = self._sources.published.get(name, 0) + output.count

    def applied(self, metrics: GroupMetrics) -> None:
        """The commit took effect: count it."""
        commit, now = self._commit, time.time()
        metrics.handled += commit.handled
        metrics.dead += commit.dead
        metrics.retried += commit.retried
        for output in commit.outputs:
            name = output.channel.name
            metrics.published[name] = metrics.published.get(name, 0) + output.count
        self.number()
        for held, low, high in self._runs:
            metrics.latency.add(max(0.0, now - held.frame.time(low)), high - low + 1)


class Sequences:
    """What a live listener missed, and what it got twice, by the sequences of each source."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._recent: dict[str, dict[int, float]] = {}
        """Of each source's latest frames, by their first event: when they were written."""

    def missed(self, frame: Frame[Any]) -> int | None:
        """Events missed between this frame and its source's last one; None when it has come before, because its
        publisher had no answer and repeated it."""
        header, first = frame.header, frame.sequence
        if header.sequence is None:
            return 0
        last = self._last.get(header.source)
        if last is None and len(self._last) > MOST_SOURCES:
            self._last.clear()
            self._recent.clear()
        recent = self._recent.setdefault(header.source, {})
        if recent.get(first) == header.time:
            return None
        recent[first] = header.time
        if len(recent) > MOST_REPEATED:
            del recent[next(iter(recent))]
        self._last[header.source] = max(last or 0, first + len(frame.events) - 1)
        return 0 if last is None else max(0, first - last - 1)
