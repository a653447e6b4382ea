"""Frames: the events one publisher wrote in one go, as bytes.

    {"pipeline":1, "type":…, "schema":…, "source":…, "sequence":…, "time":…, …, "data":[event, …]}

A frame without tensors is that JSON object and nothing else, so any client can read it. With tensors, a fixed
20-byte prefix (magic, version, length of the JSON, length of the buffers), the JSON, and the raw buffers, each
aligned to 64 bytes; the JSON refers to them by offset and they are decoded without copying. Header and data are
validated in one pydantic-core call. Header names follow CloudEvents where it has one. Buffers of big tensors may lie
beside the frame (see pipeline.payloads): then the magic differs, and a reference stands in their place.

What a publisher does not know (the sequence of a handler's outputs) is left out and comes from the stream position.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json

from .channel import Channel
from .errors import EventTypeError, FrameError, FrameInvalid, FrameTruncated, FrameVersionError
from .events import check_schema
from .message import Message, trace_of, utc
from .tensors import ALIGNMENT, Buffers, Tensor, TensorBytes

__all__ = [
    "REFERENCE",
    "Address",
    "Codec",
    "Dumped",
    "Frame",
    "Header",
    "Invalid",
    "Placer",
    "header_of",
    "outline",
    "preview",
    "reference_of",
]

VERSION = 1
MOST_SOURCES = 1000
MAGIC = b"\x00PLF"
REFERENCE = b"\x00PLR"
Placer = Callable[[Buffers, int], bytes | None]
"""Given the tensors of so many events, where it put them; None: they stay in the frame."""
_PREFIX = struct.Struct("<4sB3xIQ")
_JSON_START = b'{"pipeline":'
REPLIES = "pipeline:reply:"
"""What the keys begin with that answers go to; a frame cannot name any other."""


class Dumped(NamedTuple):
    """A frame's events as JSON, and the tensors it refers to."""

    data: bytes
    buffers: Buffers | None


@dataclass(frozen=True, slots=True)
class Address:
    """Where an answer is awaited, in a frame's header: "<key>" or "<key>@<host>"."""

    key: str
    """Of a list in Redis."""
    host: str | None = None
    """Whose memory the requester shares, "" for none; None where big tensors are to be in the answer itself."""

    @classmethod
    def of(cls, text: str) -> Address:
        key, at, host = text.partition("@")
        return cls(key, host if at else None)

    def __str__(self) -> str:
        return self.key if self.host is None else f"{self.key}@{self.host}"


_Time = Annotated[float, Field(ge=0, lt=253_402_300_800)]
"""Unix seconds that a datetime can show: before the year 10000."""
_REFERENCE = re.compile(rb"shm [0-9a-f]{16} [0-9]{1,9} [0-9]{1,15}|blob [0-9a-f]{24} [0-9]{1,6}")

T = TypeVar("T")


class Header(BaseModel):
    """What one frame says of its events. Lists, where given, have one item an event."""

    model_config = ConfigDict(extra="ignore", ser_json_bytes="base64", val_json_bytes="base64", protected_namespaces=())

    pipeline: int
    """Version of the format."""
    type: str = ""
    fingerprint: str = Field(default="", alias="schema")
    """First 8 hex digits of the SHA-256 of the events' JSON schema."""
    source: str = ""
    sequence: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    """Of the first event; the others count on. None: the stream position tells."""
    time: _Time = 0.0
    """Unix seconds of publishing."""
    times: list[_Time] | None = None
    keys: list[str | None] | None = None
    attempt: int = Field(default=1, ge=1, lt=2**31)
    due: _Time | None = None
    """Unix seconds before which no handler may see the events."""
    reply: Annotated[str, Field(pattern=f"^{REPLIES}")] | None = None
    """Where an answer is awaited; see Address."""
    headers: list[dict[str, str] | None] | None = None


class _Body(Header, Generic[T]):
    data: list[T]


@dataclass(frozen=True, slots=True)
class Invalid:
    """An event of a readable frame that is not of the channel's type: what it holds, and why it was refused."""

    value: Any
    reason: str


@dataclass(slots=True)
class Frame(Generic[T]):
    """A decoded frame. `events` holds an `Invalid` where one event broke the schema."""

    channel: str
    header: Header
    events: list[T | Invalid]
    sequence: int
    nbytes: int
    buffers: TensorBytes | None = None
    invalid: list[int] = field(default_factory=list)

    def id(self, index: int) -> str:
        return f"{self.header.source}:{self.sequence + index}"

    def key(self, index: int) -> str | None:
        return self.header.keys[index] if self.header.keys else None

    def time(self, index: int) -> float:
        return self.header.times[index] if self.header.times else self.header.time

    def trace(self, index: int) -> dict[str, str]:
        return trace_of(self.header.headers[index]) if self.header.headers else {}

    def message(self, index: int) -> Message[T]:
        header = self.header
        headers = header.headers[index] if header.headers else None
        return Message(
            event=self.events[index],  # type: ignore[arg-type]  # Invalid ones never reach a handler
            id=self.id(index),
            channel=self.channel,
            source=header.source,
            time=utc(self.time(index)),
            key=self.key(index),
            attempt=header.attempt,
            headers=headers or {},
            requested=header.reply is not None,
        )


def holds(payload: bytes, count: int, position: int | None, id_: str) -> bool:
    """Whether a frame of `count` events holds the message of an id; its events are not looked at. Raises FrameError."""
    try:
        header = Header.model_validate_json(split(payload)[0])
    except ValidationError as error:
        raise FrameInvalid(_reason(error)) from None
    first = header.sequence if header.sequence is not None else (position or count) - count + 1
    source, _, number = id_.rpartition(":")
    return header.source == source and first <= int(number) < first + count


class Codec(Generic[T]):
    """Writes and reads one channel's frames."""

    def __init__(self, channel: Channel[T]) -> None:
        self.channel = channel
        item: Any = dict[str, Any] if channel.type is dict else channel.type
        # What NaN is in unions and Any, which would take the strings of Event.model_config for text.
        config = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="constants")
        self._list: TypeAdapter[list[T]] = TypeAdapter(list[item], config=config)
        own = isinstance(item, type) and issubclass(item, BaseModel)
        self._one: TypeAdapter[T] = TypeAdapter(item, config=None if own else config)
        check_schema(f"channel {channel.name!r}", self._list.core_schema)
        self._body = _Body[item]
        self._dump: Callable[..., bytes] = self._list.serializer.to_json  # pydantic's own methods take longer to call
        self._validate: Callable[..., _Body[T]] = self._body.__pydantic_validator__.validate_json
        self.schema: dict[str, Any] = self._one.json_schema()
        canonical = to_json(self.schema)
        self.fingerprint = hashlib.sha256(canonical).hexdigest()[:8]
        self.tensors = b'"format":"tensor"' in canonical or channel.type is dict
        self._plain = itertools.count(1)
        self._head = to_json({"pipeline": VERSION, "type": channel.type.__name__, "schema": self.fingerprint})[:-1]
        self._sources: dict[str, bytes] = {}
        """How frames of a source begin."""

    # -- writing -------------------------------------------------------------------------------------------------

    def check(self, events: Sequence[Any]) -> None:
        """Raise EventTypeError unless each is exactly of the channel's type: a subclass would lose fields."""
        kind = self.channel.type
        for event in events:
            if type(event) is not kind:
                raise EventTypeError(
                    f"channel {self.channel.name!r} carries {kind.__name__}, not {type(event).__name__}"
                    + (": a subclass would lose its own fields" if isinstance(event, kind) else "")
                )

    def encode(
        self,
        events: Sequence[Any],
        *,
        source: str,
        sequence: int | None,
        time: float,
        times: list[float] | None = None,
        keys: Sequence[str | None] | None = None,
        headers: Sequence[Mapping[str, str] | None] | None = None,
        attempt: int = 1,
        due: float | None = None,
        reply: str | None = None,
        place: Placer | None = None,
        dumped: Dumped | None = None,
    ) -> bytes:
        """The bytes of a frame. Raises EventTypeError when an event cannot be serialised as its type says, and whatever
        `place` raises. `dumped`: what `dump` made of these events, where that has been done."""
        text = self._sources.get(source)
        if text is None:
            if len(self._sources) > MOST_SOURCES:
                self._sources.clear()
            text = self._sources[source] = self._head + b',"source":' + to_json(source) + b',"time":'
        text += repr(time).encode()
        if sequence is not None:
            text += b',"sequence":%d' % sequence
        header: dict[str, Any] = {}
        if times is not None:
            header["times"] = times
        if keys is not None and any(key is not None for key in keys):
            header["keys"] = keys
        if headers is not None and any(headers):
            header["headers"] = headers
        if attempt != 1:
            header["attempt"] = attempt
        if due is not None:
            header["due"] = due
        if reply is not None:
            header["reply"] = reply
        if header:
            try:
                text += b"," + to_json(header)[1:-1]
            except ValueError as error:
                raise EventTypeError(f"channel {self.channel.name!r}: keys and headers are text: {error}") from None
        return _join(text, dumped or self.dump(events), len(events), place)

    def reencode(self, frame: Frame[T], index: int, *, attempt: int) -> bytes:
        """A frame of one event of another: same id, time, key and headers, with its attempt. For retries."""
        values = frame.header.headers
        return self.encode(
            [frame.events[index]],
            source=frame.header.source,
            sequence=frame.sequence + index,
            time=frame.time(index),
            keys=[frame.key(index)],
            headers=[values[index]] if values else None,
            attempt=attempt,
            reply=frame.header.reply,
        )

    def bare(self, event: str | bytes) -> bytes:
        """What travels alone, on a live channel of text or bytes. Raises EventTypeError."""
        try:
            return event.encode() if isinstance(event, str) else event
        except UnicodeEncodeError as error:
            raise EventTypeError(f"channel {self.channel.name!r}: not text: {error}") from None

    def dump(self, events: Sequence[Any]) -> Dumped:
        """Raises EventTypeError."""
        buffers = Buffers() if self.tensors else None
        try:
            if isinstance(events[0], Invalid):  # alone, as a dead letter
                data = to_json([events[0].value])
            elif self.channel.type is dict:
                data = to_json(events, bytes_mode="base64", fallback=_tensor_json)
            else:
                data = self._dump(events, context=buffers, warnings="error", by_alias=True)
        except (ValueError, TypeError, RecursionError) as error:
            raise EventTypeError(f"channel {self.channel.name!r}: an event does not match its type: {error}") from None
        return Dumped(data, buffers)

    # -- reading -------------------------------------------------------------------------------------------------

    def wrote(self, payload: bytes) -> bool:
        """Whether a frame comes from a codec of this very schema. False also where that takes longer to find out."""
        return payload.startswith(self._head)

    def decode(
        self,
        payload: bytes,
        *,
        count: int | None = None,
        position: int | None = None,
        beside: TensorBytes | None = None,
    ) -> Frame[T]:
        """Read a frame.

        count     how many events its stream entry promises
        position  events in the stream up to and including this frame: where the sequence of outputs comes from
        beside    the buffers, where they lie beside the frame

        Raises FrameError (truncated, another version, invalid); one bad event among good ones does not.
        """
        text, buffers = split(payload)
        buffers = beside or buffers
        try:
            body = self._validate(text, context=buffers, by_name=True)
            events: list[Any] = body.data
            invalid: list[int] = []
            if buffers is not None and self.channel.type is dict:  # nobody's class makes tensors of the references
                events = [plain(event, buffers) for event in events]
        except ValidationError as error:
            body, events, invalid = self._decode_slowly(text, buffers, error)
        if body.pipeline != VERSION:
            raise FrameVersionError(f"frame version {body.pipeline}; this release reads version {VERSION}")
        for name in ("keys", "times", "headers"):
            values = getattr(body, name)
            if values is not None and len(values) != len(events):
                raise FrameInvalid(f"{len(values)} {name} for {len(events)} events")
        if count is not None and len(events) != count:
            raise FrameInvalid(f"the entry promises {count} events, its frame holds {len(events)}")
        sequence = body.sequence
        if sequence is None:
            sequence = (position if position is not None else len(events)) - len(events) + 1
        nbytes = len(payload) + (len(beside.view) if beside is not None else 0)
        return Frame(self.channel.name, body, events, sequence, nbytes, buffers, invalid)

    def decode_live(self, payload: bytes) -> Frame[T]:
        """Read what arrived on a live channel: a frame, or what a plain client wrote (object, array, raw text)."""
        kind: Any = self.channel.type
        if kind is bytes or kind is str:
            try:
                event: Any = payload if kind is bytes else payload.decode()
            except UnicodeDecodeError as error:
                raise FrameInvalid(f"not UTF-8 text: {error}") from None
            return self._from_plain([event], len(payload))
        if payload.startswith((_JSON_START, MAGIC)):
            try:
                return self.decode(payload)
            except FrameError:
                if not _is_bare(payload):
                    raise
        try:
            if payload.lstrip()[:1] == b"[":
                return self._from_plain(self._list.validate_json(payload, by_name=True), len(payload))
            return self._from_plain([self._one.validate_json(payload, by_name=True)], len(payload))
        except ValidationError as error:
            raise FrameInvalid(_reason(error)) from None

    def parse(self, value: bytes | str) -> T:
        """One event from JSON. Raises pydantic's ValidationError."""
        return self._one.validate_json(value, by_name=True)

    def to_json(self, event: Any) -> Any:
        """One event as plain JSON values, tensors in their self-contained form."""
        return _proper(to_json(event, bytes_mode="base64", fallback=_tensor_json))

    def _from_plain(self, events: list[Any], nbytes: int) -> Frame[T]:
        header = Header(pipeline=VERSION, source="plain", time=time.time())
        sequence = next(self._plain)
        for _ in events[1:]:
            next(self._plain)
        return Frame(self.channel.name, header, events, sequence, nbytes)

    def _decode_slowly(
        self, text: bytes, buffers: TensorBytes | None, error: ValidationError
    ) -> tuple[Any, list[Any], list[int]]:
        """Something is wrong: find out whether it is the frame or single events of it."""
        try:
            raw = from_json(text)
        except ValueError as cause:
            kind = FrameTruncated if "EOF" in str(cause) else FrameInvalid
            raise kind(f"not JSON: {cause}") from None
        if not isinstance(raw, dict) or not isinstance(raw.get("data"), list):
            raise FrameInvalid('a frame is a JSON object with "data": […]') from None
        values = raw.pop("data")
        if raw.get("pipeline") != VERSION:
            raise FrameVersionError(f"frame version {raw.get('pipeline')!r}; this release reads version {VERSION}")
        try:
            header = Header.model_validate(raw)
        except ValidationError as cause:
            raise FrameInvalid(f"bad header: {_reason(cause)}") from None
        events: list[Any] = []
        invalid: list[int] = []
        for index, value in enumerate(values):
            try:
                events.append(self._one.validate_json(to_json(value), context=buffers, by_name=True))
            except ValidationError as cause:
                invalid.append(index)
                events.append(Invalid(plain(value, buffers), _reason(cause)))
        return header, events, invalid


def _join(header: bytes, dumped: Dumped, events: int, place: Placer | None) -> bytes:
    data, buffers = dumped
    text = header + b',"data":' + data + b"}"
    if buffers is None or not buffers.parts:
        return text
    if place is not None and (reference := place(buffers, events)) is not None:
        return _PREFIX.pack(REFERENCE, VERSION, len(text), buffers.nbytes) + text + reference
    padding = -(_PREFIX.size + len(text)) % ALIGNMENT
    prefix = _PREFIX.pack(MAGIC, VERSION, len(text), buffers.nbytes)
    return b"".join((prefix, text, bytes(padding), *buffers.parts))


def split(payload: bytes) -> tuple[bytes, TensorBytes | None]:
    """The JSON and the buffers of a frame. Raises FrameError."""
    view = memoryview(payload)
    if view[:4] == REFERENCE:
        start, _ = _reference(view)
        return bytes(view[_PREFIX.size : start]), None
    if view[:4] != MAGIC:
        if not view:
            raise FrameTruncated("an empty frame")
        return payload, None
    if len(view) < _PREFIX.size:
        raise FrameTruncated(f"{len(view)} bytes; a frame with tensors begins with {_PREFIX.size}")
    _, version, text_length, buffer_length = _PREFIX.unpack_from(view)
    if version != VERSION:
        raise FrameVersionError(f"frame version {version}; this release reads version {VERSION}")
    start = _PREFIX.size + text_length
    start += -start % ALIGNMENT
    if start + buffer_length != len(view):
        kind = FrameTruncated if start + buffer_length > len(view) else FrameInvalid
        raise kind(f"the prefix promises {start + buffer_length} bytes, there are {len(view)}")
    text = view[_PREFIX.size : _PREFIX.size + text_length]
    return bytes(text), TensorBytes(view[start:])


def reference_of(payload: bytes) -> tuple[str, int]:
    """Where the buffers of a frame lie that begins with REFERENCE, and their size. Raises FrameError."""
    start, nbytes = _reference(memoryview(payload))
    reference = payload[start:]
    if not _REFERENCE.fullmatch(reference):
        raise FrameInvalid(f"not a reference to a payload: {reference[:80]!r}")
    return reference.decode("ascii"), nbytes


def _reference(view: memoryview) -> tuple[int, int]:
    if len(view) < _PREFIX.size:
        raise FrameTruncated(f"{len(view)} bytes; a frame with tensors begins with {_PREFIX.size}")
    _, version, text_length, nbytes = _PREFIX.unpack_from(view)
    if version != VERSION:
        raise FrameVersionError(f"frame version {version}; this release reads version {VERSION}")
    if _PREFIX.size + text_length >= len(view):
        raise FrameTruncated(f"the prefix promises {text_length} bytes of JSON, there are {len(view)} in all")
    return _PREFIX.size + text_length, nbytes


def header_of(payload: bytes) -> Header | None:
    """What a frame says of its events, though they may be unreadable; None where that is, too."""
    try:
        text, _ = split(payload)
        raw = from_json(text)
        return Header.model_validate({name: value for name, value in raw.items() if name != "data"})
    except (FrameError, ValueError, AttributeError):
        return None


def plain(value: Any, buffers: TensorBytes | None) -> Any:
    """JSON values with every `$tensor` reference replaced by its self-contained form (or left, when it is broken)."""
    if isinstance(value, list):
        return [plain(item, buffers) for item in value]
    if not isinstance(value, dict):
        return value
    if buffers is not None and set(value) == {"$tensor"}:
        try:
            return buffers.tensor(value["$tensor"]).to_json()
        except ValueError:
            return value
    return {name: plain(item, buffers) for name, item in value.items()}


def preview(payload: bytes) -> Any:
    """A frame's events as plain JSON without knowing their type; for people. None when it cannot be read."""
    try:
        text, buffers = split(payload)
        raw = from_json(text)
    except (FrameError, ValueError):
        return None
    if not isinstance(raw, dict):
        return None
    return _proper(to_json(plain(raw.get("data"), buffers)))


def _proper(text: bytes) -> Any:
    """Values of JSON; its bare words, which are not JSON, as text."""
    value = from_json(text)
    if b"NaN" in text or b"Infinity" in text:
        value = from_json(to_json(value, inf_nan_mode="strings"))
    return value


def outline(data: Any) -> Any:
    """Plain JSON with its tensors by dtype and shape: nobody reads base64."""
    if isinstance(data, dict):
        if set(data) == {"dtype", "shape", "data"}:
            return f"<{data['dtype']} {data['shape']}>"
        return {name: outline(value) for name, value in data.items()}
    return [outline(item) for item in data] if isinstance(data, list) else data


def _is_bare(payload: bytes) -> bool:
    """Whether what begins like a frame is an object of somebody whose first field is called `pipeline`."""
    try:
        raw = from_json(payload)
    except ValueError:
        return False
    return not (isinstance(raw["pipeline"], int) and isinstance(raw.get("data"), list))


def _tensor_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to_json()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _reason(error: ValidationError) -> str:
    """The first few errors of a validation on one line."""
    items = error.errors(include_url=False, include_context=False, include_input=False)
    texts = [f"{'.'.join(map(str, item['loc'])) or 'event'}: {item['msg']}" for item in items[:5]]
    more = f" … and {len(items) - 5} more" if len(items) > 5 else ""
    return "; ".join(texts) + more
