"""`python -m benchmarks NAME [--json] [--repeats N] [--seconds S]`."""

from __future__ import annotations

import argparse
import os
import tempfile

from . import allreduce, compression, dashboard, events, growth, latency, matmul, serving, tensors, training
from .report import show

BENCHMARKS = {
    "allreduce": allreduce.run,
    "compression": compression.run,
    "dashboard": dashboard.run,
    "events": events.run,
    "growth": growth.run,
    "latency": latency.run,
    "matmul": matmul.run,
    "serving": serving.run,
    "tensors": tensors.run,
    "training": training.run,
}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Measure; peers and limits in the same run.")
    parser.add_argument("name", choices=sorted(BENCHMARKS))
    parser.add_argument("--json", action="store_true", help="one JSON line a figure")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="aimed at for each measurement (default: %(default)s)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pipeline-benchmarks-", dir="/dev/shm") as folder:
        os.environ["PIPELINE_SHM_DIR"] = folder  # what killed processes leave behind goes with it
        figures = BENCHMARKS[options.name](options.repeats, options.seconds)
    show(figures, options.json)


if __name__ == "__main__":
    main()
