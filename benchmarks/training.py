"""Two workers train an MLP of 235,146 parameters on scikit-learn's digits (drawn on 28 × 28): each mode, and its peers.

`python -m benchmarks.training SIDE URL RANK STEPS` is one worker. Every worker takes STEPS steps of 128 samples.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from pipeline.server import Server

from .allreduce import aggregating
from .report import Figure

__all__ = ["Work", "measure", "run"]

BATCH = 128
TARGET = 0.95
"""Accuracy on held-out digits."""
EVERY = 4
"""Steps between two looks at it, whose time does not count. Every worker looks, so that none gets ahead meanwhile."""
STEPS = 400
RATE, MOMENTUM = 0.05, 0.9

PEERS = {"single": "one process", "ddp": "DDP gloo × 2", "torch-hogwild": "torch Hogwild × 2"}
if find_spec("torchft") is not None:
    PEERS["torchft"] = "torchft × 2"
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "sync": ("ours, sync", {}),
    "sync-redis": ("ours, sync through the aggregator", {"plane": "redis"}),
    "sync-bf16": ("ours, sync, bf16", {"compress": "bf16"}),
    "local": ("ours, local, 16 steps", {"mode": "local", "steps": 16}),
    "hogwild": ("ours, hogwild", {"mode": "hogwild"}),
    "async": ("ours, async", {"mode": "async", "server_optimizer": "adam", "rate": 1e-3}),
    "dogwild": ("ours, dogwild", {"mode": "dogwild", "server_optimizer": "adam", "rate": 2e-3, "late": "scale"}),
}
"""Stale gradients want small steps: at RATE a server with momentum, or sgd at 0.2, diverged; Adam at 1e-3 did not.

A live push may be dozens of versions late, after which Adam at 1e-3 lost ten points now and then: scaled, it did not.
"""
UNITS = {"rate": "samples/s", "target": "s to 95 %", "accuracy": "% held out", "bytes": "B/step"}


def run(repeats: int, seconds: float) -> list[Figure]:
    names = {**PEERS, **{side: name for side, (name, _) in OURS.items()}}
    figures = {
        (side, what): Figure("training", f"{name}, {unit}", unit, peer=side in PEERS)
        for what, unit in UNITS.items()
        for side, name in names.items()
    }
    with Server() as server, aggregating(server.url):
        for _ in range(repeats):
            for side in names:
                for what, value in measure(side, server.url).items():
                    figures[side, what].values.append(value)
    return [figure for figure in figures.values() if figure.values]


def measure(side: str, url: str) -> dict[str, float]:
    """Of the team: samples/s of all; the first worker's time to target, accuracy and bytes."""
    environment = {
        **os.environ, "TRAINING_RUN": f"training-{secrets.token_hex(4)}", "OMP_NUM_THREADS": "1", "RUST_LOG": "error",
    }  # fmt: skip
    team = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.training", side, url, str(rank), str(STEPS)],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(1 if side in ("single", "torch-hogwild") else 2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in team]
    if any(process.returncode for process in team):
        raise RuntimeError(f"a worker of {side} failed")
    lines = [line for output in outputs for line in output.splitlines() if line.startswith("{")]
    found = [json.loads(line) for line in lines]
    first = next(one for one in found if one["rank"] == 0)
    measured = {"rate": sum(one["rate"] for one in found), "accuracy": first["accuracy"]}
    if first["target"] is not None:
        measured["target"] = first["target"]
    if first["bytes"] is not None:
        measured["bytes"] = first["bytes"]
    return measured


# -- a worker --------------------------------------------------------------------------------------------------------


class Work:
    """Model, shard and clock of one worker."""

    def __init__(self, rank: int, workers: int) -> None:
        import torch
        from torch import nn

        from publishers.datasets import digits

        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.rank = rank
        self.model = nn.Sequential(
            nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
        )  # fmt: skip
        split = digits()
        self._train, self._labels = _drawn(split.train.images[rank::workers]), split.train.labels[rank::workers]
        self._held_out, self._truth = _drawn(split.held_out.images), split.held_out.labels
        self._random = np.random.default_rng(rank)
        self._rate = 0.0
        self._target: float | None = None

    def optimizer(self) -> Any:
        import torch

        return torch.optim.SGD(self.model.parameters(), RATE, MOMENTUM)

    def loss(self, model: Any) -> Any:
        """Of a random batch, backpropagated."""
        import torch

        chosen = self._random.choice(len(self._labels), BATCH, replace=False)
        loss = torch.nn.functional.cross_entropy(
            model(torch.from_numpy(self._train[chosen])), torch.from_numpy(self._labels[chosen])
        )
        loss.backward()
        return loss

    def warm_up(self, model: Any) -> None:
        """A process's first backward pass takes tens of milliseconds, which are not training."""
        self.loss(model)
        self.model.zero_grad()

    def accuracy(self) -> float:
        import torch

        with torch.no_grad():
            found = self.model(torch.from_numpy(self._held_out)).argmax(1).numpy()
        return float((found == self._truth).mean())

    def go(self, steps: int, step: Callable[[], None]) -> None:
        """Take the steps by the clock."""
        spent = 0.0
        for number in range(1, steps + 1):
            began = time.perf_counter()
            step()
            spent += time.perf_counter() - began
            if self._target is None and number % EVERY == 0 and self.accuracy() >= TARGET:
                self._target = spent
        self._rate = steps * BATCH / spent

    def tell(self, sent: float | None = None) -> None:
        """Print what came of it."""
        print(
            json.dumps({"rank": self.rank, "rate": self._rate, "target": self._target, "bytes": sent,
                        "accuracy": 100 * self.accuracy()}),
            flush=True,
        )  # fmt: skip


def _drawn(images: Any) -> Any:
    """[n, 8, 8], 0…16 → float32 [n, 784] in 0…1: each pixel three wide, with a margin."""
    large = np.kron(images / 16, np.ones((1, 3, 3)))
    return np.pad(large, ((0, 0), (2, 2), (2, 2))).reshape(len(images), 784).astype(np.float32)


def single(url: str, rank: int, steps: int) -> None:
    work = Work(0, 1)
    optimizer = work.optimizer()

    def step() -> None:
        work.loss(work.model)
        optimizer.step()
        optimizer.zero_grad()

    work.warm_up(work.model)
    work.go(steps, step)
    work.tell()


def ddp(url: str, rank: int, steps: int) -> None:
    import redis
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    work = Work(rank, 2)
    with redis.Redis.from_url(url, socket_timeout=None) as client:  # where the store is
        key = f"{os.environ['TRAINING_RUN']}-store"
        if rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
            client.rpush(key, store.port)
        else:
            store = dist.TCPStore("127.0.0.1", int(client.blpop([key])[1]), 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = DistributedDataParallel(work.model)
    optimizer = work.optimizer()

    def step() -> None:
        work.loss(model)
        optimizer.step()
        optimizer.zero_grad()

    work.warm_up(model)
    work.go(steps, step)
    work.tell(4 * 235_146)
    dist.destroy_process_group()


def torchft(url: str, rank: int, steps: int) -> None:
    import redis
    import torch.distributed as dist
    from torchft import DistributedDataParallel, Manager, Optimizer, ProcessGroupGloo
    from torchft.coordination import LighthouseServer

    work = Work(rank, 2)
    with redis.Redis.from_url(url, socket_timeout=None) as client:  # where the lighthouse is
        key = f"{os.environ['TRAINING_RUN']}-lighthouse"
        if rank == 0:
            lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=2)
            client.rpush(key, *2 * [lighthouse.address().rpartition(":")[2]])
        port = int(client.blpop([key])[1])
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    manager = Manager(
        pg=ProcessGroupGloo(), min_replica_size=2, rank=0, world_size=1, replica_id=str(rank), hostname="127.0.0.1",
        store_addr="127.0.0.1", store_port=store.port, lighthouse_addr=f"http://127.0.0.1:{port}",
        state_dict=work.model.state_dict, load_state_dict=work.model.load_state_dict,
    )  # fmt: skip
    model, optimizer = DistributedDataParallel(manager, work.model), Optimizer(manager, work.optimizer())

    def step() -> None:
        optimizer.zero_grad()
        work.loss(model)
        optimizer.step()

    optimizer.zero_grad()
    work.warm_up(model)
    manager.should_commit()
    work.go(steps, step)
    work.tell(4 * 235_146)
    sys.stdout.flush()
    os._exit(0)  # its servers' threads would outlive the work


def torch_hogwild(url: str, rank: int, steps: int) -> None:
    import torch.multiprocessing as processes

    work = Work(0, 2)
    work.model.share_memory()
    together = processes.get_context("spawn").Barrier(2)
    processes.spawn(_torch_hogwild_worker, (work.model, steps, together), nprocs=2)


def _torch_hogwild_worker(rank: int, model: Any, steps: int, together: Any) -> None:
    work = Work(rank, 2)
    work.model = model
    optimizer = work.optimizer()

    def step() -> None:
        work.loss(model)
        optimizer.step()
        optimizer.zero_grad()

    work.warm_up(model)
    together.wait()
    work.go(steps, step)
    work.tell()


def ours(side: str, url: str, rank: int, steps: int) -> None:
    from publishers.training import join

    work, options = Work(rank, 2), _options_of(side)
    optimizer = None if "server_optimizer" in options else work.optimizer()
    with join(
        os.environ["TRAINING_RUN"], work.model, workers=2, rank=rank, url=url, lease=5.0, metrics=False, **options
    ) as run:

        def step() -> None:
            loss = work.loss(work.model)
            run.step(optimizer, loss=loss, samples=BATCH)

        work.warm_up(work.model)
        _meet(url, rank)
        work.go(steps, step)
    work.tell(run.sent / options.get("steps", 1) or None)


def _meet(url: str, rank: int) -> None:
    """Both workers begin together, as torch's do at their barrier."""
    import redis

    with redis.Redis.from_url(url, socket_timeout=None) as client:
        names = [f"{os.environ['TRAINING_RUN']}-{one}" for one in range(2)]
        client.rpush(names[1 - rank], "here")
        client.blpop([names[rank]])


def _options_of(side: str) -> dict[str, Any]:
    """`compress=NAME`: mode sync through the aggregator with that codec."""
    return {"compress": side.partition("=")[2], "plane": "redis"} if "=" in side else OURS[side][1]


if __name__ == "__main__":
    side, url, rank, steps = sys.argv[1:5]
    if side in OURS or "=" in side:
        ours(side, url, int(rank), int(steps))
    else:
        {"single": single, "ddp": ddp, "torchft": torchft, "torch-hogwild": torch_hogwild}[side](
            url, int(rank), int(steps)
        )
