"""What Prometheus scrapes at /metrics. The one file that imports its client."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pipeline.ledger import Ledger

from .admission import Admission

__all__ = ["Measures"]

_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Measures:
    """One process's numbers."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._predictions = Counter(
            "gateway_predictions", "Predictions answered, by status.", ["model", "status"], registry=registry
        )
        self._seconds = Histogram(
            "gateway_prediction_seconds", "From request to answer.", ["model"], buckets=_BUCKETS, registry=registry
        )
        self._inflight = Gauge("gateway_inflight", "Predictions under way.", ["model"], registry=registry)
        self._drain = Gauge(
            "gateway_drain_seconds", "Until what is under way is answered.", ["model"], registry=registry
        )
        self._published = Gauge("pipeline_published_events", "Events published.", ["channel"], registry=registry)
        names = ["channel", "group"]
        self._groups = {
            name: Gauge(f"pipeline_group_{name}", text, names, registry=registry)
            for name, text in (
                ("handled_events", "Events handled."),
                ("dead_events", "Dead letters."),
                ("pending_events", "Events held or waiting for a retry."),
                ("lag_events", "Events not yet read."),
                ("drain_seconds", "Estimated until lag and pending are handled: what to scale workers by."),
            )
        }
        self._labelled: dict[tuple[str, int], Counter] = {}
        self._timed: dict[str, Histogram] = {}

    def prediction(self, model: str, status: int, seconds: float) -> None:
        counter = self._labelled.get((model, status))
        if counter is None:
            if len(self._labelled) > 1000:  # names that strangers make up
                model = "other"
            counter = self._labelled[model, status] = self._predictions.labels(model, str(status))
            self._timed.setdefault(model, self._seconds.labels(model))
        counter.inc()
        self._timed[model].observe(seconds)

    def page(self, ledger: Ledger, admissions: Mapping[str, Admission]) -> tuple[bytes, str]:
        """The exposition, and its content type."""
        for model, admission in admissions.items():
            self._inflight.labels(model).set(admission.inflight)
            self._drain.labels(model).set(admission.drain_seconds)
        for channel, one in ledger.channels.items():
            self._published.labels(channel).set(one.published)
            for group, counts in one.groups.items():
                self._groups["handled_events"].labels(channel, group).set(counts.handled)
                self._groups["dead_events"].labels(channel, group).set(counts.dead)
                self._groups["pending_events"].labels(channel, group).set(counts.pending)
                self._groups["lag_events"].labels(channel, group).set(counts.lag)
                if counts.drain_seconds is not None:
                    self._groups["drain_seconds"].labels(channel, group).set(counts.drain_seconds)
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
