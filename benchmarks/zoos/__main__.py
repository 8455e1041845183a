"""The command line of the benchmark of racing.

    python -m benchmarks.zoos [--seeds 0-9] [--workers 2] [--folder DIR]    trains, searches, writes the page
    python -m benchmarks.zoos --seeds 0-1 --record tests/fixtures           writes score tables for tests instead

A zoo that is there already is not trained again, and a run that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.speed.machine import commit, machine
from benchmarks.zoos.compare import Compared, compare
from benchmarks.zoos.page import markdown
from benchmarks.zoos.record import record
from glue.errors import GlueError
from glue.files import write_aside
from glue.recipe import Recipe, read_recipe
from glue.run import run
from glue.show.terminal import progress
from glue.workers import Workers
from glue.zoo import Zoo

ROOT = Path(__file__).parents[2]
RECIPE = Path(__file__).parent / "racing.yaml"
FAMILY = "A"  # of the tiny zoo


def main(words: list[str] | None = None) -> int:
    """Run the recipe with one seed after the other; the page is written after each. 2 where a word is wrong."""
    given = _parser().parse_args(words)
    try:
        given.folder.mkdir(parents=True, exist_ok=True)
        file = given.folder / "zoo.yaml"
        if not file.exists():
            file.write_text("members: {}\ninclude: zoo/members.yaml\n")
        done: list[Compared] = []
        for seed in given.seeds:
            with Workers(given.workers) as workers, progress(given.quiet) as watcher:
                plan = run(recipe(seed), Zoo(file), workers, watcher)
            done.append(compare(plan))
            if given.record:
                record(plan, given.record)
            else:
                write_aside(given.page, markdown(done, {**machine(given.folder), "commit": commit(ROOT)}))
            print(f"seed {seed}: {'reached' if done[-1].reached else 'NOT reached'}, {done[-1].share:.1%}", flush=True)
    except GlueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def recipe(seed: int) -> Recipe:
    """Of the tiny zoo one family and its datasets, and the searches."""
    whole = read_recipe(RECIPE, seed=seed)
    wanted = [line for line in whole.lines if line.recipe == whole.name or FAMILY in line.tags]
    words = {word for line in wanted for value in line.params.values() if isinstance(value, list | dict)
             for word in value}
    return replace(whole, lines=tuple(line for line in whole.lines if line in wanted or line.name in words))


def _seeds(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoos", description="Racing against the grid.")
    parser.add_argument("--seeds", type=_seeds, default=_seeds("0-9"), help="of the zoos: 0-9, or one")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "glue-zoos",
                        help="where zoos are made and kept")
    parser.add_argument("--page", type=Path, default=ROOT / "benchmarks/boards/racing.md", help="what is written")
    parser.add_argument("--record", type=Path, help="a folder for score tables that tests can search")
    parser.add_argument("--quiet", action="store_true", help="without bars")
    return parser


if __name__ == "__main__":
    sys.exit(main())
