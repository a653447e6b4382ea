"""What is served, by whom, and how many predictions of it may be under way."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

from pipeline import Pipeline, catalog
from pipeline.catalog import ModelStatus
from pipeline.settings import Settings

from .admission import Admission
from .measures import Measures

__all__ = ["Models"]


class Models:
    """The served models, as the workers' announcements say; shared by all predictions."""

    def __init__(self, pipeline: Pipeline, options: Settings, measures: Measures) -> None:
        self.pipeline = pipeline
        self.options = options
        self.measures = measures
        self.statuses: dict[str, ModelStatus] = {}
        """The newest of each model that serves."""
        self.workers: dict[tuple[str, str], ModelStatus] = {}
        """(model, worker) → what it said last."""
        self.admissions: dict[str, Admission] = {}
        self.decoders = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "decode")

    async def follow(self) -> None:
        """Learn from the workers' announcements what is served."""
        async with self.pipeline.watch(catalog.model_status, since=catalog.model_status.keep) as stream:
            async for message in stream:
                status = message.event
                self.workers[status.model, status.worker] = status
                if status.state == "serving":
                    self.statuses[status.model] = status

    def route(self, path: str) -> str | None:
        """The model a path asks, if it asks one."""
        if path == "/predict":
            if "imagenet" in self.statuses or not self.statuses:
                return "imagenet"
            return next(iter(self.statuses))
        if path.startswith("/models/") and path.endswith("/predict"):
            name = path[8:-8]
            return name if name != catalog.DIGIT_MODEL or name in self.statuses else None
        return None

    def admission(self, model: str) -> Admission:
        admission = self.admissions.get(model)
        if admission is None:
            options = self.options
            admission = self.admissions[model] = Admission(
                options.gateway_inflight, options.gateway_inflight_bytes, options.gateway_wait
            )
        return admission

    def close(self) -> None:
        self.decoders.shutdown(wait=False, cancel_futures=True)
