"""Serves the dashboard: `python -m dashboards`. Settings: DASHBOARD_PORT, PIPELINE_DASHBOARD_HOST, PIPELINE_TOKEN."""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys

import uvicorn

from pipeline.errors import ConfigurationError
from pipeline.settings import check_url, settings

from .app import create

__all__ = ["main"]

GRACE = 2
"""Seconds that requests under way have when it is told to stop; a look at a live channel takes 1.5."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        "python -m dashboards", description="Serve the live dashboard. Settings: DASHBOARD_PORT, PIPELINE_TOKEN."
    )
    parser.add_argument("--host", metavar="HOST", help="default: PIPELINE_DASHBOARD_HOST, or 127.0.0.1")
    parser.add_argument("--port", type=int, metavar="N", help="default: DASHBOARD_PORT, or 8050; 0 takes a free one")
    parser.add_argument("--url", metavar="URL", help="Redis (default: PIPELINE_REDIS_URL)")
    options = parser.parse_args(arguments)
    if options.url:
        try:
            check_url(options.url)
        except ValueError as error:
            parser.error(f"--url: {error}")
    try:
        config = settings()
        host = options.host or config.dashboard_host
        port = config.dashboard_port if options.port is None else options.port
        app = create(options.url)
    except ConfigurationError as error:
        print(f"dashboard: {error}", file=sys.stderr)
        return 1
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        # Not by errno, which is none of the system's when a name is not known.
        reason = str((isinstance(error, OSError) and error.strerror) or error).partition(" (while")[0]
        print(f"dashboard: cannot listen on {host}:{port}: {reason}; set DASHBOARD_PORT", file=sys.stderr)
        return 1
    print(f"dashboard: http://{host}:{listener.getsockname()[1]}", flush=True)
    with listener:
        server = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE)
        with contextlib.suppress(KeyboardInterrupt):  # it raises again what it has ended for
            uvicorn.Server(server).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
