"""Workers: the same calls in this process and in a pool."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

import glue
from glue.errors import MethodError, RunError
from glue.workers import Workers
from glue.workers_ray import RayWorkers

HERE, FOLDER = "test_workers", str(Path(__file__).parent)


def square(x: int, report=None) -> int:
    """A top-level function, as work that leaves the process has to be."""
    if report:
        report(x, 10, "squaring")
    return x * x


def process(_: int) -> tuple[int, int]:
    import torch

    time.sleep(0.2)
    return os.getpid(), torch.get_num_threads()


def refuse(_: int) -> None:
    raise MethodError("this cannot be", fix="do that")


def die(_: int) -> None:
    os._exit(9)


@pytest.fixture(params=["in this process", "pool", pytest.param("ray", marks=pytest.mark.slow)])
def workers(request, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)  # so that worker processes find this module too
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([FOLDER, str(Path(glue.__file__).parents[1])]))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    makes = {"in this process": lambda: Workers(0), "pool": lambda: Workers(2), "ray": lambda: RayWorkers(2)}
    with makes[request.param]() as made:
        yield made


def test_results_come_back_in_order_and_one_by_one(workers: Workers):
    seen: dict[int, int] = {}
    assert workers.map(f"{HERE}:square", [(k,) for k in range(7)], each=seen.__setitem__) == [k * k for k in range(7)]
    assert seen == {k: k * k for k in range(7)}


def test_progress_is_told_while_a_call_works(workers: Workers):
    told: list[tuple[int, int, str]] = []
    workers.call(f"{HERE}:square", 3, report=lambda *event: told.append(event))
    until = time.monotonic() + 5
    while not told and time.monotonic() < until:
        time.sleep(0.01)
    assert told == [(3, 10, "squaring")]


def test_an_error_keeps_its_kind_and_its_fix(workers: Workers):
    with pytest.raises(MethodError) as caught:
        workers.call(f"{HERE}:refuse", 1)
    assert (caught.value.what, caught.value.fix) == ("this cannot be", "do that")


def test_every_process_has_its_one_thread(workers: Workers):
    found = workers.map(f"{HERE}:process", [(k,) for k in range(4)])
    assert {threads for _, threads in found} == {1}
    assert len({pid for pid, _ in found}) == max(1, workers.number)


def test_a_worker_that_dies_is_told_as_such(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("PYTHONPATH", FOLDER)
    with Workers(1) as workers, pytest.raises(RunError, match="worker process died"):
        workers.call(f"{HERE}:die", 1)


@pytest.mark.slow
def test_an_actor_that_dies_is_told_as_a_worker_is(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([FOLDER, str(Path(glue.__file__).parents[1])]))
    with RayWorkers(1) as workers, pytest.raises(RunError, match="worker process died"):
        workers.call(f"{HERE}:die", 1)


@pytest.mark.slow
def test_ray_that_is_started_here_listens_on_this_machine_alone(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([FOLDER, str(Path(glue.__file__).parents[1])]))
    before = listening()
    with RayWorkers(1) as workers:
        workers.call(f"{HERE}:square", 1)
        opened = listening() - before
    assert opened and {address for address, _ in opened} <= {"0100007F", "00000000000000000000000001000000",
                                                             "0000000000000000FFFF00000100007F"}


def listening() -> set[tuple[str, str]]:
    """(address, port) of every socket of the machine that waits for connections, as the kernel writes them."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == "0A":
                found.add(tuple(local.split(":")))
    return found


def test_without_ray_one_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match="ray, which is not installed") as caught:
        RayWorkers(2)
    assert caught.value.fix == "pip install 'glue[ray]'"


def test_after_an_end_at_once_nothing_more_is_started():
    workers = Workers(1)
    workers.close(now=True)
    with pytest.raises(RunError, match="interrupted"):
        workers.call(f"{HERE}:square", 2)
