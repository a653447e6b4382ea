"""What `@app.subscriber` declares, checked when it is declared."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .batching import Batch
from .channel import Channel, check_name, is_count, is_time
from .errors import LONGEST_DELAY, ConfigurationError
from .events import Event
from .executors import RunIn, is_async
from .message import Message
from .retries import RetryPolicy

__all__ = ["Subscriber", "declare"]


@dataclass(frozen=True, slots=True)
class Subscriber:
    """One handler's subscription: everything about it that does not change while it runs."""

    channel: Channel[Any]
    group: str
    handler: Callable[[Any], Any]
    publishes: tuple[Channel[Any], ...]
    batch: Batch | None
    concurrency: int
    retry: RetryPolicy
    lease: float
    run_in: RunIn
    ordered: bool
    start: Literal["oldest", "latest"]
    messages: bool
    """The handler wants Messages, not bare events."""

    @property
    def least(self) -> int:
        """Events needed to fill the handlers once."""
        return self.concurrency * (self.batch.size if self.batch else 1)


def declare(
    handler: Callable[[Any], Any],
    channel: Channel[Any],
    *,
    group: str,
    publishes: Channel[Any] | Sequence[Channel[Any]] | None,
    batch: Batch | None,
    concurrency: int,
    retry: RetryPolicy,
    lease: float,
    run_in: RunIn | None,
    ordered: bool,
    start: Literal["oldest", "latest"],
) -> Subscriber:
    """Check a declaration. Raises ConfigurationError saying what to change."""
    if not isinstance(channel, Channel):
        raise ConfigurationError(f"subscriber(channel, …): {channel!r} is not a Channel")
    where = f"subscriber {getattr(handler, '__name__', handler)!r} of {channel.name!r}"
    check_name("group", group)
    messages = _wants_messages(handler, where)
    run_in = run_in or ("loop" if is_async(handler) else "thread")
    if run_in not in ("loop", "thread", "process"):
        raise ConfigurationError(f"{where}: run_in is 'loop', 'thread' or 'process', not {run_in!r}")
    if is_async(handler) and run_in != "loop":
        raise ConfigurationError(f"{where}: an async handler runs in the loop; make it a plain function for {run_in!r}")
    if not is_count(concurrency):
        raise ConfigurationError(f"{where}: concurrency is a whole number, at least 1, not {concurrency!r}")
    if not isinstance(retry, RetryPolicy):
        raise ConfigurationError(f"{where}: retry is a RetryPolicy(attempts, base, cap), not {retry!r}")
    if ordered and batch is not None:
        raise ConfigurationError(
            f"{where}: ordered=True handles the events of a key one after the other; leave batch= out"
        )
    if not (is_time(lease) and 0.1 <= lease < LONGEST_DELAY):
        raise ConfigurationError(f"{where}: a lease is in seconds, at least 0.1 and less than ten years, not {lease!r}")
    if start not in ("oldest", "latest"):
        raise ConfigurationError(f"{where}: start is 'oldest' or 'latest', not {start!r}")
    targets = _targets(publishes, where)
    kinds = [target.type for target in targets]
    if len(set(kinds)) != len(kinds):
        raise ConfigurationError(
            f"{where}: two of the channels it publishes carry the same type, so none can be chosen"
        )
    if batch is not None and not isinstance(batch, Batch):
        raise ConfigurationError(f"{where}: batch is a Batch(size, wait), not {batch!r}")
    if batch is not None and batch.as_ == "columns" and (messages or not issubclass(channel.type, Event)):
        raise ConfigurationError(
            f"{where}: columns are the fields of Events; of Messages, str, bytes and dict are none"
        )
    return Subscriber(
        channel, group, handler, targets, batch, concurrency, retry, lease, run_in, ordered, start, messages,
    )  # fmt: skip


def _targets(publishes: Any, where: str) -> tuple[Channel[Any], ...]:
    if publishes is None:
        return ()
    several = isinstance(publishes, Iterable) and not isinstance(publishes, str)
    targets = tuple(publishes) if several else (publishes,)
    for target in targets:
        if not isinstance(target, Channel):
            raise ConfigurationError(f"{where}: publishes is a Channel, or a list of them; {target!r} is none")
    return targets


def _wants_messages(handler: Callable[[Any], Any], where: str) -> bool:
    if not callable(handler):
        raise ConfigurationError(f"{where}: it is not a function")
    for function in (handler, type(handler).__call__):
        if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
            raise ConfigurationError(
                f"{where}: a handler returns what it publishes, an event or a list; it has no `yield`"
            )
    try:
        inspect.signature(handler, follow_wrapped=False).bind(None)
    except TypeError:
        raise ConfigurationError(f"{where}: the handler takes one argument, the event (or a batch of them)") from None
    except ValueError:  # written in C, and says nothing of its parameters
        return False
    parameter = next(iter(inspect.signature(handler).parameters.values()), None)  # of what a decorator is around
    if parameter is None:
        return False
    try:
        annotation = typing.get_type_hints(handler).get(parameter.name)
    except (NameError, TypeError):
        annotation = parameter.annotation
    if isinstance(annotation, str):
        return "Message[" in annotation or annotation.endswith("Message")
    return _is_of_messages(annotation)


def _is_of_messages(annotation: Any) -> bool:
    """Message, or any collection of them."""
    return (
        annotation is Message
        or typing.get_origin(annotation) is Message
        or any(map(_is_of_messages, typing.get_args(annotation)))
    )
