"""What happened, as points in time that every chart may show.

kind     from                what
start    WorkerSample        a process began
deploy   WorkerSample        … with another version of the framework than the last process of its name had
stop     WorkerSample        a process ended in order
kill     WorkerSample        a process fell silent without having said goodbye: killed, or cut off
back     WorkerSample        … and is heard again
swap     ModelStatus         a model is served in another version
refused  ModelStatus         a version was refused
pause    Ledger              a group was paused, by whomever
resume   Ledger              … and goes on
rewind   Ledger              a group reads again what it had handled (added by `State`)
reset    Ledger              a channel is counted anew: the server lost its data (by `State`)
action   audit               rates set, runs started, dead letters replayed or dropped
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pipeline import Channel, Message, catalog
from pipeline.catalog import Action, ModelStatus
from pipeline.ledger import Ledger, ledger_channel
from pipeline.metrics import WorkerSample, metrics_channel

__all__ = ["Kind", "Marker", "Markers", "Subscription", "once"]

Kind = Literal[
    "start", "deploy", "stop", "kill", "back", "swap", "refused", "pause", "resume", "rewind", "reset", "action"
]

MOST = 1000
SILENT = 5.0
"""Seconds of others' reports without one of a process after which it has fallen silent."""
FORGOTTEN = 600.0
UNHEARD = 2.0
"""Seconds without anybody's report: nobody could be heard then, and nobody is blamed for it."""
FRESH = 10.0
"""A process whose first report we see so many seconds after its start was there before we looked."""
TOGETHER = 5.0
"""Seconds within which what happens to several processes of a name is one marker."""
LOOKERS = ("cli", "dashboard")
"""Apps of people who look on."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """A channel to be followed from so many seconds ago (0: from now), and what is to be called with its messages."""

    channel: Channel[Any]
    handler: Callable[[Message[Any]], None]
    since: float


@dataclass(frozen=True, slots=True, order=True)
class Marker:
    time: float
    """Unix seconds."""
    kind: Kind = field(compare=False)
    text: str = field(compare=False)
    subject: str = field(compare=False)
    """The app, model, `channel/group` or whatever it happened to."""
    count: int = field(default=1, compare=False)
    """How many processes it happened to."""


@dataclass(slots=True)
class _Process:
    """(host, pid), with the apps that are open in it."""

    name: str
    apps: set[str]
    heard: float
    """By the clock of `Markers`."""
    time: float
    """Of its last report."""
    silent: bool = False


class Markers:
    """All markers, the oldest first; `version` changes with each change."""

    def __init__(self) -> None:
        self.version = 0
        self._markers: list[Marker] = []
        self._processes: dict[tuple[str, int], _Process] = {}
        self._versions: dict[str, str] = {}
        self._served: dict[str, int] = {}
        self._paused: dict[tuple[str, str], bool] = {}
        self._clock = 0.0
        """Seconds in which anybody was heard."""
        self._last = 0.0

    def subscriptions(self) -> list[Subscription]:
        return [
            Subscription(metrics_channel, once(self._on_worker), metrics_channel.keep),
            Subscription(ledger_channel, once(self._on_ledger), ledger_channel.keep),
            Subscription(catalog.model_status, once(self._on_status), catalog.model_status.keep),
            Subscription(catalog.audit, once(self._on_action), catalog.audit.keep),
        ]

    def since(self, time: float = 0.0) -> list[Marker]:
        return [marker for marker in self._markers if marker.time >= time]

    def add(self, time: float, kind: Kind, text: str, subject: str) -> None:
        """Note what happened to `subject` at a time."""
        insort(self._markers, Marker(time, kind, text, subject))
        del self._markers[:-MOST]
        self.version += 1

    def _add_process(self, time: float, kind: Kind, text: str, name: str) -> None:
        """Several processes of a name to which the same happens together are one marker."""
        for index in range(len(self._markers) - 1, -1, -1):
            other = self._markers[index]
            if abs(other.time - time) < TOGETHER and (other.kind, other.subject) == (kind, name):
                count = other.count + 1
                self._markers[index] = replace(other, count=count, text=f"{count} × {text}")
                self.version += 1
                return
        self.add(time, kind, text, name)

    # -- processes -----------------------------------------------------------------------------------------------

    def _on_worker(self, message: Message[WorkerSample]) -> None:
        sample, time = message.event, message.time.timestamp()
        if self._last and 0 < time - self._last < UNHEARD:
            self._clock += time - self._last
        self._last = max(self._last, time)
        if sample.app not in LOOKERS:
            self._follow(sample, time)
        for key, process in list(self._processes.items()):
            if self._clock - process.heard > FORGOTTEN:
                del self._processes[key]
            elif not process.silent and self._clock - process.heard > SILENT:
                process.silent = True
                self._add_process(process.time, "kill", f"{process.name} fell silent", process.name)

    def _follow(self, sample: WorkerSample, time: float) -> None:
        key = (sample.host, sample.pid)
        process = self._processes.get(key)
        if process is None:
            if sample.last:
                return
            process = self._processes[key] = _Process(sample.app, set(), self._clock, time)
            self._begin(sample, time)
        if process.silent:
            process.silent = False
            self._add_process(time, "back", f"{process.name} is heard again", process.name)
        process.heard, process.time = self._clock, time
        process.apps.add(sample.worker)
        if sample.last:
            process.apps.discard(sample.worker)
            if not process.apps:
                del self._processes[key]
                self._add_process(time, "stop", f"{process.name} stopped", process.name)

    def _begin(self, sample: WorkerSample, time: float) -> None:
        before, self._versions[sample.app] = self._versions.get(sample.app), sample.version
        if before not in (None, sample.version):
            self._add_process(sample.started, "deploy", f"{sample.app} {before} → {sample.version}", sample.app)
        elif time - sample.started < FRESH:
            self._add_process(sample.started, "start", f"{sample.app} started", sample.app)

    # -- models, groups, people ----------------------------------------------------------------------------------

    def _on_status(self, message: Message[ModelStatus]) -> None:
        status, time = message.event, message.time.timestamp()
        if status.state == "refused":
            text = f"{status.model}: version {status.version} refused"
            if not any(one.text == text and abs(one.time - time) < TOGETHER for one in self._markers):
                self.add(time, "refused", text, status.model)
            return
        before = self._served.get(status.model)
        if (
            status.load or before is None
        ):  # one that starts anew says what it begins with, and soon what the others serve
            self._served[status.model] = status.version
            if before not in (None, status.version):
                self.add(time, "swap", f"{status.model} v{before} → v{status.version}", status.model)

    def _on_ledger(self, message: Message[Ledger]) -> None:
        for name, channel in message.event.channels.items():
            for group, counts in channel.groups.items():
                before = self._paused.get((name, group), counts.paused)
                self._paused[name, group] = counts.paused
                if before != counts.paused:
                    kind: Kind = "pause" if counts.paused else "resume"
                    text = f"{group} of {name} {'paused' if counts.paused else 'goes on'}"
                    self.add(message.event.time, kind, text, f"{name}/{group}")

    def _on_action(self, message: Message[Action]) -> None:
        action = message.event
        if action.outcome == "done" and action.action in ("set-rate", "start-run", "replay", "drop"):
            self.add(message.time.timestamp(), "action", f"{action.subject}: {action.detail}", action.subject)


def once(handler: Callable[[Message[Any]], None]) -> Callable[[Message[Any]], None]:
    """Leaves out what was seen before: a feed that had to begin again reads its history again."""
    seen: dict[str, int] = {}

    def handle(message: Message[Any]) -> None:
        number = int(message.id.rpartition(":")[2])
        if number > seen.get(message.source, 0):
            seen[message.source] = number
            handler(message)

    return handle
