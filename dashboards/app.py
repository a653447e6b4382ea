"""The ASGI app: Dash for the page, one WebSocket a viewer for what moves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import plotly
from dash import Dash
from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline import Pipeline
from pipeline.settings import settings

from . import actions
from .access import COOKIE, Access, foreign
from .controls import Controls
from .feed import Feed
from .figures import specification
from .hub import Hub
from .markers import Markers
from .pages import overview
from .state import State

__all__ = ["create", "server"]

HERE = Path(__file__).parent
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
{%metas%}
<title>Pipeline</title>
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>\
<circle cx='8' cy='8' r='6' fill='%233FB68B'/></svg>">
<script>document.documentElement.dataset.theme = localStorage.getItem("theme")
  || (matchMedia("(prefers-color-scheme: light)").matches ? "light" : "dark");</script>
{%css%}
</head>
<body>{%app_entry%}<footer>{%config%}{%scripts%}{%renderer%}</footer></body>
</html>"""


def create(url: str | None = None) -> FastAPI:
    pipeline, controls, markers = Pipeline("dashboard", url), Controls(), Markers()
    feed = Feed(pipeline, State(), [*controls.subscriptions(), *markers.subscriptions()])
    token = settings().token
    access = Access(token.get_secret_value() if token else None)
    hub = Hub(feed)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(feed.run()), asyncio.create_task(hub.run())]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    app = FastAPI(title="Pipeline dashboard", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    _routes(app, hub)
    app.include_router(actions.router(pipeline, controls, markers, access))
    dash = Dash(
        "dashboards", server=cast(Any, app), backend="fastapi", assets_folder=str(HERE / "assets"), title="Pipeline",
        index_string=PAGE, update_title="", serve_locally=True,
    )  # fmt: skip
    dash.layout = overview.layout
    app.add_middleware(_Guard, access=access)
    return app


def _routes(app: FastAPI, hub: Hub) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/plotly.min.js")
    async def library() -> FileResponse:
        """From the installed package: nothing is loaded from outside."""
        path = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
        return FileResponse(path, headers={"cache-control": "public, max-age=86400"})

    @app.get("/api/figures")
    async def figures() -> list[dict[str, Any]]:
        return specification()

    @app.get("/api/series")
    async def series() -> JSONResponse:
        """Everything the page shows, as numbers."""
        return JSONResponse(json.loads(hub.snapshot()))

    @app.websocket("/feed")
    async def feed(socket: WebSocket) -> None:
        await socket.accept()
        viewer = hub.join()
        gone = asyncio.create_task(_until_gone(socket))
        try:
            while not gone.done():
                taking = asyncio.create_task(viewer.take())
                await asyncio.wait({taking, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not taking.done():
                    taking.cancel()
                    break
                frame, behind = taking.result()
                await socket.send_bytes(hub.refresh(viewer) if behind else frame)
        except (WebSocketDisconnect, RuntimeError):
            """The viewer left while we wrote."""
        finally:
            hub.leave(viewer)
            gone.cancel()


async def _until_gone(socket: WebSocket) -> None:
    try:
        while True:
            await socket.receive_bytes()
    except (WebSocketDisconnect, RuntimeError, KeyError):
        return


class _Guard:
    """Refuses WebSockets of foreign pages, and everything without the token where one is set."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            socket = WebSocket(scope, receive, send)
            if foreign(socket.headers) or not self._access.knows(socket):
                await socket.close(1008)
                return
        elif scope["type"] == "http":
            request = Request(scope)
            given = request.query_params.get("token")
            if given is not None and self._access.token is not None and self._access.is_token(given):
                response: Response = RedirectResponse(request.url.remove_query_params("token"), 303)
                response.set_cookie(COOKIE, given, httponly=True, samesite="strict")
                await response(scope, receive, send)
                return
            if scope["path"] != "/healthz" and not self._access.knows(request):
                hint = "a token is set: open /?token=…, or send Authorization: Bearer …\n"
                await Response(hint, 401)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def __getattr__(name: str) -> FastAPI:
    """`dashboards.app:server`, made when an ASGI server asks for it."""
    if name == "server":
        return create()
    raise AttributeError(name)


server: FastAPI
