"""Durable channels as a user sees them: what is handled, retried, buried, answered, ordered and replayed."""

from __future__ import annotations

import asyncio
import functools
import math
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from pydantic import field_serializer

from pipeline import (
    Batch,
    Channel,
    ChannelFull,
    Event,
    EventTypeError,
    Message,
    Pipeline,
    Reject,
    RequestFailed,
    RequestTimeout,
    Retry,
    RetryPolicy,
    Tensor,
    publishing,
    router,
)
from pipeline.deadletters import describe
from pipeline.errors import (
    ChannelConflict,
    ConfigurationError,
    HandlerError,
    PipelineError,
    PublishUncertain,
    ServerUnavailable,
)
from pipeline.executors import RunIn
from pipeline.metrics import WorkerSample
from pipeline.server import Server
from pipeline.testing import first
from pipeline.transports import Commit, Group, Segment
from pipeline.transports.redis import RedisBackend
from pipeline.transports.scripts import Keys
from pipeline.watching import Watch

from .apps import idle, serving, until
from .processes import line_with
from .programs import finished, program


class Number(Event):
    n: int


class Square(Event):
    n: int
    squared: int


class Window(Event):
    values: Tensor


numbers = Channel("numbers", Number, reply=Square)
squares = Channel("squares", Square)
QUICK = RetryPolicy(attempts=3, base=0.01, cap=0.05)


async def test_events_are_handled_once_each_and_outputs_follow(anywhere: str) -> None:
    app, seen = Pipeline("app", anywhere), []

    @app.subscriber(numbers, group="square", publishes=squares)
    async def square(event: Number) -> Square | None:
        seen.append(event.n)
        return Square(n=event.n, squared=event.n**2) if event.n % 2 else None

    async with app, serving(app):
        receipt = await app.publish(numbers, [Number(n=n) for n in range(1000)], key="k", headers={"trace": "t"})
        assert (len(receipt.ids), receipt.id, receipt.ids[999]) == (1000, f"{app.source}:1", f"{app.source}:1000")
        ledger = await idle(app, "numbers")
        assert seen == list(range(1000))
        assert (ledger.published, ledger.groups["square"].handled) == (1000, 1000)
        async with app.watch(squares, since="1m") as stream:
            outputs = [await anext(aiter(stream)) for _ in range(500)]
    assert [message.event.squared for message in outputs] == [n * n for n in range(1, 1000, 2)]
    assert len({message.id for message in outputs}) == 500
    assert {message.key for message in outputs} == {"k"}


async def test_an_app_that_is_opened_again_and_channels_declared_twice_lose_nothing(anywhere: str) -> None:
    """Ids would repeat, and what seems to repeat is dropped."""
    app = Pipeline("app", anywhere)
    async with Pipeline("reader", anywhere) as reader:
        ids = []
        for n in range(3):
            async with app:
                for channel in (numbers, Channel("numbers", Number, reply=Square)):
                    ids += (await app.publish(channel, Number(n=n))).ids
        ledger = (await reader.stats()).channels["numbers"]
    assert (ledger.published, ledger.duplicates) == (6, 0)
    assert len(set(ids)) == 6


def test_forked_processes_are_publishers_of_their_own(valkey_url: str) -> None:
    forks = (
        "import os\nfrom tests.test_delivery import Number, Pipeline, numbers\napp = Pipeline('app')\n"
        "for n in range(3):\n    if os.fork() == 0:\n        with app.blocking() as pipe:\n"
        "            pipe.publish(numbers, Number(n=n))\n        os._exit(0)\n"
        "for _ in range(3):\n    assert os.wait()[1] == 0\n"
    )
    assert finished("-c", forks, url=valkey_url).returncode == 0
    with Pipeline("reader", valkey_url).blocking() as pipe:
        assert pipe.stats().channels["numbers"].published == 3


async def test_a_message_shows_its_envelope(anywhere: str) -> None:
    app, seen = Pipeline("app", anywhere), []

    @app.subscriber(numbers, group="g")
    async def look(message: Message[Number]) -> None:
        seen.append(message)

    async with app, serving(app):
        before = datetime.now(UTC)
        receipt = await app.publish(numbers, Number(n=7), key="a", headers={"user": "eve"})
        await idle(app, "numbers")
    (message,) = seen
    assert (message.id, message.channel, message.source) == (receipt.id, "numbers", app.source)
    assert (message.event, message.key, message.attempt, message.headers) == (Number(n=7), "a", 1, {"user": "eve"})
    assert before - timedelta(seconds=1) < message.time < datetime.now(UTC)


async def test_outputs_carry_the_trace_of_what_they_were_made_from(anywhere: str) -> None:
    app = Pipeline("app", anywhere)
    others = Channel("others", Number)
    traced = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b", "own": "x"}

    @app.subscriber(numbers, group="g", publishes=squares)
    async def square(event: Number) -> list[Square]:
        if event.n == 1:
            raise Retry(delay=0)
        return [Square(n=event.n, squared=event.n**2)] * 2

    @app.subscriber(others, group="g", publishes=squares)
    async def once(message: Message[Number]) -> Square | None:
        if message.attempt == 1:
            raise Retry(delay=0)
        return Square(n=message.event.n, squared=-1)

    async with app, serving(app), app.watch(squares) as stream:
        await app.publish(numbers, [Number(n=2), Number(n=3)], headers=traced)
        await app.publish(numbers, Number(n=4))
        await app.publish(others, Number(n=5), headers=traced)
        messages = [await first(stream) for _ in range(7)]
    trace = {name: traced[name] for name in ("traceparent", "tracestate")}
    assert {(message.event.n, message.headers == trace) for message in messages} == {
        (2, True), (3, True), (4, False), (5, True)
    }  # fmt: skip


@pytest.mark.parametrize("run_in", ["loop", "thread"])
async def test_every_group_receives_everything_and_consumers_share_it(anywhere: str, run_in: Any) -> None:
    seen: dict[str, list[int]] = {"one": [], "two": []}
    apps = [Pipeline(f"app{n}", anywhere) for n in range(3)]
    for app, group in zip(apps, ("one", "one", "two"), strict=True):

        @app.subscriber(Channel("numbers", Number, frame=4), group=group, run_in=run_in, concurrency=2)
        def count(event: Number, group: str = group) -> None:
            seen[group].append(event.n)

    async with apps[0], serving(*apps):
        await apps[0].publish(Channel("numbers", Number, frame=4), [Number(n=n) for n in range(400)])
        await idle(apps[0], "numbers")
    assert sorted(seen["one"]) == sorted(seen["two"]) == list(range(400))


async def test_a_retry_keeps_its_id_and_counts_attempts(anywhere: str) -> None:
    app, seen = Pipeline("app", anywhere), []

    @app.subscriber(numbers, group="g", retry=QUICK)
    async def flaky(message: Message[Number]) -> None:
        seen.append((message.event.n, message.attempt, message.id))
        if message.event.n == 5 and message.attempt == 1:
            raise Retry(delay=0.05)
        if message.event.n == 6 and message.attempt < 3:
            raise OSError("not yet")

    async with app, serving(app):
        receipt = await app.publish(numbers, [Number(n=n) for n in range(10)])
        ledger = await idle(app, "numbers")
    assert [attempt for n, attempt, _ in seen if n == 5] == [1, 2]
    assert [attempt for n, attempt, _ in seen if n == 6] == [1, 2, 3]
    assert {id_ for n, _, id_ in seen if n == 6} == {receipt.ids[6]}
    group = ledger.groups["g"]
    assert (ledger.published, group.handled, group.retried, group.dead) == (10, 10, 3, 0)


async def test_what_is_rejected_or_keeps_failing_becomes_a_dead_letter_that_can_be_replayed_once(anywhere: str) -> None:
    app, broken, handled = Pipeline("app", anywhere), True, []

    @app.subscriber(numbers, group="g", retry=QUICK)
    async def picky(event: Number) -> None:
        if event.n == 3:
            raise Reject("three is unlucky")
        if event.n == 4 and broken:
            raise ZeroDivisionError("the divisor is missing")
        handled.append(event.n)

    async with app, serving(app):
        receipt = await app.publish(numbers, [Number(n=n) for n in range(6)], key="k")
        ledger = await idle(app, "numbers")
        assert (ledger.groups["g"].handled, ledger.groups["g"].dead) == (4, 2)
        letters = {letter.event.event_id: letter for letter in await app.dead_letters("numbers")}
        three, four = letters[receipt.ids[3]].event, letters[receipt.ids[4]].event
        assert (three.reason, three.attempts, three.group, three.key) == ("three is unlucky", 1, "g", "k")
        assert (four.reason, four.attempts) == ("ZeroDivisionError: the divisor is missing", 3)
        assert "raise ZeroDivisionError" in four.traceback

        broken = False
        assert await app.settle_dead([letters[receipt.ids[4]]], replay=True) == 1
        assert await app.settle_dead([letters[receipt.ids[4]]], replay=True) == 0, "a second replay must do nothing"
        ledger = await idle(app, "numbers")
        assert (ledger.groups["g"].handled, ledger.groups["g"].dead, ledger.published) == (5, 1, 6)
        assert handled.count(4) == 1
        assert await app.settle_dead(await app.dead_letters("numbers"), replay=False) == 1
        assert await app.dead_letters("numbers") == []
        assert (await idle(app, "numbers")).groups["g"].dead == 1, "a dropped letter stays counted as dead"


async def test_a_poison_event_in_a_batch_is_found_by_halving_and_the_others_are_handled(anywhere: str) -> None:
    app, calls, handled = Pipeline("app", anywhere), 0, []

    @app.subscriber(numbers, group="g", batch=Batch(256, wait=0.5), retry=RetryPolicy(attempts=1))
    def work(batch: list[Number]) -> None:
        nonlocal calls
        calls += 1
        if any(event.n == 77 for event in batch):
            raise ValueError("seventy-seven")
        handled.extend(event.n for event in batch)

    async with app, serving(app):
        await app.publish(numbers, [Number(n=n) for n in range(256)])
        ledger = await idle(app, "numbers")
        (letter,) = await app.dead_letters("numbers")
    assert sorted(handled) == [n for n in range(256) if n != 77]
    assert (ledger.groups["g"].handled, ledger.groups["g"].dead) == (255, 1)
    assert "seventy-seven" in letter.event.traceback
    assert calls <= 1 + 16


async def test_a_batch_answers_slot_by_slot(anywhere: str) -> None:
    app = Pipeline("app", anywhere)
    attempts: dict[int, int] = {}

    @app.subscriber(numbers, group="g", batch=Batch(8), publishes=squares, retry=QUICK)
    def work(batch: list[Message[Number]]) -> list[Any]:
        out: list[Any] = []
        for message in batch:
            n = message.event.n
            attempts[n] = message.attempt
            first = message.attempt == 1
            out.append(
                Retry(delay=0.01)
                if n == 1 and first
                else Reject("no")
                if n == 2
                else [Square(n=n, squared=0)] * (n % 3)
            )
        return out

    async with app, serving(app):
        await app.publish(numbers, [Number(n=n) for n in range(8)])
        ledger = await idle(app, "numbers")
        outputs = (await app.stats()).channels["squares"].published
    assert (ledger.groups["g"].handled, ledger.groups["g"].dead, ledger.groups["g"].retried) == (7, 1, 1)
    assert attempts[1] == 2
    assert outputs == sum(n % 3 for n in range(8) if n != 2)


async def test_a_batch_result_of_the_wrong_length_is_an_error_that_says_so(anywhere: str) -> None:
    app = Pipeline("app", anywhere)

    @app.subscriber(numbers, group="g", batch=Batch(4), retry=RetryPolicy(attempts=1))
    def work(batch: list[Number]) -> list[None]:
        return [None] * (len(batch) + 1)

    async with app, serving(app):
        await app.publish(numbers, [Number(n=n) for n in range(4)])
        await idle(app, "numbers")
        letters = await app.dead_letters("numbers")
    assert len(letters) == 4
    assert "the batch had 4 events and the handler returned 5 results" in letters[0].event.reason


async def test_a_batch_may_come_as_columns(anywhere: str) -> None:
    class Sample(Event):
        n: int
        level: float
        good: bool
        name: str
        window: Tensor

    app, samples, seen = Pipeline("app", anywhere), Channel("samples", Sample), []

    @app.subscriber(samples, group="g", publishes=numbers, batch=Batch(4, wait=1.0, as_="columns"), retry=QUICK)
    def work(batch: dict[str, Any]) -> list[Number | None]:
        seen.append(batch)
        if "poison" in batch["name"]:
            raise ValueError("poison")
        return [Number(n=n) if n % 2 else None for n in (batch["n"] + (batch["level"] > 1)).tolist()]

    async with app, serving(app), app.watch(numbers) as stream:
        many = [Sample(n=n, level=n, good=n > 1, name=str(n), window=Tensor([n])) for n in range(4)]
        await app.publish(samples, many)
        assert [(await first(stream)).event.n for _ in range(2)] == [1, 3]
        await app.publish(samples, [*many[:2], many[2].model_copy(update={"name": "poison"}), many[3]])
        ledger = (await idle(app, "samples")).groups["g"]
    assert (ledger.handled, ledger.dead) == (7, 1)
    batch = seen[0]
    assert [(name, getattr(batch[name], "dtype", None)) for name in batch] == [
        ("n", np.int64), ("level", np.float64), ("good", np.bool_), ("name", None), ("window", None)
    ]  # fmt: skip
    assert batch["level"].tolist() == [0, 1, 2, 3]
    assert batch["window"][3] == Tensor([3])
    with pytest.raises(ConfigurationError, match="leave batch= out"):
        app.subscriber(numbers, group="h", batch=Batch(2), ordered=True)(print)
    with pytest.raises(ConfigurationError, match="columns are the fields of Events"):
        app.subscriber(Channel("texts", str), group="g", batch=Batch(4, as_="columns"))(work)


async def test_batches_say_why_they_were_released(anywhere: str) -> None:
    app = Pipeline("app", anywhere)
    sizes = []

    @app.subscriber(numbers, group="g", batch=Batch(10, wait=0.05))
    async def work(batch: list[Number]) -> None:
        sizes.append(len(batch))

    async with app, serving(app):
        await app.publish(numbers, [Number(n=n) for n in range(24)])
        await idle(app, "numbers")
        reasons = app._routers[0][1].batches
        assert (sizes, reasons) == ([10, 10, 4], {"size": 2, "timeout": 1})


async def test_a_delayed_event_waits_on_the_server_and_counts_as_pending(anywhere: str) -> None:
    app, at = Pipeline("app", anywhere), []

    @app.subscriber(numbers, group="g")
    async def work(message: Message[Number]) -> None:
        at.append((time.time(), message.attempt))

    async with app, serving(app):
        published = time.time()
        await app.publish(numbers, Number(n=1), delay=0.5)
        await asyncio.sleep(0.2)
        ledger = (await app.stats()).channels["numbers"]
        assert (ledger.published, ledger.groups["g"].pending, ledger.groups["g"].retried) == (1, 1, 0)
        await idle(app, "numbers")
    ((when, attempt),) = at
    assert 0.45 < when - published < 1.5
    assert attempt == 1


async def test_an_answer_of_another_release_fails_the_request_and_says_why(anywhere: str) -> None:
    class Root(Event):
        n: int
        root: int

    Root.__name__ = "Square"  # as the worker knows it; ours has `squared`

    app, older = Pipeline("app", anywhere), Pipeline("older", anywhere)

    @older.subscriber(Channel("asked", Number, reply=Root), group="g")
    async def work(event: Number) -> Root:
        return Root(n=event.n, root=event.n)

    async with app, older, serving(older):
        with pytest.raises(RequestFailed, match=r"not a valid answer: .*squared"):
            await app.request(Channel("asked", Number, reply=Square), Number(n=3), timeout=5)


async def test_an_answer_may_be_called_failure_and_is_what_is_published(anywhere: str) -> None:
    class Failure(Event):
        n: int
        picture: Tensor

    app, failures = Pipeline("app", anywhere), Channel("failures", Failure, frame=3)
    asked = Channel("asked", Number, reply=Failure)

    @app.subscriber(asked, group="g", publishes=failures, batch=Batch(8))
    async def work(batch: list[Number]) -> list[Failure]:
        return [Failure(n=event.n, picture=Tensor(np.full(9, event.n, np.float32))) for event in batch]

    async with app, serving(app), app.watch(failures) as stream:
        answers = await asyncio.gather(*(app.request(asked, Number(n=n), timeout=5) for n in range(20)))
        published = [(await asyncio.wait_for(anext(aiter(stream)), 5)).event for _ in range(20)]
    assert [answer.n for answer in answers] == list(range(20))
    assert all(np.asarray(answer.picture).tolist() == [answer.n] * 9 for answer in (*answers, *published))
    assert sorted(event.n for event in published) == list(range(20))


async def test_outputs_go_round_the_partitions_and_have_ids_of_their_own(anywhere: str) -> None:
    app, spread = Pipeline("app", anywhere), Channel("spread", Square, partitions=3)

    @app.subscriber(Channel("ones", Number, frame=1), group="g", publishes=spread)
    async def work(event: Number) -> Square:
        return Square(n=event.n, squared=event.n**2)

    async with app, serving(app):
        for n in range(9):
            await app.publish(Channel("ones", Number, frame=1), Number(n=n))
            await idle(app, "ones")
        async with app.watch(spread, since=60) as stream:
            ids = {(await asyncio.wait_for(anext(aiter(stream)), 5)).id for _ in range(9)}
    assert {id_.rpartition(":")[0] for id_ in ids} == {f"ones.g.{partition}" for partition in range(3)}
    assert len(ids) == 9


async def test_a_request_is_answered_rejected_or_times_out(url: str) -> None:
    app = Pipeline("app", url)

    @app.subscriber(numbers, group="g", publishes=squares, retry=RetryPolicy(attempts=2, base=0.01))
    async def square(event: Number) -> Square | None:
        if event.n == 1:
            raise Reject("one is trivial")
        if event.n == 2:
            raise OSError("disk")
        return None if event.n == 3 else Square(n=event.n, squared=event.n**2)

    async with app:
        with pytest.raises(RequestTimeout, match=r"within 0\.1 s"):
            await app.request(numbers, Number(n=9), timeout=0.1)
        async with serving(app):
            assert await app.request(numbers, Number(n=4), timeout=5) == Square(n=4, squared=16)
            for n, reason in ((1, "one is trivial"), (2, "OSError: disk"), (3, "returned None")):
                with pytest.raises(RequestFailed, match=reason):
                    await app.request(numbers, Number(n=n), timeout=5)
            many = await asyncio.gather(*(app.request(numbers, Number(n=n), timeout=5) for n in range(10, 210)))
            assert [answer.squared for answer in many] == [n * n for n in range(10, 210)]
            await idle(app, "numbers")
    with redis.Redis.from_url(url) as client:
        assert client.keys("pipeline:reply:*") == [], "answers must not stay"


async def test_questions_that_nobody_waits_for_any_more_are_forgotten(url: str) -> None:
    async with Pipeline("app", url) as app:
        with pytest.raises(RequestTimeout, match="no answer"):
            await app.request(numbers, Number(n=1), timeout=0.05)
        question = app.ask(numbers, Number(n=2), timeout=60)
        assert app._replies is not None
        await until(lambda: len(app._replies._waiting) == 1)
        question.cancel()
        assert not app._replies._waiting
        app.ask(numbers, Number(n=3), timeout=60).cancel()
        await app.publish(numbers, Number(n=4))
        assert (await app.stats()).channels["numbers"].published == 3, "1, 2 and 4: nobody waited for the third"


async def test_events_of_a_key_stay_in_order_even_when_one_is_retried(anywhere: str) -> None:
    app = Pipeline("app", anywhere)
    seen: dict[str, list[int]] = {"a": [], "b": [], "c": []}

    @app.subscriber(numbers, group="g", ordered=True, concurrency=4, retry=QUICK)
    async def work(message: Message[Number]) -> None:
        await asyncio.sleep(0.001)
        if message.event.n == 3 and message.attempt == 1:
            raise OSError("again")
        assert message.key is not None
        seen[message.key].append(message.event.n)

    async with app, serving(app):
        for n in range(20):
            for key in seen:
                await app.publish(numbers, Number(n=n), key=key)
        ledger = await idle(app, "numbers")
    assert seen == {key: list(range(20)) for key in "abc"}
    assert ledger.groups["g"].handled == 60


async def test_a_bad_event_in_a_good_frame_is_buried_alone(anywhere: str) -> None:
    class Strict(Event):
        n: int

    class Loose(Event):
        n: int | str

    app, seen = Pipeline("app", anywhere), []

    @app.subscriber(Channel("mixed", Strict), group="g")
    async def work(event: Strict) -> None:
        seen.append(event.n)

    other = Pipeline("other", anywhere)
    async with app, other, serving(app):
        await other.publish(Channel("mixed", Loose), [Loose(n=1), Loose(n="x"), Loose(n=3)])
        ledger = await idle(app, "mixed")
        (letter,) = await app.dead_letters("mixed")
    assert (seen, ledger.groups["g"].handled, ledger.groups["g"].dead) == ([1, 3], 2, 1)
    assert "n: Input should be a valid integer" in letter.event.reason


async def test_events_that_are_no_objects_hold_nobody_up(anywhere: str) -> None:
    app, seen = Pipeline("app", anywhere), []

    @app.subscriber(Channel("redeclared", Number), group="g")
    async def work(event: Number) -> None:
        seen.append(event.n)

    text = Channel("redeclared", str)
    async with Pipeline("other", anywhere) as other:
        await other.publish(text, ["hello", "again"])
        await other.publish(text, "later", delay=0.01)
        async with serving(app):
            await app.publish(Channel("redeclared", Number), Number(n=1))
            ledger = await idle(app, "redeclared")
            letters = await app.dead_letters("redeclared")
    assert (seen, ledger.groups["g"].handled, ledger.groups["g"].dead) == ([1], 1, 3)
    assert all("Input should be an object" in letter.event.reason for letter in letters)


async def test_an_unreadable_frame_becomes_a_dead_letter_and_the_worker_goes_on(url: str) -> None:
    app, seen = Pipeline("app", url), []

    @app.subscriber(numbers, group="g")
    async def work(event: Number) -> None:
        seen.append(event.n)

    async with app, serving(app):
        await app.publish(numbers, Number(n=1))
        await idle(app, "numbers")
        _add_an_unreadable_frame(url, app)
        await app.publish(numbers, Number(n=2))
        ledger = await idle(app, "numbers")
        (letter,) = await app.dead_letters("numbers")
    assert seen == [1, 2]
    assert (letter.event.count, ledger.groups["g"].dead) == (5, 5)
    assert "FrameTruncated" in letter.event.reason


async def test_a_frame_that_can_be_neither_read_nor_buried_waits_for_the_mending(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    app, seen = Pipeline("app", url), []

    @app.subscriber(numbers, group="g")
    async def work(event: Number) -> None:
        seen.append(event.n)

    with redis.Redis.from_url(url) as client:
        client.set("pipeline:{numbers.dead}:s", "somebody's")
        async with app, serving(app):
            await app.publish(numbers, Number(n=1))
            await idle(app, "numbers")
            _add_an_unreadable_frame(url, app)
            await until(lambda: "outcomes cannot be committed yet: WRONGTYPE" in caplog.text)
            client.delete("pipeline:{numbers.dead}:s")
            await app.publish(numbers, Number(n=2))
            ledger = await idle(app, "numbers")
            (letter,) = await app.dead_letters("numbers")
    assert (seen, letter.event.count, ledger.groups["g"].dead) == ([1, 2], 5, 5)


async def test_of_a_frame_that_is_partly_committed_only_the_rest_is_buried(url: str) -> None:
    app, backend = Pipeline("app", url), RedisBackend(url, "earlier")

    @app.subscriber(numbers, group="g", lease=0.3)
    async def work(event: Number) -> None:
        """Cannot read it."""

    await backend.open(1.0)
    reader = await backend.durable.join(numbers, 0, Group("g", "earlier", 0.3))
    async with Pipeline("publisher", url) as publisher:
        await publisher.publish(numbers, Number(n=1))
        _add_an_unreadable_frame(url, publisher)
        whole, frame = [entry for _ in range(2) for entry in await reader.read(1, 1.0)]
        await reader.commit(Commit([Segment(whole.id, 1, 0, 0)], handled=1))
        await reader.commit(Commit([Segment(frame.id, 5, 1, 3)], handled=3))
        await reader.close()
        await backend.close()
        async with app, serving(app):
            ledger = (await idle(app, "numbers")).groups["g"]
            (letter,) = await app.dead_letters("numbers")
    assert (ledger.handled, ledger.dead, letter.event.count) == (4, 2, 2)


def _add_an_unreadable_frame(url: str, app: Pipeline) -> None:
    """Of five events, after the one event of `app` on the channel numbers."""
    with redis.Redis.from_url(url) as client:
        client.hincrby("pipeline:{numbers}:m", "published", 5)
        body = b'{"pipeline":1,"data":[{"n"'
        client.xadd("pipeline:{numbers}:s", {"n": 5, "b": body}, id=f"{_ms(client)}-6")
        client.set(f"pipeline:{{numbers}}:src:{app.source}", 1)


def _ms(client: redis.Redis) -> str:
    seconds, micros = client.time()
    return str(seconds * 1000 + micros // 1000)


async def test_tensors_arrive_read_only_and_equal(anywhere: str) -> None:
    app, seen = Pipeline("app", anywhere), []
    windows = Channel("windows", Window)

    @app.subscriber(windows, group="g")
    async def work(event: Window) -> None:
        seen.append(event)

    sent = [Window(values=Tensor(np.arange(n, dtype=np.float32).reshape(-1, 2))) for n in (0, 2, 60_000)]
    async with app, serving(app):
        await app.publish(windows, sent)
        await idle(app, "windows")
    assert seen == sent
    assert not np.asarray(seen[2].values).flags.writeable


async def test_a_new_group_begins_at_the_oldest_or_at_the_latest(anywhere: str) -> None:
    first, seen = Pipeline("first", anywhere), {"old": 0, "new": 0}
    async with first:
        await first.publish(numbers, [Number(n=n) for n in range(10)])
        app = Pipeline("app", anywhere)

        @app.subscriber(numbers, group="old")
        async def old(event: Number) -> None:
            seen["old"] += 1

        @app.subscriber(numbers, group="new", start="latest")
        async def new(event: Number) -> None:
            seen["new"] += 1

        async with serving(app):
            await first.publish(numbers, [Number(n=n) for n in range(5)])
            ledger = await idle(first, "numbers")
    assert seen == {"old": 15, "new": 5}
    assert (ledger.groups["old"].before, ledger.groups["new"].before) == (0, 10)


async def test_a_rewound_group_handles_again_and_the_ledger_balances(anywhere: str) -> None:
    app, seen = Pipeline("app", anywhere), []

    @app.subscriber(Channel("numbers", Number, frame=3), group="g", retry=RetryPolicy(attempts=1))
    async def work(event: Number) -> None:
        seen.append(event.n)
        if event.n == 8:
            raise Reject("eight")

    async with app, serving(app):
        for n in range(10):
            await app.publish(numbers, Number(n=n))
        await idle(app, "numbers")
        assert await app.rewind("numbers", "g", since="1h") == 10
        await idle(app, "numbers")
        assert await app.rewind("numbers", "g", since=f"{app.source}:8") == 3
        ledger = await idle(app, "numbers")
        with pytest.raises(ConfigurationError, match="no group 'nobody'"):
            await app.rewind("numbers", "nobody", since="1h")
        with pytest.raises(ConfigurationError, match="keeps no message 'gone:8'"):
            await app.rewind("numbers", "g", since="gone:8")
    assert seen == [*range(10), *range(10), 7, 8, 9]
    assert ledger.groups["g"].handled + ledger.groups["g"].dead == 10


async def test_watching_begins_in_the_past_now_or_after_a_message(anywhere: str) -> None:
    app = Pipeline("app", anywhere)
    async with app:
        receipt = await app.publish(numbers, [Number(n=n) for n in range(10)])
        await asyncio.sleep(0.01)
        moment = datetime.now(UTC)
        await asyncio.sleep(0.01)
        await app.publish(numbers, [Number(n=n) for n in range(10, 13)])
        text = moment.isoformat()
        for since, first in ((60, 0), ("1m", 0), ("60", 0), (moment, 10), (text, 10), (receipt.ids[4], 5)):
            async with app.watch(numbers, since=since) as stream:  # type: ignore[arg-type]
                assert (await anext(aiter(stream))).event.n == first
        async with app.watch(numbers) as stream:
            await app.publish(numbers, Number(n=99))
            assert (await anext(aiter(stream))).event.n == 99
        with pytest.raises(ValueError, match="since="):
            app.watch(numbers, since="yesterday")


async def test_who_watches_since_a_message_that_is_kept_no_more_sees_all_that_is(
    anywhere: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Pipeline("app", anywhere) as app:
        await app.publish(numbers, [Number(n=n) for n in range(3)])
        async with app.watch(numbers, since="gone:8") as stream:
            seen = [(await asyncio.wait_for(anext(aiter(stream)), 5)).event.n for _ in range(3)]
    assert (seen, "keeps no message gone:8" in caplog.text) == ([0, 1, 2], True)


async def test_since_a_message_is_since_its_time_in_the_other_partitions(anywhere: str) -> None:
    spread = Channel("spread", Number, frame=1, partitions=4)
    async with Pipeline("app", anywhere) as app:
        ids = []
        for n in range(20):
            ids += (await app.publish(spread, Number(n=n), key=str(n % 7))).ids
            await asyncio.sleep(0.002)
        async with app.watch(spread, since=ids[9]) as stream:
            seen = [(await asyncio.wait_for(anext(aiter(stream)), 5)).event.n for _ in range(10)]
    assert sorted(seen) == list(range(10, 20))


async def test_the_newest_are_read_from_the_end_of_every_partition(anywhere: str) -> None:
    one, spread = Channel("one", Number), Channel("spread", Number, partitions=3)
    async with Pipeline("app", anywhere) as app:
        assert await app.newest(one, 5) == []
        ids = list((await app.publish(one, [Number(n=n) for n in range(7)])).ids)
        for n in range(7, 30):
            ids += (await app.publish(one, Number(n=n))).ids
        for count in (1, 3, 23, 25, 30, 99):
            found = await app.newest(one, count)
            assert [message.event.n for message in found] == list(range(29, -1, -1))[:count]
            assert [message.id for message in found] == ids[::-1][:count]
        for n in range(40):
            await app.publish(spread, Number(n=n), key=str(n))
            await asyncio.sleep(0.002)
        assert [message.event.n for message in await app.newest(spread, 12)] == list(range(39, 27, -1))
        with pytest.raises(ConfigurationError, match="keeps nothing"):
            await app.newest(Channel("now", Number, durable=False), 1)


async def test_what_others_wrote_to_the_stream_is_not_among_the_newest(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Pipeline("app", url) as app:
        await app.publish(numbers, [Number(n=n) for n in range(3)])
        with redis.Redis.from_url(url) as raw:
            for _ in range(20):
                raw.xadd(Keys.of("numbers").stream, {"foreign": "1"})
            raw.xadd(Keys.of("numbers").stream, {"n": "2", "b": "junk"})
        assert [message.event.n for message in await app.newest(numbers, 5)] == [2, 1, 0]
    assert "cannot be read and is left out" in caplog.text


@pytest.mark.parametrize(
    "since", ["nand", "infs", float("nan"), float("inf"), "-5m", -1.0, "", "yesterday", "5x", "nan", "2026-01-01T00:00"]
)
async def test_a_time_that_is_none_is_refused(since: Any) -> None:
    async with Pipeline("app", "memory://since") as app:
        with pytest.raises(ConfigurationError, match="since="):
            app.watch(numbers, since=since)


async def test_bounded_channels_that_feed_each_other_do_not_wait_for_each_other(anywhere: str) -> None:
    app = Pipeline("app", anywhere)
    there = Channel("there", Number, capacity=4, frame=1)
    back = Channel("back", Number, capacity=4, frame=1)

    @app.subscriber(there, group="g", publishes=back)
    async def send_back(event: Number) -> Number:
        return event

    @app.subscriber(back, group="g", publishes=there)
    async def send_there(event: Number) -> Number | None:
        return Number(n=event.n - 1) if event.n else None

    async with app, serving(app):
        async with asyncio.timeout(10):
            await asyncio.gather(*(app.publish(there, Number(n=n % 3)) for n in range(90)))
            while (await app.stats()).channels["back"].groups["g"].handled < 90 + 60 + 30:
                await asyncio.sleep(0.02)


async def test_counts_of_an_interval_that_could_not_be_sent_come_with_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = Pipeline("app", "memory://late")
    app.settings = app.settings.model_copy(update={"metrics_interval": 0.05})
    sent: list[WorkerSample] = []

    @app.subscriber(numbers, group="g")
    async def work(event: Number) -> None:
        """Nothing."""

    async with app:
        fails = iter([True, True])

        async def send(sample: WorkerSample) -> None:
            if sample.published and next(fails, False):
                raise ServerUnavailable("away")
            sent.append(sample)

        monkeypatch.setattr(app._reporter, "_send", send)
        async with serving(app):
            for n in range(4):
                await app.publish(numbers, Number(n=n))
                await asyncio.sleep(0.06)
            await until(lambda: sum(sample.published.get("numbers", 0) for sample in sent) >= 4)
    assert sum(sample.published.get("numbers", 0) for sample in sent) == 4
    groups = [group for sample in sent for group in sample.groups]
    assert sum(group.handled for group in groups) == sum(sum(group.latency.values()) for group in groups) == 4


async def test_who_is_held_up_by_a_full_output_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(router, "HELD_UP", 0.1)
    app, full = Pipeline("app", "memory://held-up"), Channel("full", Number, capacity=1)

    @app.subscriber(numbers, group="g", publishes=full)
    async def work(event: Number) -> Number:
        return event

    async with app, serving(app):
        await app.publish(full, Number(n=0))
        await until(lambda: "channel 'full', which it publishes to, is full" in caplog.text)
        await asyncio.sleep(0.2)
    assert caplog.text.count("which it publishes to, is full") == 1


async def test_a_publish_that_is_given_up_before_it_began_is_not_written(anywhere: str) -> None:
    """So whoever gives up while a channel is full, and tries again, publishes once."""
    app, full, seen = Pipeline("app", anywhere), Channel("full", Number, capacity=1), list[int]()

    @app.subscriber(full, group="g")
    async def work(event: Number) -> None:
        seen.append(event.n)

    async with app:
        await app.publish(full, Number(n=0))
        begun = asyncio.create_task(app.publish(full, Number(n=1)))
        await asyncio.sleep(0.05)
        for _ in range(40):
            tries = [asyncio.create_task(app.publish(full, Number(n=2))) for _ in range(50)]
            await asyncio.sleep(0)
            for each in tries:
                each.cancel()
            await asyncio.gather(*tries, return_exceptions=True)
        (outbox,) = (outbox for (channel, _), outbox in app._outboxes.items() if channel is full)
        assert len(outbox._queue) <= publishing.CROWD
        last = asyncio.create_task(app.publish(full, Number(n=2)))
        async with serving(app):
            await asyncio.gather(begun, last)
            await idle(app, full)
    assert seen == [0, 1, 2]


async def test_publishes_that_wait_as_the_app_closes_hear_of_it(anywhere: str) -> None:
    app, full = Pipeline("app", anywhere), Channel("full", Number, capacity=1)
    async with app:
        await app.publish(full, Number(n=0))
        writes, *queued = [asyncio.create_task(app.publish(full, Number(n=n))) for n in range(4)]
        await asyncio.sleep(0.05)
        writes.cancel()  # others wrote along with it; now the outbox does
        await asyncio.sleep(0.05)
        queued.append(asyncio.create_task(app.publish(full, Number(n=5))))
        await asyncio.sleep(0.05)
    async with asyncio.timeout(1):
        outcomes = await asyncio.gather(*queued, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [PublishUncertain] * 3 + [ServerUnavailable]


async def test_a_publisher_that_waits_for_room_itself_hears_of_the_end_too(anywhere: str) -> None:
    app, full = Pipeline("app", anywhere), Channel("full", Number, capacity=1)
    async with app:
        await app.publish(full, Number(n=0))
        both = [asyncio.create_task(app.publish(full, Number(n=n))) for n in (1, 2)]
        await asyncio.sleep(0.05)
    async with asyncio.timeout(1):
        outcomes = await asyncio.gather(*both, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ServerUnavailable] * 2


async def test_a_verb_in_another_event_loop_is_refused_before_anything_is_written(anywhere: str) -> None:
    app = Pipeline("app", anywhere)

    async def elsewhere() -> None:
        for verb in (app.publish, app.request):
            with pytest.raises(ConfigurationError, match="open in another event loop"):
                await verb(numbers, Number(n=2))
        with pytest.raises(ConfigurationError, match="open in another event loop"):
            await app.stats()
        assert app.empty(3).shape == (3,), "which is for any thread"

    async with app:
        await app.publish(numbers, Number(n=1))
        await asyncio.to_thread(asyncio.run, elsewhere())
        await app.publish(numbers, Number(n=3))
        assert [message.event.n for message in await app.newest(numbers, 9)] == [3, 1]


async def test_a_full_channel_makes_publishers_wait_or_tells_them_or_drops_the_oldest(anywhere: str) -> None:
    app = Pipeline("app", anywhere)
    waits = Channel("waits", Number, capacity=10, frame=1)
    raises = Channel("raises", Number, capacity=10, overflow="raise")
    drops = Channel("drops", Number, capacity=10, overflow="drop_oldest", frame=1)
    go, seen = asyncio.Event(), []

    @app.subscriber(waits, group="g")
    async def work(event: Number) -> None:
        await go.wait()

    @app.subscriber(drops, group="g", start="oldest")
    async def late(event: Number) -> None:
        await go.wait()
        seen.append(event.n)

    async with app, serving(app):
        ten = [Number(n=n) for n in range(10)]
        await app.publish(waits, ten)
        held = asyncio.create_task(app.publish(waits, Number(n=10)))
        await asyncio.sleep(0.1)
        assert not held.done()
        await app.publish(raises, ten)
        with pytest.raises(ChannelFull, match="holds 10 unhandled events, its capacity is 10"):
            await app.publish(raises, Number(n=10))
        await app.publish(drops, [Number(n=n) for n in range(25)])
        go.set()
        async with asyncio.timeout(5):
            await held
        dropped = (await idle(app, "drops")).groups["g"]
    assert dropped.dropped + dropped.handled == 25
    assert dropped.dropped >= 14
    assert seen[-9:] == list(range(16, 25)), "the newest stay; what a worker holds is its own"


class Blob(Event):
    n: int
    values: Tensor


async def test_a_channel_may_be_bounded_in_bytes(anywhere: str) -> None:
    app = Pipeline("app", anywhere)
    raises = Channel("raises", Blob, capacity="1 MB", overflow="raise", frame=1)
    drops = Channel("drops", Blob, capacity="0.5 MiB", overflow="drop_oldest", frame=1)
    outputs = Channel("outputs", Blob, capacity="400 kB", frame=1)
    go = asyncio.Event()

    @app.subscriber(outputs, group="g", batch=Batch(1))
    async def slow(batch: list[Blob]) -> None:
        await go.wait()

    @app.subscriber(numbers, group="g", publishes=outputs, batch=Batch(1))
    def grow(batch: list[Number]) -> list[Blob]:
        return [blob(event.n) for event in batch]

    def blob(n: int) -> Blob:
        return Blob(n=n, values=np.zeros(100_000, np.uint8))

    @app.subscriber(drops, group="g")
    async def late(event: Blob) -> None:
        await go.wait()

    async with app:
        with pytest.raises(ChannelFull, match="unhandled events, its capacity is") as full:
            await app.publish(raises, [blob(n) for n in range(20)])
        assert full.value.published == 9
        await app.publish(drops, blob(0))
        async with serving(app):
            await app.publish(drops, [blob(n) for n in range(1, 20)])
            for n in range(64):
                await app.publish(numbers, Number(n=n))
                await asyncio.sleep(0.01)
            held = (await app.stats()).channels
            go.set()
            await idle(app, "numbers")
            after = await idle(app, "outputs")
            dropped = (await idle(app, "drops")).groups["g"]
    assert 3 <= held["outputs"].published < 64, "who fills it takes nothing new"
    assert after.groups["g"].handled == 64
    assert dropped.dropped + dropped.handled == 20
    assert 4 <= dropped.handled <= 9


@pytest.mark.parametrize("capacity", [0, -1, True, "", "0 MB", "64", "64 mb", "-1 MB", "1e3 MB", 1.5])
def test_a_capacity_that_is_none_is_refused(capacity: Any) -> None:
    with pytest.raises(
        ConfigurationError, match="capacity is a number of events, at least 1, or of bytes, like '64 MB'"
    ):
        Channel("bounded", Number, capacity=capacity)


async def test_outputs_to_a_channel_that_drops_its_oldest_hold_nobody_up(anywhere: str) -> None:
    latest = Channel("latest", Number, capacity=10, overflow="drop_oldest", frame=1)
    app, go, seen = Pipeline("app", anywhere), asyncio.Event(), []

    @app.subscriber(numbers, group="g", publishes=latest)
    async def forward(event: Number) -> Number:
        return event

    @app.subscriber(latest, group="slow")
    async def late(event: Number) -> None:
        await go.wait()
        seen.append(event.n)

    async with app, serving(app):
        for first in range(0, 60, 20):
            await app.publish(numbers, [Number(n=n) for n in range(first, first + 20)])
        upstream = (await idle(app, "numbers")).groups["g"]
        held = (await app.stats()).channels["latest"].groups["slow"]
        go.set()
        after = (await idle(app, "latest")).groups["slow"]
    assert upstream.handled == 60, "nobody waits for who is slow"
    assert held.lag <= 10
    assert after.dropped == held.dropped >= 40
    assert after.dropped + after.handled == 60
    assert seen[-9:] == list(range(51, 60)), "the newest stay"


async def test_who_is_told_that_a_channel_is_full_knows_what_was_taken(anywhere: str) -> None:
    full = Channel("full", Number, capacity=10, overflow="raise", frame=1)
    async with Pipeline("app", anywhere) as app:
        told = await asyncio.gather(*(app.publish(full, Number(n=n)) for n in range(8)), return_exceptions=True)
        assert not [one for one in told if isinstance(one, BaseException)]
        await app.publish(full, Number(n=8))
        with pytest.raises(ChannelFull) as raised:
            await app.publish(full, [Number(n=9), Number(n=10), Number(n=11)])
        assert raised.value.published == 1
    roomy = Channel("roomy", Number, capacity=10, overflow="raise", frame=1)
    async with Pipeline("app", anywhere) as app:
        told = await asyncio.gather(*(app.publish(roomy, Number(n=n)) for n in range(50)), return_exceptions=True)
        taken = [one for one in told if not isinstance(one, BaseException)]
        assert len(taken) == (await app.stats()).channels["roomy"].published == 10
        assert {type(one) for one in told if isinstance(one, BaseException)} == {ChannelFull}


async def test_draining_hands_unstarted_work_to_another_worker_at_once(anywhere: str) -> None:
    slow, other = Pipeline("slow", anywhere), Pipeline("other", anywhere)
    started, taken = asyncio.Event(), []

    @slow.subscriber(numbers, group="g", lease=30.0, batch=Batch(100, wait=30.0))
    async def gather(batch: list[Number]) -> None:
        started.set()

    @other.subscriber(numbers, group="g", lease=30.0)
    async def take(event: Number) -> None:
        taken.append(time.monotonic())

    async with slow:
        stop = asyncio.Event()
        serving_slow = asyncio.create_task(slow.serve(stop))
        await until(lambda: slow._routers)
        await slow.publish(numbers, [Number(n=n) for n in range(10)])
        await until(lambda: slow._routers[0][0].flow.events == 10)
        async with serving(other):
            await asyncio.sleep(0.2)
            stopped = time.monotonic()
            stop.set()
            await until(lambda: len(taken) == 10)
            await serving_slow
        assert not started.is_set()
        assert max(taken) - stopped < 0.5
        await idle(slow, "numbers")


async def test_draining_hands_back_what_is_not_begun_of_a_frame_that_is(anywhere: str) -> None:
    slow, other = Pipeline("slow", anywhere), Pipeline("other", anywhere)
    begun, taken = asyncio.Event(), []

    @slow.subscriber(numbers, group="g", lease=30.0)
    async def work(event: Number) -> None:
        begun.set()
        await asyncio.sleep(1.0)

    @other.subscriber(numbers, group="g", lease=30.0)
    async def take(event: Number) -> None:
        taken.append((event.n, time.monotonic()))

    async with slow:
        stop = asyncio.Event()
        serving_slow = asyncio.create_task(slow.serve(stop))
        await until(lambda: slow._routers)
        await slow.publish(numbers, [Number(n=n) for n in range(10)])
        await asyncio.wait_for(begun.wait(), 5)
        async with serving(other):
            await asyncio.sleep(0.2)
            stopped = time.monotonic()
            stop.set()
            await until(lambda: len(taken) == 9)
            assert time.monotonic() - stopped < 0.5
            await serving_slow
        ledger = (await idle(slow, "numbers")).groups["g"]
    assert sorted(n for n, _ in taken) == list(range(1, 10))
    assert (ledger.handled, ledger.duplicates_suppressed, ledger.retried) == (10, 0, 0)


async def test_an_idle_app_stops_within_a_second(anywhere: str) -> None:
    app = Pipeline("app", anywhere)

    @app.subscriber(numbers, group="g")
    async def work(event: Number) -> None:
        """Nothing to do."""

    stop = asyncio.Event()
    task = asyncio.create_task(app.serve(stop))
    await until(lambda: app._routers)
    await asyncio.sleep(0.2)
    began = time.monotonic()
    stop.set()
    await task
    assert time.monotonic() - began < 1.0


def in_a_process(event: Number) -> Square:
    if event.n == 2:
        raise Reject("two")
    if event.n == 3:
        raise OSError("three")
    return Square(n=event.n, squared=event.n**2)


async def test_a_start_that_waits_for_redis_or_for_a_hook_can_be_stopped(anywhere: str) -> None:
    absent, slow, begun = Pipeline("absent", "redis://127.0.0.1:9/0"), Pipeline("slow", anywhere), asyncio.Event()

    @slow.on_start
    async def load() -> None:
        begun.set()
        await asyncio.sleep(60)

    absent.on_start(load)
    for app, waiting in ((absent, asyncio.sleep(0.2)), (slow, begun.wait())):
        stop = asyncio.Event()
        task = asyncio.create_task(app.serve(stop))
        await waiting
        stop.set()
        async with asyncio.timeout(1):
            await task


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_still_loads_its_model_stops_at_once(valkey_url: str, number: signal.Signals) -> None:
    code = (
        "import asyncio, time\nfrom pipeline import Pipeline\napp = Pipeline('app')\n"
        "@app.on_start\nasync def load():\n    print('loading', flush=True)\n"
        "    await asyncio.to_thread(time.sleep, 60)\napp.run()\n"
    )
    with program("-c", code, url=valkey_url) as process:
        line_with("loading", process)
        process.send_signal(number)
        process.wait(1.0)


async def test_handlers_run_in_processes(valkey_url: str) -> None:
    app = Pipeline("app", valkey_url)
    app.subscriber(numbers, group="g", publishes=squares, run_in="process", concurrency=2, retry=QUICK)(in_a_process)
    async with app, serving(app):
        await app.publish(numbers, [Number(n=n) for n in range(50)])
        ledger = await idle(app, "numbers")
        letters = {letter.event.reason: letter.event for letter in await app.dead_letters("numbers")}
    assert (ledger.groups["g"].handled, ledger.groups["g"].dead) == (48, 2)
    assert letters["two"].attempts == 1
    assert letters["HandlerError: OSError: three"].attempts == 3
    assert "in_a_process" in letters["HandlerError: OSError: three"].traceback


def make_something_that_stays_in_its_process(event: Number) -> object:
    return threading.Lock() if event.n == 1 else None


async def test_a_result_that_cannot_leave_its_process_fails_its_event_alone(valkey_url: str) -> None:
    app, quiet = Pipeline("app", valkey_url), Channel("quiet", Number)
    app.subscriber(quiet, group="g", run_in="process", retry=RetryPolicy(attempts=1))(
        make_something_that_stays_in_its_process
    )
    async with app, serving(app):
        await app.publish(quiet, [Number(n=n) for n in range(10)])
        ledger = (await idle(app, "quiet", 30)).groups["g"]
        (letter,) = await app.dead_letters("quiet")
    assert (ledger.handled, ledger.dead) == (9, 1)
    assert "cannot pickle" in letter.event.reason


def exits(event: Number) -> None:
    if event.n == 1:
        sys.exit(3)


class Odd(Exception):
    def __init__(self, one: str, other: str) -> None:
        super().__init__(one + other)


def oddly(event: Number) -> Odd | None:
    return Odd("a", "b") if event.n == 1 else None


@pytest.mark.parametrize("run_in", ["loop", "thread", "process"])
async def test_a_handler_that_exits_fails_its_event_and_the_worker_goes_on(run_in: RunIn, valkey_url: str) -> None:
    app = Pipeline("app", valkey_url)
    once = RetryPolicy(attempts=1)
    app.subscriber(numbers, group="g", run_in=run_in, retry=once)(exits)
    async with serving(app, seconds=30):
        for n in range(3):
            await app.publish(numbers, Number(n=n))
        ledger = await idle(app, numbers)
        assert (ledger.groups["g"].handled, ledger.groups["g"].dead) == (2, 1)
        (letter,) = await app.dead_letters("numbers")
        assert "the handler called sys.exit(3)" in letter.event.reason


async def test_a_result_that_cannot_be_read_back_fails_its_event_alone(valkey_url: str) -> None:
    app = Pipeline("app", valkey_url)
    app.subscriber(numbers, group="g", run_in="process", retry=RetryPolicy(attempts=1))(oddly)
    async with serving(app, seconds=30):
        await app.publish(numbers, [Number(n=n) for n in range(3)])
        ledger = await idle(app, numbers)
        assert (ledger.groups["g"].handled, ledger.groups["g"].dead) == (2, 1)


async def test_an_event_that_cannot_enter_a_process_becomes_a_dead_letter(valkey_url: str) -> None:
    class Local(Event):
        n: int

    app, local = Pipeline("app", valkey_url), Channel("local", Local)
    app.subscriber(local, group="g", run_in="process", retry=RetryPolicy(attempts=1))(
        make_something_that_stays_in_its_process
    )
    async with app, serving(app):
        await app.publish(local, Local(n=0))
        assert (await idle(app, "local", 30)).groups["g"].dead == 1
        (letter,) = await app.dead_letters("local")
    assert "cannot be passed to the handler's process" in letter.event.reason


async def test_what_may_not_be_published_is_refused_with_a_reason(valkey_url: str) -> None:
    class Sub(Number):
        extra: int = 0

    app = Pipeline("app", valkey_url)
    async with app:
        with pytest.raises(EventTypeError, match="a subclass would lose its own fields"):
            await app.publish(numbers, Sub(n=1))
        with pytest.raises(EventTypeError, match="carries Number, not Square"):
            await app.publish(numbers, [Number(n=1), Square(n=1, squared=1)])  # type: ignore[list-item]
        for key in (5, b"k", "\ud800"):
            for channel in (numbers, Channel("parted", Number, partitions=3)):
                with pytest.raises(ConfigurationError, match="key="):
                    await app.publish(channel, Number(n=1), key=key)  # type: ignore[arg-type]
        for headers in ({"a": 1}, {1: "a"}, {"a": "\ud800"}, [("a", "b")]):
            with pytest.raises(ConfigurationError, match="headers: "):
                await app.publish(numbers, Number(n=1), headers=headers)  # type: ignore[arg-type]
            with pytest.raises(ConfigurationError, match="headers: "):
                await app.request(numbers, Number(n=1), headers=headers)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="declares no reply="):
            await app.request(squares, Square(n=1, squared=1))
        await app.publish(numbers, Number(n=1))
        with pytest.raises(ChannelConflict, match="durable=False here, but is in use with durable=True"):
            await app.publish(Channel("numbers", Number, durable=False), Number(n=1))


async def test_an_event_that_cannot_be_written_fails_its_publisher_alone(anywhere: str) -> None:
    class Text(Event):
        text: str

    texts, bare = Channel("texts", Text), Channel("bare", str, durable=False)
    async with Pipeline("app", anywhere) as app:
        for channel in (texts, bare):
            many: list[Any] = ["a", "b", "\ud800", "c"]
            if channel is texts:
                many = [Text.model_construct(text=text) for text in many]
            # the first is being written while the others gather
            done = await asyncio.gather(*(app.publish(channel, event) for event in many), return_exceptions=True)
            assert [type(one).__name__ for one in done] == ["Receipt", "Receipt", "EventTypeError", "Receipt"]


async def test_a_channel_without_a_class_is_the_one_that_is_registered(anywhere: str) -> None:
    async with Pipeline("owner", anywhere) as owner, Pipeline("other", anywhere) as other:
        await owner.publish(Channel("jobs", dict, partitions=4), {"n": 1})
        for channel in (Channel("jobs", dict), Channel("jobs", dict, durable=False)):
            with pytest.raises(ChannelConflict, match="but is in use with"):
                await other.publish(channel, {"n": 2})
        await other.publish(Channel("jobs", dict, partitions=4), {"n": 3}, key="a")
        assert (await owner.stats()).channels["jobs"].published == 2


async def test_a_tool_that_watches_does_not_say_what_a_channel_is(anywhere: str) -> None:
    async with Pipeline("watcher", anywhere) as watcher, Pipeline("owner", anywhere) as owner:
        async with watcher.watch(Channel("numbers", Number, durable=False), declare=False):
            await owner.publish(Channel("numbers", Number, partitions=2), Number(n=1))
        with pytest.raises(ChannelConflict, match="in use with durable=True"):
            async with watcher.watch(Channel("numbers", Number, durable=False), declare=False):
                pass
        record = await watcher.registry.record("numbers")
    assert (record.durable, record.limits["partitions"]) == (True, 2)


async def test_a_declaration_that_is_refused_is_never_written(anywhere: str) -> None:
    """Not even for a moment, in which another one like it would be taken, nor when it is cancelled."""
    other = Channel("numbers", Number, partitions=4)
    async with Pipeline("owner", anywhere) as owner, Pipeline("wrong", anywhere) as wrong:
        await owner.publish(numbers, Number(n=1))
        record = (await owner.registry.record("numbers")).limits
        for turns in range(12):
            tries = [asyncio.create_task(wrong.registry.register(other, wrong.codec(other))) for _ in range(3)]
            for _ in range(turns):
                await asyncio.sleep(0)
            tries[0].cancel()
            refused = await asyncio.gather(*tries, return_exceptions=True)
            assert all(isinstance(error, (ChannelConflict, asyncio.CancelledError)) for error in refused)
            assert (await owner.registry.record("numbers")).limits == record


async def test_a_handler_that_returns_what_it_does_not_publish_fails_that_event_alone(valkey_url: str) -> None:
    app = Pipeline("app", valkey_url)

    @app.subscriber(numbers, group="g", publishes=squares, retry=RetryPolicy(attempts=1))
    async def work(event: Number) -> Any:
        return event if event.n == 1 else Square(n=event.n, squared=0)

    async with app, serving(app):
        await app.publish(numbers, [Number(n=n) for n in range(3)])
        ledger = await idle(app, "numbers")
        (letter,) = await app.dead_letters("numbers")
    assert (ledger.groups["g"].handled, ledger.groups["g"].dead) == (2, 1)
    assert (
        letter.event.reason == f"{HandlerError.__name__}: the handler returned a Number; it publishes squares (Square)"
    )


class Stubborn(Event):
    n: int

    @field_serializer("n")
    def refuse(self, n: int) -> int:
        if n % 2 and stubborn.is_set():
            raise ValueError("not again")
        return n


stubborn = threading.Event()


@pytest.mark.parametrize("durable", [True, False])
async def test_an_event_that_cannot_be_encoded_is_tried_again_and_buried_as_it_came(
    durable: bool, anywhere: str
) -> None:
    app, events = Pipeline("app", anywhere), Channel("stubborn", Stubborn, durable=durable)
    out, calls, published = Channel("out", Stubborn), Counter[int](), asyncio.Event()

    @app.subscriber(events, group="g", publishes=out, retry=RetryPolicy(attempts=2, base=0.01))
    async def work(event: Stubborn) -> Stubborn:
        await published.wait()
        calls[event.n] += 1
        if event.n == 3:
            raise OSError("a name that is no text: \udcff")
        return event

    stubborn.clear()
    async with app, serving(app):
        await app.publish(events, [Stubborn(n=n) for n in (2, 3, 5)])
        stubborn.set()
        published.set()
        async with asyncio.timeout(10):
            while len(letters := await app.dead_letters("stubborn")) < 2:
                await asyncio.sleep(0.01)
        ledger = await idle(app, events)
        stubborn.clear()
    assert (ledger.groups["g"].handled, ledger.groups["g"].dead, calls) == (1, 2, Counter({2: 1, 3: 2, 5: 2}))
    reasons = {describe(letter)["events"][0]["n"]: letter.event.reason for letter in letters}
    assert r"a name that is no text: \udcff" in reasons[3]
    assert "its output cannot be published" in reasons[5]


async def test_a_delayed_event_that_cannot_be_encoded_waits_as_it_came(anywhere: str) -> None:
    app, events, seen = Pipeline("app", anywhere), Channel("stubborn", Stubborn), []

    @app.subscriber(events, group="g")
    async def work(event: Stubborn) -> None:
        seen.append(event.n)

    stubborn.clear()
    async with app:
        await app.publish(events, [Stubborn(n=1), Stubborn(n=2)], delay=0.3)
        stubborn.set()
        async with serving(app):
            await idle(app, events)
        stubborn.clear()
    assert sorted(seen) == [1, 2]


async def test_an_error_that_cannot_be_shown_is_buried_all_the_same(anywhere: str) -> None:
    class Shy(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    app = Pipeline("app", anywhere)

    @app.subscriber(numbers, group="g", retry=RetryPolicy(attempts=1))
    async def work(event: Number) -> None:
        raise (Shy, Reject(None), Retry(2.0))[event.n]  # type: ignore[arg-type]

    async with app, serving(app):
        await app.publish(numbers, [Number(n=n) for n in range(3)])
        await idle(app, "numbers")
        reasons = [letter.event.reason for letter in await app.dead_letters("numbers")]
    assert reasons == ["Shy: (Shy that cannot be shown)", "None", "retries exhausted: 2.0"]


@pytest.mark.parametrize("kind", ["waits", "waits_for_many", "asks", "asks_for_many", "asks in a process"])
async def test_a_handler_whose_help_was_cancelled_fails_and_the_worker_goes_on(kind: str, valkey_url: str) -> None:
    app, name = Pipeline("app", valkey_url), kind.split(maxsplit=1)[0]
    run_in: Any = "process" if "process" in kind else None
    batch = Batch(4) if "many" in kind else None
    app.subscriber(numbers, group="g", run_in=run_in, batch=batch, retry=RetryPolicy(attempts=1))(globals()[name])
    async with app, serving(app):
        await app.publish(numbers, [Number(n=n) for n in range(5)])
        ledger = await idle(app, "numbers")
        (letter,) = await app.dead_letters("numbers")
    assert (ledger.groups["g"].handled, ledger.groups["g"].dead) == (4, 1)
    assert "what the handler waited for was cancelled" in letter.event.reason


async def waits(event: Number) -> None:
    if event.n == 1:
        helper = asyncio.ensure_future(asyncio.sleep(10))
        helper.cancel()
        await helper


async def waits_for_many(batch: list[Number]) -> None:
    for event in batch:
        await waits(event)


def asks(event: Number) -> None:
    asyncio.run(waits(event))


def asks_for_many(batch: list[Number]) -> None:
    for event in batch:
        asks(event)


async def test_a_worker_one_of_whose_tasks_ends_does_not_look_alive(anywhere: str) -> None:
    app = Pipeline("app", anywhere)

    @app.subscriber(numbers, group="g")
    async def work(event: Number) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    async with app:
        serving = asyncio.create_task(app.serve())
        await app.ready.wait()
        await app.publish(numbers, Number(n=1))
        with pytest.raises(PipelineError, match="work numbers/g ended, and nobody had stopped it"):
            await asyncio.wait_for(serving, 10)
        assert not app.ready.is_set()


def logged(handler: Any) -> Any:
    """The example of pipeline.middleware."""

    @functools.wraps(handler)
    def call(event: Any) -> Any:
        return handler(event)

    return call


async def test_work_that_a_plain_function_or_an_object_returns_is_awaited(anywhere: str) -> None:
    app, ran = Pipeline("app", anywhere, middleware=[logged]), Counter[str]()

    class Object:
        async def __call__(self, event: Number) -> None:
            ran["object"] += 1

    async def work(event: Number) -> None:
        ran["work"] += 1

    async def sums(batch: Iterable[Message[Number]]) -> None:
        ran["sums"] += sum(message.attempt for message in batch)

    async def hands_on(event: Number) -> Any:
        return work(event)

    app.subscriber(numbers, group="object")(Object())
    app.subscriber(numbers, group="middleware")(work)
    app.subscriber(numbers, group="wrapped", run_in="loop")(logged(work))
    app.subscriber(numbers, group="hands-on")(hands_on)
    app.subscriber(numbers, group="batch", batch=Batch(4))(sums)
    async with app, serving(app):
        await app.publish(numbers, [Number(n=n) for n in range(4)])
        groups = (await idle(app, "numbers")).groups
    assert {group.handled for group in groups.values()} == {4}
    assert ran == {"object": 4, "work": 12, "sums": 4}


async def never(event: Any) -> None:
    raise AssertionError("nobody awaits this")


@logged
async def wrapped(event: Number) -> None:
    await never(event)


def slots(batch: list[Number]) -> Any:
    return [never(event) if event.n == 1 else None for event in batch]


@pytest.mark.parametrize(
    ("run_in", "handler", "batch"),
    [("thread", wrapped, None), ("thread", wrapped, Batch(2)), ("thread", slots, Batch(2)), ("process", wrapped, None)],
)
async def test_work_that_nobody_would_do_is_a_failure_that_says_so(
    run_in: Any, handler: Any, batch: Batch | None, valkey_url: str
) -> None:
    app = Pipeline("app", valkey_url)
    app.subscriber(numbers, group="g", batch=batch, run_in=run_in, retry=RetryPolicy(attempts=1))(handler)
    async with app, serving(app):
        await app.publish(numbers, Number(n=1))
        ledger = await idle(app, "numbers")
        (letter,) = await app.dead_letters("numbers")
    assert (ledger.groups["g"].handled, ledger.groups["g"].dead) == (0, 1)
    assert "returned a coroutine: nobody awaits it here; make the handler an `async def`" in letter.event.reason


async def test_a_hook_that_fails_as_serving_stops_leaves_nothing_running(
    anywhere: str, caplog: pytest.LogCaptureFixture
) -> None:
    app, handled, hooks = Pipeline("app", anywhere), [], []

    @app.subscriber(numbers, group="g")
    async def work(event: Number) -> None:
        await asyncio.sleep(0.2)
        handled.append(event.n)

    @app.on_stop
    async def fails() -> None:
        raise OSError("cannot let go")

    @app.on_stop
    async def other() -> None:
        hooks.append("other")

    publisher = Pipeline("publisher", anywhere)
    async with publisher:
        serving = asyncio.create_task(app.serve(stop := asyncio.Event()))
        await app.ready.wait()
        await publisher.publish(numbers, Number(n=1))
        await asyncio.sleep(0.1)
        stop.set()
        with pytest.raises(OSError, match="cannot let go"):
            await serving
        assert (handled, hooks) == ([1], ["other"])
        assert (await publisher.stats()).channels["numbers"].groups["g"].handled == 1
        with pytest.raises(ConfigurationError, match="is not open"):
            _ = app.backend
    assert "fails failed" in caplog.text


async def test_an_open_app_may_serve_again(anywhere: str) -> None:
    app, handled = Pipeline("app", anywhere), []

    @app.subscriber(numbers, group="g")
    async def work(event: Number) -> None:
        handled.append(event.n)

    async with app:
        for n in range(2):
            async with serving(app):
                await app.publish(numbers, Number(n=n))
                await idle(app, "numbers")
    assert handled == [0, 1]


async def test_a_subscriber_waits_while_the_channel_it_publishes_to_is_full(anywhere: str) -> None:
    app, other = Pipeline("app", anywhere), Pipeline("other", anywhere)
    narrow = Channel("narrow", Square, capacity=20)
    source = Channel("numbers", Number, frame=5)

    @app.subscriber(source, group="g", publishes=narrow)
    async def square(event: Number) -> Square:
        return Square(n=event.n, squared=event.n**2)

    async with app, serving(app):
        await app.publish(source, [Number(n=n) for n in range(500)])
        await asyncio.sleep(0.5)
        held = (await app.stats()).channels["narrow"].published
        assert 20 <= held < 300

        @other.subscriber(narrow, group="sink")
        async def sink(event: Square) -> None:
            """Makes room."""

        async with serving(other):
            ledger = await idle(app, "numbers")
            assert (await idle(app, "narrow")).published == 500
    assert ledger.groups["g"].handled == 500


async def test_a_subscriber_that_publishes_to_its_own_full_channel_goes_on(anywhere: str) -> None:
    app = Pipeline("app", anywhere)
    round_trip = Channel("round", Number, capacity=10, frame=1)

    @app.subscriber(round_trip, group="g", publishes=round_trip)
    async def again(event: Number) -> Number | None:
        return Number(n=event.n - 1) if event.n else None

    async with app:
        await app.publish(round_trip, [Number(n=2) for _ in range(10)])
        async with serving(app):
            ledger = await idle(app, "round")
    assert ledger.groups["g"].handled == 30


@pytest.mark.parametrize("delay", [float("inf"), float("nan"), -1.0, 1e12])
def test_a_retry_that_would_never_come_is_refused(delay: float) -> None:
    with pytest.raises(ValueError, match="delay"):
        Retry(delay=delay)


async def test_an_abandoned_group_expires_loudly(valkey_url: str, caplog: pytest.LogCaptureFixture) -> None:
    app = Pipeline("app", valkey_url)

    @app.subscriber(numbers, group="gone")
    async def work(event: Number) -> None:
        """Nothing to do."""

    async with app, serving(app):
        await app.publish(numbers, Number(n=1))
        await idle(app, "numbers")
    async with app:
        await app.publish(numbers, [Number(n=n) for n in range(10)])
        streams: Any = app.backend.durable
        streams.group_expires = 0.001
        await asyncio.sleep(0.01)
        await streams._trim(Keys.of("numbers"), 600.0)
        assert (await app.stats()).channels["numbers"].groups == {}
    assert "group 'gone' of pipeline:{numbers} was served by nobody" in caplog.text
    assert "10 unsettled events" in caplog.text


async def test_handled_events_go_when_they_are_old_and_unhandled_ones_stay(valkey_url: str) -> None:
    app = Pipeline("app", valkey_url)
    brief = Channel("brief", Number, frame=1, keep=0.0)

    @app.subscriber(brief, group="g", concurrency=1)
    async def work(event: Number) -> None:
        if event.n == 3:
            await asyncio.sleep(0.5)

    async with app, serving(app):
        await app.publish(brief, [Number(n=n) for n in range(6)])
        await asyncio.sleep(0.2)
        streams: Any = app.backend.durable
        await streams._trim(Keys.of("brief"), 0.0)
        assert (await app.stats()).channels["brief"].retained == 3
        await idle(app, "brief")
        await streams._trim(Keys.of("brief"), 0.0)
        assert (await app.stats()).channels["brief"].retained == 1, "the newest always stays"


async def test_a_channel_that_cannot_be_looked_after_leaves_the_others_alone(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pipeline.transports.streams.TRIM_EVERY", 0.05)
    brief = Channel("brief", Number, frame=1, keep=0.0)
    async with Pipeline("app", valkey_url) as app:
        streams: Any = app.backend.durable
        streams._known[Keys.of("endless")] = math.inf
        await app.publish(brief, [Number(n=n) for n in range(6)])
        async with asyncio.timeout(5):
            while (await app.stats()).channels["brief"].retained > 1:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
    assert caplog.text.count("pipeline:{endless} cannot be looked after") == 1


async def test_fsync_waits_for_the_disk_or_says_what_the_server_lacks(redis7: Server, tmp_path: Path) -> None:
    safe = Channel("safe", Number, fsync=True)
    with Server(appendonly=True) as valkey:
        async with Pipeline("app", valkey.url) as app:
            await app.publish(safe, Number(n=1))
    with Server(appendonly=True, appendfsync="always", binary=redis7.binary) as always:
        async with Pipeline("app", always.url) as app:
            await app.publish(safe, Number(n=1))
    async with Pipeline("app", redis7.url) as app:
        with pytest.raises(ConfigurationError, match="--appendonly yes --appendfsync always"):
            await app.publish(safe, Number(n=1))


async def test_waiting_for_a_message_may_be_given_up_and_begun_again(anywhere: str) -> None:
    for partitions in (1, 3):
        channel = Channel(f"numbers{partitions}", Number, partitions=partitions)
        async with Pipeline("app", anywhere) as app, app.watch(channel) as stream:
            seen = list[int]()

            async def hear(stream: Watch[Number] = stream, seen: list[int] = seen) -> None:
                while len(seen) < 10:
                    seen.append((await anext(stream)).event.n)

            for n in range(5):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(hear(), 0.02)
                await app.publish(channel, [Number(n=2 * n), Number(n=2 * n + 1)])
            await hear()
            assert sorted(seen) == list(range(10))


@pytest.mark.parametrize("durable", [True, False])
async def test_a_watch_that_is_left_ends_for_whoever_iterates_and_is_closed(durable: bool, valkey_url: str) -> None:
    channel = Channel("numbers", Number, durable=durable)

    async def hear(stream: Watch[Number]) -> list[int]:
        return [message.event.n async for message in stream]

    async def cancelled_at_every_await(task: asyncio.Task[None]) -> None:
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)

    async def leave(stream: Watch[Number]) -> None:
        async with stream:
            hearing.append(asyncio.create_task(hear(stream)))
            await asyncio.sleep(3600)

    hearing = list[asyncio.Task[list[int]]]()
    with redis.Redis.from_url(valkey_url) as other:
        async with Pipeline("app", valkey_url) as app:
            before = len(other.client_list())
            for n in range(3):
                async with app.watch(channel) as stream:
                    heard = asyncio.create_task(hear(stream))
                    await app.publish(channel, Number(n=n))
                    await asyncio.sleep(0.05)
                assert await heard == [n]
                leaving = asyncio.create_task(leave(app.watch(channel)))
                await asyncio.sleep(0.05)
                await cancelled_at_every_await(leaving)
                assert leaving.cancelled()
                assert await hearing.pop() == []
            await asyncio.sleep(0.05)
            assert len(other.client_list()) == before


@pytest.mark.parametrize("partitions", [1, 2])
async def test_a_watch_that_can_read_no_more_says_so(partitions: int) -> None:
    channel = Channel("numbers", Number, partitions=partitions)
    with Server() as server, redis.Redis.from_url(server.url) as other:
        async with Pipeline("app", server.url) as app, app.watch(channel) as stream:
            hearing = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.1)
            other.config_set("requirepass", "secret")
            for each in other.client_list():
                if each["name"].startswith("pipeline-app"):
                    other.client_kill_filter(_id=each["id"])
            for again in (hearing, anext(stream)):
                with pytest.raises(ServerUnavailable, match="NOAUTH"):
                    await asyncio.wait_for(again, 5)
            other.config_set("requirepass", "")


def test_threads_that_wait_as_a_blocking_pipeline_ends_go_on(valkey_url: str) -> None:
    full, heard = Channel("full", Number, capacity=1), list[int]()
    with Pipeline("app", valkey_url).blocking() as pipe:

        def watch() -> None:
            with pipe.watch(numbers) as stream:
                begun.set()
                heard.extend(message.event.n for message in stream)

        def publish() -> None:
            with pytest.raises(PipelineError):
                pipe.publish(full, [Number(n=1)])

        begun = threading.Event()
        with ThreadPoolExecutor(2) as threads:
            pipe.publish(full, Number(n=0))
            waiting = [threads.submit(watch), threads.submit(publish)]
            begun.wait(5)
            pipe.publish(numbers, Number(n=7))
            time.sleep(0.1)
            pipe.__exit__()
            for each in waiting:
                each.result(5)
        pipe.__enter__()
        assert pipe.newest(numbers, 5)[0].event.n == 7
    assert heard == [7]
    with redis.Redis.from_url(valkey_url) as other:
        assert [each["name"] for each in other.client_list() if each["name"].startswith("pipeline-app")] == []
    assert not [thread for thread in threading.enumerate() if thread.name == "pipeline-app"]


def test_a_blocking_pipeline_of_its_parent_tells_a_forked_child_so(valkey_url: str) -> None:
    program = (
        "import os, sys\nfrom pipeline import Pipeline\nfrom tests.test_delivery import Number, numbers\n"
        "from pipeline.errors import ConfigurationError\n"
        "with Pipeline('app').blocking() as pipe, pipe.watch(numbers) as stream:\n"
        "    pipe.publish(numbers, Number(n=1))\n"
        "    if os.fork() == 0:\n"
        "        try: pipe.publish(numbers, Number(n=2))\n"
        "        except ConfigurationError as error: print(error, flush=True)\n"
        "        sys.exit(3)\n"
        "    print(os.waitstatus_to_exitcode(os.wait()[1]), pipe.publish(numbers, Number(n=3)).id.partition(':')[2])\n"
    )
    done = finished("-c", program, url=valkey_url)
    assert done.stdout.splitlines()[0].startswith("pipeline 'app' was opened before this process was forked"), done
    assert done.stdout.splitlines()[1] == "3 2"


async def test_a_frame_that_is_read_again_after_a_rewind_keeps_its_lease(anywhere: str) -> None:
    """Also when its first copy, which was partly committed before, ends meanwhile."""
    app, calls, go = Pipeline("app", anywhere), list[int](), [asyncio.Event() for _ in range(4)]

    @app.subscriber(numbers, group="g", concurrency=3)
    async def work(event: Number) -> None:
        calls.append(event.n)
        await go[len(calls) - 1].wait()

    async with app, serving(app):
        await app.publish(numbers, [Number(n=0), Number(n=1)])
        await until(lambda: calls == [0, 1])
        ((router, metrics),) = app._routers
        go[0].set()
        await until(lambda: metrics.handled == 1)
        assert await app.rewind("numbers", "g", 60) == 2
        await until(lambda: calls == [0, 1, 0, 1])
        go[1].set()
        await until(lambda: metrics.handled == 2)
        await asyncio.sleep(0.05)
        assert router.holding().leases == 1
        for each in go:
            each.set()
        ledger = await idle(app, numbers)
        assert (ledger.groups["g"].handled, router.holding().leases, router.flow.events) == (2, 0, 0)
