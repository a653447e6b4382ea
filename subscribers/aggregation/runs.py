"""A run as one aggregator sees it: who takes part, the open round, and when it closes. No Redis here.

    joined ──(enough workers)──▶ begun ─▶ round 0 open ──all members in, or deadline and quorum──▶ Round 0 ─▶ round 1 …

Rounds are closed by the contribution that completes them, or by the clock (`due`). A member is whoever gave a sign of
life within its lease; one that joined a run under way is not waited for until it has contributed. An aggregator that
takes over knows nothing: the first message of a run tells it the plan, and it closes no round before it has heard from
as many members as that worker knew of, or for the length of a lease.

When nobody is left, the run begins in a later *life*, maybe from a checkpoint some rounds before. Messages of an
earlier one may still come: of workers that were killed, through an aggregator that was killed too, or of one that slept
through it all. They count for nothing, and who sleeps no more is told to join.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline import Reject, Tensor
from pipeline.catalog import NO_SUM, Admission, Contribution, Round, RunPlan, State
from pipeline.catalog.compression import clipped, decode, merge, nbytes_of
from pipeline.catalog.training import mean_values

from .checkpoints import Checkpoint, keep, latest
from .optimizers import Optimizer

__all__ = ["Answer", "Member", "Run", "Server"]

logger = logging.getLogger("subscribers.aggregation")

Output = Admission | Round | State

SHORTEST_DEADLINE = 0.2
"""Seconds that an adaptive deadline leaves at least."""
REMEMBERED = 64
"""Closed rounds of which it is known whose contributions came."""
REPEAT = 0.3
"""Seconds after which a worker that still waits for a closed round is sent it again."""


@dataclass(slots=True)
class Member:
    rank: int
    seen: float
    active: bool
    """It is waited for."""
    fed: bool = False
    """It has the run's state, and takes part."""
    host: str = ""
    attempt: int = 0
    """How often it has joined."""
    waits: bool = False
    """It has joined since the run last ended, and waits for it to begin."""


@dataclass(slots=True)
class Answer:
    """What comes of a message."""

    outputs: list[Output]
    close: bool = False
    """The open round is complete: close it."""


class Run:
    """Modes sync and local, and of hogwild the membership. Times are seconds of a monotonic clock."""

    def __init__(self, run: str, shard: int, plan: RunPlan, now: float) -> None:
        self.name = run
        self.shard = shard
        self.plan = plan
        self.members: dict[str, Member] = {}
        self.round = 0
        self.life = 0
        self.begun = False
        self.late = 0
        """Contributions that came after their round was closed."""
        self.closing = False
        self.heard = now
        """The last message."""
        self._held: dict[int, Contribution] = {}
        self._stale: list[tuple[int, Contribution]] = []
        self._failed: dict[int, str] = {}
        self._counted: dict[int, set[int]] = {}
        """Whose contributions to the last few closed rounds are here, by round."""
        self._first = 0.0
        """When the open round's first contribution came."""
        self._gathering = 0.0
        """What rounds usually take from the first to the last contribution."""
        self._held_back = 0.0
        self._expected = 0
        self._wanted = False
        """Somebody waits for a State."""
        self._last: tuple[Round, float] | None = None

    # -- members -------------------------------------------------------------------------------------------------

    def take(self, sent: Contribution, now: float) -> Answer:
        """Whatever a worker sends. Raises Reject saying what was expected."""
        self._check(sent)
        self.heard = now
        if sent.action == "leave":
            return self._leave(sent, now)
        if sent.action == "join":
            return self._join(sent, now)
        if self._is_of_an_earlier_life(sent):
            return Answer([self._elsewhere(sent)] if sent.action == "beat" else [])
        member = self._member(sent, now)
        if sent.rank != member.rank:
            sent = sent.model_copy(update={"rank": member.rank})
        if sent.action == "push":
            return self._push(sent, member, now)
        if sent.action == "state":
            return self._state(sent)
        return self._beat(sent, member, now)

    def _check(self, sent: Contribution) -> None:
        mine, theirs = self.plan, sent.plan
        for name in ("mode", "size", "plane"):
            if getattr(mine, name) != getattr(theirs, name) and "auto" not in (
                getattr(mine, name),
                getattr(theirs, name),
            ):
                raise Reject(
                    f"run {self.name!r} has {name} {getattr(mine, name)!r}; worker {sent.worker} came with "
                    f"{getattr(theirs, name)!r}. Give the run another name, or all workers the same"
                )

    def _join(self, sent: Contribution, now: float) -> Answer:
        member = self.members.get(sent.worker)
        if member is None:
            taken = {other.rank for other in self.members.values()}
            rank = sent.rank if sent.rank >= 0 and sent.rank not in taken else _lowest_free(taken)
            member = self.members[sent.worker] = Member(rank, now, active=not self.begun, host=sent.host)
            logger.info("run %s: rank %d joins (%s)", self.name, rank, sent.worker)
        member.seen = now
        if sent.base > member.attempt:
            member.active = not self.begun or (member.active and sent.round >= 0)  # else it lost track
            member.fed = False
            member.attempt = sent.base
        member.active = member.active or not self.begun
        member.waits = True
        elsewhere = (
            self.begun
            and self.plan.plane == "shm"
            and sent.host not in {m.host for m in self.members.values() if m.host}
        )
        if elsewhere or (self.plan.plane == "shm" and not sent.host):
            del self.members[sent.worker]
            reason = (
                f"run {self.name!r} uses the shared memory of another host, or a folder of it that this worker does "
                'not see; begin the run with join(..., plane="redis") everywhere'
            )
            return Answer([self._admission(sent.worker, member, ready=False).model_copy(update={"reason": reason})])
        if not self.begun and sum(member.waits for member in self.members.values()) >= self.plan.workers:
            self._begin()
        if self.begun and not member.fed and self._resumed is None and any(m.fed for m in self.members.values()):
            self._wanted = True
        return Answer([self._admission(sent.worker, member, ready=self._ready())])

    def _begin(self) -> None:
        self.begun = True
        self.life = max(self.life + 1, int(1000 * time.time()))
        for member in self.members.values():
            member.active = member.waits  # the rest waits for a State of a life that is over, and will join yet
        if self.plan.plane == "auto":
            hosts = {member.host for member in self.members.values()}
            plane: Literal["shm", "redis"] = "shm" if len(hosts) == 1 and "" not in hosts else "redis"
            self.plan = self.plan.model_copy(update={"plane": plane})
        found = latest(self.name, self.shard) if self.plan.checkpoint else None
        if found is not None:
            self.round = found.round
            self._resumed = found
            logger.info("run %s goes on from the checkpoint of round %d", self.name, found.round)

    _resumed: Checkpoint | None = None
    """What the run begins with; until somebody takes part."""

    def state(self) -> State | None:
        """What a worker that joins begins with, where that is the aggregator's to say."""
        return None if self._resumed is None else _state(self.name, self._resumed, self.life)

    def _ready(self) -> bool:
        return self.begun

    def _member(self, sent: Contribution, now: float) -> Member:
        """Raises Reject for who never joined; a worker that was given up, or that another aggregator knew, is back.

        It has another rank where its own has been given away; the answer says so.
        """
        if sent.rank < 0:
            raise Reject(f"run {self.name!r}: worker {sent.worker} has not joined")
        if self._takes_over(sent):
            self.begun, self.life = True, sent.life
            self.round = max(self.round, sent.round)
            self._held_back, self._expected = now + self.plan.lease, sent.peers
            logger.info("run %s is taken over in round %d", self.name, self.round)
        member = self.members.get(sent.worker)
        if member is None:
            taken = {other.rank for other in self.members.values()}
            rank = _lowest_free(taken) if sent.rank in taken else sent.rank
            active = not self.begun or now < self._held_back
            member = self.members[sent.worker] = Member(rank, now, active=active, host=sent.host)
        member.seen = now
        return member

    def _takes_over(self, sent: Contribution) -> bool:
        """The run is under way, as somebody who takes part in it says, and this aggregator did not know."""
        return not self.begun and sent.round >= 0

    def _is_of_an_earlier_life(self, sent: Contribution) -> bool:
        """It takes part in a life that is over. Where its life is the later one, ours was of a message of the dead."""
        if not self.begun or sent.round < 0 or sent.life in (0, self.life):
            return False
        if sent.life < self.life:
            return True
        logger.info("run %s: what was taken over is an earlier life of it", self.name)
        self.members.clear()
        self._end()
        return False

    def _end(self) -> None:
        """Nobody is left that has the run's state: whoever comes next begins anew, or from a checkpoint."""
        self.begun = False
        self.round = 0
        self._held, self._stale, self._failed, self._counted = {}, [], {}, {}
        self._held_back, self._expected, self._wanted, self._last = 0.0, 0, False, None
        for member in self.members.values():
            member.active, member.fed, member.waits = True, False, False

    def _leave(self, sent: Contribution, now: float) -> Answer:
        member = self.members.pop(sent.worker, None)
        if member is not None:
            logger.info("run %s: rank %d leaves", self.name, member.rank)
        if not any(member.active for member in self.members.values()):
            self._end()
        return Answer([self._elsewhere(sent)], close=self._complete(now))

    def _elsewhere(self, sent: Contribution) -> Admission:
        """For who is no member."""
        return Admission(
            run=self.name, worker=sent.worker, rank=sent.rank, shard=self.shard, ready=False, round=self.round,
            members=self._ranks(), life=self.life,
        )  # fmt: skip

    def _takes_part(self, member: Member, round_: int) -> None:
        """A member says that it is in a round: whatever came before that is closed."""
        member.active, member.fed, self._resumed = True, True, None
        self._wanted = self._wanted and not all(member.fed for member in self.members.values())
        if round_ > self.round:  # we took over, and others were further
            self.round, self._held, self._failed = round_, {}, {}

    def _beat(self, sent: Contribution, member: Member, now: float) -> Answer:
        outputs: list[Output] = []
        push = False
        if sent.round >= 0:
            self._takes_part(member, sent.round)
            if self._last is not None and sent.round == self._last[0].round and now - self._last[1] > REPEAT:
                outputs.append(self._last[0])
                self._last = self._last[0], now
            push = (
                self.plan.plane in ("redis", "torch")
                and sent.round == self.round
                and member.rank not in self._held
                and member.rank not in self._failed
            )
        admission = self._admission(sent.worker, member, ready=self._ready(), push_wanted=push)
        return Answer([admission, *outputs], close=self._complete(now))

    def _admission(self, worker: str, member: Member, *, ready: bool, push_wanted: bool = False) -> Admission:
        source = self._source()
        return Admission(
            run=self.name, worker=worker, rank=member.rank, shard=self.shard, ready=ready, round=self.round,
            members=self._ranks(), source=source, push_wanted=push_wanted, plane=self.plan.plane,
            settled=self._settled, life=self.life,
            newcomers={
                f"{name} {member.attempt}": member.rank for name, member in self.members.items() if not member.active
            }
            if self.begun
            else {},
            state_wanted=self._wanted and member.rank == source and member.active,
        )  # fmt: skip

    @property
    def _settled(self) -> bool:
        return self.heard >= self._held_back or len(self.members) >= self._expected

    def _source(self) -> int:
        """Who gives new workers what they begin with; -1: the aggregator's own checkpoint."""
        if self._resumed is not None:
            return -1
        fed = [member.rank for member in self.members.values() if member.fed]
        return min(fed or [member.rank for member in self.members.values() if member.active], default=-1)

    def _ranks(self) -> list[int]:
        return sorted(member.rank for member in self.members.values())

    def _state(self, sent: Contribution) -> Answer:
        """A worker's state, for a checkpoint."""
        tensors = {name: np.asarray(tensor) for name, tensor in sent.parts.items()}
        keep(self.name, self.shard, Checkpoint(sent.round, tensors, {"note": sent.note}))
        return Answer([])

    # -- rounds --------------------------------------------------------------------------------------------------

    def _push(self, sent: Contribution, member: Member, now: float) -> Answer:
        if sent.round < self.round:
            self.late += 1
            if self.plan.late == "drop":
                return Answer([])
            counted = self._counted.setdefault(sent.round, set())
            if member.rank in counted:
                return Answer([])  # it came twice
            counted.add(member.rank)
            self._stale.append((self.round - sent.round, sent))
            member.active = True
            return Answer([])
        self._takes_part(member, sent.round)
        if member.rank in self._held:
            return Answer([])  # it came twice
        if not self._held and not self._failed:
            self._first = now
        if sent.failed:
            self._failed[member.rank] = sent.failed
        else:
            self._held[member.rank] = sent
        return Answer([], close=self._complete(now))

    def _complete(self, now: float) -> bool:
        if self.closing or not self.begun or not (self._held or self._failed):
            return False
        if now < self._held_back and len(self.members) < self._expected:
            return False
        here = self._held.keys() | self._failed.keys()
        awaited = {member.rank for member in self.members.values() if member.active}
        if awaited <= here:
            return len(here) >= self.plan.quorum or self._is_given_up_for_newcomers
        return len(self._held) >= self.plan.quorum and now >= self._first + self._deadline()

    @property
    def _is_given_up_for_newcomers(self) -> bool:
        """Below the quorum a round waits for others to come. On plane torch they come in between two rounds."""
        return self.plan.plane == "torch" and not all(member.active for member in self.members.values())

    def _deadline(self) -> float:
        if self.plan.deadline is None:
            return math.inf
        if self.plan.deadline == "adaptive":
            return max(SHORTEST_DEADLINE, 4 * self._gathering)
        return self.plan.deadline

    def due(self, now: float) -> bool:
        """By the clock: drop members whose lease has ended. Returns whether the open round is complete."""
        for worker, member in list(self.members.items()):
            if now - member.seen > self.plan.lease:
                del self.members[worker]
                logger.warning("run %s: rank %d gave no sign of life for %g s", self.name, member.rank, self.plan.lease)
        if self.begun and not any(member.active for member in self.members.values()):
            self._end()
        return self._complete(now)

    def close(self, now: float) -> tuple[Round, list[tuple[float, Contribution]]]:
        """Open the next round. Returns the closed one without its mean, and what belongs into that, by rank."""
        ranks = sorted(self._held)
        parts: list[tuple[float, Contribution]] = [(1.0, self._held[rank]) for rank in ranks] + [
            (1 / (1 + age), sent) for age, sent in sorted(self._stale, key=lambda item: (item[1].rank, item[1].round))
        ]
        weights = [(scale * sent.samples, sent) for scale, sent in parts]
        total = sum(sent.samples * scale for scale, sent in parts) or 1.0
        self._gathering += 0.1 * (now - self._first - self._gathering)
        closed = Round(
            run=self.name, round=self.round, shard=self.shard, life=self.life, ranks=ranks, members=self._ranks(),
            refused=sorted(self._failed), again=self._is_summed_again, late=len(self._stale),
            values=mean_values((weight, sent.values) for weight, sent in weights),
            samples=sum(sent.samples for _, sent in parts), seconds=now - self._first,
            state_from=self._source() if self._wanted else None,
        )  # fmt: skip
        self._wanted = False
        self._counted[self.round] = {*ranks, *self._failed}
        while len(self._counted) > REMEMBERED:
            del self._counted[min(self._counted)]
        self._held, self._stale, self._failed = {}, [], {}
        self.round += 1
        return closed, [(weight / total, sent) for weight, sent in weights]

    @property
    def _is_summed_again(self) -> bool:
        spoken = len(self._held) + len(self._failed)
        return self.plan.plane == "torch" and (NO_SUM in self._failed.values() or spoken < self.plan.quorum)

    def mean(self, closed: Round, summands: list[tuple[float, Contribution]]) -> Round:
        """The closed round with its mean. This is the work; it may run in a thread."""
        if not any(sent.parts for _, sent in summands):
            return closed
        try:
            codec, parts, bad = self._merge(summands)
            left_out = [summands[index][1].rank for index in bad]
        except ValueError:
            summands, left_out = self._without_misfits(closed.round, summands)
            codec, parts, bad = self._merge_or_nothing(closed.round, summands)
            left_out += [summands[index][1].rank for index in bad]
        if bad:
            logger.warning("run %s, round %d: not finite, left out: ranks %s", self.name, closed.round, left_out)
        if self.plan.clip is not None and parts:
            codec, parts = clipped(codec, parts, self.plan.size, self.plan.clip)
        return closed.model_copy(
            update={
                "codec": codec,
                "parts": parts,
                "refused": sorted({*closed.refused, *left_out}),
                "ranks": [rank for rank in closed.ranks if rank not in left_out],
            }
        )

    def _merge(self, summands: list[tuple[float, Contribution]]) -> tuple[str, dict[str, Tensor], list[int]]:
        return merge([(weight, sent.codec, sent.parts) for weight, sent in summands], self.plan.size)

    def _merge_or_nothing(
        self, number: int, summands: list[tuple[float, Contribution]]
    ) -> tuple[str, dict[str, Tensor], list[int]]:
        """The next round is open already: this one is closed, if need be with nothing."""
        try:
            return self._merge(summands)
        except ValueError:
            logger.exception("run %s, round %d: what was sent cannot be summed", self.name, number)
            return "none", {}, list(range(len(summands)))

    def _without_misfits(
        self, number: int, summands: list[tuple[float, Contribution]]
    ) -> tuple[list[tuple[float, Contribution]], list[int]]:
        """What is of its codec and of the run's size, with weights that add up to 1; and the ranks of the rest."""
        good: list[tuple[float, Contribution]] = []
        misfits: list[int] = []
        for weight, sent in summands:
            try:
                decode(sent.codec, sent.parts, self.plan.size)
                good.append((weight, sent))
            except ValueError as error:
                misfits.append(sent.rank)
                logger.error("run %s, round %d: what rank %d sent is left out: %s", self.name, number, sent.rank, error)
        total = sum(weight for weight, _ in good) or 1.0
        return [(weight / total, sent) for weight, sent in good], misfits

    def closed(self, closed: Round, now: float) -> None:
        """Remember it, for a worker that does not get it. The vectors of big rounds are not kept in memory for that."""
        self._last = (closed, now) if nbytes_of(closed.parts) <= 64 << 20 else None


class Server(Run):
    """Modes async and dogwild: the weights are here, and every push is applied when it comes."""

    def __init__(self, run: str, shard: int, plan: RunPlan, now: float) -> None:
        super().__init__(run, shard, plan, now)
        self._clear()

    def _clear(self) -> None:
        self.round = 0
        self.weights: np.ndarray[tuple[int], np.dtype[np.float32]] | None = None
        self._optimizer = Optimizer(self.plan.optimizer, self.plan.rate, self.plan.size)
        self._applied: dict[str, int] = {}
        self._note = ""

    def _join(self, sent: Contribution, now: float) -> Answer:
        if not self.begun and not self.members:
            self._clear()  # of a former run of this name
        return super()._join(sent, now)

    def _end(self) -> None:
        """What the server has stays: those that were given up may be back."""
        version = self.round
        super()._end()
        self.round = version

    def _begin(self) -> None:
        self.begun = True
        self._load()

    def _load(self) -> None:
        """Go on from the checkpoint, if there is one."""
        found = latest(self.name, self.shard) if self.plan.checkpoint else None
        weights = found.tensors.get("weights") if found is not None else None
        if found is None or weights is None or weights.shape != (self.plan.size,):
            return
        self.round, self.weights = found.round, weights.astype(np.float32)
        self._optimizer.steps = float(found.note.get("step", 0))
        for name, array in self._optimizer.state.items():
            if name in found.tensors:
                array[:] = found.tensors[name]
        self._applied = {str(worker): int(count) for worker, count in found.note.get("applied", {}).items()}
        self._note = str(found.note.get("note", ""))
        logger.info("run %s goes on from the checkpoint of version %d", self.name, self.round)

    def _takes_over(self, sent: Contribution) -> bool:
        return not self.begun and sent.worker not in self.members

    def _member(self, sent: Contribution, now: float) -> Member:
        taking_over, version = self._takes_over(sent), self.round
        member = super()._member(sent, now)
        if taking_over:
            self.round = version
            if sent.base > version:
                self._clear()  # another aggregator had the run since
            if self.weights is None:
                self._load()
        member.active = True
        return member

    def _ready(self) -> bool:
        return self.weights is not None

    def _source(self) -> int:
        return -1 if self.weights is not None else min(self._ranks(), default=-1)

    def _state(self, sent: Contribution) -> Answer:
        """What the server begins with: the first worker's parameters, or after a loss those of the furthest."""
        values = sent.parts.get("values")
        if values is None or values.dtype != "float32" or values.shape != (self.plan.size,):
            raise Reject(f"run {self.name!r}: expected the weights as float32 [{self.plan.size}], not {values!r}")
        if self.weights is None:
            self.weights, self.round, self._note = np.asarray(values).copy(), max(0, sent.round), sent.note
        return Answer([])

    def _beat(self, sent: Contribution, member: Member, now: float) -> Answer:
        push = sent.round >= 0 and self._applied.get(sent.worker, -1) < sent.round and self.weights is not None
        admission = self._admission(sent.worker, member, ready=self._ready(), push_wanted=push)
        if self.weights is None and member.rank == self._source():
            admission = admission.model_copy(update={"state_wanted": True})
        return Answer([admission])

    def _complete(self, now: float) -> bool:
        return False

    def state(self) -> State | None:
        """For a worker that joins: a copy of the weights."""
        if self.weights is None:
            return None
        return State(
            run=self.name, round=self.round, shard=self.shard, rank=-1,
            tensors={"values": Tensor(self.weights.copy())}, note=self._note,
        )  # fmt: skip

    def take_live(self, sent: Contribution, now: float) -> Answer:
        """A push that every aggregator hears. Whose run it is, is known by what is durable: nothing else makes a member
        or renews a lease. Raises Reject.
        """
        self._check(sent)
        member = self.members.get(sent.worker)
        return Answer([]) if member is None else self._push(sent, member, now)

    def _push(self, sent: Contribution, member: Member, now: float) -> Answer:
        if self.weights is None:
            return Answer([])  # the worker is told to push it again
        if sent.round <= self._applied.get(sent.worker, -1):
            return Answer([])  # it came twice
        self.round = max(self.round, sent.base)  # else workers take what follows a checkpoint for old
        self._applied[sent.worker] = sent.round
        while len(self._applied) > 4096:
            del self._applied[next(iter(self._applied))]
        staleness = max(0, self.round - sent.base)
        refused: list[int] = []
        gradient = decode(sent.codec, sent.parts, self.plan.size) if sent.parts else None
        if gradient is None or not np.isfinite(norm := float(np.linalg.norm(gradient))):
            refused.append(member.rank)
        else:
            if self.plan.clip is not None and norm > self.plan.clip:
                gradient = gradient * np.float32(self.plan.clip / norm)
            part = 1 / (1 + staleness) if self.plan.late == "scale" else 1.0
            self._optimizer.apply(self.weights, gradient, part)
            self.round += 1
            if self.plan.checkpoint and self.round % self.plan.checkpoint == 0:
                self._checkpoint()
        applied = Round(
            run=self.name, round=self.round, shard=self.shard, ranks=[] if refused else [member.rank], refused=refused,
            members=self._ranks(), parts={"values": Tensor(self.weights.copy())}, values=sent.values,
            samples=sent.samples, worker=sent.worker, sequence=sent.round, staleness=staleness,
        )  # fmt: skip
        return Answer([applied])

    def _checkpoint(self) -> None:
        assert self.weights is not None
        note = {"step": self._optimizer.steps, "applied": dict(self._applied), "note": self._note}
        arrays = {"weights": self.weights, **self._optimizer.state}
        copies = {name: array.copy() for name, array in arrays.items()}  # the next push changes them
        keep(self.name, self.shard, Checkpoint(self.round, copies, note))


def _lowest_free(taken: set[int]) -> int:
    return next(rank for rank in range(len(taken) + 1) if rank not in taken)


def _state(run: str, found: Checkpoint, life: int) -> State:
    tensors = {name: Tensor(array) for name, array in found.tensors.items()}
    note = str(found.note.get("note", ""))
    return State(run=run, round=found.round, rank=-1, life=life, tensors=tensors, note=note)
