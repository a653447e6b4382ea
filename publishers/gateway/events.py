"""A channel as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from pydantic_core import to_json

from pipeline import Message
from pipeline.frame import Codec
from pipeline.watching import Watch, undisturbed

__all__ = ["event_stream"]

HEARTBEAT = 15.0
"""Seconds of silence after which a comment tells the client, and proxies, that the stream is alive."""


async def event_stream(watch: Watch[Any], codec: Codec[Any]) -> AsyncIterator[bytes]:
    """`id:` and `data:` for each event, until the client goes."""
    messages = aiter(await watch.__aenter__())
    following: asyncio.Future[Message[Any]] = asyncio.ensure_future(anext(messages))
    try:
        yield b": connected\n\n"
        while True:
            done, _ = await asyncio.wait({following}, timeout=HEARTBEAT)
            if not done:
                yield b": alive\n\n"
                continue
            try:
                message = following.result()
            except StopAsyncIteration:
                return
            following = asyncio.ensure_future(anext(messages))
            yield _lines(message, codec)
    finally:
        await undisturbed(_close(watch, following))


async def _close(watch: Watch[Any], following: asyncio.Future[Message[Any]]) -> None:
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await watch.__aexit__()


def _lines(message: Message[Any], codec: Codec[Any]) -> bytes:
    data = to_json(codec.to_json(message.event))  # JSON has no line ends of its own
    return b"id: " + message.id.encode() + b"\ndata: " + data + b"\n\n"
