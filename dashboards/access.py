"""Who may look, and who may act: the token where one is set, else who sits at the machine; never foreign pages."""

from __future__ import annotations

import hmac

from starlette.requests import HTTPConnection

from pipeline.origins import foreign, loopback, names_this_machine

__all__ = ["COOKIE", "Access", "Denied", "from_elsewhere"]

COOKIE = "pipeline_token"


class Denied(Exception):
    """Raised when somebody may not act: the HTTP status, and what to do."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Access:
    """token   what PIPELINE_TOKEN is set to; None: nothing"""

    def __init__(self, token: str | None) -> None:
        self.token = token

    def knows(self, connection: HTTPConnection) -> bool:
        """Whether the token came along, in the header or the cookie; where none is set, whoever asks may look.

        A proxy may add a header of its own, of another scheme."""
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        bearer = given.strip() if scheme.lower() == "bearer" else None
        return self.is_token(bearer) or self.is_token(connection.cookies.get(COOKIE))

    def is_token(self, given: str | None) -> bool:
        if self.token is None:
            return True
        return given is not None and hmac.compare_digest(given.encode(), self.token.encode())

    def actor(self, connection: HTTPConnection) -> str:
        """Who acts: "token" or "local". Raises Denied."""
        if not self.knows(connection):
            raise Denied(401, "a token is set: open /?token=…, or send Authorization: Bearer …")
        if from_elsewhere(connection):
            raise Denied(403, "a page of another origin may not act; use the dashboard's own address")
        if self.token is not None:
            return "token"
        if not _local(connection):
            raise Denied(
                403, "without a token only who sits at the machine may act, under http://127.0.0.1 or http://localhost "
                "and without a proxy: set PIPELINE_TOKEN, then open /?token=…"
            )  # fmt: skip
        return "local"


def from_elsewhere(connection: HTTPConnection) -> bool:
    """Whether a page of another origin sent this."""
    return foreign(connection.headers.get("origin"), connection.headers.get("host"))


def _local(connection: HTTPConnection) -> bool:
    """From a loopback address, to a loopback name (a page elsewhere may let its name point here), without a proxy."""
    headers = connection.headers
    if "forwarded" in headers or "x-forwarded-for" in headers or connection.client is None:
        return False
    return loopback(connection.client.host) and names_this_machine(headers.get("host", ""))
