"""`pipeline up`: the Procfile's processes, together.

Unlike plain `honcho start`, where the first exit ends everything, a crashed process is started again with backoff.
One that ends by itself with status 0 has finished and stays down. Procfile and `.env` are read as honcho reads them,
except that the environment wins over `.env`, as it does for the settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from honcho import environ
from honcho.colour import get_colours
from honcho.printer import Message, Printer

from .errors import ConfigurationError
from .server import answers
from .settings import settings
from .watchdog import watchdog

__all__ = ["BACKOFF", "HEALTHY_SECONDS", "up"]

_SERVER = "redis"
"""The Procfile's name for the server: started first and stopped last, because draining workers commit to it."""

_SERVER_WAIT = 10.0
_DRAIN_SECONDS = 3.0
_STOP_SECONDS = 4.0
BACKOFF = (0.5, 10.0)
HEALTHY_SECONDS = 30.0
_LONGEST_LINE = 64 << 10


def up(procfile: Path, only: Sequence[str] = (), scale: Mapping[str, int] | None = None) -> int:
    """Run the Procfile's processes until they have all finished or SIGINT/SIGTERM comes; returns the exit status.

    Raises ConfigurationError when the Procfile cannot be read, or `only` or `scale` name what is not in it.
    """
    plans = _plans(procfile, only, scale or {})
    if not plans:
        raise ConfigurationError(f"there is nothing to run: {procfile} is empty, or everything is scaled to 0")
    return asyncio.run(_Supervisor(plans).run())


@dataclass(frozen=True, slots=True)
class _Plan:
    """One process, as it is to be run."""

    name: str
    command: str
    environment: dict[str, str]
    directory: Path

    @property
    def is_server(self) -> bool:
        return self.name.partition(".")[0] == _SERVER

    @property
    def is_simple(self) -> bool:
        """A command that the shell can replace itself with, so that signals reach the program."""
        return not re.search(r"[;&|<>()`$\n]|^\s*\w+=", self.command)


def _plans(procfile: Path, only: Sequence[str], scale: Mapping[str, int]) -> list[_Plan]:
    try:
        processes = environ.parse_procfile(_text(procfile)).processes
    except OSError as error:
        raise ConfigurationError(f"{procfile} cannot be read: {error.strerror}; name a Procfile with -f") from None
    except AssertionError as error:
        raise ConfigurationError(f"{procfile}: {error}") from None
    if unknown := sorted({*only, *scale} - set(processes)):
        raise ConfigurationError(f"{procfile} has no process {', '.join(unknown)}; it has {', '.join(processes)}")
    if negative := [name for name, count in scale.items() if count < 0]:
        raise ConfigurationError(f"the number of processes of {', '.join(negative)} must not be negative")
    chosen = {name: command for name, command in processes.items() if not only or name in only}
    directory = procfile.absolute().parent
    environment = _environment(directory)
    return [
        _Plan(one.name, one.cmd, environment | {"HONCHO_PROCESS_NAME": one.name}, directory)
        for one in environ.expand_processes(chosen, concurrency=scale)
    ]


def _environment(directory: Path) -> dict[str, str]:
    """What the children see. `python` and `pipeline` are the ones that run us, whether or not the venv is active."""
    file = directory / ".env"
    try:
        return {**environ.parse(_text(file)), **_own_environment()}
    except OSError:
        return _own_environment()
    except ValueError as error:
        raise error if isinstance(error, ConfigurationError) else ConfigurationError(f"{file}: {error}") from None


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _own_environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"}


class _Supervisor:
    """Starts, keeps and stops the processes; one asyncio task each."""

    def __init__(self, plans: Sequence[_Plan]) -> None:
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()
        self._output = _Output([plan.name for plan in plans], self._stop.set)
        self._processes = [_Process(plan, self._output) for plan in plans]
        self._tasks: dict[_Process, asyncio.Task[None]] = {}

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        try:
            await self._start()
            await _first(self._stop.wait(), asyncio.wait(self._tasks.values(), return_when=asyncio.FIRST_EXCEPTION))
        finally:
            await self._shut_down()
            watchdog().close()
        await asyncio.gather(*self._tasks.values())  # which have ended; raises what one of them failed with
        return 0

    def _on_signal(self) -> None:
        """The first asks for a drain, the second ends everything now."""
        (self._hurry if self._stop.is_set() else self._stop).set()

    async def _start(self) -> None:
        servers = [process for process in self._processes if process.plan.is_server]
        self._launch(servers)
        if servers:
            url = servers[0].plan.environment.get("PIPELINE_REDIS_URL") or settings().redis_url
            await _first(self._stop.wait(), _until_it_answers(url))
        if not self._stop.is_set():
            self._launch(process for process in self._processes if process not in servers)

    def _launch(self, processes: Iterable[_Process]) -> None:
        for process in processes:
            self._tasks[process] = asyncio.create_task(process.keep())

    async def _shut_down(self) -> None:
        deadline = time.monotonic() + _STOP_SECONDS
        running = [process for process, task in reversed(self._tasks.items()) if not task.done()]
        if running:
            self._output.say("stopping; Ctrl-C again to stop at once")
        workers = [process for process in running if not process.plan.is_server]
        await self._end(workers, _DRAIN_SECONDS)
        await self._end([process for process in running if process not in workers], deadline - time.monotonic())

    async def _end(self, processes: Sequence[_Process], seconds: float) -> None:
        if not processes:
            return
        for process in processes:
            process.terminate()
        tasks = [self._tasks[process] for process in processes]
        await _first(asyncio.wait(tasks, timeout=seconds), self._hurry.wait())
        for process, task in zip(processes, tasks, strict=True):
            if not task.done():
                process.kill()
        await asyncio.wait(tasks)


class _Process:
    """One process of the Procfile: the present run, and the runs before and after it."""

    def __init__(self, plan: _Plan, output: _Output) -> None:
        self.plan = plan
        self._output = output
        self._stopped = asyncio.Event()
        self._pid: int | None = None

    async def keep(self) -> None:
        """Run it, after a crash again, until it finishes by itself or is stopped."""
        delay, crashes = BACKOFF[0], 0
        while not self._stopped.is_set():
            started = time.monotonic()
            try:
                status = await self._run()
                fate = _fate(status)
            except OSError as error:
                status, fate = None, f"could not be started: {error.strerror or error}"
            if self._stopped.is_set():
                self._output.say(f"{self.plan.name} stopped")
            elif status == 0:
                self._output.say(f"{self.plan.name} finished")
                return
            else:
                lived = time.monotonic() - started
                delay, crashes = (BACKOFF[0], 1) if lived > HEALTHY_SECONDS else (delay, crashes + 1)
                again = f"starts again in {delay:g} s" + (f" (crash {crashes} in a row)" if crashes > 1 else "")
                self._output.say(f"{self.plan.name} {fate} after {lived:.1f} s; {again}")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), delay)
                delay = min(delay * 2, BACKOFF[1])

    def terminate(self) -> None:
        """Ask it to stop: its program alone, which tells its own children; its group where a shell is in between."""
        self._stopped.set()
        if self._pid is not None:
            self._signal(self._pid if self.plan.is_simple else -self._pid, signal.SIGTERM)

    def kill(self) -> None:
        if self._pid is not None:
            self._output.say(f"{self.plan.name} had not stopped yet: killed")
            self._signal(-self._pid, signal.SIGKILL)

    async def _run(self) -> int:
        # The pipe is ours, so that a grandchild that holds it open cannot hide the program's end.
        reading, writing = os.pipe()
        dog = watchdog()
        try:
            child = await asyncio.create_subprocess_exec(
                *("/bin/sh", "-c", f"exec {self.plan.command}" if self.plan.is_simple else self.plan.command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=writing,
                stderr=asyncio.subprocess.STDOUT,
                env=self.plan.environment,
                cwd=self.plan.directory,
                start_new_session=True,
            )
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self._pid = child.pid
        dog.watch(-child.pid)
        copying = asyncio.create_task(self._output.copy(self.plan.name, reading))
        copying.add_done_callback(self._on_copied)
        if self._stopped.is_set():  # while it was being started
            self.terminate()
        status = await child.wait()
        self._signal(-child.pid, signal.SIGKILL)  # whatever it left behind
        dog.forget(-child.pid)
        self._pid = None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(copying, 1.0)
        return status

    def _on_copied(self, copying: asyncio.Task[None]) -> None:
        """When that failed: nobody reads the program's output any more, and it would hang on it."""
        if self._pid is not None and not copying.cancelled() and copying.exception() is not None:
            self._signal(-self._pid, signal.SIGKILL)

    @staticmethod
    def _signal(target: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the latter: macOS, for a group of zombies
            os.kill(target, number)


class _Output:
    """Everybody's lines on our stdout, each with its time and its process's name. When nobody reads it, all stops."""

    def __init__(self, names: Sequence[str], on_closed: Callable[[], None]) -> None:
        self._printer = Printer(sys.stdout, width=max(map(len, [*names, "pipeline"])))
        self._colours = dict(zip(names, get_colours(), strict=False))
        self._on_closed = on_closed

    def say(self, text: str) -> None:
        self._write("pipeline", text)

    async def copy(self, name: str, descriptor: int) -> None:
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.connect_read_pipe(lambda: protocol, os.fdopen(descriptor, "rb", buffering=0))
        rest = b""
        try:
            while chunk := await reader.read(_LONGEST_LINE):
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) > _LONGEST_LINE:
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    self._write(name, line)
        finally:
            transport.close()
        if rest:
            self._write(name, rest)

    def _write(self, name: str, text: str | bytes) -> None:
        message = Message("line", text or " ", datetime.now(), name, self._colours.get(name))
        try:
            self._printer.write(message)
        except OSError:
            self._printer.output = io.StringIO()  # holds the last lines of the processes as they stop
            self._on_closed()


def _fate(status: int) -> str:
    names = {int(one): one.name for one in signal.Signals}  # without most of the real-time ones
    return f"was killed by {names.get(-status, -status)}" if status < 0 else f"exited with status {status}"


async def _first(*events: Awaitable[object]) -> None:
    """Return when one of them has come about; the others are given up."""
    tasks = [asyncio.ensure_future(event) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


async def _until_it_answers(url: str) -> None:
    """At most ten seconds: the others can wait for Redis by themselves, with more noise."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_SERVER_WAIT):
            while not await asyncio.to_thread(answers, url):  # noqa: ASYNC110 (a server tells nobody that it is there)
                await asyncio.sleep(0.05)
