"""Tables, totals and marks: what pages show beside their charts. Moments are Unix seconds; browsers count on."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.deadletters import internal
from pipeline.metrics import LATENCY_BOUNDS

from .alerts import alerts
from .flow import diagram
from .rings import LEVELS, quantiles
from .state import State, pair

__all__ = ["channels", "facts", "totals", "workers"]

HISTOGRAM_WINDOW = 300
"""Seconds over which the latency histogram is taken."""
MARKERS = 200


def facts(state: State, page: str, channel: str | None, now: float) -> dict[str, Any]:
    """By name; what has not changed since the last look is not sent."""
    found: dict[str, Any] = {"markers": [asdict(marker) for marker in state.happened.since()[-MARKERS:]]}
    if page == "overview":
        found.update(totals=totals(state), flow=diagram(state, now), alerts=alerts(state, now))
    elif page == "channels":
        found.update(channels=channels(state))
    elif page == "training":
        found.update(runs=[run.facts(now) for run in state.runs.by_name.values()])
    elif page == "serving":
        found.update(serving(state, now))
    elif page == "matmul":
        found.update(state.jobs.facts(), kernels=kernels(state))
    elif page == "workers":
        found.update(workers=workers(state))
    elif page == "dead":
        found.update(dead=dead(state))
    return found


def totals(state: State) -> dict[str, Any]:
    """The headline numbers."""
    known = state.ledger.channels if state.ledger else {}
    own = {name: one for name, one in known.items() if not internal(name)}
    groups = [group for one in own.values() if one.durable for group in one.groups.values()]
    return {
        "rate": round(sum(state.rates.get(name, 0.0) for name in own), 1),
        "published": sum(one.published for one in own.values()),
        "handled": sum(group.handled for group in groups),
        "waiting": sum(group.lag + group.pending for group in groups),
        "dead": sum(group.dead for group in groups),
        "retried": sum(group.retried for group in groups),
        "suppressed": sum(group.duplicates_suppressed for group in groups),
        "off": sum(
            abs(group.difference(one.published)) for one in own.values() if one.durable for group in one.groups.values()
        ),
        "groups": len(groups),
        "accuracy": state.accuracy,
        "version": state.version,
        "workers": sum(not worker.gone for worker in state.workers.values()),
    }


def channels(state: State) -> list[dict[str, Any]]:
    """A row a channel and group."""
    rows: list[dict[str, Any]] = []
    for name, one in (state.ledger.channels if state.ledger else {}).items():
        if internal(name) or not (one.published or one.groups):
            continue
        row = {
            "id": name,
            "channel": name,
            "kind": "durable" if one.durable else "live",
            "published": one.published,
            "rate": round(state.rates.get(name, 0.0), 1),
            "retained": one.retained if one.durable else None,
        }
        if not one.groups:
            rows.append(row)
        for group, counts in one.groups.items():
            found = counts.model_dump(include={"handled", "dead", "retried", "pending", "lag", "oldest", "consumers"})
            p50, p95, p99 = recent_quantiles(state, pair(name, group))
            rows.append(
                {
                    **row, **found, "id": pair(name, group), "group": group, "p50": p50, "p95": p95, "p99": p99,
                    "dropped": counts.dropped, "drain": counts.drain_seconds,
                    "paused": counts.paused,
                    "off": counts.difference(one.published) if one.durable else None,
                }
            )  # fmt: skip
    return rows


def recent_quantiles(state: State, name: str, seconds: int = 60) -> tuple[float | None, ...]:
    """p50, p95 and p99 of a group's latency over the last minute that had any."""
    counts = recent_histogram(state, name, seconds)
    if counts is None:
        return None, None, None
    return tuple(float(f"{value:.3g}") for value in quantiles(counts[None, :])[0])


def recent_histogram(state: State, name: str, seconds: int) -> Any:
    ring = state.latency.get(name)
    if ring is None or state.ledger is None:
        return None
    width = LEVELS[1][0]
    last = int(state.ledger.time // width) + 1
    counts = ring.read(1, last - int(seconds // width), last).sum(axis=0, dtype=np.int64)
    return counts if counts.any() else None


def serving(state: State, now: float) -> dict[str, Any]:
    """Models, the histogram of latencies, pictures."""
    total = np.zeros(len(LATENCY_BOUNDS) + 1, np.int64)
    for name in list(state.latency):
        if name.startswith("models."):
            counts = recent_histogram(state, name, HISTOGRAM_WINDOW)
            if counts is not None:
                total += counts
    reasons: Counter[str] = Counter()
    for name, ring in state.sums["released"].items():
        last = int(now // 5) + 1
        reasons[name] += int(np.nansum(ring.read(1, last - HISTOGRAM_WINDOW // 5, last)))
    return {
        "histogram": _histogram(total),
        "released": dict(reasons.most_common()),
        "models": models(state),
        "pictures": state.pictures.shown(),
        "digits": {"version": state.version, "accuracy": state.accuracy},
    }


def _histogram(counts: Any) -> list[list[float]]:
    """[upper bound in s, count], ten a decade, without the empty ends."""
    pairs = np.append(counts, [0] * (len(counts) % 2)).reshape(-1, 2).sum(axis=1)
    heard = np.flatnonzero(pairs)
    if not len(heard):
        return []
    bounds = [*LATENCY_BOUNDS, math.inf]
    return [
        [min(bounds[min(2 * at + 1, len(bounds) - 1)], 1000.0), int(pairs[at])]
        for at in range(heard[0], heard[-1] + 1)
    ]  # fmt: skip


def models(state: State) -> list[dict[str, Any]]:
    """What each living worker serves; where none is left, what those served that are gone."""
    rows = []
    for (model, worker), (since, status) in sorted(state.models.items()):
        known = state.workers.get(worker)
        live = known is not None and not known.gone
        rows.append(
            {
                "id": f"{model} {worker}", "model": model, "version": status.version,
                "state": status.state if live else "gone", "reason": status.reason, "kind": status.kind,
                "device": status.device, "batch": status.batch, "worker": known.label if known else worker,
                "live": live, "since": since,
            }
        )  # fmt: skip
    return [row for row in rows if row["live"]] or rows


def kernels(state: State) -> list[dict[str, Any]]:
    """The last speed of each kernel and device, and its best."""
    rows = []
    for name, ring in sorted(state.gauges["gflops"].items()):
        held = ring.read(0, ring.newest(0) - LEVELS[0][1] + 1, ring.newest(0) + 1)
        kernel, _, device = name.rpartition(" on ")
        peak = state.gauges["peak"].get(name)
        share = None
        if peak is not None:
            shares = peak.read(0, peak.newest(0) - LEVELS[0][1] + 1, peak.newest(0) + 1)
            share = float(np.nanmax(shares[:, 2]))
        rows.append(
            {
                "id": name, "kernel": kernel, "device": device, "last": _last(held[:, 0]),
                "best": float(np.nanmax(held[:, 2])), "share": share,
            }
        )  # fmt: skip
    return rows


def _last(values: Any) -> float | None:
    heard = values[~np.isnan(values)]
    return float(heard[-1]) if len(heard) else None


def workers(state: State) -> list[dict[str, Any]]:
    """A row a process."""
    rows = []
    living = sorted(state.workers.items(), key=lambda item: (item[1].gone, item[1].sample.app, item[1].sample.pid))
    for name, worker in living:
        sample = worker.sample
        gpus = sample.gpus or []
        rows.append(
            {
                "id": name, "app": sample.app, "host": sample.host, "pid": sample.pid, "version": sample.version,
                "state": "stopped" if sample.last else "silent" if worker.gone else "live",
                "seen": worker.seen if worker.gone else None, "started": sample.started, "memory": sample.rss,
                "cpu": round(sample.cpu, 3), "threads": sample.threads,
                "busy": round(sum(group.busy for group in sample.groups) / max(0.1, sample.interval), 3),
                "in_hand": sum(group.in_hand for group in sample.groups),
                "leases": sum(group.leases for group in sample.groups),
                "oldest_lease": max((group.oldest_lease for group in sample.groups), default=0.0),
                "groups": ", ".join(pair(group.channel, group.group) for group in sample.groups),
                "gpu": max((gpu.utilisation for gpu in gpus), default=None),
                "gpu_memory": max((gpu.memory_used for gpu in gpus), default=None),
            }
        )  # fmt: skip
    return rows


def dead(state: State) -> list[dict[str, Any]]:
    """Channels with dead letters, by what the ledger counts."""
    rows = []
    for name, one in (state.ledger.channels if state.ledger else {}).items():
        if one.durable and not internal(name):
            count = sum(group.dead for group in one.groups.values())
            if count:
                rows.append({"channel": name, "dead": count})
    return rows
