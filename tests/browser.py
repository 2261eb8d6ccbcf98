"""A page in headless Chromium, where it is installed (Debian's package ``chromium``)."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; Debian's package: apt install chromium")

_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=8000", "--enable-logging=stderr"),
)


def opened(page: Path, *flags: str) -> tuple[str, list[str]]:
    """Opens a page.

    Args:
        page: An HTML file.
        flags: More flags; ``--screenshot=FILE`` makes a picture.

    Returns:
        What the page has become after its scripts ran, and what it wrote to the console.
    """
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(prefix="regraft-chromium-") as profile:
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "--dump-dom", *flags, page.resolve().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


class Tab:
    """A page that stays open and does what a test says, by Chromium's own protocol over a pipe; a context manager.

    Args:
        address: Address of the page.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._asked = 0
        self._rest = b""
        self.console: list[str] = []

    def __enter__(self) -> Self:
        assert CHROMIUM is not None
        self._profile = tempfile.TemporaryDirectory(prefix="regraft-chromium-", ignore_cleanup_errors=True)
        to_it, from_it = os.pipe(), os.pipe()
        self._write, self._read = to_it[1], from_it[0]
        theirs = [fcntl.fcntl(handle, fcntl.F_DUPFD, 30) for handle in (to_it[0], from_it[1])]

        def numbered() -> None:
            os.dup2(theirs[0], 3)
            os.dup2(theirs[1], 4)

        flags = [flag for flag in _FLAGS if not flag.startswith(("--virtual-time", "--enable-logging"))]
        command = [CHROMIUM, *flags, "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}"]
        self._process = subprocess.Popen(
            command, preexec_fn=numbered, pass_fds=(3, 4), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for handle in (to_it[0], from_it[1], *theirs):
            os.close(handle)
        self._session = ""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._ask("Runtime.enable")
        self._ask("Log.enable")
        self._ask("Page.enable")
        self._ask("Page.navigate", url=self._address)
        return self

    def __exit__(self, *about: object) -> None:
        os.close(self._write)
        self._process.kill()
        self._process.wait(30)
        os.close(self._read)
        self._profile.cleanup()

    def run(self, expression: str) -> Any:
        """Returns what an expression of JavaScript gives, as plain JSON types."""
        found = self._ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 30.0) -> Any:
        """Waits until an expression gives something that is true, and returns it."""
        deadline = time.monotonic() + seconds
        while not (found := self.run(f"(found => found instanceof Node ? true : found)({expression})")):
            assert time.monotonic() < deadline, f"not within {seconds} s: {expression}; the page: {self.run('document.body.innerText')}"
            time.sleep(0.2)
        return found

    def picture(self, file: Path, width: int) -> None:
        """Writes a picture of the whole page at a width in pixels."""
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500)
        found = self._ask("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(found["data"]))

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._asked += 1
        request: dict[str, Any] = {"id": self._asked, "method": method, "params": parameters}
        if self._session:
            request["sessionId"] = self._session
        os.write(self._write, json.dumps(request).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == self._asked:
                assert "error" not in message, message
                return message["result"]
            match message:
                case {"method": "Runtime.exceptionThrown" | "Runtime.consoleAPICalled" | "Log.entryAdded", "params": said}:
                    self.console.append(json.dumps(said))
                case _:
                    pass

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            piece = os.read(self._read, 1 << 16)
            assert piece, "Chromium has ended"
            self._rest += piece
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)
