"""Streams pictures to a served model, as a camera would: crops of the photographs that come with scikit-learn.

    python -m publishers.images [--rate 2] [--seed 0] [FILES…]

Nobody waits for the answers: they appear on the channel `models.answers`, and on the dashboard.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_sample_images

from pipeline import Pipeline, Tensor, catalog
from pipeline.errors import ConfigurationError

from .command import fail, insist, opened, paced, positive, run, start_logging
from .gateway.images import BadImage, decode

__all__ = ["crops", "main"]

SIDE = 224
STALE = 30.0
"""Seconds after which nobody wants to see a picture any more."""


def crops(seed: int) -> Iterator[npt.NDArray[np.uint8]]:
    """uint8 [224, 224, 3], for ever: parts of the two photographs, mirrored now and then. The same for a seed."""
    photographs = [np.asarray(image) for image in load_sample_images().images]
    random = np.random.default_rng(seed)
    for number in itertools.count():
        image = photographs[number % len(photographs)]
        step = int(random.integers(1, 2, endpoint=True))  # near, or at half the size
        size = SIDE * step
        if min(image.shape[:2]) < size:
            size, step = SIDE, 1
        top = int(random.integers(0, image.shape[0] - size, endpoint=True))
        left = int(random.integers(0, image.shape[1] - size, endpoint=True))
        part = image[top : top + size : step, left : left + size : step]
        yield np.ascontiguousarray(part[:, ::-1] if random.random() < 0.5 else part)


def _files(paths: list[str]) -> Iterator[npt.NDArray[np.uint8]]:
    """Raises ConfigurationError naming the file that is no picture."""
    pictures = []
    for path in paths:
        try:
            pictures.append(decode(Path(path).read_bytes(), SIDE, SIDE))
        except (OSError, BadImage) as error:
            raise ConfigurationError(f"{path}: {error}") from None
    return itertools.cycle(pictures)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m publishers.images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", help="pictures; default: scikit-learn's photographs")
    parser.add_argument("--rate", type=positive, default=1.0, help="pictures a second (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the crops (default: %(default)s)")
    parser.add_argument("--model", default="imagenet", help="whom to ask (default: %(default)s)")
    options = parser.parse_args(arguments)
    start_logging()
    try:
        pictures = _files(options.files) if options.files else crops(options.seed)
        channel = catalog.requests_of(options.model)
    except ConfigurationError as error:
        return fail(error)

    async def stream() -> None:
        async with opened(Pipeline("images")) as app:
            async for due in paced(options.rate, app=app):
                batch = [
                    catalog.Inputs(data=Tensor(picture), deadline=time.time() + STALE)
                    for picture in itertools.islice(pictures, due)
                ]
                await insist(partial(app.publish, channel, batch), "images")

    return run(stream)


if __name__ == "__main__":
    sys.exit(main())
