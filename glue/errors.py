"""The tree of errors, and how each is worded: where, what, why, and the fix.

    GlueError              anything a user can cause; the command line prints it without a traceback, exit code 2
    ├── RecipeError        the words of a recipe
    ├── ZooError           zoo.yaml, the register of products, a member that is not there
    │   └── NotHere        a member of the hub that is not on this machine
    ├── CheckpointError    weight files
    ├── MethodError        a registered method and its parameters
    ├── SuiteError         a suite, its task files and its data
    └── RunError           a task that failed while it ran; the run can be resumed
        └── Unreachable    the hub, which cannot be asked at all
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import NamedTuple


class Place(NamedTuple):
    """A position in a file; line and column count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class GlueError(Exception):
    """What went wrong, the place it came from, and what to do about it."""

    def __init__(self, what: str, *, fix: str = "", place: Place | None = None):
        super().__init__(what)
        self.what, self.fix, self.place = what, fix, place

    def __str__(self) -> str:
        where = f"{self.place}: " if self.place else ""
        fix = f"\n  {self.fix}" if self.fix else ""
        return f"{where}{self.what}{fix}"

    def __reduce__(self):  # everything an error carries survives the trip from a worker process
        return _rebuild, (type(self), self.what), self.__dict__

    def at(self, place: Place | None) -> GlueError:
        """The same error with a place, unless it has one already."""
        self.place = self.place or place
        return self


class RecipeError(GlueError):
    """The words of a recipe."""


class ZooError(GlueError):
    """zoo.yaml, the register of products, or a member that is not there."""


class NotHere(ZooError):
    """A member of the hub that is not on this machine.

    command  what gets it             ours  a command of glue that gets it too
    part     what of it is missing, if not all
    """

    def __init__(self, name: str, command: str, *, ours: str = "", part: str = ""):
        super().__init__(f"only a part of {name} is on this machine: {part} is missing" if part
                         else f"{name} is not on this machine",
                         fix=f"get it with  {ours}  or  {command}" if ours else f"get it with  {command}")
        self.command, self.part = command, part


class CheckpointError(GlueError):
    """Weight files: damaged, unsafe or not what their header says."""


class MethodError(GlueError):
    """A registered method and its parameters. `loc` is the path of keys to the word that is wrong."""

    loc: tuple[str | int, ...] = ()


class SuiteError(GlueError):
    """A suite, its task files and its data."""


class RunError(GlueError):
    """A task that failed while it ran; what was finished is kept."""


class Unreachable(RunError):
    """The hub cannot be asked at all, or does not go on answering."""


class Mistakes(GlueError):
    """Everything that is wrong with one file, worded one after the other."""

    def __init__(self, errors: list[GlueError]):
        super().__init__("\n".join(str(error) for error in errors))
        self.errors = errors

    def at(self, place: Place | None) -> Mistakes:
        """The same mistakes, each with a place."""
        return Mistakes([error.at(place) for error in self.errors])


def _rebuild(kind: type[GlueError], what: str) -> GlueError:
    return kind.__new__(kind, what)


def one_line(text: str, limit: int = 300) -> str:
    """Text that came from a file, made fit for an error: no line breaks or terminal codes, and not without end."""
    plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:limit + 1])
    return plain if len(plain) <= limit else plain[:limit - 3] + "..."


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, or all of them where they are few."""
    words = sorted(set(known))
    ends = [full for full in words if full.rsplit("/", 1)[-1] == word]
    near = ends[:1] if len(ends) == 1 else get_close_matches(str(word), words, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    if not words:
        return ""
    listed = ", ".join(words[:12]) + (", ..." if len(words) > 12 else "")
    return f"; known: {listed}"
