"""Links: one server that is asked over HTTP, every byte counted, and never more of it believed than was asked for.

The API key is nowhere but in the requests; redirects are not followed, since they would carry it away.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

from glue.errors import RunError, ZooError, one_line
from glue.kinds import wire
from glue.kinds.far_source import PLAIN, Answer, SessionLost

if TYPE_CHECKING:
    import httpx

LOOPBACK = ("localhost", "127.0.0.1", "::1")
WAITS = (0.2, 0.5, 1.0, 2.0)  # seconds before each further try
PATIENCE = 20.0         # seconds that a server may ask for before the next try


@dataclass(frozen=True)
class Sent:
    """Everything that left this machine with one request, but for the key."""

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes


@dataclass
class Traffic:
    """What went over a link, every try counted.

    calls        requests
    up, down     bytes of bodies, as they went: compressed where they were
    head_up, head_down  bytes of request and status lines and headers, as HTTP/1.1 writes them. What TLS, TCP and IP add
                 is not known here
    seconds      from sending to the last byte, summed
    record       is shown each request before it leaves
    """

    calls: int = 0
    up: int = 0
    down: int = 0
    head_up: int = 0
    head_down: int = 0
    seconds: float = 0.0
    record: Callable[[Sent], None] = lambda sent: None


@dataclass
class HttpLink:
    """A server that is asked over HTTP; any number of threads may ask.

    url        http or https, with or without /v1 at its end
    key        the environment variable that holds the API key; "" for none
    timeout    seconds for one answer, however slowly it comes
    distance   seconds that every call takes longer, to see what a server far away would cost
    transport  what carries requests instead of the network: one of httpx, or a function from its requests to responses
    """

    url: str
    key: str = ""
    timeout: float = 120.0
    distance: float = 0.0
    transport: Any = field(default=None, repr=False)
    traffic: Traffic = field(default_factory=Traffic)
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        self.url = checked_url(self.url)
        self._client: httpx.Client | None = None
        self._lock = Lock()

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None, *, accept: str = "application/json",
            limit: int = PLAIN) -> Answer:
        """The answer of the server, tried again where the connection fails or it is too busy. Raises RunError.

        What nobody waits for is tried once: that is DELETE.
        """
        import httpx

        key, problem = self._key(), ""
        headers = {"accept": accept, "accept-encoding": "identity", "user-agent": "glue"}
        headers |= {"authorization": f"Bearer {key}"} if key else {}
        content = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        headers |= {} if body is None else {"content-type": "application/json"}
        wait = 0.0
        for pause in (None,) if method == "DELETE" else (*WAITS, None):
            try:
                status, told, answer = self._once(httpx.Request(method, self.url + path, headers=headers,
                                                                content=content), limit)
            except httpx.TimeoutException:
                raise self._failed(f"has not answered within {self.timeout:g} s", "see how busy it is") from None
            except httpx.HTTPError as error:
                problem, wait = f"cannot be reached ({_plain(str(error) or type(error).__name__, key)})", 0.0
            else:
                if status not in (429, 502, 503, 504):
                    return self._read(status, answer, key)
                problem, wait = f"is too busy (HTTP {status}{_said(answer.body, key)})", _asked_to_wait(told)
            if pause is None:
                break
            self.sleep(max(pause, min(wait, PATIENCE)))
        raise self._failed(problem, "see whether it runs, and ask again")

    def close(self) -> None:
        """Close the connections; asking again opens new ones."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    def _once(self, request: httpx.Request, limit: int) -> tuple[int, Mapping[str, str], Answer]:
        import httpx

        client, began = self._opened(), time.perf_counter()
        shown = {name: value for name, value in request.headers.items() if name != "authorization"}
        self.traffic.record(Sent(request.method, str(request.url), shown, request.content))
        self._count(calls=1, up=len(request.content), head_up=_line(request) + _size(request.headers))
        if self.distance:
            self.sleep(self.distance)
        response = client.send(request, stream=True)
        body, came = bytearray(), 0
        try:
            self._count(head_down=len(f"HTTP/1.1 {response.status_code} {response.reason_phrase}\r\n\r\n")
                        + _size(response.headers))
            for piece in response.iter_bytes():
                body += piece
                now = response.num_bytes_downloaded or len(body)  # a transport that is a function does not count
                self._count(down=now - came)
                came = now
                if len(body) > limit:
                    raise self._failed(f"answers with more than {limit:,} bytes, the most that could be right",
                                       "see what answers at its URL")
                if time.perf_counter() - began > self.timeout + self.distance:
                    raise httpx.ReadTimeout("")
        finally:
            response.close()
            self._count(seconds=time.perf_counter() - began)
        binary = response.headers.get("content-type", "").startswith(wire.BINARY)
        return response.status_code, response.headers, Answer(bytes(body), binary)

    def _read(self, status: int, answer: Answer, key: str) -> Answer:
        if 200 <= status < 300:
            return answer
        said = _said(answer.body, key)
        if status == 409:
            raise SessionLost(f"{self.url} has lost the session{said}", fix="ask again")
        fixes = {401: f"export {self.key or 'THE_KEY'}=... with a key that it knows" + (
                      "" if self.key else ", and connect again with --key THE_KEY"),
                 403: "take a key that may ask this model", 404: "check the URL, and that it serves this API"}
        raise self._failed(f"refuses: HTTP {status}{said}", fixes.get(status, "see what it serves, or connect again"))

    def _opened(self) -> httpx.Client:
        import httpx

        with self._lock:
            if self._client is None:
                transport = self.transport
                if transport is not None and not isinstance(transport, httpx.BaseTransport):
                    transport = httpx.MockTransport(transport)
                near = httpx.URL(self.url).host in LOOPBACK  # no proxy is needed on the way there
                self._client = httpx.Client(transport=transport, timeout=self.timeout, follow_redirects=False,
                                            trust_env=not near)
            return self._client

    def _key(self) -> str:
        """The key, read anew each time. Raises ZooError where there is none, or one that no header can carry."""
        if not self.key:
            return ""
        key = os.environ.get(self.key, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise ZooError(f"{self.url} is asked with the key in the environment variable {self.key}, "
                           f"{'which holds no key' if key else 'which is not set'}", fix=f"export {self.key}=...")
        return key

    def _count(self, **more: float) -> None:
        with self._lock:
            for name, number in more.items():
                setattr(self.traffic, name, getattr(self.traffic, name) + number)

    def _failed(self, what: str, fix: str) -> RunError:
        return RunError(f"{self.url} {what}", fix=fix)


def checked_url(url: str) -> str:
    """A URL without /v1 or a slash at its end. Raises ZooError for what no API can have, or what holds a password."""
    import httpx

    try:
        told = httpx.URL(url)
    except (httpx.InvalidURL, TypeError, ValueError):
        told = httpx.URL("")
    if told.scheme not in ("http", "https") or not re.fullmatch(rb"[A-Za-z0-9._:-]+", told.raw_host):
        raise ZooError(f"'{one_line(str(url), 80)}' is no URL of a server", fix="write  http://host:port  or https://host")
    if told.userinfo or told.query or told.fragment:
        raise ZooError("a URL of a server holds no password and no question",
                       fix="put the key into an environment variable, and name that with --key")
    return str(told).rstrip("/").removesuffix("/v1")


def _line(request: httpx.Request) -> int:
    """Bytes of the request line, and of the empty line after the headers."""
    return len(f"{request.method}  HTTP/1.1\r\n\r\n".encode()) + len(request.url.raw_path)


def _size(headers: httpx.Headers) -> int:
    return sum(len(name) + len(value) + 4 for name, value in headers.raw)


def _asked_to_wait(headers: Mapping[str, str]) -> float:
    try:
        return max(0.0, float(headers.get("retry-after", "")))
    except ValueError:
        return 0.0


def _plain(text: str, key: str) -> str:
    """Text of somebody else, fit for an error, without the key."""
    return one_line(text.replace(key, "***") if key else text, 200)


def _said(body: bytes, key: str) -> str:
    """What an error says of itself, in OpenAI's form or any other."""
    text = body[:2000].decode(errors="replace")
    try:
        told = json.loads(body)["error"]
        text = str(told["message"] if isinstance(told, dict) else told)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    return f": {_plain(text, key)}" if text.strip() else ""
