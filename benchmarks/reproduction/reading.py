"""claims.yaml, read strictly: papers, what each claims, and where a recipe shows it.

    model-glue:
      title: ...
      source: arXiv:2410.05357
      claims:
        beats-best: {says: ..., known: read, show: {recipe: quickstart, better: glued, than: best-single}}
        at-7b:      {says: ..., known: read, why_not: ...}
        later:      {says: ..., known: read, waits_for: ...}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.reproduction.claims import MEASURES, Claim, Paper, Show
from glue import document
from glue.document import Document
from glue.errors import GlueError, Mistakes, RecipeError, did_you_mean, one_line

KNOWN = ("read", "code", "second hand", "recalled")  # where a claim was found; see the head of claims.yaml
PAPER = ("title", "source", "code", "claims", "none")
ENDS = ("show", "why_not", "waits_for")  # a claim has one of them


def read_claims(file: Path) -> tuple[Paper, ...]:
    """All papers in their order. Raises Mistakes with everything that is wrong, each with its line."""
    doc = document.read(file, RecipeError, file.name)
    reader = _Reader(doc)
    papers = tuple(reader.papers())
    if reader.errors:
        raise Mistakes(reader.errors)
    return papers


class _Reader:
    def __init__(self, doc: Document):
        self.doc, self.errors = doc, list[GlueError]()

    def wrong(self, what: str, *path: str | int, fix: str = "") -> None:
        self.errors.append(RecipeError(one_line(what), fix=fix, place=self.doc.place(*path)))

    def papers(self) -> Iterator[Paper]:
        for key, told in self.mapping(self.doc.value, None, "a paper by its key").items():
            told = self.mapping(told, PAPER, "a paper", key)
            claims = told.get("claims")
            if (claims is None) == ("none" not in told):
                self.wrong("a paper has either 'claims' or 'none', which says why it has none", key)
            found = self.mapping(claims, None, "a claim by its key", key, "claims") if claims is not None else {}
            yield Paper(key, self.text(told, "title", key), self.text(told, "source", key),
                        self.text(told, "code", key, default=""), self.text(told, "none", key, default=""),
                        tuple(self.claim(name, claim, key, "claims", name) for name, claim in found.items()))

    def claim(self, name: str, told: Any, *at: str | int) -> Claim:
        told = self.mapping(told, ("says", "known", "note", *ENDS), "a claim", *at)
        ends = [end for end in ENDS if end in told]
        if len(ends) != 1:
            self.wrong(f"a claim has one of {', '.join(ENDS)}; this one has {' and '.join(ends) or 'none'}", *at)
        known = self.text(told, "known", *at)
        if known not in KNOWN and "known" in told:
            self.wrong(f"'{known}' is no way to know a claim{did_you_mean(known, KNOWN)}", *at, "known")
        shows = told.get("show", [])
        several = isinstance(shows, list)
        found = [self.show(one, *at, "show", *((k,) if several else ()))
                 for k, one in enumerate(shows if several else [shows])]
        if "show" in told and not found:
            self.wrong("'show' says nothing", *at, "show", fix="write  show: {recipe: NAME, better: ONE, than: OTHER}")
        return Claim(f"{at[0]}/{name}", self.text(told, "says", *at), known, tuple(one for one in found if one),
                     self.text(told, "why_not", *at, default=""), self.text(told, "waits_for", *at, default=""),
                     self.text(told, "note", *at, default=""))

    def show(self, told: Any, *at: str | int) -> Show | None:
        keys = tuple(dict.fromkeys(key for pair in MEASURES.values() for key in pair))
        before = len(self.errors)
        told = self.mapping(told, ("recipe", *keys), "what is shown", *at)
        recipe = self.text(told, "recipe", *at)
        measure = next((word for word, pair in MEASURES.items() if set(pair) == set(told) - {"recipe"}), "")
        if not measure and len(self.errors) == before:
            self.wrong("it is not said what is measured", *at,
                       fix=f"write {', or '.join(' and '.join(keys) for keys in MEASURES.values())}")
        if len(self.errors) > before:
            return None
        words = tuple(self.words(told, key, *at) for key in MEASURES[measure])
        return Show(recipe, measure, words, self.doc.place(*at))

    def words(self, told: Mapping[str, Any], key: str, *at: str | int) -> tuple[str, ...]:
        value = told[key]
        several = value if isinstance(value, list) and value and key == "than" else [value]
        if not all(isinstance(word, str) for word in several):
            self.wrong(f"'{key}' is the name of a member, not {value}", *at, key)
        return tuple(map(str, several))

    def mapping(self, told: Any, keys: tuple[str, ...] | None, noun: str, *at: str | int) -> dict[str, Any]:
        if not isinstance(told, dict):
            self.wrong(f"{noun} is a mapping", *at)
            return {}
        for key in told if keys else ():
            if key not in (keys or ()):
                self.wrong(f"{noun} has no key '{key}'{did_you_mean(key, keys or ())}", *at, key)
        return told

    def text(self, told: Mapping[str, Any], key: str, *at: str | int, default: str | None = None) -> str:
        value = told.get(key, default)
        if not isinstance(value, str) or (key in told and not value.strip()):
            self.wrong(f"'{key}' is missing" if value is None else f"'{key}' is text", *at, key)
            return ""
        return " ".join(value.split())
