"""Serve a model of your own: export it, describe it, ask it. It says which of four numbers is the largest.

python examples/serve_model.py
"""

import asyncio
import json
import tempfile
from pathlib import Path

import torch

from pipeline import Pipeline, Tensor
from pipeline.catalog import Inputs, requests_of
from pipeline.settings import Settings
from pipeline.testing import serving
from subscribers.serving import make

LABELS = ["first", "second", "third", "fourth"]


async def main(folder: Path) -> None:
    batch = (torch.zeros(2, 4),)
    program = torch.export.export(torch.nn.Softmax(dim=1), batch, dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, folder / "largest.pt2")
    description = {"name": "largest", "kind": "torch-export", "file": "largest.pt2", "shape": [4], "labels": LABELS}
    (folder / "largest.json").write_text(json.dumps({**description, "output": "probabilities"}))
    # As a program: PIPELINE_MODELS=largest.json pipeline serve subscribers.serving:app
    worker = make(Settings(models=str(folder / "largest.json")))
    async with serving(worker), Pipeline("client") as client:
        for numbers in ([1.0, 5.0, 2.0, 0.0], [0.0, 1.0, 2.0, 9.0]):
            answer = await client.request(requests_of("largest"), Inputs(data=Tensor(torch.tensor(numbers))))
            print(numbers, "→", answer.predictions[0].label, f"{answer.predictions[0].probability:.2f}")


with tempfile.TemporaryDirectory() as folder:
    asyncio.run(main(Path(folder)))
