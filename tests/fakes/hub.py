"""A small hub on loopback that speaks the part of the Hugging Face protocol that downloads use.

It has commits, branches, gated repositories and a token; it answers range requests, can cut a connection in the middle
of a file, and keeps a list of every request it saw. What it does not have: LFS redirects, xet, pagination.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal
from urllib.parse import unquote, urlsplit

Kind = Literal["models", "datasets"]


@dataclass
class FakeRepository:
    """``commits``: sha -> files; ``branches``: name -> sha; ``token``: who may read it, None: everybody."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None


@dataclass(frozen=True)
class SeenRequest:
    method: str
    path: str
    range: str | None
    user_agent: str


class FakeHub:
    """``with FakeHub() as hub: hub.push("owner/name", {...})``; clients find it at ``hub.endpoint``."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[Kind, str], FakeRepository] = {}
        self.requests: list[SeenRequest] = []
        self.failing_status: int | None = None
        self._cuts: dict[str, int] = {}
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def push(self, name: str, files: Mapping[str, bytes], *, kind: Kind = "models", branch: str = "main") -> str:
        """Commit ``files`` as the whole content of ``branch``; returns the commit."""
        repository = self.repositories.setdefault((kind, name), FakeRepository())
        digest = hashlib.sha1(f"{len(repository.commits)}".encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        commit = digest.hexdigest()
        repository.commits[commit] = dict(files)
        repository.branches[branch] = commit
        return commit

    def gate(self, name: str, token: str, *, kind: Kind = "models") -> None:
        """From now on only ``token`` may read the repository."""
        self.repositories[kind, name].token = token

    def cut_once(self, filename: str, after_bytes: int) -> None:
        """Drop the connection once, after so many bytes of ``filename``."""
        self._cuts[filename] = after_bytes

    def take_cut(self, filename: str) -> int | None:
        return self._cuts.pop(filename, None)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"
    _API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree)/([^/]+)(?:/.*)?")
    _FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests' output clean."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        seen = SeenRequest(self.command, path, self.headers.get("Range"), self.headers.get("User-Agent", ""))
        self.hub.requests.append(seen)
        if self.hub.failing_status:
            self._send(self.hub.failing_status)
        elif match := self._API.fullmatch(path):
            kind, name, verb, revision = match.groups()
            found = self._find("models" if kind == "models" else "datasets", name, revision)
            if found:
                commit, files = found
                self._send_json(_info(name, commit, files) if verb == "revision" else _tree(files))
        elif match := self._FILE.fullmatch(path):
            prefix, name, revision, filename = match.groups()
            found = self._find("datasets" if prefix else "models", name, revision)
            if found:
                commit, files = found
                self._send_file(commit, filename, files.get(filename))
        else:
            self._send(404)

    def _find(self, kind: Kind, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and its files; otherwise the error is sent and None returned."""
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            return self._send(404, {"X-Error-Code": "RepoNotFound"})
        if repository.token and self.headers.get("Authorization") != f"Bearer {repository.token}":
            return self._send(403 if self.headers.get("Authorization") else 401, {"X-Error-Code": "GatedRepo"})
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        return commit, repository.commits[commit]

    def _send_file(self, commit: str, filename: str, content: bytes | None) -> None:
        if content is None:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        start = 0
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        if match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(match[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        cut = self.hub.take_cut(filename) if self.command == "GET" else None
        self._send(206 if start else 200, headers, body, cut=cut)
        return None

    def _send_json(self, value: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(
        self, status: int, headers: Mapping[str, str] | None = None, body: bytes = b"", *, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


def _info(name: str, commit: str, files: Mapping[str, bytes]) -> dict[str, object]:
    return {"id": name, "sha": commit, "private": False, "siblings": [{"rfilename": path} for path in files]}


def _tree(files: Mapping[str, bytes]) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        for path, content in files.items()
    ]
