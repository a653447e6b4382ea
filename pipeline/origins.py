"""Who may have sent an HTTP request: any page can have its visitors' browsers post to addresses that only they reach.
What serves HTTP refuses that. Programs send no Origin, and browsers let no page leave it out."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

__all__ = ["foreign", "loopback", "names_this_machine"]


def foreign(origin: str | None, host: str | None) -> bool:
    """Whether a page of another origin sent what has these headers."""
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc != host
    except ValueError:
        return True


def names_this_machine(host: str) -> bool:
    """Whether a Host header does: a page elsewhere that lets its own name point to 127.0.0.1 is not `foreign` there."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    return name == "localhost" or loopback(name)


def loopback(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback
