"""The two models that are served, and their inputs: an MLP of 3 KB an item, a small convnet of 602 KB an item."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

__all__ = ["INPUTS", "SHAPES", "export", "module"]

SHAPES: dict[str, tuple[int, ...]] = {"mlp": (784,), "convnet": (3, 224, 224)}
INPUTS = {name: np.random.default_rng(0).random(shape, np.float32).tobytes() for name, shape in SHAPES.items()}


def module(name: str) -> nn.Module:
    """float32 [n, …] → logits [n, 10]; the same weights every time."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if name == "mlp":
        made = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    else:
        made = nn.Sequential(
            nn.Conv2d(3, 16, 7, stride=4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip
    return made.eval().requires_grad_(requires_grad=False)


def export(name: str, folder: Path) -> Path:
    """Write the model and its specification for `subscribers.serving`."""
    sample = torch.zeros(2, *SHAPES[name])
    program = torch.export.export(module(name), (sample,), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, folder / f"{name}.pt2")
    specification = folder / f"{name}.json"
    shape = list(SHAPES[name])
    text = {"name": name, "kind": "torch-export", "file": f"{name}.pt2", "shape": shape, "batch": 32}
    specification.write_text(json.dumps(text))
    return specification
