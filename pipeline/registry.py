"""What channels there are: each process registers those it uses, so that tools can do without the classes."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import jsonschema
from pydantic_core import from_json

from .channel import Channel
from .errors import ChannelConflict, EventTypeError, UnknownChannel
from .frame import Codec
from .transports import Backend

__all__ = ["Record", "Registry"]

logger = logging.getLogger("pipeline.registry")

PATIENCE = 30.0
"""Seconds for which who begins to read or write waits for a Redis that went away."""
_LIMITS = ("frame", "partitions", "capacity", "overflow", "keep", "fsync")


@dataclass(frozen=True, slots=True)
class Record:
    """A registered channel."""

    name: str
    type: str
    durable: bool
    schema: dict[str, Any]
    fingerprint: str
    reply: str | None
    reply_schema: dict[str, Any] | None
    limits: dict[str, Any]

    @classmethod
    def read(cls, name: str, raw: str | bytes) -> Record:
        """As it lies in the registry; what a later release has added to it is passed over."""
        values = json.loads(raw)
        values["limits"] = {limit: values["limits"][limit] for limit in _LIMITS}
        return cls(name, **{field.name: values[field.name] for field in fields(cls) if field.name != "name"})

    def channel(self) -> Channel[Any]:
        """The channel as somebody without its class sees it: JSON objects, or raw text or bytes. The same object each
        time, so that one codec serves it."""
        limits = self.limits if self.durable else {"frame": self.limits["frame"]}
        return _view(self.name, self.type, self.durable, self.reply, tuple(limits.items()))

    def misfits(self, value: Any) -> list[tuple[str, str]]:
        """Where `value` does not fit the schema ("sensor", "window.0", "" for the whole), and why; [] when it does."""
        validator = jsonschema.Draft202012Validator(self.schema)
        errors = sorted(validator.iter_errors(value), key=lambda error: list(map(str, error.path)))
        return [(".".join(map(str, error.path)), error.message[:200]) for error in errors]

    def validate(self, value: Any) -> Any:
        """Return `value` when it fits the schema. Raises EventTypeError naming the first misfits."""
        if misfits := self.misfits(value):
            texts = [f"{place or 'event'}: {reason}" for place, reason in misfits[:5]]
            raise EventTypeError(f"not a valid {self.type} for channel {self.name!r}: {'; '.join(texts)}")
        return value

    def parse(self, given: str | bytes) -> Any:
        """An event as somebody writes it by hand: a JSON object that fits; raw text on `str` and `bytes` channels.

        Raises ValueError, EventTypeError."""
        try:
            raw = given if isinstance(given, bytes) else given.encode(errors="surrogateescape")
            if self.type == "bytes":
                return raw
            text = raw.decode()
        except UnicodeError as error:
            raise ValueError(f"not UTF-8 text: {error}") from None
        if self.type == "str":
            return text
        try:
            value = from_json(text)
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError(f"an event is a JSON object, not {text.strip()[:40]!r}")
        return self.validate(value)


@lru_cache(1024)
def _view(name: str, type_: str, durable: bool, reply: str | None, limits: tuple[tuple[str, Any], ...]) -> Channel[Any]:
    plain: dict[str, Any] = {"str": str, "bytes": bytes}
    answer = None if reply is None else plain.get(reply, dict)
    return Channel(name, plain.get(type_, dict), durable=durable, reply=answer, **dict(limits))


class Registry:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._written: dict[str, Channel[Any]] = {}
        self._records: dict[str, bytes] = {}

    async def register(self, channel: Channel[Any], codec: Codec[Any]) -> None:
        """Write a channel's description, once a process. Raises ChannelConflict when another process differs."""
        known = self._written.get(channel.name)
        if known is not None:
            _compare(channel, known.durable, known.partitions)
            return
        if channel.type is dict and await self.check(channel):
            return  # a view without the class; its owner knows better
        reply = channel.reply
        record = {
            "type": channel.type.__name__,
            "durable": channel.durable,
            "schema": codec.schema,
            "fingerprint": codec.fingerprint,
            "reply": getattr(reply, "__name__", None),
            "reply_schema": reply.model_json_schema() if hasattr(reply, "model_json_schema") else None,
            "limits": {name: getattr(channel, name) for name in _LIMITS},
        }
        raw = json.dumps(record).encode()
        before = await self._backend.register(channel.name, raw)
        if before is not None:
            old = json.loads(before)
            _compare(channel, old["durable"], old["limits"]["partitions"])  # then it was not written
            if old["fingerprint"] != codec.fingerprint:
                logger.warning(
                    "channel %r: its type %s has changed since it was last declared; events of the old shape that do "
                    "not fit become dead letters", channel.name, channel.type.__name__,
                )  # fmt: skip
        self._written[channel.name] = channel
        self._records[channel.name] = raw

    async def check(self, channel: Channel[Any]) -> bool:
        """Whether somebody has registered it. Writes nothing: who only looks at a channel does not say what it is.

        Raises ChannelConflict when it is registered as another."""
        record = await self.find(channel.name, PATIENCE)
        if record is not None:
            _compare(channel, record.durable, record.limits["partitions"])
        return record is not None

    async def keep(self) -> None:
        """Write again what a flush, or a restart without data, has erased."""
        known = await self._backend.registered()
        for name in self._records.keys() - known.keys():
            await self._backend.register(name, self._records[name])

    async def records(self) -> dict[str, Record]:
        """Every registered channel by name."""
        found = {}
        for name, raw in sorted((await self._backend.registered()).items()):
            found[name] = Record.read(name, raw)
        return found

    async def find(self, name: str, patience: float = 0.0) -> Record | None:
        """A registered channel. For so many seconds a Redis that is away is waited for."""
        raw = await self._backend.record(name, patience)
        return None if raw is None else Record.read(name, raw)

    async def record(self, name: str) -> Record:
        """Raises UnknownChannel, naming those there are."""
        record = await self.find(name)
        if record is None:
            names = sorted(other for other in await self._backend.registered() if not other.startswith("pipeline."))
            raise UnknownChannel(
                f"no channel {name!r} is registered (known: {', '.join(names) or 'none yet'}); start a process that "
                "declares it"
            )
        return record


def _compare(channel: Channel[Any], durable: bool, partitions: int) -> None:
    for what, theirs, ours in (
        ("durable", durable, channel.durable),
        ("partitions", partitions, channel.partitions),
    ):
        if theirs != ours:
            raise ChannelConflict(
                f"channel {channel.name!r} is declared with {what}={ours!r} here, but is in use with {what}={theirs!r};"
                " channel names are global to a Redis database, so rename one of them"
            )
