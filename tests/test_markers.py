"""Workers' vitals, and what is made of them: a process that starts, ends, is killed, or is only not heard."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from datetime import UTC, datetime

from dashboards.markers import Marker, Markers
from pipeline import Message, Pipeline
from pipeline.gpu import Gpus
from pipeline.metrics import WorkerSample, metrics_channel

from .workers import Number, Worker, jobs


async def test_a_worker_tells_its_vitals_and_its_last_word_and_a_killed_one_does_not(valkey_url: str) -> None:
    samples: list[WorkerSample] = []
    marks = Markers()
    handlers = {one.channel.name: one.handler for one in marks.subscriptions()}
    async with Pipeline("looker", valkey_url) as app:

        async def watch() -> None:
            async with app.watch(metrics_channel, since=60) as stream:
                async for message in stream:
                    samples.append(message.event)
                    handlers[metrics_channel.name](message)

        watching = asyncio.create_task(watch())
        with Worker("holds", valkey_url) as doomed, Worker("finishes", valkey_url) as orderly:
            await app.publish(jobs, [Number(n=n) for n in range(2)])
            await asyncio.to_thread(doomed.wait_for, "holding")
            await until(lambda: any(s.pid == doomed.pid and s.groups[0].oldest_lease > 1 for s in samples))
            last = [s for s in samples if s.pid == doomed.pid][-1]
            [group] = last.groups
            assert (group.channel, group.group, group.paused) == ("jobs", "g", False)
            assert group.leases >= 1
            assert last.threads > 1
            assert last.files is not None
            assert last.files > 3
            await app.pause("jobs", "g")
            await until(lambda: [s for s in samples if s.pid == orderly.pid][-1].groups[0].paused)
            orderly.signal(signal.SIGTERM)
            assert await asyncio.to_thread(orderly.wait, 15) == 0
            await until(lambda: any(s.pid == orderly.pid and s.last for s in samples))
            doomed.kill()
            await until(lambda: "kill" in kinds(marks), 20)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    assert not any(s.last for s in samples if s.pid == doomed.pid)
    found = {(one.kind, one.subject) for one in marks.since()}
    assert {("start", "holds"), ("start", "finishes"), ("stop", "finishes"), ("kill", "holds")} <= found
    assert ("kill", "finishes") not in found


async def until(true: Callable[[], object], seconds: float = 30) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.05)


def kinds(marks: Markers) -> list[str]:
    return [one.kind for one in marks.since()]


async def test_without_a_driver_there_are_no_gpus_in_reports() -> None:
    gpus = Gpus()
    found = await gpus.read()
    assert found is None or all(0 <= one.utilisation <= 1 and one.memory_used <= one.memory_total for one in found)


class Reports:
    """Reports of processes at times of the test's choosing, as the feed hands them on."""

    def __init__(self) -> None:
        self.marks = Markers()
        self._handle = next(s.handler for s in self.marks.subscriptions() if s.channel is metrics_channel)
        self._number = 0

    def say(self, time: float, pid: int, app: str = "app", **more: object) -> None:
        self._number += 1
        fields = {
            "app": app, "worker": f"{app}-{pid}", "host": "h", "pid": pid, "version": "1", "started": 1000.0,
            "interval": 1.0, "rss": 1, "cpu": 0.0, "published": {}, "dropped": {}, "groups": [], **more,
        }  # fmt: skip
        sample = WorkerSample.model_validate(fields)
        self._handle(
            Message(
                event=sample,
                id=f"s:{self._number}",
                channel="pipeline.metrics",
                source="s",
                time=datetime.fromtimestamp(time, UTC),
                key=None,
                attempt=1,
                headers={},
            )
        )

    def kinds(self) -> list[tuple[str, str]]:
        return [(one.kind, one.text) for one in self.marks.since()]


def test_an_outage_of_redis_kills_nobody() -> None:
    reports = Reports()
    for second in (*range(1001, 1004), *range(1100, 1103)):
        for pid in (1, 2, 3):
            reports.say(second, pid)
    assert reports.kinds() == [("start", "3 × app started")]


def test_a_process_that_falls_silent_alone_was_killed_and_may_come_back() -> None:
    reports = Reports()
    for second in range(1001, 1012):
        reports.say(second, 1)
        if second < 1003:
            reports.say(second + 0.5, 2, "other")
    assert reports.kinds()[-1] == ("kill", "other fell silent")
    assert reports.marks.since()[-1].time == 1002.5
    reports.say(1012, 2, "other")
    assert reports.kinds()[-1] == ("back", "other is heard again")


def test_a_new_version_is_a_deploy_and_a_process_from_before_is_nothing_new() -> None:
    reports = Reports()
    reports.say(5000, 1)
    reports.say(5001, 2, started=5000.5, version="2")
    reports.say(5002, 3, started=5001.5, version="2", app="cli")
    assert reports.kinds() == [("deploy", "app 1 → 2")]


def test_a_process_stops_with_the_last_of_its_apps() -> None:
    reports = Reports()
    reports.say(1001, 1, "trainer")
    reports.say(1002, 1, "metrics")
    reports.say(1003, 1, "metrics", last=True)
    assert reports.kinds() == [("start", "trainer started")]
    reports.say(1004, 1, "trainer", last=True)
    assert reports.kinds()[-1] == ("stop", "trainer stopped")


def test_history_that_is_read_again_is_marked_once() -> None:
    reports = Reports()
    reports.say(1001, 1)
    reports._number = 0
    reports.say(1001, 1)
    assert reports.marks.since() == [Marker(1000.0, "start", "app started", "app")]
