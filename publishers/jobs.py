"""Publishes matmul jobs: a stream of random products of mixed sizes.

python -m publishers.jobs --rate 1 --sizes 64,128,256
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import numpy as np

from pipeline import Pipeline, Tensor, catalog

from .command import insist, opened, paced, positive, run

__all__ = ["job_events", "main"]

DTYPES = ("float32", "float64", "float16")
LARGEST = 8192


def job_events(sizes: list[int], dtype: str = "float32", seed: int = 0) -> Iterator[catalog.MatmulJob]:
    """Jobs without end: A is [m, k], B is [k, n], each of m, k, n one of `sizes`, elements normal. Set by the seed."""
    random = np.random.default_rng(seed)
    while True:
        m, k, n = (int(size) for size in random.choice(sizes, 3))
        a, b = random.standard_normal((m, k)), random.standard_normal((k, n))
        yield catalog.MatmulJob(a=Tensor(a.astype(dtype)), b=Tensor(b.astype(dtype)))


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
    parser.add_argument("--count", type=int, metavar="N", help="end after so many jobs (default: never)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _arguments().parse_args(arguments)
    jobs = job_events(options.sizes, options.dtype, options.seed)

    async def work() -> None:
        async with opened(Pipeline("jobs")) as app:
            async for due in paced(options.rate, options.count):
                part = [next(jobs) for _ in range(due)]
                await insist(lambda part=part: app.publish(catalog.matmul_jobs, part), "publishing jobs")  # type: ignore[misc]

    return run(work)


if __name__ == "__main__":
    sys.exit(main())
