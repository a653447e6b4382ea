"""A product in tiles by the matmul workers (here, one in this process), and its product with another matrix."""

import asyncio

import numpy as np

from pipeline import Pipeline
from pipeline.catalog import ProductOf
from pipeline.settings import settings
from publishers.jobs import multiply
from subscribers import matmul


async def main() -> None:
    worker = matmul.make(settings())
    serving = asyncio.create_task(worker.serve())
    await worker.ready.wait()
    a = np.arange(600 * 500, dtype=np.float64).reshape(600, 500) % 7
    async with Pipeline("example") as app:
        first = await multiply(app, a, a, transpose_b=True, result="file", blocks="always")
        print(f"{first.m} x {first.n} in {first.tiles} tiles, {first.recomputed} computed again")
        ones = np.ones((600, 1))
        sums = await multiply(app, ProductOf(job=first.job), ones, alpha=1 / 600, result="event")
        print(f"mean of its first row: {sums.product[0][0]:.3f}, by numpy: {(a @ a.T)[0].mean():.3f}")
    worker.stop()
    await serving


asyncio.run(main())
