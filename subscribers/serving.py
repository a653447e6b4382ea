"""Serves models: one channel `models.<name>` and one group a model, requests taken in batches, answers by request.

    PIPELINE_MODELS=imagenet,models/mnist.json pipeline serve subscribers.serving:app

`catalog.LoadModel` events swap a model between two batches; one that does not load or warm up is refused, and the old
one goes on. See `subscribers.predictors` for the kinds of models.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from pipeline import Batch, Message, Pipeline, Tensor, catalog
from pipeline.catalog import Answer, Inputs, LoadModel, ModelStatus
from pipeline.settings import Settings, settings

from .predictors import BadModel, ModelSpec, OutOfMemory, Predictor, load, read_spec

__all__ = ["Served", "make"]

logger = logging.getLogger("subscribers.serving")

QUICK = 0.001
"""Seconds for a batch of eight, below which a model is called in the event loop itself."""

Item = npt.NDArray[Any]
MOST_CANCELLED = 4096
"""Cancellations that are remembered: of what is queued, and what other workers answered."""

Fields = dict[str, Any]
"""Of an Answer: validating a whole batch of them at once takes half the time."""

_answers = TypeAdapter(list[Answer])


class Served:
    """One model of this process. `current` is replaced as a whole; a batch takes it once."""

    def __init__(self, spec: ModelSpec, folder: Path, options: Settings) -> None:
        self.name = spec.name
        self.current: Predictor | None = None
        self.spec = spec
        self.refused = 0
        """Loads that failed."""
        self._cancelled: dict[str, None] = {}
        """Requests that nobody waits for, the first first."""
        self._folder = folder
        self._options = options

    @property
    def most(self) -> int:
        """Items handed over together, whichever version answers; one may take fewer at once."""
        return self.spec.batch or self._options.serving_batch

    def open(self) -> None:
        """Load what was declared. Raises BadModel: a worker without a model is of no use."""
        self.current = self._load(self.spec, self._folder)

    def swap(self, event: LoadModel) -> ModelStatus:
        """Load and warm up beside the model that serves, if one does; then take its place, or leave it there and say
        why."""
        try:
            began_with = (self.spec, self._folder)
            spec, folder = read_spec(event.source, self._options.models_dir) if event.source else began_with
            if spec.name != self.name:
                raise BadModel(f"{event.source} describes model {spec.name!r}")
            spec = spec.model_copy(update={"version": event.version})
            predictor = self._load(spec, folder)
        except Exception as error:
            self.refused += 1
            kept = f"version {self.current.version} stays" if self.current else "one before it is tried"
            logger.error("version %d of model %r is refused, %s: %s", event.version, self.name, kept, error)
            return ModelStatus(
                model=self.name, version=event.version, worker="", state="refused", reason=str(error)[:2000]
            )
        self.current = predictor
        logger.info("model %r: version %d from %s", self.name, event.version, event.source)
        return self.status()

    def _load(self, spec: ModelSpec, folder: Path) -> Predictor:
        options = self._options
        return load(spec, folder, device=options.device, compile_it=options.compile_models)

    def status(self) -> ModelStatus:
        assert self.current is not None
        spec = self.current.spec
        return ModelStatus(
            model=self.name, version=self.current.version, worker="", state="serving", kind=spec.kind,
            shape=spec.shape, dtype=spec.dtype, classes=len(spec.labels),
            batch=min(self.most, spec.batch or self.most), device=self.current.device,
        )  # fmt: skip

    # -- a batch -------------------------------------------------------------------------------------------------

    def cancel(self, request: str) -> None:
        """Do not compute it, if it is not begun."""
        self._cancelled[request] = None
        if len(self._cancelled) > MOST_CANCELLED:
            del self._cancelled[next(iter(self._cancelled))]

    def answer_all(self, messages: list[Message[Inputs]]) -> list[Answer]:
        """As `answer`; each names its request."""
        return self.answer([message.event for message in messages], [message.id for message in messages])

    def answer(self, batch: list[Inputs], ids: Sequence[str] = ()) -> list[Answer]:
        """One Answer a request, all from one version; what is wrong with one of them concerns no other."""
        predictor = self.current
        assert predictor is not None
        common = {"model": self.name, "version": predictor.version}
        answers: list[Fields] = [{**common, "request": id_} for id_ in ids] or [{**common} for _ in batch]
        buckets: dict[tuple[int, ...], list[int]] = {}
        now = time.time()
        cancelled = self._cancelled.keys() & ids if self._cancelled else ()
        for index, request in enumerate(batch):
            tensor = request.data
            if request.deadline is not None and now > request.deadline:
                answers[index].update(expired=True, error="its deadline has passed")
            elif cancelled and ids[index] in cancelled:
                answers[index].update(expired=True, error="its client has gone")
            elif problem := predictor.spec.check(tensor.shape, tensor.dtype):
                answers[index].update(error=problem)
            else:
                buckets.setdefault(tensor.shape, []).append(index)
        for indexes in buckets.values():
            for part in _affordable(predictor.spec, indexes, batch):
                self._compute(predictor, part, batch, answers)
        return _answers.validate_python(answers)

    def _compute(self, predictor: Predictor, indexes: list[int], batch: list[Inputs], answers: list[Fields]) -> None:
        began = time.perf_counter()
        try:
            rows = predictor.predict([np.asarray(batch[index].data) for index in indexes])
        except Exception as error:
            if len(indexes) > 1:  # too big, or one of them is poison: halves find out
                if isinstance(error, OutOfMemory):
                    logger.warning("model %r: a batch of %d is out of memory; in halves", self.name, len(indexes))
                middle = len(indexes) // 2
                self._compute(predictor, indexes[:middle], batch, answers)
                self._compute(predictor, indexes[middle:], batch, answers)
                return
            reason = f"the model fails on it: {type(error).__name__}: {error}"[:500]
            answers[indexes[0]].update(error=reason, batch=1)
            return
        seconds = time.perf_counter() - began
        facts = {"batch": len(indexes), "seconds": seconds}
        if predictor.spec.output == "values":
            for index, row in zip(indexes, rows, strict=True):
                answers[index].update(facts, output=Tensor(row))
            return
        labels = predictor.spec.labels or [str(place) for place in range(rows.shape[1])]
        for index, scores in zip(indexes, best(rows, [batch[index].top for index in indexes]), strict=True):
            answers[index].update(
                facts, predictions=[{"label": labels[place], "probability": value} for place, value in scores]
            )


def _affordable(spec: ModelSpec, indexes: list[int], batch: list[Inputs]) -> list[list[int]]:
    """Parts of at most so many items and elements, each of one item at least."""
    size = spec.batch or len(indexes)
    if spec.elements is not None:
        size = min(size, spec.elements // max(1, batch[indexes[0]].data.nbytes // np.dtype(spec.dtype).itemsize))
    size = max(1, size)
    return [indexes[at : at + size] for at in range(0, len(indexes), size)]


def best(rows: Item, tops: Sequence[int]) -> list[list[tuple[int, float]]]:
    """For each row, its `top` greatest values with their places, greatest first."""
    most = min(max(tops), rows.shape[1])
    each = np.arange(len(rows))[:, None]
    if rows.shape[1] > 8 * most:  # sorting only what can be among them
        among = np.argpartition(-rows, most - 1, axis=1)[:, :most]
        places = among[each, np.argsort(-rows[each, among], axis=1, kind="stable")]
    else:
        places = np.argsort(-rows, axis=1, kind="stable")[:, :most]
    ranked = zip(places.tolist(), rows[each, places].tolist(), tops, strict=True)
    return [list(zip(p[:top], v[:top], strict=True)) for p, v, top in ranked]


def make(options: Settings, url: str | None = None) -> Pipeline:
    """The app that serves what `options.models` names. Raises BadModel for a specification that cannot be read."""
    app = Pipeline("serving", url)
    models: dict[str, Served] = {}
    for source in filter(None, map(str.strip, options.models.split(","))):
        spec, folder = read_spec(source)
        if spec.name in models:
            raise BadModel(f"PIPELINE_MODELS names model {spec.name!r} twice")
        models[spec.name] = served = Served(spec, folder, options)
        app.subscriber(
            catalog.requests_of(spec.name), group="serving", publishes=catalog.answers,
            batch=Batch(served.most), lease=options.serving_lease,
        )(_handler(served))  # fmt: skip
    if not models:
        raise BadModel("PIPELINE_MODELS names no model")

    async def tell(status: ModelStatus) -> None:
        await app.publish(catalog.model_status, status.model_copy(update={"worker": app.consumer}))

    @app.on_start
    async def start() -> None:
        """The newest version that can be loaded serves from the first request on, as it does at the workers that were
        there when it was asked for; what was declared, where there is none."""
        keep_freed_memory()
        loads = [message async for message in app.kept(catalog.model_loads)]
        for name, served in models.items():
            await replace(served, [message for message in loads if message.event.model == name])
            if served.current is None:
                await asyncio.to_thread(served.open)
                await tell(served.status())
        app.spawn(follow_cancellations(), name="cancellations")
        app.spawn(follow(loads[-1].id if loads else catalog.model_loads.keep), name="model loads")

    async def replace(served: Served, loads: list[Message[LoadModel]]) -> None:
        """The newest that is not refused counts; what it supersedes is not loaded."""
        for message in reversed(loads):
            status = await asyncio.to_thread(served.swap, message.event)
            await tell(status.model_copy(update={"load": message.id}))
            if status.state == "serving":
                return

    async def follow_cancellations() -> None:
        async with app.watch(catalog.cancellations) as stream:
            async for message in stream:
                if (served := models.get(message.event.model)) is not None:
                    served.cancel(message.event.request)

    async def follow(since: str | float) -> None:
        wanted: dict[str, list[Message[LoadModel]]] = {}
        arrived = asyncio.Event()

        async def read() -> None:
            async with app.watch(catalog.model_loads, since=since) as stream:
                async for message in stream:
                    if message.event.model in models:
                        wanted.setdefault(message.event.model, []).append(message)
                        arrived.set()

        reading = app.spawn(read(), name="reading model loads")
        with contextlib.suppress(asyncio.CancelledError):
            while not reading.done():
                await arrived.wait()
                arrived.clear()
                await asyncio.sleep(0.01)  # let what is there already supersede itself
                while wanted:
                    name, loads = wanted.popitem()
                    await replace(models[name], loads)

    return app


def _handler(served: Served) -> Any:
    async def answer(batch: list[Message[Inputs]]) -> list[Answer]:
        """In a thread, so that the last batch's answers leave meanwhile; but for models that are quicker than threads
        are to be handed work."""
        assert served.current is not None
        if served.current.seconds < QUICK:
            return served.answer_all(batch)
        return await asyncio.to_thread(served.answer_all, batch)

    return answer


def keep_freed_memory() -> None:
    """Let glibc reuse big blocks instead of returning them to the kernel, whose fresh pages cost more than the
    convolutions that fill them (EfficientNet-Lite0, batches of 32: 49 → 28 ms an image). One arena, so that handlers'
    threads share it. On other systems: nothing."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-3, 1 << 30), (-1, 1 << 30), (-8, 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX
            libc.mallopt(option, value)


def __getattr__(name: str) -> Any:
    """`app` is made when it is first asked for: reading specifications is not importing's business."""
    if name == "app":
        globals()["app"] = found = make(settings())
        return found
    raise AttributeError(name)
