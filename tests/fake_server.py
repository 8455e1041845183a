"""A server of one source for tests: glue's /v1/score, and /v1/completions as OpenAI and vLLM answer it.

It is a function from requests to responses, which httpx takes for a transport, and it can stand behind a real socket.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

from glue.kinds import wire
from glue.kinds.local_source import Local


@dataclass
class FakeServer:
    """Answers requests out of a source that is here.

    glue     whether it says what a glue server says of its member
    vllm     whether prompt_logprobs is understood           likeliest  the most log-probabilities of a place
    max_top_k  as /v1/models tells it; 0: all                 digest, vocabulary  what it says that it serves
    failing  responses that come before any answer            seen  everything that came
    """

    source: Local
    glue: bool = True
    vllm: bool = False
    likeliest: int = 5
    max_top_k: int = 0
    key: str = ""
    digest: str = "d" * 32
    vocabulary: str = ""
    tokenizer: object = None
    failing: list = field(default_factory=list)
    seen: list = field(default_factory=list)
    sessions: dict = field(default_factory=dict)
    plain: bool = False  # whether scores are told in JSON

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """The response to a request."""
        self.seen.append((request.method, request.url.path, dict(request.headers), request.read()))
        if self.failing:
            failure = self.failing.pop(0)
            if isinstance(failure, Exception):
                raise failure
            return failure
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return error(401, f"Incorrect API key provided: {request.headers.get('authorization')}")
        body = json.loads(request.content) if request.content else {}
        if request.url.path == "/v1/models":
            known = self.source.vocabulary
            told = {"kind": "model", "digest": self.digest, "vocabulary": self.vocabulary or known.digest,
                    "vocab_size": known.size, "longest": self.source.longest, "max_top_k": self.max_top_k}
            entry = {"id": "m", "object": "model", "owned_by": "glue", "glue": told}
            if not self.glue:
                entry = {"id": "m", "object": "model", "owned_by": "them"}
            if self.vllm:
                entry = {"id": "m", "object": "model", "max_model_len": self.source.longest}
            return httpx.Response(200, json={"object": "list", "data": [entry]})
        if request.url.path == "/v1/score":
            return self.score(body, request.headers.get("accept"))
        if request.url.path.startswith("/v1/score/"):
            self.sessions.pop(request.url.path.rsplit("/", 1)[1], None)
            return httpx.Response(204)
        if request.url.path == "/v1/completions":
            return self.complete(body)
        return error(404, "no such path")

    def score(self, body: dict, accept: str | None) -> httpx.Response:
        """/v1/score"""
        name, keep = body["session"], body.get("keep", 0)
        held = self.sessions.get(name, [])
        if len(held) < keep:
            return error(409, "not held", "session_lost")
        ids = held[:keep] + body["ids"]
        self.sessions[name] = ids
        with self.source.open() as text:
            scored = text.score(ids, body["from_pos"], top_k=body.get("top_k"), extra=body.get("extra_ids", ()))
        if self.plain:
            told = wire.as_json(scored, body["from_pos"])
            return httpx.Response(200, json={**told, "session": name, "held": len(ids)})
        assert accept == wire.BINARY
        data = wire.encode(scored, self.source.vocabulary.size, body.get("bits", 32))
        return httpx.Response(200, content=data, headers={"content-type": wire.BINARY})

    def complete(self, body: dict) -> httpx.Response:
        """/v1/completions, for a prompt of tokens and one token more"""
        n, ids = body["logprobs"], body["prompt"]
        if n > self.likeliest or (not self.vllm and "prompt_logprobs" in body):
            return error(400, f"no more than {self.likeliest}")
        with self.source.open() as text:
            logs = text.score(ids, 1).logs
        words = self.tokenizer or self.source.running.tokenizer
        numbered = "prompt_logprobs" in body

        def write(token: int) -> str:
            return f"token_id:{token}" if numbered else words.decode([token])

        told = [dict(zip(row.topk(n).indices.tolist(), row.topk(n).values.tolist(), strict=True)) for row in logs]
        for row, token, some in zip(told, ids[1:], logs, strict=False):
            row[token] = float(some[token])
        last = int(logs[-1].argmax())
        tops = [None] + [{write(token): log for token, log in row.items()} for row in told]
        own = [None, *(told[k][token] for k, token in enumerate(ids[1:])), told[-1][last]]
        choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": {
            "tokens": [write(token) for token in (*ids, last)], "token_logprobs": own, "top_logprobs": tops}}
        if numbered:
            choice["logprobs"] = {key: value[len(ids):] for key, value in choice["logprobs"].items()}
            choice["prompt_logprobs"] = [None] + [
                {str(token): {"logprob": log, "rank": 1 + k, "decoded_token": words.decode([token])}
                 for k, (token, log) in enumerate(row.items())} for row in told[:-1]]
        return httpx.Response(200, json={"id": "c", "object": "text_completion", "model": "m", "choices": [choice]})


def error(status: int, message: str, kind: str = "invalid_request_error") -> httpx.Response:
    """OpenAI's form."""
    return httpx.Response(status, json={"error": {"message": message, "type": kind, "param": None, "code": None}})


@contextmanager
def listening(fake: FakeServer) -> Iterator[str]:
    """The URL at which a real socket of this machine has the fake behind it."""
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            content = self.rfile.read(int(self.headers.get("content-length", 0)))
            response = fake(httpx.Request(self.command, f"http://here{self.path}", headers=dict(self.headers),
                                          content=content))
            body = response.read()
            self.send_response(response.status_code)
            self.send_header("content-type", response.headers.get("content-type", "text/plain"))
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_DELETE = _answer

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


