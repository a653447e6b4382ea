"""Channels: named flows of one event type, live (Pub/Sub) or durable (Stream)."""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, get_args

from .errors import ConfigurationError
from .events import Event

__all__ = ["Channel", "MOST_EVENTS", "Overflow", "check_name", "is_count", "is_time"]

T = TypeVar("T")
Overflow = Literal["wait", "raise", "drop_oldest"]

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_UNITS)})")
LONGEST_NAME = 195
MOST_EVENTS = 65536
"""In one frame."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:\-/]{0,199}")


def check_name(kind: str, name: str) -> str:
    """Return `name`, or raise ConfigurationError: it becomes part of Redis keys, CLI arguments and URLs."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.startswith("pipeline:"):
        raise ConfigurationError(
            f"{kind} name {name!r}: use 1 to 200 letters, digits and any of '_.:-/', beginning with a letter, "
            "digit or '_', and not with 'pipeline:'"
        )
    return name


def is_count(value: object) -> bool:
    """A whole number, at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_time(value: object) -> bool:
    """Seconds: finite, and not negative."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


@dataclass(frozen=True, slots=True, eq=False)
class Channel(Generic[T]):
    """A named flow of one event type. Names are global to a Redis database.

    type        an Event subclass; `str` or `bytes` for raw payloads; `dict` for JSON objects of any shape
    durable     True: a Redis Stream with consumer groups, exactly-once commit and replay.
                False: Redis Pub/Sub on a Redis channel of exactly this name: at most once, fan-out
    reply       the type of the answers to `request` on this channel
    frame       at most this many events travel in one stream entry; 1 spreads slow work evenly
    partitions  >1 splits a durable channel by key; with `ordered=True` each part goes to one worker at a time
    capacity    at most this many unhandled events (in each partition), or bytes of them, tensors included: "64 MB" (by
                the mean size of the latest events); then `overflow` says what happens: publishers "wait", "raise"
                ChannelFull, or the oldest events are dropped and counted ("drop_oldest")
    keep        seconds that handled events stay readable for `since=`, replay and late viewers
    fsync       True: `publish` resolves once the server has the events on disk
    """

    name: str
    type: type[T]
    durable: bool = field(default=True, kw_only=True)
    reply: Any = field(default=None, kw_only=True)
    frame: int = field(default=256, kw_only=True)
    partitions: int = field(default=1, kw_only=True)
    capacity: int | str | None = field(default=None, kw_only=True)
    overflow: Overflow = field(default="wait", kw_only=True)
    keep: float = field(default=600.0, kw_only=True)
    fsync: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_name("channel", self.name)
        if len(self.name.removesuffix(".dead")) > LONGEST_NAME:
            raise ConfigurationError(
                f"channel name {self.name!r}: use at most {LONGEST_NAME} characters, its dead letters' adds '.dead'"
            )
        where = f"Channel({self.name!r})"
        for role, kind in (("type", self.type), ("reply", self.reply)):
            if role == "reply" and kind is None:
                continue
            if kind not in (str, bytes, dict) and not (isinstance(kind, type) and issubclass(kind, Event)):
                raise ConfigurationError(f"{where}: {role} must be an Event subclass, str, bytes or dict, not {kind!r}")
        if not (is_count(self.frame) and self.frame <= MOST_EVENTS):
            raise ConfigurationError(f"{where}: frame must be between 1 and {MOST_EVENTS} events, not {self.frame!r}")
        if not (is_count(self.partitions) and self.partitions <= 1024):
            raise ConfigurationError(f"{where}: partitions must be between 1 and 1024, not {self.partitions!r}")
        if self.overflow not in get_args(Overflow):
            raise ConfigurationError(f"{where}: overflow must be one of {get_args(Overflow)}, not {self.overflow!r}")
        if self.capacity is not None and not _is_capacity(self.capacity):
            raise ConfigurationError(
                f"{where}: capacity is a number of events, at least 1, or of bytes, like '64 MB', not {self.capacity!r}"
            )
        if not is_time(self.keep):
            raise ConfigurationError(f"{where}: keep is in seconds, finite and not negative, not {self.keep!r}")
        if not self.durable and (self.capacity is not None or self.partitions != 1 or self.fsync):
            raise ConfigurationError(f"{where}: capacity, partitions and fsync are for durable channels")
        if self.raw and self.reply is not None:
            raise ConfigurationError(
                f"{where}: bare {self.type.__name__} cannot say where a reply is awaited; use an Event"
            )

    @property
    def raw(self) -> bool:
        """True for live `str` and `bytes` channels: the payload travels alone, as any Redis client writes it."""
        return not self.durable and self.type in (str, bytes)

    @property
    def limit(self) -> int | str:
        """The capacity as transports take it: events, or "<n>B", bytes; 0 without one."""
        if not isinstance(self.capacity, str):
            return self.capacity or 0
        return f"{_bytes(self.capacity)}B"

    @property
    def drops_oldest(self) -> bool:
        """True when a full channel makes room by itself, and so nobody waits for it."""
        return self.capacity is not None and self.overflow == "drop_oldest"

    def partition(self, key: str | None, turn: int = 0) -> int:
        """The partition of a key; events without one go round by `turn`."""
        if self.partitions == 1:
            return 0
        return (turn if key is None else zlib.crc32(key.encode())) % self.partitions

    def __repr__(self) -> str:
        kind = "durable" if self.durable else "live"
        return f"<Channel {self.name} of {self.type.__name__}, {kind}>"


def _bytes(size: str) -> int:
    """ "1.5 GB" → 1500000000; 0 for what is none."""
    found = _SIZE.fullmatch(size)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def _is_capacity(value: object) -> bool:
    if isinstance(value, str):
        return _bytes(value) > 0
    return is_count(value)
