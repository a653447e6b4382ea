"""One worker of a data-parallel run: computes gradients on its shard, applies the mean of every round.

All workers begin with the same parameters and apply the same rounds in the same order, so they stay identical to the
bit, and a worker that starts late, or again, becomes identical by applying the rounds it missed from the channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar

import numpy as np
import torch
from torch.nn import functional

from pipeline import Pipeline, Tensor, catalog
from pipeline.catalog import DIGIT_MODEL, DIGIT_PARAMETERS, INTENSITY, Gradient, Round, Weights
from pipeline.errors import ConfigurationError
from pipeline.watching import Watch

from ..command import insist, opened
from ..datasets import Part, digits
from .metrics import Metrics

__all__ = ["Diverged", "LogIncomplete", "Plan", "Trainer", "work"]

logger = logging.getLogger("publishers.training")

T = TypeVar("T")

SIZE = sum(math.prod(shape) for shape in DIGIT_PARAMETERS.values())
"""Parameters of the model."""
QUIET = 0.3
"""Seconds without a further event after which history is taken as read."""


class LogIncomplete(ConfigurationError):
    """Raised when a run cannot be joined: its first rounds are no longer on the channel."""


class Diverged(ConfigurationError):
    """Raised when a gradient is not finite."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker is told. All workers of a run get the same, except `rank`."""

    run: str
    """Runs are named `run`.1, `run`.2, …; each has its own seed."""
    rank: int = 0
    workers: int = 1
    runs: int = 0
    """How many runs; 0: for ever."""
    rounds: int = 600
    """Of each run."""
    batch: int = 64
    """Samples a worker and round."""
    learning_rate: float = 6e-3
    seed: int = 0
    rate: float = 0.0
    """At most so many rounds a second; 0: as many as can be."""
    quorum: int = 1
    deadline: float = 2.0
    """Seconds; see Gradient."""
    patience: float = 2.0
    """Seconds without a round after which a worker publishes its gradient again."""
    publish_every: int = 10
    """Rounds between two offers of weights for inference."""

    def name(self, number: int) -> str:
        return f"{self.run}.{number}"


class Trainer:
    """Model, optimizer and shard of one worker in one run. No Redis here."""

    def __init__(self, plan: Plan, number: int, data: Part) -> None:
        seed = plan.seed + number
        random = torch.Generator().manual_seed(seed)
        self.parameters = {name: _initial(name, shape, random) for name, shape in DIGIT_PARAMETERS.items()}
        self.optimizer = torch.optim.Adam(self.parameters.values(), plan.learning_rate)
        self.round = 0
        self._images, self._labels = _tensors(data.shard(plan.rank, plan.workers))
        self.batch = min(plan.batch, len(self._labels))
        self._seed = (seed, plan.rank)

    def gradient(self) -> tuple[torch.Tensor, float, float]:
        """Of the mean loss over this round's samples: float32 [parameters]; and the samples' loss and accuracy.

        Raises Diverged.
        """
        chosen = np.random.default_rng((*self._seed, self.round)).choice(len(self._labels), self.batch, replace=False)
        labels = self._labels[chosen]
        logits = _forward(self.parameters, self._images[chosen])
        loss = functional.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, list(self.parameters.values()))
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        if not bool(torch.isfinite(flat).all()):
            raise Diverged(f"the gradient of round {self.round} is not finite; use a smaller --learning-rate")
        return flat, loss.item(), _accuracy(logits, labels)

    def apply(self, gradient: Tensor) -> None:
        """One step of the optimizer by the mean of the current round, float32 [parameters]."""
        parts = torch.split(torch.as_tensor(gradient), [parameter.numel() for parameter in self.parameters.values()])
        for parameter, part in zip(self.parameters.values(), parts, strict=True):
            parameter.grad = part.reshape(parameter.shape).clone()
        self.optimizer.step()
        self.round += 1

    def state(self) -> str:
        """SHA-256 of all parameters and the optimizer's state: equal for all workers after the same round."""
        digest = hashlib.sha256()
        for parameter in self.parameters.values():
            digest.update(parameter.detach().numpy().tobytes())
            for value in self.optimizer.state[parameter].values():
                digest.update(torch.as_tensor(value).numpy().tobytes())
        return digest.hexdigest()


class Champion:
    """Decides which weights are good enough for inference: no worse on validation data than the last published."""

    def __init__(self, validation: Part) -> None:
        self._images, self._labels = _tensors(validation)
        self.weights: Weights | None = None
        """The last published, whoever trained them."""
        self._score = 0.0
        self._published = 0.0

    def published(self, weights: Weights) -> None:
        if weights.model != DIGIT_MODEL:
            return
        parameters = {name: torch.as_tensor(tensor) for name, tensor in weights.parameters.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items() if tensor.dtype == torch.float32}
        if shapes == DIGIT_PARAMETERS and len(parameters) == len(shapes):
            self.weights, self._score, self._published = weights, self.score(parameters), time.monotonic()

    def score(self, parameters: dict[str, torch.Tensor]) -> float:
        with torch.no_grad():
            return _accuracy(_forward(parameters, self._images), self._labels)

    def offer(self, trainer: Trainer, run: str) -> Weights | None:
        """The trainer's weights when good enough; else the last published ones, before the channel forgets them."""
        score = self.score(trainer.parameters)
        if self.weights is not None and score < self._score:
            fading = time.monotonic() - self._published > catalog.weights.keep / 2
            return self.weights if fading else None
        return Weights(
            model=DIGIT_MODEL,
            version=self.weights.version + 1 if self.weights else 1,
            parameters={name: Tensor(value.detach().clone()) for name, value in trainer.parameters.items()},
            run=run,
            round=trainer.round,
            score=score,
        )


class RoundLog:
    """The rounds of this plan's runs, by run and number; of two with one number, the first in the channel's order."""

    def __init__(self, plan: Plan) -> None:
        self._prefix = f"{plan.run}."
        self._rounds: dict[tuple[int, int], Round] = {}
        self._arrived = asyncio.Event()

    def add(self, round_: Round) -> None:
        number = round_.run.removeprefix(self._prefix)
        if not round_.run.startswith(self._prefix) or not number.isdecimal():
            return
        if round_.gradient.dtype != "float32" or round_.gradient.shape != (SIZE,):
            logger.error("run %s: a round of %r is left out; expected float32 [%d]", round_.run, round_.gradient, SIZE)
        else:
            self._rounds.setdefault((int(number), round_.round), round_)
            self._arrived.set()

    def latest_run(self) -> int:
        """1 when there is none yet."""
        return max((run for run, _ in self._rounds), default=1)

    async def take(self, run: int, number: int, patience: float) -> Round | None:
        """The round, or None when it has not come within `patience` seconds. Older ones are forgotten."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while (run, number) not in self._rounds:
                    self._arrived.clear()
                    await self._arrived.wait()
        found = self._rounds.pop((run, number), None)
        for key in [key for key in self._rounds if key < (run, number)]:
            del self._rounds[key]
        return found

    def check_reaches(self, run: int, number: int) -> None:
        """Raises LogIncomplete when a later round is here and this one is not."""
        if (run, number) not in self._rounds and any(key > (run, number) for key in self._rounds):
            raise LogIncomplete(
                f"run {self._prefix}{run} cannot be joined: round {number} is not on channel {catalog.rounds.name!r} "
                f"any more, which keeps {catalog.rounds.keep:g} s; start a run of another name"
            )


async def work(
    plan: Plan, url: str | None = None, report: Callable[[str, str], None] = lambda run, state: None
) -> None:
    """Take part in the plan's runs, from the one that is under way. `report` gets each run's name and final state.

    Raises LogIncomplete, Diverged.
    """
    torch.set_num_threads(1)
    data = digits()
    log, champion = RoundLog(plan), Champion(data.validation)
    async with (
        opened(Pipeline("trainer", url)) as app,
        _followed(app.watch(catalog.rounds, since=catalog.rounds.keep), log.add),
        _followed(app.watch(catalog.weights, since=catalog.weights.keep), champion.published),
    ):
        number = log.latest_run()
        while not plan.runs or number <= plan.runs:
            trainer = Trainer(plan, number, data.train)
            log.check_reaches(number, 0)
            await _train(app, plan, number, trainer, log, champion)
            report(plan.name(number), trainer.state())
            number += 1


@asynccontextmanager
async def _followed(watch: Watch[T], take: Callable[[T], None]) -> AsyncIterator[None]:
    """Hand every event to `take`. Entered when those that were on the channel before have been handed over."""
    started = datetime.now(UTC)
    heard, caught_up = asyncio.Event(), asyncio.Event()

    async def follow(stream: Watch[T]) -> None:
        async for message in stream:
            take(message.event)
            heard.set()
            if message.time >= started:
                caught_up.set()

    async with watch as stream:
        task = asyncio.create_task(follow(stream))
        try:
            with contextlib.suppress(TimeoutError):
                while not caught_up.is_set():
                    heard.clear()
                    async with asyncio.timeout(QUIET):
                        await heard.wait()
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _train(app: Pipeline, plan: Plan, number: int, trainer: Trainer, log: RoundLog, champion: Champion) -> None:
    """One run, from its first round; rounds that were closed before are applied at once."""
    with Metrics(plan.name(number), url=app.url) if plan.rank == 0 else contextlib.nullcontext() as metrics:
        while trainer.round < plan.rounds:
            started = time.perf_counter()
            if (past := await log.take(number, trainer.round, 0.0)) is not None:
                trainer.apply(past.gradient)
                continue
            closed = await _exchange(app, plan, number, trainer, log, champion)
            trainer.apply(closed.gradient)
            if plan.rate:  # counted from the round, which reaches all workers at the same moment
                await asyncio.sleep(1 / plan.rate)
            if metrics is not None:
                seconds = time.perf_counter() - started
                metrics.log(
                    step=closed.round,
                    loss=closed.loss,
                    accuracy=closed.accuracy,
                    gradient_norm=np.linalg.norm(np.asarray(closed.gradient)),
                    samples_per_second=len(closed.ranks) * trainer.batch / seconds,
                    round_seconds=closed.seconds,
                )


async def _exchange(
    app: Pipeline, plan: Plan, number: int, trainer: Trainer, log: RoundLog, champion: Champion
) -> Round:
    """Publish this worker's gradient of the current round, wait for the mean; publish again while none comes."""
    run = plan.name(number)
    flat, loss, accuracy = trainer.gradient()
    offers = plan.rank == 0 and trainer.round and trainer.round % plan.publish_every == 0
    gradient = Gradient(
        run=run,
        round=trainer.round,
        rank=plan.rank,
        workers=plan.workers,
        quorum=plan.quorum,
        deadline=plan.deadline,
        samples=trainer.batch,
        gradient=Tensor(flat),
        loss=loss,
        accuracy=accuracy,
        weights=champion.offer(trainer, run) if offers else None,
    )
    told = False
    while True:
        await insist(lambda: app.publish(catalog.gradients, gradient, key=run), "publishing gradients")
        closed = await log.take(number, trainer.round, plan.patience)
        if closed is not None:
            return closed
        if not told:
            logger.warning("run %s: round %d has no mean yet; is an aggregator running?", run, trainer.round)
            told = True


def _initial(name: str, shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    """Uniform in ±1/√inputs, as torch's Linear begins."""
    inputs = DIGIT_PARAMETERS[f"{name.partition('.')[0]}.weight"][1]
    return ((torch.rand(shape, generator=random) * 2 - 1) / math.sqrt(inputs)).requires_grad_()


def _forward(parameters: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The digit model of the catalog: float32 [n, 64] in 0…1 → logits [n, 10]."""
    hidden = functional.linear(images, parameters["hidden.weight"], parameters["hidden.bias"]).relu()
    return functional.linear(hidden, parameters["output.weight"], parameters["output.bias"])


def _tensors(part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(part.images).flatten(1) / INTENSITY, torch.from_numpy(part.labels)


def _accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (logits.argmax(1) == labels).float().mean().item()
