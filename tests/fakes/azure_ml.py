"""A stand-in for Azure ML: the parts of its REST API and of blob storage that the official client uses to run a job.

Resources are kept as they were put and given back with an id. A pipeline job that is put is really run: each step's
command in a shell, in a folder of its own, with inputs and outputs filled in as Azure ML fills them in.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

ACCOUNT, CONTAINER = "account", "container"
PLACE = ("subscription", "group", "workspace")
STAMP = "Mon, 23 Nov 2026 10:00:00 GMT"


class AzureML:
    """Use as a context manager; ``url`` is where it listens. ``requests``: what was asked, as ``"PUT /path"``."""

    def __init__(self, folder: Path, *, fail_stage: str | None = None, refuse: int | None = None) -> None:
        self.folder, self.fail_stage, self.refuse = folder, fail_stage, refuse
        self.resources: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []
        self.commands: list[str] = []
        self.steps: dict[str, str] = {}
        self.job: dict[str, Any] | None = None
        self.jobs_taken = 0
        self.unknown: list[str] = []
        self.log = ""
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"azure": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.runner: threading.Thread | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> AzureML:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        if self.runner is not None:
            self.runner.join(60)

    # --- resources ----------------------------------------------------------------------------------------------

    def put(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        resource = {**body, "id": path, "name": path.rsplit("/", 1)[-1], "type": "resource"}
        resource["systemData"] = {"createdAt": "2026-11-23T10:00:00Z", "createdBy": "somebody"}
        if "/jobs/" in path:
            self.take_job(resource)
        self.resources[path.lower()] = resource
        return resource

    def get(self, path: str) -> dict[str, Any] | None:
        if path.lower().endswith(f"/workspaces/{PLACE[2]}"):
            return {
                "id": path,
                "name": PLACE[2],
                "location": "nowhere",
                "properties": {"workspaceId": "w", "discoveryUrl": f"{self.url}/discovery"},
            }
        if "/datastores/" in path:
            return self.datastore(path)
        return self.resources.get(path.lower())

    def datastore(self, path: str) -> dict[str, Any]:
        return {
            "id": path,
            "name": "workspaceblobstore",
            "properties": {
                "datastoreType": "AzureBlob",
                "accountName": ACCOUNT,
                "containerName": CONTAINER,
                "endpoint": "core.windows.net",
                "protocol": "https",
                "isDefault": True,
                "credentials": {"credentialsType": "AccountKey"},
            },
        }

    # --- jobs ---------------------------------------------------------------------------------------------------

    def take_job(self, resource: dict[str, Any]) -> None:
        self.jobs_taken += 1
        self.job = resource
        properties = resource["properties"]
        properties["status"] = "Running"
        self.steps = dict.fromkeys(properties["jobs"], "NotStarted")
        self.runner = threading.Thread(target=self._run, args=(properties,), daemon=True)
        self.runner.start()

    def _run(self, properties: dict[str, Any]) -> None:
        stores: dict[str, Path] = {}
        outputs = self.folder / "blobs" / "azureml" / self.job["name"] if self.job else self.folder
        result = outputs / "result"
        for name, step in properties["jobs"].items():
            with self.lock:
                self.steps[name] = "Running"
            work = self.folder / "steps" / f"{self.jobs_taken}-{name}"
            work.mkdir(parents=True)
            last = name == list(properties["jobs"])[-1]
            stores[name] = outputs / "store" if last else work / "outputs"
            for place in (stores[name], result):
                place.mkdir(parents=True, exist_ok=True)
            fill = {"outputs.store": str(stores[name]), "outputs.result": str(result)}
            for key, given in step["inputs"].items():
                fill[f"inputs.{key}"] = str(self._input(given, properties, stores))
            command = re.sub(r"\$\{\{(.*?)\}\}", lambda found, fill=fill: fill[found[1].strip()], self._command(step))
            self.commands.append(command)
            if name == self.fail_stage:
                command = "exit 1"
            bin_folder = self.folder / "bin"
            environment = {
                **os.environ,
                "PATH": f"{bin_folder}:{os.environ['PATH']}",
                "PYTHONPATH": os.pathsep.join(sys.path),
            }
            done = subprocess.run(
                ["bash", "-c", command], cwd=work, env=environment, capture_output=True, text=True, check=False
            )
            self.log += f"--- {name}: {done.returncode}\n{done.stdout}\n{done.stderr}\n"
            with self.lock:
                self.steps[name] = "Failed" if done.returncode else "Completed"
            if done.returncode:
                properties["status"] = "Failed"
                return
        properties["status"] = "Completed"

    def _command(self, step: dict[str, Any]) -> str:
        component = self.resources[urlsplit(step["componentId"]).path.lower()]
        return str(component["properties"]["componentSpec"]["command"])

    def _input(self, given: dict[str, Any], properties: dict[str, Any], stores: dict[str, Path]) -> Path:
        told = given.get("value", given.get("uri"))
        if found := re.fullmatch(r"\$\{\{parent\.jobs\.(\w+)\.outputs\.store\}\}", told):
            return stores[found[1]]
        if found := re.fullmatch(r"\$\{\{parent\.inputs\.(\w+)\}\}", told):
            return self._input(properties["inputs"][found[1]], properties, stores)
        if "/data/" in told and "/versions/" in told:
            told = self.resources[urlsplit(told).path.lower()]["properties"]["dataUri"]
        return self.folder / "blobs" / told.partition("/paths/")[2]

    def children(self) -> list[dict[str, Any]]:
        return [
            {
                "runId": f"child-{name}",
                "displayName": name,
                "status": status,
                "properties": {},
                "tags": {},
                "runType": "x",
            }
            for name, status in self.steps.items()
        ]


class _Handler(BaseHTTPRequestHandler):
    azure: AzureML
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PATCH(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), {key: value[0] for key, value in parse_qs(parts.query, True).items()}
        path = path.replace("//", "/")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        with self.azure.lock:
            self.azure.requests.append(f"{self.command} {path}")
            if path.startswith(f"/{ACCOUNT}"):
                self.blob(path.removeprefix(f"/{ACCOUNT}").removeprefix(f"/{CONTAINER}").lstrip("/"), query, body)
            elif self.azure.refuse is not None:
                self.send({"error": {"code": "Refused", "message": "not for you"}}, self.azure.refuse)
            else:
                self.arm(path, query, json.loads(body) if body else {})

    # --- the resource manager -----------------------------------------------------------------------------------

    def arm(self, path: str, query: dict[str, str], body: dict[str, Any]) -> None:
        azure = self.azure
        if self.command == "PUT":
            self.send(azure.put(path, body), 201)
        elif self.command == "POST" and path.endswith("/listSecrets"):
            key = base64.b64encode(b"key").decode()
            self.send({"secretsType": "AccountKey", "key": key})
        elif self.command == "GET" and path.endswith("/datastores"):
            self.send({"value": [azure.datastore(f"{path}/workspaceblobstore")]})
        elif path == "/discovery":
            self.send({"api": azure.url, "history": azure.url, "studio": azure.url})
        elif self.command == "GET" and path.endswith("/children"):
            self.send({"value": azure.children()})
        elif self.command == "POST" and path.endswith("/rundata"):
            self.send({"runMetadata": {"runId": body.get("runId"), "outputs": {}}})
        elif self.command == "GET" and (found := azure.get(path)) is not None:
            self.send(found)
        elif self.command == "GET" and path.endswith("/versions"):
            self.send({"value": []})
        else:
            if self.command != "GET":
                azure.unknown.append(f"{self.command} {path}")
            self.send({"error": {"code": "ResourceNotFound", "message": f"{self.command} {path}"}}, 404)

    def send(self, content: Any, status: int = 200) -> None:
        self.reply(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def reply(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # --- blobs --------------------------------------------------------------------------------------------------

    def blob(self, name: str, query: dict[str, str], body: bytes) -> None:
        root = self.azure.folder / "blobs"
        file, told = root / name, self.azure.folder / "blob_metadata" / f"{name}.json"
        headers = {"ETag": '"1"', "Last-Modified": STAMP, "x-ms-blob-type": "BlockBlob", "x-ms-request-id": "1"}
        if self.command == "PUT" and query.get("comp") == "metadata":
            told.parent.mkdir(parents=True, exist_ok=True)
            told.write_text(json.dumps({k: v for k, v in self.headers.items() if k.lower().startswith("x-ms-meta-")}))
            self.reply(b"", 200, headers)
        elif self.command == "PUT" and not query.get("comp"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(body)
            self.reply(b"", 201, headers)
        elif self.command == "GET" and query.get("comp") == "list":
            self.reply(_listing(root, query.get("prefix", "")), 200, {"Content-Type": "application/xml"})
        elif query.get("restype") == "container":
            self.reply(b"", 200, headers)
        elif self.command in {"GET", "HEAD"} and file.is_file():
            content = file.read_bytes()
            headers |= json.loads(told.read_text()) if told.exists() else {}
            wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("x-ms-range") or self.headers.get("Range") or "")
            if wanted and content:
                start, end = int(wanted[1]), min(int(wanted[2]), len(content) - 1)
                headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
                self.reply(content[start : end + 1], 206, headers)
            elif self.command == "HEAD":
                self.send_response(200)
                for key, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
            elif wanted:
                self.reply(b"", 416, {"x-ms-error-code": "InvalidRange", **headers})
            else:
                self.reply(content, 200, headers)
        else:
            self.reply(b"", 404, {"x-ms-error-code": "BlobNotFound"})


def _listing(root: Path, prefix: str) -> bytes:
    blobs = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and name.startswith(prefix):
            digest = base64.b64encode(hashlib.md5(path.read_bytes()).digest()).decode()
            blobs.append(
                f"<Blob><Name>{escape(name)}</Name><Properties><Last-Modified>{STAMP}</Last-Modified><Etag>1</Etag>"
                f"<Content-Length>{path.stat().st_size}</Content-Length><Content-MD5>{digest}</Content-MD5>"
                "<BlobType>BlockBlob</BlobType></Properties></Blob>"
            )
    head = '<?xml version="1.0" encoding="utf-8"?>'
    return f"{head}<EnumerationResults><Blobs>{''.join(blobs)}</Blobs><NextMarker/></EnumerationResults>".encode()


def write_command(folder: Path) -> None:
    """``slmops`` for the steps of a job: this interpreter's, told nothing of the stand-in."""
    path = folder / "bin" / "slmops"
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m slmops "$@"\n')
    path.chmod(0o755)
    assert shutil.which("bash")
