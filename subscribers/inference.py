"""Classifies digits in batches. One model a process; new weights arrive as events and take over between two batches."""

from __future__ import annotations

import logging

import numpy as np
import numpy.typing as npt
import torch

from pipeline import Batch, Pipeline, Reject, catalog
from pipeline.catalog import DIGIT_MODEL, DIGIT_SHAPE, INTENSITY, Digit, Prediction, Weights
from pipeline.settings import settings

from .models import BadWeights, DigitClassifier

__all__ = ["Served", "app", "classify", "served"]

logger = logging.getLogger("subscribers.inference")

app = Pipeline("inference")


class Served:
    """The one model of this process. `current` is replaced as a whole; a batch takes it once."""

    def __init__(self) -> None:
        self.current = DigitClassifier.untrained()
        self.refused = 0
        """Weights that did not fit."""

    def offer(self, weights: Weights) -> bool:
        """Take new weights, or keep the old model, say why, and return False.

        The channel's order decides, not versions: publishing old weights again is a roll-back.
        """
        if weights.model != DIGIT_MODEL:
            return False
        try:
            self.current = DigitClassifier.of(weights)
        except (BadWeights, RuntimeError, TypeError) as error:
            self.refused += 1
            logger.error(
                "weights %d of model %r are refused, version %d stays: %s",
                weights.version, weights.model, self.current.version, error,
            )  # fmt: skip
            return False
        logger.debug("model %r is at version %d", weights.model, weights.version)
        return True


served = Served()


@app.on_start
async def load() -> None:
    """Before the first digit: the model file, if one is named, and then whatever weights are or will be published."""
    torch.set_num_threads(1)
    if (path := settings().model_file) is not None:
        served.current = DigitClassifier.load(path)
        logger.info("model %r from %s", DIGIT_MODEL, path)
    app.spawn(follow_weights(), name="weights")


async def follow_weights() -> None:
    async with app.watch(catalog.weights, since=catalog.weights.keep) as stream:
        async for message in stream:
            served.offer(message.event)


@app.subscriber(
    catalog.digits, group="inference", publishes=catalog.predictions, batch=Batch(64), run_in="thread"
)  # fmt: skip
def classify(batch: list[Digit]) -> list[Prediction | Reject]:
    """One Prediction a digit, all of a batch from the same weights; a digit that is none is rejected alone."""
    model = served.current
    images = [_image(digit) for digit in batch]
    good = [image for image in images if not isinstance(image, Reject)]
    rows = iter(model.predict(np.stack(good)) if good else [])
    return [
        image if isinstance(image, Reject) else _prediction(model, digit, next(rows), len(good))
        for digit, image in zip(batch, images, strict=True)
    ]


def _image(digit: Digit) -> npt.NDArray[np.float32] | Reject:
    tensor = digit.image
    expected = f"expected {list(DIGIT_SHAPE)} numbers from 0 to {INTENSITY:g}"
    if tensor.shape != DIGIT_SHAPE or tensor.dtype.startswith(("complex", "bool")):
        return Reject(f"the image is {tensor.dtype} of shape {list(tensor.shape)}; {expected}")
    image = np.asarray(tensor, dtype=np.float32)
    if not (image.min() >= 0 and image.max() <= INTENSITY):  # false for NaN as well
        return Reject(f"the image has values from {image.min():g} to {image.max():g}; {expected}")
    return image


def _prediction(model: DigitClassifier, digit: Digit, probabilities: list[float], size: int) -> Prediction:
    label = max(range(len(probabilities)), key=probabilities.__getitem__)
    return Prediction(
        model=model.name,
        version=model.version,
        label=label,
        probabilities=probabilities,
        truth=digit.label,
        batch=size,
    )
