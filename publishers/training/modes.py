"""How the workers of a run keep together: one class a mode, each with the same few verbs, which `Run` calls.

sync      every step: the mean of all gradients, applied by every worker's own optimizer (all-reduce)
local     every `steps` steps: the mean of what the workers' own steps changed, applied by an outer optimizer
          (local SGD; DiLoCo, Douillard et al. 2023, with outer momentum)
async     gradients go to a server that applies them as they come and keeps the weights (Downpour SGD, Dean et al. 2012)
dogwild   the same over live channels: what is lost is lost (Noel & Osindero 2014)
hogwild   one vector of parameters in shared memory, which all change without locks (Niu et al. 2011)
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline import Tensor
from pipeline.catalog import Round, State
from pipeline.catalog.compression import Encoder, decode, nbytes_of
from pipeline.catalog.training import mean_values
from pipeline.errors import ConfigurationError
from pipeline.settings import settings

from .exchange import NothingReduced, Refused, Within
from .shared import host, release, sweep
from .shared_rounds import SharedRounds

if TYPE_CHECKING:
    from .run import Run

__all__ = ["MODES", "Mode", "Outer"]

logger = logging.getLogger("publishers.training")

Vector = npt.NDArray[np.float32]

LOST = 1.0
"""Seconds for which a missed round may still come."""
TOLD = 5.0
LAST = 2.0
"""Seconds that a worker waits for the last of what a server makes of its pushes."""
UNHEARD = 0.1
"""Seconds after which a dogwild push of which nothing was heard counts as lost."""


class Outer:
    """Local mode's outer optimizer: the anchor moves against the mean delta, with Nesterov momentum (SGD)."""

    def __init__(self, anchor: Vector, rate: float = 1.0, momentum: float = 0.0) -> None:
        self.anchor = anchor
        self.rate = np.float32(rate)
        self.momentum = np.float32(momentum)
        self._velocity = np.zeros_like(anchor) if momentum else None

    def step(self, delta: Vector) -> Vector:
        """By the mean of (anchor − worker's parameters), float32 [size]; returns the new anchor."""
        if self._velocity is not None:
            self._velocity *= self.momentum
            self._velocity += delta
            delta = delta + self.momentum * self._velocity
        self.anchor = self.anchor - self.rate * delta
        return self.anchor

    def state(self) -> dict[str, Tensor]:
        kept = {"outer.anchor": Tensor(self.anchor.copy())}
        if self._velocity is not None:
            kept["outer.velocity"] = Tensor(self._velocity.copy())
        return kept

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if "outer.anchor" in tensors:
            self.anchor = np.array(tensors["outer.anchor"])
        if self._velocity is not None and "outer.velocity" in tensors:
            self._velocity = np.array(tensors["outer.velocity"])


class Mode:
    """What is the same for all: how a worker begins. `run` gives model, exchange and options."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def begin(self) -> None:
        """Everybody begins with what the first worker, or the checkpoint, has."""
        self._begin(again=False)

    def _begin(self, *, again: bool) -> None:
        run, within = self.run, Within(self.run.options.timeout)
        while True:
            admission = run.exchange.join(within, again=again)[0]
            run.plane = admission.plane or run.plan.plane
            members = [rank for rank in admission.members if rank not in admission.newcomers.values()]
            if admission.source == run.rank:
                run.round = max(run.round, admission.round)
                if run.recorder is not None:
                    run.recorder.begins(run.round)
                self.lead(members)
                self.give_state()
                return
            beside = run.plane in ("shm", "torch")  # who of us leads is not the aggregator's affair
            leads = beside and admission.source < 0 and members[:1] == [run.rank]
            until = time.monotonic() + within.at_most(max(1.0, run.plan.lease))
            while True:
                state = run.exchange.take_state(until - time.monotonic(), lowest_rank=0 if beside and not leads else -1)
                if state is None:
                    break
                if state.round >= admission.round or state.rank < 0 or run.plane == "shm":
                    self.load(state)
                    if state.rank < 0 and run.recorder is not None:
                        run.recorder.resumes(run.round)
                    if leads:
                        self.lead(members)
                        self.give_state()
                        return
                    if self.follow(json.loads(state.note or "{}"), admission.members):
                        return
                run.exchange.forget(state)  # what it leads to has passed by; another one is on its way
            again = True  # whoever was to give it is gone

    def lead(self, members: list[int]) -> None:
        """This worker gives the others what they begin with."""

    def follow(self, note: Mapping[str, Any], members: list[int]) -> bool:
        """A state was loaded; False when it is not one to go on from after all."""
        return True

    def load(self, state: State) -> None:
        run, note = self.run, json.loads(state.note or "{}")
        run.parameters.load(state.tensors, note)
        if run.optimizer is None:
            run.pending = (dict(state.tensors), note)
        else:
            run.parameters.load_optimizer(run.optimizer, state.tensors, note)
        run.round = state.round

    def state(self) -> tuple[dict[str, Tensor], str]:
        tensors, note = self.run.parameters.state(self.run.optimizer)
        if self.run.optimizer is None and self.run.pending is not None:
            kept, waiting = self.run.pending
            note = {**waiting, **note}
            tensors |= {name: tensor for name, tensor in kept.items() if name.startswith("optimizer.")}
        return {**tensors, **self.extras()}, json.dumps({**note, **self.notes()})

    def notes(self) -> dict[str, Any]:
        return {}

    def extras(self) -> dict[str, Tensor]:
        return {}

    def give_state(self) -> None:
        self.run.exchange.give_state(self.run.round, *self.state())

    def step(self, given: Any, optimizer: Any, samples: int, values: dict[str, float]) -> None:
        """One step of the training loop, whose gradients are there."""
        raise NotImplementedError

    def end(self) -> None:
        """The loop is through: what is still to be exchanged."""

    def close(self) -> None:
        """Let go of everything, whatever happened."""


def _encoded(run: Run, encoders: list[Encoder], vector: Vector) -> tuple[list[tuple[str, Mapping[str, Tensor]]], str]:
    """What each shard gets, and why it gets nothing: no shard may use its slice of what is not finite elsewhere."""
    codec = run.options.compress
    pieces = np.split(vector, np.cumsum(run.sizes)[:-1]) if len(encoders) > 1 else [vector]
    if len(encoders) > 1 and not all(encoder.accepts(piece) for encoder, piece in zip(encoders, pieces, strict=True)):
        run.sent = 0
        return [("none", {}) for _ in encoders], "not finite"
    began = time.perf_counter()
    parts = [encoder.encode(piece) for encoder, piece in zip(encoders, pieces, strict=True)]
    run.encoding = time.perf_counter() - began
    run.sent = sum(nbytes_of(part) for part in parts)
    return [(codec, part) for part in parts], ""


class Sync(Mode):
    """A round a step."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._encoders = [
            Encoder(run.options.compress, size, run.parameters.matrices if len(run.sizes) == 1 else None)
            for size in run.sizes
        ]
        self.shared: SharedRounds | None = None

    def lead(self, members: list[int]) -> None:
        if self.run.plane == "shm":
            self.shared = SharedRounds(self.run, self.give_state)
            self.shared.lead(members)

    def follow(self, note: Mapping[str, Any], members: list[int]) -> bool:
        if self.run.plane != "shm":
            return True
        if self.shared is None:
            self.shared = SharedRounds(self.run, self.give_state)
        return self.shared.follow(note)

    def notes(self) -> dict[str, Any]:
        return self.shared.note() if self.shared is not None else {}

    def _exchange_shared(
        self, shared: SharedRounds, vector: Vector, samples: int, values: dict[str, float], apply: Any
    ) -> None:
        run = self.run
        closed = shared.round(vector, samples, values)
        if closed is None:
            logger.warning(
                "run %s: round %d was closed without this worker; asking for the run's state", run.name, run.round
            )
            self._begin(again=True)
            return
        run.last, run.mean = closed
        if run.mean is not None:
            apply(run.mean)
        run.round += 1
        run.exchange.takes_part(run.round)
        self._after_round()

    def close(self) -> None:
        if self.shared is not None:
            self.shared.close()

    def step(self, given: Any, optimizer: Any, samples: int, values: dict[str, float]) -> None:
        gradient = self.run.parameters.gradient(given)
        self.exchange_(gradient, samples, values, lambda mean: self.run.parameters.apply(mean, optimizer))

    def exchange_(self, vector: Vector, samples: int, values: dict[str, float], apply: Any) -> None:
        """Contribute to the open round and apply its mean; or, when rounds were closed without this worker, those."""
        run, exchange = self.run, self.run.exchange
        if self.shared is not None:
            self._exchange_shared(self.shared, vector, samples, values, apply)
            return
        if exchange.has(run.round):
            if run.plan.late == "scale":
                self._push(vector, samples, values)
            while exchange.has(run.round):
                self._apply(exchange.take(run.round), apply)
            exchange.takes_part(run.round)  # else the others, who do not wait for it, are always a round ahead
            return
        started = time.perf_counter()
        self._push(vector, samples, values)
        closed = self._await()
        if closed is None:
            return  # it was given another worker's state
        run.waited = time.perf_counter() - started
        self._apply(closed, apply)

    @property
    def state_wanted(self) -> bool:
        """Somebody waits for what this worker has, and need not wait for the round."""
        return self.run.exchange.state_wanted.is_set()

    def _push(self, vector: Vector, samples: int, values: dict[str, float]) -> None:
        run = self.run
        parts, failed = _encoded(run, self._encoders, vector)
        if run.recorder is not None:
            run.recorder.contributed(run.rank, run.round, parts[0][0], parts[0][1], samples)
        run.exchange.push(run.round, parts, samples=samples, values=values, failed=failed)

    def _await(self) -> list[Round] | None:
        """The open round, however long it takes; None when it was missed and a State was loaded instead."""
        run, exchange = self.run, self.run.exchange
        began = last = time.monotonic()
        told = False
        while not exchange.has(run.round):
            exchange.wait(lambda: exchange.has(run.round) or exchange.lost or self.state_wanted, 0.25)
            if self.state_wanted and not exchange.lost:
                self.give_state()
            now = time.monotonic()
            if exchange.lost or now - last > LOST:
                logger.warning("run %s: round %d was missed; asking for the run's state", run.name, run.round)
                self._begin(again=True)
                return None
            if not exchange.is_past(run.round):
                last = now
            if not told and now - began > TOLD:
                told = True
                logger.warning(
                    "run %s: round %d is not closed yet; %s", run.name, run.round,
                    "no aggregator answers; start one: pipeline serve subscribers.aggregation:app"
                    if exchange.silence > TOLD
                    else f"here are ranks {exchange.members}, the quorum is {run.plan.quorum}",
                )  # fmt: skip
        return exchange.take(run.round)

    def _apply(self, closed: list[Round], apply: Any) -> None:
        run = self.run
        run.last = closed[0]
        if all(one.parts for one in closed):
            began = time.perf_counter()
            mean = (
                decode(closed[0].codec, closed[0].parts, run.sizes[0])
                if len(closed) == 1
                else np.concatenate(
                    [decode(one.codec, one.parts, size) for one, size in zip(closed, run.sizes, strict=True)]
                )
            )
            run.decoding = time.perf_counter() - began
            run.mean = mean
            apply(mean)
        if run.recorder is not None:
            run.recorder.closed(closed[0])
        run.round += 1
        self._after_round()

    def _after_round(self) -> None:
        run = self.run
        if run.exchange.state_wanted.is_set():
            self.give_state()
        self._checkpoint()

    def _checkpoint(self) -> None:
        run = self.run
        if run.plan.checkpoint and run.round % run.plan.checkpoint == 0 and run.is_reporter:
            run.exchange.checkpoint(run.round, *self.state())

    def reduce(self, vector: Vector) -> Vector:
        """All-reduce: one round with nothing to apply. Raises NothingReduced."""
        found: list[Vector] = []
        while not found:
            before = self.run.last
            self.exchange_(vector, 1, {}, found.append)
            if not found and self.run.last is not before:  # else another worker's state was loaded instead
                raise NothingReduced(f"run {self.run.name}, round {self.run.round - 1}: nobody's vector was finite")
        return found[0]


class Local(Sync):
    """A round every `steps` steps, of deltas."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.outer = Outer(run.parameters.read(), *run.options.outer)
        self._steps = 0
        self._samples = 0
        self._given: list[tuple[int, dict[str, float]]] = []
        """Since the last round, each step's samples and values."""

    def load(self, state: State) -> None:
        super().load(state)
        self.outer = Outer(self.run.parameters.read(), *self.run.options.outer)
        self.outer.load(state.tensors)
        self.run.parameters.write(self.outer.anchor)

    def extras(self) -> dict[str, Tensor]:
        return self.outer.state()

    def step(self, given: Any, optimizer: Any, samples: int, values: dict[str, float]) -> None:
        run = self.run
        if optimizer is not None:
            run.parameters.step(given, optimizer)
        self._steps += 1
        self._samples += samples
        self._given.append((samples, values))
        if self._steps >= run.options.steps:
            self._exchange()

    def _exchange(self) -> None:
        run = self.run
        means = mean_values(self._given)
        samples, self._steps, self._samples, self._given = self._samples, 0, 0, []
        self.exchange_(
            self.outer.anchor - run.parameters.read(), samples, means,
            lambda mean: run.parameters.write(self.outer.step(mean)),
        )  # fmt: skip

    def end(self) -> None:
        """What the last steps changed counts too."""
        if self._steps:
            self._exchange()


class Async(Mode):
    """Pushes to a server that keeps the weights."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._encoders = [
            Encoder(run.options.compress, size, run.parameters.matrices if len(run.sizes) == 1 else None)
            for size in run.sizes
        ]
        self._gathered: Vector | None = None
        self._steps = 0
        self._samples = 0
        self._sequence = 0
        self._gathered_steps = 0

    def _may_push(self) -> bool:
        return True

    def begin(self) -> None:
        run, within = self.run, Within(self.run.options.timeout)
        while True:
            admissions = run.exchange.join(within)
            if all(admission.ready for admission in admissions):
                parts = run.exchange.take_weights(within.at_most(max(1.0, run.plan.lease)))
                if parts is None:
                    continue
                self._write([part.tensors["values"] for part in parts])
                run.round = min(part.round for part in parts)
                return
            self.give_state()
            time.sleep(0.05)

    def give_state(self) -> None:
        """What the server begins with, or goes on with when it lost its own."""
        self.run.exchange.state_wanted.clear()
        whole, at = self.run.parameters.read(), 0
        for shard, size in enumerate(self.run.sizes):
            parts = {"values": Tensor(whole[at : at + size])}
            self.run.exchange.checkpoint(self.run.round, parts, "", shard)
            at += size

    def step(self, given: Any, optimizer: Any, samples: int, values: dict[str, float]) -> None:
        run = self.run
        if optimizer is not None:
            raise ConfigurationError(
                f"in mode {run.plan.mode} the server applies gradients: run.step(loss=loss) without an optimizer; "
                "choose the server's with join(..., server_optimizer=…, rate=…)"
            )
        gradient = run.parameters.gradient(given)
        if self._gathered is None:
            self._gathered = gradient
        else:
            self._gathered += gradient
        self._steps += 1
        self._gathered_steps += 1
        self._samples += samples
        if self._steps % run.options.push_every == 0 and self._may_push():
            self._push(values)
        if self._steps % run.options.fetch_every == 0:
            self._fetch()

    def _push(self, values: dict[str, float]) -> None:
        run = self.run
        assert self._gathered is not None
        vector, self._gathered = self._gathered / np.float32(self._gathered_steps), None
        self._gathered_steps = 0
        parts, failed = _encoded(run, self._encoders, vector)
        self._flow()
        run.exchange.push(self._sequence, parts, samples=self._samples, values=values, base=run.round, failed=failed)
        self._sequence += 1
        self._samples = 0

    def _flow(self) -> None:
        """At most `in_flight` pushes that the server has not applied: what bounds the staleness."""
        run, exchange = self.run, self.run.exchange
        began, told = time.monotonic(), False
        while exchange.applied() < self._sequence - 1 - run.options.in_flight:
            exchange.wait(
                lambda: (
                    exchange.applied() >= self._sequence - 1 - run.options.in_flight or exchange.state_wanted.is_set()
                ),
                0.25,
            )
            if exchange.state_wanted.is_set():
                self.give_state()
            if not told and time.monotonic() - began > TOLD:
                told = True
                logger.warning("run %s: the server does not answer; is an aggregator running?", run.name)

    def _fetch(self) -> None:
        run = self.run
        newest = run.exchange.weights(run.round)
        if newest is None:
            return
        run.last = newest[0]
        self._write([one.parts["values"] for one in newest])
        run.round = min(one.round for one in newest)

    def _write(self, slices: list[Tensor]) -> None:
        whole = [np.asarray(one) for one in slices]
        self.run.parameters.write(np.concatenate(whole) if len(whole) > 1 else whole[0])

    def end(self) -> None:
        """With the weights that came of everything."""
        if self._gathered is not None:
            self._push({})
        self._await_weights()
        self._fetch()

    def _await_weights(self) -> None:
        exchange = self.run.exchange
        exchange.wait(lambda: exchange.applied() >= self._sequence - 1, LAST)


class Dogwild(Async):
    """A push is waited for no longer than it takes to count as lost.

    Without that wait most gradients would be of weights that are many versions old. While Redis takes nothing, the
    gradients of further steps join the next push.
    """

    def _may_push(self) -> bool:
        exchange = self.run.exchange
        exchange.wait(lambda: exchange.applied() >= self._sequence - 1 and not exchange.sending, UNHEARD)
        return not exchange.sending

    def _flow(self) -> None:
        if self.run.exchange.state_wanted.is_set():
            self.give_state()

    def _await_weights(self) -> None:
        """While versions come, so may that with the last push in it; after a silence it is lost."""
        exchange, until = self.run.exchange, time.monotonic() + LAST
        version, before = self.run.round, -1
        while exchange.applied() < self._sequence - 1 and version > before and time.monotonic() < until:
            before = version
            exchange.wait(lambda: exchange.applied() >= self._sequence - 1, 2 * UNHEARD)
            version = max((one.round for one in exchange.weights(before) or []), default=before)


class Hogwild(Mode):
    """The parameters are a file in shared memory. Each worker has its own optimizer; a step takes no message at all."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._path: Path | None = None
        self._lock = -1

    def begin(self) -> None:
        sweep(settings().shm_dir)
        self._begin(again=False)

    def _begin(self, *, again: bool) -> None:
        super()._begin(again=again)
        self.run.exchange.takes_part(self.run.round)

    def give_state(self) -> None:
        self.run.exchange.state_wanted.clear()
        if self._path is None:
            self._create()
        assert self._path is not None
        note = json.dumps({"hogwild": str(self._path), "host": host(settings().shm_dir)})
        self.run.exchange.give_state(self.run.round, {}, note)

    def _create(self) -> None:
        path = settings().shm_dir / f"pipeline-hogwild-{secrets.token_hex(8)}"
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        except OSError as error:
            raise ConfigurationError(f"mode hogwild needs shared memory: {error}; set PIPELINE_SHM_DIR") from None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        os.write(descriptor, self.run.parameters.read().tobytes())
        self._path, self._lock = path, descriptor
        self.run.parameters.share(path)

    def load(self, state: State) -> None:
        note = json.loads(state.note or "{}")
        if note.get("host") != host(settings().shm_dir):
            raise Refused("mode hogwild works on one host; use mode dogwild across several")
        path = Path(note["hogwild"])
        self._lock = os.open(path, os.O_RDWR)
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        if os.fstat(self._lock).st_size != 4 * self.run.parameters.size:
            raise Refused("the run's model has another size")
        self._path = path
        self.run.parameters.share(path)
        self.run.round = state.round

    def step(self, given: Any, optimizer: Any, samples: int, values: dict[str, float]) -> None:
        run = self.run
        if optimizer is None:
            raise ConfigurationError("mode hogwild: run.step(optimizer, loss=loss)")
        run.parameters.step(given, optimizer)
        run.round += 1
        if run.exchange.lost:
            self.close()
            self._begin(again=True)
        elif run.exchange.state_wanted.is_set():
            self.give_state()

    def close(self) -> None:
        """Keep what was reached, and let the file go with its last user."""
        if self._path is not None:
            self.run.parameters.unshare()
            release(self._path, self._lock)
            self._path = None


MODES: dict[str, type[Mode]] = {
    "sync": Sync, "local": Local, "async": Async, "dogwild": Dogwild, "hogwild": Hogwild,
}  # fmt: skip
