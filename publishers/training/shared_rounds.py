"""One worker's rounds in shared memory (see `shared`): going through them, regrouping when somebody comes or goes."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.catalog import Round
from pipeline.catalog.training import mean_values
from pipeline.settings import settings

from .shared import Group, sweep, wait

if TYPE_CHECKING:
    from .run import Run

__all__ = ["SharedRounds"]

logger = logging.getLogger("publishers.training")

Vector = npt.NDArray[np.float32]

TOLD = 5.0


class SharedRounds:
    """What a mode needs: `lead` or `follow`, then `round` after `round`."""

    def __init__(self, run: Run, give_state: Callable[[], None]) -> None:
        self._run = run
        self._give_state = give_state
        self._group: Group | None = None
        self._old: Group | None = None
        self._began = self._told = 0.0
        self._given: set[str] = set()
        """Newcomers that have had a State."""

    def lead(self, members: list[int]) -> None:
        """Make the first generation."""
        self._given.update(self._run.exchange.newcomers)
        sweep(settings().shm_dir)
        run = self._run
        group = Group.make(
            settings().shm_dir, secrets.token_hex(8), run.rank, members, run.parameters.size, run.round, None
        )
        assert group is not None
        self._enter(group)

    def follow(self, note: Mapping[str, Any]) -> bool:
        """Enter the generation that a state names; False when it is not there, or not made with this worker."""
        path = note.get("group")
        group = Group.open(Path(path), self._run.rank) if path else None
        if group is None or group.me < 0:
            return False
        self._enter(group)
        return True

    def note(self) -> dict[str, Any]:
        return {"group": str(self._group.path)} if self._group is not None else {}

    def _enter(self, group: Group) -> None:
        self._run.exchange.ignore_rounds()
        if self._old is not None:
            self._old.release()
        self._old, self._group = self._group, group
        self._run.exchange.takes_part(self._run.round)

    def close(self) -> None:
        if self._group is not None:
            self._group.leave()
            self._group.release()
        if self._old is not None:
            self._old.release()
        self._group = self._old = None

    # -- rounds --------------------------------------------------------------------------------------------------

    def round(self, vector: Vector, samples: int, values: Mapping[str, float]) -> tuple[Round, Vector | None] | None:
        """Go through the open round: the Round and its mean, which is read where it lies until the next call.

        None when the group goes on without this worker.
        """
        run = self._run
        began = time.perf_counter()
        self._began = self._told = time.monotonic()
        if run.exchange.state_wanted.is_set() or self._joining():
            self._regroup()
        while True:
            group, number = self._group, run.round
            assert group is not None
            if group.me < 0 or run.exchange.lost:
                return None
            if number < group.begins:  # it was closed in the old generation
                return None if self._old is None else self._closed(self._old, number, began)
            group.contribute(number, vector, samples, values)
            if wait(lambda: group.all_contributed(number), self._disturbed):  # noqa: B023 (called at once)
                run.waited = time.perf_counter() - began
                group.reduce(number)
                if group.me == 0 and wait(lambda: group.all_done(number), self._disturbed):  # noqa: B023
                    group.close_round(number)
                if wait(lambda: group.closed > number, self._disturbed) and not group.passed:  # noqa: B023
                    return self._closed(group, number, began)
            self._regroup()

    def _closed(self, group: Group, number: int, began: float) -> tuple[Round, Vector | None]:
        run = self._run
        samples = group.samples(number)
        ranks = [rank for rank, count in zip(group.members, samples, strict=True) if count]
        given = zip(samples, group.values(number), strict=True)
        means = mean_values((count, values) for count, values in given if count)
        closed = Round(
            run=run.name, round=number, ranks=ranks, members=group.members, values=means, samples=sum(samples),
            refused=[rank for rank in group.members if rank not in ranks], seconds=time.perf_counter() - began,
        )  # fmt: skip
        if group.me == 0:
            run.exchange.announce(closed)
        if not ranks:
            return closed, None
        mean = group.result.view()
        mean.flags.writeable = False
        return closed, mean

    # -- who comes and goes --------------------------------------------------------------------------------------

    def _remaining(self) -> list[int]:
        """Who of the group is still there, as far as the aggregator and the group's file tell."""
        group, exchange = self._group, self._run.exchange
        assert group is not None
        gone = {*group.leavers()} | ({*group.members} - {*exchange.members} - {self._run.rank}) | {*self._joining()}
        return [rank for rank in group.members if rank not in gone]

    def _joining(self) -> list[int]:
        """Newcomers that wait for a State; one may have the rank of a worker that died."""
        waiting = self._run.exchange.newcomers.items()
        return [rank for name, rank in waiting if name not in self._given and rank != self._run.rank]

    def _disturbed(self) -> bool:
        """While waiting: there is a next generation, or this worker is to make one."""
        group, run = self._group, self._run
        assert group is not None
        if group.passed or run.exchange.lost:
            return True
        if time.monotonic() - self._began > run.plan.lease / 4:
            run.exchange.hurry()
        remaining = self._remaining()
        if remaining[:1] != [run.rank]:
            return False
        if self._joining():
            return True
        if len(remaining) == len(group.members):
            return False
        if len(remaining) >= run.plan.quorum:
            return True
        if time.monotonic() - self._told > TOLD:
            self._told = time.monotonic()
            logger.warning("run %s waits: ranks %s are below the quorum of %d", run.name, remaining, run.plan.quorum)
        return False

    def _regroup(self) -> None:
        """Enter the next generation; make it, where that is for this worker to do."""
        group, run = self._group, self._run
        assert group is not None
        if group.passed:
            later, since = group.later(), group.came[group.me]
            found = next((found for path in later if (found := Group.open(path, run.rank, since))), None)
            if found is not None:
                self._enter(found)
            elif later:
                time.sleep(1e-3)  # it is being made
            else:
                group.me = -1
            return
        run.exchange.state_wanted.clear()
        remaining, newcomers = self._remaining(), dict(run.exchange.newcomers)
        joining = self._joining()
        if remaining[:1] != [run.rank] or (remaining == group.members and not joining):
            return
        members = sorted(remaining + joining)
        made = Group.make(group.path.parent, _token(group), run.rank, members, group.size, run.round, group, joining)
        if made is None:
            time.sleep(1e-3)
            return
        logger.info("run %s: round %d goes on with ranks %s", run.name, made.begins, members)
        self._enter(made)
        self._given.update(newcomers)
        if joining and made.begins == run.round:
            self._give_state()


def _token(group: Group) -> str:
    return group.path.name.removeprefix("pipeline-group-").rpartition("-")[0]
