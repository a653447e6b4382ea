"""Real servers for every test: the embedded Valkey, and Debian's Redis 7.0 as the oldest that is supported.

Each pytest-xdist worker starts its own, so nothing here can flush a server that the tests did not start.
A test that kills, stops or configures its server makes one of its own: `with Server() as server:`.
"""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from pipeline.server import Server
from pipeline.settings import settings

SHARED = tempfile.mkdtemp(prefix="pipeline-tests-", dir="/dev/shm")
os.environ["PIPELINE_SHM_DIR"] = SHARED
atexit.register(shutil.rmtree, SHARED, ignore_errors=True)
"""What processes that the tests kill leave behind goes with the tests, and with nobody else's."""
_DATABASES = 16
_turns = itertools.count()
_LONG = (
    "test_chaos test_runs test_dashboard test_serving test_training test_kernels_cuda test_examples test_faults "
    "test_matmul_shared test_leases test_delivery test_control test_cli test_supervisor test_matmul test_kernels "
    "test_order test_gateway"
).split()
"""Modules from the one that takes longest to those of ten seconds."""


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors: a third of the time a test waits, for a lease, a process, a browser."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules begin, so that in the end no worker waits for another: a module is one worker's."""
    places = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(_LONG)))


@pytest.fixture(scope="session")
def valkey() -> Iterator[Server]:
    """The embedded Valkey."""
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def redis7_binary() -> Path:
    found = shutil.which("redis-server")
    if found is None:
        pytest.fail("redis-server is not on PATH; install it: `apt-get install redis-server`", pytrace=False)
    return Path(found)


@pytest.fixture(scope="session")
def redis7(redis7_binary: Path) -> Iterator[Server]:
    """Debian's redis-server; missing is a failure, never a skip."""
    with Server(binary=redis7_binary) as server:
        yield server


@pytest.fixture(scope="session", params=["valkey", "redis7"])
def server(request: pytest.FixtureRequest) -> Server:
    """A test that asks for it, or for `url`, runs once on each."""
    chosen: Server = request.getfixturevalue(request.param)
    return chosen


@pytest.fixture
def url(server: Server) -> str:
    """An empty database on each of the two servers."""
    return _empty_database(server)


@pytest.fixture(params=["valkey", "redis7", "memory"])
def anywhere(request: pytest.FixtureRequest) -> str:
    """Empty: a database on each of the two servers, and the in-memory transport. One suite for all."""
    if request.param == "memory":
        return f"memory://test-{next(_turns)}"
    return _empty_database(request.getfixturevalue(request.param))


@pytest.fixture
def valkey_url(valkey: Server) -> str:
    """An empty database on the embedded Valkey alone, for what does not depend on the server."""
    return _empty_database(valkey)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of kernels nothing is known yet, and to measure them takes no time. Where what is measured is kept."""
    from subscribers.kernels import tuning

    monkeypatch.setenv("PIPELINE_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "PATIENCE", 0.001)
    monkeypatch.setitem(tuning.PEAK_SIZES, "cpu", (64, 128))
    monkeypatch.setitem(tuning.PEAK_SIZES_OF_INTEGERS, "cpu", (64, 128))
    monkeypatch.setattr(tuning, "_memory", {})
    settings.cache_clear()
    yield tmp_path / "kernels.json"
    settings.cache_clear()


def _empty_database(server: Server) -> str:
    """Flushed, and another number than the test before, whose last tasks may still write to theirs."""
    url = server.start().url.removesuffix("/0") + f"/{next(_turns) % _DATABASES}"
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return url


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """What a file's tests leave open is their failure, not that of whichever test the collector happens to run in."""
    yield
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
