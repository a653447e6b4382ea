"""A worker's line to the aggregator: it joins, gives signs of life, pushes, and hears of rounds. No ML here.

Everything asynchronous runs on a loop in a thread of its own, so that signs of life go out while the training loop
computes. The training loop's thread waits on one condition for whatever that loop hears.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from pipeline import Channel, Pipeline, ServerUnavailable, Tensor, catalog
from pipeline.blocking import BlockingPipeline
from pipeline.catalog import Admission, Contribution, Round, RunPlan, State
from pipeline.errors import ConfigurationError, PipelineError, PublishUncertain, RequestFailed, RequestTimeout

from ..command import opened_blocking

__all__ = ["Exchange", "JoinTimeout", "NothingReduced", "Refused", "Within"]

logger = logging.getLogger("publishers.training")

T = TypeVar("T")

POLL = 0.05
"""Seconds between two questions whether the run has begun."""
MOMENT = 0.05
"""Seconds for which closed rounds gather."""
PATIENCE = 2.0
"""Seconds without an answer after which the user is told what is missing."""
KEPT = 256
"""Rounds that may wait to be taken."""


class Refused(ConfigurationError):
    """Raised when the run does not take this worker: the message says why and what to do."""


class JoinTimeout(PipelineError):
    """Raised when a run did not begin in time."""


class NothingReduced(PipelineError):
    """Raised when a round of all_reduce closed without a sum: what everybody gave was not finite."""


class Within:
    """The time that a run has to begin in, however often it is asked and whatever else is waited for."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._until = math.inf if seconds is None else time.monotonic() + seconds

    def check(self, run: str) -> None:
        """Raises JoinTimeout when it is over."""
        if time.monotonic() > self._until:
            raise JoinTimeout(f"run {run} has not begun within {self._seconds:g} s")

    def at_most(self, seconds: float) -> float:
        """What is left, and no more than these."""
        return max(0.0, min(seconds, self._until - time.monotonic()))


class Exchange:
    """One worker in one run. `plans` has one plan for each shard, alike but for `size`."""

    def __init__(self, run: str, plans: Sequence[RunPlan], *, url: str | None, rank: int | None, host: str) -> None:
        self.run = run
        self.rank = -1 if rank is None else rank
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.members: list[int] = []
        self.newcomers: dict[str, int] = {}
        """Who joined and waits for a State, each attempt under a name of its own → rank."""
        self.state_wanted = threading.Event()
        """Somebody waits for what this worker has."""
        self.version: int = 0
        self._plans = list(plans)
        self._host = host
        self._app = Pipeline("trainer", url)
        self._stack = contextlib.ExitStack()
        self._pipe: BlockingPipeline
        self._changed = threading.Condition()
        self._rounds: dict[int, dict[tuple[int, int], Round]] = {}
        """Number → shard and life → the first that was heard."""
        self._lives: dict[int, int] = {}
        """By shard, the life of the run that this worker is in; see Admission."""
        self.lost = False
        """The run is in a later life than this worker, which has to join again."""
        self._open = -1
        """The round that was open when the aggregator last answered."""
        self._states: list[State] = []
        self._applied: dict[int, int] = {}
        """Server modes: by shard, this worker's last applied push."""
        self._weights: dict[int, Round] = {}
        """Server modes: the newest weights by shard."""
        self._pushed: list[Contribution] = []
        self.awaited = False
        """The aggregator knows that this worker takes part, and closes no round without it."""
        self._waiting = -1
        self._attempt = 0
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._heard = time.monotonic()
        self._published: list[asyncio.Future[None]] = []
        self._sending = 0
        self._hurried = 0.0
        self._unsaid: list[Round] = []

    @property
    def served(self) -> bool:
        """A server keeps the weights."""
        return self._plans[0].mode in ("async", "dogwild")

    @property
    def _live(self) -> bool:
        return self._plans[0].mode == "dogwild"

    # -- opening and closing -------------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect and listen; waits for a Redis that is not there yet."""
        self._pipe = self._stack.enter_context(opened_blocking(self._app))
        try:
            self._pipe.call(self._listen())
        except BaseException:
            self._stack.close()
            raise

    async def _listen(self) -> None:
        rounds = catalog.rounds_live if self._live else catalog.rounds
        for channel, hear in ((rounds, self._hear_round), (catalog.states, self._hear_state)):
            entered = asyncio.Event()
            self._tasks.append(asyncio.create_task(self._follow(channel, hear, entered), name=f"follow {channel.name}"))
            await entered.wait()

    async def _follow(self, channel: Channel[Any], hear: Callable[[Any], None], entered: asyncio.Event) -> None:
        while True:
            try:
                async with self._app.watch(channel) as stream:
                    entered.set()
                    async for message in stream:
                        if message.event.run == self.run:
                            hear(message.event)
            except ServerUnavailable as error:
                logger.warning("run %s: not listening: %s", self.run, error)
                await asyncio.sleep(0.2)

    def close(self) -> None:
        """Leave the run, so that nobody waits for this worker."""

        async def end() -> None:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self._pipe.call(end())  # a sign of life after the leave would make this worker a member again
        with contextlib.suppress(PipelineError, TimeoutError):
            self._pipe.call(asyncio.wait_for(self._leave(), 2.0))
        self._stack.close()

    async def _leave(self) -> None:
        self._say()
        if self._published:
            await asyncio.wait(self._published, timeout=1.0)
        for shard in range(len(self._plans)):
            await self._app.publish(catalog.contributions, self._message("leave", shard), key=self._key(shard))

    # -- joining -------------------------------------------------------------------------------------------------

    def join(self, within: Within, *, again: bool = False) -> list[Admission]:
        """Ask until the run has begun with this worker in it. `again`: this worker lost track and needs a State.

        Raises Refused, JoinTimeout.
        """
        within.check(self.run)
        asked = time.monotonic()
        told = False
        self._attempt += 1
        self._waiting = self._open = -1
        self.awaited = self.lost = False
        while True:
            admissions = [self._ask("join", shard, round_=-1 if again else 0) for shard in range(len(self._plans))]
            found = [admission for admission in admissions if admission is not None]
            if found:
                self.rank = found[0].rank
                self.members = found[0].members
                self._lives = {admission.shard: admission.life for admission in found}
            ready = len(found) == len(admissions) and all(admission.ready for admission in found)
            if ready or (found and self.served and found[0].source == self.rank):
                if found[0].plane:
                    self._plans = [plan.model_copy(update={"plane": found[0].plane}) for plan in self._plans]
                if not self._tasks or all(task.get_name() != "signs of life" for task in self._tasks):
                    self._start(self._signs_of_life())
                return found
            if not told and time.monotonic() - asked > PATIENCE:
                told = True
                logger.warning(
                    "run %s waits: %s", self.run,
                    f"{len(found[0].members)} of {self._plans[0].workers} workers are here" if found
                    else "no aggregator answers; start one: pipeline serve subscribers.aggregation:app",
                )  # fmt: skip
            within.check(self.run)
            time.sleep(POLL)

    def _ask(self, action: Any, shard: int, *, round_: int) -> Admission | None:
        return self._pipe.call(self._request(self._message(action, shard, round=round_, base=self._attempt)))

    async def _request(self, message: Contribution) -> Admission | None:
        """None when nobody answers in time, or Redis may not have the question. Raises Refused."""
        try:
            answer: Admission = await self._app.request(
                catalog.contributions, message, timeout=max(1.0, message.plan.lease), key=self._key(message.shard)
            )
        except (RequestTimeout, ServerUnavailable, PublishUncertain):
            return None
        except RequestFailed as error:
            raise Refused(str(error)) from None
        if answer.reason:
            raise Refused(answer.reason)
        self._heard = time.monotonic()
        return answer

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        async def start() -> None:
            self._tasks.append(asyncio.create_task(work, name="signs of life"))

        self._pipe.call(start())

    def _message(self, action: Any, shard: int, **more: Any) -> Contribution:
        return Contribution(
            run=self.run, worker=self.worker, rank=self.rank, life=self._lives.get(shard, 0), plan=self._plans[shard],
            action=action, shard=shard, peers=len(self.members), host=self._host, **more,
        )  # fmt: skip

    def _key(self, shard: int) -> str:
        return f"{self.run}/{shard}" if shard else self.run

    async def _signs_of_life(self) -> None:
        """Three a lease. The answers say what the aggregator misses."""
        while True:
            self._wake.clear()  # before they are written: what is woken for meanwhile is in the next ones
            attempt, takes_part = self._attempt, self._waiting >= 0
            for shard in range(len(self._plans)):
                weights = self._weights.get(shard)
                base = 0 if weights is None else weights.round
                try:
                    answer = await self._request(self._message("beat", shard, round=self._waiting, base=base))
                except Refused as error:
                    logger.error("run %s: %s", self.run, error)
                    continue
                if answer is None:
                    continue
                if takes_part and attempt == self._attempt:
                    if answer.life != self._lives.get(shard, 0):
                        self.lost = True
                        self._notify()
                        continue
                    self._open = max(self._open, answer.round)
                if shard == 0:
                    self.rank = answer.rank  # another one, where ours was given away while we were thought dead
                if shard == 0 and answer.settled:
                    self.members, self.newcomers = answer.members, answer.newcomers
                if shard == 0 and takes_part and not self.awaited and attempt == self._attempt:
                    self.awaited = True
                    self._notify()
                if answer.state_wanted:
                    self.state_wanted.set()
                    self._notify()
                if answer.push_wanted:
                    for pushed in self._pushed:
                        if pushed.shard == shard and pushed.round == self._waiting:
                            with contextlib.suppress(PipelineError):
                                await self._app.publish(catalog.contributions, pushed, key=self._key(shard))
            with contextlib.suppress(TimeoutError):  # asyncio.wait_for of 3.11 forgets to be cancelled when woken
                async with asyncio.timeout(self._plans[0].lease / 3):
                    await self._wake.wait()

    # -- pushing -------------------------------------------------------------------------------------------------

    def push(
        self, round_: int, parts: Sequence[tuple[str, Mapping[str, Tensor]]], *, samples: int,
        values: Mapping[str, float], base: int = 0, failed: str = "",
    ) -> None:  # fmt: skip
        """Send this worker's part of a round, one codec and its parts for each shard. Does not wait for Redis.

        The tensors' memory must stay as it is until the round is closed.
        """
        self._pushed = [
            self._message(
                "push", shard, round=round_, base=base, samples=samples, codec=codec, parts=dict(part),
                values=dict(values), failed=failed,
            )
            for shard, (codec, part) in enumerate(parts)
        ]  # fmt: skip
        self._waiting = round_
        for message in self._pushed:
            if self._live:
                self._send(catalog.contributions_live, message, None)
            else:
                self._send(catalog.contributions, message, self._key(message.shard))

    def _send(self, channel: Channel[Any], event: Any, key: str | None) -> None:
        self._sending += 1
        self._pipe.loop.call_soon_threadsafe(lambda: self._keep(self._publish(channel, event, key, counted=True)))

    async def _publish(self, channel: Channel[Any], event: Any, key: str | None, *, counted: bool = False) -> None:
        try:
            await self._app.publish(channel, event, key=key)
        except PipelineError as error:  # a contribution is asked for again when it is missed
            logger.warning("run %s: not sent now: %s", self.run, error)
        finally:
            if counted:
                self._sending -= 1
                self._notify()

    @property
    def sending(self) -> bool:
        """Redis has not taken the last push yet."""
        return self._sending > 0

    def give_state(self, round_: int, tensors: Mapping[str, Tensor], note: str) -> None:
        """Publish what this worker has, for those that join."""
        self.state_wanted.clear()
        life = self._lives.get(0, 0)
        state = State(run=self.run, round=round_, rank=self.rank, life=life, tensors=dict(tensors), note=note)
        self._pipe.publish(catalog.states, state)

    def checkpoint(self, round_: int, tensors: Mapping[str, Tensor], note: str, shard: int = 0) -> None:
        """Hand the aggregator what this worker has, to be kept in a file; or what a server begins with."""
        self._pipe.publish(
            catalog.contributions,
            self._message("state", shard, round=round_, parts=dict(tensors), note=note),
            key=self._key(shard),
        )

    # -- hearing -------------------------------------------------------------------------------------------------

    def _hear_round(self, closed: Round) -> None:
        with self._changed:
            if self.served:
                newest = self._weights.get(closed.shard)
                if newest is None or closed.round >= newest.round:
                    self._weights[closed.shard] = closed
                if closed.worker == self.worker:
                    self._applied[closed.shard] = max(closed.sequence, self._applied.get(closed.shard, -1))
            else:
                self._rounds.setdefault(closed.round, {}).setdefault((closed.shard, closed.life), closed)
                while len(self._rounds) > KEPT:
                    del self._rounds[min(self._rounds)]
            if closed.life == self._lives.get(closed.shard):
                if closed.shard == 0:
                    self.members = closed.members
                if closed.state_from == self.rank:
                    self.state_wanted.set()
            self._changed.notify_all()

    def _hear_state(self, state: State) -> None:
        with self._changed:
            self._states.append(state)
            del self._states[: -4 * len(self._plans)]
            self._changed.notify_all()

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def wait(self, until: Callable[[], bool], timeout: float | None) -> bool:
        """Wait until something heard makes `until` true."""
        with self._changed:
            return self._changed.wait_for(until, timeout)

    def takes_part(self, round_: int) -> None:
        """This worker is in the open round; its signs of life say so, the first one at once."""
        if self._waiting < 0:
            self._pipe.loop.call_soon_threadsafe(self._wake.set)
        self._waiting = round_

    def hurry(self) -> None:
        """Somebody is waited for: ask the aggregator more often who is still there."""
        now = time.monotonic()
        if now - self._hurried > self._plans[0].lease / 20:
            self._hurried = now
            self._pipe.loop.call_soon_threadsafe(self._wake.set)

    def announce(self, closed: Round) -> None:
        """Publish a round that the workers closed among themselves, together with those of the same moment."""
        self._unsaid.append(closed)
        if len(self._unsaid) == 1:
            self._pipe.loop.call_soon_threadsafe(self._pipe.loop.call_later, MOMENT, self._say)

    def _say(self) -> None:
        count = len(self._unsaid)
        if count:
            closed, self._unsaid = self._unsaid[:count], self._unsaid[count:]
            self._keep(self._publish(catalog.rounds, closed, self.run))

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._published.append(task)
        task.add_done_callback(self._published.remove)

    def ignore_rounds(self) -> None:
        """The workers close them among themselves: there is nothing to hear."""

        def end() -> None:
            for task in self._tasks:
                if task.get_name() == f"follow {catalog.rounds.name}":
                    task.cancel()

        self._pipe.loop.call_soon_threadsafe(end)

    def has(self, round_: int) -> bool:
        heard = self._rounds.get(round_, {})
        return bool(self._lives) and all(which in heard for which in self._lives.items())

    def take(self, round_: int) -> list[Round]:
        """A closed round's shards, in order; older ones are forgotten."""
        with self._changed:
            found = self._rounds.pop(round_)
            for number in [number for number in self._rounds if number < round_]:
                del self._rounds[number]
            self._waiting = -1
        return [found[which] for which in sorted(self._lives.items())]

    def is_past(self, round_: int) -> bool:
        """Later rounds are here, or open, and this one is not: it is missed."""
        with self._changed:
            later = self._open > round_ or any(number > round_ and self.has(number) for number in self._rounds)
        return later and not self.has(round_)

    def forget(self, state: State) -> None:
        """It is not one to begin with, nor is what came before it. What came since stays."""
        with self._changed:
            at = next((index for index, one in enumerate(self._states) if one is state), -1)
            del self._states[: at + 1]

    def take_state(self, timeout: float, lowest_rank: int = -1) -> State | None:
        """The newest State of this life, from a worker where `lowest_rank` is 0; None when none came in time."""

        def found() -> list[State]:
            life = self._lives.get(0, 0)
            return [state for state in self._states if state.rank >= lowest_rank and state.life == life]

        self.wait(lambda: bool(found()), max(0.0, timeout))
        with self._changed:
            return max(reversed(found()), key=lambda state: state.round, default=None)

    def take_weights(self, timeout: float) -> list[State] | None:
        """Server modes: the newest State of each shard, in order; None when one of them did not come in time."""

        def newest() -> dict[int, State]:
            return {state.shard: state for state in sorted(self._states, key=lambda state: state.round)}

        self.wait(lambda: len(newest()) == len(self._plans), timeout)
        with self._changed:
            found = newest()
        return [found[shard] for shard in sorted(found)] if len(found) == len(self._plans) else None

    def applied(self) -> int:
        """Server modes: this worker's last push that all shards have applied."""
        return min((self._applied.get(shard, -1) for shard in range(len(self._plans))), default=-1)

    def weights(self, newer_than: int) -> list[Round] | None:
        """Server modes: the newest weights of all shards; None when one of them is not newer."""
        with self._changed:
            found = [self._weights.get(shard) for shard in range(len(self._plans))]
        newest = [one for one in found if one is not None and one.round > newer_than]
        return newest if len(newest) == len(found) else None

    @property
    def silence(self) -> float:
        """Seconds since the aggregator answered."""
        return time.monotonic() - self._heard
