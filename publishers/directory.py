"""Channels by name: the catalog's with their classes, others as their processes registered them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import from_json

from pipeline import Channel, EventTypeError, Pipeline, catalog
from pipeline.registry import Record

__all__ = ["BadEvent", "Directory", "Known"]

FRESH = 2.0
"""Seconds for which a registered channel's schema is taken from memory."""

DECLARED: dict[str, Channel[Any]] = {
    channel.name: channel for channel in vars(catalog).values() if isinstance(channel, Channel)
}


class BadEvent(ValueError):
    """Raised when bytes are no event of their channel. `malformed`: they are not even JSON."""

    def __init__(self, reason: str, *, malformed: bool = False) -> None:
        super().__init__(reason)
        self.malformed = malformed


@dataclass(frozen=True, slots=True)
class Known:
    """A channel, and how its events are read from JSON: `parse` raises BadEvent with every reason."""

    channel: Channel[Any]
    parse: Callable[[bytes | str], Any]


class Directory:
    """One a process: a channel must be the same object every time, as the sequence of what is published hangs on it."""

    def __init__(self, app: Pipeline) -> None:
        self._app = app
        self._looking = asyncio.Lock()
        self._found: dict[str, Known] = {}
        self._fresh: dict[str, float] = {}
        self._records: dict[str, Record] = {}

    async def find(self, name: str) -> Known:
        """Raises UnknownChannel, naming those there are."""
        if time.monotonic() < self._fresh.get(name, 0.0):
            return self._found[name]
        if name in DECLARED:
            self._found[name] = self._declared(DECLARED[name])
            self._fresh[name] = float("inf")
            return self._found[name]
        async with self._looking:  # one at a time, or two would make two channels of one name
            if time.monotonic() >= self._fresh.get(name, 0.0):
                await self._look(name)
        return self._found[name]

    async def _look(self, name: str) -> None:
        record, before = await self._app.registry.record(name), self._records.get(name)
        if before is None or (record.durable, record.limits) != (before.durable, before.limits):
            self._found[name] = self._known(record, record.channel())
        elif record.fingerprint != before.fingerprint:
            self._found[name] = self._known(record, self._found[name].channel)
        self._records[name] = record
        self._fresh[name] = time.monotonic() + FRESH

    def _known(self, record: Record, channel: Channel[Any]) -> Known:
        """Bytes are base64 in JSON, which their schema alone does not decode."""
        return self._declared(channel) if record.type == "bytes" else _registered(record, channel)

    def _declared(self, channel: Channel[Any]) -> Known:
        codec = self._app.codec(channel)

        def parse(text: bytes | str) -> Any:
            try:
                return codec.parse(text)
            except ValidationError as error:
                raise _explain(error) from None

        return Known(channel, parse)


def _registered(record: Record, channel: Channel[Any]) -> Known:
    def parse(text: bytes | str) -> Any:
        try:
            return record.validate(from_json(text))
        except EventTypeError as error:
            raise BadEvent(str(error)) from None
        except ValueError as error:
            raise BadEvent(f"not JSON: {error}", malformed=True) from None

    return Known(channel, parse)


def _explain(error: ValidationError) -> BadEvent:
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    reasons = [f"{'.'.join(map(str, one['loc'])) or 'event'}: {one['msg']}" for one in errors[:10]]
    return BadEvent("; ".join(reasons), malformed=errors[0]["type"] == "json_invalid")
