"""A server on a port, from its start to SIGTERM."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import uvicorn

from glue.errors import MethodError
from glue.serve.app import application
from glue.serve.served import Served

HOME = ("127.0.0.1", "localhost", "::1")


def check(host: str, key: str | None) -> None:
    """Raises MethodError for a server that everyone on the network could use."""
    if host not in HOME and not key:
        raise MethodError(f"--host {host} lets other machines ask, and there is no key that would tell who may",
                          fix="add  --api-key KEY,  or set GLUE_API_KEY; or leave out --host, for this machine alone")
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise MethodError("an API key is made of printable ASCII characters, without spaces",
                          fix="--api-key $(openssl rand -hex 16)")


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound; port 0 takes any that is free. Raises MethodError where it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as problem:
        bound.close()
        raise MethodError(f"nothing can listen on {host} port {port}: {problem.strerror or problem}",
                          fix="--port 0 takes any that is free") from None
    return bound


def run(served: Served, bound: socket.socket, key: str | None = None,
        ready: Callable[[str], None] = lambda url: None) -> None:
    """Answer until SIGTERM or Ctrl-C: then nothing new is taken, and what runs is finished as far as its time goes.

    ready  is told where the server listens, as soon as it answers
    """
    host, port = bound.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                ready(url)

    config = uvicorn.Config(application(served, key), log_level="warning", access_log=False, lifespan="on",
                            server_header=False, timeout_graceful_shutdown=max(1, round(served.limits.grace)),
                            timeout_keep_alive=30, backlog=2048)
    # uvicorn raises the signal again when it is done, so that others hear of it; here it is done then
    before = {each: signal.signal(each, lambda *_: None) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        Server(config).run([bound])
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        bound.close()
