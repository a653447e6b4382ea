"""What a person should look at now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal
from urllib.parse import urlencode

from pipeline.deadletters import internal
from pipeline.ledger import GroupLedger

from .state import State, pair

__all__ = ["Alert", "alerts"]

RECENT = 300.0
"""Seconds for which a thing that happened is told."""
OLD = 600.0
"""Seconds that an event may be held before somebody should ask why."""
LONG = 30.0
"""Seconds of work that may wait."""


@dataclass(frozen=True, slots=True)
class Alert:
    level: Literal["bad", "warn"]
    text: str
    link: str


def alerts(state: State, now: float) -> list[dict[str, Any]]:
    """The worst first."""
    found = [*_of_groups(state, now), *_of_workers(state, now)]
    return [asdict(alert) for alert in sorted(found, key=lambda alert: alert.level != "bad")]


def _of_groups(state: State, now: float) -> Iterator[Alert]:
    for channel, one in (state.ledger.channels if state.ledger else {}).items():
        if internal(channel) or not one.durable:
            continue
        link = "/channels?" + urlencode({"channel": channel})
        for group, counts in one.groups.items():
            name = pair(channel, group)
            if off := counts.difference(one.published):
                yield Alert("bad", f"{name}: the ledger is off by {off:+,}", link)
            risen = state.group_seen.get(name)
            if risen is not None and now - risen < RECENT:
                yield Alert(
                    "bad",
                    f"{name}: new dead letters ({counts.dead:,} in all)",
                    "/dead?" + urlencode({"channel": channel}),
                )
            yield from _of_queue(state, name, counts, link)


def _of_queue(state: State, name: str, counts: GroupLedger, link: str) -> Iterator[Alert]:
    waiting = counts.lag + counts.pending
    if counts.paused:
        yield Alert("warn", f"{name} is paused; {waiting:,} events wait", link)
    elif waiting and not counts.consumers:
        yield Alert("bad", f"{name}: {waiting:,} events wait and no worker is there", link)
    elif counts.oldest > OLD:
        yield Alert("warn", f"{name}: an event has been held for {counts.oldest:,.0f} s", link)
    elif counts.lag > 1000 and counts.drain_seconds and counts.drain_seconds > LONG:
        yield Alert("warn", f"{name}: {counts.lag:,} events unread, {counts.drain_seconds:,.0f} s of work", link)


def _of_workers(state: State, now: float) -> Iterator[Alert]:
    silent = [one for one in state.workers.values() if one.gone and not one.sample.last and now - one.seen < RECENT]
    if len(silent) > 2:
        names = ", ".join(sorted({worker.sample.app for worker in silent}))
        yield Alert("warn", f"{len(silent)} processes fell silent: {names}", "/workers")
    else:
        for worker in silent:
            yield Alert(
                "warn", f"{worker.sample.app} {worker.sample.pid} on {worker.sample.host} fell silent", "/workers"
            )
    for marker in state.happened.since(now - RECENT):
        if marker.kind == "refused":
            yield Alert("warn", marker.text, "/serving")
