"""The state of a training, kept now and then, so that one that was killed goes on to the same bits."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from glue.checkpoint import Checkpoint, Header, weights_digest
from glue.errors import GlueError, one_line
from glue.files import write_aside
from glue.member import canonical
from glue.writer import Writer

STATE = "state.json"  # names the newest whole state


class State(NamedTuple):
    """What the next step depends on, beside what the caller can make again from its own settings.

    step     how many are done
    tensors  what trains, the moments of its optimizer, the state of random numbers
    told     what is not a tensor: the curve so far, in how many pieces a batch is read
    """

    step: int
    tensors: Mapping[str, Tensor]
    told: Mapping[str, Any]


class Kept:
    """A place for the state of one training.

    folder  nobody else's; it need not be there yet
    key     of all that the training's bits depend on: a state with another key is not gone on with
    every   seconds from one state to the next, and so what a kill can cost; where it takes longer than a tenth of that
            to write one, ten times as long. 0 keeps every step
    unused  why a state that was there cannot be gone on with; empty where there was none
    """

    def __init__(self, folder: Path, key: str, every: float):
        self.folder, self.key, self.every = folder, key, every
        self.unused = ""
        self._last, self._took = time.monotonic(), 0.0

    @property
    def due(self) -> bool:
        """Whether it is time to keep the next state."""
        return not self.every or time.monotonic() - self._last >= max(self.every, 10 * self._took)

    def keep(self, state: State) -> None:
        """Write a state beside the last one, which is removed once this one is whole and synced."""
        began, place = time.monotonic(), f"{state.step:09d}"
        self.put(STATE, place, state.tensors, state.told)
        for other in self.folder.iterdir():
            if other.name.isdigit() and other.name != place:
                shutil.rmtree(other)
        self._last = time.monotonic()
        self._took = self._last - began

    def found(self) -> State | None:
        """The state that an earlier training has left here; None, and the reason in `unused`, where it is no use."""
        place, tensors, told = self.got(STATE) or ("", {}, {})
        return State(int(place), tensors, told) if place.isdigit() else None

    def put(self, note: str, place: str, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> None:
        """Write tensors into a folder here, and then a note that tells of them; until then the note before counts."""
        shutil.rmtree(self.folder / place, ignore_errors=True)
        (self.folder / place).mkdir(parents=True)
        headers = {name: Header(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with Writer(self.folder / place, headers) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor.detach().cpu())
            digest = writer.close()
        text = canonical({"key": self.key, "place": place, "digest": digest, "told": told})
        write_aside(self.folder / note, f"{sha256(text.encode()).hexdigest()}\n{text}")

    def got(self, note: str) -> tuple[str, Mapping[str, Tensor], dict[str, Any]] | None:
        """The folder, the tensors and what was told; None, and the reason in `unused`, where they are no use."""
        try:
            total, _, text = (self.folder / note).read_text(encoding="utf-8").partition("\n")
            if sha256(text.encode()).hexdigest() != total:
                self.unused = f"{note} is damaged"
                return None
            record = json.loads(text)
            if record["key"] != self.key:
                self.unused = "it is of a training with other data or settings"
                return None
            tensors = Checkpoint(self.folder / record["place"])
            if weights_digest(tensors) != record["digest"]:
                self.unused = "its tensors are damaged"
                return None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError, GlueError) as problem:
            self.unused = f"it is damaged: {one_line(str(problem), 120)}"
            return None
        return record["place"], tensors, record["told"]

    def end(self) -> None:
        """Remove it: the training's product is there."""
        shutil.rmtree(self.folder, ignore_errors=True)
