"""A model hub on this machine, with the routes that `huggingface_hub` asks for a download."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHUNK = 16 * 1024


@dataclass
class Hub:
    """A hub with one public model, `org/model`. Every other model is missing, or gated."""

    folder: Path
    """The files of the model."""
    url: str = ""
    flows: threading.Event = field(default_factory=threading.Event)
    """While it is not set, weights stop after their first bytes, and the connection stays open."""
    served: list[str] = field(default_factory=list)
    """The names of the files that were asked for."""

    @property
    def revision(self) -> str:
        return hashlib.sha1(str(self.folder).encode(), usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self._file(send=False)

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/org/model"):
            names = sorted(path.name for path in self.hub.folder.iterdir())
            info = {"id": "org/model", "sha": self.hub.revision, "siblings": [{"rfilename": name} for name in names]}
            tree = [{"type": "file", "path": name, "size": 1, "oid": "x"} for name in names]
            self._json(200, tree if "/tree/" in self.path else info)
        elif self.path.startswith("/api/models/"):
            self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            self._file(send=True)

    def _json(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _file(self, *, send: bool) -> None:
        path = self.hub.folder / self.path.rpartition("/")[2]
        if not path.is_file():
            self._json(404, {"error": "not found"})
            return
        content = path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.hub.revision)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not send:
            return
        self.hub.served.append(path.name)
        with suppress(ConnectionError):  # the client was killed
            for begin in range(start, len(content), CHUNK):
                self.wfile.write(content[begin : begin + CHUNK])
                if path.suffix == ".safetensors":
                    self.hub.flows.wait()


@contextmanager
def hub(folder: Path) -> Iterator[Hub]:
    """Serve the model in `folder` as `org/model`."""
    served = Hub(folder)
    served.flows.set()
    handler = type("Handler", (_Handler,), {"hub": served})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        served.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield served
        finally:
            served.flows.set()
            server.shutdown()
