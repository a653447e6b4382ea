"""Any sequence of publishes, reads, commits, lapsed leases, retries, replays and rewinds leaves a ledger that balances.

The machine knows only what must be so: an event is settled by at most one commit, a commit that is refused has changed
nothing, and every count is what the settled events say. Leases lapse whenever they like: no rule depends on time.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pipeline import Channel
from pipeline.ledger import GroupLedger
from pipeline.transports import Commit, Entry, Group, GroupStats, Outgoing, Retried, Segment
from pipeline.transports.memory import MemoryBackend
from pipeline.transports.redis import RedisBackend

LEASE = 0.05
CHANNEL = Channel("c", bytes)
CONSUMERS = ["a", "b"]
GROUPS = ["g", "h"]

_runs = itertools.count()


class _Group:
    """What must be so of one group."""

    def __init__(self, before: int) -> None:
        self.before = before
        self.handled: set[int] = set()
        self.dead: set[int] = set()
        self.letters: list[tuple[str, int, int]] = []
        """(letter, event, origin)"""


class LedgerMachine(RuleBasedStateMachine):
    url: str

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        if self.url == "memory":
            self.backend: Any = MemoryBackend.at(f"memory://machine-{next(_runs)}")
        else:
            with redis.Redis.from_url(self.url) as client:
                client.flushall()
            self.backend = RedisBackend(self.url, "machine")
        self.runner.run(self.backend.open(1.0))
        self.frames: list[tuple[int, int]] = []
        self.ids: dict[int, str] = {}
        self.readers: dict[tuple[str, str], Any] = {}
        self.groups: dict[str, _Group] = {}
        self.held: list[tuple[str, str, Entry]] = []
        self.letters = itertools.count()

    def teardown(self) -> None:
        async def close() -> None:
            for reader in self.readers.values():
                await reader.close()
            await self.backend.close()

        self.runner.run(close())
        self.runner.close()

    @property
    def published(self) -> int:
        return sum(count for _, count in self.frames)

    def events(self, entry: Entry) -> list[int]:
        """Events are known by their offsets, which is what the bodies hold."""
        return [int(text) for text in entry.body.split()]

    # -- what may happen -----------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 4))
    def publish(self, count: int) -> None:
        first = self.published + 1
        self.frames.append((first, count))
        self._send(first, count)

    @precondition(lambda self: self.frames)
    @rule()
    def publish_again(self) -> None:
        self._send(*self.frames[-1])

    def _send(self, first: int, count: int) -> None:
        body = b" ".join(b"%d" % event for event in range(first, first + count))
        self.runner.run(self.backend.durable.publish(CHANNEL, 0, [Outgoing(body, count, "s", first)]))

    @rule(
        group=st.sampled_from(GROUPS), consumer=st.sampled_from(CONSUMERS), start=st.sampled_from(["oldest", "latest"])
    )
    def join(self, group: str, consumer: str, start: Any) -> None:
        if (group, consumer) in self.readers:
            return
        joining = self.backend.durable.join(CHANNEL, 0, Group(group, consumer, LEASE, start))
        self.readers[group, consumer] = self.runner.run(joining)
        self.groups.setdefault(group, _Group(self.published if start == "latest" else 0))

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), most=st.integers(1, 3))
    def read(self, data: st.DataObject, most: int) -> None:
        group, consumer = data.draw(st.sampled_from(sorted(self.readers)))
        for entry in self.runner.run(self.readers[group, consumer].read(most, 0.0)):
            self.held.append((group, consumer, entry))
            self.ids[entry.origin] = entry.id if not entry.apart else self.ids.get(entry.origin, "")

    @precondition(lambda self: self.held)
    @rule(data=st.data(), outcome=st.sampled_from(["handled", "dead", "retry"]))
    def commit(self, data: st.DataObject, outcome: str) -> None:
        group, consumer, entry = held = data.draw(st.sampled_from(self.held))
        events, known = self.events(entry), self.groups[group]
        done = entry.done or "0" * len(events)
        low = data.draw(st.sampled_from([i for i, mark in enumerate(done) if mark == "0"]))
        high = low
        while high + 1 < len(done) and done[high + 1] == "0" and data.draw(st.booleans()):
            high += 1
        chosen = events[low : high + 1]
        commit = Commit([Segment(entry.id, entry.count, low, high)])
        if outcome == "retry":
            commit.retried = len(chosen)
            commit.retries = [Retried(0.0, b"%d" % event, origin=entry.origin) for event in chosen]
        else:
            setattr(commit, outcome, len(chosen))
        refused = self.runner.run(self.readers[group, consumer].commit(commit))
        if refused:
            self.held.remove(held)
            return
        assert not known.handled & set(chosen), "settled twice"
        assert not known.dead & set(chosen), "settled twice"
        entry.done = done[:low] + "1" * len(chosen) + done[high + 1 :]
        if "0" not in entry.done:
            self.held.remove(held)
            self.readers[group, consumer].settled(entry.id)
        if outcome == "handled":
            known.handled.update(chosen)
        elif outcome == "dead":
            known.dead.update(chosen)
            known.letters += [(f"letter:{next(self.letters)}", event, entry.origin) for event in chosen]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def hand_back(self, data: st.DataObject) -> None:
        group, consumer, entry = held = data.draw(st.sampled_from(self.held))
        self.runner.run(self.readers[group, consumer].release([entry.id]))
        self.held.remove(held)

    @precondition(lambda self: self.held)
    @rule()
    def stall(self) -> None:
        """Every lease ends; whoever held anything may still come late."""
        if isinstance(self.backend, MemoryBackend):
            self.backend.store.expire_leases()
            return
        for reader in self.readers.values():
            self.backend._streams.renewer.discard(reader)
        self.runner.run(asyncio.sleep(LEASE * 1.2))

    @precondition(lambda self: any(group.letters for group in self.groups.values()))
    @rule(data=st.data(), replay=st.booleans())
    def settle_letter(self, data: st.DataObject, replay: bool) -> None:
        group = data.draw(st.sampled_from(sorted(name for name, one in self.groups.items() if one.letters)))
        known = self.groups[group]
        letter, event, origin = data.draw(st.sampled_from(known.letters))
        known.letters.remove((letter, event, origin))
        again = Retried(0.0, b"%d" % event, origin=origin) if replay else None
        settled = self.runner.run(self.backend.settle_letter("c", 0, group, letter, again, 60.0))
        assert settled
        if replay:
            known.dead.discard(event)
        assert not self.runner.run(self.backend.settle_letter("c", 0, group, letter, again, 60.0))

    @precondition(lambda self: self.ids and self.groups)
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        """To after some frame that was read: what came later is unread, whatever had become of it."""
        group = data.draw(st.sampled_from(sorted(self.groups)))
        to = data.draw(st.sampled_from(sorted(self.ids)))
        known = self.groups[group]
        if not self.ids[to] or to < known.before:
            return
        _, found = self.runner.run(self.backend.ledger({"c": (True, 1)}))
        lag = found["c"][0].groups[group].lag
        unread = self.runner.run(self.backend.rewind("c", 0, group, self.ids[to]))
        assert unread == max(lag, self.published - to), "never forwards"
        known.handled = {event for event in known.handled if event <= to}
        known.dead = {event for event in known.dead if event <= to}
        known.letters = [letter for letter in known.letters if letter[2] <= to]

    # -- what must be so -----------------------------------------------------------------------------------------

    @invariant()
    def every_ledger_balances(self) -> None:
        _, found = self.runner.run(self.backend.ledger({"c": (True, 1)}))
        assert found["c"][0].published == self.published
        for name, one in found["c"][0].groups.items():
            self._balances(one, self.groups[name])

    def _balances(self, one: GroupStats, known: _Group) -> None:
        assert min(one.handled, one.dead, one.pending, one.lag) >= 0, one
        assert one.before == known.before
        assert one.handled + one.dead == len(known.handled) + len(known.dead), one
        ledger = GroupLedger(before=one.before, handled=one.handled, dead=one.dead, pending=one.pending, lag=one.lag)
        assert ledger.difference(self.published) == 0, one


@pytest.mark.parametrize("where", ["memory", "valkey", "redis7"])
def test_whatever_happens_the_ledger_balances(where: str, request: pytest.FixtureRequest) -> None:
    class Machine(LedgerMachine):
        url = "memory" if where == "memory" else request.getfixturevalue(where).url

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=60 if where == "memory" else 15,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
