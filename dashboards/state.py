"""What the dashboard knows: events in, rings and records out. Nothing here reads a clock or a network."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.catalog import Answer, MatmulResult, ModelStatus, Prediction, TrainingMetrics
from pipeline.deadletters import internal
from pipeline.ledger import ChannelLedger, GroupLedger, Ledger, ledger_channel
from pipeline.metrics import GroupSample, WorkerSample

from .jobs import Jobs
from .markers import Markers
from .rings import Gauge, Histogram, Ring, Sum, spread
from .runs import Runs
from .thumbnails import Pictures

__all__ = ["GONE_AFTER", "State", "Worker", "pair"]

RECENT = "last 10 s"
ALL = "all so far"
GONE_AFTER = 5.0
"""Seconds without a report after which a worker is shown as silent; it is forgotten after FORGOTTEN_AFTER."""
FORGOTTEN_AFTER = 120.0
MOST_SERIES = 256
"""Series of one kind. Histograms are big, 2 MB each: fewer of them."""
MOST_HISTOGRAMS = 128
MOST_REFUSED = 4096
QUIET = 600
"""Seconds without news after which a series makes room for another."""

R = TypeVar("R", bound=Ring)


def pair(channel: str, group: str) -> str:
    """The name of a group's series."""
    return f"{channel} → {group}"


@dataclass(slots=True)
class Worker:
    """A process that reports."""

    seen: float
    sample: WorkerSample
    label: str
    """What its series are called."""
    gone: bool = False


class Kind(dict[str, R]):
    """The series of one kind, by name. A new one takes the place of one that is quiet; where all are busy there is no
    room, since who made it would be the next to go, and so on until none held anything."""

    def __init__(self, make: Callable[[], R], most: int = MOST_SERIES) -> None:
        super().__init__()
        self._make = make
        self._most = most
        self._order: OrderedDict[str, None] = OrderedDict()
        self._refused: OrderedDict[str, int] = OrderedDict()
        self._nowhere = make()

    def touch(self, name: str) -> R:
        """The series, marked as the one heard last; for one without room a ring that nobody reads."""
        if name not in self and not self._has_room():
            self._refused[name] = self._now
            self._refused.move_to_end(name)
            if len(self._refused) > MOST_REFUSED:
                self._refused.popitem(last=False)
            return self._nowhere
        self._refused.pop(name, None)
        self._order[name] = None
        self._order.move_to_end(name)
        return self[name] if name in self else self.setdefault(name, self._make())

    def refused(self) -> list[str]:
        """Series that had no room when they were heard."""
        return [name for name, second in self._refused.items() if self._now - second < QUIET]

    @property
    def _now(self) -> int:
        """The second in which any was heard last, with room or without."""
        held = self[next(reversed(self._order))].newest(0) if self._order else -1
        return max(held, self._nowhere.newest(0))

    def _has_room(self) -> bool:
        if len(self) < self._most:
            return True
        quietest = next(iter(self._order))
        if self._now - self[quietest].newest(0) < QUIET:
            return False
        del self[quietest], self._order[quietest]
        return True


class State:
    """Fed by `feed`; read by `streams`, `facts` and `flow`."""

    def __init__(self) -> None:
        self.sums: dict[str, Kind[Sum]] = {
            name: Kind(Sum)
            for name in ("published", "handled", "dead", "retried", "batches", "released", "answers", "products")
        }
        self.gauges: dict[str, Kind[Gauge]] = {
            name: Kind(Gauge)
            for name in (
                "waiting", "lag", "pending", "oldest", "retained", "cpu", "memory", "busy", "gpu", "in_hand",
                "accuracy", "gflops", "peak",
            )
        }  # fmt: skip
        self.latency: Kind[Histogram] = Kind(Histogram, MOST_HISTOGRAMS)
        self.runs = Runs()
        self.jobs = Jobs()
        self.ledger: Ledger | None = None
        self.base: dict[str, int] = {}
        """Channel → events published that no bucket holds."""
        self.rates: dict[str, float] = {}
        self.group_rates: dict[str, float] = {}
        self.group_seen: dict[str, float] = {}
        """Channel → group: when the rate of its dead letters last rose."""
        self.workers: dict[str, Worker] = {}
        self.publishes: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
        """(app, channel) → worker → when it last published there, and how many a second."""
        self.happened = Markers()
        """What is drawn on every time chart."""
        self.models: dict[tuple[str, str], tuple[float, ModelStatus]] = {}
        """(model, worker) → what it serves since when."""
        self.pictures = Pictures()
        self.version = 0
        """Version of the weights that inference answers with."""
        self.changes = 0
        """Grows with each event: tables are built again when it has."""
        self._last: dict[str, tuple[float, ChannelLedger]] = {}
        self.reported = 0.0
        """Up to here every worker with a group has reported."""
        self._reported = 0.0
        self._resumed = 0.0
        """When workers were heard again after nobody was."""
        self._verdicts: Counter[bool] = Counter()
        self._second_verdicts: dict[int, Counter[bool]] = {}
        self._recent_verdicts: deque[Counter[bool]] = deque(maxlen=10)

    def kinds(self) -> dict[str, Kind[Any]]:
        """Every kind of series in buckets of time."""
        return {**self.sums, **self.gauges, "latency": self.latency}

    # -- the ledger ----------------------------------------------------------------------------------------------

    def on_ledger(self, ledger: Ledger) -> None:
        """Counts are differences between two ledgers, so what is drawn adds up to what was published."""
        own = ledger.channels.get(ledger_channel.name)
        # The very first ledger that was ever written: nothing was published before its bucket.
        from_the_start = self.ledger is not None or own is None or own.published <= 1
        lost: list[str] = []
        for name, channel in ledger.channels.items():
            before = self._last.get(name)
            if before is None:
                since = self.ledger.time if self.ledger else ledger.time - 1.0
                old = ChannelLedger() if from_the_start else channel
                self.base[name] = old.published
            else:
                since, old = before
                if channel.published < old.published:
                    lost.append(name)
                    self.base[name] -= old.published
                    old = ChannelLedger()
            self._on_channel(name, channel, old, since, ledger.time)
            self._last[name] = (ledger.time, channel)
        if lost:
            self.happened.add(ledger.time, "reset", f"the server lost data: {len(lost)} channels count anew", "redis")
        for gone in self._last.keys() - ledger.channels.keys():
            del self._last[gone]
        self.ledger = ledger
        self.changes += 1

    def _on_channel(self, name: str, now: ChannelLedger, old: ChannelLedger, since: float, moment: float) -> None:
        seconds = max(0.2, moment - since)
        if now.published:
            spread(self.sums["published"].touch(name), since, moment, now.published - old.published)
        if name not in self.sums["published"]:
            self.base[name] = now.published
        self.rates[name] = (now.published - old.published) / seconds
        if internal(name):
            return
        if now.durable:
            self.gauges["retained"].touch(name).set(moment, now.retained)
        for group, counts in now.groups.items():
            self._on_group(name, group, counts, old.groups.get(group, GroupLedger()), since, moment)

    def _on_group(
        self, channel: str, group: str, now: GroupLedger, old: GroupLedger, since: float, moment: float
    ) -> None:
        name = pair(channel, group)
        if now.handled < old.handled:
            text = f"{name} reads {old.handled - now.handled:,} events again"
            self.happened.add(moment, "rewind", text, f"{channel}/{group}")
        for what in ("handled", "dead", "retried"):
            risen = max(0, getattr(now, what) - getattr(old, what))
            spread(self.sums[what].touch(name), since, moment, risen)
            if what == "handled":
                self.group_rates[name] = risen / max(0.2, moment - since)
            elif what == "dead" and risen:
                self.group_seen[name] = moment
        for what, value in (
            ("waiting", now.lag + now.pending), ("lag", now.lag), ("pending", now.pending), ("oldest", now.oldest),
        ):  # fmt: skip
            self.gauges[what].touch(name).set(moment, value)

    # -- workers -------------------------------------------------------------------------------------------------

    def on_worker(self, sample: WorkerSample, moment: float) -> None:
        if moment - self._reported > GONE_AFTER:
            self._resumed = moment
        self._reported = max(self._reported, moment)
        self._look_for_gone(moment)
        worker = self.workers.get(sample.worker)
        if worker is None:
            worker = self.workers[sample.worker] = Worker(moment, sample, self._label(sample))
        worker.seen, worker.sample, worker.gone = moment, sample, sample.last
        for channel, count in sample.published.items():
            known = self.publishes.setdefault((sample.app, channel), {})
            known[sample.worker] = (moment, count / max(0.1, sample.interval))
        self.gauges["cpu"].touch(worker.label).set(moment, sample.cpu)
        self.gauges["memory"].touch(worker.label).set(moment, sample.rss)
        for gpu in sample.gpus or ():
            self.gauges["gpu"].touch(f"{sample.host} {gpu.name} {gpu.index}").set(moment, gpu.utilisation)
        if sample.groups:
            busy = sum(group.busy for group in sample.groups) / max(0.1, sample.interval)
            self.gauges["busy"].touch(worker.label).set(moment, busy)
        for group in sample.groups:
            self._on_sample(group, moment - sample.interval, moment)
        self.reported = min(
            (one.seen for one in self.workers.values() if one.sample.groups and not one.gone), default=0.0
        )
        self.changes += 1

    def _label(self, sample: WorkerSample) -> str:
        """With its host where there are several: the first process of every container has the same pid."""
        several = any(one.sample.host != sample.host for one in self.workers.values())
        return f"{sample.app} {sample.pid}" + (f" on {sample.host}" if several else "")

    def _on_sample(self, group: GroupSample, since: float, moment: float) -> None:
        name = pair(group.channel, group.group)
        if group.latency:
            self.latency.touch(name).add(moment, group.latency)
        for reason, count in group.batches.items():
            spread(self.sums["released"].touch(f"{name}: {reason}"), since, moment, count)
        for size, count in group.batch_sizes.items():
            spread(self.sums["batches"].touch(f"{name}: {size}+"), since, moment, count)

    def _look_for_gone(self, now: float) -> None:
        """Note who fell silent while others were heard; in an outage nobody is."""
        for name, worker in list(self.workers.items()):
            silent = now - max(worker.seen, self._resumed)
            if silent > FORGOTTEN_AFTER:
                del self.workers[name]
                for known in self.publishes.values():
                    known.pop(name, None)
            elif silent > GONE_AFTER and not worker.gone:
                worker.gone = True
                self.changes += 1

    # -- models and jobs -----------------------------------------------------------------------------------------

    def on_training(self, metrics: TrainingMetrics, moment: float) -> None:
        self.runs.add(metrics.run, metrics.step, metrics.values, moment)
        self.changes += 1

    def on_prediction(self, prediction: Prediction, moment: float) -> None:
        self.version = prediction.version  # which is lower than before after a roll-back
        if prediction.truth is not None:
            right = prediction.label == prediction.truth
            self._verdicts[right] += 1
            self._second_verdicts.setdefault(int(moment), Counter())[right] += 1

    def on_answer(self, answer: Answer, moment: float) -> None:
        ending = ": expired" if answer.expired else ": failed" if answer.error else ""
        self.sums["answers"].touch(f"{answer.model} v{answer.version}{ending}").add(moment, 1)
        self.pictures.on_answer(answer)
        self.changes += 1

    def on_model(self, status: ModelStatus, moment: float) -> None:
        self.models[status.model, status.worker] = (moment, status)
        while len(self.models) > MOST_SERIES:
            del self.models[min(self.models, key=lambda key: self.models[key][0])]
        self.changes += 1

    def on_matmul(self, result: MatmulResult, moment: float) -> None:
        name = f"{result.kernel} on {result.device}"
        self.sums["products"].touch(name).add(moment, 1)
        for kind, value in (("gflops", result.gflops), ("peak", getattr(result, "peak_share", None))):
            if value is not None and math.isfinite(value):
                self.gauges[kind].touch(name).set(moment, value)
        self.changes += 1

    def close_seconds(self, now: float) -> None:
        """Judge the seconds that are over."""
        for second in sorted(second for second in self._second_verdicts if second < int(now) - 1):
            self._recent_verdicts.append(self._second_verdicts.pop(second))
            recent = sum(self._recent_verdicts, Counter[bool]())
            ring = self.gauges["accuracy"]
            ring.touch(RECENT).set(second, recent[True] / recent.total())
            ring.touch(ALL).set(second, self._verdicts[True] / self._verdicts.total())

    @property
    def accuracy(self) -> float | None:
        """Of inference over the last ten seconds that had any."""
        recent = sum(self._recent_verdicts, Counter[bool]())
        return recent[True] / recent.total() if recent else None

    # -- sums ----------------------------------------------------------------------------------------------------

    def total(self, channel: str) -> int:
        """Events ever published on a channel, as the ledger says."""
        known = self.ledger.channels.get(channel) if self.ledger else None
        return known.published if known else 0
