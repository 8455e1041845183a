"""The command line of the speed benchmark.

    python -m benchmarks.speed merge [--shape 1b1] [--methods linear,ties] [--json FILE]    measures
    python -m benchmarks.speed search [--shape 160m] [--zoo zoo.yaml] [--json FILE]         measures candidates
    python -m benchmarks.speed similarity [--shape 160m] [--members 8,16] [--json FILE]     measures comparisons
    python -m benchmarks.speed mixtures [--shape 160m] [--levels model,block] [--json FILE] measures mixtures
    python -m benchmarks.speed fold [--shape 1b1] [--clients 8,64] [--json FILE]            measures folds of adapters
    python -m benchmarks.speed size [--shape 7b] [--json FILE]                              measures steps at a size
    python -m benchmarks.speed shapley [--games 5] [--json FILE]                            counts fits of a valuation
    python -m benchmarks.speed table FILE.json ... [--into README.md [--check]]             prints, or fills a page
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks.speed.machine import machine
from benchmarks.speed.pairs import OURS, PEER, Bench, recorded
from benchmarks.speed.rows import ROWS, SYNCED, Row
from benchmarks.speed.shapes import SHAPES, made
from benchmarks.speed.table import markdown, put
from glue.errors import GlueError, did_you_mean
from glue.files import write_aside


def main(words: list[str] | None = None) -> int:
    """Measure or print; 1 where a row failed or a page is out of date, 2 where a word is wrong."""
    given = _parser().parse_args(words)
    try:
        return WHAT[given.what](given)
    except GlueError as error:
        print(error, file=sys.stderr)
        return 2


def merge(given: argparse.Namespace) -> int:
    """Measure the rows one after the other, write down each at once, and print the table."""
    if given.clean:
        shutil.rmtree(given.folder / given.shape, ignore_errors=True)
        return 0
    names, members = _chosen(given.methods, given.memory_only), given.members or (3 if given.memory_only else 4)
    shape, folder = SHAPES[given.shape], given.folder / given.shape
    n = max(ROWS[_method(name)].n or members for name in names)
    outputs = 1 if given.no_peer or given.memory_only else 2
    bench = Bench(folder, made(folder, shape, n, outputs), members, given.pairs, given.patience,
                  sides=(OURS,) if given.no_peer else (OURS, PEER))
    if given.memory_only:
        bench = dataclasses.replace(bench, pairs=0, sides=(OURS,), probed=False)
    results = recorded(given.json, {"shape": given.shape, "bytes": shape.nbytes, "machine": machine(folder)})
    _warm(given.folder, bench)
    failed = 0
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            results["rows"][name] = bench.row(ROWS[_method(name)], sync=name == SYNCED)
        except GlueError as error:  # hours of other rows are not lost with one
            failed += 1
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        if given.json:
            write_aside(given.json, json.dumps(results, indent=1) + "\n")
    file = given.json or folder / "results.json"
    write_aside(file, json.dumps(results, indent=1) + "\n")
    print(markdown([file]))
    return int(failed > 0)


def search(given: argparse.Namespace) -> int:
    """Measure candidates of a search; what that needs is imported here, since most runs do not need it."""
    from benchmarks.speed.search import main

    return main(given)


def similarity(given: argparse.Namespace) -> int:
    """Measure how fast models are compared, beside the published procedure."""
    from benchmarks.speed.similar import main

    return main(given)


def mixtures(given: argparse.Namespace) -> int:
    """Measure how fast mixtures answer, beside dense models of the same shape, and what building them takes."""
    from benchmarks.speed.mixtures import main

    return main(given)


def fold(given: argparse.Namespace) -> int:
    """Measure how adapters of many clients are folded into one."""
    from benchmarks.speed.fold import main

    return main(given)


def size(given: argparse.Namespace) -> int:
    """Measure what steps take on a pair of large models, beside what their plan says."""
    from benchmarks.speed.size import main

    return main(given)


def shapley(given: argparse.Namespace) -> int:
    """Count the fits that a table of values takes, beside the published scheme."""
    from benchmarks.speed.shapley import main

    return main(given)


def table(given: argparse.Namespace) -> int:
    """Print the tables of some results, or put them into a page."""
    if not given.into:
        print(markdown(given.files))
        return 0
    text = put(given.into, given.files)
    old = given.into.read_text(encoding="utf-8") != text
    if old and not given.check:
        write_aside(given.into, text)
    if old:
        print(f"{given.into} {'is out of date' if given.check else 'written'}")
    return int(old and given.check)


def _method(name: str) -> str:
    return "linear" if name == SYNCED else name


def _chosen(words: str, memory_only: bool) -> list[str]:
    """The rows that are asked for, in the order of the table. Raises GlueError for one that is not there."""
    known = [*ROWS, SYNCED]
    if not words:
        return ["linear", "ties"] if memory_only else known
    asked = [word.strip() for word in words.split(",")]
    for word in asked:
        if word not in known:
            raise GlueError(f"there is no row '{word}'{did_you_mean(word, known)}")
    return [name for name in known if name in asked]


def _warm(folder: Path, bench: Bench) -> None:
    """Merge tiny models first: nobody shall pay for reading libraries from the disk, and mistakes show early."""
    tiny = dataclasses.replace(bench, folder=folder / "tiny", places=made(folder / "tiny", SHAPES["tiny"], 2),
                               members=2, pairs=1)
    tiny.row(Row("linear", base="none", passes=1))


WHAT = {"merge": merge, "search": search, "similarity": similarity, "mixtures": mixtures, "fold": fold,
        "size": size, "shapley": shapley, "table": table}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description="Merges and comparisons, timed.")
    what = parser.add_subparsers(dest="what", required=True)
    one = what.add_parser("merge", help="measure")
    one.add_argument("--shape", choices=[*SHAPES], default="160m", help="of the models (160m)")
    one.add_argument("--methods", default="", help=f"rows, with commas between them; all: {','.join([*ROWS, SYNCED])}")
    one.add_argument("--pairs", type=int, default=5, help="pairs of runs a row (5)")
    one.add_argument("--members", type=int, default=0, help="models a merge, where a method does not say (4)")
    one.add_argument("--patience", type=float, default=600, help="seconds; a slower peer is run once a row (600)")
    one.add_argument("--no-peer", action="store_true", help="glue alone")
    one.add_argument("--memory-only", action="store_true", help="glue alone, linear and ties of 3, nothing timed")
    one.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "glue-speed",
                     help="where models are made and kept")
    one.add_argument("--json", type=Path, help="write results here, row by row; rows that are there already are kept")
    one.add_argument("--clean", action="store_true", help="only remove the models of the shape")
    candidates = what.add_parser("search", help="measure candidates of a search, in memory and by way of the disk")
    candidates.add_argument("--shape", choices=[*SHAPES], default="160m", help="of the models that are made (160m)")
    candidates.add_argument("--zoo", type=Path, default=Path("zoo.yaml"), help="a zoo that has the tiny one")
    candidates.add_argument("--pairs", type=int, default=5, help="pairs a row (5)")
    candidates.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "glue-speed",
                            help="where models are made and kept")
    candidates.add_argument("--json", type=Path, help="write results here, row by row")
    alike = what.add_parser("similarity", help="measure how fast models are compared")
    alike.add_argument("--shape", choices=[*SHAPES], default="160m", help="of the models (160m)")
    alike.add_argument("--members", default="8,16", help="how many are compared, with commas between (8,16)")
    alike.add_argument("--pairs", type=int, default=3, help="pairs of runs for each (3)")
    alike.add_argument("--no-peer", action="store_true", help="glue alone")
    alike.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "glue-speed",
                       help="where models are made and kept")
    alike.add_argument("--json", type=Path, help="write results here")
    mixed = what.add_parser("mixtures", help="measure mixtures beside dense models of the same shape")
    mixed.add_argument("--shape", choices=[*SHAPES], default="160m", help="of the experts (160m)")
    mixed.add_argument("--levels", default="", help="model, block, ffn, sentence, with commas between; all")
    mixed.add_argument("--experts", type=int, default=3, help="how many are mixed (3)")
    mixed.add_argument("--rounds", type=int, default=5, help="of both sides for each row (5)")
    mixed.add_argument("--prompt", type=int, default=128, help="tokens of a prompt (128)")
    mixed.add_argument("--new", type=int, default=32, help="tokens that are written behind it (32)")
    mixed.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                       help="that both sides compute in; auto is that of the files, bfloat16")
    mixed.add_argument("--memory-only", action="store_true", help="only build, and watch the memory of it")
    mixed.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "glue-speed",
                       help="where models are made and kept")
    mixed.add_argument("--json", type=Path, help="write results here, row by row")
    folds = what.add_parser("fold", help="measure how adapters of many clients are folded into one")
    folds.add_argument("--shape", choices=[*SHAPES], default="1b1", help="of the base (1b1)")
    folds.add_argument("--clients", default="8,64", help="how many, with commas between (8,64)")
    folds.add_argument("--rounds", type=int, default=3, help="of each (3)")
    folds.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "glue-speed",
                       help="where adapters are made and kept")
    folds.add_argument("--json", type=Path, help="write results here, row by row")
    sizes = what.add_parser("size", help="measure what steps take on a pair of models, beside what their plan says")
    sizes.add_argument("--shape", choices=[*SHAPES], default="7b", help="of the models (7b)")
    sizes.add_argument("--rows", default="", help="which, with commas between; all")
    sizes.add_argument("--rounds", type=int, default=1, help="of each, of which that with the highest peak counts (1)")
    sizes.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "glue-speed",
                       help="where models are made and kept")
    sizes.add_argument("--json", type=Path, help="write results here, row by row")
    values = what.add_parser("shapley", help="count the fits that values of clusters take, beside the published scheme")
    values.add_argument("--games", type=int, default=5, help="how many are played, by all ways (5)")
    values.add_argument("--json", type=Path, help="write results here")
    two = what.add_parser("table", help="print results as Markdown")
    two.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    two.add_argument("--into", type=Path, metavar="PAGE", help="put it into a page, between its two markers")
    two.add_argument("--check", action="store_true", help="change nothing; fail where the page is out of date")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
