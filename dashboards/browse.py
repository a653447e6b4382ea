"""A look into a channel: its newest events, tensors as pictures or statistics."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import math
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import Channel, Message, Pipeline, Tensor
from pipeline.frame import Codec

from .thumbnails import png

__all__ = ["events", "summary"]

MOST = 100
LOOK = 1.5
"""Seconds for which a live channel is listened to; it has no past."""
SIDE = 64
MOST_TEXT = 4000
TENSOR = "\0tensor"


async def events(app: Pipeline, name: str, count: int) -> dict[str, Any]:
    """The newest of a channel, newest first. Raises UnknownChannel; ConfigurationError while there is no Redis."""
    record = await app.registry.record(name)
    channel, count = record.channel(), max(1, min(count, MOST))
    found = await (app.newest(channel, count) if record.durable else _now(app, channel, count))
    return {
        "channel": name,
        "type": record.type,
        "durable": record.durable,
        "events": [_row(app.codec(channel), message) for message in found],
    }


async def _now(app: Pipeline, channel: Channel[Any], count: int) -> list[Message[Any]]:
    newest: deque[Message[Any]] = deque(maxlen=count)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LOOK), app.watch(channel, declare=False) as stream:
            async for message in stream:
                newest.appendleft(message)
    return list(newest)


def _row(codec: Codec[Any], message: Message[Any]) -> dict[str, Any]:
    return {
        "id": message.id,
        "time": message.time.timestamp(),
        "source": message.source,
        "key": message.key,
        "attempt": message.attempt,
        "headers": dict(message.headers),
        "data": summary(_plain(codec, message.event)),
    }


def _plain(codec: Codec[Any], event: Any) -> Any:
    if isinstance(event, bytes):
        return base64.b64encode(event).decode()
    return event if isinstance(event, str) else codec.to_json(event)


def summary(value: Any) -> Any:
    """JSON with tensors as `{"\\0tensor": "float32 [8, 8]", "low", "high", "mean", "picture"?}`, long texts cut short.

    No event can pass for such a summary, whose picture a browser would fetch from wherever it says: their names have no
    NUL in what comes back."""
    if isinstance(value, dict):
        if set(value) == {"dtype", "shape", "data"}:
            return _tensor(value)
        return {name.replace("\0", "␀"): summary(item) for name, item in value.items()}
    if isinstance(value, list):
        return _numbers(value) if len(value) > 64 else [summary(item) for item in value]
    if isinstance(value, str) and len(value) > MOST_TEXT:
        return f"{value[:MOST_TEXT]} … ({len(value):,} characters)"
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(values: list[Any]) -> Any:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        return [*(summary(item) for item in values[:64]), f"… and {len(values) - 64} more"]
    return {TENSOR: f"numbers {list(array.shape)}", **_statistics(array)}


def _tensor(value: dict[str, Any]) -> dict[str, Any]:
    described = {TENSOR: f"{value['dtype']} {value['shape']}"}
    try:
        array = np.asarray(Tensor.from_json(value))
    except (ValueError, TypeError):
        return described
    return {**described, **_statistics(array)}


def _statistics(array: npt.NDArray[Any]) -> dict[str, Any]:
    if not array.size or array.dtype.kind not in "fiub":
        return {}
    numbers = array.astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    found: dict[str, Any] = {"not finite": int(numbers.size - finite.size)} if finite.size < numbers.size else {}
    if finite.size:
        with np.errstate(over="ignore"):
            mean = finite.mean()
        mean = mean if np.isfinite(mean) else (finite / finite.size).sum()  # the sum of all was beyond what floats hold
        found.update(low=_short(finite.min()), high=_short(finite.max()), mean=_short(mean))
    picture = _picture(array)
    return {**found, "picture": picture} if picture else found


def _short(value: float) -> float:
    short = float(f"{value:.4g}")
    return short if math.isfinite(short) else float(value)  # the highest ones cannot be rounded up


def _picture(array: npt.NDArray[Any]) -> str | None:
    """Images as they are, matrices as grey."""
    squeezed = np.squeeze(array)
    if squeezed.ndim == 3 and squeezed.shape[0] == 3:
        squeezed = np.moveaxis(squeezed, 0, 2)
    coloured = squeezed.ndim == 3 and squeezed.shape[2] == 3
    if not (coloured or squeezed.ndim == 2) or min(squeezed.shape[:2]) < 4:
        return None
    step = max(1, -(-max(squeezed.shape[:2]) // SIDE))
    small = np.nan_to_num(squeezed[::step, ::step].astype(np.float64))
    if array.dtype != np.uint8:
        small /= 2  # the highest less the lowest may be more than floats hold
        low, high = small.min(), small.max()
        small = (small - low) / (high - low) * 255.0 if high > low else np.zeros_like(small)
    pixels = small.astype(np.uint8)
    if not coloured:
        pixels = np.repeat(pixels[:, :, None], 3, axis=2)
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()
