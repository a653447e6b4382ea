"""What cannot work is refused where it is declared, with what to change."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from pipeline import Batch, Channel, Event, Message, Pipeline, RetryPolicy
from pipeline.errors import ConfigurationError


class Number(Event):
    n: int


numbers, squares = Channel("numbers", Number), Channel("squares", Number)
WRONG_TIMES = [math.nan, math.inf, -1, "3", None, True]
WRONG_COUNTS = [0, 1.5, "2", True, None, math.nan]


def handler(event: Number) -> None:
    """Nothing to do."""


@pytest.mark.parametrize("seconds", WRONG_TIMES)
def test_a_time_that_is_none_is_refused(seconds: Any) -> None:
    with pytest.raises(ConfigurationError, match="keep is in seconds"):
        Channel("c", Number, keep=seconds)
    for name in ("base", "cap"):
        with pytest.raises(ConfigurationError, match="base and cap are in seconds"):
            RetryPolicy(**{name: seconds})
    with pytest.raises(ConfigurationError, match="wait is in seconds"):
        Batch(2, wait=seconds)
    with pytest.raises(ConfigurationError, match="a lease is in seconds"):
        Pipeline("app").subscriber(numbers, group="g", lease=seconds)(handler)


@pytest.mark.parametrize("count", WRONG_COUNTS)
def test_a_number_that_counts_nothing_is_refused(count: Any) -> None:
    for name in ("frame", "partitions"):
        with pytest.raises(ConfigurationError, match=f"{name} must be between 1 and"):
            Channel("c", Number, **{name: count})
    with pytest.raises(ConfigurationError, match="attempts is a whole number"):
        RetryPolicy(attempts=count)
    with pytest.raises(ConfigurationError, match="size is a whole number"):
        Batch(count)
    with pytest.raises(ConfigurationError, match="concurrency is a whole number"):
        Pipeline("app").subscriber(numbers, group="g", concurrency=count)(handler)


def test_what_is_just_right_is_taken() -> None:
    Channel("c", Number, keep=0, frame=65536, partitions=1024)
    assert RetryPolicy(attempts=1, base=0, cap=0).delay(1) == 0
    Batch(1, wait=0)
    Pipeline("app").subscriber(numbers, group="g", lease=0.1, publishes={squares})(handler)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"retry": 5}, "retry is a RetryPolicy"),
        ({"batch": 5}, "batch is a Batch"),
        ({"publishes": "squares"}, "'squares' is none"),
        ({"publishes": [squares, 5]}, "5 is none"),
        ({"publishes": 5}, "5 is none"),
        ({"lease": 0.05}, "at least 0.1"),
    ],
)
def test_an_option_of_another_kind_is_refused(options: Any, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        Pipeline("app").subscriber(numbers, group="g", **options)(handler)


def yields(event: Number) -> Iterator[Number]:
    yield event


async def yields_later(event: Number) -> AsyncIterator[Number]:
    yield event


class Yields:
    async def __call__(self, event: Number) -> AsyncIterator[Number]:
        yield event


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (yields, "has no `yield`"),
        (yields_later, "has no `yield`"),
        (Yields(), "has no `yield`"),
        (5, "not a function"),
        (lambda: None, "takes one argument"),
        (lambda event, more: None, "takes one argument"),
    ],
)
def test_a_handler_that_could_not_be_called_is_refused(function: Any, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        Pipeline("app").subscriber(numbers, group="g")(function)


def test_a_decorator_decides_what_its_handler_is_called_with() -> None:
    app = Pipeline("app")

    def decorated(function: Callable[..., Any]) -> Any:
        return functools.wraps(function)(lambda *arguments: function(*arguments[:1]))

    for number, function in enumerate((lambda event, more: None, lambda: None)):
        app.subscriber(numbers, group=f"g{number}")(decorated(function))
    assert not any(subscriber.messages for subscriber in app.subscribers)


def messages(batch: list[Message[Number]]) -> None: ...
def a_sequence(batch: Sequence[Message[Number]]) -> None: ...
def an_iterable(batch: Iterable[Message[Number]]) -> None: ...
def a_tuple(batch: tuple[Message[Number], ...]) -> None: ...
def either(batch: list[Message[Number]] | None) -> None: ...
def bare(batch: list[Message]) -> None: ...  # type: ignore[type-arg]
def events(batch: Sequence[Number]) -> None: ...


@pytest.mark.parametrize("function", [messages, a_sequence, an_iterable, a_tuple, either, bare, events])
def test_messages_are_asked_for_by_any_collection_of_them(function: Callable[[Any], None]) -> None:
    app = Pipeline("app")
    app.subscriber(numbers, group="g", batch=Batch(2))(function)
    assert app.subscribers[0].messages == (function is not events)


async def test_what_is_no_channel_is_refused_by_every_verb() -> None:
    name: Any = "numbers"
    with pytest.raises(ConfigurationError, match="'numbers' is not a Channel"):
        Pipeline("app").subscriber(name, group="g")(handler)
    async with Pipeline("app", "memory://declarations") as app:
        for verb in (app.publish, app.request):
            with pytest.raises(ConfigurationError, match="'numbers' is not a Channel"):
                await verb(name, Number(n=1))
        with pytest.raises(ConfigurationError, match="'numbers' is not a Channel"):
            app.watch(name)


@pytest.mark.parametrize("seconds", [None, "5", math.nan])
async def test_a_timeout_that_is_none_is_refused(seconds: Any) -> None:
    async with Pipeline("app", "memory://declarations") as app:
        with pytest.raises(ConfigurationError, match=r"timeout=.*: in seconds"):
            await app.request(Channel("questions", Number, reply=Number), Number(n=1), timeout=seconds)


@pytest.mark.parametrize("when", [timedelta(minutes=5), datetime.now(UTC).date(), [], b"5m"])
async def test_a_time_of_another_kind_is_refused(when: Any) -> None:
    async with Pipeline("app", "memory://declarations") as app:
        with pytest.raises(ConfigurationError, match="since="):
            app.watch(numbers, when)
        with pytest.raises(ConfigurationError, match="delay="):
            await app.publish(numbers, Number(n=1), delay=when)


async def test_the_longest_name_leaves_room_for_its_dead_letters() -> None:
    with pytest.raises(ConfigurationError, match="at most 195 characters"):
        Channel("a" * 196, Number)
    app = Pipeline("app", "memory://declarations")
    app.subscriber(Channel("a" * 195, Number), group="g")(handler)
    serving = asyncio.create_task(app.serve())
    await asyncio.wait_for(app.ready.wait(), 5)
    app.stop()
    await serving
