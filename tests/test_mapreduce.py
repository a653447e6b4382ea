"""Map-reduce: every part counts once, whoever is killed, stopped or asked twice."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import Pipeline, RequestFailed, RequestTimeout, RetryPolicy, Tensor
from pipeline.catalog import Value, map_tasks
from pipeline.errors import ConfigurationError
from publishers.mapreduce import mapreduce, scatter
from publishers.search import successive_halving
from subscribers.mapreduce import mapper, reducer, worker

from .apps import idle, serving
from .counting import logistic, words
from .processes import line_with
from .programs import app_program, collect, events, program


def texts() -> list[str]:
    """The descriptions of scikit-learn's datasets, by paragraphs of about 60 lines."""
    package = find_spec("sklearn")  # to import it takes two seconds
    assert package is not None
    folder = Path(str(package.origin)).parent / "datasets" / "descr"
    lines = [line for file in sorted(folder.glob("*.rst")) for line in file.read_text("utf-8").splitlines()]
    return ["\n".join(lines[at : at + 60]) for at in range(0, len(lines), 60)]


def workers(stack: ExitStack, url: str) -> list[subprocess.Popen[str]]:
    """Two, ready."""
    both = [stack.enter_context(program(*app_program("tests.counting"), url=url)) for _ in range(2)]
    for one in both:
        line_with("ready", one)
    return both


@asynccontextmanager
async def counted(app: Pipeline, parts: list[str], seconds: float) -> AsyncIterator[asyncio.Task[dict[str, Any]]]:
    """A word count that is under way."""
    tasks = [{"number": number, "text": text, "seconds": seconds} for number, text in enumerate(parts)]
    job = asyncio.create_task(mapreduce(app, "words", tasks, job="count", timeout=60.0))
    try:
        yield job
    finally:
        job.cancel()
        await asyncio.gather(job, return_exceptions=True)


async def test_words_are_counted_once_though_a_worker_stops_and_wakes_up(url: str) -> None:
    """The stopped one's lease outlasts the job: only a backup task can finish it, and what it says later is late."""
    parts = texts()
    with ExitStack() as stack:
        first, _ = workers(stack, url)
        async with Pipeline("client", url) as app, counted(app, parts, 0.01) as job:
            await asyncio.to_thread(line_with, "begins", first)
            first.send_signal(signal.SIGSTOP)
            by_bucket = await job
            first.send_signal(signal.SIGCONT)
            await idle(app, map_tasks("words"))
            tasks = events(await collect(app, map_tasks("words"), len(parts) + 1))
    found: Counter[str] = sum((Counter(bucket) for bucket in by_bucket.values()), Counter())
    assert found == sum((words(text) for text in parts), Counter())
    assert len(parts) > 10
    assert found["the"] > 100
    assert [task.backup for task in tasks[: len(parts)]] == [0] * len(parts)
    assert tasks[len(parts)].backup == 1


async def test_a_gradient_is_exact_though_a_worker_is_killed(url: str) -> None:
    random = np.random.default_rng(0)
    x, weights = random.standard_normal((4000, 20)), random.standard_normal(20)
    y = (random.random(4000) < 1 / (1 + np.exp(-x @ weights))).astype(np.float64)
    with ExitStack() as stack:
        first, _ = workers(stack, url)
        async with Pipeline("client", url) as app:
            w = np.zeros(20)
            for step in range(5):
                parts = [
                    {"number": number, "x": part, "y": labels, "weights": w, "seconds": 0.01}
                    for number, (part, labels) in enumerate(zip(np.split(x, 16), np.split(y, 16), strict=True))
                ]
                job = asyncio.create_task(mapreduce(app, "logistic", parts, backup=0.0, timeout=60.0))
                if step == 1:
                    await asyncio.to_thread(line_with, "begins", first)
                    first.kill()
                found, expected = await job, logistic(x, y, w)
                np.testing.assert_allclose(found["gradient"], expected["gradient"], rtol=0, atol=1e-10)
                np.testing.assert_allclose(found["loss"], expected["loss"], rtol=0, atol=1e-9)
                w = w - 1e-3 * found["gradient"]
    assert expected["loss"] < 0.9 * logistic(x, y, np.zeros(20))["loss"]


# -- in this process -----------------------------------------------------------------------------------------------


async def test_a_part_that_is_handed_out_again_and_again_counts_once(
    anywhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("publishers.mapreduce.LEAST_PATIENCE", 0.0)
    monkeypatch.setattr("publishers.mapreduce.TICK", 0.001)
    app, called = Pipeline("app", anywhere), Counter()

    @mapper(app, "squares", concurrency=8)
    def square(n: int) -> dict[str, int]:
        called[n] += 1
        time.sleep(0.05 if n % 5 == 0 else 0.001)
        return {"odd" if n % 2 else "even": n * n, "all": n * n}

    @reducer(app, "squares")
    def add(key: str, values: list[int]) -> int:
        return sum(values)

    async with serving(app):
        found = await mapreduce(app, "squares", list(range(20)), backup=0.001, timeout=30.0)
    assert found == {
        "all": sum(n * n for n in range(20)),
        "even": sum(n * n for n in range(0, 20, 2)),
        "odd": sum(n * n for n in range(1, 20, 2)),
    }
    assert sum(called.values()) > 20, "no part was handed out twice, so this shows nothing"


async def test_values_of_a_key_come_in_the_order_of_their_parts(anywhere: str) -> None:
    app = Pipeline("app", anywhere)

    @mapper(app, "letters", concurrency=4)
    def letter(n: int) -> dict[str, str]:
        time.sleep(0.02 if n == 0 else 0.0)
        return {"text": chr(ord("a") + n)}

    @reducer(app, "letters")
    def join(key: str, values: list[str]) -> str:
        return "".join(values)

    async with serving(app):
        assert await mapreduce(app, "letters", list(range(8))) == {"text": "abcdefgh"}
        assert await mapreduce(app, "letters", []) == {}


async def test_arrays_and_dictionaries_go_and_come(anywhere: str) -> None:
    app = Pipeline("app", anywhere)

    @worker(app, "scale")
    def scale(part: dict[str, Any]) -> dict[str, Any]:
        return {"by": part["by"], "scaled": part["x"] * part["by"], "shape": list(part["x"].shape)}

    async with serving(app):
        parts = [{"x": np.full((300, 200), 1.0 * n), "by": n} for n in range(3)]
        found = await scatter(app, "scale", parts)
    assert [(one["by"], one["shape"]) for one in found] == [(n, [300, 200]) for n in range(3)]
    assert all(np.array_equal(one["scaled"], np.full((300, 200), 1.0 * n * n)) for n, one in enumerate(found))
    assert scale({"x": np.ones(2), "by": 2})["scaled"].tolist() == [2.0, 2.0], "a worker is still a function"


async def test_what_a_function_raises_reaches_who_asked(anywhere: str) -> None:
    app, policy, calls = Pipeline("app", anywhere), RetryPolicy(attempts=2, base=0.001), Counter()

    @worker(app, "roots", retry=policy)
    def root(n: float) -> float:
        calls[n] += 1
        if n < 0:
            raise ArithmeticError(f"{n} has no root")
        return n**0.5

    @mapper(app, "words")
    def wrong(text: str) -> Any:
        return text.split()

    async with serving(app):
        assert await scatter(app, "roots", [4.0, 9.0]) == [2.0, 3.0]
        with pytest.raises(RequestFailed, match=r"-1\.0 has no root"):
            await scatter(app, "roots", [4.0, -1.0])
        with pytest.raises(RequestFailed, match="part 0 became list; expected a dict of str → value"):
            await mapreduce(app, "words", ["a b"])
    assert calls[-1.0] == 2


async def test_without_workers_the_time_runs_out(valkey_url: str) -> None:
    async with Pipeline("client", valkey_url) as app:
        with pytest.raises(RequestTimeout, match=r"2 of 2 parts on channel 'mapreduce\.nobody\.map' have no result"):
            await scatter(app, "nobody", [1, 2], timeout=0.2)
        with pytest.raises(ConfigurationError, match="timeout=0"):
            await scatter(app, "nobody", [1, 2], timeout=0)


def test_async_functions_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="make it a plain function"):

        @worker(Pipeline("app", "memory://"), "w")
        async def work(n: int) -> int:
            return n


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(value=JSON | st.dictionaries(st.text(), JSON | hnp.arrays(np.float32, 3) | st.floats(), max_size=4))
@settings(max_examples=50, deadline=None)
def test_a_value_survives_the_way(value: Any) -> None:
    found = Value.model_validate_json(Value.of(value).model_dump_json()).get()
    np.testing.assert_equal(found, value)


def test_a_value_is_json_or_arrays() -> None:
    assert Value.of(np.float64(2.5)).get() == 2.5
    assert np.isnan(Value.of(np.float32("nan")).get())
    assert Value.of({"loss": np.float16("inf")}).get() == {"loss": float("inf")}
    assert Value.of({"": np.float32("inf"), "a": 1}).get() == {"": float("inf"), "a": 1}
    assert Value.of(Tensor(np.arange(3))).get().tolist() == [0, 1, 2]
    assert Value.of(float("-inf")).get() == float("-inf")
    for wrong in (object(), [float("nan")], {"a": {"b": np.ones(2)}}):
        with pytest.raises(ValueError, match="a value is JSON, an array, or a dictionary of both"):
            Value.of(wrong)


# -- search --------------------------------------------------------------------------------------------------------


async def test_successive_halving_gives_the_promising_ever_more_of_the_budget(anywhere: str) -> None:
    app, spent = Pipeline("app", anywhere), Counter()

    @worker(app, "trials", concurrency=4)
    def trial(asked: dict[str, Any]) -> float:
        """Converges to its quality: the more slowly, the better it is."""
        quality, resource = asked["parameters"]["quality"], asked["resource"]
        spent[quality] += resource
        return float(quality - 4.0 / resource) if quality else float("nan")

    async with serving(app):
        trials = await successive_halving(app, "trials", [{"quality": n} for n in range(16)], budget=16 * 16)
        with pytest.raises(ConfigurationError, match="need at least 64"):
            await successive_halving(app, "trials", [{"quality": n} for n in range(16)], budget=63)
    assert [trial.parameters["quality"] for trial in trials] == [*range(15, 0, -1), 0]
    assert [trial.resource for trial in trials] == [32, 32, 16, 16, *[8] * 4, *[4] * 8]
    assert (spent[15], spent[0]) == (4 + 8 + 16 + 32, 4)
    assert sum(spent.values()) == 16 * 16
