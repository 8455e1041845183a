"""The command line: run, plan, merge, board, eval, reproduce, push, generate, methods, schema, init; the rest in cli_*.

Everything heavy is imported inside the commands, so that help appears at once.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from glue.cli_federate import federate_app
from glue.cli_serve import place_of, serve
from glue.cli_zoo import HERE, Json, Quiet, ZooFile, brought, opened, zoo_app
from glue.errors import GlueError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Cluster, merge, mix and measure a zoo of language models, from YAML recipes.")
app.add_typer(zoo_app, name="zoo")
app.add_typer(federate_app, name="federate")
app.command()(serve)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe, such as recipes/quickstart.yaml.")]
Seed = Annotated[int | None, typer.Option(help="Replaces the recipe's seed.")]
OnDevice = Annotated[str, typer.Option("--device", help="Where models run: cpu, cuda, cuda:1, mps, or auto.")]
RunsIn = Annotated[str, typer.Option("--dtype", help="What models run in: float32, bfloat16, float16, nf4, int8.")]
AtOnce = Annotated[str, typer.Option("--batch-size", help="Of every line that can choose: a number, or auto.")]
Lenient = Annotated[bool, typer.Option("--lenient", help="Unknown words of a merge config are notes, not errors.")]
Force = Annotated[bool, typer.Option("--force", help="Begin also with what does not seem to fit.")]
On = Annotated[str, typer.Option(help="Where workers run: here, ray, or a cluster: host:port, ray://host:port.")]
Gpus = Annotated[float, typer.Option(min=0, help="GPUs of each worker on Ray; a part of one below 1.")]
Untie = Annotated[bool, typer.Option("--untie", help="Where only some have an output layer, take others' embedding.")]


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
        workers: Annotated[int | None, typer.Option(
            help="Processes; default: one a core, at most 4; on a cluster as many as it has room for.")] = None,
        threads: Annotated[int, typer.Option(help="Threads of each process; more than one may change last bits.")] = 1,
        full: Annotated[bool, typer.Option(help="Run with each seed of the recipe's `full`; write boards.")] = False,
        on: On = "here", gpus: Gpus = 0, device: OnDevice = "", dtype: RunsIn = "", batch_size: AtOnce = "",
        force: Force = False,
        fetch: Annotated[bool, typer.Option("--fetch", help="First bring from the hub what is missing.")] = False,
        quiet: Quiet = False, as_json: Json = False) -> None:
    """Make everything a recipe asks for; what exists already is not made again."""
    from glue.board import leaderboard
    from glue.recipe import read_recipe
    from glue.run import run as make
    from glue.show.boards import print_board, write_boards
    from glue.show.terminal import progress
    from glue.show.traffic import print_tables

    seeds = read_recipe(recipe).full_seeds if full else (seed,)
    if not seeds:
        raise GlueError(f"{recipe} has no 'full: {{seeds: [...]}}'", fix="add it, or leave out --full")
    if fetch:
        brought([str(recipe)], zoo, quiet=quiet, aside=True)
    plans = []
    for one in seeds:
        read, found = read_recipe(recipe, seed=one, wide=_wide(device, dtype, batch_size)), opened(zoo)
        with _workers(on, workers, threads, gpus, found.folder / ".drafts") as pool, progress(quiet) as watcher:
            plans.append(make(read, found, pool, watcher, force=force))
        _tell_lost(pool, quiet)
        if read.board:
            print_board(leaderboard(plans[-1]), as_json)
        if not as_json:
            print_tables(plans[-1])
    if full and plans[0].recipe.board:
        print(f"written to {write_boards(plans)}", file=sys.stderr)


@app.command()
def plan(recipe: Annotated[Path, typer.Argument(help="A recipe, or a merge config of mergekit.")],
         zoo: ZooFile = HERE, seed: Seed = None, device: OnDevice = "", dtype: RunsIn = "", batch_size: AtOnce = "",
         workers: Annotated[int | None, typer.Option(help="As many as the run will have.")] = None,
         as_json: Json = False, lenient: Lenient = False, untie: Untie = False) -> None:
    """Check a recipe or a merge config, and tell what is to be done, read and written. Changes nothing."""
    from glue.merges import is_config
    from glue.orders import Settings, orders
    from glue.plan import make_plan
    from glue.recipe import read_recipe
    from glue.show.plans import print_orders, print_plan
    from glue.workers import cores

    if is_config(recipe):
        settings = Settings(seed or 0, lenient=lenient, untie=untie)
        print_orders(orders(recipe, Path(f"{recipe.stem}-merged"), settings, _zoo_or_none(zoo)), as_json, workers)
    else:
        read = read_recipe(recipe, seed=seed, wide=_wide(device, dtype, batch_size))
        print_plan(make_plan(read, opened(zoo), missing=True), as_json, cores() if workers is None else workers)


@app.command()
def merge(config: Annotated[Path, typer.Argument(help="A config of mergekit, or of mergekit-moe.")],
          out: Annotated[Path, typer.Argument(help="The folder to make.")],
          seed: Annotated[int, typer.Option(help="Of all random numbers.")] = 0,
          dtype: Annotated[str, typer.Option(help="To calculate in, instead of the config's.")] = "",
          out_dtype: Annotated[str, typer.Option(help="To write, instead of the config's.")] = "",
          shard_size: Annotated[str, typer.Option(help="The most that one file holds: 500MB, 5GB.")] = "5GB",
          workers: Annotated[int | None, typer.Option(help="Processes; default: one a core.")] = None,
          device: Annotated[str, typer.Option(help="Where to calculate: cpu, cuda, cuda:1, auto.")] = "cpu",
          allow_nan: Annotated[bool, typer.Option(help="Write numbers that are not finite.")] = False,
          lenient: Lenient = False, untie: Untie = False,
          overwrite: Annotated[bool, typer.Option(help="What is in OUT is set aside, not refused.")] = False,
          on: On = "here", force: Force = False, zoo: ZooFile = HERE, quiet: Quiet = False,
          as_json: Json = False) -> None:
    """Merge models as a YAML of mergekit says, unmodified. A merge that was killed goes on where it was."""
    from glue.merges import merge_file
    from glue.orders import Settings
    from glue.room import size
    from glue.show.plans import print_merged
    from glue.show.terminal import bar

    settings = Settings(seed, dtype, out_dtype, size(shard_size), device, allow_nan, lenient, untie, overwrite)
    if on != "here" and device != "cpu":
        raise GlueError(f"with --device {device} one process does the work, and not workers on {on}",
                        fix="leave out --on, or --device")
    with nullcontext() if on == "here" else _workers(on, workers, 1, 0, out.absolute().parent) as pool, \
            bar(quiet or as_json) as report:
        done = merge_file(config, out, settings, _zoo_or_none(zoo), workers, report, pool, force=force)
    _tell_lost(pool, quiet)
    print_merged(done, as_json)


@app.command()
def board(recipe: Annotated[Path | None, typer.Argument(help="A recipe that has been run.")] = None,
          suite: Annotated[str, typer.Option(help="Everyone who was measured on it, such as tiny:test.")] = "",
          zoo: ZooFile = HERE, seed: Seed = None, dtype: RunsIn = "", as_json: Json = False,
          markdown: Annotated[Path | None, typer.Option(help="Also write the board to this file.")] = None,
          html: Annotated[Path | None, typer.Option(help="Also write all that is known as one page.")] = None) -> None:
    """Show the leaderboard of a recipe that has been run, or of a suite. Reads, never runs."""
    from glue.board import leaderboard, of_suite
    from glue.files import write_aside
    from glue.plan import make_plan
    from glue.recipe import read_recipe
    from glue.report.html import page, report
    from glue.report.markdown import markdown as lines
    from glue.show.boards import print_board
    from glue.show.traffic import print_tables

    if (recipe is None) == (not suite):
        raise GlueError("a board is of a recipe or of a suite",
                        fix="glue board recipes/quickstart.yaml, or  glue board --suite tiny:test")
    found = opened(zoo)
    plan = make_plan(read_recipe(recipe, seed=seed, wide=_wide(dtype=dtype)), found) if recipe else None
    shown = leaderboard(plan) if plan else of_suite(found, suite)
    print_board(shown, as_json)
    if plan and not as_json:
        print_tables(plan)
    if markdown:
        write_aside(markdown, "\n".join(lines(shown)) + "\n")
    if html:
        write_aside(html, report(plan) if plan else page(shown))


@app.command("eval")
def evaluate(members: Annotated[list[str], typer.Argument(help="Names, or tag:x.")],
             suite: Annotated[str, typer.Option(help="A suite and split, such as tiny:test.")] = "",
             from_lm_eval: Annotated[Path | None, typer.Option(
                 "--import", help="Measure nothing: take what lm-eval's own command has left in this folder.")] = None,
             device: OnDevice = "", dtype: RunsIn = "", batch_size: AtOnce = "", zoo: ZooFile = HERE,
             workers: int | None = None, on: On = "here", gpus: Gpus = 0, force: Force = False, quiet: Quiet = False,
             as_json: Json = False) -> None:
    """Measure members on a suite with lm-eval, and show the table. The same as a recipe with one evaluate line."""
    from glue.board import of_suite, plain
    from glue.care import imported
    from glue.once import step
    from glue.show.boards import print_board
    from glue.show.terminal import progress

    found = opened(zoo)
    if from_lm_eval:
        known = imported(found, members, from_lm_eval, suite)
        print_board(of_suite(found, known), as_json)
        return
    if not suite:
        raise GlueError("it is not said what to measure", fix="--suite tiny:test, or  --import DIR  of lm-eval")
    with _workers(on, workers, 1, gpus, found.folder / ".drafts") as pool, progress(quiet) as watcher:
        names = [member.name for word in members for member in found.select(word)]  # a recipe's tag:x sees less
        done = step(found, "scores", "evaluate",
                    {"members": names, "suite": suite, **_wide(device, dtype, batch_size)}, pool, watcher, force=force)
    _tell_lost(pool, quiet)
    print_board(plain(done, done["scores"]), as_json)


@app.command()
def reproduce(what: Annotated[str, typer.Argument(help="The folder of a product, or a member.")],
              search: Annotated[bool, typer.Option("--search", help="Search again, not only its recorded choice.")]
              = False, workers: int | None = None,
              threads: Annotated[int, typer.Option(help="As recorded, for the same last bits.")] = 1,
              on: On = "here", gpus: Gpus = 0, device: OnDevice = "", zoo: ZooFile = HERE, quiet: Quiet = False,
              as_json: Json = False) -> None:
    """Make a product again from its own folder and the inputs that it names, and compare digest by digest.

    Exit code 1 where the result, or an input, is not what it was.
    """
    from glue.reproduce import reproduce as again
    from glue.show.reproduction import print_reproduction, working

    found = opened(zoo)
    with _workers(on, workers, threads, gpus, found.folder / ".drafts") as pool, working(quiet or as_json) as report:
        done = again(what, found, pool, search=search, device=device, report=report)
    _tell_lost(pool, quiet)
    print_reproduction(done, as_json)
    if not done.equal:
        raise typer.Exit(1)


@app.command()
def push(member: str, repository: Annotated[str, typer.Argument(help="owner/name on the hub.")],
         private: Annotated[bool, typer.Option("--private", help="For your eyes only.")] = False,
         revision: Annotated[str, typer.Option(help="A branch, made where it is not there; default: main.")] = "",
         message: Annotated[str, typer.Option(help="Of the commit.")] = "",
         dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go; needs no network.")] = False,
         similarity: Annotated[bool, typer.Option("--similarity", help="Compare what went in, if nobody has.")] = False,
         zoo: ZooFile = HERE, quiet: Quiet = False, as_json: Json = False) -> None:
    """Send a member to the hub in one commit: verified, with a card of all that is known of it by now."""
    from glue.push import packed
    from glue.push import push as send

    parcel = packed(opened(zoo), member, repository, similarity=similarity)
    if not as_json and (dry_run or not quiet):
        print("\n".join(parcel.lines()), file=sys.stdout if dry_run else sys.stderr)
    done = None if dry_run else send(parcel, private=private, revision=revision, message=message,
                                     quiet=quiet or as_json)
    if as_json:
        print(json.dumps({**parcel.as_data(), "commit": done.url if done else "",
                          "removed": list(done.removed) if done else []}, indent=1))
    elif done:
        for file in done.removed:
            print(f"removed there: {file}", file=sys.stderr)
        print(done.url)


@app.command()
def generate(member: str, prompt: Annotated[str, typer.Option(help="What it goes on from.")], zoo: ZooFile = HERE,
             tokens: Annotated[int, typer.Option(min=1, help="The most tokens to add.")] = 32,
             draft: Annotated[str, typer.Option(help="Of a proxy: tokens that its small model writes ahead, or auto.")]
             = "", top_k: Annotated[int, typer.Option(min=0, help="With --draft: tokens that the large model tells of "
                                                                  "a place; 0: all.")] = 0,
             extra: Annotated[int, typer.Option(min=0, help="With --top-k: tokens that the device names.")] = 0,
             bits: Annotated[int, typer.Option(help="With --draft: of each log-probability, 32, 16 or 8.")] = 16,
             device: OnDevice = "cpu", dtype: RunsIn = "float32") -> None:
    """Let a member continue a prompt, greedily. With --draft a proxy asks its large model once for several tokens."""
    from glue.kinds.text import continued
    from glue.steps._device import Way, drafting

    found, place = opened(zoo)[member], place_of(device, dtype)
    if not draft:
        running = place.load(found)
        if running.spread:
            print(f"{member} is spread over {running.spread}", file=sys.stderr)
        print(continued(running, prompt, tokens))
        return
    way = Way.of({"draft": int(draft) if draft.isdigit() else draft, "top_k": top_k, "extra": extra, "bits": bits})
    text, done = drafting(found, way, place).write(prompt, tokens)
    print(text)
    told = done.ledger
    print(f"{told.written} tokens in {told.calls} calls of the large model, {told.acceptance:.0%} of judged drafts "
          f"stayed; whoever runs it could read: {told.revealed}", file=sys.stderr)


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


def _wide(device: str = "", dtype: str = "", batch_size: str = "") -> dict[str, Any]:
    """What was said on the command line for all lines."""
    size: Any = int(batch_size) if batch_size.isdigit() else batch_size
    return {word: value for word, value in (("device", device), ("dtype", dtype), ("batch_size", size)) if value != ""}


def _zoo_or_none(file: Path) -> Any:
    """The zoo where there is one: a merge config can do without."""
    return opened(file) if file.exists() or file != HERE else None


def _workers(on: str, number: int | None, threads: int, gpus: float, folder: Path) -> Any:
    """Processes here, or actors on Ray, whose nodes must see the folder."""
    from glue.errors import RunError, did_you_mean
    from glue.workers import Workers, cores

    if on == "here":
        if gpus:
            raise RunError("GPUs are asked of Ray, and these workers are processes of this machine",
                           fix="--on ray --gpus 1, or leave out --gpus")
        return Workers(cores() if number is None else number, threads)
    from glue.kinds.device import ELSEWHERE
    from glue.workers_ray import RayWorkers, is_address

    if on != "ray" and not is_address(on):
        raise RunError(f"there are no workers on '{on}'{did_you_mean(on, ('here', 'ray'))}",
                       fix="--on here, --on ray, --on ray://host:port, or  --on host:port")
    pool = RayWorkers(number or 0, threads, on=on, folder=folder, gpus=gpus)
    if pool.apart:
        os.environ[ELSEWHERE] = "1"
    return pool


def _tell_lost(pool: Any, quiet: bool) -> None:
    """Say that workers were lost, and that this did no harm."""
    if pool is not None and pool.lost and not quiet:
        print(f"{len(pool.lost)} times a worker was lost, and others did its work: {pool.lost[-1]}", file=sys.stderr)


if __name__ == "__main__":
    main()
