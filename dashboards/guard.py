"""Who may look: no WebSockets of foreign pages, and nothing without the token where one is set."""

from __future__ import annotations

from fastapi import Request, Response, WebSocket
from fastapi.responses import JSONResponse, RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .access import COOKIE, Access, from_elsewhere

__all__ = ["Guard"]


class Guard:
    """ASGI middleware. The token comes as a bearer token, a cookie, or once as `/?token=…`, which sets the cookie."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            socket = WebSocket(scope, receive, send)
            if from_elsewhere(socket):
                await socket.close(1008)
                return
            if not self._access.knows(socket):
                await socket.accept()  # browsers are told why only of connections that were there
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
                hint = "a token is set: open /?token=…, or send Authorization: Bearer …"
                answer = (
                    JSONResponse({"error": hint}, 401)
                    if scope["path"].startswith("/api/")
                    else Response(f"{hint}\n", 401)
                )
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)
