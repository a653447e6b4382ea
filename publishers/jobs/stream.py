"""Publishes matmul jobs: a stream of random products of mixed sizes; now and then one for the systolic array, and one
that all workers share.

python -m publishers.jobs --rate 1 --sizes 64,128,256
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline import Pipeline, Tensor, catalog

from ..command import insist, opened, paced, positive, run

__all__ = ["job_events", "main"]

DTYPES = ("float32", "float64", "float16")
LARGEST = 8192
SYSTOLIC = 12
"""Rows and columns of the matrices for the systolic array: 3·12 - 2 cycles."""
SHARED = 4
"""How many times the largest of the sizes a product has that workers share."""


def job_events(
    sizes: list[int], dtype: str = "float32", seed: int = 0, *, systolic_every: int = 20, shared_every: int = 60
) -> Iterator[catalog.MatmulJob]:
    """Jobs without end: A is [m, k], B is [k, n], each of m, k, n one of `sizes`, elements normal. Set by the seed.

    Every so many jobs (0: never) it is one for the systolic array, and one that workers share, tile by tile.
    """
    random = np.random.default_rng(seed)
    for number in itertools.count(1):
        m, k, n = (int(size) for size in random.choice(sizes, 3))
        options: dict[str, Any] = {}
        if systolic_every and number % systolic_every == 0:
            m = k = n = SYSTOLIC
            options["kernel"] = "systolic"
        elif shared_every and number % shared_every == shared_every // 2:
            m = k = n = min(LARGEST, SHARED * max(sizes))
            options["blocks"] = "always"
        a, b = random.standard_normal((m, k)), random.standard_normal((k, n))
        yield catalog.MatmulJob(a=Tensor(a.astype(dtype)), b=Tensor(b.astype(dtype)), **options)


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: sizes are whole numbers with commas, e.g. 64,256,512") from None
    if not all(1 <= size <= LARGEST for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: sizes are from 1 to {LARGEST}")
    return sizes


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m publishers.jobs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=positive, default=1.0, metavar="N", help="jobs a second (default: %(default)s)")
    parser.add_argument("--sizes", type=_sizes, default=[64, 128, 256], metavar="N,…", help=(
        "m, k and n of each job are drawn from these (default: 64,128,256)"
    ))  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the elements (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sizes and elements (default: %(default)s)")
    parser.add_argument("--systolic-every", type=int, default=20, metavar="N", help=(
        "every so many jobs, one for the systolic array (0: never; default: %(default)s)"
    ))  # fmt: skip
    parser.add_argument("--shared-every", type=int, default=60, metavar="N", help=(
        "every so many jobs, a big one that all workers share (0: never; default: %(default)s)"
    ))  # fmt: skip
    parser.add_argument("--count", type=int, metavar="N", help="end after so many jobs (default: never)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _arguments().parse_args(arguments)
    jobs = job_events(
        options.sizes, options.dtype, options.seed,
        systolic_every=options.systolic_every, shared_every=options.shared_every,
    )  # fmt: skip

    async def work() -> None:
        async with opened(Pipeline("jobs")) as app:
            async for due in paced(options.rate, options.count, app):
                part = [next(jobs) for _ in range(due)]
                await insist(lambda part=part: app.publish(catalog.matmul_jobs, part), "publishing jobs")  # type: ignore[misc]

    return run(work)
