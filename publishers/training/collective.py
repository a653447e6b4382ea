"""Plane torch: sums go through torch.distributed (gloo, or NCCL for parameters on GPUs); events carry members and rounds.

Every worker says after its all-reduce whether it got a result. The aggregator closes the round when all have spoken, as
usual: when one failed (a peer died in the middle), nobody applies it, the group is formed anew of the members that the
Round names, and the same gradients are summed again. So no worker ever applies a round that another did not.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from pipeline.settings import settings
from pipeline.transports.client import address

from .modes import Local, Sync

__all__ = ["Collective", "LocalCollective"]

logger = logging.getLogger("publishers.training")

Vector = npt.NDArray[np.float32]

LONGEST = 30.0
"""Seconds after which an all-reduce whose peers are connected but silent has failed."""


class Collective(Sync):
    """Mode sync over torch.distributed."""

    _members: list[int]
    _store: Any = None
    _formed = False

    def lead(self, members: list[int]) -> None:
        self._members = members

    def give_state(self) -> None:
        """Called on whoever leads: open a meeting place and tell everybody where, with what newcomers need."""
        run = self.run
        run.exchange.state_wanted.clear()
        self._store = dist.TCPStore(_own_address(run.url), 0, is_master=True, wait_for_workers=False)
        tensors, note = self.state()
        where = {"store": [_own_address(run.url), self._store.port], "members": self._members}
        run.exchange.give_state(run.round, tensors, json.dumps({**json.loads(note), **where}))
        self._form(self._store)

    def follow(self, note: Mapping[str, Any], members: list[int]) -> bool:
        if self.run.rank not in note.get("members", []):
            return False
        self._members = note["members"]
        host, port = note["store"]
        try:
            self._store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
        except (RuntimeError, ValueError) as error:
            logger.info("run %s: the group's meeting place is gone: %s", self.run.name, error)
            return False
        self._form(self._store)
        return True

    def _form(self, store: Any) -> None:
        run = self.run
        self._unform()
        run.exchange.takes_part(run.round)
        try:
            dist.init_process_group(
                "nccl" if self._device().type == "cuda" else "gloo",
                store=dist.PrefixStore(str(run.round), store), rank=self._members.index(run.rank),
                world_size=len(self._members), timeout=timedelta(seconds=LONGEST),
            )  # fmt: skip
            self._formed = True
        except (RuntimeError, ValueError) as error:  # a peer died meanwhile: the next round says so
            logger.info("run %s: the group could not be formed: %s", run.name, error)

    def _unform(self) -> None:
        if self._formed:
            self._formed = False
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()

    def _device(self) -> torch.device:
        return torch.device(getattr(self.run.parameters, "device", "cpu"))

    def close(self) -> None:
        self._unform()
        self._store = None

    def exchange_(self, vector: Vector, samples: int, values: dict[str, float], apply: Any) -> None:
        run = self.run
        while True:
            mean = None
            if run.exchange.state_wanted.is_set() and run.is_reporter:
                self._unform()  # the others' sums fail, and all meet again with the newcomer
                run.exchange.state_wanted.clear()
            else:
                mean = self._sum(vector, samples)
            failed = "" if mean is not None else "no sum"
            run.exchange.push(run.round, [("none", {})], samples=samples, values=values, failed=failed)
            closed = self._await()
            if closed is None:
                return
            run.last = closed[0]
            run.round += 1
            done = mean is not None and not closed[0].refused
            if done:
                run.mean = mean
                apply(mean)
            if closed[0].members != self._members or not done:
                self._meet(closed[0].members)
            if done:
                self._checkpoint()
                return

    def _sum(self, vector: Vector, samples: int) -> Vector | None:
        """The mean weighted by samples; None when a peer is gone."""
        if not self._formed:
            return None
        sum_ = torch.from_numpy(np.append(vector * np.float32(samples), np.float32(samples))).to(self._device())
        try:
            dist.all_reduce(sum_)
        except RuntimeError as error:
            logger.info("run %s, round %d: no sum: %s", self.run.name, self.run.round, str(error).split("\n", 1)[0])
            self._unform()
            return None
        found: Vector = sum_.cpu().numpy()
        return found[:-1] / found[-1]

    def _meet(self, members: list[int]) -> None:
        """Form the group of these members; the lowest opens the meeting place."""
        run = self.run
        self._unform()
        self._members = members
        run.exchange.members = members
        if run.rank == min(members, default=run.rank):
            self.give_state()
            return
        for _ in range(int(LONGEST)):
            state = run.exchange.take_state(1.0)
            if state is not None and state.round >= run.round:
                if self.follow(json.loads(state.note or "{}"), members):
                    return
                run.exchange.forget()
            if min(members) not in run.exchange.members:
                return  # the leader died: the next round fails, and another leads

    def _await(self) -> Any:
        """A round that is closed; states are given between rounds only."""
        exchange, number = self.run.exchange, self.run.round
        exchange.wait(lambda: exchange.has(number), None)
        return exchange.take(number)


class LocalCollective(Collective, Local):
    """Mode local over torch.distributed."""


def _own_address(url: str | None) -> str:
    """This host's address on the way to Redis."""
    where = address(url or settings().redis_url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((where.get("host", "127.0.0.1"), where.get("port", 6379)))
        return str(probe.getsockname()[0])
    return "127.0.0.1"
