"""A local stand-in for the hub's models: repositories that are made, written to and read, and a network's troubles.

It speaks what ``huggingface_hub`` does without its newer store (HF_HUB_DISABLE_XET=1): small files travel inside a
commit, large ones go to a store before it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from support.hub_server import answer_json

# The library hands files to its network library in a way that the latter has given up.
LIBRARY_WARNS = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN = "hf_" + "secretsecretsecret"
OWNER = "ann"
LARGE_BYTES = 10_000


@dataclass
class Repository:
    """Branches with their files and commits.

    Attributes:
        branches: Content of each file, by branch and path.
        commits: Titles, by branch, the newest last.
    """

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: dict[str, list[str]] = field(default_factory=lambda: {"main": ["initial commit"]})

    def branch_of(self, revision: str) -> str | None:
        """The branch of that name, or with that newest commit."""
        return next((each for each in self.branches if revision in (each, self.sha(each))), None)

    def sha(self, branch: str) -> str:
        told = json.dumps([branch, *self.commits[branch]])
        return hashlib.sha1(told.encode(), usedforsecurity=False).hexdigest()


class ModelHub:
    """Serves at ``url`` (for HF_ENDPOINT) until ``close``.

    Attributes:
        repositories: By ``OWNER/NAME``.
        asked: Requests as "METHOD path", counted.
        stored: Bytes of each large file that was sent, in order.
        tokens: What requests carried for a token.
        fail: Statuses to answer with instead, by a piece of "METHOD path".
        drop: How often a connection is closed without an answer, by a piece of "METHOD path".
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: Counter[str] = Counter()
        self.stored: list[int] = []
        self.tokens: set[str | None] = set()
        self.fail: dict[str, list[int]] = {}
        self.drop: dict[str, int] = {}
        self._store: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                hub._answer(self, b"")

            def do_POST(self) -> None:
                hub._answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

            do_HEAD = do_GET  # noqa: N815
            do_PUT = do_POST  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[repo].branches[branch]

    def _answer(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        path = unquote(urlsplit(request.path).path)
        asked = f"{request.command} {path}"
        self.asked[asked] += 1
        token = request.headers.get("Authorization")
        self.tokens.add(token)
        for piece in [piece for piece, times in self.drop.items() if piece in asked and times]:
            self.drop[piece] -= 1
            request.close_connection = True
            return
        trouble = next((statuses for piece, statuses in self.fail.items() if piece in asked and statuses), None)
        if trouble:
            answer_json(request, {"error": "no more room here"}, trouble.pop(0))
        elif asked.startswith("PUT /store/"):
            self.stored.append(len(body))
            self._store[path.removeprefix("/store/")] = body
            answer_json(request, {})
        elif token != f"Bearer {TOKEN}" and not (request.command in ("GET", "HEAD") and self._is_public(path)):
            answer_json(request, {"error": "who are you?"}, 401)
        else:
            self._known(request, path, body)

    def _is_public(self, path: str) -> bool:
        return any(f"/{name}" in path and not each.private for name, each in self.repositories.items())

    def _known(self, request: BaseHTTPRequestHandler, path: str, body: bytes) -> None:
        if path == "/api/whoami-v2":
            answer_json(request, {"type": "user", "name": OWNER})
        elif path == "/api/validate-yaml":
            good = json.loads(body)["content"].startswith("---\n")
            answer_json(request, {"errors": [], "warnings": []} if good else {"errors": [{"message": "no YAML"}]}, 200)
        elif path == "/verify":
            asked = json.loads(body)
            stored = self._store.get(asked["oid"], b"")
            whole = hashlib.sha256(stored).hexdigest() == asked["oid"] and len(stored) == asked["size"]
            answer_json(request, {} if whole else {"error": "not what was announced"}, 200 if whole else 422)
        elif path == "/api/repos/create":
            self._create(request, json.loads(body))
        else:
            name = next((each for each in self.repositories if f"/{each}" in path), None)
            if name is None:
                answer_json(request, {"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            elif path.startswith(f"/{name}.git/info/lfs"):
                answer_json(
                    request, {"transfer": "basic", "objects": [self._batch(o) for o in json.loads(body)["objects"]]}
                )
            elif path.startswith(f"/{name}/resolve/"):
                self._file(request, name, path)
            else:
                self._api(request, name, *path.removeprefix(f"/api/models/{name}").strip("/").partition("/")[::2], body)

    def _create(self, request: BaseHTTPRequestHandler, asked: Mapping[str, Any]) -> None:
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        url = {"url": f"{self.url}/{name}"}
        if name in self.repositories:
            answer_json(request, url | {"error": "You already created this model repo"}, 409)
        elif not name.startswith(f"{OWNER}/"):
            answer_json(request, {"error": "You don't have the rights to create a model under that namespace"}, 403)
        else:
            self.repositories[name] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
            answer_json(request, url)

    def _api(self, request: BaseHTTPRequestHandler, name: str, verb: str, rest: str, body: bytes) -> None:
        repo = self.repositories[name]
        branch = rest.partition("/")[0] or "main"
        if verb == "branch":
            new = branch not in repo.branches
            if new:
                repo.branches[branch] = dict(repo.branches["main"])
                repo.commits[branch] = list(repo.commits["main"])
            answer_json(request, {}, 200 if new else 409)
        elif (branch := repo.branch_of(branch)) is None:
            answer_json(request, {"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif verb in ("", "revision"):
            siblings = [{"rfilename": each} for each in repo.branches[branch]]
            about = {"id": name, "sha": repo.sha(branch), "private": repo.private, "siblings": siblings, "tags": []}
            answer_json(request, about | {"downloads": 0, "likes": 0, "gated": False, "disabled": False})
        elif verb == "tree":
            answer_json(request, [_entry(each, data) for each, data in repo.branches[branch].items()])
        elif verb == "paths-info":
            files, wanted = repo.branches[branch], parse_qs(body.decode()).get("paths", [])
            answer_json(request, [_entry(each, files[each]) for each in wanted if each in files])
        elif verb == "preupload":
            asked = json.loads(body)["files"]
            answer_json(request, {"files": [_upload_mode(file, repo.branches[branch]) for file in asked]})
        elif verb == "commit":
            self._commit(request, name, branch, [json.loads(line) for line in body.splitlines()])
        else:
            answer_json(request, {"error": "none"}, 404)

    def _batch(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        about = {"oid": asked["oid"], "size": asked["size"]}
        if asked["oid"] in self._store:
            return about
        actions = {"upload": {"href": f"{self.url}/store/{asked['oid']}"}, "verify": {"href": f"{self.url}/verify"}}
        return about | {"actions": actions}

    def _commit(self, request: BaseHTTPRequestHandler, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        repo = self.repositories[name]
        files = dict(repo.branches[branch])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self._store[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                repo.commits[branch].append(value["summary"])
        repo.branches[branch] = files
        sha = repo.sha(branch)
        answer_json(request, {"commitUrl": f"{self.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def _file(self, request: BaseHTTPRequestHandler, name: str, path: str) -> None:
        branch, _, file = path.removeprefix(f"/{name}/resolve/").partition("/")
        repo = self.repositories[name]
        branch = repo.branch_of(branch) or "main"
        data = repo.branches[branch].get(file)
        if data is None:
            answer_json(request, {"error": "none"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        asked = request.headers.get("Range")
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        request.send_response(206 if asked else 200)
        request.send_header("ETag", f'"{_blob_id(data)}"')
        request.send_header("X-Repo-Commit", repo.sha(branch))
        request.send_header("Content-Length", str(len(data) - start))
        if asked:
            request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(data[start:])


@contextmanager
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """A hub that the client of this process talks to, logged in and without pauses."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    hub = ModelHub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        hub.close()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    about = {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}
    if len(data) >= LARGE_BYTES:
        about["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return about


def _upload_mode(file: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    """How a file is to be sent, and the hash of the file that has its name now, as the hub knows that one."""
    mode = {"path": file["path"], "uploadMode": "lfs" if file["size"] >= LARGE_BYTES else "regular"}
    present = files.get(file["path"])
    if present is not None:
        entry = _entry(file["path"], present)
        mode["oid"] = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
    return {**mode, "shouldIgnore": False}


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
