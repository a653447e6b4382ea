"""The command line, as a person and as a script uses it: real processes, a real server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import redis

from pipeline import Channel, Event, Message, Pipeline, Reject, RetryPolicy, Tensor, cli, render
from pipeline.deadletters import DeadLetter
from pipeline.errors import ConfigurationError
from pipeline.ledger import ChannelLedger, GroupLedger, Ledger
from pipeline.metrics import metrics_channel
from pipeline.transports.redis import RedisBackend

from .apps import idle, serving, until
from .processes import ended, line_with


class Reading(Event):
    sensor: str
    value: float
    window: Tensor | None = None


readings = Channel("readings", Reading)
alerts = Channel("alerts", Reading, durable=False)


@pytest.fixture
def url(valkey_url: str) -> str:
    """What the commands say does not depend on the server."""
    return valkey_url


def pipeline(
    url: str, *arguments: str | bytes, stdin: str = "", cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", "--url", url, *arguments],
        input=stdin, capture_output=True, text=True, errors="surrogateescape", timeout=30, check=False, cwd=cwd,
    )  # fmt: skip


async def ask(url: str, *arguments: str | bytes, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(lambda: pipeline(url, *arguments, stdin=stdin))


def shell(url: str, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], env={**os.environ, "PIPELINE_REDIS_URL": url},
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


@contextmanager
def running(url: str, *arguments: str, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "--url", url, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def test_events_published_by_hand_reach_typed_subscribers_tensors_too(url: str) -> None:
    app, seen = Pipeline("app", url), []

    @app.subscriber(readings, group="g")
    async def work(event: Reading) -> None:
        seen.append(event)

    async with app, serving(app):
        done = await ask(url, "publish", "readings", '{"sensor": "a", "value": 1.5, "window": [[1, 2]]}', "--key", "k")
        assert (done.returncode, done.stderr) == (0, "")
        base64 = json.dumps({"sensor": "b", "value": 2, "window": Tensor(np.arange(2)).to_json()})
        lines = "\n".join(['{"sensor": "c", "value": 2}', "not json", "", '{"sensor": 5}', "\udcff", base64])
        many = await ask(url, "publish", "readings", "-", stdin=lines)
        await idle(app, "readings")
    assert [event.sensor for event in seen] == ["a", "c", "b"]
    assert np.asarray(seen[0].window).tolist() == [[1, 2]]
    assert seen[2].window == Tensor(np.arange(2))
    assert many.returncode == 2
    assert len(many.stdout.split()) == 2, "the ids of the good lines"
    assert "line 2 is left out: not JSON" in many.stderr
    assert "line 4 is left out" in many.stderr
    assert "sensor: 5 is not of type 'string'" in many.stderr
    assert "line 5 is left out: not UTF-8 text" in many.stderr


async def test_while_no_line_comes_to_be_published_it_says_that_it_lives_and_ctrl_c_ends_it(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_METRICS_INTERVAL", "0.1")
    async with Pipeline("app", url) as app, app.watch(metrics_channel) as samples, asyncio.timeout(15):
        await app.publish(readings, Reading(sensor="a", value=1))
        with running(url, "publish", "readings", "-") as process:
            assert process.stdin is not None
            process.stdin.write('\ufeff{"sensor": "b", "value": 1}\n')  # as some editors begin a file
            process.stdin.flush()
            await asyncio.to_thread(line_with, "cli.", process)
            lives = 0
            async for sample in samples:
                lives += sample.event.app == "cli"
                if lives == 3:
                    break
            process.send_signal(signal.SIGINT)
            assert await asyncio.to_thread(process.wait, 5) == 130


def test_a_key_of_another_type_is_said_in_one_line(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.set("pipeline:channels", "somebody's")
    for arguments in (("stats",), ("publish", "readings", "{}"), ("watch", "readings")):
        done = pipeline(url, *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert "Redis refuses: WRONGTYPE" in done.stderr


async def test_a_stdin_that_is_closed_has_no_lines(url: str) -> None:
    async with Pipeline("app", url) as app:
        await app.publish(readings, Reading(sensor="a", value=1))
        for command in ("-m pipeline publish readings -", "-m publishers.data --stdin --channel readings"):
            done = await asyncio.to_thread(shell, url, f"{sys.executable} {command} <&-")
            assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


async def test_bad_input_is_one_clear_line(url: str) -> None:
    async with Pipeline("app", url) as app:
        await app.publish(readings, Reading(sensor="a", value=1))
        cases: list[tuple[tuple[str | bytes, ...], int, str]] = [
            (("publish", "readings", '{"sensor": 1}'), 2, "'value' is a required property"),
            (("publish", "readings", b'{"sensor": "\xff"}'), 2, "not UTF-8 text"),
            (("publish", b"\xff", "{}"), 2, "is not utf-8 text"),
            (("publish", "nowhere", "{}"), 2, "no channel 'nowhere' is registered (known: readings)"),
            (("publish", "readings.dead", "{}"), 2, "'readings.dead' is the framework's own; it can be watched"),
            (("replay", "readings", "--group", "x", "--since", "1h"), 2, "no group 'x'"),
            (("pause", "readings", "--group", "x"), 2, "no group 'x'"),
            (("watch", "readings", "--since", "yesterday"), 2, "since="),
            (("watch", "readings", "--timeout", "nan"), 2, "nan is not a finite number"),
            (("watch", "nowhere", "--since", "yesterday"), 2, "since="),
            (("dead", "readings", "--replay", "--drop"), 2, "exclude each other"),
            (("dead", "readings", "--group", "x", "--replay"), 2, "channel 'readings' has no group 'x'"),
            (("dead", "readings", "--group", "x"), 2, "channel 'readings' has no group 'x'"),
            (("up", "--scale", "redis=\u00b2"), 2, "use NAME=N"),
            (("serve", "nosuch:app"), 2, "No module named 'nosuch'"),
            (("serve", "json:dumps"), 2, "not a Pipeline"),
            (("serve", ":app"), 2, "say MODULE:APP"),
            (("serve", "./app.py:app"), 2, "say MODULE:APP"),
        ]
        for arguments, status, text in cases:
            done = await ask(url, *arguments)
            assert (done.returncode, text in done.stderr) == (status, True), (arguments, done)
            assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("code", "status", "line", "place"),
    [
        ("limits = {}\nlimits['most']", 2, "'mine:app' cannot be loaded: KeyError: 'most'", "line 2, in <module>"),
        ("def work(:", 2, "'mine:app' cannot be loaded: SyntaxError: invalid syntax", "line 1"),
        ("import nosuch", 2, "cannot be loaded: ModuleNotFoundError: No module named 'nosuch'", "line 1, in <module>"),
        (
            "import pipeline\napp = pipeline.Pipeline('mine')\n@app.on_start\nasync def load():\n    {}['weights']",
            1, "'mine:app' failed: KeyError: 'weights'", "line 5, in load",
        ),
    ],
)  # fmt: skip
def test_an_app_that_fails_is_named_first_and_then_where_in_its_own_code(
    url: str, tmp_path: Path, code: str, status: int, line: str, place: str
) -> None:
    (tmp_path / "mine.py").write_text(code)
    done = pipeline(url, "serve", "mine:app", cwd=tmp_path)
    first, *where = done.stderr.splitlines()
    assert (done.returncode, line in first) == (status, True), done.stderr
    assert [text for text in where if text.startswith("  File")] == [f'  File "{tmp_path}/mine.py", {place}']


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis://127.0.0.1:abc/0", "its port is no number"),
        ("redis://127.0.0.1:99999999", "its port is no number"),
        ("redis://127.0.0.1:6379/zz", "its database, behind the port, is no number"),
    ],
)
def test_a_url_that_is_none_is_one_clear_line(url: str, reason: str) -> None:
    done = pipeline(url, "stats")
    assert (done.returncode, done.stderr.count("\n"), reason in done.stderr) == (2, 1, True), done.stderr
    with pytest.raises(ConfigurationError, match=reason):
        RedisBackend(url, "app")


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        ("--host nosuch.invalid --port 0", 1, "cannot listen on nosuch.invalid:0: Name or service not known;"),
        ("--url http://me:hush@nonsense", 2, "--url: not a URL that begins with one of redis://"),
    ],
)
def test_where_the_dashboard_cannot_be_is_said_when_it_is_started(
    url: str, options: str, status: int, reason: str
) -> None:
    done = shell(url, f"{sys.executable} -m dashboards {options}")
    assert (done.returncode, reason in done.stderr, "hush" in done.stderr) == (status, True, False), done.stderr


async def test_a_reader_that_has_seen_enough_ends_it_quietly_and_a_full_disk_with_a_line(url: str) -> None:
    command = f"{sys.executable} -m pipeline"
    async with Pipeline("app", url) as app:
        await app.publish(readings, [Reading(sensor="a", value=n) for n in range(1000)])
        for unread in (f"{command} watch readings --since 1h | head -1 >/dev/null", f"{command} --help | true"):
            done = await asyncio.to_thread(shell, url, unread)
            assert (done.returncode, done.stderr.removeprefix("watching readings\n")) == (0, "")
        for closed in ("watch readings --since 1h --count 1", "stats"):
            done = await asyncio.to_thread(shell, url, f"{command} {closed} >&-")
            assert (done.returncode, done.stderr.removeprefix("watching readings\n")) == (0, "")
        done = await asyncio.to_thread(shell, url, f"{command} stats --json >/dev/full")
        assert (done.returncode, done.stderr) == (1, "pipeline: [Errno 28] No space left on device\n")


def test_a_product_that_cannot_be_is_refused_before_anybody_computes_it(url: str, tmp_path: Path) -> None:
    file = str(tmp_path / "a.npy")
    np.save(file, np.eye(3))
    for options, reason in (
        (("-o", f"{tmp_path}/none/c.npy"), "there is no folder"),
        (("-o", f"{tmp_path}/c.csv"), "a product's name ends in .npy or .safetensors"),
        (("--alpha", "nan"), "nan is not a finite number"),
    ):
        done = pipeline(url, "matmul", file, file, "--timeout", "1", *options)
        assert (done.returncode, reason in done.stderr, "Traceback" in done.stderr) == (2, True, False), done


def test_without_redis_every_verb_says_what_to_do() -> None:
    done = pipeline("redis://127.0.0.1:9/0", "stats")
    assert done.returncode == 1
    assert "`pipeline server`" in done.stderr
    assert "Traceback" not in done.stderr


TRACED = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}


async def test_watching_prints_json_lines_and_ends_as_asked(url: str) -> None:
    async with Pipeline("app", url) as app:
        receipt = await app.publish(
            readings, Reading(sensor="a", value=1, window=Tensor(np.arange(2))), key="k", headers=TRACED
        )
        done = await ask(url, "watch", "readings", "--since", "5m", "--count", "1", "--json")
        (line,) = done.stdout.splitlines()
        event = json.loads(line)
        assert (event["specversion"], event["id"], event["subject"], event["type"]) == (
            "1.0",
            receipt.id,
            "k",
            "Reading",
        )
        assert event["traceparent"] == event["headers"]["traceparent"] == TRACED["traceparent"]
        assert event["data"]["sensor"] == "a"
        assert event["data"]["window"] == Tensor(np.arange(2)).to_json()
        short = await ask(url, "watch", "readings", "--count", "1", "--timeout", "0.2")
        assert (short.returncode, short.stdout) == (3, "")


async def test_watching_shows_what_a_bare_client_publishes(url: str) -> None:
    with running(url, "watch", "classical_music", "--count", "1") as process, redis.Redis.from_url(url) as client:
        await asyncio.to_thread(line_with, "watching classical_music", process)
        client.publish("classical_music", "Raga Vairabi")
        assert json.loads(await asyncio.to_thread(line_with, "Raga", process))["data"] == "Raga Vairabi"
        assert process.wait(5) == 0


@pytest.mark.parametrize("channel", [readings, alerts])
async def test_who_watches_first_sees_events_as_what_they_are_and_is_in_nobodys_way(
    url: str, channel: Channel[Reading]
) -> None:
    with running(url, "watch", channel.name, "--count", "2", "--since", "300") as process:
        await asyncio.to_thread(line_with, f"watching {channel.name}", process)
        async with Pipeline("app", url) as app:
            await app.publish(channel, [Reading(sensor=s, value=1, window=Tensor(np.arange(2))) for s in "ab"])
        lines = [json.loads(await asyncio.to_thread(line_with, "specversion", process)) for _ in range(2)]
        assert process.wait(5) == 0
    assert [(line["type"], line["data"]["sensor"]) for line in lines] == [("Reading", "a"), ("Reading", "b")]
    assert lines[0]["data"]["window"] == Tensor(np.arange(2)).to_json()


async def test_dead_letters_are_shown_replayed_and_counted(url: str) -> None:
    app, broken = Pipeline("app", url), True

    @app.subscriber(readings, group="g", retry=RetryPolicy(attempts=1))
    async def work(event: Reading) -> None:
        if broken:
            raise Reject("no calibration")

    async with app, serving(app):
        await app.publish(readings, [Reading(sensor=s, value=1) for s in "ab"])
        await until(lambda: app._routers[0][1].dead == 2 or app._routers[0][0].flow.events == 0)
        await idle(app, "readings")
        shown = await ask(url, "dead", "readings")
        assert shown.stdout.count("no calibration") >= 2
        letters = [json.loads(line) for line in (await ask(url, "dead", "readings", "--json")).stdout.splitlines()]
        assert [letter["events"][0]["sensor"] for letter in letters] == ["a", "b"]
        broken = False
        assert "replayed 2" in (await ask(url, "dead", "readings", "--group", "g", "--replay")).stdout
        await idle(app, "readings")
        stats = json.loads((await ask(url, "stats", "--json")).stdout)
        group: dict[str, Any] = stats["channels"]["readings"]["groups"]["g"]
        assert (group["handled"], group["dead"], group["pending"], group["lag"], group["before"]) == (2, 0, 0, 0, 0)
        assert "balances" in (await ask(url, "stats")).stdout
        rewound = await ask(url, "replay", "readings", "--group", "g", "--since", "1h")
        assert "2 events to read again" in rewound.stdout


def test_nothing_that_somebody_publishes_commands_the_terminal() -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J \x9b1m\nforged \u202etxt"
    shown = r"\x1b]0;owned\x07\x1b[2J \x9b1m\nforged \u202etxt"
    message = Message(hostile, "s:1", "music", hostile, datetime.now(UTC), key=hostile)
    assert render.line(message, hostile, "str").endswith(f"str {shown} [{shown}] {shown}")
    dead = DeadLetter(
        channel="c", group="g", event_id="s:1", attempts=1, reason=hostile, traceback="one\nt\x1b[2Jo", original=b""
    )
    first, *rows = render.letter(Message(dead, "s:1", "c.dead", "s", datetime.now(UTC))).splitlines()
    assert first.endswith(r"after 1 attempts: \x1b]0;owned\x07\x1b[2J \x9b1m")
    assert rows == [r"    forged \u202etxt", "    null", "    one", r"    t\x1b[2Jo"]


def test_a_terminal_that_lacks_characters_ends_no_process(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    (tmp_path / "Procfile").write_text("degrees: printf '21 \\302\\260C\\n'; echo next\n")
    done = pipeline(url, "up", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.partition(" | ")[2] for line in done.stdout.splitlines()] == [
        r"21 \xb0C",
        "next",
        "degrees.1 finished",
    ]


@pytest.mark.parametrize("length", [10, 100, 195])
def test_of_long_names_the_end_is_missing_and_of_numbers_nothing(length: int) -> None:
    group = GroupLedger(handled=1_234_567, pending=89_012, paused=True)
    channel = ChannelLedger(published=1_323_579, groups={"g" * length: group})
    ledger = Ledger(time=1.0, channels={"c" * length: channel})
    _, row = render.ledger(ledger, ledger, False).splitlines()
    names, numbers = row.split()[:2], row.split()[2:]
    assert all(shown == name * length or shown.endswith("…") for shown, name in zip(names, "cg", strict=True))
    assert numbers == "1,323,579 0 1,234,567 0 0 0 89,012 0 0.0 s 0 balances, paused".split()


async def test_a_group_is_paused_and_resumed_by_hand(url: str) -> None:
    app, seen = Pipeline("app", url), []

    @app.subscriber(readings, group="g")
    async def work(event: Reading) -> None:
        seen.append(event)

    async with app, serving(app):
        paused = await ask(url, "pause", "readings", "--group", "g")
        assert (paused.returncode, paused.stdout) == (0, "group g of readings is paused\n")
        await app.publish(readings, [Reading(sensor="a", value=n) for n in range(3)])
        group = json.loads((await ask(url, "stats", "--json")).stdout)["channels"]["readings"]["groups"]["g"]
        assert (group["paused"], group["lag"], group["handled"]) == (True, 3, 0)
        assert "balances, paused" in (await ask(url, "stats")).stdout
        assert not seen
        assert "goes on" in (await ask(url, "resume", "readings", "--group", "g")).stdout
        await idle(app, "readings")
    assert len(seen) == 3


async def test_serving_in_several_processes_survives_a_kill_and_stops_at_once(url: str) -> None:
    with running(url, "serve", "tests.served:app", "--workers", "2") as process:
        parent = psutil.Process(process.pid)
        async with Pipeline("app", url) as app:
            async with asyncio.timeout(15):
                while len(workers := served_by(app_workers(parent))) < 2:
                    await asyncio.sleep(0.1)
            workers[0].send_signal(signal.SIGKILL)
            await app.publish(Channel("served", Reading), [Reading(sensor="a", value=n) for n in range(50)])
            ledger = await idle(app, "served")
            async with asyncio.timeout(15):
                while len(again := served_by(app_workers(parent))) < 2 or workers[0] in again:
                    await asyncio.sleep(0.1)
        assert ledger.groups["g"].handled == 50
        await asyncio.sleep(1.0)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 10) == 0
        assert time.monotonic() - began < 3.0
        assert ended(*again)


def test_reloading_goes_on_beside_files_that_nobody_can_read(url: str, tmp_path: Path) -> None:
    app = tmp_path / "mine.py"
    app.write_text("from pipeline import Pipeline\napp = Pipeline('mine')\nprint('loaded', flush=True)\n")
    with running(url, "serve", "mine:app", "--reload", cwd=tmp_path) as process:
        line_with("loaded", process)
        (tmp_path / ".#mine.py").symlink_to("me@host.1:2")  # as Emacs locks a file
        time.sleep(0.5)  # two looks
        os.utime(app, (time.time() + 1, time.time() + 1))
        line_with("reloading", process)
        process.terminate()
        assert process.wait(10) == 0


async def test_a_stop_that_comes_while_a_crashed_worker_waits_starts_no_other(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    monkeypatch.setenv("CRASHES_WHILE", str(broken))
    with running(url, "serve", "tests.served:fragile", "--workers", "2") as process:
        await asyncio.to_thread(line_with, "starting another in 1 s", process)
        broken.unlink()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 8) == 0


def test_a_worker_that_was_healthy_is_started_again_soon(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker = cli._Worker([sys.executable, "-S", "-c", "raise SystemExit(3)"])
    for healthy_after in (60.0, 60.0, 0.0):
        monkeypatch.setattr(cli, "HEALTHY_SECONDS", healthy_after)
        worker.process.wait()
        assert not worker.is_due()
        worker.start()
    worker.process.wait()
    assert [line.rpartition(" in ")[2] for line in capsys.readouterr().err.splitlines()] == ["0.5 s", "1 s", "0.5 s"]


def app_workers(parent: psutil.Process) -> list[psutil.Process]:
    return [child for child in parent.children() if child.is_running()]


def served_by(children: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for child in children:
        try:
            if "tests.served:app" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(
    "verb", ["up", "server", "serve", "publish", "watch", "stats", "dead", "pause", "resume", "replay"]
)
def test_every_verb_has_help_with_an_example(verb: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", verb, "--help"],
        capture_output=True, text=True, timeout=30, check=True, env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip
    assert "Example: pipeline" in done.stdout
