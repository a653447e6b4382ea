"""Pictures on their way through a model, small enough for a page that is redrawn twice a second."""

from __future__ import annotations

import base64
import struct
import zlib
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.catalog import Answer, Inputs

__all__ = ["Pictures", "png"]

SIDE = 64
MOST_WAITING = 128
MOST_SHOWN = 8


class Pictures:
    """Inputs wait here for their answers; the last few pairs are shown."""

    def __init__(self) -> None:
        self.changed = False
        self._waiting: OrderedDict[str, npt.NDArray[np.uint8]] = OrderedDict()
        self._shown: deque[dict[str, Any]] = deque(maxlen=MOST_SHOWN)

    def on_inputs(self, id_: str, inputs: Inputs) -> None:
        data = inputs.data
        if data.dtype != "uint8" or data.ndim != 3 or data.shape[2] != 3 or 0 in data.shape:
            return
        step = max(1, -(-max(data.shape[:2]) // SIDE))
        self._waiting[id_] = np.asarray(data)[::step, ::step].copy()
        if len(self._waiting) > MOST_WAITING:
            self._waiting.popitem(last=False)

    def on_answer(self, answer: Answer) -> None:
        pixels = self._waiting.pop(answer.request, None)
        if pixels is None or not answer.predictions:
            return
        self._shown.appendleft(
            {
                "picture": "data:image/png;base64," + base64.b64encode(png(pixels)).decode(),
                "model": f"{answer.model} v{answer.version}",
                "scores": [[score.label, score.probability] for score in answer.predictions[:3]],
            }
        )
        self.changed = True

    def shown(self) -> list[dict[str, Any]]:
        """The newest first."""
        self.changed = False
        return list(self._shown)


def png(pixels: npt.NDArray[np.uint8]) -> bytes:
    """uint8 [height, width, 3] as a PNG file (https://www.w3.org/TR/png-3/)."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)  # filter 0: none

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes(), 6)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
