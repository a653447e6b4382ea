"""Keeps leases alive from a thread of its own with its own connection, so that a busy event loop loses none."""

from __future__ import annotations

import logging
import threading
from typing import Protocol

import redis

from . import Group
from .scripts import Keys, Script

__all__ = ["Renewer"]

logger = logging.getLogger("pipeline.renewal")


class Holder(Protocol):
    """What the thread needs of a reader. `held` is changed by the event loop, `taken_away` by the thread only."""

    keys: Keys
    group: Group
    held: dict[str, float]
    taken_away: list[str]

    @property
    def owner(self) -> str: ...


class Renewer:
    """Renews all that its readers hold, three times a lease, and tells that their groups are served. A lease must
    outlast three stretches that hold the GIL."""

    def __init__(self, url: str, script: Script) -> None:
        self._url = url
        self._script = script
        self._holders: list[Holder] = []
        self._missed: set[tuple[Holder, str]] = set()
        """What Redis did not count as ours at the last renewal though held: settled, if its reply is on the way."""
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def add(self, holder: Holder) -> None:
        self._holders = [*self._holders, holder]
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pipeline-leases", daemon=True)
            self._thread.start()
        else:
            self._wake.set()

    def discard(self, holder: Holder) -> None:
        self._holders = [other for other in self._holders if other is not holder]

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def _run(self) -> None:
        client = redis.Redis.from_url(
            self._url, socket_timeout=5, socket_connect_timeout=2, client_name="pipeline-leases"
        )
        try:
            while not self._stopping:
                holders = self._holders
                pause = min((holder.group.lease for holder in holders), default=3.0) / 3
                self._wake.wait(pause)
                self._wake.clear()
                if not self._stopping:
                    self._renew(client, self._holders)
        finally:
            client.close()

    def _renew(self, client: redis.Redis, holders: list[Holder]) -> None:
        self._missed = {pair for pair in self._missed if pair[0] in holders}
        for holder in holders:
            held = list(holder.held)
            entries = [id_ for id_ in held if not id_.startswith("r")]
            apart = [id_ for id_ in held if id_.startswith("r")]
            keys, group = holder.keys, holder.group
            names = [keys.stream, keys.group(group.name, "due"), holder.owner]
            arguments: list[str | int] = [
                group.name,
                group.consumer,
                int(group.lease * 1000),
                len(entries),
                *entries,
                *apart,
            ]
            try:
                lost = self._call(client, names, arguments)
            except (redis.ConnectionError, redis.TimeoutError, OSError) as error:
                logger.debug("leases could not be renewed: %s", error)
                return
            except redis.RedisError as error:  # of this group's alone: its stream is gone, say
                logger.debug("leases of group %r could not be renewed: %s", group.name, error)
                continue
            # A settled entry is no longer pending either, and the reply to its commit may come after this one: only
            # what is missed twice and still held was taken away.
            missed = {(holder, id_) for id_ in (str(item, "ascii") for item in lost) if id_ in holder.held}
            gone = [id_ for _, id_ in missed & self._missed]
            self._missed = {pair for pair in self._missed if pair[0] is not holder} | missed
            if gone:
                logger.warning(
                    "group %r: the lease of %d entries ended; another worker has them", group.name, len(gone)
                )
                holder.taken_away.extend(gone)

    def _call(self, client: redis.Redis, names: list[str], arguments: list[str | int]) -> list[bytes]:
        try:
            return client.evalsha(self._script.sha, len(names), *names, *arguments)  # type: ignore[no-any-return]
        except redis.exceptions.NoScriptError:
            return client.eval(self._script.text, len(names), *names, *arguments)  # type: ignore[no-any-return]
