"""The stress test against gateways that close what is idle, and that are slower than they are asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from publishers import stress as module
from publishers.stress import stress_test

BODIES = [("application/json", b"{}")]
LABELLED = b'{"batch": 2, "predictions": [{"label": "cat"}]}'
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


@asynccontextmanager
async def answering(
    answer: bytes = ANSWER, *, idle: float = 60.0, once: bool = False, seconds: float = 0.0
) -> AsyncIterator[str]:
    """The URL of a gateway that closes idle connections, or (once) every second request's instead of answering it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(10):
                while True:
                    async with asyncio.timeout(idle):
                        await reader.readuntil(b"\r\n\r\n{}")
                    await asyncio.sleep(seconds)
                    writer.write(answer)
                    if once:
                        await reader.read(1)
                        return
        except (TimeoutError, EOFError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        yield f"http://{host}:{port}/predict"


async def test_connections_that_were_closed_while_idle_lose_nothing() -> None:
    async with answering(idle=0.05) as url:
        outcome = await stress_test(url, BODIES, requests=4, clients=2, pause=0.15)
    assert (dict(outcome.statuses), outcome.lost) == ({200: 4}, 0)
    async with answering(once=True) as url:
        outcome = await stress_test(url, BODIES, requests=5)
    assert (dict(outcome.statuses), outcome.lost) == ({200: 5}, 0)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--requests", "0"), ("--clients", "0"), ("--pause", "-1"), ("--rate", "0"), ("--rate", "-1"),
        ("--rate", "nan"), ("--seconds", "inf"), ("--deadline", "0"),
    ],
)  # fmt: skip
def test_numbers_that_make_no_test_are_refused(tmp_path: Path, option: str, value: str) -> None:
    picture = tmp_path / "cat.png"
    picture.touch()
    done = CliRunner().invoke(module.stress, [str(picture), "--url", "http://127.0.0.1:9/", option, value])
    assert done.exit_code == 2
    assert f"Invalid value for '{option}'" in done.output


async def test_of_a_rate_so_slow_that_none_is_due_one_request_is_sent() -> None:
    async with answering() as url:
        outcome = await stress_test(url, BODIES, rate=1.0, seconds=0.2)
    assert outcome.statuses[200] == 1


async def test_what_nobody_answers_is_lost() -> None:
    async with answering() as url:
        pass
    outcome = await stress_test(url, BODIES, requests=3)
    assert (dict(outcome.statuses), outcome.lost) == ({}, 3)


@pytest.mark.parametrize(
    ("answer", "idle"),
    [
        (b"HTTP/1.1 200 OK\r\nServer:x\r\nContent-Length:%d\r\n\r\n%b" % (len(LABELLED), LABELLED), 60.0),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"%x;a=b\r\n%b\r\n5\r\n     \r\n0\r\nX: y\r\n\r\n" % (len(LABELLED), LABELLED),
            60.0,
        ),
        (b"HTTP/1.0 200 OK\r\n\r\n" + LABELLED, 0.1),
    ],
    ids=["without spaces", "chunked", "up to the end"],
)
async def test_answers_of_proxies_are_read_as_well(answer: bytes, idle: float) -> None:
    async with answering(answer, idle=idle) as url:
        outcome = await stress_test(url, BODIES, requests=2, pause=0.05)
    assert (outcome.labels["cat"], outcome.batches, outcome.reasons) == (2, [2, 2], {})


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n<h1>", "an answer is no prediction in JSON"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]", "an answer is no prediction in JSON"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: some\r\n\r\n", "an answer is not HTTP"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "an answer is not HTTP"),
    ],
    ids=["html", "list", "length", "ssh"],
)
async def test_what_is_no_answer_of_a_gateway_is_lost_and_the_reason_said(
    tmp_path: Path, answer: bytes, reason: str
) -> None:
    picture = tmp_path / "cat.png"
    picture.write_bytes(b"{}")
    async with answering(answer) as url:
        arguments = [str(picture), "--url", url, "--requests", "2", "--pause", "0"]
        done = await asyncio.to_thread(CliRunner().invoke, module.stress, arguments)
    assert str(done.exception) == f"2 of 2 requests were lost: {reason} (2)"


def test_a_date_says_how_long_to_wait_as_well() -> None:
    assert module._pause("2") == 2.0
    later = datetime.now(UTC) + timedelta(seconds=30)
    assert 25 < module._pause(format_datetime(later, usegmt=True)) <= 30
    assert module._pause("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert module._pause("soon") == 1.0


async def test_arrivals_that_had_to_wait_are_timed_from_when_they_were_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_OPEN", 1)
    async with answering(seconds=0.1) as url:
        outcome = await stress_test(url, BODIES, rate=50.0, seconds=0.2)
    assert outcome.statuses[200] == 10
    assert outcome.latencies[0] < 0.5
    assert outcome.latencies[-1] > 0.7, "nine answers of 0.1 s before it, and due after 0.18 s"
