"""The studio on a port of this machine: HTTP around :class:`~regraft.studio.answers.Studio`, by the standard library."""

from __future__ import annotations

import errno
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from regraft.errors import InputError
from regraft.studio.answers import Response, Studio, as_json
from regraft.studio.guard import Request
from regraft.studio.jobs import Jobs

HOST = "127.0.0.1"
LARGEST_BODY_BYTES = 1 << 20
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class StudioServer(ThreadingHTTPServer):
    """The server of one studio.

    Args:
        port: Port on 127.0.0.1; 0 for a free one.
        studio: What answers.
    """

    daemon_threads = True
    # On Windows the option would let two programs have one port.
    allow_reuse_address = os.name == "posix"

    def __init__(self, port: int, studio: Studio) -> None:
        self.studio = studio
        super().__init__((HOST, port), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of a page that was closed before its answer; everything else is shown as usual."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # pyright: ignore[reportArgumentType]

    @property
    def address(self) -> str:
        """The address to open, with the token."""
        return f"http://{HOST}:{self.server_address[1]}/?token={self.studio.token}"


class _Handler(BaseHTTPRequestHandler):
    """Reads one request and writes one answer."""

    server: StudioServer  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = 30  # seconds that a connection may be silent
    server_version = "regraft"
    sys_version = ""

    def do_GET(self) -> None:
        """Answers with what is there."""
        self._send(self.server.studio.answer(self._request(b"")))

    def do_POST(self) -> None:
        """Does something and answers with what came of it."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit() and int(length[:12]) <= LARGEST_BODY_BYTES):
            self._send(as_json({"error": f"the request is larger than {LARGEST_BODY_BYTES:,} bytes"}, 413))
            return
        self._send(self.server.studio.answer(self._request(self.rfile.read(int(length)))))

    def _request(self, body: bytes) -> Request:
        return Request(self.command, self.path, {name.lower(): value for name, value in self.headers.items()}, body)

    def _send(self, response: Response) -> None:
        self.send_response(response.status)
        for name, value in {**_HEADERS, **response.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", response.kind)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        self.wfile.write(response.body)

    def log_message(self, format: str, *args: object) -> None:
        """Writes no line for a request: the page asks every second."""


@contextmanager
def serving(runs: Path, port: int) -> Iterator[StudioServer]:
    """Opens a studio on a port; at the end its jobs are stopped.

    Args:
        runs: Folder of the runs.
        port: Port on 127.0.0.1; 0 for a free one.

    Raises:
        InputError: The port is in use or cannot be had.
    """
    with tempfile.TemporaryDirectory(prefix="regraft-studio-", ignore_cleanup_errors=True) as folder:
        studio = Studio(runs, Jobs(Path(folder)), secrets.token_urlsafe(24))
        try:
            server = StudioServer(port, studio)
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be had: {error.strerror}"
            raise InputError(f"port {port} {why}; give another `port`, or `port=0` for a free one") from None
        try:
            yield server
        finally:
            server.server_close()
            studio.jobs.stop_all()
