"""Pictures on the dashboard: small, valid, and beside the right answer."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from dashboards.thumbnails import MOST_SHOWN, Pictures, png
from pipeline import Tensor
from pipeline.catalog import Answer, Inputs, Score


def answer(request: str, label: str = "cat") -> Answer:
    scores = [Score(label=label, probability=0.9), Score(label="dog", probability=0.1)]
    return Answer(model="m", version=2, request=request, predictions=scores)


def test_a_png_holds_the_pixels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8)
    assert (np.asarray(Image.open(io.BytesIO(png(pixels)))) == pixels).all()


def test_answers_find_their_pictures_and_the_last_are_shown() -> None:
    pictures = Pictures()
    for n in range(12):
        pictures.on_inputs(str(n), Inputs(data=Tensor(np.full((224, 224, 3), n, np.uint8))))
    pictures.on_inputs("row", Inputs(data=Tensor(np.zeros(4, np.float32))))
    for n in (3, 1, 99, 0, 2, 4, 5, 6, 7, 8, 9):
        pictures.on_answer(answer(str(n), f"label {n}"))
    pictures.on_answer(answer("row"))
    assert pictures.changed
    shown = pictures.shown()
    assert not pictures.changed
    assert [one["scores"][0][0] for one in shown] == [f"label {n}" for n in (9, 8, 7, 6, 5, 4, 2, 0)]
    assert len(shown) == MOST_SHOWN
    image = Image.open(io.BytesIO(base64.b64decode(shown[0]["picture"].partition(",")[2])))
    assert max(image.size) <= 64
    assert image.getpixel((0, 0)) == (9, 9, 9)
    assert shown[0]["model"] == "m v2"
