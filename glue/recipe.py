"""Recipes: a YAML file of steps, read and checked for grammar only; every word keeps its place.

    seed: 0                          added to the seed of every line
    device: cuda                     for every line whose step has this parameter and that does not say it itself;
                                     so too  dtype:  and  batch_size:
    include: tiny_zoo.yaml           recipes whose steps come first
    steps:
      - {as: merged, step: merge, members: [tag:tiny], method: {ties: {density: 0.5}}}

The keys `as step each seed tags` belong to every line; all others are parameters of the step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glue import document
from glue.document import Document
from glue.errors import GlueError, Mistakes, Place, RecipeError, did_you_mean, one_line

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
NAME_RULE = "a name has up to 100 letters, digits and . _ + - and starts with a letter or digit"
SEEDS = range(2**32)
INCLUDES = 20  # how deep recipes may include each other
WIDE = ("device", "dtype", "batch_size")  # words for all lines that know them
TOP = ("about", "seed", *WIDE, "include", "steps", "board", "full")
LINE = ("as", "step", "each", "seed", "tags")
BOARD = ("table", "headline", "claims")
FULL = ("seeds",)


@dataclass(frozen=True)
class Line:
    """One step of a recipe as it was written.

    recipe  name of the recipe it stands in; its product is called recipe/name
    params  the step's own keys, unchecked
    wide    what is said for all lines, unchecked, and means nothing to steps that do not know it
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
    wide: dict[str, Any] = field(default_factory=dict)

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


def read_recipe(file: str | Path, *, seed: int | None = None, wide: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe and its includes. Raises Mistakes with everything that is wrong with the grammar.

    seed  replaces the recipe's own (not those of its lines, which are added to it). An include has the seed of the
          recipe that includes it, or its own where that one says none.
    wide  device, dtype and batch_size in place of the recipe's own; an include has them as it has a seed
    """
    if seed is not None and seed not in SEEDS:
        raise RecipeError(f"a seed lies between 0 and {SEEDS[-1]}, not at {seed}")
    return _read(Path(file), seed, dict(wide or {}), (), {})


_Memory = dict[tuple[Path, int | None, str], Recipe | None]  # by file and what it is told; None: told as mistakes


def _read(file: Path, seed: int | None, wide: dict[str, Any], above: tuple[Path, ...], memory: _Memory) -> Recipe:
    doc = document.read(file, RecipeError)
    errors: list[GlueError] = []
    wrong = _Wrong(doc, errors)
    top = doc.value
    if not isinstance(top, dict):
        raise Mistakes([RecipeError("a recipe is a mapping with the key 'steps'", place=doc.place(),
                                    fix="write  steps:  and lines such as  - {as: ..., step: ...}")])
    for key in top:
        if key not in TOP:
            wrong(f"a recipe has no key '{key}'{did_you_mean(key, TOP)}", key)
    name = file.stem
    if not NAME.fullmatch(name):
        wrong(f"the file name '{file.name}' cannot name products: {NAME_RULE}")
    own_seed = wrong.seed(top)
    own_seed = seed if seed is not None else own_seed
    wide = {**{key: top[key] for key in WIDE if key in top}, **wide}
    for key, value in wide.items():
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            wrong(f"'{key}' is one word or number, for all lines", key, fix=f"write what a step takes as {key}")
    below = seed if seed is not None or "seed" not in top else own_seed
    lines = _included(wrong, file, top, below, wide, above, memory)
    steps = top.get("steps")
    if not isinstance(steps, list) or not steps:
        wrong("a recipe needs 'steps', a list", "steps", fix="write  steps:  and lines such as  - {as: ..., step: ...}")
        steps = []
    for k, entry in enumerate(steps):
        line = _line(wrong, name, k, entry, own_seed, wide)
        if line is None:
            continue
        if first := next((other for other in lines if other.product == line.product), None):
            wrong(f"'as: {line.name}' stands twice, first at {first.place('as')}", "steps", k, "as",
                  fix="give one of the two another name")
        lines.append(line)
    board = _board(wrong, top.get("board"), [line.name for line in lines if line.recipe == name])
    full = top.get("full") or {}
    seeds = full.get("seeds", []) if isinstance(full, dict) and set(full) <= set(FULL) else None
    if not isinstance(seeds, list) or not all(type(item) is int and item in SEEDS for item in seeds):
        wrong("'full' is a mapping with the key 'seeds' alone, a list of whole numbers", "full",
              fix="write  full: {seeds: [0, 1]}")
        seeds = []
    about = wrong.typed(top, "about", str, "")
    if errors:
        raise Mistakes(errors)
    return Recipe(name, file, tuple(lines), about, own_seed, board, tuple(seeds))


def _included(wrong: _Wrong, file: Path, top: dict[str, Any], seed: int | None, wide: dict[str, Any],
              above: tuple[Path, ...], memory: _Memory) -> list[Line]:
    """The lines of all includes; of a file that is included twice, once."""
    lines: list[Line] = []
    includes = top.get("include") or []
    includes = [includes] if isinstance(includes, str) else includes
    if not isinstance(includes, list) or not all(isinstance(other, str) and other.isprintable() for other in includes):
        wrong("'include' is the path of a recipe, or a list of them", "include", fix="write  include: tiny_zoo.yaml")
        return lines
    above = (*above, file.resolve())
    for k, other in enumerate(includes):
        path = (file.parent / other).resolve()
        if path in above:
            wrong(f"'{other}' includes itself", "include", k, fix="one of the two has to go without the other")
            continue
        if len(above) > INCLUDES:
            wrong(f"recipes include each other more than {INCLUDES} deep", "include", k)
            continue
        try:
            if (key := (path, seed, json.dumps(wide, sort_keys=True))) not in memory:
                memory[key] = None
                memory[key] = _read(file.parent / other, seed, wide, above, memory)
        except GlueError as found:
            wrong.errors += found.errors if isinstance(found, Mistakes) else [found.at(wrong.doc.place("include", k))]
        recipe = memory[path, seed, json.dumps(wide, sort_keys=True)]
        for line in recipe.lines if recipe else ():
            first = next((known for known in lines if known.product == line.product), None)
            if first is None:
                lines.append(line)
            elif Path(first.document.file).resolve() != Path(line.document.file).resolve():
                wrong(f"'{line.product}' would be made twice, at {first.place('as')} and at {line.place('as')}",
                      "include", k, fix="give one of the two files another name")
    return lines


class _Wrong:
    """Collects mistakes with their places."""

    def __init__(self, doc: Document, errors: list[GlueError]):
        self.doc, self.errors = doc, errors

    def __call__(self, what: str, *path: str | int, fix: str = "") -> None:
        self.errors.append(RecipeError(one_line(what), fix=fix, place=self.doc.place(*path)))

    def typed(self, entry: dict[str, Any], key: str, kind: type, default: Any, *path: str | int) -> Any:
        value = entry.get(key, default)
        if type(value) is not kind and value is not default:
            words = {int: "a whole number", str: "a word", list: "a list"}[kind]
            self(f"'{key}' must be {words}, not {json.dumps(value, ensure_ascii=False)}", *path, key)
            return default
        return value

    def seed(self, entry: dict[str, Any], *path: str | int) -> int:
        value = self.typed(entry, "seed", int, 0, *path)
        if value not in SEEDS:
            self(f"a seed lies between 0 and {SEEDS[-1]}, not at {value}", *path, "seed")
        return value


def _line(wrong: _Wrong, recipe: str, k: int, entry: Any, seed: int, wide: dict[str, Any]) -> Line | None:
    at = ("steps", k)
    if not isinstance(entry, dict):
        wrong("a step is a mapping with at least the keys 'as' and 'step'", *at,
              fix="write  - {as: name, step: merge, ...}")
        return None
    before = len(wrong.errors)
    for key in ("as", "step"):
        if key not in entry:
            near = did_you_mean(key, entry) if set(entry) - {"as", "step"} else ""
            wrong(f"this step has no '{key}'{near if 'mean' in near else ''}", *at,
                  fix="write  - {as: name, step: merge, ...}")
    name, step = wrong.typed(entry, "as", str, "", *at), wrong.typed(entry, "step", str, "", *at)
    if isinstance(entry.get("as"), str) and not NAME.fullmatch(name):
        wrong(f"'{name}' cannot be a name: {NAME_RULE}", *at, "as",
              fix="products are stored under their names, so a name is no path")
    each = wrong.typed(entry, "each", str, None, *at)
    own = wrong.seed(entry, *at)
    tags = wrong.typed(entry, "tags", list, [], *at)
    if not all(isinstance(tag, str) and NAME.fullmatch(tag) for tag in tags):
        wrong(f"tags are a list of words; {NAME_RULE}", *at, "tags")
    if len(wrong.errors) > before:
        return None
    params = {key: value for key, value in entry.items() if key not in LINE}
    return Line(recipe, name, step, each, seed + own, tuple(tags), params, k, wrong.doc, wide)


def _board(wrong: _Wrong, entry: Any, names: list[str]) -> Board | None:
    if entry is None:
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("table"), str):
        wrong("'board' is a mapping with the key 'table', the name of an evaluate line", "board")
        return None
    for key in entry:
        if key not in BOARD:
            wrong(f"a board has no key '{key}'{did_you_mean(key, BOARD)}", "board", key)
    if entry["table"] not in names:
        wrong(f"no line of this recipe is called '{entry['table']}'{did_you_mean(entry['table'], names)}",
              "board", "table")
    headline = wrong.typed(entry, "headline", str, None, "board")
    claims = entry.get("claims") or []
    for k, claim in enumerate(claims if isinstance(claims, list) else [claims]):
        if not isinstance(claim, dict) or set(claim) not in ({"better", "than"}, {"refused", "by"}) \
                or not all(isinstance(value, str) for value in claim.values()):
            wrong("a claim is {better: name, than: name} or {refused: name, by: name}", "board", "claims", k)
            claims = []
    return Board(entry["table"], headline, tuple(claims), wrong.doc.place("board"))
