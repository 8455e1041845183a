"""Claims of papers, and what a recipe shows of each."""

from __future__ import annotations

from dataclasses import dataclass, field

from glue.errors import Place
from glue.member import canonical

MEASURES = {"scores": ("better", "than"), "choice": ("refused", "by"), "answers": ("cheaper", "than"),
            "errors": ("nearer", "than"), "traffic": ("lighter", "than"), "families": ("families",)}


@dataclass(frozen=True)
class Show:
    """One thing that a recipe shows.

    recipe   its name, as in recipes/<name>.yaml
    measure  one of MEASURES
    words    the names under each of its keys; several under `than` are averaged, item by item
    """

    recipe: str
    measure: str
    words: tuple[tuple[str, ...], ...]
    place: Place = field(compare=False)

    @property
    def asked(self) -> str:
        """The same as text, by which results are recognised as answers to this very question."""
        return canonical([self.recipe, self.measure, self.words])


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, in our words. Of `shows`, `why_not` and `waits_for` one is not empty.

    key    paper/claim
    known  where it was found
    note   what to keep in mind when reading what was measured
    """

    key: str
    says: str
    known: str
    shows: tuple[Show, ...]
    why_not: str
    waits_for: str
    note: str


@dataclass(frozen=True)
class Paper:
    """One paper or repository. `none` says why it has no claims, where it has none."""

    key: str
    title: str
    source: str
    code: str
    none: str
    claims: tuple[Claim, ...]
