"""A journal of answered requests, batch by batch, which a killed evaluation is gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from glue.errors import SuiteError
from glue.files import append_line, whole_lines
from glue.kinds.batches import Room, emptied
from glue.member import canonical

Cut = Callable[[Sequence[int], int], list[list[int]]]  # (positions, how often batches were halved) -> batches


class Answered:
    """Answers by what was asked: one line a batch, whole or not there at all.

    file    of one member under one harness; None keeps nothing
    room    of the member; how often others like it had to be halved is where this begins
    halved  how often a batch was too much for the memory: those after it are smaller by as many halves
    told    is called with the number of requests that were answered just now

    A batch is known by all of its requests and their order, so that an answer is only ever taken for the batch in
    which it was given: padding moves the last bits of a likelihood, and so a tie. That a batch was too much is written
    down too, and what it began with, so that whoever goes on cuts all others as they were cut the first time.
    """

    def __init__(self, file: Path | None = None, room: Room | None = None):
        self.file, self.room = file, room or Room()
        self.halved = self.room.halved
        self.told: Callable[[int], None] = lambda requests: None
        self._known: dict[str, list[Any] | None] = {}
        lines: list[dict[str, Any]] = []
        for line in whole_lines(file) if file else ():
            with suppress(ValueError):  # two machines may have written, if one was cut off and did not know it yet
                lines.append(json.loads(line))
        if lines:
            self.halved = lines[0].get("halved", 0)
        elif file and self.halved:
            append_line(file, canonical({"halved": self.halved}))
        for told in lines:
            if "batch" in told:
                self._known.setdefault(told["batch"], told["answers"])

    def each(self, how: Sequence[str], requests: Sequence[Any], cut: Cut,
             ask: Callable[[list[int]], list[Any]]) -> list[Any]:
        """Answers in the order of the requests; only batches that are not known are asked.

        how  what tells apart those who answer, and what they are asked for
        cut  gives batches of positions of requests, each position in one; where it gives no smaller ones for one more
             half, a batch that is too much raises SuiteError
        """
        answers: dict[int, Any] = {}
        waiting = cut(range(len(requests)), self.halved)
        while waiting:
            batch, *later = waiting
            told = canonical([list(how), [requests[k] for k in batch]])
            key = hashlib.sha256(told.encode(errors="surrogatepass")).hexdigest()
            if key not in self._known:
                found = _asked(ask, batch)
                if found is None:
                    _refuse_what_cannot_shrink(batch, cut([k for some in waiting for k in some], self.halved + 1))
                    self.room.halve()
                self._known[key] = found
                if self.file:
                    append_line(self.file, canonical({"batch": key, "answers": found}))
            known = self._known[key]
            if known is None:
                self.halved += 1
                waiting = cut([k for some in waiting for k in some], self.halved)
            else:
                answers.update(zip(batch, known, strict=True))
                waiting = later
                self.told(len(batch))
        return [answers[k] for k in range(len(requests))]

    def end(self) -> None:
        """Remove the journal, whose answers are kept elsewhere by now, and locks without one; the folder when empty."""
        if self.file:
            self.file.unlink(missing_ok=True)
            for lock in self.file.parent.glob(".*.lock"):
                if not self.file.with_name(lock.name[1:].removesuffix(".lock")).exists():
                    lock.unlink(missing_ok=True)
            with suppress(OSError):
                self.file.parent.rmdir()


def _asked(ask: Callable[[list[int]], list[Any]], batch: list[int]) -> list[Any] | None:
    """The answers, or None where the memory does not suffice."""
    with suppress(torch.OutOfMemoryError):
        return ask(batch)
    emptied()  # not before the error is gone, which holds what filled the memory
    return None


def _refuse_what_cannot_shrink(batch: list[int], smaller: list[list[int]]) -> None:
    if len(smaller[0]) >= len(batch):
        raise SuiteError(f"{len(batch)} requests at once are too much for the memory of the device",
                         fix="say  batch_size: auto,  or a smaller number; a question that does not fit alone needs "
                             "another device")
