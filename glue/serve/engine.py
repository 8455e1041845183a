"""The one thread that runs the member: what waits is batched, batches take turns, and whoever goes away is let go.

Rows do not join a batch that is under way: a cache of one length for all could take them in, those of mixtures and
proxies could not. Instead a few batches are under way together and write one token each in turn, so that no request
waits for the end of another, only for a place.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from glue.errors import GlueError
from glue.serve.batch import Batch
from glue.serve.metrics import Metrics
from glue.serve.problems import Problem
from glue.serve.rows import Row

T = TypeVar("T")

TURNS = 4  # batches under way together
READ = 16_384  # padded tokens of prompts that are read at once
JUDGED = 4096  # the same where there are logits for every token
SECOND = 1.0  # between looks at what has become too old


class Job:
    """Something the engine is to do for a request; what comes of it is told to the loop that asked.

    events  News of each row, in pieces where the job streams, else once when the row is done; or a Problem
    """

    def __init__(self, rows: Sequence[Row], *, streams: bool = False):
        self.rows, self.streams = list(rows), streams
        self.waiting = deque(self.rows)
        self.over = False
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        for row in rows:
            row.job = self

    def cancel(self) -> None:
        """Nobody wants it any more. Harmless when it is done."""
        self.over = True

    def tell(self, event: Any) -> None:
        """From the engine's thread to the loop, unless that is gone."""
        if not self.over and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)

    def fail(self, problem: Problem) -> None:
        """Tell that nothing comes of it."""
        self.tell(problem)
        self.cancel()


class _Call(Job):
    """A function to be run once."""

    def __init__(self, function: Callable[[], Any]):
        super().__init__([])
        self.function = function


@dataclass
class Engine:
    """Runs jobs until it is stopped.

    places   rows that are written at once
    most     requests that may wait
    idle     called now and then, on the engine's thread
    """

    places: int
    most: int
    metrics: Metrics
    idle: Callable[[], None] = lambda: None
    _waiting: deque[Job] = field(default_factory=deque)
    _batches: list[Batch] = field(default_factory=list)
    _wake: threading.Condition = field(default_factory=threading.Condition)
    _stopping: bool = False
    _thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """Take nothing more, finish what is there, or leave it when the time is over; whether all was finished."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(seconds)
        with self._wake:
            jobs = {*self._waiting, *(row.job for batch in self._batches for row in batch.rows)}
        for job in jobs:
            job.fail(Problem(503, "the server stops"))
        return self._thread is None or not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Whether anything sent here will be done."""
        return self._thread is not None and self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """Requests of which nothing, or not all, has begun."""
        return sum(not job.over for job in list(self._waiting))

    @property
    def rows(self) -> int:
        """Texts that are being written."""
        return sum(len(batch.rows) for batch in list(self._batches))

    def submit(self, job: Job) -> Job:
        """Let a job wait for its turn. Raises Problem 429 where too many wait, 503 where the server stops."""
        with self._wake:
            if self._stopping:
                raise Problem(503, "the server stops; ask another, or later")
            if self.waiting >= self.most:
                raise Problem(429, f"{self.most} requests wait already; ask again later", code="too_many_waiting")
            self._waiting.append(job)
            self._wake.notify()
        return job

    def call(self, function: Callable[[], Any]) -> Job:
        """Let a function be run on the engine's thread; what it returns is the job's one event."""
        return self.submit(_Call(function))

    def _run(self) -> None:
        while True:
            with self._wake:
                if not self._waiting and not self._batches:
                    if self._stopping:
                        break
                    self._wake.wait(SECOND)
                calls = [job for job in self._waiting if isinstance(job, _Call)]
                begun = self._chosen() if len(self._batches) < TURNS else []
                self._waiting = deque(job for job in self._waiting
                                      if not job.over and job.waiting and not isinstance(job, _Call))
            self._guarded([], self.idle)
            for call in calls:
                self._guarded([call], lambda call=call: call.tell(call.function()))  # type: ignore[misc]
            if begun:
                self._batches.append(Batch(begun))
            for batch in list(self._batches):
                self._step(batch)
                if not batch.rows:
                    self._batches.remove(batch)

    def _chosen(self) -> list[Row]:
        """The rows that have waited longest and can be read together, as far as there are places."""
        free, rows, widest = self.places - self.rows, list[Row](), 0
        for job in self._waiting:
            while job.waiting and not job.over:
                row = job.waiting[0]
                wide = max(widest, len(row.ids))
                limit = row.running.room.of(JUDGED if row.judged else READ)
                other = rows and (row.running is not rows[0].running or row.judged != rows[0].judged)
                if other or len(rows) == free or (rows and wide * (len(rows) + 1) > limit):
                    break
                rows.append(job.waiting.popleft())
                widest = wide
        return rows

    def _step(self, batch: Batch) -> None:
        rows = batch.rows
        batch.keep([k for k, row in enumerate(rows) if not row.job.over])
        # what has no token to write is only read; it leaves with this step too
        rows = list(batch.rows)
        if rows:
            self._guarded([row.job for row in rows], batch.step)
        if left := batch.left:
            rows, batch.left = [row for row in rows if not any(row is other for other in left)], []
            self._batches += [Batch(left[k:k + len(rows)]) for k in range(0, len(left), len(rows))]  # as many as fitted
        for row in rows:
            if row.job.over:
                continue
            if row.finish:
                self.metrics.tokens(len(row.ids), len(row.tokens))
            if row.finish or row.job.streams:
                row.job.tell(row.news() if row.job.streams else row.whole)

    def _guarded(self, jobs: Sequence[Job], do: Callable[[], Any]) -> None:
        """Do it; what goes wrong is told to those it was for, and nothing else stops."""
        try:
            do()
        except Problem as problem:
            for job in jobs:
                job.fail(problem)
        except GlueError as error:
            for job in jobs:
                job.fail(Problem(500, str(error)))
        except Exception as error:  # whatever a model may raise: memory, shapes, a source far away
            for job in jobs:
                job.fail(Problem(500, f"the member failed: {type(error).__name__}: {error}"))
