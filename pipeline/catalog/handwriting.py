"""Handwritten digits to classify, and what a model said of them.

Models are described without torch: names and shapes of parameters, from which trainers and servers build theirs.
"""

from __future__ import annotations

from pydantic import Field

from ..channel import Channel
from ..events import Event
from ..tensors import Tensor

__all__ = [
    "DIGIT_MODEL",
    "DIGIT_PARAMETERS",
    "DIGIT_SHAPE",
    "Digit",
    "INTENSITY",
    "Prediction",
    "digits",
    "predictions",
]

DIGIT_MODEL = "digits"


DIGIT_SHAPE = (8, 8)


INTENSITY = 16.0
"""The brightest pixel of a digit; models see images divided by it."""


DIGIT_PARAMETERS: dict[str, tuple[int, ...]] = {
    "hidden.weight": (32, 64),
    "hidden.bias": (32,),
    "output.weight": (10, 32),
    "output.bias": (10,),
}
"""The digit model: flatten → hidden (linear) → ReLU → output (linear), logits of the classes 0…9. All float32."""


class Digit(Event):
    """A handwritten digit to classify."""

    image: Tensor
    """float32, shape [8, 8], intensities 0…16 as in scikit-learn's `load_digits`."""
    label: int | None = Field(default=None, ge=0, le=9)
    """The truth, where it is known."""


class Prediction(Event):
    """What a model said of one digit."""

    model: str
    version: int
    """Version of the weights that answered; 0 is the untrained model."""
    label: int
    probabilities: list[float]
    """One a class, summing to 1."""
    truth: int | None = None
    batch: int
    """Size of the batch it was computed in."""


digits: Channel[Digit] = Channel("digits", Digit, reply=Prediction, frame=32)


predictions: Channel[Prediction] = Channel("predictions", Prediction)
