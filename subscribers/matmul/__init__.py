"""Computes matrix products that come as jobs, on the best device there is; big ones in tiles, with all other workers.

matmul.jobs ─▶ multiply ─▶ operands (inline, files, earlier products) ─▶ kernel ─▶ matmul.results
                 │ too big for one worker's memory
                 ├─▶ plan.json, board, product.npy in <PIPELINE_MATMUL_DIR>/jobs/<job>/ ─▶ matmul.tiles, one a tile of C
                 └── waits until the board is full            tile: lock ─▶ multiply into product.npy ─▶ board
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from pipeline import Message, Pipeline, Reject, Reply, RetryPolicy, catalog
from pipeline.catalog import MatmulJob, MatmulResult, MatmulTile, SystolicCycle, TileProgress
from pipeline.settings import Settings, settings

from .board import Board
from .plan import Plan
from .worker import Work, Worker

__all__ = ["make"]

COORDINATING = 2
"""Jobs at a time: one may be computed while another waits for its tiles."""
AT_HAND = 2
"""Tiles: one that is computed, and the next."""
LOOK_EVERY = 0.004
STALLED = 4
"""Leases without another tile done, after which tiles are asked for again."""
TIDY_EVERY = 5.0
ATTEMPTS = 5
PATIENT = RetryPolicy(attempts=1000)
"""For what another worker has in its hands: to look again is no failure."""


def make(options: Settings, url: str | None = None) -> Pipeline:
    """The app of a matmul worker."""
    app = Pipeline("matmul", url)
    worker = Worker(options, app.empty)

    @app.on_start
    async def start() -> None:
        worker.stopping = False
        app.spawn(worker.run(worker.warm_up), name="measuring the device")
        app.spawn(tidy(), name="old products")

    @app.on_stop
    async def stop() -> None:
        worker.stopping = True

    async def tidy() -> None:
        while True:
            await asyncio.sleep(TIDY_EVERY)
            await worker.run(worker.tidy, options.matmul_keep)

    @app.subscriber(
        catalog.matmul_jobs, group="matmul", publishes=[catalog.matmul_results, catalog.systolic_cycles],
        concurrency=COORDINATING, lease=options.matmul_lease, retry=RetryPolicy(attempts=8),
    )  # fmt: skip
    async def multiply(message: Message[MatmulJob]) -> list[Outcome]:
        """The product's figures, and where it is; of a systolic array, each of its cycles, too."""
        done = await worker.run(worker.compute, message.id, message.event)
        result = await share(message.id, done) if isinstance(done, Work) else done
        return [*told(message, result), *cycles(result)]

    async def share(id_: str, work: Work) -> MatmulResult:
        plan, board = await worker.run(worker.share, id_, work)
        moved, done = -math.inf, board.done()
        try:
            while not worker.is_complete(id_, plan, board):
                if time.monotonic() - moved > STALLED * options.matmul_lease:
                    await ask_for_tiles(id_, plan, board)
                    moved = time.monotonic()
                elif board.done() != done:
                    moved, done = time.monotonic(), board.done()
                await asyncio.sleep(LOOK_EVERY)
            return await worker.run(worker.finish, id_, work, plan, board)
        except Reject:
            worker.drop(id_)
            raise
        finally:
            board.close()

    async def ask_for_tiles(id_: str, plan: Plan, board: Board) -> None:
        """Of all workers: what is not done. To ask twice does no harm, so it is done after a coordinator's death, and
        when nothing moves: Redis may have lost its data, or a worker that does not see this folder had the event."""
        for strip in plan.strips():
            tiles = [MatmulTile(job=id_, index=index) for index in strip if not board.is_done(plan.final(index))]
            await app.publish(catalog.matmul_tiles, tiles)

    @app.subscriber(
        catalog.matmul_tiles, group="matmul", publishes=catalog.matmul_progress, concurrency=AT_HAND,
        lease=options.matmul_lease, retry=PATIENT,
    )  # fmt: skip
    async def compute_tile(message: Message[MatmulTile]) -> TileProgress | None:
        tile, last = message.event, message.attempt >= ATTEMPTS
        computed = await worker.run(lambda: worker.compute_tile(tile.job, tile.index, last_attempt=last))
        if computed is None:
            return None
        plan, done, seconds = computed
        shapes = plan.shapes
        return TileProgress(
            job=tile.job, done=done, total=plan.tiles, m=shapes.m, k=shapes.k, n=shapes.n, worker=app.consumer,
            seconds=seconds,
        )  # fmt: skip

    return app


Outcome = MatmulResult | Reply[MatmulResult] | SystolicCycle


def told(message: Message[MatmulJob], result: MatmulResult) -> list[Outcome]:
    """Who asked for a product gets it; `matmul.results` has it only if nobody did: it would be kept there in vain."""
    if not message.requested or result.product is None:
        return [result]
    return [Reply(result), result.model_copy(update={"product": None})]


def cycles(result: MatmulResult) -> list[SystolicCycle]:
    """What the array's cells did in each cycle, for whoever watches."""
    if result.kernel != "systolic" or not result.m == result.k == result.n:
        return []
    from ..kernels.systolic import wavefront

    fronts = list(wavefront(result.n))
    return [
        SystolicCycle(job=result.job, cycle=cycle, cycles=len(fronts), active=active)
        for cycle, active in enumerate(fronts)
    ]


def __getattr__(name: str) -> Any:
    """`app` is made when it is first asked for: reading settings is not importing's business."""
    if name == "app":
        globals()["app"] = found = make(settings())
        return found
    raise AttributeError(name)
