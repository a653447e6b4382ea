"""Who reads which partition of an ordered group: each is leased to one worker, and moves when one joins or dies.

Every worker announces itself; with w workers and p partitions each may own up to ⌈p/w⌉ and gives up what is more, once
what it has in hand of it is committed. Commits carry the owner's name as a fencing token (see commit.lua).
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable
from typing import Any

from ..errors import ServerUnavailable
from . import Group
from .client import LinkLost, ReplyError

__all__ = ["Share"]

logger = logging.getLogger("pipeline.partitions")

Run = Callable[..., Awaitable[Any]]


class Share:
    """One process's share of the partitions of one ordered group."""

    def __init__(self, run: Run, group: Group, members: str, owners: list[str]) -> None:
        self.most = 0
        """Partitions this process may own now."""
        self.owned: set[str] = set()
        """Owner keys of the partitions it owns; readers add and remove theirs."""
        self._run = run
        self._group = group
        self._members = members
        self._owners = owners
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        if self._task is None:
            await self._look()
            self._task = asyncio.create_task(self._keep(), name=f"partitions of {self._group.name}")

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._group.lease / 3 * random.uniform(0.8, 1.0))
            try:
                await self._look()
            except (ServerUnavailable, LinkLost, ReplyError) as error:
                logger.debug("partitions of %r: %s", self._group.name, error)

    async def _look(self) -> None:
        lease = int(self._group.lease * 1000)
        workers, _ = await self._run("share", [self._members, *self._owners], self._group.consumer, lease)
        self.most = math.ceil(len(self._owners) / max(1, workers))

    def surplus(self, owner: str) -> bool:
        """This partition is more than our share: its reader should finish what it holds and give it up."""
        return owner in sorted(self.owned)[self.most :]

    def room(self) -> bool:
        return len(self.owned) < self.most

    async def close(self) -> None:
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        await self._run("share", [self._members, *self._owners], self._group.consumer, 0)
