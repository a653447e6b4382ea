"""The ASGI app: Dash for the page, one WebSocket a viewer for what moves."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import plotly
from dash import Dash
from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline import Pipeline
from pipeline.settings import settings

from .feed import Feed
from .figures import specification
from .hub import Hub
from .pages import overview
from .state import State

__all__ = ["create", "server"]

COOKIE = "pipeline_token"
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
    feed = Feed(Pipeline("dashboard", url), State())
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
    dash = Dash(
        "dashboards", server=cast(Any, app), backend="fastapi", assets_folder=str(HERE / "assets"), title="Pipeline",
        index_string=PAGE, update_title="", serve_locally=True,
    )  # fmt: skip
    dash.layout = overview.layout
    token = settings().token
    app.add_middleware(_Guard, token=token.get_secret_value() if token else None)
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

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            socket = WebSocket(scope, receive, send)
            origin = socket.headers.get("origin")
            foreign = origin is not None and urlsplit(origin).netloc != socket.headers.get("host")
            if foreign or not self._knows(socket.headers.get("authorization"), socket.cookies.get(COOKIE)):
                await socket.close(1008)
                return
        elif scope["type"] == "http":
            request = Request(scope)
            given = request.query_params.get("token")
            if given is not None and self._knows(f"Bearer {given}", None) and self._token is not None:
                response: Response = RedirectResponse(request.url.remove_query_params("token"), 303)
                response.set_cookie(COOKIE, given, httponly=True, samesite="strict")
                await response(scope, receive, send)
                return
            authorised = self._knows(request.headers.get("authorization"), request.cookies.get(COOKIE))
            if scope["path"] != "/healthz" and not authorised:
                hint = "a token is set: open /?token=…, or send Authorization: Bearer …\n"
                await Response(hint, 401)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _knows(self, header: str | None, cookie: str | None) -> bool:
        if self._token is None:
            return True
        given = cookie if header is None else header.removeprefix("Bearer ")
        return given is not None and hmac.compare_digest(given.encode(), self._token.encode())


def __getattr__(name: str) -> FastAPI:
    """`dashboards.app:server`, made when an ASGI server asks for it."""
    if name == "server":
        return create()
    raise AttributeError(name)


server: FastAPI
