"""Data and jobs: what is streamed, at which pace, and what is said of input that cannot be."""

from __future__ import annotations

import argparse
import asyncio
import csv
import itertools
import os
import signal
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from pipeline import Channel, Event, Pipeline, Tensor, catalog
from pipeline.errors import ConfigurationError
from pipeline.server import Server
from publishers.command import paced, positive
from publishers.data import digit_events, stream
from publishers.datasets import digits
from publishers.jobs import job_events
from publishers.rows import read_rows

from .apps import declare
from .processes import line_with
from .programs import app_program, collect, events, finished, program

PROGRAMS = ("publishers.data", "publishers.jobs", "publishers.training", "publishers.gateway")


# -- digits --------------------------------------------------------------------------------------------------------


def test_the_digits_are_scikit_learns_and_each_is_in_one_part_only() -> None:
    split = digits()
    images = np.concatenate([part.images for part in (split.train, split.validation, split.held_out)])
    labels = np.concatenate([part.labels for part in (split.train, split.validation, split.held_out)])
    everything = load_digits()
    ours = sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))
    theirs = zip(everything.images.astype(np.float32), everything.target, strict=True)
    assert ours == sorted((image.tobytes(), int(label)) for image, label in theirs)
    assert [len(part) for part in (split.held_out, split.validation)] == [359, 270]


def test_the_split_depends_on_its_seed_alone() -> None:
    digits.cache_clear()
    before = digits(seed=3).train.images
    digits.cache_clear()
    assert np.array_equal(digits(seed=3).train.images, before)
    assert not np.array_equal(digits(seed=4).train.images, before)


def test_shards_share_a_part_out_without_rest() -> None:
    part = digits().train
    shards = [part.shard(rank, 3) for rank in range(3)]
    assert sum(len(shard) for shard in shards) == len(part)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_the_stream_shows_held_out_digits_only_each_once_an_epoch_in_the_seeds_order() -> None:
    held_out = {image.tobytes() for image in digits().held_out.images}
    epoch = list(itertools.islice(digit_events(seed=1), 359))
    assert {event.image.buffer().tobytes() for event in epoch} == held_out
    assert epoch == list(itertools.islice(digit_events(seed=1), 359))
    assert epoch != list(itertools.islice(digit_events(seed=2), 359))


async def test_digits_are_streamed_at_the_rate_asked_for(url: str) -> None:
    async with Pipeline("t", url) as app:
        started = time.monotonic()
        assert await stream(app, catalog.digits, digit_events(), rate=200, count=60) == 60
        assert 0.25 < time.monotonic() - started < 1.5
        assert events(await collect(app, catalog.digits, 60)) == list(itertools.islice(digit_events(), 60))


async def test_an_outage_is_not_hurried_after() -> None:
    sent = 0
    async for due in paced(100):
        if sent == 0:
            await asyncio.sleep(1.5)
        sent += due
        if sent > 1:
            break
    assert sent <= 2


# -- files ---------------------------------------------------------------------------------------------------------


def test_csv_rows_come_as_values_by_column(tmp_path: Path) -> None:
    file = tmp_path / "sales.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows(
            [["city", "zip", "sold", "price", "open", "note"], ["Köln", "01067", "-3", "9.50", "TRUE", 'a "b",\nc'],
             ["nan", "12345678901234567890", "0", "1e3", "no", ""]]
        )  # fmt: skip
    first, second = read_rows(file)
    assert first == catalog.Record(
        source="sales.csv", row=0,
        values={"city": "Köln", "zip": "01067", "sold": -3, "price": 9.5, "open": True, "note": 'a "b",\nc'},
    )  # fmt: skip
    assert second.values == {
        "city": "nan", "zip": "12345678901234567890", "sold": 0, "price": 1000.0, "open": "no", "note": None,
    }  # fmt: skip


def test_parquet_rows_come_as_values_and_what_json_lacks_as_text(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="an optional dependency")
    from datetime import date

    from pyarrow import parquet

    table = pyarrow.table({"x": [1, None], "day": [date(2024, 2, 29)] * 2, "tags": [["a"], []]})
    parquet.write_table(table, tmp_path / "t.parquet")
    assert [record.values for record in read_rows(tmp_path / "t.parquet")] == [
        {"x": 1, "day": "2024-02-29", "tags": '["a"]'},
        {"x": None, "day": "2024-02-29", "tags": "[]"},
    ]


def test_npy_rows_come_as_tensors(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.int16).reshape(2, 3, 2)
    np.save(tmp_path / "a.npy", array)
    assert [record.tensor for record in read_rows(tmp_path / "a.npy")] == [Tensor(array[0]), Tensor(array[1])]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.csv", None, "there is no such file"),
        ("a.xlsx", b"", "use one of .csv, .parquet, .npy"),
        ("empty.csv", b"", "the first line of a CSV file names its columns"),
        ("twice.csv", b"a,b,a\n", "two columns have the same name"),
        ("latin.csv", "größe\n1\n".encode("latin-1"), "not a CSV file in UTF-8"),
        ("bad.parquet", b"PAR2", "not a Parquet file"),
        ("bad.npy", b"nothing", "not a NPY file of numbers"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_reason(
    name: str, content: bytes | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=said):
        read_rows(tmp_path / name)


def test_pickled_objects_in_a_npy_file_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ConfigurationError, match="not a NPY file of numbers"):
        read_rows(tmp_path / "o.npy")


async def test_a_ragged_line_ends_the_program_and_what_came_before_is_published(
    tmp_path: Path, valkey_url: str
) -> None:
    (tmp_path / "r.csv").write_text("a,b\n" + "1,2\n" * 256 + "3\n")
    result = await asyncio.to_thread(
        finished, "-m", "publishers.data", "--file", str(tmp_path / "r.csv"), url=valkey_url
    )
    assert result.returncode == 2
    assert result.stderr == f"error: {tmp_path}/r.csv, line 258: 1 cells where the header names 2 columns\n"
    async with Pipeline("t", valkey_url) as app:
        assert len(await collect(app, catalog.records, 256)) == 256


# -- stdin ---------------------------------------------------------------------------------------------------------


class Note(Event):
    text: str
    stars: int = 0


notes = Channel("notes", Note)


async def test_lines_of_json_are_published_and_those_that_do_not_fit_are_named(valkey_url: str) -> None:
    lines = '{"text": "good", "stars": 5}\n\nnonsense\n{"stars": "many"}\n{"text": "late"}\n'
    async with Pipeline("t", valkey_url) as app, app.watch(notes) as stream_:
        await declare(app, notes)
        command = ("-m", "publishers.data", "--stdin", "--channel", "notes")
        result = await asyncio.to_thread(finished, *command, url=valkey_url, stdin=lines)
        messages = aiter(stream_)
        assert [(await anext(messages)).event for _ in range(2)] == [Note(text="good", stars=5), Note(text="late")]
    assert result.returncode == 1
    first, second = result.stderr.splitlines()
    assert first.startswith("line 3 is left out: not JSON")
    assert second.startswith("line 4 is left out: not a valid Note")
    assert "text" in second
    assert "'many'" in second


async def test_lines_without_a_channel_become_records(valkey_url: str) -> None:
    result = await asyncio.to_thread(
        finished, "-m", "publishers.data", "--stdin", url=valkey_url, stdin='{"x": 1, "y": null}\n{"x": [1]}\n'
    )
    assert "line 2 is left out: x: a record's values are" in result.stderr
    async with Pipeline("t", valkey_url) as app:
        [record] = events(await collect(app, catalog.records, 1))
    assert record == catalog.Record(source="stdin", row=0, values={"x": 1, "y": None})


async def test_lines_that_are_no_text_or_nested_without_end_cost_only_themselves(valkey_url: str) -> None:
    lines = '{"x": 1}\n{"x": "caf\udce9"}\n' + "[" * 100_000 + "]" * 100_000 + '\n{"x": 4}\n'
    command, strict = ("-m", "publishers.data", "--stdin"), {"PYTHONIOENCODING": "utf-8:strict"}
    result = await asyncio.to_thread(finished, *command, url=valkey_url, stdin=lines, **strict)
    second, third = result.stderr.splitlines()
    assert second.startswith("line 2 is left out: not JSON: 'utf-8' codec can't decode byte 0xe9")
    assert third.startswith("line 3 is left out: not JSON: ")
    async with Pipeline("t", valkey_url) as app:
        assert [record.values for record in events(await collect(app, catalog.records, 2))] == [{"x": 1}, {"x": 4}]


def test_a_channel_that_nobody_declared_is_an_error_that_names_those_there_are(valkey_url: str) -> None:
    result = finished("-m", "publishers.data", "--stdin", "--channel", "nots", url=valkey_url, stdin="{}\n")
    assert result.returncode == 2
    assert "no channel 'nots' is registered" in result.stderr
    assert "Traceback" not in result.stderr


# -- jobs ----------------------------------------------------------------------------------------------------------


def test_jobs_are_of_the_sizes_and_dtype_asked_for_and_set_by_the_seed() -> None:
    jobs = list(itertools.islice(job_events([2, 3], "float16", seed=5), 8))
    assert {size for job in jobs for size in (*job.a.shape, *job.b.shape)} == {2, 3}
    assert {job.a.dtype for job in jobs} == {"float16"}
    assert all(job.a.shape[1] == job.b.shape[0] for job in jobs)
    assert jobs == list(itertools.islice(job_events([2, 3], "float16", seed=5), 8))


def test_now_and_then_a_job_is_for_the_systolic_array_and_one_is_shared() -> None:
    jobs = list(itertools.islice(job_events([4], systolic_every=4, shared_every=4), 8))
    assert [job.kernel for job in jobs] == [None, None, None, "systolic"] * 2
    assert [job.blocks for job in jobs] == ["auto", "always", "auto", "auto"] * 2
    assert {job.a.shape for job in jobs} == {(4, 4), (16, 16), (12, 12)}


async def test_the_job_program_publishes_jobs(valkey_url: str) -> None:
    command = ("-m", "publishers.jobs", "--rate", "50", "--sizes", "4,5", "--count", "3")
    result = await asyncio.to_thread(finished, *command, url=valkey_url)
    assert (result.stderr, result.returncode) == ("", 0)
    async with Pipeline("t", valkey_url) as app:
        assert events(await collect(app, catalog.matmul_jobs, 3)) == list(itertools.islice(job_events([4, 5]), 3))


@pytest.mark.parametrize("sizes", ["0", "64,big", "100000"])
def test_impossible_sizes_are_refused(sizes: str) -> None:
    result = finished("-m", "publishers.jobs", "--sizes", sizes, url="redis://127.0.0.1:1")
    assert result.returncode == 2
    assert "sizes are" in result.stderr


# -- programs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf"])
def test_rates_are_finite_numbers_above_zero(rate: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"{rate} is no finite number above 0"):
        positive(rate)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_explains_itself(name: str) -> None:
    result = finished("-m", name, "--help", url="redis://127.0.0.1:1")
    assert result.returncode == 0
    assert f"python -m {name}" in result.stdout
    assert len(result.stdout.splitlines()) > 8


@pytest.mark.parametrize("arguments", [*PROGRAMS, "publishers.data --stdin", "publishers.training --rank 0"])
def test_a_setting_that_cannot_be_is_said_in_one_line(arguments: str) -> None:
    result = finished("-m", *arguments.split(), url="redis://127.0.0.1:1", PIPELINE_LOG_LEVEL="loud")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "PIPELINE_LOG_LEVEL" in result.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "publishers.data", "--count", "5"),
        ("-m", "publishers.data", "--stdin"),
        app_program("subscribers.matmul"),
    ],
    ids=["data", "stdin", "matmul"],
)
def test_a_program_waits_for_a_redis_that_is_not_there_yet(command: tuple[str, ...]) -> None:
    with Server() as server:
        port, url = int(server.url.rsplit(":", 1)[1].removesuffix("/0")), server.url
    with program(*command, url=url) as process:
        said = line_with("no Redis answers", process)
        assert "pipeline server" in said
        with Server(port=port):
            if "--count" in command:
                line_with("published 5 events", process)
                assert process.wait(10) == 0
            elif "--stdin" in command:
                assert process.wait(10) == 0
            else:
                line_with("ready", process)


@pytest.mark.parametrize("name", ["publishers.gateway", "dashboards"])
def test_a_server_ends_quietly_at_ctrl_c(valkey_url: str, name: str) -> None:
    with program("-m", name, "--port", "0", url=valkey_url, PYTHONWARNINGS="default") as process:
        address = line_with("http://", process).split()[-1]
        with urllib.request.urlopen(address + ("/healthz" if name == "publishers.gateway" else "/"), timeout=20):
            pass  # now it runs
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert "Traceback" not in process.stdout.read()
        assert process.wait(10) == 0


def test_a_password_in_the_url_is_not_shown() -> None:
    with program("-m", "publishers.data", url="redis://:hush@127.0.0.1:1/0") as process:
        assert "hush" not in line_with("no Redis answers", process)


def test_help_does_not_import_torch() -> None:
    modules = "publishers.data, publishers.training.command_line, publishers.gateway"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert finished("-c", code, url="redis://127.0.0.1:1", PATH=os.environ["PATH"]).stdout == "False\n"
