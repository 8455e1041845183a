"""One step without a recipe file: the same planner, run, cache and origin as a line of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glue.document import Document
from glue.errors import Place
from glue.plan import Plan
from glue.recipe import Line, Recipe
from glue.run import Watcher, run
from glue.workers import Workers
from glue.zoo import Zoo


def step(zoo: Zoo, name: str, word: str, params: dict[str, Any], workers: Workers, watcher: Watcher,
         *, force: bool = False) -> Plan:
    """Run one step on the zoo; what it leaves is registered as `once/<name>`, which is `plan[name]`.

    force  as of `run`
    """
    doc = Document({}, "command line", {(): Place("command line", 1, 1)})
    recipe = Recipe("once", Path("command line"), (Line("once", name, word, None, 0, (), params, 0, doc),))
    return run(recipe, zoo, workers, watcher, force=force)
