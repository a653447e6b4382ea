"""Plane torch: sums go through torch.distributed (gloo; NCCL where each worker has a GPU); events carry the rounds.

    sum ─▶ push(ok or failed) ─▶ aggregator: Round when all members have spoken ─▶ all apply their sum, or nobody does

When one failed (a peer died in the middle), nobody applies anything: the group is formed anew of the members that the
Round names, and the same gradients are summed again. So no worker ever applies a round that another did not. A gradient
that is not finite takes part as zeros that count for no sample, and its worker says so. To form a
group, the lowest rank that was in the round opens a store and publishes a State that says where; everybody signs there
with the GPU it has, newcomers too, and when all have, they connect. Whoever waits, for a signature or a sum, looks at
the members meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from pipeline.catalog import NO_SUM
from pipeline.settings import settings
from pipeline.transports.client import address

from .modes import Local, Sync

__all__ = ["Collective", "LocalCollective", "each_has_its_own", "gpu_of"]

logger = logging.getLogger("publishers.training")

Vector = npt.NDArray[np.float32]

LONGEST = 10.0
"""Seconds after which a sum whose peers are connected but silent has failed. They sum again when all are there."""
STORE_PATIENCE = 2.0

_abandoned: list[tuple[Any, Any]] = []
"""Groups with a sum that never ended: to drop one would wait for it."""


class Collective(Sync):
    """Mode sync over torch.distributed."""

    _members: list[int]
    _store: Any = None
    _group: Any = None
    _on = torch.device("cpu")
    """Where the group sums."""
    state_wanted = False
    """A State says where the next group meets, and comes after the round."""

    # -- forming a group -----------------------------------------------------------------------------------------

    def lead(self, members: list[int]) -> None:
        self._members = members

    def give_state(self) -> None:
        """Called on whoever leads: open a meeting place and tell everybody where, with what newcomers need."""
        run = self.run
        run.exchange.state_wanted.clear()
        where = _own_address(run.url)
        self._drop_group()
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            where, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=STORE_PATIENCE)
        )
        tensors, note = self.state()
        meeting = {"store": [where, self._store.port], "members": self._members}
        run.exchange.give_state(run.round, tensors, json.dumps({**json.loads(note), **meeting}))
        self._form()

    def follow(self, note: Mapping[str, Any], members: list[int]) -> bool:
        if self.run.rank not in note.get("members", []):
            return False
        self._members = note["members"]
        self._drop_group()
        host, port = note["store"]
        try:
            self._store = dist.TCPStore(  # type: ignore[attr-defined]
                host, port, is_master=False, timeout=timedelta(seconds=STORE_PATIENCE)
            )
        except (RuntimeError, ValueError) as error:
            logger.info("run %s: the group's meeting place is gone: %s", self.run.name, error)
            return False
        self._form()
        return True

    def _form(self) -> None:
        """Sign, wait for the others' signatures, connect. What fails here shows as a sum that fails."""
        run, store = self.run, self._store
        run.exchange.takes_part(run.round)
        run.exchange.wait(lambda: run.exchange.awaited, run.plan.lease)  # else a sum with it could close without it
        signatures = [f"{run.round}/{rank}" for rank in self._members]
        try:
            store.set(f"{run.round}/{run.rank}", gpu_of(run.parameters.device))
            if self._until(lambda: bool(store.check(signatures))):
                gpus = [store.get(signature).decode() for signature in signatures]
                self._on = torch.device(run.parameters.device if each_has_its_own(gpus) else "cpu")
                self._group = self._connect(dist.PrefixStore(str(run.round), store))  # type: ignore[attr-defined]
        except (RuntimeError, ValueError) as error:  # whoever keeps the store is gone, or a peer
            logger.info("run %s: the group could not be formed: %s", run.name, _first_line(error))

    def _connect(self, store: Any) -> Any:
        rank, size, most = self._members.index(self.run.rank), len(self._members), timedelta(seconds=LONGEST)
        if self._on.type == "cuda":
            return dist.ProcessGroupNCCL(store, rank, size, most)  # type: ignore[arg-type]
        return dist.ProcessGroupGloo(store, rank, size, most)

    def _until(self, done: Callable[[], bool]) -> bool:
        """Wait; False when a member is gone meanwhile, or it takes too long."""
        began, pause = time.monotonic(), 5e-5
        while not done():
            waited = time.monotonic() - began
            if waited > self.run.plan.lease / 4:
                self.run.exchange.hurry()
            if {*self._members} - {*self.run.exchange.members} or waited > LONGEST:
                return done()
            time.sleep(pause)
            pause = min(2 * pause, 2e-3)
        return True

    def _drop_group(self) -> None:
        self._group = None
        _abandoned[:] = [(group, work) for group, work in _abandoned if not work.is_completed()]

    def close(self) -> None:
        self._drop_group()
        self._store = None

    # -- rounds --------------------------------------------------------------------------------------------------

    def exchange_(self, vector: Vector, samples: int, values: dict[str, float], apply: Any) -> None:
        run = self.run
        run.sent = vector.nbytes
        while True:
            finite = bool(np.isfinite(vector).all())
            mean = self._sum(vector, samples) if finite else self._sum(np.zeros_like(vector), 0)
            failed = NO_SUM if mean is None else "" if finite else "not finite"
            run.exchange.push(run.round, [("none", {})], samples=samples, values=values, failed=failed)
            heard = self._await()
            if heard is None:
                return  # it was given another worker's state
            [closed] = heard
            spoken = [*closed.ranks, *closed.refused]
            if run.rank not in spoken:
                logger.warning("run %s: round %d went on without this worker", run.name, run.round)
                self._begin(again=True)
                return
            run.last = closed
            run.round += 1
            done = not closed.again
            if done and closed.ranks:
                run.mean = mean
                apply(mean)
            if not done or closed.members != self._members or closed.state_from is not None:
                self._meet(closed.members, min(spoken))
            if done:
                self._checkpoint()
                return

    def _sum(self, vector: Vector, samples: int) -> Vector | None:
        """The mean weighted by samples; None when a peer is gone."""
        if self._group is None:
            return None
        sum_ = torch.from_numpy(np.append(vector * np.float32(samples), np.float32(samples))).to(self._on)
        try:
            work = self._group.allreduce([sum_])
            if self._until(work.is_completed):
                work.wait()
                whole: Vector = sum_.cpu().numpy()
                mean: Vector = whole[:-1] / max(whole[-1], np.float32(1))
                return mean
            _abandoned.append((self._group, work))
        except RuntimeError as error:
            logger.info("run %s, round %d: no sum: %s", self.run.name, self.run.round, _first_line(error))
        self._drop_group()
        return None

    def _meet(self, members: list[int], leader: int) -> None:
        """Form the group of these members."""
        run = self.run
        self._drop_group()
        self._members = members
        run.exchange.members = members
        if run.rank == leader:
            self.give_state()
            return
        run.exchange.takes_part(run.round)
        state = None

        def given() -> bool:
            nonlocal state
            state = run.exchange.take_state(0.0, lowest_rank=0)
            return state is not None and state.round >= run.round

        if self._until(given) and state is not None:
            self.follow(json.loads(state.note or "{}"), members)


class LocalCollective(Collective, Local):
    """Mode local over torch.distributed."""


def gpu_of(device: str) -> str:
    """What tells a GPU that NCCL can use from all others; "none" for anything else."""
    if torch.device(device).type != "cuda" or not dist.is_nccl_available():
        return "none"
    return str(torch.cuda.get_device_properties(device).uuid)


def each_has_its_own(gpus: Sequence[str]) -> bool:
    """NCCL takes one worker a GPU; others sum on their CPUs, by gloo."""
    return "none" not in gpus and len({*gpus}) == len(gpus)


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def _own_address(url: str | None) -> str:
    """This host's address on the way to Redis."""
    where = address(url or settings().redis_url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((where.get("host", "127.0.0.1"), where.get("port", 6379)))
        return str(probe.getsockname()[0])
    return "127.0.0.1"
