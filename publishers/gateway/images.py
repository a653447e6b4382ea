"""Pictures from strangers: JPEG, PNG and WebP become what a model takes. The one file that imports Pillow."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

__all__ = ["BadImage", "decode"]

FORMATS = ("JPEG", "PNG", "WEBP")
MOST_PIXELS = 50_000_000

Image.MAX_IMAGE_PIXELS = None  # our own limit, which is looked at before anything is decoded


class BadImage(Exception):
    """Raised when bytes are no picture that can be shown to a model."""


def decode(data: bytes, height: int, width: int) -> npt.NDArray[np.uint8]:
    """uint8 [height, width, 3], RGB: turned upright, scaled so that it covers 8/7 of the size, its middle cut out.

    That is how ImageNet models are evaluated (256 → 224). Raises BadImage.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that is not read
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise BadImage(
                        f"the picture has {image.width} × {image.height} pixels; the limit is {MOST_PIXELS:,}"
                    )
                covered = (round(width * 8 / 7), round(height * 8 / 7))
                image.draft("RGB", (2 * max(covered), 2 * max(covered)))  # a JPEG is decoded no finer than needed
                upright = _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"not a picture in one of the formats {', '.join(FORMATS)}") from None
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError, MemoryError) as error:
        raise BadImage(f"the picture cannot be read: {error}") from None
    scale = max(covered[0] / upright.width, covered[1] / upright.height)
    size = (max(covered[0], round(upright.width * scale)), max(covered[1], round(upright.height * scale)))
    left, top = (size[0] - width) / 2 / scale, (size[1] - height) / 2 / scale
    box = (left, top, left + width / scale, top + height / scale)
    box = (max(0.0, box[0]), max(0.0, box[1]), min(upright.width, box[2]), min(upright.height, box[3]))
    return np.asarray(upright.resize((width, height), Image.Resampling.BICUBIC, box=box))


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits, scaled: `convert` would take all but its darkest 256th for white."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
