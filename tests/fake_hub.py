"""A local HTTP server that stands for the Hugging Face hub: it takes repositories and commits, and keeps what was uploaded."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class Hub:
    """What the server was given.

    Attributes:
        address: Address of the server.
        repositories: What was asked for when a repository was created, by its name.
        files: Uploaded bytes by repository and path, of the last commit.
        tokens: Tokens that requests carried.
        refuse: Status that every request gets; 0 for none.
    """

    address: str = ""
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    files: dict[tuple[str, str], bytes] = field(default_factory=dict[tuple[str, str], bytes])
    tokens: set[str] = field(default_factory=set[str])
    refuse: int = 0
    stored: dict[str, bytes] = field(default_factory=dict[str, bytes])


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Runs the server for the length of a block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def answer(self, body: Any, status: int = 200) -> None:
            sent = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def content(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                found = b""
                while size := int(self.rfile.readline(), 16):
                    found += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return found
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_PUT(self) -> None:
            content = self.content()
            hub.stored[hashlib.sha256(content).hexdigest()] = content
            self.answer({})

        def do_GET(self) -> None:
            self.answer({"id": self.path, "siblings": []})

        def do_POST(self) -> None:
            content = self.content()
            hub.tokens.add(self.headers.get("Authorization") or "")
            if hub.refuse:
                self.answer({"error": "you may not"}, hub.refuse)
            elif self.path.startswith("/api/repos/create"):
                asked = json.loads(content)
                name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
                hub.repositories[name] = asked
                self.answer({"url": f"{hub.address}/{name}", "name": name})
            elif "/preupload/" in self.path:
                asked = [file["path"] for file in json.loads(content)["files"]]
                large = (".safetensors", ".gguf")
                modes = [
                    {"path": path, "uploadMode": "lfs" if path.endswith(large) else "regular", "shouldIgnore": False} for path in asked
                ]
                self.answer({"files": modes})
            elif self.path.endswith("/objects/batch"):
                objects = json.loads(content)["objects"]
                found = [
                    {"oid": entry["oid"], "size": entry["size"], "actions": {"upload": {"href": f"{hub.address}/blob"}}}
                    for entry in objects
                ]
                self.answer({"transfer": "basic", "objects": found})
            elif "/commit/" in self.path:
                name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
                for line in content.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        hub.files[name, entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                    elif entry["key"] == "lfsFile":
                        hub.files[name, entry["value"]["path"]] = hub.stored[entry["value"]["oid"]]
                self.answer({"success": True, "commitUrl": f"{hub.address}/{name}/commit/abc", "commitOid": "abc", "hookOutput": ""})
            else:
                self.answer({})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
