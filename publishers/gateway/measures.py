"""What Prometheus scrapes at /metrics. The one file that imports its client."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from pipeline.ledger import Ledger

from .admission import Admission

__all__ = ["Measures"]

_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
MOST_MODELS = 300


class _Predictions:
    """Counted in plain lists, and made into metrics when somebody asks: the client's own objects take longer to count
    than a prediction takes to parse."""

    def __init__(self) -> None:
        self._statuses: dict[tuple[str, int], int] = {}
        self._bins: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        self.spared: dict[str, int] = {}

    def note(self, model: str, status: int, seconds: float) -> None:
        """One prediction, answered or refused."""
        bins = self._bins.get(model)
        if bins is None:
            if len(self._bins) > MOST_MODELS:  # names that strangers make up
                model = "other"
            bins = self._bins.setdefault(model, [0] * (len(_BUCKETS) + 1))
        bins[bisect_left(_BUCKETS, seconds)] += 1
        self._sums[model] = self._sums.get(model, 0.0) + seconds
        key = (model, status)
        self._statuses[key] = self._statuses.get(key, 0) + 1

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client."""
        counter = CounterMetricFamily(
            "gateway_predictions", "Predictions answered, by status.", None, ["model", "status"]
        )
        for (model, status), count in self._statuses.items():
            counter.add_metric([model, str(status)], count)
        yield counter
        counter = CounterMetricFamily(
            "gateway_spared_predictions", "Predictions not computed, as their clients had gone.", None, ["model"]
        )
        for model, count in self.spared.items():
            counter.add_metric([model], count)
        yield counter
        histogram = HistogramMetricFamily(
            "gateway_prediction_seconds", "From request to answer.", None, None, ["model"]
        )
        bounds = [*map(str, _BUCKETS), "+Inf"]
        for model, bins in self._bins.items():
            counts = list(zip(bounds, accumulate(bins), strict=True))
            histogram.add_metric([model], counts, self._sums[model])
        yield histogram


class Measures:
    """One process's numbers."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._predictions = _Predictions()
        registry.register(self._predictions)
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
        self.prediction = self._predictions.note

    def spared(self, model: str) -> None:
        """One whose client had gone was not computed."""
        spared = self._predictions.spared
        spared[model] = spared.get(model, 0) + 1

    def page(self, ledger: Ledger, admissions: Mapping[str, Admission]) -> tuple[bytes, str]:
        """The exposition, and its content type."""
        for model, admission in admissions.items():
            self._inflight.labels(model).set(admission.inflight)
            self._drain.labels(model).set(admission.drain_seconds)
        for gauge in (self._published, *self._groups.values()):
            gauge.clear()  # who is gone is told of no more: its last lag would be scaled by for ever
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
