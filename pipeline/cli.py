"""The command line. Each verb is short: what it does is elsewhere; here it is asked for, and shown.

Exit status: 0 done · 1 it failed (one line says why) · 2 wrong usage or bad input · 3 `watch` saw too few in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from codecs import BOM_UTF8
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from datetime import UTC, datetime
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click

from . import render
from .app import Pipeline
from .channel import Channel
from .deadletters import internal
from .errors import (
    ConfigurationError,
    EventTypeError,
    FrameError,
    PipelineError,
    ServerUnavailable,
    UnknownChannel,
)
from .message import Message, Receipt
from .registry import Record
from .server import supervise
from .settings import redact, settings
from .supervisor import BACKOFF, HEALTHY_SECONDS
from .supervisor import up as supervise_processes
from .transports.client import ReplyError
from .watchdog import watchdog
from .watching import position

__all__ = ["Number", "cli", "main"]

BAD_INPUT = 2
TOO_FEW = 3
CHUNK = 64 << 10
"""Bytes of stdin that are read at once."""
LOOK = 0.2
"""Seconds between two looks for a channel that nobody has registered yet."""


class Number(click.FloatRange):
    """A finite number, perhaps in a range: click's own lets nan pass everywhere."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return number


class _Unread(Exception):
    """Raised for a BrokenPipeError, which click answers with status 1: whoever read our output has seen enough."""


@contextlib.contextmanager
def _unread() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise _Unread from None


class _Verbs(click.Group):
    """Verbs in the order of the documentation, and those that other packages add; a broken one harms no other."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        with _unread():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _unread():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.commands, *(point.name for point in entry_points(group="pipeline.commands"))]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in self.commands:
            return self.commands[name]
        for point in entry_points(group="pipeline.commands"):
            if point.name == name:
                try:
                    command = point.load()
                except Exception as error:  # somebody else's code
                    raise click.ClickException(f"verb {name!r} of {point.value} cannot be loaded: {error}") from error
                return command if isinstance(command, click.Command) else None
        return None


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--url", metavar="URL", help="Redis; else PIPELINE_REDIS_URL, else redis://127.0.0.1:6379/0.")
@click.version_option(package_name="redis-ml-pipeline", prog_name="pipeline")
@click.pass_context
def cli(ctx: click.Context, url: str | None) -> None:
    """Event-driven pipelines for machine learning, on Redis and Valkey."""
    if url:
        os.environ["PIPELINE_REDIS_URL"] = url
        settings.cache_clear()
    ctx.obj = url


def main() -> None:
    """The entry point: an error of ours is one line, never a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack characters; see stderr
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except _Unread:
        _give_up_stdout()
        sys.exit(0)
    except (EventTypeError, ConfigurationError) as error:
        _complain(error)
        sys.exit(BAD_INPUT)
    except UnicodeEncodeError as error:
        _complain(ValueError(f"{error.object!r} is not {error.encoding} text"))
        sys.exit(BAD_INPUT)
    except PipelineError as error:
        _complain(error)
        sys.exit(1)
    except ReplyError as error:
        _complain(PipelineError(f"Redis refuses: {error}"))
        sys.exit(1)
    except OSError as error:
        _complain(error)
        _give_up_stdout()
        sys.exit(1)


def _give_up_stdout() -> None:
    """Python would write at its end what it could not write before."""
    if sys.stdout is not None:  # or nobody had opened it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(error: Exception) -> None:
    click.secho(f"pipeline: {error}", fg="red", err=True)


def _run(work: Callable[[Pipeline], Coroutine[Any, Any, Any]]) -> Any:
    async def opened() -> Any:
        async with Pipeline("cli") as app:
            return await work(app)

    return asyncio.run(opened())


# -- processes ---------------------------------------------------------------------------------------------------


@cli.command()
@click.option("--only", metavar="A,B", default="", help="Only these processes.")
@click.option("--scale", metavar="NAME=N", multiple=True, help="Run N of a process, e.g. --scale inference=2.")
@click.option("-f", "--procfile", type=click.Path(path_type=Path), default=Path("Procfile"), show_default=True)
def up(only: str, scale: tuple[str, ...], procfile: Path) -> None:
    """Run the Procfile's processes; a crashed one is restarted with backoff. Ctrl-C stops all.

    Example: pipeline up --only redis,dashboard,inference --scale inference=2
    """
    scales = {}
    for item in (part for one in scale for part in one.split(",")):
        name, _, count = item.partition("=")
        if not (count.isascii() and count.isdecimal()):
            raise click.BadParameter(f"{item!r}: use NAME=N", param_hint="--scale")
        scales[name] = int(count)
    names = [name.strip() for name in only.split(",") if name.strip()]
    sys.exit(supervise_processes(procfile, names, scales))


@cli.command()
@click.option("--data", type=click.Path(path_type=Path), help="Directory of the append-only file (PIPELINE_DATA_DIR).")
def server(data: Path | None) -> None:
    """Run the embedded Valkey in the foreground; idle while a Redis already answers at the URL.

    Example: pipeline server
    """
    config = settings()
    sys.exit(supervise(config.redis_url, data or config.data_dir))


@cli.command()
@click.argument("target", metavar="MODULE:APP")
@click.option("--workers", type=click.IntRange(1, 256), default=1, show_default=True, help="Processes.")
@click.option("--reload", is_flag=True, help="Restart when a Python file below the current directory changes.")
def serve(target: str, workers: int, reload: bool) -> None:
    """Run one app's subscribers until stopped. SIGTERM and Ctrl-C drain; a second one stops now.

    Example: pipeline serve subscribers.inference:app --workers 2
    """
    logging.basicConfig(level=settings().log_level, format="%(levelname)s %(name)s: %(message)s")
    sys.path.insert(0, str(Path.cwd()))
    app = _load(target)
    if workers == 1 and not reload:
        try:
            app.run()
        except Exception as error:
            raise error if isinstance(error, PipelineError) else PipelineError(_told(target, "failed", error)) from None
        return
    command = [sys.executable, "-m", "pipeline", "serve", target]
    sys.exit(_Workers(command, workers, reload).run())


def _load(target: str) -> Pipeline:
    module, _, name = target.partition(":")
    if not (module and name) or module.startswith(".") or module.endswith(".py") or "/" in module:
        raise ConfigurationError(f"{target!r}: say MODULE:APP, as in an import, e.g. subscribers.inference:app")
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # somebody else's code
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            raise ConfigurationError(f"{target!r}: {error}; is the current directory the right one?") from None
        raise ConfigurationError(_told(target, "cannot be loaded", error)) from None
    for part in name.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, Pipeline):
        raise ConfigurationError(f"{target!r}: {name!r} in {module} is {type(found).__name__}, not a Pipeline")
    return found


def _told(target: str, what: str, error: Exception) -> str:
    """One line, and where it was in the app's code: without the lines of ours, and Python's, that led there."""
    ours = tuple(str(Path(str(module.__file__)).parent) for module in (render, asyncio, importlib))
    place = error.__traceback__
    while place is not None and place.tb_frame.f_code.co_filename.startswith((*ours, "<frozen ", "uvloop")):
        place = place.tb_next
    error.__traceback__ = place if place or isinstance(error, SyntaxError) else error.__traceback__
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"{target!r} {what}: {reason}\n{''.join(traceback.format_exception(error)).rstrip()}"


class _Workers:
    """Several processes of one command. A dead one is started again; signals reach all; files may be watched."""

    def __init__(self, command: list[str], count: int, reload: bool) -> None:
        self._workers = [_Worker(command) for _ in range(count)]
        self._reload = reload
        self._stop = 0
        """The signal that asked for it."""

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        seen = _newest_change() if self._reload else 0.0
        while not self._stop:
            time.sleep(0.2)
            if self._reload and (now := _newest_change()) > seen:
                seen = now
                click.echo("reloading", err=True)
                self._signal_all(signal.SIGTERM)
                self._wait()
            for worker in self._workers:
                if not self._stop and worker.is_due():
                    worker.start()
                    if self._stop:  # which came before there was a process to tell
                        worker.tell(self._stop)
        self._wait()
        return 0

    def _on_signal(self, number: int, _: object) -> None:
        again, self._stop = self._stop, number
        self._signal_all(signal.SIGKILL if again else number)

    def _signal_all(self, number: int) -> None:
        for worker in self._workers:
            worker.tell(number)

    def _wait(self) -> None:
        for worker in self._workers:
            worker.process.wait()


class _Worker:
    """One of them: the present run, and when the next begins."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._backoff = BACKOFF[0]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command)
        watchdog().watch(self.process.pid)
        self._began, self._due = time.monotonic(), 0.0

    def is_due(self) -> bool:
        """It has ended, and is to be started again now."""
        if self.process.poll() is None:
            return False
        if not self._due:
            watchdog().forget(self.process.pid)
            self._due = time.monotonic() + self._delay()
        return time.monotonic() >= self._due

    def _delay(self) -> float:
        status = self.process.returncode
        if status in (0, -signal.SIGTERM):
            return 0.0
        delay = BACKOFF[0] if time.monotonic() - self._began > HEALTHY_SECONDS else self._backoff
        self._backoff = min(BACKOFF[1], delay * 2)
        click.echo(f"worker {self.process.pid} ended with status {status}; starting another in {delay:g} s", err=True)
        return delay

    def tell(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)


def _newest_change() -> float:
    hidden = {".venv", ".git", "__pycache__", "node_modules"}
    newest = 0.0
    for folder, folders, names in os.walk("."):
        folders[:] = [name for name in folders if name not in hidden]
        for name in names:
            if name.endswith(".py"):
                with contextlib.suppress(OSError):  # gone meanwhile, or a link to nowhere, as some editors lock files
                    newest = max(newest, (Path(folder) / name).stat().st_mtime)
    return newest


# -- events ------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("channel")
@click.argument("event", metavar="JSON")
@click.option("--key", help="Orders events of one key, and chooses the partition.")
@click.option("--delay", type=Number(min=0), help="Seconds before any subscriber sees it.")
def publish(channel: str, event: str, key: str | None, delay: float | None) -> None:
    """Publish a JSON event, validated against the channel's registered schema; '-' reads one JSON a line from stdin.

    Example: pipeline publish readings '{"sensor": "attic", "value": 21.5}' --key attic
    """
    if internal(channel):
        raise ConfigurationError(f"channel {channel!r} is the framework's own; it can be watched, not written")

    async def work(app: Pipeline) -> int:
        record = await app.registry.record(channel)
        target = record.channel()
        refused = 0
        async for number, line in _lines(event):
            try:
                value = record.parse(line)
                receipt: Receipt = await app.publish(target, value, key=key, delay=delay)
            except (EventTypeError, ValueError) as error:
                if event != "-":
                    raise EventTypeError(str(error)) from None
                refused += 1
                _complain(EventTypeError(f"line {number} is left out: {error}"))
                continue
            click.echo(receipt.id)
        return refused

    if _run(work):
        sys.exit(BAD_INPUT)


async def _lines(event: str) -> AsyncGenerator[tuple[int, str | bytes]]:
    if event != "-":
        yield 1, event
        return
    number = 0
    async for line in _stdin():  # as bytes: a line that is no text costs itself alone
        number += 1
        if number == 1:
            line = line.removeprefix(BOM_UTF8)
        if line.strip():
            yield number, line.rstrip(b"\r")


async def _stdin() -> AsyncGenerator[bytes]:
    """Its lines. A thread that nobody waits for reads them: while none comes the loop goes on, and Ctrl-C ends it.

    Raises OSError."""
    if sys.stdin is None:  # whoever started us has closed it
        return
    loop, descriptor, room = asyncio.get_running_loop(), sys.stdin.fileno(), threading.Semaphore()
    chunks: asyncio.Queue[bytes | OSError] = asyncio.Queue()

    def read() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            while room.acquire():  # after the last chunk for ever
                try:  # not by sys.stdin's buffer: Python cannot end while a thread holds the lock of that
                    chunk: bytes | OSError = os.read(descriptor, CHUNK)
                except OSError as error:
                    chunk = error
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)

    threading.Thread(target=read, name="stdin", daemon=True).start()
    begun: list[bytes] = []
    while chunk := await chunks.get():
        if isinstance(chunk, OSError):
            raise chunk
        room.release()
        end, *more = chunk.split(b"\n")
        begun.append(end)
        for begin in more:
            yield b"".join(begun)
            begun = [begin]
    yield b"".join(begun)


@cli.command()
@click.argument("channel")
@click.option("--since", help=(
    'Begin in the past: "30s", "5m", "2h", seconds, a datetime with its time zone, or a message id (durable channels).'
))  # fmt: skip
@click.option("--count", type=click.IntRange(1), help="End after so many events.")
@click.option("--timeout", type=Number(min=0), help="End after so many seconds; status 3 if --count is unmet.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines (the default when the output is no terminal).")
def watch(channel: str, since: str | None, count: int | None, timeout: float | None, as_json: bool) -> None:
    """Print events as they come, beside the channel's groups; never disturbs them. A channel that nobody has registered
    yet is waited for; until then, what plain Redis clients publish under its name is shown as text.

    Example: pipeline watch readings --since 5m --json | jq .data
    """
    show = render.line if sys.stdout and sys.stdout.isatty() and not as_json else render.json_line

    async def work(app: Pipeline) -> int:
        seen = 0
        async with contextlib.aclosing(_watched(app, channel, since)) as messages:
            async for message, data, kind in messages:
                click.echo(show(message, data, kind))
                seen += 1
                if seen == count:
                    break
        return seen

    async def bounded(app: Pipeline) -> bool:
        try:
            async with asyncio.timeout(timeout):
                await work(app)
        except TimeoutError:
            return count is None
        return True

    if not _run(bounded):
        sys.exit(TOO_FEW)


_Shown = tuple[Message[Any], Any, str]
"""A message, its event as JSON, its type's name."""


async def _watched(app: Pipeline, name: str, since: str | datetime | None) -> AsyncGenerator[_Shown]:
    if since is not None:
        position(since)  # refuses what is none, while nothing is awaited yet
    try:
        record = await app.registry.record(name)
    except UnknownChannel as error:
        click.echo(f"{error}; until then, showing what anyone publishes there as text", err=True)
        async with contextlib.aclosing(_unregistered(app, name)) as shown:
            async for one in shown:
                yield one
        record, since = await app.registry.record(name), since or datetime.fromtimestamp(0, UTC)
    target = record.channel()
    codec = app.codec(target)
    async with app.watch(target, since, declare=False) as stream:
        click.echo(f"watching {name}", err=True)
        async for message in stream:
            yield message, codec.to_json(message.event), record.type


async def _unregistered(app: Pipeline, name: str) -> AsyncGenerator[_Shown]:
    """What is published under a name: as text, and once somebody has registered it, which is before its first event, as
    what it is. Ends when that is a durable channel."""
    record: Record | None = None
    target: Channel[Any] = Channel(name, str, durable=False)
    async with app.watch(Channel(name, bytes, durable=False), declare=False) as stream:
        click.echo(f"watching {name}", err=True)
        payloads = aiter(stream)
        coming = asyncio.ensure_future(anext(payloads))
        try:
            while True:
                await asyncio.wait({coming}, timeout=LOOK)
                if record is None:
                    with contextlib.suppress(ServerUnavailable):
                        record = await app.registry.find(name)
                    target = record.channel() if record else target
                if target.durable:
                    return
                if coming.done():
                    payload, coming = coming.result(), asyncio.ensure_future(anext(payloads))
                    for shown in _read(app, target, payload.event, record.type if record else "str"):
                        yield shown
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


def _read(app: Pipeline, channel: Channel[Any], payload: bytes, kind: str) -> Iterator[_Shown]:
    codec = app.codec(channel)
    try:
        frame = codec.decode_live(payload)
    except FrameError as error:
        click.echo(f"left out: {error}", err=True)
        return
    for index in range(len(frame.events)):
        if index not in frame.invalid:
            message = frame.message(index)
            yield message, codec.to_json(message.event), kind


# -- state -------------------------------------------------------------------------------------------------------


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Everything, for programs.")
@click.option("--all", "everything", is_flag=True, help="In the table, the framework's own channels too.")
def stats(as_json: bool, everything: bool) -> None:
    """The ledger: published = before + handled + dead + pending + lag (+ dropped), per channel and group.

    Example: pipeline stats --json | jq .channels.readings
    """

    async def work(app: Pipeline) -> str:
        ledger = await app.stats()
        if as_json:
            return json.dumps(ledger.model_dump(mode="json"))
        await asyncio.sleep(1.0)
        return render.ledger(ledger, await app.stats(), everything)

    click.echo(_run(work))


@cli.command()
@click.argument("channel")
@click.option("--group", help="Only this group's.")
@click.option("--replay", is_flag=True, help="Hand them to their group again, with their ids; each once.")
@click.option("--drop", is_flag=True, help="Give them up for good; they stay counted as dead.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines.")
def dead(channel: str, group: str | None, replay: bool, drop: bool, as_json: bool) -> None:
    """Look at, replay or drop dead letters.

    Example: pipeline dead readings --group detectors --replay
    """
    if replay and drop:
        raise click.UsageError("--replay and --drop exclude each other")

    async def work(app: Pipeline) -> None:
        record = await app.registry.record(channel)
        letters = await app.dead_letters(channel, group)
        if group is not None and not letters:  # those of a group that has expired are there without it
            _, found = await app.backend.ledger({channel: (record.durable, record.limits["partitions"])})
            if not any(group in one.groups for one in found[channel]):
                raise ConfigurationError(f"channel {channel!r} has no group {group!r}")
        for letter in letters:
            click.echo(render.letter_json(letter) if as_json else render.letter(letter))
        if replay or drop:
            settled = await app.settle_dead(letters, replay=replay)
            click.echo(f"{'replayed' if replay else 'dropped'} {settled}", err=as_json)
        elif not letters and not as_json:
            click.echo(f"no dead letters on {channel}")

    _run(work)


@cli.command()
@click.argument("channel")
@click.option("--group", required=True, help="The group whose workers are to stop reading.")
def pause(channel: str, group: str) -> None:
    """Pause a group: its workers finish what they hold and read nothing more until `pipeline resume`.

    Example: pipeline pause readings --group detectors
    """
    changed = _run(lambda app: app.pause(channel, group))
    click.echo(f"group {group} of {channel} {'is paused' if changed else 'was paused already'}")


@cli.command()
@click.argument("channel")
@click.option("--group", required=True, help="The group that is to go on.")
def resume(channel: str, group: str) -> None:
    """Let a paused group go on.

    Example: pipeline resume readings --group detectors
    """
    changed = _run(lambda app: app.resume(channel, group))
    click.echo(f"group {group} of {channel} {'goes on' if changed else 'was not paused'}")


@cli.command("replay")
@click.argument("channel")
@click.option("--group", required=True, help="The group that is to read again.")
@click.option("--since", required=True, help='From when: "30s", "5m", "2h", seconds, a datetime.')
def rewind(channel: str, group: str, since: str) -> None:
    """Rewind a group: it reads again what was published since then.

    Example: pipeline replay readings --group detectors --since 1h
    """
    unread = _run(lambda app: app.rewind(channel, group, since))
    click.echo(f"group {group} of {channel} on {redact(settings().redis_url)} has {unread} events to read again")
