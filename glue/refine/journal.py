"""The journal of a game: the value of each subset that was asked, one a line, so that none is asked twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from glue.files import append_line, whole_lines
from glue.member import canonical


class Journal:
    """Values of subsets in a file that is only appended to, under a key each.

    file     may be shared by several games; a torn last line, left by a kill, is left out and written again
    context  everything that values depend on besides the subset; values of another context are not seen
    """

    def __init__(self, file: Path, context: str):
        self.file, self.context = file, context
        self._lock = threading.Lock()
        told = [json.loads(line) for line in whole_lines(file)]
        self._known: dict[str, float] = {}
        for line in told:
            self._known.setdefault(line["key"], line["value"])

    def key(self, subset: Iterable[int]) -> str:
        """What a subset is written down under."""
        return sha256(canonical([self.context, sorted(subset)]).encode()).hexdigest()[:32]

    def get(self, subset: Iterable[int]) -> float | None:
        """The value of a subset, if it is known."""
        return self._known.get(self.key(subset))

    def add(self, subset: frozenset[int], value: float) -> None:
        """Write a value down, at once; one that is known already is left as it is."""
        key = self.key(subset)
        with self._lock:
            if key not in self._known:
                append_line(self.file, canonical({"key": key, "size": len(subset), "value": value}))
                self._known[key] = value
