"""The HTTP server: uvicorn's, in which predictions take the short way, and clients that trickle hold nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, parse_url
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from .digits import PATH as DIGITS
from .digits import DigitPrediction
from .predictions import Headers, Prediction, Wanted

__all__ = ["Protocol"]


@dataclass(frozen=True, slots=True)
class _Head:
    """Of a prediction."""

    text: bytes
    size: int
    """With its body."""
    path: str
    query: bytes
    headers: Headers
    wanted: Wanted


class Protocol(HttpToolsProtocol):
    """One connection. `app` is a `publishers.gateway.app.Front`."""

    app: Any
    cycle: Any
    """Whose head came last…"""
    _current: Any = None
    """…and what is being answered, which may have come before it."""
    _since = 0.0
    """Loop time since which a head is awaited…"""
    _awaits = ""
    """"head": its first byte came, or the connection is new · "next": it may stay idle a while · "": no head."""
    _open = 0
    """Messages whose head has begun, less those that are complete: 0 between two of them."""
    _known: _Head | None = None
    """Of the prediction before: a client's heads are alike, and are not parsed again."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await("head")
        self.app.patrol.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.app.patrol.discard(self)
        for cycle in (self._current, *(cycle for cycle, _ in self.pipeline)):
            if isinstance(cycle, Prediction):
                cycle.gone()
            elif cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    # -- what is asked -------------------------------------------------------------------------------------------

    def data_received(self, data: Any) -> None:
        """As uvicorn's, except that parsing is left out where a prediction comes with the head of the one before."""
        self._unset_keepalive_if_required()
        between, known = self._open == 0, self._known
        if known is not None and between and len(data) == known.size and data.startswith(known.text) and self._idle():
            self._predict(known, data[len(known.text) :])
            return
        self._parse(data)
        if between and self._open == 0:
            self._remember(data)

    def _idle(self) -> bool:
        return self._current.response_complete and not self.pipeline

    def _parse(self, data: Any) -> None:
        """An upgrade (curl's and Java's to HTTP/2, a WebSocket) is declined by answering what was asked. The parser
        takes what follows such a head for another protocol, and a body is not to be executed."""
        try:
            while True:
                try:
                    self.parser.feed_data(data)
                    return
                except HttpParserUpgrade as upgrade:
                    data = memoryview(data)[upgrade.args[0] :]
                    self._begin_again()
        except HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")

    def _begin_again(self) -> None:
        """Read the same head without its upgrade, so that a body may follow. Raises HttpParserError."""
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            raise HttpParserError("this is no proxy")
        lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self._open -= 1
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))

    def _remember(self, data: bytes) -> None:
        """The head of a prediction that came whole, alone, with its body, and was let in: nobody objects to it."""
        cycle = self.cycle
        if not isinstance(cycle, Prediction) or cycle.wanted is None or not cycle.keep_alive:
            return
        text = data[: data.find(b"\r\n\r\n") + 4]
        names = [name for name, _ in self.headers]
        if (
            data.startswith(b"POST ")
            and len(text) + cycle.wanted.length == len(data)
            and names.count(b"content-length") == 1
            and not {b"transfer-encoding", b"expect", b"upgrade"}.intersection(names)
        ):
            self._known = _Head(text, len(data), *_split(self.url), self.headers, cycle.wanted)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._open += 1
        if self._awaits != "head":
            self._await("head")

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._awaits = ""
        path, query = _split(self.url)
        model = self.app.models.route(path)
        if model is None:
            super().on_headers_complete()
            return
        parser, before = self.parser, self.cycle
        keep_alive = parser.should_keep_alive() and parser.get_http_version() != "1.0"
        self.cycle = cycle = self._kind(path, model)(
            self, self.app.models, model, parser.get_method(), query, self.headers, keep_alive=keep_alive
        )
        cycle.objection = self.app.guard.objection(path, self.headers)
        if before is None or before.response_complete:
            self._current = cycle
            cycle.start()
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))  # type: ignore[arg-type]  # it is started below

    def _kind(self, path: str, model: str) -> type[Prediction]:
        return DigitPrediction if path == DIGITS and model not in self.app.models.statuses else Prediction

    def _predict(self, head: _Head, body: bytes) -> None:
        """As if it had been parsed."""
        self._awaits = ""
        model = self.app.models.route(head.path)
        self.cycle = self._current = cycle = self._kind(head.path, model)(
            self, self.app.models, model, b"POST", head.query, head.headers, keep_alive=True
        )
        cycle.wanted = head.wanted
        cycle.start()
        cycle.feed(body)
        cycle.complete()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._current = cycle
        if isinstance(cycle, Prediction):
            cycle.start()
        else:
            super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        if isinstance(self.cycle, Prediction):
            self.cycle.feed(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._open -= 1
        if isinstance(self.cycle, Prediction):
            self.cycle.complete()
        else:
            super().on_message_complete()

    # -- what is answered (predictions.Connection) ---------------------------------------------------------------

    def proceed(self) -> None:
        self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def respond(self, status: int, headers: Headers, body: bytes, *, keep_alive: bool) -> None:
        if self.transport.is_closing():
            return
        lines = [STATUS_LINE[status], b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)]
        for name, value in self.server_state.default_headers:
            lines += (name, b": ", value, b"\r\n")
        for name, value in headers:
            lines += (name, b": ", value, b"\r\n")
        lines += (b"\r\n" if keep_alive else b"connection: close\r\n\r\n", body)
        self.transport.write(b"".join(lines))
        if not keep_alive:
            self.transport.close()
        elif self.pipeline:
            self.on_response_complete()
        else:
            self.server_state.total_requests += 1
            self.flow.resume_reading()
            self._await("next")

    # -- patience ------------------------------------------------------------------------------------------------

    def _await(self, what: str) -> None:
        self._awaits = what
        self._since = self.loop.time()

    def look(self, now: float, patience: float) -> None:
        """Give up what takes too long."""
        if isinstance(self._current, Prediction):
            self._current.look(patience)
        waited = now - self._since
        if self._awaits == "head" and waited > patience:
            self._give_up()
        elif self._awaits == "next" and waited > self.timeout_keep_alive:
            self.transport.close()

    def _give_up(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            body = b'{"success":false,"error":"the request came too slowly"}'
            head = b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
            self.transport.close()


def _split(url: bytes) -> tuple[str, bytes]:
    """Path and query."""
    if not url.startswith(b"/"):
        parsed = parse_url(url)
        path, query = parsed.path or b"/", parsed.query or b""
    else:
        path, _, query = url.partition(b"?")
    text = path.decode("latin-1")
    return unquote(text) if "%" in text else text, query
