"""A local stand-in for the hub: its interface for datasets and models, and the troubles that a network has."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee0000000000000000000000000000000001"


class HubServer:
    """Serves one dataset, or one model, at ``url`` (for HF_ENDPOINT) until ``close``.

    Attributes:
        asked: Requests as "METHOD path", counted.
        ranges: Range headers of downloads, in order.
        fail: Status to answer with, and how often, by a piece of the path.
        break_after: Bytes after which a download breaks off, by the times that it shall.
    """

    def __init__(self, name: str, files: Mapping[str, bytes], *, kind: str = "datasets") -> None:
        self.name, self.files, self.kind = name, dict(files), kind
        self.asked: Counter[str] = Counter()
        self.ranges: list[str | None] = []
        self.fail: dict[str, list[int]] = {}
        self.break_after: list[int] = []
        self.gated = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def do_POST(self) -> None:
                self.request_body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                hub._answer(self, body=True)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked[f"{request.command} {path}"] += 1
        trouble = next((statuses for piece, statuses in self.fail.items() if piece in path and statuses), None)
        if trouble:
            answer_json(request, {"error": "trouble"}, trouble.pop(0))
        elif self.gated and "resolve" in path and not path.endswith("README.md"):
            answer_json(request, {"error": "gated"}, 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif path.startswith(resolve := f"{self._root()}/{self.name}/resolve/"):
            name = path.removeprefix(resolve).partition("/")[2]
            if name in self.files:
                self._file(request, self.files[name], body=body)
            else:
                answer_json(request, {"error": "none"}, 404, {"X-Error-Code": "EntryNotFound"})
        elif (found := self._api(path, getattr(request, "request_body", b""))) is not None:
            answer_json(request, found)
        else:
            answer_json(request, {"error": "none"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _root(self) -> str:
        return "" if self.kind == "models" else f"/{self.kind}"

    def _api(self, path: str, body: bytes) -> object:
        api = f"/api/{self.kind}/{self.name}"
        if path == api or path.startswith(f"{api}/revision/"):
            return self._info()
        if path.startswith(f"{api}/tree/"):
            return [self._entry(name) for name in self.files]
        if path.startswith(f"{api}/paths-info/"):
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
            return [self._entry(name) for name in wanted if name in self.files]
        return None

    def _info(self) -> dict[str, object]:
        return {
            "id": self.name,
            "sha": COMMIT,
            "private": False,
            "gated": "manual" if self.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": name} for name in self.files],
        }

    def _entry(self, name: str) -> dict[str, object]:
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": _etag(self.files[name])}

    def _file(self, request: BaseHTTPRequestHandler, data: bytes, *, body: bool) -> None:
        asked = request.headers.get("Range") if body else None
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        if body:
            self.ranges.append(asked)
        part = data[start:]
        request.send_response(206 if asked else 200)
        request.send_header("ETag", f'"{_etag(data)}"')
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("Accept-Ranges", "bytes")
        request.send_header("Content-Length", str(len(part)))
        if asked:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        if not body:
            return
        if self.break_after and len(part) > self.break_after[0]:
            part = part[: self.break_after.pop(0)]
            request.wfile.write(part)
            request.wfile.flush()
            request.close_connection = True
            return
        request.wfile.write(part)


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


def answer_json(
    request: BaseHTTPRequestHandler, value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> None:
    """A whole answer of the hub."""
    data = json.dumps(value).encode()
    request.send_response(status)
    for name, text in (headers or {}).items():
        request.send_header(name, text)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data)
