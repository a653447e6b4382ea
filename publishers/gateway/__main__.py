"""Serves the gateway: publish, watch and predict over HTTP.

    python -m publishers.gateway
    curl -X POST localhost:8000/channels/records -d '{"source": "curl", "row": 0, "values": {"x": 1.5}}'
    curl -N localhost:8000/channels/records/events?since=5m

Settings: GATEWAY_PORT, PIPELINE_GATEWAY_HOST, PIPELINE_TOKEN, PIPELINE_REDIS_URL.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys

import uvicorn

from pipeline.errors import ConfigurationError
from pipeline.lifecycle import settle_memory
from pipeline.settings import settings

from ..command import fail, start_logging
from .app import create
from .server import Protocol

__all__ = ["listen", "main"]

GRACE = 2
"""Seconds that requests in progress have when the gateway stops."""


def listen(host: str, port: int, *, share: bool = False) -> socket.socket:
    """A listening socket; with `share`, other processes of this user may listen there too, and the kernel deals
    connections out. Raises ConfigurationError when the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, reuse_port=share)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}; set GATEWAY_PORT"
        ) from None


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m publishers.gateway", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, metavar="N", help="default: GATEWAY_PORT, or 8000; 0 takes a free one")
    parser.add_argument("--share", action="store_true", help="let several gateways listen on one port")
    options = parser.parse_args(arguments)
    try:
        start_logging()
        port = settings().gateway_port if options.port is None else options.port
        listener = listen(settings().gateway_host, port, share=options.share)
        app = create()
    except (ConfigurationError, OverflowError) as error:
        return fail(error)
    host, port = listener.getsockname()[:2]
    print(f"gateway: http://{host}:{port}", flush=True)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE, proxy_headers=False, http=Protocol,
        ws="none",
    )  # fmt: skip
    settle_memory()
    with listener, contextlib.suppress(KeyboardInterrupt):  # it raises again what it has ended for
        uvicorn.Server(config).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
