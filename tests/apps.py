"""Helpers of the tests, most of which users have too."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from pipeline.testing import serving
from pipeline.testing import settled as idle

__all__ = ["idle", "serving", "until"]


async def until(true: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait until `true()`; fail after `seconds`."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)
