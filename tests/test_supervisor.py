"""`pipeline up`: real processes, real kills."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pipeline.errors import ConfigurationError
from pipeline.server import Server
from pipeline.supervisor import up

from .processes import ended, line_with

_UP = """
import json, pathlib, sys
from pipeline.supervisor import up
sys.exit(up(pathlib.Path("Procfile"), **json.loads(sys.argv[1])))
"""

_BROKEN = """
from pipeline import supervisor
def _fate(status):
    raise LookupError("nobody knows its fate")
supervisor._fate = _fate
"""

_SHOW = """
import os, sys
print(os.environ["FROM_FILE"], os.environ["FROM_BOTH"], sys.executable)
os.kill(os.getpid(), 9)  # what was not flushed is lost
"""

_STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("stubborn", flush=True)
time.sleep(60)
"""

_SERVER = """
import os, pathlib
from pipeline.server import supervise
supervise(os.environ["PIPELINE_REDIS_URL"], pathlib.Path("data"))
"""

_WORKER = """
import os, signal, sys, redis
client = redis.Redis.from_url(os.environ["PIPELINE_REDIS_URL"])
def drain(*_):
    client.set("drained", 1)
    print("drained and committed", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
client.ping()
print("working", flush=True)
signal.pause()
"""


@contextmanager
def running(
    directory: Path, procfile: str, arguments: str = "{}", *, program: str = _UP, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """`pipeline up` in `directory`, ended without leaving a process whatever the test does."""
    (directory / "Procfile").write_text(procfile)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **environment}
    command, output = [sys.executable, "-c", program, arguments], subprocess.PIPE
    with subprocess.Popen(
        command, cwd=directory, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.read()


def test_every_line_carries_its_time_and_its_process_and_finished_processes_stay_down(tmp_path: Path) -> None:
    with running(tmp_path, "one: echo first; echo; echo second\nother: printf unfinished\n") as process:
        output = said(process)
        assert process.wait() == 0
    assert re.search(r"^\d\d:\d\d:\d\d one.1 +\| first$", output, re.MULTILINE)
    assert re.search(r"^\d\d:\d\d:\d\d other.1 +\| unfinished$", output, re.MULTILINE)
    assert output.index("first") < output.index("second")
    assert "one.1 finished" in output


def test_processes_see_the_env_file_the_venv_and_unbuffered_output(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("FROM_FILE=file\nFROM_BOTH=file\n")
    (tmp_path / "show.py").write_text(_SHOW)
    with running(tmp_path, "show: python show.py\n", FROM_BOTH="environment") as process:
        assert f"file environment {sys.executable}" in line_with("environment", process)


def test_a_crashed_process_starts_again_later_each_time_and_says_so(tmp_path: Path) -> None:
    with running(tmp_path, "crash: python -c 'raise SystemExit(3)'\nsteady: echo steady; sleep 60\n") as process:
        assert "exited with status 3" in line_with("starts again in 0.5 s", process)
        line_with("starts again in 1 s (crash 2 in a row)", process)


def test_a_killed_process_is_replaced_and_what_it_had_started_is_gone(tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(_STUBBORN)
    with running(tmp_path, "stubborn: python stubborn.py\n") as process:
        line_with("stubborn", process)
        parent = next(one for one in family(process) if "stubborn.py" in one.cmdline())
        (child,) = parent.children()
        parent.kill()
        line_with("was killed by SIGKILL", process)
        line_with("| stubborn", process)
        assert ended(parent, child)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        process.wait()


def test_workers_commit_while_they_drain_because_redis_stops_last(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(_SERVER)
    (tmp_path / "worker.py").write_text(_WORKER)
    with Server() as free:
        url = free.url
    procfile = "worker: python worker.py\nredis: python server.py\n"
    with running(tmp_path, procfile, '{"scale": {"worker": 2}}', PIPELINE_REDIS_URL=url) as process:
        line_with("Valkey serves", process)
        line_with("working", process)
        line_with("working", process)
        everyone = family(process)
        process.send_signal(signal.SIGINT)
        output = said(process)
        assert process.wait() == 0
    assert output.count("drained and committed") == 2
    assert output.rindex("worker.1 stopped") < output.index("Valkey stopped")
    assert output.rindex("worker.2 stopped") < output.index("redis.1 stopped")
    assert ended(*everyone, within=0.5)


@pytest.mark.parametrize(("interrupts", "at_least", "at_most"), [(1, 2.5, 4.5), (2, 0.0, 1.0)])
def test_a_process_that_will_not_stop_is_killed_after_the_deadline_or_at_the_second_ctrl_c(
    tmp_path: Path, interrupts: int, at_least: float, at_most: float
) -> None:
    (tmp_path / "stubborn.py").write_text(_STUBBORN)
    with running(tmp_path, "stubborn: python stubborn.py\n") as process:
        line_with("| stubborn", process)
        everyone = family(process)
        assert len(everyone) >= 3, "the program, its child and the watchdog"
        started = time.monotonic()
        for _ in range(interrupts):
            process.send_signal(signal.SIGINT)
            if interrupts > 1:
                time.sleep(0.1)  # two signals at once would be merged into one
        assert process.wait() == 0
        assert at_least <= time.monotonic() - started <= at_most
    assert ended(*everyone, within=0.5)


def test_nothing_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    with running(tmp_path, "one: sleep 60\nother: sleep 61; echo done\n") as process:
        while len(everyone := family(process)) < len(["sleep 60", "sh", "sleep 61", "the watchdog"]):
            time.sleep(0.01)
        time.sleep(1.0)  # the watchdog is told of a child a moment after that was started
        process.kill()
    assert ended(*everyone)


def test_a_process_that_cannot_be_started_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with running(folder, "crash: kill -40 $$\n") as process:
        line_with("was killed by 40", process)
        folder.rename(tmp_path / "other")
        line_with("could not be started: No such file or directory", process)
        (tmp_path / "other").rename(folder)
        line_with("was killed by 40", process)


def test_an_error_of_the_supervisors_own_ends_everything_and_is_told(tmp_path: Path) -> None:
    with running(tmp_path, "crash: false\nsteady: sleep 60\n", program=_BROKEN + _UP) as process:
        everyone = family(process)
        output = said(process)
        assert process.wait() == 1
    assert "nobody knows its fate" in output
    assert ended(*everyone, within=0.5)


def test_nothing_goes_on_when_nobody_reads_the_output(tmp_path: Path) -> None:
    with running(tmp_path, "talk: while true; do echo talk; sleep 0.05; done\n") as process:
        line_with("talk", process)
        everyone = family(process)
        assert process.stdout is not None
        process.stdout.close()
        process.wait(5)
    assert ended(*everyone)


def test_a_line_without_an_end_does_not_fill_the_memory(tmp_path: Path) -> None:
    with running(tmp_path, "long: head -c 300000 /dev/zero | tr '\\0' x\n") as process:
        assert said(process).count("x") == 300_000


def test_only_the_chosen_processes_run_as_often_as_asked(tmp_path: Path) -> None:
    procfile = "one: echo one\ntwo: echo two\nthree: echo three\n"
    with running(tmp_path, procfile, '{"only": ["one", "two"], "scale": {"two": 3}}') as process:
        output = said(process)
    assert sorted(re.findall(r"\| (one|two|three)$", output, re.MULTILINE)) == ["one", "two", "two", "two"]


@pytest.mark.parametrize(
    ("procfile", "only", "scale", "reason"),
    [
        ("one: true", ["zwei"], {}, "no process zwei; it has one"),
        ("one: true", [], {"zwei": 2}, "no process zwei"),
        ("one: true", [], {"one": -1}, "negative"),
        ("one: true", [], {"one": 0}, "nothing to run"),
        ("one: true\none: false", [], {}, "unique"),
        (None, [], {}, "cannot be read"),
        ("# \udcfc\none: true", [], {}, "/Procfile is not UTF-8 text: invalid start byte at byte 2"),
    ],
)
def test_a_wrong_procfile_or_name_is_refused_with_the_reason(
    tmp_path: Path, procfile: str | None, only: list[str], scale: dict[str, int], reason: str
) -> None:
    if procfile is not None:
        (tmp_path / "Procfile").write_text(procfile, errors="surrogateescape")
    with pytest.raises(ConfigurationError, match=reason):
        up(tmp_path / "Procfile", only, scale)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"NAME=\xfc\n", " is not UTF-8 text: invalid start byte at byte 5"), (b'NAME="a\n', ": No closing quotation")],
)
def test_an_env_file_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "Procfile").write_text("one: true")
    (tmp_path / ".env").write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"/\.env{reason}"):
        up(tmp_path / "Procfile")
