"""Processes that are killed (SIGKILL) while they append, publish or write, and processes that do so together."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from glue.checkpoint import Checkpoint
from glue.errors import CheckpointError
from glue.files import append_line, publish, whole_lines

START = "import os, sys, signal, threading\nfrom pathlib import Path\nplace = Path(sys.argv[1])\n"
DIE = """
def die_in(name, call):  # the process is killed at the call-th os.<name>
    real, count = getattr(os, name), [0]
    def hooked(*given, **more):
        count[0] += 1
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **more)
    setattr(os, name, hooked)
"""


def started(code: str, place: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", START + DIE + code, str(place), *more])


def test_processes_that_append_together_lose_nothing(tmp_path):
    code = ("from glue.files import append_line\n"
            "for k in range(60): append_line(place / 'f', f'{sys.argv[2]} {k} ' + 'x' * 500)")
    both = [started(code, tmp_path, name) for name in "abc"]
    assert [process.wait(60) for process in both] == [0, 0, 0]
    lines = [line.split() for line in whole_lines(tmp_path / "f")]
    assert len(lines) == 180
    assert all([int(k) for name, k, _ in lines if name == one] == list(range(60)) for one in "abc")


def test_a_process_killed_while_it_appends_loses_no_finished_line_and_holds_no_lock(tmp_path):
    process = started("from glue.files import append_line\n"
                      "for k in range(10**6): append_line(place / 'f', f'{k} ' + 'x' * 3000)", tmp_path)
    while len(whole_lines(tmp_path / "f")) < 20:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    before = whole_lines(tmp_path / "f")
    append_line(tmp_path / "f", f"{len(before)} after")
    after = whole_lines(tmp_path / "f")
    assert after[:-1] == before and [int(line.split()[0]) for line in after] == list(range(len(before) + 1))


@pytest.mark.parametrize("call", ["fsync 1", "fsync 2", "rename 1", "rename 2", "fsync 3"])
def test_a_process_killed_while_it_publishes_leaves_both_folders_whole(tmp_path, call):
    for name, text in (("final", "old"), ("draft", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(text)
    name, count = call.split()
    code = f"from glue.files import publish\ndie_in('{name}', {count})\npublish(place / 'draft', place / 'final')"
    assert started(code, tmp_path).wait(30) == -signal.SIGKILL
    found = {folder.name: (folder / "f").read_text() for folder in tmp_path.iterdir()}
    assert sorted(found.values()) == ["new", "old"] and found.get("final") in (None, "old", "new")
    if (tmp_path / "draft").exists():
        publish(tmp_path / "draft", tmp_path / "final")  # the same call goes on from there
    found = {folder.name: (folder / "f").read_text() for folder in tmp_path.iterdir()}
    assert found == {"final": "new", "final.replaced-1": "old"}


WRITE = """
import torch
from glue.checkpoint import Header
from glue.writer import Writer
names = {f't{k}': Header(torch.float32, (1000,)) for k in range(4)}
writer = Writer(place, names, shard_size=int(sys.argv[2]))
die_in(sys.argv[3], int(sys.argv[4]))
for name in names: writer.write(name, torch.ones(1000))
writer.close()
"""


@pytest.mark.parametrize("size", ["4000", "1000000"])
@pytest.mark.parametrize("where", ["pwrite 1", "pwrite 4", "fsync 1", "replace 1"])
def test_a_writer_that_is_killed_leaves_no_checkpoint(tmp_path, size, where):
    assert started(WRITE, tmp_path, size, *where.split()).wait(60) == -signal.SIGKILL
    with pytest.raises(CheckpointError, match="holds no safetensors weights"):
        Checkpoint(tmp_path)


def test_a_writer_that_is_killed_before_its_index_leaves_no_checkpoint_and_can_be_repeated(tmp_path):
    assert started(WRITE, tmp_path, "4000", "replace", "5").wait(60) == -signal.SIGKILL  # the index itself
    with pytest.raises(CheckpointError, match="holds no safetensors weights"):
        Checkpoint(tmp_path)
    assert started(WRITE, tmp_path, "4000", "replace", "99").wait(60) == 0
    assert all(torch.equal(tensor, torch.ones(1000)) for tensor in Checkpoint(tmp_path).values())


def test_zoos_that_are_written_to_together_lose_nothing(tmp_path):
    (tmp_path / "zoo.yaml").write_text("members: {}\n")
    code = ("from glue.zoo import Zoo\nfrom glue.member import Member\nzoo = Zoo(place / 'zoo.yaml')\n"
            "for k in range(30): zoo.add(Member(f'{sys.argv[2]}-{k}', 'model', str(place / 'x'), digest=f'{k:032x}'))")
    assert [process.wait(60) for process in [started(code, tmp_path, name) for name in "ab"]] == [0, 0]
    from glue.zoo import Zoo

    found = {member.name for member in Zoo(tmp_path / "zoo.yaml")}
    assert found == {f"{name}-{k}" for name in "ab" for k in range(30)}
    assert sum(line.startswith("#") for line in whole_lines(tmp_path / "zoo" / "members.yaml")) == 1
