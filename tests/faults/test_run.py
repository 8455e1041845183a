"""Runs that are killed or interrupted: nothing is lost, and the next run goes on to the same bytes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = "steps:\n" + "".join(
    f"  - {{as: d{k}, step: data, skill: {skill}, train: 60000, dev: 20, seed: {k}}}\n"
    for k, skill in enumerate(["kind", "facts", "trans", "strings", "logic", "bracket"]))


def start(place: Path, workers: int = 2) -> subprocess.Popen:
    """`glue run` in a session of its own, so that it can be signalled as a terminal does."""
    return subprocess.Popen([sys.executable, "-m", "glue.cli", "run", "r.yaml", "--workers", str(workers), "-q"],
                            cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # CI may ignore it


@pytest.fixture
def place(tmp_path: Path):
    def make(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "zoo.yaml").write_text("members: {}\n")
        (folder / "r.yaml").write_text(RECIPE)
        return folder
    return make


def registered(place: Path) -> dict[str, str]:
    """Name -> digest of what is in the register."""
    file = place / "zoo/members.yaml"
    lines = file.read_text().splitlines() if file.exists() else []
    return {entry["name"]: entry["digest"] for entry in (json.loads(line[2:]) for line in lines if line[:2] == "- ")}


def wait_for_members(place: Path, count: int) -> None:
    until = time.monotonic() + 60
    while len(registered(place)) < count:
        assert time.monotonic() < until, "no member was registered in a minute"
        time.sleep(0.01)


def children_of(session: int) -> list[str]:
    """Command lines of the processes that still belong to a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append((folder / "cmdline").read_text())
        except (OSError, ValueError):
            continue
    return found


def wait_until_alone(session: int) -> None:
    """Workers end with the process that they work for."""
    until = time.monotonic() + 20
    while children_of(session):
        assert time.monotonic() < until, children_of(session)
        time.sleep(0.05)


def test_a_run_killed_in_the_middle_goes_on_to_the_digests_of_an_undisturbed_one(place):
    calm, struck = place("calm"), place("struck")
    assert start(calm).wait(120) == 0
    whole = registered(calm)
    assert len(whole) == 6
    for members in (1, 3):
        run = start(struck)
        wait_for_members(struck, members)
        os.kill(run.pid, signal.SIGKILL)
        run.wait(10)
        wait_until_alone(run.pid)
        before = registered(struck)
        assert set(before.items()) <= set(whole.items())
    run = start(struck)
    assert run.wait(120) == 0, run.stderr.read()
    assert registered(struck) == whole
    assert not list((struck / "zoo/.drafts").iterdir())


def test_ctrl_c_ends_everything_at_once_and_says_how_to_go_on(place):
    folder = place("here")
    run = start(folder)
    wait_for_members(folder, 1)
    os.killpg(run.pid, signal.SIGINT)
    _, said = run.communicate(timeout=30)
    assert run.returncode == 130
    assert "run the same command again" in said and "Traceback" not in said
    wait_until_alone(run.pid)
    assert start(folder).wait(120) == 0
    assert len(registered(folder)) == 6


def test_two_runs_at_once_lose_nothing(place):
    folder = place("here")
    (folder / "s.yaml").write_text(RECIPE.replace("60000", "3000"))
    (folder / "r.yaml").write_text(RECIPE.replace("60000", "2000"))
    first = start(folder, workers=0)
    second = subprocess.Popen([sys.executable, "-m", "glue.cli", "run", "s.yaml", "--workers", "0", "-q"], cwd=folder)
    assert first.wait(120) == 0 and second.wait(120) == 0
    assert len(registered(folder)) == 12
    assert {name.split("/")[0] for name in registered(folder)} == {"r", "s"}


def test_a_disk_that_is_full_fails_one_task_and_the_next_run_goes_on(place):
    folder = place("here")
    command = [sys.executable, "-m", "glue.cli", "run", "r.yaml", "--workers", "0", "-q"]
    limit = (1_000_000, 1_000_000)  # bytes a file may have; the datasets are larger
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert run.returncode == 2
    assert "r.yaml:2:6: r/d0 failed: OSError" in run.stderr and "Traceback" not in run.stderr
    assert registered(folder) == {}
    assert subprocess.run(command, cwd=folder).returncode == 0
    assert len(registered(folder)) == 6 and not list((folder / "zoo/.drafts").iterdir())
