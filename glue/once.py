"""One step without a recipe file: the same planner, run, cache and origin as a line of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glue.document import Document
from glue.errors import Place
from glue.member import Member, Table
from glue.recipe import Line, Recipe
from glue.run import Watcher, run
from glue.workers import Workers
from glue.zoo import Zoo


def measured(zoo: Zoo, members: list[str], suite: str, workers: Workers, watcher: Watcher) -> tuple[Member, Table]:
    """Members measured on a suite: the table member and its rows."""
    member = step(zoo, "scores", "evaluate", {"members": members, "suite": suite}, workers, watcher)
    return member, Table.read(member)


def step(zoo: Zoo, name: str, word: str, params: dict[str, Any], workers: Workers, watcher: Watcher) -> Member:
    """Run one step on the zoo and return what it left, registered as `once/<name>`."""
    doc = Document({}, "command line", {(): Place("command line", 1, 1)})
    recipe = Recipe("once", Path("command line"), (Line("once", name, word, None, 0, (), params, 0, doc),))
    return run(recipe, zoo, workers, watcher)[name]
