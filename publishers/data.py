"""Streams data as events: handwritten digits, rows of a file, or lines of JSON from stdin.

python -m publishers.data --rate 50            real handwritten digits that no trainer has seen, for ever
python -m publishers.data --file sales.csv     rows of a CSV, Parquet or NPY file, as fast as they are taken
tail -f log | python -m publishers.data --stdin --channel readings
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import Channel, Pipeline, PipelineError, Tensor, catalog
from pipeline.blocking import BlockingPipeline
from pipeline.errors import PublishError

from .command import fail, insist, opened, opened_blocking, paced, positive, run, start_logging
from .datasets import digits
from .directory import BadEvent, Directory
from .rows import read_rows, record_of

__all__ = ["digit_events", "main", "publish_lines", "stream"]


def digit_events(seed: int = 0) -> Iterator[catalog.Digit]:
    """Held-out digits without end: each epoch shows every one of them once, in an order set by the seed."""
    part = digits().held_out
    order = np.random.default_rng(seed)
    while True:
        for index in order.permutation(len(part)):
            yield catalog.Digit(image=Tensor(part.images[index]), label=int(part.labels[index]))


async def stream(
    app: Pipeline, channel: Channel[Any], events: Iterator[Any], *, rate: float = 0.0, count: int | None = None
) -> int:
    """Publish events at `rate` a second (0: as fast as Redis takes them). Returns how many there were."""
    published = 0
    async for due in paced(rate, count, app):
        part = list(islice(events, due))
        if not part:
            break
        await insist(lambda part=part: app.publish(channel, part), f"publishing to {channel.name!r}")  # type: ignore[misc]
        published += len(part)
    return published


def publish_lines(app: Pipeline, pipe: BlockingPipeline, name: str, lines: Iterator[str | bytes]) -> int:
    """Publish each line of JSON (bytes: UTF-8) on the channel `name`; one that does not fit is reported and left out.

    Returns how many were left out. Raises UnknownChannel before the first line.
    """
    known = pipe.call(Directory(app).find(name))
    refused = 0
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            event = _record(number, line) if known.channel is catalog.records else known.parse(line)
            pipe.publish(known.channel, event)
        except (BadEvent, PublishError) as error:
            refused += 1
            print(f"line {number + 1} is left out: {error}", file=sys.stderr)
    return refused


def _record(number: int, line: str | bytes) -> catalog.Record:
    try:
        values = json.loads(line if isinstance(line, str) else line.decode())
    except (ValueError, RecursionError) as error:
        raise BadEvent(f"not JSON: {error}") from None
    try:
        return record_of("stdin", number, values)
    except ValueError as error:
        raise BadEvent(str(error)) from None


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m publishers.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--file", type=Path, metavar="PATH", help=(
        f"publish a file's rows on channel {catalog.records.name!r} and end: .csv and .parquet rows as values by "
        "column, .npy rows as one tensor each"
    ))  # fmt: skip
    what.add_argument("--stdin", action="store_true", help="publish lines of JSON from stdin until it ends")
    parser.add_argument("--channel", default=catalog.records.name, metavar="NAME", help=(
        "with --stdin: the channel, which a running process must have declared (default: %(default)s, "
        "whose lines are flat JSON objects of any shape)"
    ))  # fmt: skip
    parser.add_argument("--rate", type=positive, metavar="N", help=(
        "events a second (default: 50 for digits, as fast as Redis takes them for a file)"
    ))  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="the order of the digits (default: %(default)s)")
    parser.add_argument(
        "--count", type=int, metavar="N", help="end after so many events (default: never, or the file's end)"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _arguments().parse_args(arguments)
    if options.stdin:
        return _lines_from_stdin(options.channel)
    channel: Channel[Any] = catalog.records if options.file else catalog.digits
    rate = options.rate or (0.0 if options.file else 50.0)

    async def work() -> None:
        events: Iterator[Any] = read_rows(options.file) if options.file else digit_events(options.seed)
        async with opened(Pipeline("data")) as app:
            published = await stream(app, channel, events, rate=rate, count=options.count)
            print(f"published {published} events on channel {channel.name!r}")

    return run(work)


def _lines_from_stdin(name: str) -> int:
    try:
        start_logging()
        app = Pipeline("data")
        with opened_blocking(app) as pipe:
            lines = iter(sys.stdin.buffer.readline, b"") if sys.stdin is not None else iter(())  # None: it was closed
            return 1 if publish_lines(app, pipe, name, lines) else 0
    except PipelineError as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
