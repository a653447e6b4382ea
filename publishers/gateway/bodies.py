"""What is checked before a request is looked at: the token, and how much of a body is read."""

from __future__ import annotations

import asyncio
import hmac

from fastapi import Request

__all__ = ["NO_TOKEN", "BodyTooLarge", "Guard", "read_body"]

OPEN = ("/healthz", "/readyz")
BODY_SECONDS = 10.0


class BodyTooLarge(Exception):
    """Raised when a body exceeds its limit, before it is read."""


class Guard:
    """Asks for the bearer token, when there is one, everywhere but at the health checks."""

    def __init__(self, token: str | None) -> None:
        self._token = None if token is None else f"Bearer {token}".encode()

    def admits(self, path: str, headers: list[tuple[bytes, bytes]]) -> bool:
        return self._token is None or path in OPEN or self._knows(dict(headers))

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        return self._token is not None and hmac.compare_digest(headers.get(b"authorization", b""), self._token)


NO_TOKEN = "a bearer token is needed: Authorization: Bearer <PIPELINE_TOKEN>"


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
