"""The dashboard's data path without a network: what goes in is what comes out, once, at every width."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
import tracemalloc
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboards.alerts import alerts
from dashboards.browse import summary
from dashboards.controls import Controls
from dashboards.facts import channels, models, serving, totals
from dashboards.feed import Feed
from dashboards.flow import diagram
from dashboards.jobs import Jobs
from dashboards.numbers import numbers
from dashboards.rings import LEVELS, Gauge, Histogram, Sum, level_of, quantiles, spread
from dashboards.runs import SLOTS, Runs, Trace, nice
from dashboards.state import MOST_SERIES, QUIET, State
from dashboards.streams import Stream, View, left_out
from dashboards.wire import Series, decode, dumps, encode
from pipeline import Message, Pipeline, Tensor, catalog
from pipeline.catalog import ModelStatus, TrainingMetrics
from pipeline.ledger import ChannelLedger, GroupLedger, Ledger, ledger_channel
from pipeline.metrics import LATENCY_BOUNDS, GroupSample, WorkerSample, metrics_channel
from pipeline.testing import store

from .apps import until

T = 1_000_000.0
STATUS: dict[str, Any] = {"live": True}


def total(ring: Sum, level: int = 0) -> float:
    last = ring.newest(level) + 1
    return float(np.nansum(ring.read(level, last - LEVELS[level][1], last)))


def ledger(time: float, first: int = 1, **published: int) -> Ledger:
    known = {name: ChannelLedger(published=count) for name, count in published.items()}
    return Ledger(time=time, channels={ledger_channel.name: ChannelLedger(published=first), **known})


def grouped(time: float, published: int, **counts: int) -> Ledger:
    group = GroupLedger(**counts)
    return Ledger(time=time, channels={"c": ChannelLedger(published=published, groups={"g": group})})


def sample(time: float, worker: str = "w", **more: Any) -> WorkerSample:
    fields: dict[str, Any] = {"app": "app", "host": "h", "pid": 1, "started": T, "published": {}, "groups": []}
    fields.update({"cpu": 0.5, **more}, worker=worker, version="1", interval=1.0, rss=1, dropped={})
    return WorkerSample(**fields)


# -- clocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [3600.0, -3600.0])
async def test_one_clock_counts_the_servers(off: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dashboard's host is a minute behind it, and one of two processes an hour off."""
    started = time.time()
    controls, app = Controls(), Pipeline("app", f"memory://clocks{off}")
    async with app:
        store(app).clock.advance(60)
        feed = Feed(Pipeline("dashboard", f"memory://clocks{off}"), State(), controls.subscriptions())
        following = asyncio.create_task(feed.run())
        await app.publish(catalog.model_status, ModelStatus(model="m", version=1, worker="w", state="serving"))
        await app.publish(metrics_channel, sample(T))
        with monkeypatch.context() as patch:
            patch.setattr("pipeline.publishing.time", SimpleNamespace(time=lambda: started + off))
            await app.publish(metrics_channel, sample(T, "other", host="i", started=started + off))
        await app.publish(metrics_channel, sample(T))
        await until(lambda: {"w", "other"} <= feed.state.workers.keys() and feed.live)
        moment = started + 60
        assert feed.now() == pytest.approx(moment, abs=5)
        for worker in feed.state.workers.values():
            assert worker.seen == pytest.approx(moment, abs=5)
        assert feed.state.workers["other"].sample.started == pytest.approx(moment, abs=5)
        assert set(controls.models()) == {"m"}
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


# -- served models -----------------------------------------------------------------------------------------------


def test_workers_that_stopped_died_or_were_never_heard_serve_nothing() -> None:
    """And stay so, while others report, for a day."""
    controls = Controls()
    (on_sample,) = [one.handler for one in controls.subscriptions() if one.channel is metrics_channel]
    (on_status,) = [one.handler for one in controls.subscriptions() if one.channel is catalog.model_status]
    ids = itertools.count(1)

    def hear(handler: Any, event: Any, time: float) -> None:
        handler(Message(event, f"s:{next(ids)}", "c", "s", datetime.fromtimestamp(T + time, UTC)))

    def serve(worker: str, time: float) -> None:
        hear(on_status, ModelStatus(model="m", version=1, worker=worker, state="serving"), time)

    def living() -> set[str]:
        return set(controls.models().get("m", {"workers": ()})["workers"])

    serve("of yesterday", -40_000)
    for worker in ("stops", "dies"):
        serve(worker, 0)
        hear(on_sample, sample(T, worker), 1)
    assert living() == {"stops", "dies"}
    hear(on_sample, sample(T, "stops", last=True), 2)
    assert living() == {"dies"}
    serve("begins", 2)
    hear(on_sample, sample(T, "other"), 3)
    assert living() == {"dies", "begins"}
    for moment in (10, 400, 600, 1200, 80_000):
        hear(on_sample, sample(T, "other"), moment)
        assert controls.models() == {}


def test_a_model_whose_workers_are_all_gone_is_not_shown_as_served() -> None:
    state = State()
    state.on_model(ModelStatus(model="m", version=1, worker="w", state="serving"), T)
    state.on_worker(sample(T, "w"), T)
    assert [row["state"] for row in models(state)] == ["serving"]
    state.on_worker(sample(T, "w", last=True), T + 1)
    assert [row["state"] for row in models(state)] == ["gone"]


# -- rings -------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 3000), st.integers(0, 1000)), max_size=60))
def test_every_width_of_bucket_adds_up_to_the_same(items: list[tuple[float, int]]) -> None:
    ring = Sum()
    newest = max((moment for moment, _ in items), default=0.0)
    for moment, count in items:
        ring.add(T + moment, count)
    for level, (width, slots) in enumerate(LEVELS):
        first = int((T + newest) // width) - slots
        held = sum(count for moment, count in items if int((T + moment) // width) > first)
        assert total(ring, level) == held


@given(st.floats(0.01, 30), st.integers(0, 10_000))
def test_what_came_between_two_ledgers_is_spread_in_whole_numbers(seconds: float, count: int) -> None:
    ring = Sum()
    spread(ring, T, T + seconds, count)
    values = ring.read(0, int(T) - 2, int(T + seconds) + 2)
    heard = values[~np.isnan(values)]
    assert heard.sum() == count
    assert (heard == np.round(heard)).all()
    assert (heard >= 0).all()


def test_a_gauge_keeps_the_last_the_lowest_and_the_highest() -> None:
    ring = Gauge()
    for moment, value in ((0.1, 5), (0.2, 1), (0.9, 3), (2.0, 7)):
        ring.set(T + moment, value)
    rows = ring.read(0, int(T), int(T) + 3)
    assert rows[0].tolist() == [3, 1, 5]
    assert np.isnan(rows[1]).all()
    assert rows[2].tolist() == [7, 7, 7]


def test_old_buckets_are_empty_again_when_their_place_is_reused() -> None:
    ring = Sum()
    ring.add(T, 1)
    ring.add(T + LEVELS[0][1], 2)
    assert np.isnan(ring.read(0, int(T), int(T) + 1)).all()
    ring.add(T, 5)  # too old by now: the finest level has no place for it
    assert total(ring, 0) == 2
    assert total(ring, 3) == 8


def test_quantiles_are_within_a_bin_of_the_truth() -> None:
    seconds = np.random.default_rng(0).lognormal(-5, 1.2, 50_000)
    counts = np.bincount(np.searchsorted(LATENCY_BOUNDS, seconds), minlength=len(LATENCY_BOUNDS) + 1)
    found = quantiles(counts[None, :])[0]
    for value, share in zip(found, (0.5, 0.95, 0.99), strict=True):
        assert value == pytest.approx(np.quantile(seconds, share), rel=0.06)  # a bin is 12 % wide, and split
    assert np.isnan(quantiles(np.zeros((1, 142), np.uint32))).all()


def test_histograms_of_buckets_add_up() -> None:
    ring = Histogram()
    ring.add(T, {3: 2, 141: 1})
    ring.add(T + 7, {3: 5})
    assert ring.read(1, int(T // 5), int(T // 5) + 2).sum(axis=0)[[3, 141]].tolist() == [7, 1]


def test_a_window_is_drawn_from_buckets_that_cover_it() -> None:
    assert [level_of(span, span) for span in (30, 300, 900, 3600, 21600)] == [0, 0, 1, 2, 3]
    assert level_of(60, 3 * 3600) == 2  # a minute of three hours ago: finer buckets are gone


# -- runs --------------------------------------------------------------------------------------------------------


def test_a_run_of_any_length_keeps_its_extremes_in_bounded_memory() -> None:
    trace, values = Trace(), np.random.default_rng(1).normal(size=50_000)
    for step, value in enumerate(values):
        trace.add(step, T + step, float(value))
    found = trace.read("step", nice(50_000 / 300), 0, 0, math.inf, now=T + 1e6).columns
    assert len(found) <= 300
    assert found[:, 2].min() == values.min()
    assert found[:, 3].max() == values.max()
    assert found[-1, 1] == values[-1]
    assert trace._data.nbytes <= SLOTS * 5 * 8


def test_an_unfinished_bucket_of_a_run_is_left_out_until_the_run_rests() -> None:
    trace = Trace()
    for step in range(25):
        trace.add(step, T, 1.0)
    assert trace.read("step", 10, 0, 0, math.inf, now=T).through == 2
    assert trace.read("step", 10, 0, 0, math.inf, now=T + 5).through == 3


def test_steps_that_go_back_are_sorted_and_no_number_is_no_value() -> None:
    runs = Runs()
    for step in (3, 1, 2):
        runs.add("r", step, {"loss": float(step), "accuracy": math.nan}, T)
    trace = runs.by_name["r"].traces["loss"]
    assert trace.read("step", 1, 0, 0, math.inf, now=T + 9).columns[:, 0].tolist() == [1, 2, 3]
    assert set(runs.by_name["r"].traces) == {"loss"}


def test_a_run_that_begins_again_under_its_name_is_a_new_one_and_one_that_is_taken_up_goes_on() -> None:
    state, browser = State(), Browser()
    stream = Stream(View("training"), state)
    browser.take(stream.snapshot(T, STATUS))

    def log(steps: range, moment: float) -> None:
        for step in steps:
            state.on_training(TrainingMetrics(run="r", step=step, values={"loss": float(step)}), moment + step)
        for tick in range(10):  # charts of runs take turns
            browser.take(stream.delta(moment + steps[-1] + 5 + tick / 10, STATUS))

    def row() -> tuple[int, float]:
        found = state.runs.by_name["r"].facts(T)
        return found["step"], found["seconds"]

    log(range(600), T)
    log(range(500, 550), T + 10_000)  # from a checkpoint
    assert row() == (549, 599 + 49)
    log(range(5), T + 90_000)
    assert row() == (4, 4)
    assert browser.rest("loss", "r") == {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}


# -- frames ------------------------------------------------------------------------------------------------------


def test_frames_survive_the_way_to_the_browser() -> None:
    rows = np.arange(12.0).reshape(4, 3)
    head, series = decode(
        encode(
            {"kind": "delta", "ü": 1}, [Series("f", "n → g", 5.0, 1.0, rows), Series("f", "x", 0, 0, rows[:, :1], True)]
        )
    )
    assert head == {"kind": "delta", "ü": 1}
    assert [(one.figure, one.name, one.first, one.width, one.whole) for one in series] == [
        ("f", "n → g", 5.0, 1.0, False), ("f", "x", 0, 0, True),
    ]  # fmt: skip
    assert (series[0].rows == rows).all()
    assert (series[1].rows == rows[:, :1]).all()


class Browser:
    """What a browser does with frames, in Python."""

    def __init__(self) -> None:
        self.series: dict[tuple[str, str], dict[float, float]] = {}

    def take(self, frame: bytes | None) -> None:
        if frame is None:
            return
        head, series = decode(frame)
        if head["kind"] == "snapshot":
            self.series = {}
        for one in series:
            held = self.series.setdefault((one.figure, one.name), {})
            xs = [one.first + i * one.width for i in range(len(one.rows))] if one.width else one.rows[:, 0].tolist()
            first = -math.inf if one.whole else xs[0]
            for x in [x for x in held if x >= first]:
                del held[x]
            held.update(zip(xs, one.rows[:, 0 if one.width else 1].tolist(), strict=True))

    def rest(self, figure: str, name: str) -> dict[float, float]:
        return self.series.get((figure, name), {})


def test_late_viewers_and_those_who_followed_hold_the_same() -> None:
    state, view = State(), View("overview", window=300)
    stream, followed = Stream(view, state), Browser()
    followed.take(stream.snapshot(T, STATUS))
    published = 0
    for second in range(40):
        published += 7 * second
        state.on_ledger(ledger(T + second + 0.4, a=published, b=second))
        for tick in range(3):
            followed.take(stream.delta(T + second + 0.4 + tick / 10, STATUS))
        for kind in state.kinds().values():
            for ring in kind.values():
                ring.changed = math.inf
    late = Browser()
    late.take(stream.snapshot(T + 40, STATUS))
    assert late.series == followed.series
    drawn = sum(late.rest("rate", "a").values())
    assert published - 7 * 39 <= drawn <= published  # the second that is not over is not drawn
    state.on_ledger(ledger(T + 42, a=published, b=39))
    followed.take(stream.delta(T + 42.1, STATUS))
    assert sum(followed.rest("rate", "a").values()) == published


def test_what_is_told_late_is_drawn_where_it_belongs() -> None:
    state, browser = State(), Browser()
    stream = Stream(View("matmul", window=60), state)
    browser.take(stream.snapshot(T + 20, STATUS))
    state.sums["products"].touch("blas on cpu").add(T + 5, 3)
    browser.take(stream.delta(T + 20.1, STATUS))
    assert browser.rest("products", "blas on cpu") == {T + 5: 3}
    state.sums["products"]["blas on cpu"].changed = math.inf
    state.sums["products"]["blas on cpu"].add(T + 6, 1)
    browser.take(stream.delta(T + 21.1, STATUS))
    assert browser.rest("products", "blas on cpu") == {T + 5: 3, T + 6: 1}


def test_a_run_is_sent_once_and_then_only_what_is_new() -> None:
    state, browser = State(), Browser()
    stream = Stream(View("training"), state)
    browser.take(stream.snapshot(T, STATUS))
    sizes = []
    for step in range(2000):
        state.on_training(TrainingMetrics(run="r", step=step, values={"loss": 1 / (step + 1)}), T + step / 10)
        frame = stream.delta(T + step / 10, STATUS)
        browser.take(frame)
        sizes.append(len(frame or b""))
    late = Browser()
    late.take(stream.snapshot(T + 199.9, STATUS))
    assert late.rest("loss", "r") == browser.rest("loss", "r")
    assert len(late.rest("loss", "r")) > 150
    assert np.median(sizes) < 1500
    for tick in range(10):  # charts of runs take turns
        browser.take(stream.delta(T + 210 + tick / 10, STATUS))
    assert max(browser.rest("loss", "r")) == 1999


def test_a_run_by_time_is_bounded_however_long_one_looks() -> None:
    state, browser = State(), Browser()
    stream = Stream(View("training", window=30, axis="time"), state)
    browser.take(stream.snapshot(T, STATUS))
    for step in range(3000):
        moment = T + step / 10
        state.on_training(TrainingMetrics(run="r", step=step, values={"loss": 1.0}), moment)
        browser.take(stream.delta(moment, STATUS))
    held = browser.rest("loss", "r")
    assert len(held) <= 600
    assert min(held) < T + 270 < T + 299 < max(held)  # all of the window


def test_a_view_of_any_time_reads_no_more_than_is_held() -> None:
    state = State()
    state.latency.touch("a → g").add(T, {3: 2})
    for end in (0.0, -1e14, 1e14):
        tracemalloc.start()
        Stream(View("overview", end=end), state).snapshot(T + 2, STATUS)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4e6


def test_a_window_in_the_past_stands_still() -> None:
    state = State()
    for second in range(30):
        state.on_ledger(ledger(T + second, a=10 * second))
    stream, browser = Stream(View("overview", window=10, end=T + 15), state), Browser()
    browser.take(stream.snapshot(T + 30, STATUS))
    assert sorted(browser.rest("rate", "a")) == [T + second for second in range(5, 15)]
    state.on_ledger(ledger(T + 31, a=1000))
    frame = stream.delta(T + 32, STATUS)
    assert frame is None or decode(frame)[1] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"page": "x"},
        {"page": "overview", "window": 0.1},
        {"page": "training", "axis": "z"},
        {"page": "overview", "end": "inf"},
        {"page": "overview", "end": "1e300"},
        {"page": "overview", "end": 10**400},
        {"page": "overview", "window": [5]},
        5,
        [],
        None,
        "overview",
    ],
)
def test_views_that_make_no_sense_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"page|window|axis|end|a view is an object"):
        View.parse(wrong)


@pytest.mark.parametrize("active", [True, [True, False], [[]]])
def test_cycles_of_no_array_are_left_out(active: Any) -> None:
    jobs = Jobs()
    for shown in ([[True, False]], active):
        jobs.on_cycle(catalog.SystolicCycle(job="j", cycle=1, cycles=2, active=Tensor(np.asarray(shown))))
    assert jobs.facts()["systolic"]["size"] == [1, 2]


# -- room --------------------------------------------------------------------------------------------------------


def test_where_all_series_are_busy_new_ones_find_no_room_and_the_page_says_so() -> None:
    """To make room for each by the one that is heard next would empty all of them."""
    state, names = State(), [f"c{n:03}" for n in range(MOST_SERIES + 5)]
    for second in range(5):
        state.on_ledger(ledger(T + second, first=0, **dict.fromkeys(names, 10 * second + 7)))
    browser, stream = Browser(), Stream(View("overview", window=60), state)
    frame = stream.snapshot(T + 6, STATUS)
    browser.take(frame)
    assert decode(frame)[0]["facts"]["left_out"] == {"rate": 5}
    assert [len(browser.rest("rate", name)) for name in names] == [5] * MOST_SERIES + [0] * 5
    for one in numbers(state)["counts"].values():
        assert one["published"] == one["base"] + one["held"]
    for second in range(5, 8):
        state.on_ledger(ledger(T + second + QUIET, first=0, **dict.fromkeys(names[-5:], 99)))
    assert set(names[-5:]) <= set(state.sums["published"])
    assert left_out(state, View("overview")) == {}


# -- what is known -----------------------------------------------------------------------------------------------


def test_counts_add_up_to_the_servers_after_a_late_start_and_a_loss_of_data() -> None:
    state = State()
    state.on_ledger(ledger(T, first=50, a=1000))
    state.on_ledger(ledger(T + 1, first=51, a=1300))
    state.on_ledger(ledger(T + 2, first=1, a=40))  # the server was emptied
    state.on_ledger(ledger(T + 3, first=2, a=45))
    counts = numbers(state)["counts"]["a"]
    assert counts["base"] + counts["held"] == counts["published"] == 45
    assert [marker.kind for marker in state.happened.since()] == ["reset"]


def test_the_first_ledger_ever_holds_everything() -> None:
    state = State()
    state.on_ledger(ledger(T, first=0, a=1000))
    assert numbers(state)["counts"]["a"] == {"published": 1000, "held": 1000, "base": 0}


def test_groups_balance_and_rewinds_are_marked() -> None:
    state = State()
    state.on_ledger(grouped(T, 10, handled=10))
    state.on_ledger(grouped(T + 1, 10, handled=4, lag=6))
    assert [marker.kind for marker in state.happened.since()] == ["rewind"]
    assert [row["off"] for row in channels(state)] == [0]
    assert totals(state)["off"] == 0
    state.on_ledger(grouped(T + 2, 12, handled=4, lag=6))
    assert totals(state)["off"] == 2
    assert "off by +2" in alerts(state, T + 2)[0]["text"]


def test_alerts_tell_of_dead_letters_and_of_work_without_workers() -> None:
    state = State()
    state.on_ledger(grouped(T, 10, handled=10))
    assert alerts(state, T) == []
    state.on_ledger(grouped(T + 1, 12, handled=10, dead=1, lag=1))
    texts = [alert["text"] for alert in alerts(state, T + 1)]
    assert any("new dead letters" in text for text in texts)
    assert any("no worker" in text for text in texts)


def test_who_falls_silent_while_others_are_heard_is_told_and_an_outage_blames_nobody() -> None:
    state = State()
    for second in range(3):
        state.on_worker(sample(T, "a", pid=1), T + second)
        state.on_worker(sample(T, "b", pid=2), T + second)
    state.on_worker(sample(T, "a", pid=1), T + 60)  # nobody was heard for a minute; then a, and soon b
    state.on_worker(sample(T, "b", pid=2), T + 60.5)
    for second in range(61, 70):
        state.on_worker(sample(T, "a", pid=1), T + second)
    assert [worker.label for worker in state.workers.values() if worker.gone] == ["app 2"]
    assert ["app 2 on h fell silent" in alert["text"] for alert in alerts(state, T + 70)] == [True]


def test_processes_of_one_pid_on_two_hosts_are_two_lines() -> None:
    """As the first processes of containers are."""
    state = State()
    for second in range(3):
        state.on_worker(sample(T, "a", host="one", pid=7, cpu=0.9), T + second)
        state.on_worker(sample(T, "b", host="two", pid=7, cpu=0.1), T + second)
    assert {name: ring.read(0, int(T), int(T) + 1)[0, 0] for name, ring in state.gauges["cpu"].items()} == {
        "app 7": 0.9, "app 7 on two": 0.1,
    }  # fmt: skip


def test_weights_that_are_rolled_back_are_what_is_shown() -> None:
    state = State()
    for version in (7, 8, 3):
        state.on_prediction(catalog.Prediction.model_construct(label=1, truth=1, version=version), T)
    assert (totals(state)["version"], serving(state, T)["digits"]["version"]) == (3, 3)


def test_batches_of_groups_of_one_name_are_told_apart() -> None:
    state = State()
    groups = [
        GroupSample(
            channel=channel, group="serving", handled=5, dead=0, retried=0, suppressed=0, in_hand=0, busy=0,
            batches={"size": count}, batch_sizes={8: count}, latency={},
        )
        for channel, count in (("models.a", 2), ("models.b", 3))
    ]  # fmt: skip
    state.on_worker(sample(T, groups=groups), T)
    assert serving(state, T)["released"] == {"models.b → serving: size": 3, "models.a → serving: size": 2}
    assert set(state.sums["batches"]) == {"models.a → serving: 8+", "models.b → serving: 8+"}


def test_the_diagram_goes_from_left_to_right_and_circles_end() -> None:
    state = State()
    group = GroupSample(
        channel="in", group="g", handled=5, dead=0, retried=0, suppressed=0, in_hand=0, busy=0, batches={},
        batch_sizes={}, latency={},
    )  # fmt: skip
    again, beside = (group.model_copy(update={"channel": "out", "group": name}) for name in "hi")
    state.on_ledger(ledger(T, **{"in": 5, "out": 5}))
    state.on_worker(sample(T, "p", app="source", published={"in": 5}), T)
    state.on_worker(sample(T, "q", app="worker", published={"out": 5}, groups=[group]), T)
    state.on_worker(sample(T, "r", app="loop", published={"in": 1}, groups=[again, beside]), T)
    found = diagram(state, T)
    column = {node["label"]: node["column"] for node in found["nodes"]}
    assert column["source"] < column["in"] < column["worker"] < column["out"] < column["loop"]
    assert {(edge["from"], edge["to"], edge["group"]) for edge in found["edges"]} >= {
        ("app:loop", "channel:in", ""),
        ("channel:out", "app:loop", "h"),
        ("channel:out", "app:loop", "i"),
    }


def test_events_are_shown_with_tensors_as_pictures_and_statistics() -> None:
    image = Tensor(np.arange(64, dtype=np.float32).reshape(8, 8)).to_json()
    shown = summary({"image": image, "label": 3, "many": list(range(100)), "text": "x" * 9000})
    assert shown["label"] == 3
    assert (shown["image"]["low"], shown["image"]["high"], shown["image"]["mean"]) == (0, 63, 31.5)
    assert shown["image"]["picture"].startswith("data:image/png;base64,")
    assert shown["many"]["\0tensor"] == "numbers [100]"
    assert len(shown["text"]) < 5000
    assert summary({"dtype": "float32", "shape": [2], "data": "!"}) == {"\0tensor": "float32 [2]"}


def test_no_event_passes_for_the_summary_of_a_tensor() -> None:
    """Whose picture a browser would fetch."""
    forged = {"\0tensor": "mine", "picture": "http://evil.example", "tensor": "too"}
    assert summary({"a": [forged]}) == {"a": [{"␀tensor": "mine", "picture": "http://evil.example", "tensor": "too"}]}


def test_numbers_that_are_none_or_are_huge_are_shown_all_the_same() -> None:
    highest = np.finfo(np.float64).max
    for values in (np.full((8, 8), highest), np.array([[-highest, math.inf, math.nan, highest]] * 4)):
        json.dumps(summary(Tensor(values).to_json()), allow_nan=False)
    assert summary(Tensor(np.full(8, 1.7e308)).to_json())["mean"] == 1.7e308
    assert summary([math.nan, -math.inf, 1.5]) == ["nan", "-inf", 1.5]
    assert summary([10**400] * 65)[-1] == "… and 1 more"


def test_one_number_that_is_none_does_not_take_the_page_with_it() -> None:
    """A browser refuses a frame that has Infinity anywhere."""
    state, browser = State(), Browser()
    stream = Stream(View("matmul", window=60), state)
    browser.take(stream.snapshot(T, STATUS))
    for second, gflops in enumerate((10.0, math.inf, math.nan, 20.0)):
        for kernel in ("blas", "odd") if gflops == math.inf else ("blas",):
            result = catalog.MatmulResult(
                job="j", m=4, k=4, n=4, dtype="float32", device="cpu", kernel=kernel, seconds=1e-9, gflops=gflops
            )
            state.on_matmul(result, T + second)
    tile = {"job": "j", "worker": "w", "m": 1, "k": 1, "n": 1, "done": 1, "total": 2, "seconds": math.inf}
    state.jobs.on_tile(catalog.TileProgress.model_validate(tile), T)
    frame = stream.delta(T + 9, STATUS)
    assert frame is not None
    head = frame[4 : 4 + int.from_bytes(frame[:4], "little")]
    facts = json.loads(head, parse_constant=pytest.fail)["facts"]
    assert [(row["last"], row["best"]) for row in facts["kernels"]] == [(20, 20)]
    assert facts["tiles"][0]["started"] is None
    browser.take(frame)
    held = browser.rest("gflops", "blas on cpu")
    assert {x: y for x, y in held.items() if not math.isnan(y)} == {T: 10, T + 3: 20}
    assert json.loads(dumps({"a": [(math.inf, 1)], "b": math.nan})) == {"a": [[None, 1]], "b": None}
