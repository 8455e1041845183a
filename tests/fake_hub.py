"""A hub on the loopback: repositories in memory, and as much of the protocol as an upload speaks."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_a_test"


@dataclass
class Hub:
    """What the hub holds, and what may go wrong with it.

    private   repository -> whether it is          branches  (repository, branch) -> file -> bytes
    commits   (repository, branch, message, files deleted)
    refuses   status that every request gets, or 0   spoils  what happens to large files on their way
    """

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    branches: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    commits: list[tuple[str, str, str, list[str]]] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    refuses: int = 0
    spoils: Callable[[bytes], bytes] = bytes

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object]:
        """(status, JSON) of one request."""
        parts = urlsplit(path).path.strip("/").split("/")
        if self.refuses:
            return self.refuses, {"error": "no"}
        if parts[0] == "large":
            self.large[parts[1]] = self.spoils(body)
            return 200, {}
        if parts[-1] == "batch":
            objects = json.loads(body)["objects"]
            return 200, {"objects": [{**one, "actions": {"upload": {"href": f"{self.url}/large/{one['oid']}"}}}
                                     for one in objects]}
        if parts[1:] == ["validate-yaml"]:
            return 200, {"warnings": [], "errors": []}
        if parts[1:] == ["repos", "create"]:
            return self._create(json.loads(body))
        if len(parts) < 4:
            return 404, {"error": "nothing here"}  # of what the client asks for itself
        name, rest = f"{parts[1]}/{parts[2]}/{parts[3]}", parts[4:]
        if name not in self.private:
            return 404, {"error": "no such repository"}
        return self._of(name, method, rest, body)

    def _create(self, asked: dict) -> tuple[int, object]:
        name = f"{asked.get('type') or 'model'}s/{asked.get('organization') or 'me'}/{asked['name']}"
        told = {"url": f"{self.url}/{name.removeprefix('models/')}"}
        if name in self.private:
            return 409, told
        self.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.branches[name, "main"] = {".gitattributes": b""}
        return 200, told

    def _of(self, name: str, method: str, rest: list[str], body: bytes) -> tuple[int, object]:
        if not rest:
            return 200, {"id": name.split("/", 1)[1], "private": self.private[name], "sha": "0" * 40, "siblings": []}
        word, branch = rest[0], unquote(rest[1])
        if word == "branch":
            self.branches.setdefault((name, branch), dict(self.branches[name, "main"]))
            return 200, {}
        files = self.branches[name, branch.partition("+")[0]]
        if word == "tree":
            return 200, [self._file(path, data) for path, data in files.items()]
        if word == "preupload":
            return 200, {"files": [{"path": one["path"], "shouldIgnore": False, "uploadMode":
                                    "lfs" if one["path"].endswith((".safetensors", ".jsonl")) else "regular"}
                                   for one in json.loads(body)["files"]]}
        if word == "paths-info":
            return 200, [self._file(path, files[path]) for path in parse_qs(body.decode())["paths"] if path in files]
        assert word == "commit", rest
        lines = [json.loads(line) for line in body.decode().splitlines()]
        gone = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        for line in lines:
            one = line["value"]
            if line["key"] == "file":
                files[one["path"]] = base64.b64decode(one["content"])
            elif line["key"] == "lfsFile":
                files[one["path"]] = self.large[one["oid"]]
        for path in gone:
            del files[path]
        self.commits.append((name, branch, lines[0]["value"]["summary"], gone))
        oid = f"{branch}+".ljust(40, "0")  # says its branch, which is all that is asked of it later
        return 200, {"commitOid": oid, "commitUrl": f"{self.url}/{name}/commit/{oid}", "success": True}

    @staticmethod
    def _file(path: str, data: bytes) -> dict:
        told = {"type": "file", "path": path, "size": len(data),
                "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        if path.endswith((".safetensors", ".jsonl")):
            told["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}
        return told


@contextmanager
def fake_hub(monkeypatch) -> Iterator[Hub]:
    """A hub that this process takes for the real one while the context lasts."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.requests.append(f"{self.command} {self.path}")
            if "/me/" in self.path and "/large/" not in self.path:
                hub.tokens.add(self.headers.get("Authorization"))
            status, told = hub.answer(self.command, self.path, body)
            data = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _any

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    for word, value in (("ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(constants, word, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        close_session()
