"""LitServe with its batching; it starts its workers as processes, so the model's class is a module's."""

from typing import Annotated, Any

import litserve
import numpy as np
from fastapi import Body

from .serving_models import SHAPES, module
from .serving_peers import answers

__all__ = ["run"]


class Model(litserve.LitAPI):  # type: ignore[misc]
    def __init__(self, name: str) -> None:
        super().__init__(max_batch_size=32, batch_timeout=0.001)
        self.name = name

    def setup(self, device: str) -> None:
        self.model = module(self.name)

    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> Any:
        return np.frombuffer(request, np.float32).reshape(SHAPES[self.name])

    def batch(self, inputs: list[Any]) -> list[Any]:
        return inputs

    def predict(self, x: list[Any]) -> list[dict[str, Any]]:
        return answers(self.model, x)

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


def run(name: str, port: int) -> None:
    server = litserve.LitServer(Model(name), accelerator="cpu", timeout=30)
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)
