"""Other servers of the same models: `python -m benchmarks.serving_peers KIND MODEL PORT [URL]`.

fastapi   an endpoint that calls the model itself, one item at a time
mosec     its batching, at most 32, waiting 1 ms
litserve  its batching, at most 32, waiting 1 ms, one worker
article   a list in Redis, base64 JSON, a server that polls every 0.25 s, batches of 32; its gateway polls as well
"""

from __future__ import annotations

import base64
import json
import sys
import threading
import time
import uuid
from typing import Any

import numpy as np
import redis
import torch

from .serving_models import SHAPES, module

__all__ = ["main"]

SLEEP = 0.25


def answers(model: Any, batch: list[np.ndarray[Any, Any]]) -> list[dict[str, Any]]:
    with torch.inference_mode():
        rows = torch.softmax(model(torch.from_numpy(np.stack(batch))), dim=1).topk(5)
    return [
        {
            "success": True,
            "predictions": [{"label": str(i), "probability": p} for i, p in zip(ids, values, strict=True)],
        }
        for ids, values in zip(rows.indices.tolist(), rows.values.tolist(), strict=True)
    ]


def fastapi(name: str, port: int, url: str) -> None:
    import uvicorn
    from fastapi import FastAPI, Request

    app, model, shape = FastAPI(), module(name), SHAPES[name]

    async def predict(request: Request) -> dict[str, Any]:
        body = await request.body()
        return answers(model, [np.frombuffer(body, np.float32).reshape(shape)])[0]

    predict.__annotations__["request"] = Request
    app.post("/predict")(predict)
    uvicorn.run(app, port=port, log_level="warning", access_log=False)


def mosec(name: str, port: int, url: str) -> None:
    from mosec import Server, Worker

    class Model(Worker):  # type: ignore[misc]
        def __init__(self) -> None:
            self.model = module(name)

        def deserialize(self, data: bytes) -> Any:
            return np.frombuffer(data, np.float32).reshape(SHAPES[name])

        def forward(self, data: list[Any]) -> list[dict[str, Any]]:
            return answers(self.model, data)

    sys.argv = [sys.argv[0], "--port", str(port), "--path", f"/tmp/mosec-{port}", "--log-level", "warning"]
    server = Server()
    server.append_worker(Model, num=1, max_batch_size=32, max_wait_time=1, start_method="fork", route="/predict")
    server.run()


def litserve(name: str, port: int, url: str) -> None:
    from .litserve_peer import run

    run(name, port)


def article(name: str, port: int, url: str) -> None:
    import uvicorn
    from fastapi import FastAPI, Request

    def poll() -> None:
        model, client = module(name), redis.Redis.from_url(url)
        while True:
            queue = client.lrange("image_queue", 0, 31)
            if queue:
                items = [json.loads(item) for item in queue]
                arrays = [
                    np.frombuffer(base64.b64decode(item["image"]), np.float32).reshape(SHAPES[name]) for item in items
                ]
                for item, answer in zip(items, answers(model, arrays), strict=True):
                    client.set(item["id"], json.dumps(answer))
                client.ltrim("image_queue", len(items), -1)
            time.sleep(SLEEP)

    threading.Thread(target=poll, daemon=True).start()
    app = FastAPI()
    client = redis.asyncio.Redis.from_url(url)

    async def predict(request: Request) -> Any:
        import asyncio

        id_ = str(uuid.uuid4())
        body = await request.body()
        await client.rpush("image_queue", json.dumps({"id": id_, "image": base64.b64encode(body).decode()}))
        while (output := await client.get(id_)) is None:  # noqa: ASYNC110  # as it does
            await asyncio.sleep(SLEEP)
        await client.delete(id_)
        return json.loads(output)

    predict.__annotations__["request"] = Request
    app.post("/predict")(predict)
    uvicorn.run(app, port=port, log_level="warning", access_log=False)


def main() -> None:
    kind, name, port, url = sys.argv[1:5]
    {"fastapi": fastapi, "mosec": mosec, "litserve": litserve, "article": article}[kind](name, int(port), url)


if __name__ == "__main__":
    main()
