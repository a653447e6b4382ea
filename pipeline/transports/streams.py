"""Durable channels on Redis Streams: one entry a frame, one script a step. The guarantees are in the scripts, lua/."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from typing import Any

from ..channel import MOST_EVENTS, Channel
from ..errors import ConfigurationError, PublishUncertain, ServerUnavailable
from . import SUSPICION, Commit, Entry, Group, Guarantees, Holding, Outgoing, PayloadExpired, Retried, channel_full
from .client import Argument, Client, Link, LinkLost, ReplyError, transient
from .partitions import Share
from .renewal import Renewer
from .scripts import Keys, load

__all__ = ["StreamReader", "StreamTail", "Streams"]

logger = logging.getLogger("pipeline.streams")

POLL = 0.05
"""Seconds between looks for due events and hand-backs, and the longest a blocked read lasts."""
TRIM_EVERY = 5.0
TELL_EVERY = 600.0
"""Seconds between two complaints about one partition."""
CONSUMER_IDLE = 300.0
SYNC = 5.0
"""Seconds of one wait for the disk; less than a connection may be silent."""
FAREWELL = 1.0
"""Seconds for what only spares others the wait for a lease to end."""
_COUNTS = struct.Struct(">7I")
_RUN = struct.Struct(">3I")
_TAKEN, _WAS_FREE = 0, 2
"""What own.lua says: somebody else's; ours now, and nobody's before."""
PATIENCE = 30.0
"""Seconds a publish waits for a Redis that went away before it gives up with an error."""


class Streams:
    """The durable transport."""

    guarantees = Guarantees(durable=True, replay=True, counts_gaps=True, survives_restart=True)

    def __init__(self, url: str, name: str, group_expires: float = 7 * 86400.0) -> None:
        self.group_expires = group_expires
        self.scripts = load()
        self.client = Client(url, name, [script.text for script in self.scripts.values()])
        self.renewer = Renewer(url, self.scripts["renew"])
        self._url = url
        self._name = name
        self._fsync = Client(url, f"{name}-fsync", [self.scripts["publish"].text])
        self._known: dict[Keys, float] = {}
        self._silent: dict[Keys, float] = {}
        """Until when nothing more is said of what fails there."""
        self._readers: set[StreamReader] = set()
        self._janitor: asyncio.Task[None] | None = None
        self._shares: dict[tuple[str, str], Share] = {}
        self._publications: dict[tuple[Channel[Any], int], _Publication] = {}

    # -- scripts -------------------------------------------------------------------------------------------------

    async def run(self, name: str, keys: list[str], *arguments: Argument, client: Client | None = None) -> Any:
        """Run a script once, loading it again where the server forgot it."""
        client = client or self.client
        link = await client.link()
        script = self.scripts[name]
        try:
            return await script(link, keys, *arguments)
        except ReplyError as error:
            if not str(error).startswith("NOSCRIPT"):
                raise
        await link.call("SCRIPT", "LOAD", script.text)
        return await script(link, keys, *arguments)

    # -- publishing ----------------------------------------------------------------------------------------------

    async def publish(self, channel: Channel[Any], partition: int, frames: Sequence[Outgoing]) -> None:
        publication = self._publications.get((channel, partition))
        if publication is None:
            keys = self._know(channel, partition)
            client = self._fsync if channel.fsync else self.client
            publication = self._publications[channel, partition] = _Publication(self, channel, keys, client)
        await publication.write(frames)

    def _know(self, channel: Channel[Any], partition: int) -> Keys:
        keys = Keys.of(channel.name, partition)
        if keys not in self._known:
            self._known[keys] = channel.keep
            if self._janitor is None:
                self._janitor = asyncio.create_task(self._maintain(), name="janitor")
        return keys

    # -- reading -------------------------------------------------------------------------------------------------

    async def join(self, channel: Channel[Any], partition: int, group: Group) -> StreamReader:
        keys = self._know(channel, partition)
        reader = StreamReader(self, channel, keys, group)
        await reader.regroup()
        if group.exclusive:
            reader.share = await self._share(channel, group)
        self._readers.add(reader)
        self.renewer.add(reader)
        return reader

    async def _share(self, channel: Channel[Any], group: Group) -> Share:
        share = self._shares.get((channel.name, group.name))
        if share is None:
            owners = [Keys.of(channel.name, part).group(group.name, "owner") for part in range(channel.partitions)]
            members = Keys.of(channel.name).group(group.name, "members")
            share = self._shares[channel.name, group.name] = Share(self.run, group, members, owners)
        await self.client.persist(share.start, patience=None, what=f"group {group.name!r}")
        return share

    async def tail(self, channel: Channel[Any], partition: int, since: str | None) -> StreamTail:
        keys = Keys.of(channel.name, partition)
        if since is None:
            since = await self.client.persist(lambda: self.last(keys), patience=PATIENCE, what=f"watch {channel.name}")
        return StreamTail(self, keys, since)

    async def newest(self, channel: str, partition: int, most: int, below: str | None) -> list[Entry]:
        stream, end = Keys.of(channel, partition).stream, f"({below}" if below else "+"
        while True:
            reply = await self.client.call("XREVRANGE", stream, end, "-", "COUNT", most)
            found = [_entry(id_, int(fields[1]), fields[3]) for id_, fields in reply if _is_frame(fields)]
            if found or not reply:
                return found
            end = f"({reply[-1][0].decode()}"  # nothing but what others wrote there

    async def last(self, keys: Keys) -> str:
        """Id of the newest entry ever written."""
        try:
            info = await self.client.call("XINFO", "STREAM", keys.stream)
        except ReplyError as error:
            if "no such key" in str(error):
                return "0-0"
            raise
        return str(dict(zip(info[::2], info[1::2], strict=True))[b"last-generated-id"], "ascii")

    # -- committing ----------------------------------------------------------------------------------------------

    async def commit(self, keys: Keys, group: str, commit: Commit, token: str = "") -> list[str | None]:
        """Also used, without segments, for the outputs of live subscribers. `token` fences an exclusive reader, and
        tells a commit without segments from its repetition."""
        names, arguments = commit_arguments(keys, group, commit, token)
        for output in commit.outputs:
            if output.channel.durable:
                self._know(output.channel, output.partition)

        async def write() -> Any:
            try:
                return await self.run("commit", names, *arguments)
            except LinkLost:
                commit.uncertain = True
                raise

        try:
            statuses = await self.client.persist(write, patience=None, what=f"commit of {group}")
        except ReplyError as error:
            if str(error).startswith("EXPIRED"):
                raise PayloadExpired(str(error)) from None
            raise
        return [None if status == b"ok" else "" if status == b"gone" else str(status, "ascii") for status in statuses]

    # -- looking after -------------------------------------------------------------------------------------------

    async def stats(self, channel: str, partition: int) -> list[Any]:
        keys = Keys.of(channel, partition)
        return list(await self.run("stats", [keys.stream, keys.meta, keys.groups]))

    async def settle_letter(
        self, channel: str, partition: int, group: str, letter: str, again: Retried | None, ttl: float
    ) -> bool:
        keys = Keys.of(channel, partition)
        names = [keys.group(group, part) for part in ("h", "due", "bod", "takes", "settled")]
        again = again or Retried(0.0, b"")
        arguments = (letter, int(ttl * 1000), again.count, again.origin, again.body)
        return bool(await self._ask("replay", channel, group, names, *arguments))

    async def rewind(self, channel: str, partition: int, group: str, position: str) -> int:
        keys = Keys.of(channel, partition)
        names = [keys.stream, keys.meta, *(keys.group(group, part) for part in ("h", "prog", "due", "bod", "takes"))]
        return int(await self._ask("rewind", channel, group, names, group, position))

    async def pause(self, channel: str, partition: int, group: str, paused: bool) -> bool:
        keys = Keys.of(channel, partition)
        names = [keys.groups, keys.group(group, "h")]
        return bool(await self._ask("pause", channel, group, names, group, int(paused)))

    async def _ask(self, name: str, channel: str, group: str, keys: list[str], *arguments: Argument) -> Any:
        """A script that acts on a group because somebody asked for it, who is told why not."""
        try:
            return await self.run(name, keys, *arguments)
        except ReplyError as error:
            if "NOGROUP" in str(error) or "no such key" in str(error):
                raise ConfigurationError(f"channel {channel!r} has no group {group!r}") from None
            raise ServerUnavailable(f"{name} of group {group!r}: Redis refuses: {error}") from None

    async def _maintain(self) -> None:
        turn = 0
        while True:
            await asyncio.sleep(TRIM_EVERY * random.uniform(0.8, 1.2))
            turn += 1
            with contextlib.suppress(ServerUnavailable, LinkLost):
                for keys, keep in list(self._known.items()):
                    await self._tend(keys, self._trim(keys, keep))
                if turn % 12 == 0:
                    for reader in list(self._readers):
                        await self._tend(reader.keys, self._reap(reader))

    async def _tend(self, keys: Keys, work: Awaitable[None]) -> None:
        """What fails for one partition holds up no other."""
        try:
            await work
        except (ServerUnavailable, LinkLost):
            raise
        except Exception as error:
            now = time.monotonic()
            if not transient(error) and now >= self._silent.get(keys, 0.0):
                self._silent[keys] = now + TELL_EVERY
                logger.exception("%s cannot be looked after: what is handled stays there", keys.base)

    async def _reap(self, reader: StreamReader) -> None:
        idle = int(max(CONSUMER_IDLE, 10 * reader.group.lease) * 1000)
        await self.run("reap", [reader.keys.stream], reader.group.name, "", idle)

    async def _trim(self, keys: Keys, keep: float) -> None:
        names = [keys.stream, keys.groups, keys.meta]
        _, *expired = await self.run("trim", names, int(keep * 1000), int(self.group_expires * 1000))
        for group, unsettled in expired:
            logger.error(
                "group %r of %s was served by nobody for %.0f s and has expired with %d unsettled events; PIPELINE_"
                "GROUP_EXPIRES sets the time", group.decode(), keys.base, self.group_expires, unsettled,
            )  # fmt: skip

    async def full(self, channel: Channel[Any], partition: int) -> bool:
        keys = Keys.of(channel.name, partition)
        return bool(await self.run("full", [keys.meta, keys.groups], channel.limit))

    def forget(self, reader: StreamReader) -> None:
        self._readers.discard(reader)
        self.renewer.discard(reader)

    async def leave(self, reader: StreamReader) -> None:
        """With its last reader a group's share of the partitions ends: others may have them, though we stay open."""
        if not any(other.share is reader.share for other in self._readers):
            share = self._shares.pop((reader.channel.name, reader.group.name), None)
            if share is not None:
                await share.close()

    async def close(self) -> None:
        if self._janitor is not None:
            self._janitor.cancel()
            await asyncio.gather(self._janitor, return_exceptions=True)
        self.renewer.stop()
        for share in self._shares.values():
            with contextlib.suppress(ServerUnavailable, LinkLost, ReplyError, TimeoutError):
                async with asyncio.timeout(FAREWELL):
                    await share.close()
        await self.client.close()
        await self._fsync.close()


class _Publication:
    """Writing to one partition, and what to do when not every frame is taken at the first try."""

    def __init__(self, streams: Streams, channel: Channel[Any], keys: Keys, client: Client) -> None:
        self.streams = streams
        self.channel = channel
        self.client = client
        self._keys = keys
        self._script = streams.scripts["publish"]
        self._names: list[str] = []
        self._source = ""
        self._rest = (channel.limit, int(channel.drops_oldest)) if channel.capacity else ()

    async def write(self, frames: Sequence[Outgoing]) -> None:
        results: list[Any] = []
        link = self.client.current
        try:
            if link is None:
                link = await self.client.link()
            if len(frames) == 1:
                results = [await self._send(link, frames[0])]
            else:
                replies = [self._send(link, frame) for frame in frames]
                await link.writable()
                results = await asyncio.gather(*replies, return_exceptions=True)
        except ServerUnavailable:
            """Nothing was sent; `recover` waits for the server."""
        except (LinkLost, ReplyError) as error:
            results = [error]
        for index in range(len(frames)):
            result = results[index] if index < len(results) else None
            if result != 1 and not (isinstance(result, list) and result[0] == 0):
                for frame in frames[:index]:
                    frame.taken = True
                await self.recover(frames[index:], result)
                break
        if self.channel.fsync:
            await self._on_disk(frames, link)

    def _send(self, link: Link, frame: Outgoing) -> asyncio.Future[Any]:
        names, *arguments = self.arguments(frame, force=False)
        future: asyncio.Future[Any] = self._script(link, names, *arguments)
        return future

    def arguments(self, frame: Outgoing, *, force: bool) -> tuple[Any, ...]:
        if frame.source != self._source:
            keys, self._source = self._keys, frame.source
            self._names = [keys.stream, keys.meta, keys.source(frame.source), keys.groups]
        arguments = (self._names, frame.first - 1, frame.first + frame.count - 1, frame.count, frame.body)
        return (*arguments, int(force), *self._rest) if force or self._rest else arguments

    async def recover(self, frames: Sequence[Outgoing], result: Any) -> None:
        """Write the frames one after the other, each until it is taken: order and idempotence need both."""
        uncertain = isinstance(result, LinkLost)
        if isinstance(result, ReplyError) and not transient(result):
            raise ServerUnavailable(f"publish to {self.channel.name!r}: Redis refuses: {result}") from None

        async def insist(frame: Outgoing) -> None:
            nonlocal uncertain
            try:
                await self._insist(frame)
            except LinkLost:
                uncertain = True
                raise

        for frame in frames:
            try:
                await self.client.persist(
                    lambda frame=frame: insist(frame),  # type: ignore[misc]
                    patience=PATIENCE,
                    what=f"publish to {self.channel.name!r}",
                )
            except ServerUnavailable as error:
                if uncertain:
                    raise PublishUncertain(
                        f"publish to {self.channel.name!r}: the connection was lost before Redis answered and it did "
                        f"not come back; the events may or may not be there ({error})"
                    ) from None
                raise
            frame.taken = True

    async def _insist(self, frame: Outgoing) -> None:
        force = False
        pause = 0.005
        while True:
            names, *arguments = self.arguments(frame, force=force)
            result = await self.streams.run("publish", names, *arguments, client=self.client)
            if result == 1 or result[0] == 0:
                return
            status, detail = result
            if status == -1:
                # The server knows less than it acknowledged (flushed, or restarted without its newest data), or has
                # forgotten an idle source. Frames are written in order, so none of these events can be there.
                force = True
            elif status == -3:
                raise PayloadExpired(f"a blob of channel {self.channel.name!r}")
            else:
                if self.channel.overflow == "raise":
                    raise channel_full(self.channel, detail)
                await asyncio.sleep(pause)
                pause = min(0.1, pause * 2)

    async def _on_disk(self, frames: Sequence[Outgoing], link: Link | None) -> None:
        """The server answers for what this very connection wrote. After another one was opened the frames are written
        again: as repeats, which are writes too, or because a restarted server has lost them."""
        while True:
            if link is not None and link is self.client.current:
                with contextlib.suppress(LinkLost):
                    return await self.sync(link)
            before = self.client.current
            await self.recover(frames, LinkLost("while waiting for the disk"))
            link = before if before is self.client.current else None

    async def sync(self, link: Link) -> None:
        """Wait until the server's append-only file holds what this connection wrote."""
        try:
            local = 0
            for _ in range(int(PATIENCE / SYNC)):
                local = local or (await link.call("WAITAOF", 1, 0, int(SYNC * 1000)))[0]
            if local < 1:
                raise PublishUncertain(f"channel {self.channel.name!r}: the append-only file was not synced in time")
        except ReplyError as error:
            if "unknown command" not in str(error):
                raise ConfigurationError(
                    f"channel {self.channel.name!r} has fsync=True, but {error}; start the server with --appendonly yes"
                ) from None
            reply = await self.client.call("CONFIG", "GET", "appendfsync", "appendonly")
            config = dict(zip(reply[::2], reply[1::2], strict=True))
            if config.get(b"appendonly") != b"yes" or config.get(b"appendfsync") != b"always":
                raise ConfigurationError(
                    f"channel {self.channel.name!r} has fsync=True; this server has no WAITAOF (Redis 7.2 has), so it "
                    "must run with --appendonly yes --appendfsync always"
                ) from None


class StreamReader:
    """One process's share of one group of one partition."""

    def __init__(self, streams: Streams, channel: Channel[Any], keys: Keys, group: Group) -> None:
        self.channel = channel
        self.keys = keys
        self.group = group
        self.held: dict[str, float] = {}
        """What this reader has and has not settled, and since when (monotonic); the renewal thread reads it."""
        self.taken_away: list[str] = []
        self.share: Share | None = None
        """Set for an exclusive group: who owns which partition."""
        self._found: list[Entry] = []
        """Taken, and not yet returned by `read`: it is held and renewed, whatever fails after it was taken."""
        self._left: bytes | None = None
        """Up to where the partition's inheritance was taken, until all of it was: nothing new is read before it."""
        self._owner = keys.group(group.name, "owner")
        self._streams = streams
        self._client = Client(streams.client.url, f"{streams.client.name}-read")
        self._cursor = "0-0"
        self._claim_at = 0.0
        self._due_at = 0.0
        self._released = -1
        self._stopping = False
        self._paused = False
        self._suspects = False
        """Events that may kill their worker wait until nothing else is in hand."""
        self._alone = ""
        """The suspect in hand; nothing is read beside it."""
        self._refused = False
        """The last read was; said once."""

    @property
    def owner(self) -> str:
        """The owner key of its partition while that is this process's; else ""."""
        return self._owner if self.share is not None and self._owner in self.share.owned else ""

    @property
    def _where(self) -> str:
        return f"group {self.group.name!r} of channel {self.channel.name!r}"

    async def regroup(self) -> None:
        keys, group = self.keys, self.group
        names = [keys.stream, keys.meta, keys.group(group.name, "h"), keys.groups]

        async def join() -> Any:
            return await self._streams.run("join", names, group.name, group.start)

        await self._streams.client.persist(join, patience=None, what=self._where)

    async def read(self, entries: int, wait: float) -> list[Entry]:
        deadline = time.monotonic() + wait
        while not self._stopping:
            try:
                if self.share is not None and not await self._may_read(self.share) and not self._found:
                    if time.monotonic() >= deadline:
                        return []
                    await asyncio.sleep(POLL)
                    continue
                if not self._found:
                    await self._seek(entries)
            except (ServerUnavailable, LinkLost) as error:
                logger.debug("%s: %s", self._where, error)
                await self._streams.client.persist(self._client.link, patience=None, what=self._where)
                continue
            except ReplyError as error:
                await self._mend(error)
                continue
            self._refused = False
            if self._found or time.monotonic() >= deadline:
                break
        found, self._found = self._found, []
        return found

    async def _seek(self, entries: int) -> None:
        await self._look(entries)
        if self._found:
            return
        if self._paused:
            await asyncio.sleep(POLL)
        elif not self._suspects:
            await self._read_new(entries)
        elif self.held:
            await asyncio.sleep(POLL)

    async def _may_read(self, share: Share) -> bool:
        """Own the partition, or come to own it; give it up when this process has more than its share."""
        key, mine = self._owner, self._owner in share.owned
        if mine and share.surplus(key):
            if not self.held:
                await self._give_up()
            return False
        if not mine and (not share.room() or await self._is_paused()):
            return False
        status = await self._streams.run("own", [key], self.group.consumer, self._lease_ms)
        if status == _TAKEN:
            if mine:
                logger.warning("%s: partition %s went to another worker", self._where, self.keys.base)
                share.owned.discard(key)
                self._lose_all()
            return False
        if status == _WAS_FREE or not mine:
            share.owned.add(key)
            self._left = b"0-0"
        if self._left is None:
            return True
        if await self._is_paused():
            return False
        await self._inherit()
        return True

    async def _is_paused(self) -> bool:
        """Asked before a partition is taken, whose last owner's entries would come with it."""
        names = self.keys.group(self.group.name, "h")
        self._paused = await self._streams.client.call("HGET", names, "paused") is not None
        return self._paused

    async def _inherit(self) -> None:
        """What the last owner left pending comes first, in order: its commits do not count any more."""
        names = [self.keys.stream, self.keys.group(self.group.name, "prog")]
        while self._left is not None:
            cursor, claimed = await self._streams.run(
                "claim", names, self.group.name, self.group.consumer, 0, self._left, 100
            )
            self._hold(_claimed(claimed))
            self._left = None if cursor == b"0-0" else cursor

    async def _look(self, entries: int) -> None:
        """Due events, hand-backs and whether the group is paused every POLL, abandoned entries twice a lease."""
        now = time.monotonic()
        if self._alone in self.held:
            await asyncio.sleep(0.001)
            return
        if now >= self._due_at:
            self._due_at = now + POLL
            await self._take_due(entries)
        if now >= self._claim_at and not self._paused:
            self._claim_at = now + self.group.lease / 2 * random.uniform(0.7, 1.0)
            await self._claim(entries)

    async def _take_due(self, entries: int) -> None:
        names = [self.keys.group(self.group.name, part) for part in ("due", "bod", "takes", "h")]
        empty = int(not self.held)
        taken, released, suspects, paused = await self._streams.run(
            "take", names, self._lease_ms, max(16, entries), SUSPICION, empty
        )
        self._suspects, self._paused = bool(suspects), bool(paused)
        if suspects and empty and taken:
            self._alone = str(taken[-1][0], "ascii")
        if suspects:
            self._due_at = 0.0
        if released != self._released:
            if self._released >= 0:
                self._claim_at = 0.0
                self._cursor = "0-0"
            self._released = released
        self._hold(_due(str(rid, "ascii"), body, times) for rid, body, times in taken)

    async def _claim(self, entries: int) -> None:
        names = [self.keys.stream, self.keys.group(self.group.name, "prog")]
        most = max(16, entries)
        cursor, claimed = await self._streams.run(
            "claim", names, self.group.name, self.group.consumer, self._lease_ms, self._cursor, most
        )
        self._cursor = str(cursor, "ascii")
        if self._cursor != "0-0":
            self._claim_at = 0.0
        if many := self._hold(_claimed(claimed)):
            logger.info("%s: took over %d abandoned entries", self._where, many)

    def _hold(self, entries: Iterable[Entry]) -> int:
        """How many of them were not in hand."""
        before, now = len(self._found), time.monotonic()
        for entry in entries:
            if entry.id in self.held:
                continue
            self.held[entry.id] = now
            self._found.append(entry)
            if not entry.apart and entry.deliveries > SUSPICION:
                self._due_at = 0.0  # it will be set apart, and nothing new is read before it
        return len(self._found) - before

    async def _read_new(self, entries: int) -> None:
        link = await self._client.link()
        reply = await link.call(
            "XREADGROUP", "GROUP", self.group.name, self.group.consumer, "COUNT", max(1, entries),
            "BLOCK", int(POLL * 1000), "STREAMS", self.keys.stream, ">",
        )  # fmt: skip
        new = reply[0][1] if reply else ()
        found = [_entry(id_, int(fields[1]), fields[3]) for id_, fields in new if _is_frame(fields)]
        for entry in found:
            self.held.pop(entry.id, None)  # a rewind hands out again what is in hand
        self._hold(found)
        for id_, fields in new:
            if not _is_frame(fields):
                await self._refuse_foreign(id_, fields)

    async def _refuse_foreign(self, id_: bytes, fields: list[bytes]) -> None:
        logger.error(
            "%s: entry %s with fields %r was not written by the pipeline and is left out; publish through it instead",
            self._where, id_.decode(), [str(name[:20]) for name in fields[:6:2]],
        )  # fmt: skip
        await self._streams.run("refuse", [self.keys.stream], self.group.name, id_)

    async def _mend(self, error: ReplyError) -> None:
        if str(error).startswith(("NOGROUP", "UNBLOCKED")):
            logger.warning("%s was gone (flushed, or a restart without data); it is made anew", self._where)
            self._lose_all()
            self._cursor = "0-0"
            await self.regroup()
            return
        if transient(error):
            if not self._refused:
                logger.warning("%s is held up: Redis refuses to be read: %s", self._where, error)
            self._refused = True
            await asyncio.sleep(0.2)
            return
        logger.error("%s: Redis refuses to be read: %s", self._where, error)
        await asyncio.sleep(1.0)

    def _lose_all(self) -> None:
        self.taken_away.extend(self.held)
        self.held.clear()
        self._found.clear()

    async def commit(self, commit: Commit) -> list[str | None]:
        token = self.group.consumer if self.group.exclusive and commit.segments else ""
        return await self._streams.commit(self.keys, self.group.name, commit, token)

    def settled(self, entry: str) -> None:
        """This entry needs no lease any more."""
        self.held.pop(entry, None)

    def holding(self) -> Holding:
        since = next(iter(self.held.values()), None)  # entries are held in the order in which they were taken
        oldest = 0.0 if since is None else time.monotonic() - since
        return Holding(len(self.held), oldest, self._paused)

    def lost(self) -> list[str]:
        lost, self.taken_away = self.taken_away, []
        return lost

    async def release(self, entries: Sequence[str]) -> None:
        ids = [id_ for id_ in entries if not id_.startswith("r")]
        rids = [id_ for id_ in entries if id_.startswith("r")]
        for id_ in entries:
            self.held.pop(id_, None)
        names = [self.keys.stream, *(self.keys.group(self.group.name, part) for part in ("due", "h", "takes"))]
        with contextlib.suppress(ServerUnavailable, LinkLost, ReplyError):
            await self._streams.run("release", names, self.group.name, self.group.consumer, len(ids), *ids, *rids)

    async def stop(self) -> None:
        self._stopping = True

    async def close(self) -> None:
        self._streams.forget(self)
        with contextlib.suppress(ServerUnavailable, LinkLost, ReplyError, TimeoutError):
            async with asyncio.timeout(FAREWELL):
                await self._give_up()
                await self._streams.leave(self)
                await self._streams.run("reap", [self.keys.stream], self.group.name, self.group.consumer, 0)
        await self._client.close()

    async def _give_up(self) -> None:
        if self.share is not None and self.owner:
            self.share.owned.discard(self._owner)
            with contextlib.suppress(ServerUnavailable, LinkLost, ReplyError):
                await self._streams.run("own", [self._owner], self.group.consumer, 0)

    @property
    def _lease_ms(self) -> int:
        return int(self.group.lease * 1000)


class StreamTail:
    """A plain XREAD: no group, no acknowledgement, nobody is disturbed."""

    def __init__(self, streams: Streams, keys: Keys, since: str) -> None:
        self.dropped = 0
        self._client = Client(streams.client.url, f"{streams.client.name}-watch")
        self._streams = streams
        self._keys = keys
        self._since = since
        self._position: int | None = None

    async def __aiter__(self) -> AsyncIterator[Entry]:
        while True:
            reply = await self._streams.client.persist(self._read, patience=None, what=f"watch {self._keys.base}")
            for id_, fields in reply[0][1] if reply else ():
                self._since = id_.decode()
                if not _is_frame(fields):
                    continue
                entry = _entry(id_, int(fields[1]), fields[3])
                position = entry.position or 0
                if self._position is not None and position - entry.count > self._position:
                    self.dropped += position - entry.count - self._position
                self._position = position
                yield entry

    async def _read(self) -> Any:
        link = await self._client.link()
        return await link.call("XREAD", "COUNT", 64, "BLOCK", 1000, "STREAMS", self._keys.stream, self._since)

    async def close(self) -> None:
        await self._client.close()


def commit_arguments(keys: Keys, group: str, commit: Commit, token: str) -> tuple[list[str], list[Argument]]:
    """KEYS and ARGV of commit.lua."""
    counts = (
        len(commit.segments), commit.handled, commit.dead, commit.retried,
        len(commit.retries), len(commit.outputs), len(commit.replies),
    )  # fmt: skip
    names = [keys.stream, keys.group(group, "h")]
    arguments: list[Argument] = [group, token, _COUNTS.pack(*counts)]
    for segment in commit.segments:
        arguments += (segment.entry, _RUN.pack(segment.count, segment.low, segment.high))
    for retry in commit.retries:
        arguments += (int(retry.delay * 1000), retry.count, retry.deliveries, retry.origin, retry.body)
    for output in commit.outputs:
        where = Keys.of(output.channel.name, output.partition)
        kind = _output_kind(output.channel)
        names += (where.stream if output.channel.durable else output.channel.name, where.meta)
        arguments += (kind, output.count, output.body)
    for reply in commit.replies:
        arguments += (reply.address, reply.body)
    return names, arguments


def _output_kind(channel: Channel[Any]) -> str:
    if not channel.durable:
        return "p"
    if channel.capacity is None:
        return "s"
    return f"{'d' if channel.drops_oldest else 'w'}{channel.limit}"


def _entry(id_: bytes, count: int, body: bytes, done: str = "", deliveries: int = 1) -> Entry:
    text = id_.decode("ascii")
    return Entry(text, body, count, done, deliveries, int(text.partition("-")[2]))


def _claimed(entries: list[Any]) -> Iterator[Entry]:
    """As claim.lua returns them."""
    for id_, count, body, done, deliveries in entries:
        yield _entry(id_, int(count), body, str(done, "ascii"), deliveries)


def _due(rid: str, body: bytes | None, taken: int) -> Entry:
    return Entry(rid, body or b"", _weight(rid), deliveries=taken)


def _is_frame(fields: list[bytes]) -> bool:
    """As claim.lua has it: of 1 to MOST_EVENTS events."""
    if len(fields) != 4 or fields[0] != b"n" or fields[2] != b"b":
        return False
    count = fields[1]
    return count.isdigit() and len(count) <= 5 and 0 < int(count) <= MOST_EVENTS


def _weight(rid: str) -> int:
    """Events behind a retry id: 5 of "r12x5@700", a frame that nobody could read."""
    return int(rid[rid.index("x") + 1 : rid.index("@")])
