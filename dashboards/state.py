"""What the dashboard knows: events in, charts, tables and tiles out. Nothing here reads a clock or a network."""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import Any

from pipeline.catalog import Answer, MatmulResult, Prediction, Round, TrainingMetrics
from pipeline.ledger import ChannelLedger, Ledger, ledger_channel
from pipeline.metrics import WorkerSample, quantile

from .series import Chart
from .thumbnails import Pictures

__all__ = ["CHARTS", "State"]

CHARTS = ("rate", "latency", "lag", "loss", "accuracy", "inference", "batches", "predictions", "matmul")
RECENT = "last 10 s"
GONE_AFTER = 5.0
"""Seconds without a report after which a worker is shown as gone; it is forgotten after ten times that."""


class State:
    """Fed by `feed`; read by `hub`."""

    def __init__(self) -> None:
        self.charts = {name: Chart() for name in CHARTS}
        self.ledger: Ledger | None = None
        self.base: dict[str, int] = {}
        """Channel → events published before the first bucket it is drawn in."""
        self._last: dict[str, tuple[float, int]] = {}
        self._rates: dict[str, float] = {}
        self._workers: dict[str, tuple[float, WorkerSample]] = {}
        self._latency: dict[str, Counter[int]] = {}
        self._latency_second = 0
        self._verdicts: Counter[bool] = Counter()
        self._second_verdicts: dict[int, Counter[bool]] = {}
        self._recent_verdicts: deque[Counter[bool]] = deque(maxlen=10)
        self._reasons: Counter[str] = Counter()
        self.pictures = Pictures()
        self._answers: dict[int, Counter[str]] = {}
        self._version = 0
        self._kernels: dict[tuple[int, str], list[float]] = {}
        self._round_seconds = math.nan

    # -- events in -----------------------------------------------------------------------------------------------

    def on_ledger(self, ledger: Ledger) -> None:
        """Rates are differences between two ledgers, so what is drawn adds up to what was published."""
        own = ledger.channels.get(ledger_channel.name)
        # The very first ledger that was ever written: nothing was published before its bucket.
        whole = own is None or own.published <= 1
        first = self.ledger is None and not whole
        for name, channel in ledger.channels.items():
            before = self._last.get(name)
            if before is None or channel.published < before[1]:  # new, or the server lost its data
                start = channel.published if first and before is None else 0
                self.base[name] = start
                before = (self.ledger.time if self.ledger else ledger.time - 1.0, start)
            seconds = max(0.2, ledger.time - before[0])
            rate = (channel.published - before[1]) / seconds
            self._last[name] = (ledger.time, channel.published)
            self._rates[name] = rate
            if not name.startswith("pipeline.") and not name.endswith(".dead"):
                self.charts["rate"].add(name, ledger.time, channel.published - before[1])
                self._on_groups(name, channel, ledger.time)
        self.ledger = ledger

    def _on_groups(self, name: str, channel: ChannelLedger, moment: float) -> None:
        for group, one in channel.groups.items():
            self.charts["lag"].add(f"{name} → {group}", moment, one.lag + one.pending)

    def on_worker(self, sample: WorkerSample, moment: float) -> None:
        self._workers[sample.worker] = (moment, sample)
        second = int(moment)
        if second > self._latency_second:
            self._close_latency()
            self._latency_second = second
        for group in sample.groups:
            self._latency.setdefault(group.channel, Counter()).update(group.latency)
            for reason, count in group.batches.items():
                self._reasons[reason] += count
            for size, count in group.batch_sizes.items():
                self.charts["batches"].add(f"{group.group}: {size}+", moment, count)

    def _close_latency(self) -> None:
        for channel, bins in self._latency.items():
            for q in (0.5, 0.99):
                value = quantile(bins, q)
                if not math.isnan(value):
                    self.charts["latency"].add(f"{channel} p{q * 100:.0f}", self._latency_second, value * 1000)
        self._latency.clear()

    def on_training(self, metrics: TrainingMetrics) -> None:
        for name in ("loss", "accuracy"):
            value = metrics.values.get(name)
            if value is not None and math.isfinite(value):
                self.charts[name].add(metrics.run, metrics.step, value)

    def on_round(self, closed: Round) -> None:
        self._round_seconds = closed.seconds

    def on_prediction(self, prediction: Prediction, moment: float) -> None:
        self._version = prediction.version
        if prediction.truth is None:
            return
        right = prediction.label == prediction.truth
        self._verdicts[right] += 1
        self._second_verdicts.setdefault(int(moment), Counter())[right] += 1

    def on_answer(self, answer: Answer, moment: float) -> None:
        name = f"{answer.model} v{answer.version}" + (
            ": expired" if answer.expired else ": failed" if answer.error else ""
        )
        self._answers.setdefault(int(moment), Counter())[name] += 1
        self.pictures.on_answer(answer)

    def on_matmul(self, result: MatmulResult, moment: float) -> None:
        self._kernels.setdefault((int(moment), f"{result.kernel} on {result.device}"), []).append(result.gflops)

    def close_seconds(self, now: float) -> None:
        """Draw the seconds that are over; the unfinished one never."""
        for second in sorted(second for second in self._second_verdicts if second < int(now) - 1):
            self._recent_verdicts.append(self._second_verdicts.pop(second))
            recent = sum(self._recent_verdicts, Counter[bool]())
            self.charts["inference"].add(RECENT, second, 100 * recent[True] / recent.total())
            self.charts["inference"].add("all so far", second, 100 * self._verdicts[True] / self._verdicts.total())
        for second in sorted(second for second in self._answers if second < int(now) - 1):
            for name, count in self._answers.pop(second).items():
                self.charts["predictions"].add(name, second, count)
        for second, kernel in sorted(key for key in self._kernels if key[0] < int(now) - 1):
            values = self._kernels.pop((second, kernel))
            self.charts["matmul"].add(kernel, second, sum(values) / len(values))

    # -- out -----------------------------------------------------------------------------------------------------

    def tiles(self, now: float) -> dict[str, Any]:
        channels = self.ledger.channels if self.ledger else {}
        own = {name: one for name, one in channels.items() if not name.startswith("pipeline.")}
        groups = [group for one in own.values() if one.durable for group in one.groups.values()]
        checked = self._verdicts.total()
        return {
            "rate": sum(rate for name, rate in self._rates.items() if name in own and not name.endswith(".dead")),
            "published": sum(one.published for name, one in own.items() if not name.endswith(".dead")),
            "waiting": sum(group.lag + group.pending for group in groups),
            "dead": sum(group.dead for group in groups),
            "accuracy": 100 * self._verdicts[True] / checked if checked else None,
            "recent": _last_value(self.charts["inference"], RECENT),
            "version": self._version,
            "workers": sum(1 for seen, _ in self._workers.values() if now - seen < GONE_AFTER),
            "round_ms": None if math.isnan(self._round_seconds) else 1000 * self._round_seconds,
        }

    def workers(self, now: float) -> list[dict[str, Any]]:
        for name in [name for name, (seen, _) in self._workers.items() if now - seen > 10 * GONE_AFTER]:
            del self._workers[name]
        return [
            {
                "app": sample.app,
                "host": sample.host,
                "pid": sample.pid,
                "live": now - seen < GONE_AFTER,
                "seen": now - seen,
                "uptime": max(0.0, seen - sample.started),
                "rss": sample.rss,
                "cpu": sample.cpu,
                "busy": sum(group.busy for group in sample.groups) / max(0.1, sample.interval),
                "in_hand": sum(group.in_hand for group in sample.groups),
            }
            for seen, sample in sorted(self._workers.values(), key=lambda item: (item[1].app, item[1].pid))
        ]

    def channels(self) -> list[dict[str, Any]]:
        """A row a channel and group, for the ledger's table."""
        rows: list[dict[str, Any]] = []
        for name, one in (self.ledger.channels if self.ledger else {}).items():
            if name.startswith("pipeline.") or not (one.published or one.groups):
                continue
            row = {
                "channel": name,
                "durable": one.durable,
                "published": one.published,
                "rate": self._rates.get(name, 0),
            }
            if not one.groups:
                rows.append(row)
            for group, counts in one.groups.items():
                numbers = counts.model_dump(include={"handled", "dead", "retried", "pending", "lag"})
                off = counts.difference(one.published) if one.durable else 0
                rows.append({**row, "group": group, **numbers, "off": off})
        return rows

    def reasons(self) -> dict[str, int]:
        return dict(self._reasons)


def _last_value(chart: Chart, series: str) -> float | None:
    ring = chart.rings.get(series)
    values = ring.points()[1] if ring else []
    return values[-1] if values else None
