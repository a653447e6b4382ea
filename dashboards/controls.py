"""What can be acted on, as its events tell: publishers and their rates, models and their versions, runs, the audit."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pipeline import Message, catalog
from pipeline.catalog import Action, LoadModel, ModelStatus, PublisherRate, RunStatus, StartRun
from pipeline.metrics import WorkerSample, metrics_channel

from .markers import Subscription, once

__all__ = ["Controls", "Version"]

GONE = 5.0
"""Seconds of others' reports without one of a process after which its rates and models are not shown."""
ANNOUNCED = 75.0
"""Seconds for which a publisher's announcement counts; it repeats it every 30."""
MOST_ACTIONS = 2000
MOST_RUNS = 500
MOST_LOADS = 200


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a model, and what to load to have it."""

    version: int
    source: str
    """As in LoadModel."""
    time: float
    """Unix seconds, of the load or of the first worker's start."""


@dataclass(slots=True)
class _Model:
    started: Version | None = None
    """What workers begin with."""
    loads: dict[str, Version] = field(default_factory=dict)
    """Id of the LoadModel event → what it asked for, in order."""
    accepted: set[str] = field(default_factory=set)
    """Ids of loads that a worker serves, or served."""
    workers: dict[str, tuple[float, ModelStatus]] = field(default_factory=dict)
    """When it spoke last, and what it said."""
    current: ModelStatus | None = None
    """The newest status of a worker that serves."""

    def history(self) -> list[Version]:
        """What was served, the oldest first."""
        loads = [version for id_, version in self.loads.items() if id_ in self.accepted]
        return [*([self.started] if self.started else []), *loads]

    def previous(self) -> Version | None:
        """What was served before what is served now."""
        history = self.history()
        if not history:
            return None
        now = history[-1]
        others = [one for one in history if (one.version, one.source) != (now.version, now.source)]
        return others[-1] if others else None


class Controls:
    """Fed by `subscriptions`, read by the endpoints."""

    def __init__(self) -> None:
        self._samples: dict[str, float] = {}
        """Worker → time of its last report; so long ago that it is gone, once it has stopped in order."""
        self._heard = 0.0
        self._rates: dict[str, dict[str, tuple[float, PublisherRate]]] = {}
        self._models: dict[str, _Model] = {}
        self._runs: dict[str, tuple[float, StartRun]] = {}
        self._run_states: dict[str, RunStatus] = {}
        self._actions: deque[tuple[str, float, Action]] = deque(maxlen=MOST_ACTIONS)

    def subscriptions(self) -> list[Subscription]:
        return [
            Subscription(channel, once(handler), channel.keep)
            for channel, handler in (
                (metrics_channel, self._on_worker),
                (catalog.publisher_rates, self._on_rate),
                (catalog.model_loads, self._on_load),
                (catalog.model_status, self._on_status),
                (catalog.run_starts, self._on_start),
                (catalog.run_statuses, self._on_run),
                (catalog.audit, self._on_action),
            )
        ]

    # -- events in -----------------------------------------------------------------------------------------------

    def _on_worker(self, message: Message[WorkerSample]) -> None:
        sample, time = message.event, message.time.timestamp()
        self._heard = max(self._heard, time)
        self._samples[sample.worker] = time - 2 * GONE if sample.last else time
        for worker in [worker for worker, seen in self._samples.items() if self._heard - seen > 100 * GONE]:
            if worker != sample.worker:
                del self._samples[worker]

    def _on_rate(self, message: Message[PublisherRate]) -> None:
        event, time = message.event, message.time.timestamp()
        workers = self._rates.setdefault(event.publisher, {})
        workers[event.worker] = (time, event)
        for worker in [worker for worker, (seen, _) in workers.items() if time - seen > ANNOUNCED]:
            del workers[worker]

    def _on_load(self, message: Message[LoadModel]) -> None:
        load = message.event
        loads = self._models.setdefault(load.model, _Model()).loads
        loads[message.id] = Version(load.version, load.source, message.time.timestamp())
        for id_ in list(loads)[:-MOST_LOADS]:
            del loads[id_]

    def _on_status(self, message: Message[ModelStatus]) -> None:
        status = message.event
        model = self._models.setdefault(status.model, _Model())
        model.workers[status.worker] = message.time.timestamp(), status
        if status.state != "serving":
            return
        model.current = status
        if status.load:
            model.accepted.add(status.load)
        elif model.started is None or model.started.version != status.version:
            model.started = Version(status.version, "", message.time.timestamp())

    def _on_start(self, message: Message[StartRun]) -> None:
        self._runs[message.id] = (message.time.timestamp(), message.event)
        for id_ in list(self._runs)[:-MOST_RUNS]:
            del self._runs[id_]
            self._run_states.pop(id_, None)

    def _on_run(self, message: Message[RunStatus]) -> None:
        self._run_states[message.event.request] = message.event

    def _on_action(self, message: Message[Action]) -> None:
        self._actions.append((message.id, message.time.timestamp(), message.event))

    # -- read ----------------------------------------------------------------------------------------------------

    def _lives(self, worker: str, since: float) -> bool:
        """Who has not reported yet may only just have begun. `since`: when it was heard of otherwise."""
        return self._heard - self._samples.get(worker, since) <= GONE

    def publishers(self) -> dict[str, dict[str, Any]]:
        """As GET /api/publishers answers."""
        found = {}
        for name, announced in sorted(self._rates.items()):
            newest = max((seen for seen, _ in announced.values()), default=0.0)
            living = [
                event
                for seen, event in announced.values()
                if self._lives(event.worker, self._heard) and max(newest, self._heard) - seen <= ANNOUNCED
            ]
            if living:
                found[name] = {
                    "rate": living[-1].rate,
                    "initial": living[-1].initial,
                    "workers": {one.worker: one.model_dump(include={"rate", "initial"}) for one in living},
                }
        return found

    def models(self) -> dict[str, dict[str, Any]]:
        """As GET /api/models answers: models that a worker serves."""
        return {name: self._model(model) for name, model in sorted(self._models.items()) if self._served(model)}

    def _served(self, model: _Model) -> bool:
        return any(self._lives(worker, since) for worker, (since, _) in model.workers.items())

    def _model(self, model: _Model) -> dict[str, Any]:
        previous, history = model.previous(), model.history()
        return {
            "version": model.current.version if model.current else None,
            "source": history[-1].source if history else "",
            "workers": {
                worker: status.model_dump(include={"version", "state", "reason"})
                for worker, (since, status) in model.workers.items()
                if self._lives(worker, since)
            },
            "history": [{"version": one.version, "source": one.source, "time": one.time} for one in history],
            "previous": {"version": previous.version, "source": previous.source} if previous else None,
        }

    def previous(self, model: str) -> Version | None:
        """Where a roll-back of the model goes."""
        found = self._models.get(model)
        return found.previous() if found else None

    def runs(self) -> list[dict[str, Any]]:
        """As GET /api/runs answers."""
        found = []
        for id_, (time, plan) in reversed(self._runs.items()):
            status = self._run_states.get(id_)
            state = {"state": status.state if status else "waiting", "reason": status.reason if status else ""}
            found.append({"run": plan.run, "id": id_, "time": time, **state, "plan": plan.model_dump(mode="json")})
        return found

    def actions(self, since: float, most: int) -> list[dict[str, Any]]:
        """As GET /api/audit answers: those after a Unix time."""
        chosen = [one for one in reversed(self._actions) if one[1] >= since][:most]
        return [{"id": id_, "time": time, **action.model_dump(mode="json")} for id_, time, action in chosen]
