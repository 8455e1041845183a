"""Whether what claims name is there: the recipe, the line in it, and the row on its board."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.reproduction.claims import Paper, Show
from glue.errors import GlueError, RecipeError, did_you_mean
from glue.recipe import Line, Recipe, read_recipe


def recipe_file(root: Path, name: str) -> Path:
    """Where a recipe lies that a claim names."""
    return root / "recipes" / f"{name}.yaml"


def missing(papers: Iterable[Paper], root: Path) -> list[GlueError]:
    """Everything that claims name and that no recipe has, each with the claim's line."""
    known: dict[str, Recipe | None] = {}
    errors: list[GlueError] = []
    for show in (show for paper in papers for claim in paper.claims for show in claim.shows):
        if show.recipe not in known:
            file = recipe_file(root, show.recipe)
            known[show.recipe] = read_recipe(file) if file.is_file() else None
        recipe = known[show.recipe]
        problems = [f"there is no recipe '{show.recipe}'"] if recipe is None else _problems(show, recipe)
        errors += [RecipeError(problem, place=show.place) for problem in problems]
    return errors


def _problems(show: Show, recipe: Recipe) -> Iterator[str]:
    lines = {line.name: line for line in recipe.lines}
    for k, words in enumerate(show.words):
        for word in words:
            head, _, element = word.partition("/")
            line = lines.get(head)
            if line is None:
                yield f"{recipe.name} has no line '{head}'{did_you_mean(head, lines)}"
            elif bool(element) != bool(line.each):
                yield f"'{head}' is {'one for each family: say which' if line.each else 'one member, without elements'}"
            elif element and element not in lines:
                yield f"{recipe.name} has no member '{element}'{did_you_mean(element, lines)}"
            elif (needed := _steps(show.measure, k)) and line.step not in needed:
                yield f"'{head}' is made by step {line.step}, and a step {' or '.join(needed)} is asked about"
            elif show.measure == "scores" and not (recipe.board and
                                                   _among(word, lines[recipe.board.table].params["members"], lines)):
                yield f"the board of {recipe.name} has no row '{word}'"


def _steps(measure: str, k: int) -> tuple[str, ...]:
    """The steps that make what stands under the k-th key of a measure; none where any may."""
    return {"families": ("cluster",), "answers": ("search",), "choice": ("search",) if k == 1 else (),
            "errors": ("federate",), "traffic": ("federate", "kseed")}.get(measure, ())


def _among(word: str, named: Sequence[Any], lines: dict[str, Line]) -> bool:
    """Whether a list of members has this one: by name, as part of a group, by tag, or in a family."""
    head = word.partition("/")[0]
    for entry in named:
        entry = entry["group"] if isinstance(entry, dict) else entry
        if entry in (word, head) or (entry.startswith("tag:") and entry[4:] in lines[head].tags):
            return True
        if entry in lines and lines[entry].step == "cluster" and _among(word, lines[entry].params["members"], lines):
            return True
    return False
