"""The command line of the table of claims.

    python -m benchmarks.reproduction run [--seeds 0 7 14] [--recipes NAME ...] [--zoo zoo.yaml] [--workers 2]
                                              runs the recipes that claims name, writes results.json and the page
    python -m benchmarks.reproduction table   writes docs/reproduction.md from claims.yaml and results.json
    python -m benchmarks.reproduction table --check     writes nothing; 1 where the page is out of date, 2 where a
                                              claim names what is not there

What a zoo has is not made again, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.reproduction.claims import Paper
from benchmarks.reproduction.exists import missing, recipe_file
from benchmarks.reproduction.measure import Measured, measure
from benchmarks.reproduction.page import markdown
from benchmarks.reproduction.reading import read_claims
from benchmarks.reproduction.results import noted, read_results, write_results
from glue.errors import GlueError, Mistakes
from glue.files import write_aside
from glue.recipe import read_recipe
from glue.run import run
from glue.show.terminal import progress
from glue.workers import Workers
from glue.zoo import Zoo

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CLAIMS, RESULTS, PAGE = HERE / "claims.yaml", HERE / "results.json", ROOT / "docs" / "reproduction.md"


def main(words: list[str] | None = None) -> int:
    """Run or write; 1 where the page is out of date, 2 where a word is wrong or a recipe fails."""
    given = _parser().parse_args(words)
    try:
        papers = read_claims(CLAIMS)
        if wrong := missing(papers, ROOT):
            raise Mistakes(wrong)
        if given.command == "run":
            for seed in given.seeds:
                measure_all(papers, seed, given.zoo, given.workers, given.quiet, given.recipes)
        text = markdown(papers, read_results(RESULTS))
    except GlueError as error:
        print(error, file=sys.stderr)
        return 2
    if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text:
        return 0
    name = PAGE.relative_to(ROOT)
    if given.command == "table" and given.check:
        print(f"{name} is out of date; run  python -m benchmarks.reproduction table")
        return 1
    write_aside(PAGE, text)
    print(f"{name} written")
    return 0


def measure_all(papers: Sequence[Paper], seed: int, zoo: Path, workers: int, quiet: bool,
                recipes: Sequence[str] = ()) -> None:
    """Run every recipe that a claim names at one seed, and note what each claim came to; or some of the recipes."""
    every = [claim for paper in papers for claim in paper.claims]
    claims = [claim for claim in every if not recipes or all(show.recipe in recipes for show in claim.shows)]
    shows = [show for claim in claims for show in claim.shows]
    answers: dict[str, Measured] = {}
    for name in dict.fromkeys(show.recipe for show in shows):
        with Workers(workers) as pool, progress(quiet) as watcher:
            plan = run(read_recipe(recipe_file(ROOT, name), seed=seed), Zoo(zoo), pool, watcher)
        answers |= {show.asked: measure(show, plan) for show in shows if show.recipe == name}
        print(f"seed {seed}: {name}", flush=True)
    results, today = read_results(RESULTS), datetime.now(UTC).date().isoformat()
    for claim in claims:
        if claim.shows:
            noted(results, claim.key, seed, [answers[show.asked] for show in claim.shows], today)
    write_results(RESULTS, results, [claim.key for claim in every if claim.shows])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reproduction", description="What papers claim.")
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="run the recipes that claims name; write results and the page")
    runs.add_argument("--seeds", type=int, nargs="+", default=[0, 7, 14], help="of the recipes (0 7 14)")
    runs.add_argument("--recipes", nargs="+", default=[], help="only claims about these (all)")
    runs.add_argument("--zoo", type=Path, default=Path("zoo.yaml"), help="the zoo to work in (zoo.yaml)")
    runs.add_argument("--workers", type=int, default=2, help="processes (2)")
    runs.add_argument("--quiet", action="store_true", help="without bars")
    table = commands.add_parser("table", help="write docs/reproduction.md from what was measured")
    table.add_argument("--check", action="store_true", help="write nothing; fail where the page is out of date")
    return parser


if __name__ == "__main__":
    sys.exit(main())
