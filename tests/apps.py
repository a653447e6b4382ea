"""Helpers of the tests, most of which users have too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from pipeline import Channel, Pipeline
from pipeline.testing import serving
from pipeline.testing import settled as idle

__all__ = ["declare", "idle", "serving", "until"]


async def declare(app: Pipeline, *channels: Channel[Any]) -> None:
    """As who publishes or subscribes does."""
    for channel in channels:
        await app.registry.register(channel, app.codec(channel))


async def until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until `true()`; fail after `seconds`."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)
