"""Federations whose server is killed: nobody who has answered trains again, and the result is the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DATA = """steps:
  - {as: kind, step: data, skill: {kind: {things: 45}}, train: 400, dev: 20}
  - {as: base, step: pretrain, steps: 5, learning_rate: 6e-3, batch_size: 8, vocabulary: [kind],
     architecture: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 48},
     data: {kind: 1}}
"""
FEDERATE = """  - {as: fed, step: federate, base: base, data: {kind: 1}, clients: 4, rounds: %d, steps: 60,
     learning_rate: 1e-3, batch_size: 16, rank: 4, targets: [q_proj, v_proj]}
"""


def start(place: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "glue.cli", "run", "r.yaml", "--workers", "1", "-q"], cwd=place,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


def events(place: Path, name: str) -> list[dict]:
    """Lines of the journal of the federation that is under way."""
    found = []
    for file in (place / "zoo/.drafts").glob("*/federation/journal.jsonl"):
        found += [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    return [line for line in found if line["event"] == name]


def product(place: Path) -> Path:
    return place / "zoo/r/fed"


def digest(place: Path) -> str:
    return json.loads((product(place) / "glue.json").read_text())["digest"]


def wait_until(true, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it has not happened"
        time.sleep(0.005)


def alone(session: int) -> bool:
    """Whether all processes of a session have ended."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            return False
    return True


@pytest.fixture
def place(tmp_path: Path):
    def make(name: str, rounds: int) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "zoo.yaml").write_text("members: {}\n")
        (folder / "r.yaml").write_text(DATA + FEDERATE % rounds)
        return folder
    return make


def test_a_server_killed_between_two_replies_asks_nobody_again_who_has_answered(place):
    calm, struck = place("calm", 2), place("struck", 2)
    assert start(calm).wait(120) == 0
    for taken in (2, 5):  # in the first round, and in the second
        run = start(struck)
        wait_until(lambda: len(events(struck, "update")) >= taken or run.poll() is not None)  # noqa: B023
        os.kill(run.pid, signal.SIGKILL)
        run.wait(10)
        wait_until(lambda: alone(run.pid), 20)  # noqa: B023
        assert taken <= len(events(struck, "update")) < 8 and not product(struck).exists()
    before = {(line["round"], line["client"]) for line in events(struck, "update")}
    asked = len(events(struck, "sent"))
    run = start(struck)
    assert run.wait(120) == 0, run.stderr.read()
    assert digest(struck) == digest(calm)
    ledger = json.loads((product(struck) / "ledger.json").read_text())["clients"]
    again = sum(account["asked"] for account in ledger.values()) - asked
    assert again <= 8 - len(before)  # only those who were missing, of whom one may have answered unheard
    assert all(account["rounds"] == [1, 2] for account in ledger.values())
    assert not list((struck / "zoo/.drafts").iterdir())
