"""The ASGI app: Dash for the pages, one WebSocket a viewer for what moves, a few numbers for programs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import plotly
from dash import Dash
from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from fastapi.responses import FileResponse

from pipeline import Pipeline
from pipeline.settings import settings

from . import actions, pages
from .access import Access
from .controls import Controls
from .feed import Feed
from .figures import specification
from .guard import Guard
from .hub import Hub, Viewer
from .numbers import numbers
from .shell import INDEX, shell
from .state import State
from .streams import View
from .wire import Json

__all__ = ["create", "server"]

logger = logging.getLogger("dashboards")

HERE = Path(__file__).parent


def create(url: str | None = None) -> FastAPI:
    token = settings().token
    access = Access(token.get_secret_value() if token else None)
    controls = Controls()
    feed = Feed(Pipeline("dashboard", url), State(), controls.subscriptions())
    hub = Hub(feed)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await _ask_for_the_first_page(app, access.token)
        tasks = [asyncio.create_task(feed.run()), asyncio.create_task(hub.run())]
        for task in tasks:
            task.add_done_callback(_tell)
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    app = FastAPI(title="Pipeline dashboard", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _routes(app, feed, hub)
    app.include_router(actions.router(feed.app, controls, feed.state.happened, access, feed.now))
    dash = Dash(
        "dashboards", server=cast(Any, app), backend="fastapi", assets_folder=str(HERE / "assets"), title="Pipeline",
        index_string=INDEX, update_title="", serve_locally=True, use_pages=True, pages_folder="",
        assets_path_ignore=["live"], assets_ignore="grid.js", include_pages_meta=False,
    )  # fmt: skip
    pages.register()
    dash.layout = shell
    app.add_middleware(Guard, access=access)
    return app


def _tell(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("the dashboard stands still: %r", error, exc_info=error)


async def _ask_for_the_first_page(app: FastAPI, token: str | None) -> None:
    """Dash prepares itself when `/` is asked for; who asked for another page before got one without assets."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(_: Any) -> None:
        """Nobody reads it."""

    headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {token}".encode())]
    await app(
        {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
            "path": "/", "raw_path": b"/", "root_path": "", "query_string": b"", "headers": headers,
            "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 0),
        },
        receive,
        send,
    )  # fmt: skip


def _routes(app: FastAPI, feed: Feed, hub: Hub) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/plotly.min.js")
    async def library() -> FileResponse:
        """From the installed package: nothing is loaded from outside."""
        path = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
        return FileResponse(path, headers={"cache-control": "public, max-age=86400"})

    @app.get("/api/figures")
    async def figures() -> dict[str, Any]:
        return specification()

    @app.get("/api/series")
    async def series() -> Json:
        """All counts as numbers: channel by channel what the server has, and what the buckets add up to."""
        return Json({**hub.status(0.0), **numbers(feed.state)})

    @app.websocket("/feed")
    async def stream(socket: WebSocket) -> None:
        await socket.accept()
        viewer = Viewer()
        sending = asyncio.create_task(_send(socket, hub, viewer))
        try:
            while True:
                try:
                    hub.show(viewer, View.parse(await socket.receive_json()))
                except (ValueError, RecursionError) as error:
                    await socket.close(1003, str(error)[:120])
                    break
        except (WebSocketDisconnect, RuntimeError, KeyError):
            """The viewer left."""
        finally:
            hub.leave(viewer)
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)


async def _send(socket: WebSocket, hub: Hub, viewer: Viewer) -> None:
    while True:
        await socket.send_bytes(await hub.next(viewer))


def __getattr__(name: str) -> FastAPI:
    """`dashboards.app:server`, made when an ASGI server asks for it."""
    if name == "server":
        return create()
    raise AttributeError(name)


server: FastAPI
