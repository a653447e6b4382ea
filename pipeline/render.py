"""How the command line shows things: JSON lines for pipes, tables for people."""

from __future__ import annotations

import io
import json
import re
from typing import Any

from rich.console import Console
from rich.table import Table

from .deadletters import DeadLetter, describe
from .frame import outline, preview
from .ledger import Ledger
from .message import Message, trace_of

__all__ = ["json_line", "ledger", "letter", "letter_json", "line"]

MOST_TEXT = 400
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""What a terminal obeys or turns around instead of showing it, and what ends a line."""


def json_line(message: Message[Any], data: Any, kind: str) -> str:
    """One JSON object; names follow CloudEvents, beside `channel`, `attempt` and `headers`."""
    return json.dumps(
        {
            "specversion": "1.0",
            "id": message.id,
            "source": message.source,
            "type": kind,
            "time": message.time.isoformat(),
            "subject": message.key,
            **trace_of(message.headers),
            "channel": message.channel,
            "attempt": message.attempt,
            "headers": dict(message.headers),
            "data": data,
        }
    )


def line(message: Message[Any], data: Any, kind: str) -> str:
    text = data if isinstance(data, str) else json.dumps(outline(data))
    if len(text) > MOST_TEXT:
        text = f"{text[:MOST_TEXT]} …"
    key = f" [{message.key}]" if message.key else ""
    return _plain(f"{message.time.astimezone():%H:%M:%S.%f} {kind} {message.source}{key} {text}")


def _plain(text: str) -> str:
    """Anybody's words, as they may go to a terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def ledger(before: Ledger, now: Ledger, everything: bool) -> str:
    """Two looks make rates."""
    seconds = max(1e-3, now.time - before.time)
    table = Table(box=None, header_style="bold", pad_edge=False)
    columns = ("channel", "group", "published", "/s", "handled", "/s", "dead", "retried", "pending", "lag", "oldest")
    for name in columns:
        is_name = name in ("channel", "group")  # without a space, so it does not wrap but loses its end
        table.add_column(name, justify="left" if is_name else "right", no_wrap=not is_name, overflow="ellipsis")
    table.add_column("workers", justify="right", no_wrap=True)
    table.add_column("ledger", no_wrap=True)
    for name, channel in now.channels.items():
        if name.startswith("pipeline.") and not everything:
            continue
        if not everything and name.endswith(".dead") and not channel.published:
            continue
        old = before.channels.get(name, channel)
        rate = f"{(channel.published - old.published) / seconds:,.0f}"
        if not channel.groups:
            table.add_row(_plain(name), "", f"{channel.published:,}", rate)
        for group, one in channel.groups.items():
            handled = (one.handled - old.groups.get(group, one).handled) / seconds
            difference = one.difference(channel.published)
            balance = "" if not channel.durable else "balances" if difference == 0 else f"off by {difference:+,}"
            balance += ", paused" if one.paused else ""
            numbers = (one.handled, handled, one.dead, one.retried, one.pending, one.lag)
            table.add_row(
                _plain(name), _plain(group), f"{channel.published:,}", rate, *(f"{number:,.0f}" for number in numbers),
                f"{one.oldest:.1f} s", str(one.consumers), balance,
            )  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=180, markup=False).print(table)
    return "\n".join(text.rstrip() for text in out.getvalue().splitlines())


def letter(message: Message[DeadLetter]) -> str:
    one = message.event
    events = preview(one.original)
    text = json.dumps(outline(events[0] if isinstance(events, list) and len(events) == 1 else events))
    head = f"{message.time.astimezone():%Y-%m-%d %H:%M:%S} {one.group} {one.event_id} after {one.attempts} attempts"
    trace = one.traceback.rstrip().splitlines()[-6:]
    rows = [*f"{head}: {one.reason}".splitlines(), text[:MOST_TEXT], *trace]
    return "\n    ".join(map(_plain, rows))


def letter_json(message: Message[DeadLetter]) -> str:
    return json.dumps(describe(message))
