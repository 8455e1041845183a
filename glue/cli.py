"""The command line: run, plan, merge, board, zoo, eval, generate, methods, schema, init.

Everything heavy is imported inside the commands, so that help appears at once.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from glue.errors import GlueError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Cluster, merge, mix and measure a zoo of language models, from YAML recipes.")
zoo_app = typer.Typer(no_args_is_help=True, help="Look after the members of a zoo.")
app.add_typer(zoo_app, name="zoo")

ZooFile = Annotated[Path, typer.Option("--zoo", help="The zoo to work in.")]
RecipeFile = Annotated[Path, typer.Argument(help="A recipe, such as recipes/quickstart.yaml.")]
Seed = Annotated[int | None, typer.Option(help="Replaces the recipe's seed.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, results only.")]
Lenient = Annotated[bool, typer.Option("--lenient", help="Unknown words of a merge config are notes, not errors.")]
Untie = Annotated[bool, typer.Option("--untie", help="Where only some have an output layer, take others' embedding.")]
HERE = Path("zoo.yaml")


def main() -> None:
    """Entry point: GlueErrors are printed without a traceback and exit with 2, Ctrl-C with 130."""
    from glue.workers import quieten

    quieten()
    try:
        code = app(standalone_mode=False)
    except GlueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if not hasattr(error, "show"):  # click's errors of usage know how to show themselves
            raise
        error.show()  # type: ignore[attr-defined]
        sys.exit(2)
    if code == 130:
        print("\ninterrupted; what was finished is kept, run the same command again to go on", file=sys.stderr)
    sys.stdout.flush()
    sys.exit(code if isinstance(code, int) else 0)


@app.command()
def run(recipe: RecipeFile, zoo: ZooFile = HERE, seed: Seed = None,
        workers: Annotated[int | None, typer.Option(help="Processes; default: one a core, at most 4.")] = None,
        threads: Annotated[int, typer.Option(help="Threads of each process; more than one may change last bits.")] = 1,
        full: Annotated[bool, typer.Option(help="Run with each seed of the recipe's `full`; write boards.")] = False,
        on: Annotated[str, typer.Option(help="Where workers run: here or ray.")] = "here",
        quiet: Quiet = False, as_json: Json = False) -> None:
    """Make everything a recipe asks for; what exists already is not made again."""
    from glue.board import leaderboard
    from glue.recipe import read_recipe
    from glue.run import run as make
    from glue.show.boards import print_board, write_boards
    from glue.show.terminal import progress

    seeds = read_recipe(recipe).full_seeds if full else (seed,)
    if not seeds:
        raise GlueError(f"{recipe} has no 'full: {{seeds: [...]}}'", fix="add it, or leave out --full")
    plans = []
    for one in seeds:
        read, found = read_recipe(recipe, seed=one), _zoo(zoo)
        with _workers(on, workers, threads) as pool, progress(quiet) as watcher:
            plans.append(make(read, found, pool, watcher))
        if read.board:
            print_board(leaderboard(plans[-1]), as_json)
    if full and plans[0].recipe.board:
        print(f"written to {write_boards(plans)}", file=sys.stderr)


@app.command()
def plan(recipe: Annotated[Path, typer.Argument(help="A recipe, or a merge config of mergekit.")],
         zoo: ZooFile = HERE, seed: Seed = None, as_json: Json = False, lenient: Lenient = False,
         untie: Untie = False) -> None:
    """Check a recipe or a merge config, and tell what is to be done, read and written. Changes nothing."""
    from glue.merges import is_config
    from glue.orders import Settings, orders
    from glue.plan import make_plan
    from glue.recipe import read_recipe
    from glue.show.plans import print_orders, print_plan

    if is_config(recipe):
        settings = Settings(seed or 0, lenient=lenient, untie=untie)
        print_orders(orders(recipe, Path(f"{recipe.stem}-merged"), settings, _zoo_or_none(zoo)), as_json)
    else:
        print_plan(make_plan(read_recipe(recipe, seed=seed), _zoo(zoo)), as_json)


@app.command()
def merge(config: Annotated[Path, typer.Argument(help="A config of mergekit, or of mergekit-moe.")],
          out: Annotated[Path, typer.Argument(help="The folder to make.")],
          seed: Annotated[int, typer.Option(help="Of all random numbers.")] = 0,
          dtype: Annotated[str, typer.Option(help="To calculate in, instead of the config's.")] = "",
          out_dtype: Annotated[str, typer.Option(help="To write, instead of the config's.")] = "",
          shard_size: Annotated[str, typer.Option(help="The most that one file holds: 500MB, 5GB.")] = "5GB",
          workers: Annotated[int | None, typer.Option(help="Processes; default: one a core.")] = None,
          device: Annotated[str, typer.Option(help="Where to calculate: cpu, cuda, cuda:1.")] = "cpu",
          allow_nan: Annotated[bool, typer.Option(help="Write numbers that are not finite.")] = False,
          lenient: Lenient = False, untie: Untie = False,
          overwrite: Annotated[bool, typer.Option(help="What is in OUT is set aside, not refused.")] = False,
          zoo: ZooFile = HERE, quiet: Quiet = False, as_json: Json = False) -> None:
    """Merge models as a YAML of mergekit says, unmodified. A merge that was killed goes on where it was."""
    from glue.merges import merge_file, size
    from glue.orders import Settings
    from glue.show.plans import print_merged
    from glue.show.terminal import bar

    settings = Settings(seed, dtype, out_dtype, size(shard_size), device, allow_nan, lenient, untie, overwrite)
    with bar(quiet or as_json) as report:
        done = merge_file(config, out, settings, _zoo_or_none(zoo), workers, report)
    print_merged(done, as_json)


@app.command()
def board(recipe: RecipeFile, zoo: ZooFile = HERE, seed: Seed = None, as_json: Json = False,
          markdown: Annotated[Path | None, typer.Option(help="Also write the board to this file.")] = None) -> None:
    """Show the leaderboard of a recipe that has been run. Reads, never runs."""
    from glue.board import leaderboard
    from glue.board import markdown as lines
    from glue.files import write_aside
    from glue.plan import make_plan
    from glue.recipe import read_recipe
    from glue.show.boards import print_board

    found = leaderboard(make_plan(read_recipe(recipe, seed=seed), _zoo(zoo)))
    print_board(found, as_json)
    if markdown:
        write_aside(markdown, "\n".join(lines(found)) + "\n")


@app.command("eval")
def evaluate(members: Annotated[list[str], typer.Argument(help="Names, or tag:x.")],
             suite: Annotated[str, typer.Option(help="A suite and split, such as tiny:test.")],
             zoo: ZooFile = HERE, workers: int | None = None, quiet: Quiet = False, as_json: Json = False) -> None:
    """Measure members on a suite with lm-eval, and show the table. The same as a recipe with one evaluate line."""
    from glue.board import plain
    from glue.once import step
    from glue.show.boards import print_board
    from glue.show.terminal import progress
    from glue.workers import Workers

    with Workers(_cores() if workers is None else workers) as pool, progress(quiet) as watcher:
        found = _zoo(zoo)
        names = [member.name for word in members for member in found.select(word)]  # a recipe's tag:x sees less
        done = step(found, "scores", "evaluate", {"members": names, "suite": suite}, pool, watcher)
    print_board(plain(done, done["scores"]), as_json)


@app.command()
def generate(member: str, prompt: Annotated[str, typer.Option(help="What it goes on from.")], zoo: ZooFile = HERE,
             tokens: Annotated[int, typer.Option(min=1, help="The most tokens to add.")] = 32,
             device: str = "cpu") -> None:
    """Let a member continue a prompt, greedily."""
    from glue.kinds import load
    from glue.kinds.text import continued

    print(continued(load(_zoo(zoo)[member], device=device), prompt, tokens))


@app.command()
def methods(family: Annotated[str | None, typer.Argument(help="merging, routing, searching, teaching, steps.")] = None,
            as_json: Json = False) -> None:
    """List everything that can be chosen in a recipe, with its parameters."""
    from glue.show.methods import print_methods

    print_methods(family, as_json)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from glue.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="Where the new zoo shall be.")] = Path()) -> None:
    """Start a zoo: a zoo.yaml and a first recipe. Overwrites nothing."""
    from glue.care import start

    for file in start(folder):
        print(f"wrote {file}")


@zoo_app.command("list")
def zoo_list(selector: Annotated[str | None, typer.Argument(help="tag:x or a name.")] = None, zoo: ZooFile = HERE,
             as_json: Json = False) -> None:
    """List the newest version of every member."""
    from glue.show.zoo import print_members

    found = _zoo(zoo)
    print_members(found.select(selector) if selector else list(found), as_json)


@zoo_app.command()
def show(name: str, zoo: ZooFile = HERE, as_json: Json = False) -> None:
    """Show one member: where it is, what it came from, its versions."""
    from glue.show.zoo import print_member

    found = _zoo(zoo)
    member = found[name]
    with suppress(GlueError):  # one that is not on this machine has no digest, and all else can be told
        member = found.identified(member)
    print_member(member, found.versions(name.partition("@")[0]), as_json)


@zoo_app.command()
def atlas(selector: Annotated[str | None, typer.Argument(help="tag:x, a group or a name; default: everything.")] = None,
          base: Annotated[str | None, typer.Option(help="Measure changes from this member.")] = None,
          threshold: Annotated[float, typer.Option(help="Of the cosine, for families.")] = 0.95,
          linkage: Annotated[str, typer.Option(help="leader, single, average, complete.")] = "average",
          part: Annotated[str, typer.Option(help="all, attention, mlp.")] = "all",
          twins: Annotated[bool, typer.Option("--twins", help="Look for twins hidden by permutation too.")] = False,
          picture: Annotated[Path | None, typer.Option(help="Draw it: atlas.svg, or atlas.png.")] = None,
          zoo: ZooFile = HERE, quiet: Quiet = False, as_json: Json = False) -> None:
    """Tell from weights which members belong together, what they come from, and which pairs can be merged."""
    from glue.atlas import atlas as look
    from glue.report.atlas import picture as drawn
    from glue.report.drawing import check, save
    from glue.show.terminal import passes
    from glue.show.zoo import print_atlas

    if picture:
        check(picture)
    found = look(_zoo(zoo), selector, base=base, threshold=threshold, linkage=linkage, part=part,  # type: ignore[arg-type]
                 twins=twins, progress=passes(quiet or as_json))
    if picture:
        save(drawn(found), picture)
    print_atlas(found, as_json)


@zoo_app.command("near")
def zoo_near(member: str, selector: Annotated[str | None, typer.Argument(help="Of whom; default: everyone.")] = None,
             base: Annotated[str | None, typer.Option(help="Compare changes from this member.")] = None,
             part: Annotated[str, typer.Option(help="all, attention, mlp.")] = "all",
             zoo: ZooFile = HERE, quiet: Quiet = False, as_json: Json = False) -> None:
    """Tell who is most like a member, from sketches that are kept: seconds, however many there are."""
    from glue.near import near
    from glue.show.terminal import passes
    from glue.show.zoo import print_near

    print_near(member, near(_zoo(zoo), member, selector, base=base, part=part,  # type: ignore[arg-type]
                            progress=passes(quiet or as_json)), as_json)


@zoo_app.command("align")
def zoo_align(member: str, out: Annotated[Path, typer.Argument(help="The folder to make.")],
              to: Annotated[str, typer.Option(help="Its twin, whose order it shall have.")], zoo: ZooFile = HERE,
              as_json: Json = False) -> None:
    """Write a member with its neurons and heads in the order of its twin: the same function, now mergeable."""
    from glue.align import align

    done = align(_zoo(zoo), member, to, out)
    print(json.dumps(done, indent=1) if as_json else
          f"{out}: {member} in the order of {to}; cosine {done['cosine_before']:.4f} before, "
          f"{done['cosine_after']:.4f} now\nglue zoo add {out}  adds it to the zoo")


@zoo_app.command()
def routes(table: Annotated[str, typer.Argument(help="What a routing step has left.")],
           picture: Annotated[Path | None, typer.Option(help="Draw it: routes.svg, or routes.png.")] = None,
           zoo: ZooFile = HERE, as_json: Json = False) -> None:
    """Show whom mixtures ask for what, how evenly, and what a better choice would score."""
    from glue.report.drawing import check, save
    from glue.report.routing import picture as drawn
    from glue.report.routing import read
    from glue.show.routes import print_routes

    if picture:
        check(picture)
    reports = read(_zoo(zoo)[table])
    if picture:
        save(drawn(reports), picture)
    print_routes(reports, as_json)


@zoo_app.command()
def add(path: Annotated[str, typer.Argument(help="A folder, or owner/name[@revision] on the hub.")],
        name: Annotated[str | None, typer.Option(help="Default: the last part of the path.")] = None,
        kind: str = "model", base: Annotated[str | None, typer.Option(help="The member it derives from.")] = None,
        tag: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
        licence: str = "", zoo: ZooFile = HERE) -> None:
    """Add a model, adapter or dataset to the zoo's register. zoo.yaml itself is not touched."""
    from glue.care import added

    member = added(_zoo(zoo), path, name, kind, base, set(tag or ()), licence)
    print(f"added {member.name} ({member.kind}, digest {member.digest[:8]})")


@zoo_app.command()
def remove(name: str, zoo: ZooFile = HERE) -> None:
    """Take a product or an added member out of the register. Its files stay until `glue zoo gc`."""
    found = _zoo(zoo)
    member = found.remove(name)
    ours = str(member.path).startswith(f"{found.folder}/")
    print(f"removed {member.name}; its files {'go with  glue zoo gc --yes' if ours else 'stay where they are'}")


@zoo_app.command()
def tag(name: str, add: Annotated[list[str] | None, typer.Option(help="A tag to add.")] = None,
        drop: Annotated[list[str] | None, typer.Option(help="A tag to take away.")] = None,
        zoo: ZooFile = HERE) -> None:
    """Add and drop tags of a member."""
    member = _zoo(zoo).tag(name, set(add or ()), set(drop or ()))
    print(f"{member.name}: {', '.join(sorted(member.tags)) or 'no tags'}")


@zoo_app.command()
def verify(name: str, zoo: ZooFile = HERE) -> None:
    """Read every byte of a member again, compare with its registered digest, and print sha256 sums."""
    from glue.care import verified

    for line in verified(_zoo(zoo), name):
        print(line)


@zoo_app.command()
def gc(zoo: ZooFile = HERE,
       yes: Annotated[bool, typer.Option("--yes", help="Really delete; without it, only tell.")] = False) -> None:
    """Find folders of products that no member refers to, and older versions nothing depends on; --yes deletes them."""
    from glue.care import unreferenced
    from glue.show.terminal import human

    found = unreferenced(_zoo(zoo), delete=yes)
    for folder, size in found:
        print(f"{'deleted' if yes else 'would delete'} {folder} ({human(size)})")
    total = human(sum(size for _, size in found))
    print(f"{len(found)} folders, {total}" + ("" if yes or not found else "; add --yes to delete them"))


def _zoo(file: Path) -> Any:
    from glue.zoo import Zoo

    return Zoo(file)


def _zoo_or_none(file: Path) -> Any:
    """The zoo where there is one: a merge config can do without."""
    return _zoo(file) if file.exists() or file != HERE else None


def _workers(on: str, number: int | None, threads: int) -> Any:
    """Processes here, or actors on Ray."""
    from glue.errors import RunError, did_you_mean
    from glue.workers import Workers

    if on not in ("here", "ray"):
        raise RunError(f"there are no workers on '{on}'{did_you_mean(on, ('here', 'ray'))}",
                       fix="--on here, or --on ray")
    number = _cores() if number is None else number
    if on == "here":
        return Workers(number, threads)
    from glue.workers_ray import RayWorkers

    return RayWorkers(number, threads)


def _cores() -> int:
    """Cores that are ours, at most 4: each worker may hold a whole model."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


if __name__ == "__main__":
    main()
