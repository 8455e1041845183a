"""`glue serve` as a process: where it listens, who may ask, what crowds and killed clients leave behind, its end."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from glue import cli
from glue.errors import MethodError
from glue.kinds import load
from glue.member import Member
from glue.serve.app import application
from glue.serve.served import Limits, Served
from glue.serve.server import check, listen
from tests.serving import server, server_here, small_member

KEY = "k3y-of-tests"
HEADERS = {"Authorization": f"Bearer {KEY}"}
LONG = 20_000


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    small_member(folder, positions=2 * LONG, ends=False)
    (folder / "zoo.yaml").write_text(f"members:\n  small: {{path: {folder}/small}}\n")
    return folder / "zoo.yaml"


@pytest.fixture(scope="module")
def running(zoo):
    with server(zoo, "small", "--session-idle", "0.5", "--max-waiting", "500", "--timeout", "120", key=KEY) as found:
        yield found


def told(url: str) -> dict[str, float]:
    """The gauges and sums of /metrics."""
    text = httpx.get(f"{url}/metrics", headers=HEADERS).text
    return {name: float(value) for name, value in re.findall(r"^(\S+) (\S+)$", text, re.MULTILINE)}


def until(what, seconds: float = 15.0):
    """Waits for something to be so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it never came to be so"
        time.sleep(0.02)


def memory(process: subprocess.Popen) -> float:
    """MB of a process that are in memory."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no such process")


def crowd(url: str, count: int = 200) -> list[httpx.Response]:
    """So many requests at once, each its own connection, of every kind."""
    bodies = [{"model": "small", "prompt": [5 + k % 40] * (1 + k % 9), "max_tokens": 1 + k % 12, "temperature": k % 2,
               "seed": k, "stream": k % 3 == 0, **({"echo": True, "logprobs": 2} if k % 5 == 0 else {})}
              for k in range(count)]

    async def all_of_them():
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, headers=HEADERS, limits=limits, timeout=60) as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    return asyncio.run(all_of_them())


def texts(answers: list[httpx.Response]) -> list[str]:
    found = []
    for answer in answers:
        assert answer.status_code == 200, answer.text
        if answer.headers["content-type"].startswith("text/event-stream"):
            events = [event for event in answer.text.split("\n\n") if event]
            assert events[-1] == "data: [DONE]"
            found.append("".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:-1]))
        else:
            found.append(answer.json()["choices"][0]["text"])
    return found


def test_two_hundred_at_once_are_all_answered_and_leave_no_memory_behind(running):
    url, process = running
    first = texts(crowd(url))
    for _ in range(2):  # until all buffers have the size that they need
        texts(crowd(url))
    before = memory(process)
    for _ in range(3):
        assert texts(crowd(url)) == first, "and each the same as before"
    assert memory(process) - before < 12, "MB, after 600 requests"
    state = told(url)
    assert state["glue_running_rows"] == state["glue_waiting_requests"] == 0
    assert state['glue_requests_total{route="/v1/completions",status="200"}'] == 6 * 200


CLIENT = """
import http.client, json, sys
host = sys.argv[1].removeprefix("http://")
def ask(address, body):
    connection = http.client.HTTPConnection(host)
    connection.request("POST", address, json.dumps(body), {"Content-Type": "application/json",
                                                           "Authorization": "Bearer " + sys.argv[2]})
    return connection, connection.getresponse()
held = [ask("/v1/score", {"ids": [1, 5, 6], "from_pos": 1, "top_k": 1, "session": "killed"}),
        ask("/v1/completions", {"model": "small", "prompt": [5], "max_tokens": 20000, "stream": True}),
        ask("/v1/completions", {"model": "small", "prompt": [[6], [7]], "max_tokens": 20000, "stream": True})]
print(held[1][1].read(50), flush=True)
later = http.client.HTTPConnection(host)  # nobody will read this answer, and it never comes
later.request("POST", "/v1/completions", json.dumps({"model": "small", "prompt": [8], "max_tokens": 20000}),
              {"Content-Type": "application/json", "Authorization": "Bearer " + sys.argv[2]})
print("asked", flush=True)
sys.stdin.read()
"""


def test_a_client_that_is_killed_leaves_no_row_and_no_session(running):
    url, _ = running
    before = told(url)["glue_tokens_total{kind=\"completion\"}"]
    client = subprocess.Popen([sys.executable, "-c", CLIENT, url, KEY], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert client.stdout.readline().startswith(b"b'data: {") and client.stdout.readline() == b"asked\n"
        until(lambda: told(url)["glue_running_rows"] == 4)
        assert told(url)["glue_sessions"] <= 1
        client.send_signal(signal.SIGKILL)
        client.wait(10)
        killed = time.monotonic()
        until(lambda: told(url)["glue_running_rows"] == 0)
        assert time.monotonic() - killed < 5, "rows of 20 000 tokens were let go, not finished"
        until(lambda: told(url)["glue_sessions"] == 0)
        assert told(url)["glue_waiting_requests"] == 0
        assert told(url)["glue_tokens_total{kind=\"completion\"}"] == before
    finally:
        client.kill()
        client.wait(10)
        client.stdin.close()
        client.stdout.close()


def test_what_takes_too_long_is_told_so_and_let_go(zoo):
    running = load(Member("small", "model", str(zoo.parent / "small")))
    with server_here(application(Served(running, Limits(seconds=0.3, delay=0.1)))) as url:
        began = time.monotonic()
        answer = httpx.post(f"{url}/v1/completions", json={"model": "small", "prompt": [5], "max_tokens": LONG})
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        assert 0.4 <= time.monotonic() - began < 5
        with httpx.stream("POST", f"{url}/v1/completions", json={"model": "small", "prompt": [5], "max_tokens": LONG,
                                                                 "stream": True}) as stream:
            events = "".join(stream.iter_text()).split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""] and json.loads(events[-3][6:])["error"]["code"] == "timeout"
        until(lambda: told(url)["glue_running_rows"] == 0)
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=10) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                         b"Content-Length: 100\r\n\r\n{")
            assert b" 408 " in slow.recv(4096), "a body that never comes"
        began = time.monotonic()
        assert httpx.get(f"{url}/v1/models").status_code == 200
        assert time.monotonic() - began > 0.1, "the delay that was asked for"


def test_a_stop_finishes_what_it_can_in_its_time_and_takes_nothing_new(zoo):
    with server(zoo, "small", "--grace", "4") as (url, process):
        answers: dict[int, httpx.Response | Exception] = {}

        def ask(tokens: int) -> None:
            body = {"model": "small", "prompt": [5], "max_tokens": tokens, "temperature": 0}
            try:
                answers[tokens] = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            except httpx.TransportError as error:
                answers[tokens] = error

        asking = [threading.Thread(target=ask, args=(tokens,)) for tokens in (200, LONG)]
        for thread in asking:
            thread.start()
        until(lambda: told(url)["glue_running_rows"] == 2)
        process.send_signal(signal.SIGTERM)

        def refused() -> bool:
            try:
                return httpx.get(f"{url}/health").status_code == 503
            except httpx.TransportError:
                return True

        until(refused)
        assert process.wait(30) == 0
        for thread in asking:
            thread.join(30)
        assert answers[200].status_code == 200 and answers[200].json()["usage"]["completion_tokens"] == 200
        assert isinstance(answers[LONG], Exception) or answers[LONG].status_code >= 500


def test_other_machines_may_ask_only_with_a_key():
    with pytest.raises(MethodError, match="no key"):
        check("0.0.0.0", None)
    with pytest.raises(MethodError, match="no key"):
        check("::", "")
    for key in ("has space", "ünïcode", "line\nbreak"):
        with pytest.raises(MethodError, match="printable ASCII"):
            check("127.0.0.1", key)
    check("0.0.0.0", "secret")
    check("localhost", None)


def test_the_command_refuses_a_server_for_everyone_and_a_template_that_is_not_there(zoo, monkeypatch, capsys):
    monkeypatch.delenv("GLUE_API_KEY", raising=False)
    for words, said in ((["--host", "0.0.0.0"], "no key"), (["--chat-template", "nowhere.jinja"], "no chat template"),
                        (["--device", "abacus"], "cannot be calculated on"), (["--dtype", "int3"], "dtype")):
        monkeypatch.setattr(sys, "argv", ["glue", "serve", "small", "--zoo", str(zoo), "--port", "0", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_anything_is_loaded():
    with listen("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(MethodError, match="nothing can listen"):
            listen("127.0.0.1", first.getsockname()[1])
