"""A hub on the loopback: repositories in memory, and as much of the protocol as uploads and downloads speak."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of_a_test"


@dataclass
class Hub:
    """What the hub holds, and what may go wrong with it.

    private   repository -> whether it is          branches  (repository, branch) -> file -> bytes
    commits   (repository, branch, message, files deleted)
    refuses   status that every request gets, or 0   spoils  what happens to large files on their way up
    gated     repositories whose terms have to be accepted
    known     (repository, commit) -> files, of every commit that was ever asked for
    cuts      file -> numbers of bytes after which the connection ends, one for each time it is asked for
    holds     file -> (bytes after which it waits, the event that it waits for)
    sent      (file, first byte, bytes that went)
    deaf      whether it sends all of a file, whatever part of it is asked for
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
    gated: set[str] = field(default_factory=set)
    known: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    holds: dict[str, tuple[int, Event]] = field(default_factory=dict)
    sent: list[tuple[str, int, int]] = field(default_factory=list)
    deaf: bool = False

    def hold(self, name: str, files: Mapping[str, bytes], branch: str = "main", kind: str = "model") -> str:
        """Put files into a branch, which from then on has these alone; the commit that this makes."""
        repository = f"{kind}s/{name}"
        self.private.setdefault(repository, False)
        self.branches[repository, branch] = dict(files)
        return self.commit(repository, branch)

    def commit(self, repository: str, branch: str) -> str:
        """What a branch points to: a number that its files alone decide. A commit is itself."""
        if (repository, branch) in self.known:
            return branch
        files = self.branches[repository, branch]
        told = hashlib.sha1(repr([(name, self._file(name, data)["oid"]) for name, data in sorted(files.items())]
                                 ).encode()).hexdigest()
        self.known[repository, told] = dict(files)
        return told

    def whole(self, file: str) -> list[tuple[int, int]]:
        """(first byte, bytes) of every time that a file was sent."""
        return [(first, count) for name, first, count in self.sent if name == file]

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
            return 404, {"error": "no such repository", "X-Error-Code": "RepoNotFound"}
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
        if not rest or rest[0] == "revision":
            branch = unquote(rest[1]) if rest else "main"
            there = (name, branch) in self.branches or (name, branch) in self.known
            if rest and not there:
                return 404, {"error": "no such revision", "X-Error-Code": "RevisionNotFound"}
            return 200, {"id": name.split("/", 1)[1], "private": self.private[name], "siblings": [],
                         "sha": self.commit(name, branch) if there else "0" * 40,
                         "gated": "manual" if name in self.gated else False}
        if rest == ["auth-check"]:
            return (403, {"error": "gated", "X-Error-Code": "GatedRepo"}) if name in self.gated else (200, {})
        word, branch = rest[0], unquote(rest[1])
        if word == "branch":
            self.branches.setdefault((name, branch), dict(self.branches[name, "main"]))
            return 200, {}
        files = self.known.get((name, branch)) or self.branches[name, branch.partition("+")[0]]
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

    def download(self, method: str, path: str, first: int) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, bytes) of a file of a repository, from a certain byte on."""
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        kind = "datasets" if parts[0] == "datasets" else "models"
        name, rest = "/".join(parts[kind == "datasets":][:2]), parts[kind == "datasets":][3:]
        repository, revision, file = f"{kind}/{name}", rest[0], "/".join(rest[1:])
        if repository in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        data = self.known[repository, self.commit(repository, revision)][file]
        told = self._file(file, data)
        large = told.get("lfs", {"oid": ""})["oid"]
        headers = {"X-Repo-Commit": self.commit(repository, revision), "ETag": f'"{large or told["oid"]}"',
                   "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{large}"', "X-Linked-Size": str(len(data))}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        return 206 if first else 200, headers, data[first:]

    @staticmethod
    def _file(path: str, data: bytes) -> dict:
        told = {"type": "file", "path": path, "size": len(data),
                "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
        if path.endswith((".safetensors", ".jsonl", ".bin")):
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
            if "/resolve/" in self.path and not hub.refuses:
                self._send_file()
                return
            status, told = hub.answer(self.command, self.path, body)
            data = json.dumps(told).encode()
            self.send_response(status)
            if isinstance(told, dict) and "X-Error-Code" in told:
                self.send_header("X-Error-Code", told["X-Error-Code"])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data if self.command != "HEAD" else b"")

        def _send_file(self) -> None:
            asked = "" if hub.deaf else self.headers.get("Range") or ""
            first = int(asked.removeprefix("bytes=").partition("-")[0] or 0)
            status, headers, data = hub.download(self.command, self.path, first)
            file = unquote(urlsplit(self.path).path).partition("/resolve/")[2].partition("/")[2]
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "HEAD":
                return
            cut = hub.cuts[file].pop(0) if hub.cuts.get(file) else len(data)
            pause, until = hub.holds.get(file, (len(data), None))
            hub.sent.append((file, first, min(cut, len(data))))
            self.wfile.write(data[:min(cut, pause)])
            if until:
                until.wait()
            with suppress(OSError):  # whoever asked may be gone
                self.wfile.write(data[min(cut, pause):cut])
            self.close_connection = cut < len(data)

        do_GET = do_HEAD = do_POST = do_PUT = _any

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    for word, value in (("ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True),
                        ("HF_HUB_DOWNLOAD_TIMEOUT", 120),
                        ("HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")):
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
