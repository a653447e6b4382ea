"""What is checked before a request is looked at: the token, and how much of a body is read."""

from __future__ import annotations

import asyncio
import hmac
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.responses import JSONResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["BodyTooLarge", "Guard", "read_body"]

OPEN = ("/healthz", "/readyz")
BODY_SECONDS = 10.0


class BodyTooLarge(Exception):
    """Raised when a body exceeds its limit, before it is read."""


class Guard:
    """ASGI middleware: asks for the bearer token, when there is one, everywhere but at the health checks."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self._app = app
        self._token = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._token is None or scope["type"] != "http" or scope["path"] in OPEN or self._knows(scope):
            await self._app(scope, receive, send)
            return
        error = "a bearer token is needed: Authorization: Bearer <PIPELINE_TOKEN>"
        refusal = JSONResponse({"success": False, "error": error}, 401, {"www-authenticate": "Bearer"})
        await refusal(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return self._token is not None and hmac.compare_digest(given, self._token)


async def read_body(request: Request, limit: int) -> bytes:
    """The body, at most `limit` bytes. Raises BodyTooLarge; TimeoutError for one that only trickles in."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise BodyTooLarge(f"the body has {int(declared):,} bytes; the limit is {limit:,}")
    parts, size = [], 0
    async with asyncio.timeout(BODY_SECONDS):
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise BodyTooLarge(f"the body exceeds the limit of {limit:,} bytes")
            parts.append(part)
    return b"".join(parts)
