"""Big tensors travel beside their frames: shared memory on one host, blobs elsewhere. No leaks, nothing torn."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch

from pipeline import (
    Batch,
    Channel,
    Event,
    Message,
    Pipeline,
    Reject,
    Reply,
    RequestFailed,
    Retry,
    RetryPolicy,
    Tensor,
    payloads,
    segments,
)
from pipeline.errors import PayloadTooLarge
from pipeline.segments import Exhausted, Gone, Mappings, Owner, orphans, sweep
from pipeline.server import Server
from pipeline.settings import settings
from pipeline.transports.payload_store import RedisPayloadStore

from .apps import idle, serving, until
from .workers import Worker, images

DEPLOYMENT, OTHER = "0123456789abcdef", "fedcba9876543210"


class Image(Event):
    n: int
    pixels: Tensor


class Size(Event):
    n: int


pictures = Channel("pictures", Image)
copies = Channel("copies", Image)
enlargements = Channel("enlargements", Size, reply=Image)


def image(n: int, size: int = 602_112) -> Image:
    return Image(n=n, pixels=np.full(size, n % 251, np.uint8))


def files(url: str) -> list[Path]:
    with redis.Redis.from_url(url, decode_responses=True) as client:
        deployment = client.get("pipeline:deployment")
    return sorted(settings().shm_dir.glob(f"pipeline-{deployment}-*")) if deployment else []


def payload_keys(url: str) -> list[str]:
    with redis.Redis.from_url(url, decode_responses=True) as client:
        return [key for key in client.scan_iter("pipeline:*") if ":b:" in key or ":p:" in key]


def expiring(url: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on the first blob of each place is gone as soon as it is there. Returns the places, upload by upload."""
    upload, uploaded = RedisPayloadStore.upload, list[str]()

    async def too_early(store: RedisPayloadStore, place: str, name: str, chunks: Any) -> None:
        await upload(store, place, name, chunks)
        if place not in uploaded:
            with redis.Redis.from_url(url) as client:
                assert client.delete(f"{place}:b:{name}:1") == 1
        uploaded.append(place)

    monkeypatch.setattr(RedisPayloadStore, "upload", too_early)
    return uploaded


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    chosen = getattr(request, "param", "auto")
    monkeypatch.setenv("PIPELINE_PAYLOADS", chosen)
    settings.cache_clear()
    yield chosen
    monkeypatch.undo()
    settings.cache_clear()


# -- the plane -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["shm", "blobs", "inline", "auto"], indirect=True)
async def test_tensors_arrive_whole_through_handlers_and_outputs(mode: str, url: str) -> None:
    app, seen = Pipeline("app", url), []

    @app.subscriber(pictures, group="g", publishes=copies, batch=Batch(8))
    def copy(batch: list[Image]) -> list[Image]:
        return [Image(n=picture.n, pixels=np.asarray(picture.pixels) + 1) for picture in batch]

    @app.subscriber(copies, group="h")
    async def look(picture: Image) -> None:
        pixels = np.asarray(picture.pixels)
        assert not pixels.flags.writeable
        assert (pixels == picture.n % 251 + 1).all()
        seen.append(picture.n)

    async with serving(app):
        for start in range(0, 200, 10):
            await app.publish(pictures, [image(n) for n in range(start, start + 10)])
        await idle(app, "pictures")
        await idle(app, "copies")
        in_memory, in_redis = app.payloads.placed, app.payloads.blobs
        with redis.Redis.from_url(url) as client:
            inline = client.xrange("pipeline:{pictures}:s")[0][1][b"b"].startswith(b"\x00PLF")
    assert sorted(seen) == list(range(200))
    assert inline == (mode == "inline")
    assert (in_memory >= 40) == (mode in ("shm", "auto"))
    assert (in_redis >= 40) == (mode == "blobs")
    assert files(url) == [], "everything was settled, so nothing stays"
    await asyncio.sleep(2.1 if mode == "blobs" else 0)
    assert payload_keys(url) == []


@pytest.mark.parametrize("mode", ["blobs"], indirect=True)
async def test_a_blob_that_expires_before_its_frame_is_written_is_uploaded_again(
    mode: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a full channel or a long outage makes a publish, or a commit, wait for more than a minute."""
    uploaded = expiring(url, monkeypatch)
    app, seen = Pipeline("app", url), []

    @app.subscriber(pictures, group="g", publishes=copies)
    async def copy(picture: Image) -> Image:
        return picture

    @app.subscriber(copies, group="h")
    async def look(picture: Image) -> None:
        seen.append((picture.n, int(np.asarray(picture.pixels).sum())))

    async with app, serving(app):
        await app.publish(pictures, [image(n, 100_000) for n in range(3)])
        await idle(app, "pictures")
        stats = await idle(app, "copies")
    assert uploaded == ["pipeline:{pictures}"] * 2 + ["pipeline:{copies}"] * 2
    assert sorted(seen) == [(n, n * 100_000) for n in range(3)]
    assert (stats.published, stats.groups["h"].dead) == (3, 0)


@pytest.mark.parametrize("mode", ["auto", "blobs", "inline"], indirect=True)
async def test_an_output_above_the_limit_fails_its_event_alone(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("PIPELINE_MAX_FRAME_BYTES", "1000000")
    settings.cache_clear()
    app = Pipeline("app", valkey_url)

    @app.subscriber(Channel("sizes", Size), group="g", publishes=copies)
    async def make(event: Size) -> Image:
        return image(event.n, 2_000_000 if event.n == 5 else 300_000)

    async with app, serving(app):
        await app.publish(Channel("sizes", Size), [Size(n=n) for n in range(10)])
        ledger = (await idle(app, "sizes")).groups["g"]
        (letter,) = await app.dead_letters("sizes")
    assert (ledger.handled, ledger.dead) == (9, 1)
    assert "PIPELINE_MAX_FRAME_BYTES" in letter.event.reason


@pytest.mark.parametrize("mode", ["auto", "blobs"], indirect=True)
async def test_many_events_may_be_above_the_limit_together(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("PIPELINE_MAX_FRAME_BYTES", "1000000")
    settings.cache_clear()
    async with Pipeline("app", valkey_url) as app:
        await app.publish(pictures, [image(n, 300_000) for n in range(10)])
        async with app.watch(pictures, since=60) as stream:
            seen = [(await anext(aiter(stream))).event.n for _ in range(10)]
    assert seen == list(range(10))


@pytest.mark.parametrize("mode", ["shm", "blobs"], indirect=True)
async def test_retries_and_dead_letters_keep_their_tensors(mode: str, url: str) -> None:
    app, sums = Pipeline("app", url), []

    @app.subscriber(pictures, group="g", retry=RetryPolicy(3, base=0.01))
    async def total(message: Message[Image]) -> None:
        if message.event.n == 1 and message.attempt == 1:
            raise Retry(delay=0.2)
        if message.event.n == 2 and not sums.count(2 * 602_112):
            sums.append(2 * 602_112)
            raise Reject("not yet")
        sums.append(int(np.asarray(message.event.pixels).sum(dtype=np.int64)))

    async with serving(app):
        await app.publish(pictures, [image(n) for n in range(4)])
        await idle(app, "pictures")
        for n in range(4, 40):  # their segments are used again and again
            await app.publish(pictures, image(n))
        await idle(app, "pictures")
        assert len(await app.dead_letters("pictures")) == 1
        await app.settle_dead(await app.dead_letters("pictures"), replay=True)
        await idle(app, "pictures")
    assert sorted(sums) == sorted([n * 602_112 for n in range(40)] + [2 * 602_112])


@pytest.mark.parametrize("mode", ["shm", "blobs", "inline"], indirect=True)
async def test_what_torch_writes_in_place_is_seen_by_nobody_else(mode: str, url: str) -> None:
    app, seen, kept = Pipeline("app", url), [], []

    @app.subscriber(pictures, group="g", retry=RetryPolicy(2, base=0.01))
    async def change(message: Message[Image]) -> None:
        tensor = torch.as_tensor(message.event.pixels)
        seen.append((message.event.n, tensor.unique().tolist()))
        tensor.add_(100)
        kept.append((message.event.n, tensor))
        raise ValueError("again")

    async with serving(app):
        for n in range(8):  # those that are not kept for long are used again
            await app.publish(pictures, [image(n), image(n + 50)])
            await idle(app, "pictures")
            del kept[: len(kept) - 2]
        letters = await app.dead_letters("pictures")
        await app.settle_dead(letters[:1], replay=True)
        await idle(app, "pictures")
    assert len(seen) == 34
    assert all(values == [n] for n, values in seen)
    assert all((tensor == n + 100).all() for n, tensor in kept)
    del kept[:]


async def test_a_handler_may_keep_what_it_was_given(mode: str, valkey_url: str) -> None:
    """Segments are not used again while anything looks at them, even after their event is settled."""
    app, kept = Pipeline("app", valkey_url), []

    @app.subscriber(pictures, group="g")
    async def keep(picture: Image) -> None:
        if picture.n < 5:
            kept.append((picture.n, np.asarray(picture.pixels)[100:200]))

    async with serving(app):
        for n in range(60):
            await app.publish(pictures, image(n))
        await idle(app, "pictures")
        assert app.payloads.placed == 60
        assert len(files(valkey_url)) < 40, "the others were used in turn"
        assert all((pixels == n).all() for n, pixels in kept)
    assert all((pixels == n).all() for n, pixels in kept), "even when the pipeline is closed"
    del kept[:]


async def test_who_watches_sees_tensors_and_counts_what_came_too_late(mode: str, valkey_url: str) -> None:
    app = Pipeline("app", valkey_url)

    @app.subscriber(pictures, group="g")
    async def work(picture: Image) -> None: ...

    async with serving(app):
        async with app.watch(pictures) as stream:
            for n in range(5):
                await app.publish(pictures, image(n))
            got = [await anext(aiter(stream)) for _ in range(5)]
            assert [(m.event.n, int(np.asarray(m.event.pixels)[0])) for m in got] == [(n, n) for n in range(5)]
            del got
        await idle(app, "pictures")
    async with app, app.watch(pictures, since=60) as stream:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await anext(aiter(stream))
        assert stream.dropped == 5


async def test_a_later_group_and_a_rewind_begin_after_what_is_gone(mode: str, url: str) -> None:
    app, late, seen = Pipeline("app", url), Pipeline("late", url), []

    @app.subscriber(pictures, group="g")
    async def work(picture: Image) -> None: ...

    @late.subscriber(pictures, group="late")
    async def look(picture: Image) -> None:
        seen.append(picture.n)

    async with serving(app):
        for n in range(4):
            await app.publish(pictures, image(n))
        await idle(app, "pictures")
        for where in list(app.payloads._used):
            await app.payloads._collect(where)
        assert await app.rewind("pictures", "g", 3600) == 0
        async with serving(late):
            await app.publish(pictures, image(9))
            ledger = await idle(app, "pictures")
    assert seen == [9]
    assert ledger.groups["late"].before == 4
    assert ledger.groups["g"].handled == 5
    assert ledger.groups["late"].dead == 0


async def test_after_a_flush_those_that_were_there_and_newcomers_read_each_others_tensors(mode: str, url: str) -> None:
    old, new = Pipeline("old", url), Pipeline("new", url)
    seen: list[tuple[str, int, int]] = []

    @old.subscriber(pictures, group="g")
    async def look(picture: Image) -> None:
        seen.append(("old", picture.n, int(np.asarray(picture.pixels)[-1])))

    @new.subscriber(copies, group="g")
    async def look_too(picture: Image) -> None:
        seen.append(("new", picture.n, int(np.asarray(picture.pixels)[-1])))

    async with serving(old):
        for channel in (pictures, copies):
            await old.publish(channel, image(1))
        await idle(old, "pictures")
        with redis.Redis.from_url(url) as client:
            client.flushall()
        async with serving(new):
            await new.publish(pictures, image(2))
            await old.publish(copies, image(3))
            await idle(old, "copies")
            await idle(old, "pictures")
            assert (new.payloads.placed, old.payloads.placed, new.payloads.blobs, old.payloads.blobs) == (1, 3, 0, 0)
    assert sorted(seen) == [("new", 3, 3), ("old", 1, 1), ("old", 2, 2)]


async def test_who_asks_about_a_tensor_that_is_gone_is_told_at_once(mode: str, url: str) -> None:
    questions = Channel("questions", Image, reply=Size)
    app, worker = Pipeline("app", url), Pipeline("worker", url)

    @worker.subscriber(questions, group="g")
    async def measure(picture: Image) -> Size:
        return Size(n=np.asarray(picture.pixels).size)

    async with app:
        asking = asyncio.create_task(app.request(questions, image(1), timeout=10.0))
        await until(lambda: any(not path.name.endswith(".lock") for path in files(url)))
        await asyncio.sleep(0.1)
        for path in files(url):
            if not path.name.endswith(".lock"):
                path.unlink()
        async with serving(worker):
            with pytest.raises(RequestFailed, match="PayloadGone: its tensors were in a host's shared memory"):
                await asking
            assert (await app.request(questions, image(2, 1000), timeout=10.0)).n == 1000


@pytest.mark.parametrize("mode", ["shm", "blobs", "inline", "auto"], indirect=True)
async def test_answers_travel_as_events_do(mode: str, url: str) -> None:
    """Forty answers, each let go of before the next is asked for: one segment serves them all, and nothing is left."""
    app, worker = Pipeline("app", url), Pipeline("worker", url)

    @worker.subscriber(enlargements, group="g")
    async def enlarge(event: Size) -> Image:
        return image(event.n)

    async with app, serving(worker):
        for n in range(40):
            answer = await app.request(enlargements, Size(n=n), timeout=10)
            assert (np.asarray(answer.pixels) == n).all()
            del answer
        ways = {"shm": (40, 0), "auto": (40, 0), "blobs": (0, 40), "inline": (0, 0)}
        assert (worker.payloads.placed, worker.payloads.blobs) == ways[mode]
        segments = [path for path in files(url) if not path.name.endswith(".lock")]
        assert len(segments) == (1 if mode in ("shm", "auto") else 0)
        assert payload_keys(url) == []
        kept = await asyncio.gather(*(app.request(enlargements, Size(n=n), timeout=10) for n in range(30)))
        assert all((np.asarray(answer.pixels) == n).all() for n, answer in enumerate(kept)), "while all are kept"
        with redis.Redis.from_url(url) as client:
            assert client.keys("pipeline:reply:*") == []
    assert all((np.asarray(answer.pixels) == n).all() for n, answer in enumerate(kept)), "after their owner has gone"
    del kept
    assert files(url) == []


async def test_an_answer_to_another_host_is_a_blob_and_nobody_elses(
    mode: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The requester shares the workers' Redis, but has a shared-memory folder of its own."""
    worker = Pipeline("worker", url)

    @worker.subscriber(enlargements, group="g")
    async def enlarge(event: Size) -> Image:
        return image(event.n, 20_000_000)

    monkeypatch.setenv("PIPELINE_SHM_DIR", str(tmp_path))
    settings.cache_clear()
    async with Pipeline("app", url) as app, serving(worker):
        answer = await app.request(enlargements, Size(n=7), timeout=10)
        assert (np.asarray(answer.pixels) == 7).all()
        assert (worker.payloads.placed, worker.payloads.blobs) == (0, 1)
        assert payload_keys(url) == [], "the two chunks went when they were read"


@pytest.mark.parametrize("mode", ["blobs"], indirect=True)
async def test_an_answers_blob_that_expires_before_the_commit_is_uploaded_again(
    mode: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded = expiring(url, monkeypatch)
    app = Pipeline("app", url)

    @app.subscriber(enlargements, group="g")
    async def enlarge(event: Size) -> Image:
        return image(event.n)

    async with app, serving(app):
        assert (np.asarray((await app.request(enlargements, Size(n=3), timeout=10)).pixels) == 3).all()
    first, second = uploaded
    assert first == second


async def test_an_answer_that_nobody_takes_goes_in_time(mode: str, url: str) -> None:
    app, worker = Pipeline("app", url), Pipeline("worker", url)

    @worker.subscriber(enlargements, group="g")
    async def enlarge(event: Size) -> Image:
        return image(event.n)

    async with app:
        app.ask(enlargements, Size(n=0), timeout=60)
        assert app._replies is not None
        assert app._replies._task is not None
        app._replies._task.cancel()  # before it listens
        await until(lambda: app._backend is not None and app._outboxes)
    async with serving(worker):
        await until(lambda: worker.payloads.placed == 1)
        for n in range(1, 3):
            async with Pipeline("other", url) as other:
                await other.request(enlargements, Size(n=n), timeout=10)
        segments = [path for path in files(url) if not path.name.endswith(".lock")]
        assert len(segments) == 2, "what nobody took is not written on, what was taken is"
        (loan,) = [loan for sent in worker.payloads._loans._sent.values() for loan in sent if not loan.segment.taken]
        assert 0 < loan.until - time.monotonic() <= payloads.UNTAKEN
        loan.until = time.monotonic()
        worker.payloads._reclaim()
        assert worker.payloads._loans.rest() == []
    assert files(url) == []


async def test_what_dead_workers_answered_is_swept_when_nobody_can_take_it_any_more(mode: str, url: str) -> None:
    async with Pipeline("app", url) as app:
        await app.payloads.announce(pictures)
        for until_ in (time.time() + 60, time.time() - 1):
            dead = Owner(app.payloads._deployment, 1 << 20, settings().shm_dir)
            segment = dead.write([memoryview(b"a" * 100)], 100, {"until": until_})
            assert segment is not None
            dead.close([segment])
            await app.payloads.sweep()
            assert segment.path.exists() == (until_ > time.time())
            segment.path.unlink(missing_ok=True)
        await app.payloads.sweep()
    assert files(url) == []


async def test_many_answers_to_one_requester_are_cut_into_frames(mode: str, url: str) -> None:
    app = Pipeline("app", url)

    @app.subscriber(enlargements, group="g", batch=Batch(64))
    async def enlarge(batch: list[Size]) -> list[Image]:
        return [image(event.n, 1_000_000) for event in batch]

    async with app, serving(app):
        answers = await asyncio.gather(*(app.request(enlargements, Size(n=n), timeout=10) for n in range(64)))
        assert all((np.asarray(answer.pixels) == n).all() for n, answer in enumerate(answers))
        assert 64 / 8 <= app.payloads.placed < 64


async def test_an_answer_above_the_limit_fails_its_request_alone(
    mode: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_MAX_FRAME_BYTES", "1000000")
    settings.cache_clear()
    app = Pipeline("app", url)

    @app.subscriber(enlargements, group="g")
    async def enlarge(event: Size) -> Image:
        return image(event.n, 2_000_000 if event.n == 5 else 300_000)

    async with app, serving(app):
        asked = [app.request(enlargements, Size(n=n), timeout=10) for n in range(10)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for n, answer in enumerate(answers):
            if n == 5:
                assert isinstance(answer, RequestFailed)
                assert "PIPELINE_MAX_FRAME_BYTES" in str(answer)
            else:
                assert isinstance(answer, Image), answer
                assert answer.n == n


async def test_who_requests_may_be_told_more_than_is_published(mode: str, url: str) -> None:
    """A requester gets the picture; the channel says only that there is one, unless nobody asked."""
    app = Pipeline("app", url)

    @app.subscriber(enlargements, group="g", publishes=copies)
    async def enlarge(message: Message[Size]) -> list[Image | Reply[Image]]:
        found = image(message.event.n)
        return [Reply(found), image(message.event.n, 1)] if message.requested else [found]

    async with app, app.watch(copies) as stream, serving(app):
        answer = await app.request(enlargements, Size(n=1), timeout=10)
        await app.publish(enlargements, Size(n=2))
        published = [await anext(aiter(stream)) for _ in range(2)]
    assert (answer.n, answer.pixels.shape) == (1, (602_112,))
    assert [(message.event.n, message.event.pixels.shape) for message in published] == [(1, (1,)), (2, (602_112,))]


# -- memory that is sent from where it is ----------------------------------------------------------------------------


async def test_what_is_written_where_it_is_sent_from_is_not_copied(mode: str, url: str) -> None:
    app, seen = Pipeline("app", url), []
    written: list[str] = []
    read: list[str] = []

    @app.subscriber(pictures, group="g", publishes=copies)
    async def invert(picture: Image) -> Image:
        read.append(_mapped_file(np.asarray(picture.pixels).ctypes.data))
        pixels = app.empty(picture.pixels.shape, np.uint8)
        np.subtract(255, np.asarray(picture.pixels), out=pixels)
        written.append(_mapped_file(pixels.ctypes.data))
        return Image(n=picture.n, pixels=pixels)

    @app.subscriber(copies, group="h")
    async def look(picture: Image) -> None:
        read.append(_mapped_file(np.asarray(picture.pixels).ctypes.data))
        seen.append((picture.n, int(np.asarray(picture.pixels)[0])))

    async with serving(app):
        for n in range(6):
            pixels = app.empty(500_000, np.uint8)
            pixels[:] = n
            written.append(_mapped_file(pixels.ctypes.data))
            await app.publish(pictures, Image(n=n, pixels=pixels))
            del pixels
            await idle(app, "pictures")
            await idle(app, "copies")
        assert app.payloads.placed == 12
        assert written == read, "readers have the very files that were written"
        assert all(file.startswith(str(settings().shm_dir)) for file in written)
        segments = [path for path in files(url) if not path.name.endswith(".lock")]
        assert len(segments) <= 5, "and used again"
    assert seen == [(n, 255 - n) for n in range(6)]
    assert files(url) == []


async def test_memory_that_is_still_held_is_not_given_out_again(mode: str, url: str) -> None:
    app, sums = Pipeline("app", url), []

    @app.subscriber(pictures, group="g")
    async def total(picture: Image) -> None:
        sums.append(int(np.asarray(picture.pixels).sum(dtype=np.int64)))

    async with serving(app):
        held = []
        for n in range(4):
            pixels = app.empty((100, 1000), "float32").view(np.uint8)
            pixels[:] = n
            await app.publish(pictures, Image(n=n, pixels=pixels))
            await app.publish(pictures, Image(n=n, pixels=pixels))  # the second time it is copied
            await idle(app, "pictures")
            held.append(pixels)
        assert [int(pixels[0, 0]) for pixels in held] == [0, 1, 2, 3]
        dropped = app.empty(400_000, np.uint8)
        where = dropped.ctypes.data
        del dropped
        assert app.empty(400_000, np.uint8).ctypes.data == where, "what was never sent is there again"
    assert sums == [n * 400_000 for n in range(4) for _ in "ab"]
    assert [int(pixels[0, 0]) for pixels in held] == [0, 1, 2, 3], "and outlives its pipeline"


async def test_memory_is_ordinary_where_none_is_shared(url: str, mode: str) -> None:
    async with Pipeline("app", url) as app:
        for array in (app.empty((3, 4)), app.empty(0), app.empty((1000, 1000), np.float64)):
            assert array.flags.writeable
            assert not _mapped_file(array.ctypes.data).startswith(str(settings().shm_dir))
        assert app.empty((3, 4)).dtype == np.float32


def _mapped_file(address: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, _, high = line.split(" ", 1)[0].partition("-")
        if int(low, 16) <= address < int(high, 16):
            return line.split(None, 5)[5] if len(line.split(None, 5)) == 6 else ""
    return ""


async def test_readers_on_another_host_get_blobs(mode: str, valkey_url: str) -> None:
    app = Pipeline("app", valkey_url)

    @app.subscriber(pictures, group="g")
    async def work(picture: Image) -> None:
        assert (np.asarray(picture.pixels) == picture.n).all()

    async with serving(app):
        await app.backend.payloads.announce("pictures", "another-host")  # type: ignore[union-attr]
        await app.publish(pictures, [image(n) for n in range(3)])
        await idle(app, "pictures")
        assert (app.payloads.placed, app.payloads.blobs) == (0, 1)


async def test_a_channel_that_is_to_survive_the_host_uses_no_shared_memory(mode: str) -> None:
    safe = Channel("safe", Image, fsync=True)
    with Server(appendonly=True) as server:
        app = Pipeline("app", server.url)

        @app.subscriber(safe, group="g")
        async def work(picture: Image) -> None: ...

        async with serving(app):
            await app.publish(safe, image(1))
            await idle(app, "safe")
            assert (app.payloads.placed, app.payloads.blobs) == (0, 1)


async def test_when_shared_memory_is_used_up_tensors_go_through_redis(
    valkey_url: str, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("PIPELINE_SHM_BYTES", "4000000")
    settings.cache_clear()
    app, go, sums = Pipeline("app", valkey_url), asyncio.Event(), []

    @app.subscriber(pictures, group="g")
    async def total(picture: Image) -> None:
        await go.wait()
        sums.append(int(np.asarray(picture.pixels).sum(dtype=np.int64)))

    async with serving(app):
        for n in range(20):
            await app.publish(pictures, image(n))
        assert (app.payloads.placed, app.payloads.blobs) == (6, 14)
        assert sum(path.stat().st_size for path in files(valkey_url)) <= 4_000_000
        go.set()
        await idle(app, "pictures")
    assert sorted(sums) == [n * 602_112 for n in range(20)]


async def test_a_tensor_above_the_limit_is_refused(valkey_url: str, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("PIPELINE_MAX_FRAME_BYTES", "1000000")
    settings.cache_clear()
    async with Pipeline("app", valkey_url) as app:
        with pytest.raises(PayloadTooLarge, match="PIPELINE_MAX_FRAME_BYTES"):
            await app.publish(pictures, image(1, 1_000_001))
        await app.publish(pictures, image(1, 900_000))
        assert (await app.stats()).channels["pictures"].published == 1


async def test_the_plane_is_started_once_however_many_begin_at_once(mode: str, valkey_url: str) -> None:
    channels = [Channel(f"pictures{n}", Image) for n in range(4)]
    async with Pipeline("app", valkey_url) as app:
        await asyncio.gather(*(app.publish(channel, image(n)) for n, channel in enumerate(channels)))
        assert len(files(valkey_url)) == 5, "of this deployment: a segment each, and the owner's lock"
        assert [message.event for channel in channels for message in await app.newest(channel, 9)] == [
            image(n) for n in range(4)
        ]


async def test_a_start_that_was_cancelled_is_begun_again(mode: str) -> None:
    with Server(appendonly=True) as server:
        async with Pipeline("app", server.url) as app:
            await app.registry.register(pictures, app.codec(pictures))
            server.kill()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(app.publish(pictures, image(1)), 0.3)
            await asyncio.to_thread(server.start)
            await app.publish(pictures, image(2))
            assert [message.event for message in await app.newest(pictures, 9)] == [image(2)]


# -- after a SIGKILL -----------------------------------------------------------------------------------------------


async def test_killed_publishers_and_workers_leave_nothing_behind(mode: str, valkey_url: str) -> None:
    """Real processes: a publisher is killed with segments in use, a worker with segments pinned."""
    app = Pipeline("app", valkey_url)
    async with app:
        with Worker("images_publisher", valkey_url) as publisher, Worker("images", valkey_url) as doomed:
            await until(lambda: len(files(valkey_url)) > 3, 30)
            await asyncio.sleep(0.3)
            doomed.kill()
            publisher.kill()
        left = files(valkey_url)
        assert left, "the dead left what nobody has handled yet"
        with Worker("images", valkey_url):
            ledger = await idle(app, "images", 30)
            assert ledger.published == ledger.groups["g"].handled > 0
            assert ledger.groups["g"].dead == 0
            await app.payloads.announce(images)
            await app.payloads.sweep()
            assert not [path for path in files(valkey_url) if path in left]
    assert payload_keys(valkey_url) == []


# -- segments ------------------------------------------------------------------------------------------------------


def test_a_segment_is_written_again_only_when_nobody_looks(tmp_path: Path) -> None:
    owner, mappings = Owner(DEPLOYMENT, 1 << 20, tmp_path), Mappings(DEPLOYMENT, tmp_path)
    first = owner.write([memoryview(b"a" * 100)], 100, {})
    assert first is not None
    reference = first.reference
    view = mappings.view(reference, 100)[10:20]
    owner.free(first, 0.0)
    second = owner.write([memoryview(b"b" * 100)], 100, {})
    assert second is not first
    assert second is not None
    assert bytes(view) == b"a" * 10
    del view
    gc.collect()
    third = owner.write([memoryview(b"c" * 100)], 100, {})
    assert third is first
    with pytest.raises(Gone, match="generation 2"):
        mappings.view(reference, 100)
    assert bytes(mappings.view(third.reference, 100)) == b"c" * 100
    assert third.path.stat().st_mode & 0o777 == 0o600
    owner.close([second, third])
    mappings.close()


def _child(tell: int, asked: int, then: Callable[[], object]) -> int:
    """A forked one that says when it is there, and once it is asked does something and ends."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.write(tell, b"!")
        os.read(asked, 1)
        then()
        os.write(tell, b"!")
    finally:
        os._exit(0)


def test_a_forked_child_holds_what_it_sees_and_unlocks_nothing_of_its_parent(tmp_path: Path) -> None:
    owner, mappings = Owner(DEPLOYMENT, 1 << 20, tmp_path), Mappings(DEPLOYMENT, tmp_path)
    first, second = (owner.write([memoryview(bytes(100))], 100, {}) for _ in "ab")
    assert first is not None
    assert second is not None
    held = [mappings.view(segment.reference, 100) for segment in (first, second)]
    (heard, tell), (asked, ask) = os.pipe(), os.pipe()
    child = _child(tell, asked, held.pop)
    os.read(heard, 1)
    del held[1:]
    gc.collect()
    for segment in (first, second):
        owner.free(segment, 0.0)
    third = owner.write([memoryview(b"c" * 100)], 100, {})
    assert third not in (first, second), "the child looks at one, its parent at the other"
    os.write(ask, b"!")
    os.read(heard, 1)
    fourth = owner.write([memoryview(b"d" * 100)], 100, {})
    os.waitpid(child, 0)
    fifth = owner.write([memoryview(b"e" * 100)], 100, {})
    assert fourth is second
    assert fifth not in (first, second), "the child's end is not its parent's"
    assert bytes(held[0]) == bytes(100)


async def test_a_child_that_leaves_its_parents_block_closes_nothing(mode: str, valkey_url: str) -> None:
    async with Pipeline("app", valkey_url) as app:
        await app.publish(pictures, image(1))
        child = os.fork()
        if child == 0:
            try:
                app.__aexit__().send(None)
            except StopIteration:
                os._exit(0)
            finally:
                os._exit(1)
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert [message.event for message in await app.newest(pictures, 9)] == [image(1)]


def test_a_child_that_outlives_its_parent_does_not_keep_its_segments_alive(tmp_path: Path) -> None:
    owner = Owner(DEPLOYMENT, 1 << 20, tmp_path)
    segment = owner.write([memoryview(bytes(100))], 100, {})
    (heard, tell), (asked, ask) = os.pipe(), os.pipe()
    child = _child(tell, asked, bool)
    os.read(heard, 1)
    assert orphans(DEPLOYMENT, tmp_path) == [], "the child let go of the lock, which its parent has yet"
    os.close(owner._lock)  # as the kernel does after a SIGKILL
    assert [orphan.path for orphan in orphans(DEPLOYMENT, tmp_path)] == [segment.path if segment else None]
    os.write(ask, b"!")
    os.waitpid(child, 0)


def test_segments_leave_file_descriptors_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    monkeypatch.setattr(segments, "_most", lambda: 3)
    before = len(list(Path("/proc/self/fd").iterdir()))
    owner, mappings = Owner(DEPLOYMENT, 10 << 20, tmp_path), Mappings(DEPLOYMENT, tmp_path)
    others = [Owner(DEPLOYMENT, 10 << 20, tmp_path) for _ in "ab"]
    written = [one.write([memoryview(bytes([n]) * 100)], 100, {}) for n, one in enumerate([owner] * 4 + others)]
    assert [segment is None for segment in written] == [False, False, False, True, False, False]
    mine, theirs = [segment for segment in written[:3] if segment], [segment for segment in written[4:] if segment]
    seen = [mappings.view(segment.reference, 100) for segment in [*mine, *theirs]]
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 3 + 3 + 2 + 3, "one for each lock, and no more"
    assert [view[0] for view in seen] == [0, 1, 2, 4, 5], "what there is no room for is copied"
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
    try:
        assert others[0].write([memoryview(bytes(100))], 100, {}) is None
        with pytest.raises(Exhausted):
            mappings.view(theirs[0].reference, 100)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    del seen[:3]
    seen.append(mappings.view(theirs[0].reference, 100))
    others[0].free(theirs[0], 0.0)
    assert others[0].write([memoryview(bytes(100))], 100, {}) is not theirs[0], "mapped again, since nobody saw others"
    owner.free(mine[0], 0.0)
    assert owner.write([memoryview(bytes(300_000))], 300_000, {}) is not None, "a free one of another size made room"


def test_the_quota_holds_and_the_living_are_not_swept(tmp_path: Path) -> None:
    owner = Owner(DEPLOYMENT, 200_000, tmp_path)
    written = [owner.write([memoryview(bytes(50_000))], 50_000, {"n": n}) for n in range(4)]
    assert [segment is None for segment in written] == [False, False, False, True]
    assert orphans(DEPLOYMENT, tmp_path) == []
    sweep([], DEPLOYMENT, tmp_path)
    used: list[Any] = [segment for segment in written if segment]
    owner.free(used.pop(), 0.0)
    owner.close(used)
    found = orphans(DEPLOYMENT, tmp_path)
    assert sorted(orphan.purpose["n"] for orphan in found) == [0, 1], "the free one went with its owner"
    mappings = Mappings(DEPLOYMENT, tmp_path)
    pinned = mappings.view(used[0].reference, 50_000)
    sweep([orphan.path for orphan in found], DEPLOYMENT, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert bytes(pinned) == bytes(50_000), "who has it keeps it"


def test_what_the_dead_left_goes_by_age_only_where_no_redis_can_be_asked(tmp_path: Path) -> None:
    """A backlog may be older than any age: its own deployment knows what is still needed."""
    owner, written_at = Owner(DEPLOYMENT, 1 << 20, tmp_path), time.time()
    segment = owner.write([memoryview(b"a" * 100)], 100, {})
    assert segment is not None
    os.utime(segment.path, (0, 0))
    owner.free(segment, 0.0)
    assert owner.write([memoryview(b"b" * 100)], 100, {}) is segment
    assert segment.path.stat().st_mtime >= written_at - 1, "written again is not forgotten"
    owner.close([segment])
    sweep([], OTHER, tmp_path)
    assert segment.path.exists(), "it may be needed, and is not old"
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    sweep([], DEPLOYMENT, tmp_path)
    assert segment.path.exists(), "nobody said that it is not needed"
    sweep([], OTHER, tmp_path)
    assert list(tmp_path.iterdir()) == []
