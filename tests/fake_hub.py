"""A Hub of one process: what huggingface_hub's client asks of the real one to make, read and write a repository."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard

TOKEN = "hf_of_a_test"


@dataclass
class Repository:
    """A repository: its branches, each with files by name."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})


@dataclass
class FakeHub:
    """What it holds and what it was asked.

    Attributes:
        repositories: By ``owner/name``.
        asked: Method and path of every request.
        refuse: Status for every request whose path has the text.
        spoils: Names of files that it stores otherwise than they were sent.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    refuse: dict[str, int] = field(default_factory=dict)
    spoils: set[str] = field(default_factory=set)
    blobs: dict[str, bytes] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        return self.repositories[repo].branches[branch]


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def answer(self, value: Any = None, status: int = 200, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.handle_one()

    do_GET = do_POST = do_PUT = do_HEAD  # noqa: N815 - the names that the server looks for

    def handle_one(self) -> None:
        hub, path = self.hub, unquote(self.path.partition("?")[0])
        hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        for text, status in hub.refuse.items():
            if text in path:
                return self.answer({"error": "as the test says"}, status)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/lfs-blobs/" not in path:
            return self.answer({"error": "Invalid credentials"}, 401)
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, path):
                return getattr(self, method)(body, *found.groups())
        return self.answer({"error": f"nothing at {path}"}, 404)

    def missing(self) -> None:
        self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

    def info(self, _: bytes, repo: str, revision: str | None = None) -> None:
        found = self.hub.repositories.get(repo)
        if found is None:
            return self.missing()
        return self.answer(
            {"id": repo, "private": found.private, "sha": "0" * 40, "siblings": [], "tags": []}
        )

    def validate(self, body: bytes) -> None:
        """Refuse metadata that the Hub refuses: it wants ids of the Hub."""
        data = ModelCard(json.loads(body)["content"]).data.to_dict()
        names = [data.get("base_model") or "a/b", *(data.get("datasets") or [])]
        wrong = [name for name in names if not re.fullmatch(r"[\w.-]+/[\w.-]+", name)]
        self.answer(
            {"errors": [{"message": f"{name} is not an id"} for name in wrong], "warnings": []},
            400 if wrong else 200,
        )

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        private = bool(asked.get("private") or asked.get("visibility") == "private")
        self.hub.repositories.setdefault(repo, Repository(private))
        self.answer({"url": f"{self.hub.url}/{repo}"})

    def branch(self, _: bytes, repo: str, name: str) -> None:
        branches = self.hub.repositories[repo].branches
        branches.setdefault(name, dict(branches["main"]))
        self.answer({})

    def resolve(self, _: bytes, repo: str, revision: str, name: str) -> None:
        content = self.hub.repositories[repo].branches.get(revision, {}).get(name)
        if content is None:
            return self.answer(b"", 404, X_Error_Code="EntryNotFound")
        return self.answer(content, ETag=f'"{git_blob(content)}"', X_Repo_Commit="0" * 40)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer({"files": modes})

    def batch(self, body: bytes, repo: str) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs-blobs/{one['oid']}"}}}
            for one in json.loads(body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def put_blob(self, body: bytes, oid: str) -> None:
        self.hub.blobs[oid] = body
        self.answer({})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        files = self.hub.repositories[repo].branches[revision]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        for name in self.hub.spoils & files.keys():
            files[name] += b"!"
        oid = hashlib.sha1(body).hexdigest()
        self.hub.commits[oid] = dict(files)
        url = f"{self.hub.url}/{repo}/commit/{oid}"
        self.answer({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def paths_info(self, body: bytes, repo: str, revision: str) -> None:
        files = self.hub.commits.get(revision) or self.hub.repositories[repo].branches.get(revision, {})
        found = []
        for name in parse_qs(body.decode())["paths"]:
            if name not in files:
                continue
            content = files[name]
            entry: dict[str, Any] = {
                "type": "file",
                "path": name,
                "size": len(content),
                "oid": git_blob(content),
            }
            if name.endswith((".safetensors", ".gguf")):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            found.append(entry)
        self.answer(found)


REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    (rf"/api/models/{REPO}", "info"),
    (rf"/api/models/{REPO}/revision/([^/]+)", "info"),
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "validate"),
    (rf"/api/models/{REPO}/branch/(.+)", "branch"),
    (rf"/api/models/{REPO}/preupload/(.+)", "preupload"),
    (rf"/api/models/{REPO}/commit/(.+)", "commit"),
    (rf"/api/models/{REPO}/paths-info/(.+)", "paths_info"),
    (rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
    (r"/lfs-blobs/(\w+)", "put_blob"),
    (rf"/{REPO}/resolve/([^/]+)/(.+)", "resolve"),
)


@contextlib.contextmanager
def fake_hub(patch: pytest.MonkeyPatch, token: str | None = TOKEN) -> Iterator[FakeHub]:
    """Start one, and let huggingface_hub's client find it and the token."""
    hub = FakeHub()
    handler = type("OneHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    for name, value in (
        ("ENDPOINT", hub.url),
        ("HF_HUB_OFFLINE", False),
        ("HF_HUB_DISABLE_XET", True),
        ("HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"),
    ):
        patch.setattr(huggingface_hub.constants, name, value)
    patch.setattr(huggingface_hub, "get_token", lambda: token)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
