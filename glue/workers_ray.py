"""Workers on Ray: the same calls, by actors of one core each, on this machine or on a cluster that is there already.

`RAY_ADDRESS` names the cluster; without it Ray is started here, for as long as the run lasts, and listens on this
machine alone. All nodes must see the zoo under one path.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from queue import Queue
from typing import Any

from glue.errors import RunError
from glue.workers import QUIET, Workers, quieten, run_here

PAUSE = 0.2  # seconds between two looks at how far a call is
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0",  # nothing is told to anybody
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}  # actors see what accelerators there are
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # on every system: Ray then listens on the loopback address alone


class RayWorkers(Workers):
    """`number` actors of `threads` cores. Raises RunError where Ray is not installed, or cannot be reached."""

    def __init__(self, number: int, threads: int = 1):
        super().__init__(max(1, number), threads)
        self._crew: _Crew | None = None
        _ray()

    def _started(self) -> _Crew:  # type: ignore[override]
        with self._lock:
            if self._ended:
                raise RunError("the run was interrupted", fix="run again; what was finished is kept")
            if self._crew is None:
                quieten()
                self._crew = _Crew(self.number, self.threads, self._reports)
            return self._crew

    def _drain(self, ticket: int) -> None:
        self._reports.pop(ticket, None)  # all was told before the result came

    def close(self, *, now: bool = False) -> None:
        """End the actors, and Ray itself where it was started here."""
        with self._lock:
            crew, self._crew, self._ended = self._crew, None, self._ended or now
        if crew is not None:
            crew.close(now)


class _Crew:
    """Threads, each of which waits for an actor that is free and then for what it was asked."""

    def __init__(self, number: int, threads: int, reports: dict[int, Callable[[int, int, str], None]]):
        ray = _ray()
        self.ray, self.reports, self.address = ray, reports, os.environ.get("RAY_ADDRESS")
        self.began = not ray.is_initialized()
        try:
            if self.began and self.address:
                ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
            elif self.began:
                ray.init(address="local", num_cpus=number * threads, include_dashboard=False, log_to_driver=False,
                         logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise RunError(f"Ray at {self.address or 'this machine'} cannot be reached: {error}",
                           fix="check RAY_ADDRESS; without it Ray is started on this machine") from None
        actor = ray.remote(num_cpus=threads, max_concurrency=2)(_Actor)
        self.free: Queue = Queue()
        self.actors = [actor.remote(threads) for _ in range(number)]
        for one in self.actors:
            self.free.put(one)
        self.threads = ThreadPoolExecutor(number)

    def submit(self, _: Any, target: str, args: tuple[Any, ...], ticket: int | None) -> Future:
        """As a pool of processes does."""
        return self.threads.submit(self._ask, target, args, ticket)

    def _ask(self, target: str, args: tuple[Any, ...], ticket: int | None) -> Any:
        actor = self.free.get()
        try:
            asked = actor.work.remote(target, args, ticket is not None)
            while not self.ray.wait([asked], timeout=PAUSE if ticket is not None else None)[0]:
                self._tell(ticket, self.ray.get(actor.news.remote()))
            result, problem, news = self.ray.get(asked)
            self._tell(ticket, news)
        except self.ray.exceptions.RayError as error:
            raise BrokenProcessPool(str(error)) from None
        finally:
            self.free.put(actor)
        if problem is not None:
            raise problem
        return result

    def _tell(self, ticket: int | None, news: list[tuple[int, int, str]]) -> None:
        report = self.reports.get(ticket) if ticket is not None else None
        for event in news if report else ():
            report(*event)  # type: ignore[misc]

    def close(self, now: bool) -> None:
        if now:
            for actor in self.actors:
                with suppress(Exception):
                    self.ray.kill(actor)
        self.threads.shutdown(wait=True, cancel_futures=True)
        if self.began:
            self.ray.shutdown()
        else:
            for actor in self.actors:
                self.ray.kill(actor)


class _Actor:
    """One worker. Its second thread tells how far the first is."""

    def __init__(self, threads: int):
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        self.threads, self.lock = threads, threading.Lock()
        self.told: list[tuple[int, int, str]] = []

    def work(self, target: str, args: tuple[Any, ...], tells: bool) -> tuple[Any, Exception | None, list]:
        """The result or the error, as it is: Ray would wrap it. And what was not told yet."""
        import torch

        torch.set_num_threads(self.threads)  # here, since it is said for each thread
        try:
            return run_here(target, args, self._note if tells else None), None, self.news()
        except Exception as error:
            error.add_note(traceback.format_exc())  # which does not travel with it
            return None, error, self.news()

    def _note(self, done: int, total: int, note: str = "") -> None:
        with self.lock:
            self.told.append((done, total, note))

    def news(self) -> list[tuple[int, int, str]]:
        with self.lock:
            told, self.told = self.told, []
        return told


def _ray() -> Any:
    """The library. Raises RunError where it is not installed."""
    for name, value in {**SETTINGS, **({} if os.environ.get("RAY_ADDRESS") else ALONE)}.items():
        os.environ.setdefault(name, value)  # Ray reads them when it is imported
    try:
        import ray
    except ImportError:
        raise RunError("--on ray needs the package ray, which is not installed",
                       fix="pip install 'glue[ray]'") from None
    return ray
