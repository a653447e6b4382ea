"""Stress a gateway: `pipeline stress picture.jpg [more…]`, closed loop or at a given rate, and what came of it.

pipeline stress cat.jpg --requests 500 --pause 0.05           # one after the other, as fast as answers come
pipeline stress cat.jpg --rate 200 --seconds 30               # open loop: arrivals do not wait for answers
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
from pydantic_core import from_json

from pipeline.cli import Number
from pipeline.errors import ConfigurationError, PipelineError
from pipeline.settings import settings

__all__ = ["Outcome", "stress", "stress_test"]

TYPES = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".npy": "application/x-npy",
}
MOST_OPEN = 1000
COUNT = click.IntRange(1)
POSITIVE = Number(min=0, min_open=True)


@dataclass
class Outcome:
    """What a stress test saw. Latencies are in seconds, of answers with status 200."""

    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    labels: Counter[str] = field(default_factory=Counter)
    refusals: list[float] = field(default_factory=list)
    """Latencies of 429s; in a closed loop their requests are asked again."""
    batches: list[int] = field(default_factory=list)
    """Size of the batch each answer was computed in."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why requests were lost."""
    seconds: float = 0.0

    @property
    def lost(self) -> int:
        """Requests without any answer, or with one that is not a gateway's."""
        return self.reasons.total()

    def add(self, other: Outcome) -> None:
        """What another test at the same time saw."""
        self.statuses += other.statuses
        self.labels += other.labels
        self.latencies += other.latencies
        self.refusals += other.refusals
        self.batches += other.batches
        self.reasons += other.reasons
        self.seconds = max(self.seconds, other.seconds)

    def quantile(self, q: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else math.nan

    def summary(self) -> dict[str, object]:
        """For `--json`."""
        return {
            "requests": self.statuses.total() + self.lost,
            "refusals": len(self.refusals),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "lost": self.lost,
            "reasons": dict(self.reasons.most_common(5)),
            "seconds": round(self.seconds, 3),
            "rate": round(self.statuses[200] / self.seconds, 2) if self.seconds else 0.0,
            "p50_ms": round(1000 * self.quantile(0.5), 2) if self.latencies else None,
            "p99_ms": round(1000 * self.quantile(0.99), 2) if self.latencies else None,
            "mean_ms": round(1000 * statistics.fmean(self.latencies), 2) if self.latencies else None,
            "mean_batch": round(statistics.fmean(self.batches), 2) if self.batches else None,
            "labels": dict(self.labels.most_common(5)),
        }


class _Connections:
    """Keep-alive connections to one gateway, reused in turn."""

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            self.host, self.port = parts.hostname or "", parts.port or 80
        except ValueError as error:
            raise ConfigurationError(f"{url!r}: {error}") from None
        if parts.scheme != "http" or not self.host:
            raise ConfigurationError(f"{url!r}: expected http://host:port/path")
        self.path = (parts.path or "/predict") + (f"?{parts.query}" if parts.query else "")
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, kind: str, body: bytes, deadline: float | None) -> tuple[int, bytes, float]:
        """Status, body, and seconds after which to ask again. A gateway may close what was idle: then it is asked on a
        new connection. Raises OSError, EOFError; ValueError for what is not HTTP."""
        while self._idle:
            reader, writer = self._idle.pop()
            if reader.at_eof() or writer.is_closing():
                writer.close()
                continue
            try:
                return await self._ask(reader, writer, kind, body, deadline)
            except (OSError, EOFError):
                break
        return await self._ask(*await asyncio.open_connection(self.host, self.port), kind, body, deadline)

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: str, body: bytes, deadline: float | None
    ) -> tuple[int, bytes, float]:
        try:
            extra = f"x-deadline: {deadline:g}\r\n" if deadline is not None else ""
            token = settings().token
            if token is not None:
                extra += f"authorization: Bearer {token.get_secret_value()}\r\n"
            writer.write(
                f"POST {self.path} HTTP/1.1\r\nhost: {self.host}\r\ncontent-type: {kind}\r\n{extra}"
                f"content-length: {len(body)}\r\n\r\n".encode()
                + body
            )
            try:
                status, fields = _parsed(await reader.readuntil(b"\r\n\r\n"))
                answer = await _body(reader, fields)
            except (ValueError, IndexError, asyncio.LimitOverrunError):
                raise ValueError("an answer is not HTTP") from None
        except BaseException:
            writer.close()
            raise
        if fields.get("connection", "").lower() == "close":
            writer.close()
        else:
            self._idle.append((reader, writer))
        return status, answer, _pause(fields.get("retry-after", ""))

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


def _parsed(head: bytes) -> tuple[int, dict[str, str]]:
    """Status, and the fields by their names in lower case."""
    first, *lines = head.decode("latin-1").split("\r\n")
    fields = (line.partition(":") for line in lines)
    return int(first.split()[1]), {name.strip().lower(): value.strip() for name, _, value in fields}


async def _body(reader: asyncio.StreamReader, fields: Mapping[str, str]) -> bytes:
    """As long as it says, or in chunks, as proxies like to send what they have changed, or up to the end."""
    if "chunked" in fields.get("transfer-encoding", "").lower():
        return await _chunks(reader)
    return await (reader.readexactly(int(fields["content-length"])) if "content-length" in fields else reader.read())


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    parts = []
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        parts.append(await reader.readexactly(size))
        await reader.readuntil(b"\r\n")
    while await reader.readuntil(b"\r\n") != b"\r\n":  # fields that follow
        pass
    return b"".join(parts)


def _pause(text: str) -> float:
    """Seconds that a Retry-After asks for: a number of them, or a date."""
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):  # the latter: it names no time zone
        return 1.0


def _prediction(answer: bytes) -> tuple[int, str | None]:
    """The size of the batch it was computed in, and its first label. Raises ValueError."""
    try:
        found = from_json(answer)
        batch, predictions = found.get("batch", 1), found.get("predictions")
        return int(batch), str(predictions[0]["label"]) if predictions else None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError):
        raise ValueError("an answer is no prediction in JSON") from None


def _reason(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "the connection was closed before the answer's end"
    return str((isinstance(error, OSError) and error.strerror) or error)


async def stress_test(
    url: str,
    bodies: Sequence[tuple[str, bytes]],
    *,
    requests: int = 500,
    clients: int = 1,
    pause: float = 0.0,
    rate: float | None = None,
    seconds: float | None = None,
    deadline: float | None = None,
) -> Outcome:
    """Ask `url` with (content type, body) in turn: `requests` of them by so many `clients`, who ask again when
    a 429 says that they may, or with `rate` (per second, open loop: a slow answer holds up no other request) for
    `seconds`."""
    connections, outcome = _Connections(url), Outcome()
    turn = itertools.cycle(bodies)

    async def one(began: float) -> None:
        kind, body = next(turn)
        try:
            status, answer, after = await connections.ask(kind, body, deadline)
            while status == 429 and rate is None:
                outcome.refusals.append(time.perf_counter() - began)
                await asyncio.sleep(after * random.uniform(1.0, 2.0))  # not all at once, as they were refused
                began = time.perf_counter()
                status, answer, after = await connections.ask(kind, body, deadline)
            elapsed = time.perf_counter() - began
            batch, label = _prediction(answer) if status == 200 else (0, None)
        except (OSError, EOFError, ValueError) as error:
            outcome.reasons[_reason(error)] += 1
            return
        outcome.statuses[status] += 1
        if status == 200:
            outcome.latencies.append(elapsed)
            outcome.batches.append(batch)
            if label is not None:
                outcome.labels[label] += 1
        elif status == 429:
            outcome.refusals.append(elapsed)

    began = time.perf_counter()
    if rate is not None:
        await _at_rate(one, rate, seconds or 10.0)
    else:
        left = itertools.count()

        async def client() -> None:
            while next(left) < requests:
                await one(time.perf_counter())
                await asyncio.sleep(pause)

        await asyncio.gather(*(client() for _ in range(clients)))
    outcome.seconds = time.perf_counter() - began
    await connections.close()
    return outcome


async def _at_rate(one: Callable[[float], Coroutine[Any, Any, None]], rate: float, seconds: float) -> None:
    """Evenly spaced arrivals; late ones at once, and timed from when they were due: a stall shows in the latencies."""
    tasks: set[asyncio.Task[None]] = set()
    began = time.perf_counter()
    for number in range(max(1, int(rate * seconds))):
        due = began + number / rate
        delay = due - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        while len(tasks) >= MOST_OPEN:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(one(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--url", help="what to ask; default: /predict of the gateway on this host")
@click.option("--requests", type=COUNT, default=500, show_default=True, help="closed loop: how many")
@click.option("--clients", type=COUNT, default=1, show_default=True, help="closed loop: at the same time")
@click.option("--pause", type=Number(min=0), default=0.05, show_default=True, help=(
    "closed loop: seconds between two of a client's"
))  # fmt: skip
@click.option("--rate", type=POSITIVE, help="open loop: requests a second, whatever comes back")
@click.option("--seconds", type=POSITIVE, default=10.0, show_default=True, help="open loop: for how long")
@click.option("--deadline", type=POSITIVE, help="seconds after which an answer is of no use")
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def stress(
    files: tuple[Path, ...], url: str | None, requests: int, clients: int, pause: float, rate: float | None,
    seconds: float, deadline: float | None, as_json: bool,
) -> None:  # fmt: skip
    """Send pictures (or .npy arrays) to a gateway and print latencies, statuses and labels."""
    unknown = [str(path) for path in files if path.suffix.lower() not in TYPES]
    if unknown:
        raise click.UsageError(f"{', '.join(unknown)}: expected {', '.join(TYPES)}")
    bodies = [(TYPES[path.suffix.lower()], path.read_bytes()) for path in files]
    target = url or f"http://{settings().gateway_host}:{settings().gateway_port}/predict"
    outcome = asyncio.run(
        stress_test(
            target,
            bodies,
            requests=requests,
            clients=clients,
            pause=pause,
            rate=rate,
            seconds=seconds,
            deadline=deadline,
        )
    )
    summary = outcome.summary()
    if as_json:
        click.echo(json.dumps(summary))
    else:
        for name, value in summary.items():
            click.echo(f"{name:10} {value}")
        click.echo(_histogram(outcome.latencies))
    if outcome.lost:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in outcome.reasons.most_common(3))
        raise PipelineError(f"{outcome.lost} of {summary['requests']} requests were lost: {reasons}")


def _histogram(latencies: Sequence[float]) -> str:
    """Counts by latency, three bins an octave, as bars."""
    bins = Counter(math.floor(3 * math.log2(1000 * value)) for value in latencies)
    if not bins:
        return ""
    most = max(bins.values())
    return "\n".join(
        f"{2 ** (index / 3):9.2f} ms {'█' * math.ceil(40 * bins[index] / most)} {bins[index]}"
        for index in range(min(bins), max(bins) + 1)
    )
