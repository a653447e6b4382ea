"""What is served, by whom, and how many predictions of it may be under way."""

from __future__ import annotations

import asyncio
import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

from pipeline import Pipeline, PipelineError, catalog
from pipeline.catalog import ModelStatus
from pipeline.metrics import WorkerSample, metrics_channel
from pipeline.settings import Settings

from .admission import Admission
from .measures import Measures
from .presence import Presence

__all__ = ["Models"]


class Models:
    """The served models, as the workers' announcements say; shared by all predictions."""

    def __init__(self, pipeline: Pipeline, options: Settings, measures: Measures) -> None:
        self.pipeline = pipeline
        self.options = options
        self.measures = measures
        self.opened = False
        """Whether the pipeline is."""
        self.statuses: dict[str, ModelStatus] = {}
        """The newest of each model that a living worker serves."""
        self.known: dict[str, None] = {}
        """Every model that was ever served, the first first."""
        self.workers: dict[tuple[str, str], ModelStatus] = {}
        """(model, worker) → what it said last; of living workers."""
        self._said: dict[tuple[str, str], ModelStatus] = {}
        """Of all workers."""
        self._serving: dict[tuple[str, str], ModelStatus] = {}
        """(model, worker) → what it serves, or served; the newest last."""
        self._presence = Presence()
        self._gateways: set[str] = set()
        """Of this app, each by its worker's name."""
        self.admissions: dict[str, Admission] = {}
        self.decoders = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "decode")

    async def follow(self) -> None:
        """Learn from the workers' announcements and reports what is served."""
        self.opened = True
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_statuses())
            group.create_task(self._follow_reports())

    async def _follow_statuses(self) -> None:
        async with self.pipeline.watch(catalog.model_status, since=catalog.model_status.keep) as stream:
            async for message in stream:
                status = message.event
                key = status.model, status.worker
                self._presence.begin(status.worker)
                self._said[key] = self.workers[key] = status
                if status.state == "serving":
                    self._serving.pop(key, None)
                    self._serving[key] = self.statuses[status.model] = status
                    self.known[status.model] = None

    async def _follow_reports(self) -> None:
        async with self.pipeline.watch(metrics_channel) as stream:
            async for message in stream:
                self._presence.report(message.event)
                self._count(message.event)
                living = {key for key in self._said if self._presence.lives(key[1])}
                if living != self.workers.keys():
                    self._show(living)

    def _count(self, sample: WorkerSample) -> None:
        """How many gateways ask the same workers."""
        if sample.app != self.pipeline.name:
            return
        (self._gateways.discard if sample.last else self._gateways.add)(sample.worker)
        self._gateways = {worker for worker in self._gateways if self._presence.lives(worker)}
        for admission in self.admissions.values():
            admission.gateways = max(1, len(self._gateways))

    def _show(self, living: set[tuple[str, str]]) -> None:
        """And forget who will not come back."""
        forgotten = self._presence.forget()
        for key in [key for key in self._said if key[1] in forgotten]:
            del self._said[key]
            self._serving.pop(key, None)
        self.workers = {key: status for key, status in self._said.items() if key in living}
        self.statuses = {key[0]: status for key, status in self._serving.items() if key in living}

    def route(self, path: str) -> str | None:
        """The model a path asks, if it asks one."""
        if path == "/predict":
            if "imagenet" in self.known or not self.known:
                return "imagenet"
            return next(iter(self.known))
        if path.startswith("/models/") and path.endswith("/predict"):
            return path[8:-8]
        return None

    def admission(self, model: str) -> Admission:
        admission = self.admissions.get(model)
        if admission is None:
            options = self.options
            admission = self.admissions[model] = Admission(
                options.gateway_inflight,
                options.gateway_inflight_bytes,
                options.gateway_wait,
                options.gateway_slowdown,
            )
            admission.gateways = max(1, len(self._gateways))
        return admission

    def cancel(self, model: str, request: str) -> None:
        """Nobody waits for it any more. That workers are told is worth no more than one attempt."""
        self.pipeline.spawn(self._cancel(catalog.Cancellation(model=model, request=request)), name="cancellation")

    async def _cancel(self, cancellation: catalog.Cancellation) -> None:
        with contextlib.suppress(PipelineError):
            await self.pipeline.publish(catalog.cancellations, cancellation)

    def close(self) -> None:
        self.opened = False
        self.decoders.shutdown(wait=False, cancel_futures=True)
