"""A worker of a training run, for tests: `python -m tests.trainer RUN '{"steps": 30, …}'`. A line of JSON a round.
As a process it can be killed and paused; where nobody does that, `main` in a thread says the same sooner.

Its gradient is `rank + 1` everywhere, so the mean of a round tells whose gradients are in it. With `until` it ends with
the first round in which somebody saw that this file is there: all workers end with the same one. With `adam` its
optimizer has a state. With `alone`, rank 0 says that value in every other step, and nobody else does.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from publishers.training import join


def main(name: str, options: dict[str, object], say: Callable[[dict[str, Any]], None]) -> None:
    until = options.pop("until", None)
    steps = int(options.pop("steps", 30 if until is None else 1 << 40))  # type: ignore[call-overload]
    pause = float(options.pop("pause", 0.01))  # type: ignore[arg-type]
    raises_at = options.pop("raises_at", None)
    poisons_at = options.pop("poisons_at", None)
    slow_at, slow_for = options.pop("slow_at", None), float(options.pop("slow_for", 0.6))  # type: ignore[arg-type]
    values = int(options.pop("values", 0))  # type: ignore[call-overload]
    alone = options.pop("alone", False)
    model: Any = {"w": np.zeros(int(options.pop("size", 1000)), np.float32)}  # type: ignore[call-overload]
    weights = model["w"]
    served = options.get("mode") in ("async", "dogwild")

    def descend(parameters: dict[str, np.ndarray], gradients: dict[str, np.ndarray]) -> None:  # type: ignore[type-arg]
        parameters["w"] -= 0.001 * gradients["w"]

    optimizer: Any = descend
    if options.pop("adam", False):
        import torch

        torch.set_num_threads(1)
        model = torch.nn.ParameterDict({"w": torch.from_numpy(weights)})
        optimizer = torch.optim.Adam(model.parameters())

    with join(name, model, metrics=False, **options) as run:  # type: ignore[arg-type]
        own = 0
        while (own if served else run.round) < steps:
            gradient = np.full_like(weights, run.rank + 1)
            if own == raises_at:
                raise RuntimeError("as it happens")
            if own == poisons_at:
                gradient[7] = np.nan
            if own == slow_at:
                time.sleep(slow_for)
            number = run.round
            if optimizer is not descend:
                model["w"].grad = torch.from_numpy(gradient)
            more = {**_stop(until), **{f"value{index}": float(run.rank + index) for index in range(values)}}
            if alone and run.rank == 0 and own % 2:
                more["alone"] = 7.0
            run.step(None if served else optimizer, gradients={"w": gradient}, loss=float(run.rank), **more)
            last = run.last
            said = {"own": own, "round": number, "time": time.time(), "rank": run.rank}
            if last is not None:
                said |= {
                    "closed": last.round, "ranks": last.ranks, "members": last.members, "refused": last.refused,
                    "late": last.late, "loss": last.values.get("loss"), "staleness": last.staleness,
                    "values": {name: value for name, value in last.values.items() if name != "loss"},
                    "mean": None if run.mean is None else float(run.mean[7]),
                }  # fmt: skip
            say(said)
            own += 1
            if last is not None and last.values.get("stop"):
                break
            time.sleep(pause)
    if optimizer is descend:
        weights = model["w"]  # another array, where it was in shared memory
    state = hashlib.sha256(weights.tobytes()).hexdigest()
    ends = {"value": float(weights[0]), "last": float(weights[-1])}
    say({"final": state, "rank": run.rank, **ends})


def _stop(until: object) -> dict[str, bool]:
    return {"stop": Path(str(until)).exists()} if until is not None else {}


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), lambda said: print(json.dumps(said), flush=True))
