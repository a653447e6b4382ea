"""Who may look: no WebSockets of foreign pages, and nothing without the token where one is set."""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from fastapi import Request, Response, WebSocket
from fastapi.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["Guard"]

COOKIE = "pipeline_token"


class Guard:
    """ASGI middleware. The token comes as a bearer token, a cookie, or once as `/?token=…`, which sets the cookie."""

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
