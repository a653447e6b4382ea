"""Middleware: functions from handler to handler.

    def logged(handler):
        def call(event):            # around an async handler, too
            log.info("%s", event)
            return handler(event)
        return call

    app = Pipeline("monitoring", middleware=[logged])

The first in the list is the outermost. A middleware sees exactly what the handler is called with: the event, the
Message, or the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Handler", "Middleware", "wrap"]

Handler = Callable[[Any], Any]
Middleware = Callable[[Handler], Handler]


def wrap(handler: Handler, middleware: Sequence[Middleware]) -> Handler:
    for layer in reversed(middleware):
        handler = layer(handler)
    return handler
