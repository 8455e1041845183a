"""One request while it is answered: its time, whether its client is still there, and the jobs that end with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import Request

from glue.kinds import Running
from glue.serve.engine import Job
from glue.serve.problems import Problem
from glue.serve.served import Served


class Exchange:
    """Waits for jobs on behalf of a request. Closed when the answer is out, or nobody waits for it any more."""

    def __init__(self, served: Served, request: Request):
        self.served = served
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + served.limits.seconds
        self._left: asyncio.Task[None] | None = asyncio.ensure_future(_left(request))
        self._jobs: list[Job] = []

    async def __aenter__(self) -> Exchange:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def put(self, job: Job) -> Job:
        """A job that the engine has taken; it is cancelled when the exchange is closed."""
        self._jobs.append(job)
        return job

    async def news(self, job: Job) -> Any:
        """The next event of a job. Raises the Problem that the job ended with, 504 when the time is over."""
        if job.events.empty():
            coming = asyncio.ensure_future(job.events.get())
            waited = {coming} if self._left is None else {coming, self._left}
            try:
                await asyncio.wait(waited, timeout=self._end - self._loop.time(), return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not coming.done():
                    coming.cancel()
            if coming.cancelled() or not coming.done():
                if self._left is not None and self._left.done():
                    raise Problem(499, "the client went away")
                raise Problem(504, f"no answer within {self.served.limits.seconds:g} seconds; ask for less, or let the "
                                   "server have more with --timeout", code="timeout")
            event = coming.result()
        else:
            event = job.events.get_nowait()
        if isinstance(event, Problem):
            raise event
        return event

    async def asked(self, function: Any) -> Any:
        """What a function returns that is run on the engine's thread."""
        return await self.news(self.put(self.served.engine.call(function)))

    async def reader(self, text: str | None) -> tuple[Running, str | None]:
        """Who reads and answers a text: of a mixture by text the expert that the text chooses, with its name."""
        running = self.served.running
        choose = running.choose
        if choose is None:
            return running, None
        if text is None:
            raise Problem(400, f"the text of a prompt chooses which expert of '{self.served.name}' answers, and each "
                               "has tokens of its own; send text", param="prompt")
        expert: Running = await self.asked(lambda: running.experts[choose([text])[0]])
        return expert, expert.member.name

    def stop_watching(self) -> None:
        """Whoever sends the answer will notice when the client goes away."""
        if self._left is not None:
            self._left.cancel()
            self._left = None

    def close(self) -> None:
        """Let everything go that still runs."""
        self.stop_watching()
        for job in self._jobs:
            job.cancel()


@asynccontextmanager
async def kept(served: Served, request: Request) -> AsyncIterator[Exchange]:
    """An exchange that whoever sends its answer closes, since a stream goes on; here only where there is none."""
    exchange = Exchange(served, request)
    try:
        yield exchange
    except BaseException:
        exchange.close()
        raise


async def _left(request: Request) -> None:
    """Returns when the client is gone. The body must have been read."""
    with suppress(RuntimeError):
        while (await request.receive())["type"] != "http.disconnect":
            pass
