"""What channels there are: each process registers those it uses, so that tools can validate and read without the classes."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import jsonschema

from .channel import Channel
from .errors import ChannelConflict, EventTypeError, UnknownChannel
from .frame import Codec
from .transports import Backend

__all__ = ["Record", "Registry"]

logger = logging.getLogger("pipeline.registry")

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

    def channel(self) -> Channel[Any]:
        """The channel as somebody without its class sees it: JSON objects, or raw text or bytes."""
        kind: Any = {"str": str, "bytes": bytes}.get(self.type, dict)
        reply: Any = None if self.reply is None else {"str": str, "bytes": bytes}.get(self.reply, dict)
        limits = self.limits if self.durable else {"frame": self.limits["frame"]}
        return Channel(self.name, kind, durable=self.durable, reply=reply, **limits)

    def validate(self, value: Any) -> Any:
        """Return `value` when it fits the schema. Raises EventTypeError naming every misfit."""
        validator = jsonschema.Draft202012Validator(self.schema)
        errors = sorted(validator.iter_errors(value), key=lambda error: list(map(str, error.path)))
        if errors:
            texts = [f"{'.'.join(map(str, error.path)) or 'event'}: {error.message[:200]}" for error in errors[:5]]
            raise EventTypeError(f"not a valid {self.type} for channel {self.name!r}: {'; '.join(texts)}")
        return value


class Registry:
    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._written: set[str] = set()

    async def register(self, channel: Channel[Any], codec: Codec[Any]) -> None:
        """Write a channel's description, once a process. Raises ChannelConflict when another process differs."""
        if channel.name in self._written:
            return
        if channel.type is dict:
            known = (await self._backend.registered()).get(channel.name)
            if known is not None:  # a view without the class; its owner knows better
                self._written.add(channel.name)
                return
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
        before = await self._backend.register(channel.name, json.dumps(record).encode())
        if before is not None:
            await self._compare(channel, json.loads(before), record, before)
        self._written.add(channel.name)

    async def _compare(self, channel: Channel[Any], old: dict[str, Any], new: dict[str, Any], raw: bytes) -> None:
        for what, theirs, ours in (
            ("durable", old["durable"], new["durable"]),
            ("partitions", old["limits"]["partitions"], new["limits"]["partitions"]),
        ):
            if theirs != ours:
                await self._backend.register(channel.name, raw)
                raise ChannelConflict(
                    f"channel {channel.name!r} is declared with {what}={ours!r} here, but is in use with "
                    f"{what}={theirs!r}; channel names are global to a Redis database, so rename one of them"
                )
        if old["fingerprint"] != new["fingerprint"]:
            logger.warning(
                "channel %r: its type %s has changed since it was last declared; events of the old shape that do not "
                "fit become dead letters", channel.name, new["type"],
            )  # fmt: skip

    async def records(self) -> dict[str, Record]:
        """Every registered channel by name."""
        found = {}
        for name, raw in sorted((await self._backend.registered()).items()):
            found[name] = Record(name=name, **json.loads(raw))
        return found

    async def record(self, name: str) -> Record:
        """Raises UnknownChannel, naming those there are."""
        records = await self.records()
        if name not in records:
            known = ", ".join(other for other in records if not other.startswith("pipeline.")) or "none yet"
            raise UnknownChannel(f"no channel {name!r} is registered (known: {known}); start a process that declares it")
        return records[name]
