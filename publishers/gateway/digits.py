"""POST /models/digits/predict: the way of all predictions, to the subscribers of `catalog.digits`.

They announce nothing, so nobody knows here whether one is there: what is asked waits for it until its deadline.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_json

from pipeline import RequestFailed, RequestTimeout, Tensor, catalog

from .predictions import Prediction, Refusal

__all__ = ["PATH", "DigitPrediction", "DigitRequest"]

PATH = f"/models/{catalog.DIGIT_MODEL}/predict"


class DigitRequest(BaseModel):
    """What it takes."""

    model_config = ConfigDict(extra="forbid")

    pixels: list[list[float]]
    """8 rows of 8 intensities from 0 to 16."""


class DigitPrediction(Prediction):
    __slots__ = ()

    most_body = 64 << 10

    def _find(self) -> None:
        if not self._models.opened:
            raise Refusal(503, "Redis does not answer yet", [(b"retry-after", b"1")])

    def _read(self, body: bytes) -> None:
        self._put(catalog.digits, _digit(body), self._left())

    def _spared(self, answer: Any) -> bool:
        return False

    def _tell(self, answer: catalog.Prediction) -> None:
        ranked = sorted(enumerate(answer.probabilities), key=lambda item: -item[1])
        predictions = [{"label": label, "probability": probability} for label, probability in ranked]
        head = {"success": True, "model": answer.model, "version": answer.version}
        self._succeed(to_json({**head, "predictions": predictions}, inf_nan_mode="null"))

    def _refusal(self, error: BaseException) -> Refusal:
        if isinstance(error, RequestFailed):
            return Refusal(422, str(error))
        refusal = super()._refusal(error)
        if isinstance(error, RequestTimeout) and refusal.status == 504:
            return Refusal(504, f"{refusal}; is a subscriber of channel {catalog.digits.name!r} running?")
        return refusal


def _digit(body: bytes) -> catalog.Digit:
    """Raises Refusal saying what a digit looks like."""
    try:
        pixels = DigitRequest.model_validate_json(body).pixels
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "body"
        raise Refusal(400 if first["type"] == "json_invalid" else 422, f"{place}: {first['msg']}") from None
    rows, columns = catalog.DIGIT_SHAPE
    if len(pixels) != rows or any(len(row) != columns for row in pixels):
        raise Refusal(422, f"pixels: expected {rows} rows of {columns} numbers each")
    if not all(0 <= value <= catalog.INTENSITY for row in pixels for value in row):
        raise Refusal(422, f"pixels: expected numbers from 0 to {catalog.INTENSITY:g}")
    return catalog.Digit(image=Tensor.from_json(pixels))
