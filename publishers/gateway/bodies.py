"""What is checked before a request is looked at: the token, who sent it, and how much of a body is read."""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass

from fastapi import Request

from pipeline.origins import foreign, names_this_machine

__all__ = ["BodyTooLarge", "Guard", "Objection", "read_body"]

OPEN = ("/healthz", "/readyz")
LOOKS = ("GET", "HEAD", "OPTIONS")
"""What a page of another origin may send: it changes nothing, and browsers do not show the answer to that page."""
BODY_SECONDS = 10.0


class BodyTooLarge(Exception):
    """Raised when a body exceeds its limit, before it is read."""


@dataclass(frozen=True, slots=True)
class Objection:
    """Why a request is not looked at."""

    status: int
    reason: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


NO_TOKEN = Objection(
    401, "a bearer token is needed: Authorization: Bearer <PIPELINE_TOKEN>", ((b"www-authenticate", b"Bearer"),)
)
FOREIGN = Objection(403, "a page of another origin may not act; programs, which send no Origin, may")
ELSEWHERE = Objection(
    403, "without a token only pages at http://127.0.0.1 or http://localhost may act, and programs: set PIPELINE_TOKEN"
)


class Guard:
    """Asks for the bearer token, when there is one, but at the health checks; lets foreign pages only look."""

    def __init__(self, token: str | None) -> None:
        self._token = None if token is None else f"Bearer {token}".encode()

    def objection(self, path: str, headers: list[tuple[bytes, bytes]], method: str = "POST") -> Objection | None:
        found = dict(headers)
        if self._token is not None and path not in OPEN and not self._knows(found):
            return NO_TOKEN
        if b"origin" not in found or method in LOOKS:
            return None
        host = found.get(b"host", b"").decode("latin-1")
        if foreign(found[b"origin"].decode("latin-1"), host):
            return FOREIGN
        return ELSEWHERE if self._token is None and not names_this_machine(host) else None

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        return self._token is not None and hmac.compare_digest(headers.get(b"authorization", b""), self._token)


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
