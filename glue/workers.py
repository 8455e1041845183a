"""Workers: the same calls in this process or in a pool of processes with a fixed number of threads each.

A call is the dotted name of a top-level function with plain arguments, so that it can run anywhere. One thread for
each worker makes results independent of how many workers there are.
"""

from __future__ import annotations

import gc
import importlib
import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import count
from typing import Any, Literal

from glue.errors import RunError

Report = Callable[[int, int, str], None]
WORKER = "GLUE_WORKER"  # in the environment of a worker: which of them it is, counted from 0
QUIET = {"OMP_WAIT_POLICY": "PASSIVE",  # idle threads of one worker must not spin beside the others
         "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
PATIENCE = 5.0  # seconds to wait for late reports
RECORDED = ("glue", "torch", "transformers", "numpy", "safetensors", "lm_eval")  # what results may hang on
PRELOAD = ["torch", "transformers.models.llama.modeling_llama", "glue.checkpoint"]


class Workers:
    """`number` processes of `threads` threads; 0 means this process. Use as a context manager.

    start  "forkserver", or "fork" where this process has done nothing with torch yet: a fork after an OpenMP region
           can hang, and a forkserver has to import everything first

    apart  whether they may be on other machines      lost  why workers ended whose calls were made again by others
    """

    apart = False

    def __init__(self, number: int = 0, threads: int = 1, start: Literal["forkserver", "fork"] = "forkserver"):
        self.number, self.threads, self._start = number, threads, start
        self._pool: ProcessPoolExecutor | None = None
        self._reports: dict[int, Report] = {}
        self._drained: dict[int, threading.Event] = {}
        self._events: Any = None
        self._tickets = count()
        self._lock = threading.Lock()
        self._ended = False
        self.lost: list[str] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def call(self, target: str, *args: Any, report: Report | None = None) -> Any:
        """Run `package.module:function` on `args`; where it takes a `report` keyword, progress comes back."""
        return self.map(target, [args], report=report)[0]

    def map(self, target: str, calls: Sequence[tuple[Any, ...]], *, report: Report | None = None,
            each: Callable[[int, Any], None] | None = None) -> list[Any]:
        """Run one function on many argument lists; results in order. `each` is told (index, result) as they come."""
        if self.number == 0:
            import torch

            torch.set_num_threads(self.threads)
            results = []
            for k, args in enumerate(calls):
                results.append(run_here(target, args, report))
                if each:
                    each(k, results[-1])
            return results
        return self._spread(target, calls, report, each)

    def _spread(self, target: str, calls: Sequence[tuple[Any, ...]], report: Report | None,
                each: Callable[[int, Any], None] | None) -> list[Any]:
        pool = self._started()
        ticket = next(self._tickets) if report else None
        if report and ticket is not None:
            self._reports[ticket] = report
        futures: list[Future] = [pool.submit(_work, target, args, ticket) for args in calls]
        try:
            if each:
                from concurrent.futures import as_completed

                order = {future: k for k, future in enumerate(futures)}
                for future in as_completed(futures):
                    each(order[future], future.result())
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise RunError("a worker process died, most likely for lack of memory",
                           fix="run again with fewer workers (--workers); what was finished is kept") from None
        finally:
            for future in futures:
                future.cancel()
            if ticket is not None:
                self._drain(ticket)

    def _started(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._ended:
                raise RunError("the run was interrupted", fix="run again; what was finished is kept")
            if self._pool is None:
                quieten()
                context = multiprocessing.get_context(self._start)
                if self._start == "forkserver":
                    context.set_forkserver_preload(PRELOAD)
                events, places = context.SimpleQueue(), context.SimpleQueue()
                self._events = events
                for place in range(self.number):
                    places.put(place)
                self._pool = ProcessPoolExecutor(self.number, mp_context=context, initializer=_begin,
                                                 initargs=(self.threads, events, places))
                gc.freeze()  # or a collection in a forked process writes to pages that are shared until then
                self._pool.submit(os.getpid)  # so that all are forked before there is a thread
                gc.unfreeze()
                threading.Thread(target=self._listen, args=(events,), daemon=True).start()
            return self._pool

    def _listen(self, events: Any) -> None:
        while True:
            try:
                ticket, done, total, note = events.get()
            except (EOFError, OSError, TypeError):
                return
            if done is None:
                self._drained.pop(ticket).set()
            elif report := self._reports.get(ticket):
                report(done, total, note)

    def _drain(self, ticket: int) -> None:
        """Wait until everything that was reported on a ticket has been told; results come by a faster way."""
        told = self._drained[ticket] = threading.Event()
        with suppress(OSError):
            self._events.put((ticket, None, None, ""))
            told.wait(PATIENCE)
        self._reports.pop(ticket, None)

    def close(self, *, now: bool = False) -> None:
        """End the pool; `now` does not wait for what is running, and refuses whatever else is asked for."""
        with self._lock:
            pool, self._pool, self._ended = self._pool, None, self._ended or now
        if pool is None:
            return
        if now:
            for process in list((pool._processes or {}).values()):
                process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def cores() -> int:
    """Cores that are ours, at most 4: each worker may hold a whole model."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def quieten() -> None:
    """Keep the libraries' own bars and warnings out of ours; what the user has set stays. Before they are imported."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it looks for a package that it does not need


_events: Any = None  # set once in each worker process, by its initializer


def _begin(threads: int, events: Any, places: Any) -> None:
    """Set up one worker process: no keyboard signals, its threads, its way back, and an end when the parent ends.

    places  tells each process which of all it is, so that each can have a GPU of its own
    """
    global _events
    quieten()
    os.environ[WORKER] = str(places.get())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore", FutureWarning)
    _events = events
    import torch

    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _work(target: str, args: tuple[Any, ...], ticket: int | None) -> Any:
    def report(done: int, total: int, note: str = "") -> None:
        _events.put((ticket, done, total, note))

    return run_here(target, args, None if ticket is None else report)


def run_here(target: str, args: tuple[Any, ...], report: Report | None = None) -> Any:
    """Run `package.module:function` in this process; it gets a `report` where there is one."""
    module, _, name = target.partition(":")
    function = getattr(importlib.import_module(module), name)
    return function(*args, **({"report": report} if report else {}))
