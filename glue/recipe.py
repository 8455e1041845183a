"""Recipes: a YAML file of steps, read and checked for grammar only; every word keeps its place.

    seed: 0                          added to the seed of every line
    include: tiny_zoo.yaml           recipes whose steps come first
    steps:
      - {as: merged, step: merge, members: [tag:tiny], method: {ties: {density: 0.5}}}

The keys `as step each seed tags` belong to every line; all others are parameters of the step.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glue import document
from glue.document import Document
from glue.errors import GlueError, Mistakes, Place, RecipeError, did_you_mean

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
TOP = ("about", "seed", "include", "steps", "board", "full")
LINE = ("as", "step", "each", "seed", "tags")
BOARD = ("table", "headline", "claims")
CLAIM = ("better", "than", "refused", "by")


@dataclass(frozen=True)
class Line:
    """One step of a recipe as it was written.

    recipe  name of the recipe it stands in; its product is called recipe/name
    params  the step's own keys, unchecked
    """

    recipe: str
    name: str
    step: str
    each: str | None
    seed: int
    tags: tuple[str, ...]
    params: dict[str, Any]
    index: int
    document: Document = field(repr=False)

    @property
    def product(self) -> str:
        return f"{self.recipe}/{self.name}"

    def place(self, *path: str | int) -> Place:
        """Where a key of this line stands."""
        return self.document.place("steps", self.index, *path)


@dataclass(frozen=True)
class Board:
    """What a recipe shows when it is done.

    table     the line whose scores are shown         headline  the member that the last line is about
    claims    (better, than) pairs whose difference is shown with its interval; (refused, by) pairs
    """

    table: str
    headline: str | None
    claims: tuple[dict[str, str], ...]
    place: Place


@dataclass(frozen=True)
class Recipe:
    """The lines of a recipe, those of its includes first."""

    name: str
    file: Path
    lines: tuple[Line, ...]
    about: str = ""
    seed: int = 0
    board: Board | None = None
    full_seeds: tuple[int, ...] = ()


def read_recipe(file: str | Path, *, seed: int | None = None) -> Recipe:
    """Read a recipe and its includes. Raises Mistakes with everything that is wrong with the grammar.

    seed  replaces the recipe's own (not those of its lines, which are added to it)
    """
    return _read(Path(file), seed, ())


def _read(file: Path, seed: int | None, above: tuple[Path, ...]) -> Recipe:
    doc = document.read(file, RecipeError)
    errors: list[GlueError] = []
    wrong = _Wrong(doc, errors)
    top = doc.value if isinstance(doc.value, dict) else {}
    if not isinstance(doc.value, dict):
        wrong("a recipe is a mapping with the key 'steps'", fix="see recipes/quickstart.yaml for an example")
    for key in top:
        if key not in TOP:
            wrong(f"a recipe has no key '{key}'{did_you_mean(key, TOP)}", key)
    name = file.stem
    if not NAME.fullmatch(name):
        wrong(f"the file name '{file.name}' cannot name products: {NAME_RULE}")
    own_seed = seed if seed is not None else wrong.typed(top, "seed", int, 0)
    lines: list[Line] = []
    includes = top.get("include") or []
    for k, other in enumerate([includes] if isinstance(includes, str) else includes):
        path = (file.parent / str(other)).resolve()
        if path in (*above, file.resolve()):
            wrong(f"'{other}' includes itself", "include", k)
            continue
        try:
            lines += [line for line in _read(file.parent / str(other), own_seed, (*above, file.resolve())).lines
                      if line.product not in {known.product for known in lines}]
        except Mistakes as found:
            errors += found.errors
        except GlueError as found:
            errors.append(found.at(doc.place("include")))
    steps = top.get("steps")
    if not isinstance(steps, list) or not steps:
        wrong("a recipe needs 'steps', a list", "steps", fix="write  steps:  and lines such as  - {as: ..., step: ...}")
        steps = []
    for k, entry in enumerate(steps):
        line = _line(wrong, name, k, entry, own_seed)
        if line is None:
            continue
        if any(other.product == line.product for other in lines):
            first = next(other for other in lines if other.product == line.product)
            wrong(f"'as: {line.name}' stands twice, first in line {first.place('as').line}", "steps", k, "as",
                  fix="give one of the two another name")
        lines.append(line)
    board = _board(wrong, top.get("board"), [line.name for line in lines if line.recipe == name])
    full = top.get("full") or {}
    seeds = full.get("seeds", []) if isinstance(full, dict) else None
    if not isinstance(seeds, list) or not all(type(item) is int for item in seeds):
        wrong("'full' is a mapping with the key 'seeds', a list of whole numbers", "full")
        seeds = []
    if errors:
        raise Mistakes(errors)
    return Recipe(name, file, tuple(lines), str(top.get("about", "")), own_seed, board, tuple(seeds))


NAME_RULE = "a name has letters, digits and . _ + - and starts with a letter or digit"


class _Wrong:
    """Collects mistakes with their places."""

    def __init__(self, doc: Document, errors: list[GlueError]):
        self.doc, self.errors = doc, errors

    def __call__(self, what: str, *path: str | int, fix: str = "") -> None:
        self.errors.append(RecipeError(what, fix=fix, place=self.doc.place(*path)))

    def typed(self, entry: dict[str, Any], key: str, kind: type, default: Any, *path: str | int) -> Any:
        value = entry.get(key, default)
        if type(value) is not kind and value is not default:
            words = {int: "a whole number", str: "a word", list: "a list"}[kind]
            self(f"'{key}' must be {words}, not {value!r}", *path, key)
            return default
        return value


def _line(wrong: _Wrong, recipe: str, k: int, entry: Any, seed: int) -> Line | None:
    at = ("steps", k)
    if not isinstance(entry, dict):
        wrong("a step is a mapping with at least the keys 'as' and 'step'", *at,
              fix="write  - {as: name, step: merge, ...}")
        return None
    before = len(wrong.errors)
    for key in ("as", "step"):
        if key not in entry:
            near = did_you_mean(key, entry) if set(entry) - {"as", "step"} else ""
            wrong(f"this step has no '{key}'{near if 'mean' in near else ''}", *at, fix="write  - {as: name, step: merge, ...}")
    name, step = wrong.typed(entry, "as", str, "", *at), wrong.typed(entry, "step", str, "", *at)
    if name and not NAME.fullmatch(name):
        wrong(f"'{name}' cannot be a name: {NAME_RULE}", *at, "as",
              fix="products are stored under their names, so a name is no path")
    each = wrong.typed(entry, "each", str, None, *at)
    own = wrong.typed(entry, "seed", int, 0, *at)
    tags = wrong.typed(entry, "tags", list, [], *at)
    if not all(isinstance(tag, str) and NAME.fullmatch(tag) for tag in tags):
        wrong(f"tags are a list of words; {NAME_RULE}", *at, "tags")
    if len(wrong.errors) > before:
        return None
    params = {key: value for key, value in entry.items() if key not in LINE}
    return Line(recipe, name, step, each, seed + own, tuple(tags), params, k, wrong.doc)


def _board(wrong: _Wrong, entry: Any, names: list[str]) -> Board | None:
    if entry is None:
        return None
    if not isinstance(entry, dict) or "table" not in entry:
        wrong("'board' is a mapping with the key 'table', the name of an evaluate line", "board")
        return None
    for key in entry:
        if key not in BOARD:
            wrong(f"a board has no key '{key}'{did_you_mean(key, BOARD)}", "board", key)
    if entry["table"] not in names:
        wrong(f"no line of this recipe is called '{entry['table']}'{did_you_mean(entry['table'], names)}",
              "board", "table")
    claims = entry.get("claims") or []
    for k, claim in enumerate(claims if isinstance(claims, list) else [claims]):
        if not isinstance(claim, dict) or set(claim) not in ({"better", "than"}, {"refused", "by"}) \
                or not all(isinstance(value, str) for value in claim.values()):
            wrong("a claim is {better: name, than: name} or {refused: name, by: name}", "board", "claims", k)
            claims = []
    return Board(str(entry["table"]), entry.get("headline"), tuple(claims), wrong.doc.place("board"))
