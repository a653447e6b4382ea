"""Inference: batches, versions, new weights between two batches, and images and weights that do not fit."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from pipeline import Pipeline, Reject, RequestFailed, Tensor, catalog
from pipeline.catalog import DIGIT_PARAMETERS, Digit, Prediction, Weights
from subscribers import inference
from subscribers.inference import Served, classify
from subscribers.models import BadWeights, DigitClassifier, digit_module

from .apps import idle, until
from .programs import collect, events, served


def weights(version: int, value: float = 0.01, **changes: Any) -> Weights:
    """Every parameter is `value`, except those changed (None leaves one out)."""
    parameters = {name: np.full(shape, value, np.float32) for name, shape in DIGIT_PARAMETERS.items()} | changes
    tensors = {name: Tensor(array) for name, array in parameters.items() if array is not None}
    return Weights(model="digits", version=version, parameters=tensors)


def always(label: int, version: int) -> Weights:
    """Weights that answer `label` to everything."""
    bias = np.zeros(10, np.float32)
    bias[label] = 100
    return weights(version, 0.0, **{"output.bias": bias})


def digit(number: int = 0) -> Digit:
    data: Any = load_digits()
    return Digit(image=Tensor(data.images[number].astype(np.float32)), label=int(data.target[number]))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Served:
    """An untrained model in this process."""
    served_ = Served()
    monkeypatch.setattr(inference, "served", served_)
    return served_


@pytest.fixture
async def app(valkey_url: str) -> AsyncIterator[Pipeline]:
    async with served(inference.app, valkey_url), Pipeline("t", valkey_url) as app:
        yield app


# -- the handler ---------------------------------------------------------------------------------------------------


def test_a_batch_is_answered_in_order_with_probabilities_that_sum_to_one() -> None:
    batch = [digit(number) for number in range(20)]
    answers = classify(batch)
    together = DigitClassifier.untrained().predict(np.stack([np.asarray(one.image) for one in batch]))
    for one, answer, expected in zip(batch, answers, together, strict=True):
        assert isinstance(answer, Prediction)
        assert answer.probabilities == expected
        assert sum(answer.probabilities) == pytest.approx(1, abs=1e-5)
        assert answer.label == int(np.argmax(expected))
        assert (answer.truth, answer.batch, answer.version, answer.model) == (one.label, 20, 0, "digits")


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((28, 28), np.float32), "float32 of shape [28, 28]; expected [8, 8] numbers from 0 to 16"),
        (np.zeros((8, 8), np.complex64), "complex64 of shape [8, 8]"),
        (np.full((8, 8), np.nan, np.float32), "values from nan to nan"),
        (np.full((8, 8), 255, np.uint8), "values from 255 to 255; expected [8, 8] numbers from 0 to 16"),
        (np.full((8, 8), -1.0), "values from -1 to -1"),
    ],
    ids=["shape", "dtype", "nan", "bright", "dark"],
)
def test_an_image_that_is_none_is_rejected_alone(image: Any, said: str) -> None:
    first, bad, last = classify([digit(1), Digit(image=Tensor(image)), digit(2)])
    assert isinstance(bad, Reject)
    assert said in bad.reason
    assert [answer.truth for answer in (first, last) if isinstance(answer, Prediction)] == [1, 2]


def test_images_of_any_real_dtype_are_taken() -> None:
    image = np.asarray(digit(3).image)
    tensors = [Tensor(image.astype(dtype)) for dtype in ("float64", "float16", "uint8", "int64")]
    tensors.append(Tensor(torch.from_numpy(image.copy()).bfloat16()))
    answers = classify([Digit(image=tensor) for tensor in tensors])
    assert len({tuple(answer.probabilities) for answer in answers if isinstance(answer, Prediction)}) == 1


def test_a_batch_of_nothing_good_is_all_rejections() -> None:
    bad = Digit(image=Tensor([1.0]))
    assert all(isinstance(answer, Reject) for answer in classify([bad, bad]))


# -- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (weights(5, **{"output.bias": None}), "no parameter 'output.bias'"),
        (weights(5, **{"output.bias": np.zeros(3, np.float32)}), "'output.bias' has shape [3], expected [10]"),
        (weights(5, **{"hidden.bias": np.zeros(32)}), "'hidden.bias' is float64, expected float32"),
        (weights(5, float("nan")), "'hidden.weight' holds values that are not finite"),
        (weights(5, extra=np.zeros(1, np.float32)), "unknown parameter 'extra'"),
    ],
    ids=["missing", "shape", "dtype", "nan", "unknown"],
)
def test_broken_weights_leave_the_old_model_and_say_so(
    broken: Weights, said: str, fresh: Served, caplog: pytest.LogCaptureFixture
) -> None:
    assert fresh.offer(always(7, 4))
    with caplog.at_level(logging.ERROR):
        assert not fresh.offer(broken)
    assert (fresh.current.version, fresh.refused) == (4, 1)
    assert "weights 5 of model 'digits' are refused, version 4 stays" in caplog.text
    assert said in caplog.text


def test_weights_of_another_model_are_none_of_ours(fresh: Served) -> None:
    other = Weights(model="other", version=9, parameters={})
    assert not fresh.offer(other)
    assert (fresh.current.version, fresh.refused) == (0, 0)


def test_publishing_old_weights_again_is_a_roll_back(fresh: Served) -> None:
    for version in (1, 2, 1):
        fresh.offer(always(version, version))
    assert [(a.label, a.version) for a in classify([digit()]) if isinstance(a, Prediction)] == [(1, 1)]


def test_no_answer_comes_from_half_swapped_weights(fresh: Served) -> None:
    stop = threading.Event()

    def swap() -> None:
        version = 0
        while not stop.is_set():
            version += 1
            fresh.offer(always(version % 10, version))

    thread = threading.Thread(target=swap)
    fresh.offer(always(0, 0))
    thread.start()
    try:
        batches = [classify([digit()] * 8) for _ in range(60)]
    finally:
        stop.set()
        thread.join()
    for batch in batches:
        assert len({answer.version for answer in batch if isinstance(answer, Prediction)}) == 1
        assert all(isinstance(answer, Prediction) and answer.label == answer.version % 10 for answer in batch)
    assert len({batch[0].version for batch in batches if isinstance(batch[0], Prediction)}) > 1


def test_there_is_one_model_and_one_thread_that_uses_it() -> None:
    [subscriber] = inference.app.subscribers
    assert (subscriber.concurrency, subscriber.run_in) == (1, "thread")


# -- files ---------------------------------------------------------------------------------------------------------


def test_a_model_comes_back_from_its_file_as_it_went(tmp_path: Path) -> None:
    model = DigitClassifier.of(weights(3, 0.02))
    model.save(tmp_path / "m.safetensors")
    again = DigitClassifier.load(tmp_path / "m.safetensors", version=3)
    assert again.weights() == model.weights()
    assert model.weights() == weights(3, 0.02)


def test_a_model_file_that_is_missing_or_none_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(BadWeights, match="there is no model file"):
        DigitClassifier.load(tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(BadWeights, match="is no safetensors file"):
        DigitClassifier.load(tmp_path / "m.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "m.safetensors")
    with pytest.raises(
        BadWeights, match=r"m\.safetensors: not weights of model 'digits': no parameter 'hidden\.weight'"
    ):
        DigitClassifier.load(tmp_path / "m.safetensors")


def test_the_untrained_model_is_the_same_everywhere_and_disturbs_no_random_numbers() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, second = digit_module().state_dict(), digit_module().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in DIGIT_PARAMETERS)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {name: tuple(value.shape) for name, value in first.items()} == DIGIT_PARAMETERS


# -- served --------------------------------------------------------------------------------------------------------


async def test_digits_become_predictions_and_bad_ones_dead_letters(app: Pipeline) -> None:
    good = [digit(number) for number in range(100)]
    await app.publish(catalog.digits, [*good, Digit(image=Tensor([1.0]))])
    predictions = events(await collect(app, catalog.predictions, 100))
    assert [one.truth for one in predictions] == [one.label for one in good]
    assert max(one.batch for one in predictions) > 1
    ledger = await idle(app, "digits")
    assert (ledger.groups["inference"].handled, ledger.groups["inference"].dead) == (100, 1)
    [letter] = await app.dead_letters("digits")
    assert "float64 of shape [1]" in letter.event.reason


async def test_new_weights_take_over_while_requests_are_answered(app: Pipeline, fresh: Served) -> None:
    assert (await app.request(catalog.digits, digit())).version == 0
    for version in range(1, 6):
        await app.publish(catalog.weights, always(version, version))
        await until(lambda version=version: fresh.current.version == version)
        answer = await app.request(catalog.digits, digit())
        assert (answer.version, answer.label) == (version, version)
    with pytest.raises(RequestFailed, match=r"expected \[8, 8\] numbers from 0 to 16"):
        await app.request(catalog.digits, Digit(image=Tensor([1.0])))


async def test_a_worker_that_starts_late_has_the_last_weights(valkey_url: str, fresh: Served) -> None:
    async with Pipeline("t", valkey_url) as app:
        await app.publish(catalog.weights, [always(3, 3), always(4, 4)])
        async with served(inference.app, valkey_url):
            await until(lambda: fresh.current.version == 4)
            assert (await app.request(catalog.digits, digit())).label == 4
            await asyncio.sleep(0)
