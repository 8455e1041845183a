"""Workers: the same calls in this process and in a pool."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import glue
from glue.errors import MethodError, RunError
from glue.workers import Workers

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


@pytest.fixture(params=["in this process", "pool"])
def workers(request, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)  # so that worker processes find this module too
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([FOLDER, str(Path(glue.__file__).parents[1])]))
    with Workers({"in this process": 0, "pool": 2}[request.param]) as made:
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


def test_after_an_end_at_once_nothing_more_is_started():
    workers = Workers(1)
    workers.close(now=True)
    with pytest.raises(RunError, match="interrupted"):
        workers.call(f"{HERE}:square", 2)
