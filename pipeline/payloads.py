"""The payload plane: big tensors travel beside their frames, not inside.

    publisher   encode ─▶ Flight.place: copy into a shared-memory segment (one memcpy) or set aside as a blob
                       ─▶ upload blobs ─▶ publish or commit the frame, which ends with a reference
    reader      frame ─▶ Payloads.open: pin the segment (no copy), or download the blob ─▶ decode over it
    afterwards  every group is past the entry ─▶ collect.lua ─▶ the owner uses the segment again, blobs are deleted
    an answer   goes to one reader, whose address says which host it is on ─▶ it notes in the segment that it was taken,
                or deletes the blob; what nobody takes goes after a while

Shared memory is chosen when every reader announced the same host as ours (none yet: when Redis is on this host), and
while the quota lasts; blobs are keys in Redis, in chunks. A payload lives until every group has settled its event: what
reads later (a group's rewind, a new group) begins after it, and `watch(since=)` leaves such events out. Live channels
carry tensors inline.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import random
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from . import segments
from .channel import Channel
from .errors import FrameError, PayloadGone, PayloadTooLarge, ServerUnavailable
from .frame import REFERENCE, Address, Placer, reference_of
from .tensors import Buffers, TensorBytes
from .transports import PayloadStore
from .transports.client import LinkLost, ReplyError

__all__ = ["Flight", "Mode", "Oversized", "Payloads", "too_large"]

logger = logging.getLogger("pipeline.payloads")

Mode = Literal["auto", "shm", "blobs", "inline"]
T = TypeVar("T")
Where = tuple[str, int]
"""Channel, partition."""

FRAME_BYTES = 8 << 20
"""Payloads of several events stay below this."""
CHUNK_BYTES = 16 << 20
HOSTS_FOR = 2.0
"""Seconds for which it is taken as known which hosts read a channel."""
COLLECT_EVERY = 0.002
BIG = 8 << 20
"""Bytes from which on a fresh segment costs more than asking whether a used one has come free."""
WATCHED = "*"
"""Ends the announcement of a reader that is no group, which nobody waits for."""
GRACE = 1.0
"""Seconds for which such a channel's segments stay as they are, after every group has settled them."""
TICK = 5.0
IDLE = 10.0
"""Seconds after which a free segment is given back to the host."""
CROWDED = 0.1
"""Seconds between looks whether a file can be opened again."""
UNTAKEN = 90.0
"""Seconds after which nobody will take an answer any more: it has been in Redis for as long as it may."""


@dataclass(slots=True)
class _Route:
    """What is known of one channel we publish to."""

    local: bool = False
    known_until: float = 0.0
    collected: float = 0.0
    last_nbytes: int = 0
    grace: float = 0.0


@dataclass(slots=True)
class _Loan:
    """A segment with an answer in it."""

    segment: segments.Segment
    until: float = math.inf
    """On the monotonic clock: when to give up hope that it is taken. Not while its commit is under way."""


class _Loans:
    """What requesters have not taken yet: each takes its answers in the order they were sent."""

    def __init__(self) -> None:
        self._sent: dict[str, deque[_Loan]] = {}

    def add(self, key: str, segment: segments.Segment) -> _Loan:
        loan = _Loan(segment)
        self._sent.setdefault(key, deque()).append(loan)
        return loan

    def returned(self) -> Iterator[segments.Segment]:
        """What is on loan no longer, for it was taken, or never will be."""
        now = time.monotonic()
        for key, sent in list(self._sent.items()):
            while sent and (sent[0].segment.taken or sent[0].until < now):
                yield sent.popleft().segment
            if not sent:
                del self._sent[key]

    def rest(self) -> list[segments.Segment]:
        return [loan.segment for sent in self._sent.values() for loan in sent]


class Flight:
    """The payloads of one publish or commit, from encoding until it has taken effect or failed."""

    def __init__(self, payloads: Payloads) -> None:
        self._placed = 0
        self._payloads = payloads
        self._segments: list[segments.Segment] = []
        self._loans: list[_Loan] = []
        self._blobs: list[tuple[str, str, list[list[memoryview]]]] = []

    def placer(self, channel: Channel[Any], partition: int) -> Placer | None:
        """What encode calls with a frame's tensors and its number of events. None: all of them travel inline."""
        if not channel.durable or not self._payloads.active:
            return None
        where = channel.name, partition

        def share(buffers: Buffers) -> segments.Segment | None:
            segment = None if channel.fsync else self._payloads.write(where, buffers)
            if segment is not None:
                self._segments.append(segment)
            return segment

        place = self._payloads.store.place(*where)
        return lambda buffers, events: self._place(channel.name, place, buffers, events, share)

    def answer_placer(self, channel: Channel[Any], address: Address) -> Placer | None:
        """The same for answers to what was asked on a channel."""
        if address.host is None or not self._payloads.active:
            return None

        def share(buffers: Buffers) -> segments.Segment | None:
            loan = self._payloads.lend(address, buffers)
            if loan is None:
                return None
            self._loans.append(loan)
            return loan.segment

        return lambda buffers, events: self._place(channel.name, address.key, buffers, events, share)

    def _place(
        self, channel: str, place: str, buffers: Buffers, events: int,
        share: Callable[[Buffers], segments.Segment | None],
    ) -> bytes | None:  # fmt: skip
        if buffers.largest <= self._payloads.inline_bytes:
            return None
        most = min(FRAME_BYTES, self._payloads.limit)
        if events > 1 and buffers.nbytes > most:
            raise Oversized(buffers.nbytes, most)
        if buffers.nbytes > self._payloads.limit:
            raise too_large(channel, buffers.nbytes, self._payloads.limit)
        self._placed = buffers.nbytes
        segment = share(buffers)
        if segment is not None:
            return f"shm {segment.reference}".encode()
        name, chunks = secrets.token_hex(12), _chunks(buffers.parts)
        self._blobs.append((place, name, chunks))
        self._payloads.blobs += 1
        return f"blob {name} {len(chunks)}".encode()

    def take_placed(self) -> int:
        """Bytes of the payload placed since the last call."""
        placed, self._placed = self._placed, 0
        return placed

    async def upload(self) -> None:
        """What lies in Redis must be there before the frame that refers to it; once more, should it have expired."""
        for place, name, chunks in self._blobs:
            await self._payloads.store.upload(place, name, chunks)

    def landed(self) -> None:
        """It is written, or never will be: from now on Redis knows which payloads are needed."""
        for segment in self._segments:
            self._payloads.landed(segment)
        for loan in self._loans:
            loan.until = time.monotonic() + UNTAKEN
        self._segments.clear()
        self._loans.clear()
        self._blobs.clear()


def too_large(channel: str, nbytes: int, limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(
        f"an event of channel {channel!r} takes {nbytes:,} bytes; the limit is {limit:,} (PIPELINE_MAX_FRAME_BYTES)"
    )


class Oversized(Exception):
    """Raised when a frame should hold fewer events. `nbytes`: of their tensors, `most` there may be."""

    def __init__(self, nbytes: int, most: int) -> None:
        self.nbytes = nbytes
        self.most = most


class Payloads:
    """One process's part of the plane."""

    def __init__(
        self, store: PayloadStore | None, mode: Mode, inline_bytes: int, limit: int, quota: int | None,
        folder: Path,
    ) -> None:  # fmt: skip
        self.active = store is not None and mode != "inline"
        self.inline_bytes = inline_bytes
        self.limit = limit
        self.placed = 0
        """Payloads put into shared memory so far."""
        self.blobs = 0
        """Payloads put into Redis so far."""
        self._store = store
        self._mode = mode
        self._folder = folder
        self._quota = quota
        self._token: str | None = None
        self._deployment = ""
        self._owner: segments.Owner | None = None
        self._mappings: segments.Mappings | None = None
        self._routes: dict[Where, _Route] = {}
        self._used: dict[Where, dict[str, segments.Segment]] = {}
        self._loans = _Loans()
        self._mutex = threading.Lock()
        """Of making our segments' owner: `empty` is for any thread, all else for the event loop."""
        self._flying: set[str] = set()
        self._read: dict[Where, str] = {}
        """What we announced of the channels we read."""
        self._starting: asyncio.Task[None] | None = None
        self._ticking: asyncio.Task[None] | None = None
        """Set once it has started."""

    @property
    def store(self) -> PayloadStore:
        assert self._store is not None, "only an active plane is asked"
        return self._store

    @property
    def host(self) -> str:
        """What all who share this host's memory say of themselves; "" where it cannot be, or shall not be, shared."""
        if self._token is None:
            self._token = "" if self._mode == "blobs" else segments.host_token(self._folder)
        return self._token

    # -- writing -------------------------------------------------------------------------------------------------

    def empty(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """[nbytes] of undefined values, in shared memory where that is to be had."""
        found = None
        if self._ticking is not None and self.host and nbytes > self.inline_bytes:
            found = self._owning(lambda owner: owner.empty(nbytes))
        return np.empty(nbytes, np.uint8) if found is None else found

    async def prepare(self, channel: Channel[Any], partition: int) -> None:
        """Before frames are encoded: learn who reads the channel, and which segments have come free."""
        if not self.active or not channel.durable:
            return
        where, now = (channel.name, partition), time.monotonic()
        route = self._routes.setdefault(where, _Route())
        if now >= route.known_until:
            await self._find_route(where, route)
        if not self._used.get(where) or self._owner is None or self._owner.has_free(route.last_nbytes):
            return
        if now - route.collected >= COLLECT_EVERY or route.last_nbytes >= BIG:
            route.collected = now
            await self._collect(where)

    async def _find_route(self, where: Where, route: _Route) -> None:
        await self.start()
        members = await self.store.hosts(where[0])
        route.grace = GRACE if any(member.endswith(WATCHED) for member in members) else 0.0
        hosts = {member.removesuffix(WATCHED) for member in members} if self._mode == "auto" else {self.host}
        route.local = bool(self.host) and (hosts == {self.host} or self._alone(hosts))
        route.known_until = time.monotonic() + HOSTS_FOR

    def _alone(self, hosts: set[str]) -> bool:
        return not hosts and self.store.same_host

    async def start(self) -> None:
        """Before anything is written or read. Repeated, it does nothing."""
        if self._ticking is not None or not self.active:
            return
        if self._starting is None or self._starting.done():  # the last one failed
            self._starting = asyncio.create_task(self._start(), name="start payloads")
        await asyncio.shield(self._starting)  # it is not one caller's: others may wait for it

    async def _start(self) -> None:
        self._deployment = await self.store.deployment()
        self._mappings = segments.Mappings(self._deployment, self._folder)
        self._ticking = asyncio.create_task(self._tick(), name="payloads")

    def write(self, where: Where, buffers: Buffers) -> segments.Segment | None:
        """Into shared memory; None when the payload must go through Redis."""
        route = self._routes.get(where)
        if route is None or not route.local:
            return None
        route.last_nbytes = buffers.nbytes
        segment = self._share(buffers, {"channel": where[0], "partition": where[1]})
        if segment is not None:
            self._flying.add(segment.reference)
            self._used.setdefault(where, {})[f"shm {segment.reference}"] = segment
        return segment

    def landed(self, segment: segments.Segment) -> None:
        self._flying.discard(segment.reference)

    def lend(self, address: Address, buffers: Buffers) -> _Loan | None:
        """The same, for an answer."""
        if not address.host or address.host != self.host:
            return None
        self._reclaim()
        segment = self._share(buffers, {"until": time.time() + 2 * UNTAKEN})
        return None if segment is None else self._loans.add(address.key, segment)

    def _share(self, buffers: Buffers, purpose: dict[str, Any]) -> segments.Segment | None:
        segment = self._owning(lambda owner: owner.write(buffers.parts, buffers.nbytes, purpose))
        if segment is not None:
            self.placed += 1
        return segment

    def _owning(self, use: Callable[[segments.Owner], T | None]) -> T | None:
        """What comes of using our segments; None where that cannot be."""
        try:
            with self._mutex:
                if self._owner is None:
                    quota = _half_of(self._folder) if self._quota is None else self._quota
                    self._owner = segments.Owner(self._deployment, quota, self._folder)
            return use(self._owner)
        except OSError as error:
            logger.warning("shared memory cannot be used, tensors go through Redis: %s", error)
            self._token = ""
            for route in self._routes.values():
                route.local = False
            return None

    def _reclaim(self) -> None:
        for segment in self._loans.returned():
            if self._owner is not None:
                self._owner.free(segment, 0.0)

    async def _collect(self, where: Where, *, every: bool = False) -> None:
        """Take back what every group has settled; with `every`, also what never reached Redis."""
        used = self._used.get(where, {})
        asked = [reference for reference in used if reference[4:] not in self._flying] if every else []
        owner = self._owner.name if self._owner is not None else "none"
        with contextlib.suppress(ServerUnavailable, LinkLost, ReplyError):
            for reference in await self.store.collect(*where, owner, asked):
                segment = used.pop(reference, None)
                if segment is not None and self._owner is not None:
                    self._owner.free(segment, self._routes[where].grace)

    async def _collect_everywhere(self) -> None:
        """Blobs, too, which anybody may delete."""
        for where in {*self._routes, *self._read}:
            await self._collect(where, every=True)

    # -- reading -------------------------------------------------------------------------------------------------

    async def announce(self, channel: Channel[Any], *, watched: bool = False) -> None:
        """Tell publishers where this channel is read, or `watched` without a group. Repeated while this is open."""
        if not self.active or not channel.durable:
            return
        await self.start()
        member = self.host or f"none-{os.getpid()}"
        if watched:
            member += WATCHED
        self._read.update(((channel.name, partition), member) for partition in range(channel.partitions))
        await self.store.announce(channel.name, member)

    async def open(self, channel: Channel[Any], partition: int, body: bytes) -> TensorBytes | None:
        """The tensors of a frame that lie beside it; None when there are none. Raises FrameError (PayloadGone)."""
        if not body.startswith(REFERENCE):
            return None
        return await self._open(body, lambda: self.store.place(channel.name, partition))

    async def take(self, address: Address, body: bytes) -> TensorBytes:
        """Those of an answer, for the only time. Raises FrameError (PayloadGone)."""
        return await self._open(body, lambda: address.key, last=True)

    async def _open(self, body: bytes, place: Callable[[], str], *, last: bool = False) -> TensorBytes:
        reference, nbytes = reference_of(body)
        if not self.active:
            raise FrameError("its tensors lie beside it, but PIPELINE_PAYLOADS=inline")
        if nbytes > self.limit:
            raise FrameError(
                f"its tensors take {nbytes:,} bytes; the limit is {self.limit:,} (PIPELINE_MAX_FRAME_BYTES)"
            )
        await self.start()
        kind, _, rest = reference.partition(" ")
        if kind == "shm":
            return TensorBytes((await self._view(rest, nbytes, last)).data)
        name, _, chunks = rest.partition(" ")
        parts = await self.store.download(place(), name, int(chunks), last=last)
        data = b"".join(part for part in parts if part is not None) if len(parts) != 1 else parts[0] or b""
        if len(data) != nbytes:
            raise PayloadGone("its tensors were in Redis beside it and have been deleted")
        return TensorBytes(memoryview(data))

    async def _view(self, reference: str, nbytes: int, last: bool) -> npt.NDArray[np.uint8]:
        assert self._mappings is not None
        told = False
        while True:
            try:
                return self._mappings.view(reference, nbytes, take=last)
            except segments.Gone as error:
                raise PayloadGone(
                    f"its tensors were in a host's shared memory and are not here: {error}; they go when every group "
                    "has settled their event. Set PIPELINE_PAYLOADS=blobs where hosts share a Redis but not this folder"
                ) from None
            except segments.Exhausted as error:  # the event is sound: it waits
                if not told:
                    told = True
                    logger.warning("a tensor in shared memory waits until this process can open files: %s", error)
                await asyncio.sleep(CROWDED)

    # -- looking after -------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK * random.uniform(0.8, 1.2))
            with contextlib.suppress(ServerUnavailable, LinkLost, ReplyError, OSError):
                await self._look_after()

    async def _look_after(self) -> None:
        for channel, member in {where[0]: member for where, member in self._read.items()}.items():
            await self.store.announce(channel, member)
        await self._collect_everywhere()
        self._reclaim()
        if self._owner is not None:
            self._owner.shrink(IDLE)
        if self._mappings is not None:
            self._mappings.tidy()
        if self.host:
            await self.sweep()

    async def sweep(self) -> None:
        """Unlink the segments of dead owners that no group needs any more."""
        wanted: dict[tuple[str, int, str], list[segments.Orphan]] = {}
        needless: list[Path] = []
        for orphan in segments.orphans(self._deployment, self._folder):
            if orphan.purpose.get("until", 0) > time.time():
                continue  # an answer that may yet be taken
            try:
                where = (str(orphan.purpose["channel"]), int(orphan.purpose["partition"]), orphan.owner)
            except (KeyError, ValueError):
                needless.append(orphan.path)
            else:
                wanted.setdefault(where, []).append(orphan)
        for where, found in wanted.items():
            references = {f"shm {orphan.purpose.get('reference')}": orphan.path for orphan in found}
            freed = await self.store.collect(*where, list(references))
            needless.extend(references[reference] for reference in freed if reference in references)
        segments.sweep(needless, self._deployment, self._folder)

    async def close(self) -> None:
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._ticking is None:
            return
        self._ticking.cancel()
        await asyncio.gather(self._ticking, return_exceptions=True)
        self._ticking = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                await self._collect_everywhere()
        if self._owner is not None:
            self._reclaim()
            used = [segment for used in self._used.values() for segment in used.values()]
            self._owner.close([*used, *self._loans.rest()])
            self._owner, self._loans = None, _Loans()
            self._used.clear()
        if self._mappings is not None:
            self._mappings.close()
            self._mappings = None
        self._routes.clear()


def _half_of(folder: Path) -> int:
    """A container has 64 MB here by default; others need some too."""
    free = os.statvfs(folder)
    return free.f_frsize * free.f_bavail // 2


def _chunks(parts: Sequence[memoryview]) -> list[list[memoryview]]:
    """The parts cut into chunks, without copying."""
    chunks: list[list[memoryview]] = [[]]
    room = CHUNK_BYTES
    for part in parts:
        while len(part) > room:
            chunks[-1].append(part[:room])
            part, room = part[room:], CHUNK_BYTES
            chunks.append([])
        chunks[-1].append(part)
        room -= len(part)
    return chunks
