"""`join`: take part in a training run from any loop.

with join("digits-1", model, mode="sync", compress="bf16") as run:
    for x, y in loader:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        run.step(optimizer, loss=loss, samples=len(x))
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from pipeline import catalog
from pipeline.catalog import Round, RunPlan
from pipeline.channel import check_name
from pipeline.catalog.compression import check_codec
from pipeline.errors import ConfigurationError
from pipeline.settings import settings

from .exchange import Exchange
from .metrics import Metrics
from .modes import MODES, Mode, Sync
from .parameters import Parameters, parameters_of
from .recording import Recorder
from .shared import host

__all__ = ["Run", "join"]

logger = logging.getLogger("publishers.training")


def join(
    run: str,
    model: Any,
    *,
    mode: catalog.Mode = "sync",
    compress: str = "none",
    workers: int = 1,
    rank: int | None = None,
    quorum: int = 1,
    deadline: float | Literal["adaptive"] | None = None,
    lease: float = 1.0,
    late: Literal["drop", "scale"] = "drop",
    clip: float | None = None,
    shards: int = 1,
    every: int = 16,
    outer: tuple[float, float] = (1.0, 0.0),
    server_optimizer: str = "adagrad",
    rate: float = 0.01,
    push_every: int = 1,
    fetch_every: int = 1,
    in_flight: int = 1,
    checkpoint: int = 0,
    record: str | Path | None = None,
    plane: Literal["auto", "redis", "shm", "torch"] = "auto",
    metrics: bool = True,
    timeout: float | None = None,
    url: str | None = None,
) -> Run:
    """A context manager: on entry this worker joins the run, and begins with the weights that all others have.

    run          its name; an aggregator opens it for its first worker (`pipeline serve subscribers.aggregation:app`)
    model        a torch module; a dictionary of numpy float arrays, or one array; a scikit-learn linear model
    mode         sync, async, hogwild, dogwild or local: see `publishers.training.modes`
    compress     what travels: none, bf16, fp16, int8, topk:SHARE, powersgd:RANK, with error feedback
    workers      the first round waits for so many
    rank         this worker's, where it matters which; else the lowest that is free
    quorum       a round needs so many contributions; with fewer members it waits
    deadline     seconds, or "adaptive", after which a round goes on with the quorum; None: it waits for every member
    lease        seconds without a sign of life after which a worker is given up
    late         what becomes of a contribution after its round: "drop" it, or "scale" it down and add it to the next
    clip         largest norm of the mean gradient
    shards       slices of the parameters, which several aggregators share
    every, outer (local) steps between rounds; the outer optimizer's rate and Nesterov momentum
    server_optimizer, rate (async, dogwild) sgd, momentum, adagrad or adam, and its learning rate
    push_every, fetch_every, in_flight (async, dogwild) steps between pushes, and between fetches; unapplied pushes at most
    checkpoint   rounds between checkpoints, which the aggregator keeps and a run of that name goes on from; 0: none
    record       (sync, local; one shard) a folder for every round's gradients; see `replay`
    plane        how vectors travel. redis: through the aggregator, in shared memory on one host, as blobs across hosts.
                 shm: workers of one host sum in shared memory. torch: by torch.distributed (gloo, NCCL with GPUs). With
                 both, events carry members and rounds only. auto: shm where all begin on one host and no other option
                 needs the aggregator to see the vectors
    timeout      seconds to wait for the run to begin; then JoinTimeout
    metrics      publish loss, gradient norm, staleness, samples/s, … as training events

    Raises ConfigurationError for options that do not go together, and when the run is of another mode or model.
    """
    check_name("run", run)
    check_codec(compress)
    if mode not in MODES:
        raise ConfigurationError(f"mode {mode!r} is unknown; use one of {', '.join(MODES)}")
    if shards > 1 and (compress.startswith("powersgd") or mode == "hogwild" or plane == "torch"):
        raise ConfigurationError("powersgd, mode hogwild and plane torch take shards=1")
    if record is not None and (mode not in ("sync", "local") or shards > 1 or plane == "torch"):
        raise ConfigurationError("record= is for modes sync and local with one shard; servers keep checkpoints")
    if plane == "torch" and (mode not in ("sync", "local") or compress != "none"):
        raise ConfigurationError('plane="torch" is for modes sync and local, without compression')
    needs_redis = compress != "none" or deadline is not None or late != "drop" or clip is not None or record is not None
    alone = mode not in ("sync", "local") or shards > 1 or needs_redis
    if plane == "shm" and alone:
        raise ConfigurationError(
            'plane="shm" is for modes sync and local with one shard, without compress, deadline, late, clip and record'
        )
    if plane == "auto" and alone:
        plane = "redis"
    parameters = parameters_of(model)
    plan = RunPlan(
        mode=mode, size=parameters.size, workers=workers, quorum=quorum, deadline=deadline, lease=lease, late=late,
        clip=clip, optimizer=server_optimizer, rate=rate, checkpoint=checkpoint, plane=plane,
    )  # fmt: skip
    if min(every, push_every, fetch_every, shards) < 1 or in_flight < 0:
        raise ConfigurationError("every, push_every, fetch_every and shards are at least 1, in_flight at least 0")
    return Run(
        run, parameters, plan, compress=compress, shards=shards, every=every, outer=outer, push_every=push_every,
        fetch_every=fetch_every, in_flight=in_flight, record=None if record is None else Path(record),
        metrics=metrics, timeout=timeout, rank=rank, url=url,
    )  # fmt: skip


class Run:
    """One worker's part in a run. For one thread; made by `join`."""

    def __init__(
        self, name: str, parameters: Parameters, plan: RunPlan, *, compress: str, shards: int, every: int,
        outer: tuple[float, float], push_every: int, fetch_every: int, in_flight: int, record: Path | None,
        metrics: bool, timeout: float | None, rank: int | None, url: str | None,
    ) -> None:  # fmt: skip
        self.name = name
        self.parameters = parameters
        self.plan = plan
        self.compress = compress
        base, more = divmod(parameters.size, shards)
        self.sizes = [base + (shard < more) for shard in range(shards)]
        self.every = every
        self.timeout = timeout
        self.outer = outer
        self.push_every = push_every
        self.fetch_every = fetch_every
        self.in_flight = in_flight
        self.recorder = Recorder(record) if record is not None else None
        self.round = 0
        """The open one; with a server, the version of this worker's weights."""
        self.optimizer: Any = None
        self.pending: tuple[dict[str, Any], dict[str, Any]] | None = None
        """A state whose optimizer has not been seen yet."""
        self.last: Round | None = None
        self.mean: npt.NDArray[np.float32] | None = None
        """Of the last round."""
        self.waited = self.compressing = 0.0
        self.sent = self.received = 0
        plans = [plan.model_copy(update={"size": size}) for size in self.sizes]
        self.plane: str = plan.plane
        """How vectors travel, once it is known."""
        shares = plan.plane in ("auto", "shm")
        self.exchange = Exchange(name, plans, url=url, rank=rank, host=host(settings().shm_dir) if shares else "")
        self._metrics = Metrics(name, url=url) if metrics else None
        self.url = url
        self._mode: Mode | None = None
        self._steps = 0
        self._samples = 0
        self._since = time.perf_counter()
        self._reported = -1

    @property
    def rank(self) -> int:
        return self.exchange.rank

    @property
    def members(self) -> list[int]:
        """Ranks of the workers that take part."""
        return self.exchange.members

    @property
    def is_reporter(self) -> bool:
        """The lowest rank of the members: the one that speaks for the run."""
        return self.rank == min(self.members, default=self.rank)

    def __enter__(self) -> Self:
        self.exchange.open()
        try:
            if self.plan.plane == "torch":
                from .collective import Collective, LocalCollective

                self._mode = (LocalCollective if self.plan.mode == "local" else Collective)(self)
            else:
                self._mode = MODES[self.plan.mode](self)
            self._mode.begin()
            if self.recorder is not None:
                tensors, note = self._mode.state()
                about = {"mode": self.plan.mode, "outer": list(self.outer), "round": self.round}
                self.recorder.initial(self.rank, tensors, note, about)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._mode.end()
        finally:
            self._close()

    def _close(self) -> None:
        if self._mode is not None:
            self._mode.close()
        self.exchange.close()
        if self._metrics is not None:
            self._metrics.close()

    def step(
        self, optimizer: Any = None, *, loss: Any = None, samples: int = 1, gradients: Any = None, **values: Any
    ) -> None:
        """After backward(): exchange, apply, zero.

        optimizer  any torch optimizer; for arrays a callable (parameters, gradients); None with a server
        loss, **values  numbers or one-element tensors, published as metrics
        samples    how many the gradient is a mean of; contributions are weighted by it
        gradients  for a dictionary of arrays: a dictionary of their gradients
        """
        if optimizer is not None and optimizer is not self.optimizer:
            self.optimizer = optimizer
            if self.pending is not None:
                self.parameters.load_optimizer(optimizer, *self.pending)
                self.pending = None
        given = {name: _number(value) for name, value in {"loss": loss, **values}.items() if value is not None}
        if self._mode is None:
            raise ConfigurationError("step() is for inside of `with join(...) as run:`")
        self._mode.step(gradients, optimizer, samples, given)
        self._steps += 1
        self._samples += samples
        if self._metrics is not None:
            self._report(given)

    def all_reduce(self, vector: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The mean of all workers' vectors, float32 [parameters]: a round of its own. Read-only, in mode sync."""
        if not isinstance(self._mode, Sync) or self.plan.mode != "sync":
            raise ConfigurationError("all_reduce is for mode sync")
        return self._mode.reduce(vector)

    def _report(self, given: dict[str, float]) -> None:
        """Once a round, by the lowest rank; the others' losses are in the round."""
        assert self._metrics is not None
        last = self.last
        number = self.round if self.plan.mode == "hogwild" else -1 if last is None else last.round
        if not self.is_reporter or number == self._reported:
            return
        now = time.perf_counter()
        if self.plan.mode == "hogwild" and now - self._since < 0.1:
            return
        self._reported = number
        exact = 4 * self.parameters.size
        seconds, self._since = now - self._since, now
        samples, self._samples = self._samples, 0
        workers = len(self.members) or 1
        numbers = dict(given)
        if last is not None and self.plan.mode != "hogwild":
            numbers |= last.values
            numbers |= {
                "staleness": last.staleness + last.late,
                "round_seconds": last.seconds,
                "refused": len(last.refused),
            }
            numbers |= {
                "bytes_sent": self.sent,
                "bytes_saved": max(0, exact - self.sent),
                "compress_seconds": self.compressing,
            }
            if self.sent:
                numbers["compression"] = exact / self.sent
            if self.mean is not None:
                numbers["gradient_norm"] = float(np.linalg.norm(self.mean))
        numbers |= {"members": workers, "samples_per_second": samples * workers / seconds}
        self._metrics.log(step=number, **numbers)


def _number(value: Any) -> float:
    return float(value.detach() if hasattr(value, "detach") else value)
