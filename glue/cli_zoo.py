"""The command line's second word: glue zoo, and what both files say alike: options, and how a zoo is opened."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from glue.errors import GlueError

zoo_app = typer.Typer(no_args_is_help=True, help="Look after the members of a zoo.")

ZooFile = Annotated[Path, typer.Option("--zoo", help="The zoo to work in.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, results only.")]
HERE = Path("zoo.yaml")


def opened(file: Path) -> Any:
    """The zoo of a file."""
    from glue.zoo import Zoo

    return Zoo(file)


@zoo_app.command("list")
def zoo_list(selector: Annotated[str | None, typer.Argument(help="tag:x or a name.")] = None, zoo: ZooFile = HERE,
             as_json: Json = False) -> None:
    """List the newest version of every member."""
    from glue.show.zoo import kept_line, print_members

    found = opened(zoo)
    print_members(found.select(selector) if selector else list(found), as_json)
    if not as_json and not selector:
        print(kept_line(found))


@zoo_app.command()
def show(name: str, zoo: ZooFile = HERE, as_json: Json = False) -> None:
    """Show one member: where it is, what it came from, its versions."""
    from glue.show.zoo import print_member

    found = opened(zoo)
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
    found = look(opened(zoo), selector, base=base, threshold=threshold, linkage=linkage, part=part,  # type: ignore[arg-type]
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

    print_near(member, near(opened(zoo), member, selector, base=base, part=part,  # type: ignore[arg-type]
                            progress=passes(quiet or as_json)), as_json)


@zoo_app.command("align")
def zoo_align(member: str, out: Annotated[Path, typer.Argument(help="The folder to make.")],
              to: Annotated[str, typer.Option(help="Its twin, whose order it shall have.")], zoo: ZooFile = HERE,
              as_json: Json = False) -> None:
    """Write a member with its neurons and heads in the order of its twin: the same function, now mergeable."""
    from glue.align import align

    done = align(opened(zoo), member, to, out)
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
    reports = read(opened(zoo)[table])
    if picture:
        save(drawn(reports), picture)
    print_routes(reports, as_json)


@zoo_app.command()
def traffic(table: Annotated[str, typer.Argument(help="What a traffic step has left.")], zoo: ZooFile = HERE,
            as_json: Json = False) -> None:
    """Show what each way of asking a black box sends, is sent, and scores."""
    from glue.report.traffic import read
    from glue.show.traffic import print_traffic

    print_traffic(read(opened(zoo)[table]), as_json)


@zoo_app.command()
def values(table: Annotated[str, typer.Argument(help="What a value step has left.")], zoo: ZooFile = HERE,
           as_json: Json = False) -> None:
    """Show what each client or member is worth, with intervals."""
    from glue.report.values import read
    from glue.show.values import print_values

    print_values(read(opened(zoo)[table]), as_json)


@zoo_app.command("connect")
def zoo_connect(url: Annotated[str, typer.Argument(help="Of a server: http://127.0.0.1:8000.")],
                name: Annotated[str, typer.Option(help="What it shall be called here.")],
                tokenizer: Annotated[str, typer.Option(help="A member that has the tokenizer of what is served.")],
                model: Annotated[str, typer.Option(help="As the server calls it, if it serves several.")] = "",
                protocol: Annotated[str, typer.Option(help="glue: glue serve; openai: any other.")] = "glue",
                key: Annotated[str, typer.Option(help="The environment variable that holds the API key.")] = "",
                zoo: ZooFile = HERE) -> None:
    """Make a member of a model that runs somewhere else: it evaluates, writes, and can be the base of a proxy."""
    from glue.care import added
    from glue.kinds.endpoint import connect

    found = opened(zoo)
    folder = found.folder / "endpoints" / name
    told = connect(folder, url, tokenizer=found[tokenizer], model=model, protocol=protocol,  # type: ignore[arg-type]
                   key=key)
    member = added(found, str(folder), name, "endpoint", None, set(), "")
    print(f"added {member.name}: '{told.model}' at {told.url} tells {told.tells.replace('_', ' ')} of "
          f"{told.vocab_size} tokens")


@zoo_app.command("lineage")
def zoo_lineage(member: str, data: Annotated[bool, typer.Option("--data", help="Datasets too.")] = False,
                zoo: ZooFile = HERE, as_json: Json = False) -> None:
    """Draw what a member was made of, step by step, down to what was not made here."""
    from glue.lineage import lineage

    tree = lineage(opened(zoo), member, data=data)
    print(json.dumps(tree.as_data(), indent=1) if as_json else "\n".join(tree.lines()))


@zoo_app.command("card")
def zoo_card(member: str, out: Annotated[Path | None, typer.Option(help="Write it to this file.")] = None,
             similarity: Annotated[bool, typer.Option("--similarity", help="Compare what went in, if nobody has.")]
             = False, zoo: ZooFile = HERE) -> None:
    """Print the card of a member with all that is known by now: scores, lineage, how alike its parents are."""
    from glue.files import write_aside
    from glue.known import readme

    text = readme(opened(zoo), member, similarity=similarity)
    if out:
        write_aside(out, text)
    else:
        print(text, end="")


@zoo_app.command("fetch")
def zoo_fetch(what: Annotated[list[str], typer.Argument(help="Names, tag:x, hub:owner/name[@revision], or recipes: "
                                                              "what their plans lack.")],
              kind: Annotated[str, typer.Option(help="Of what a hub: path names: model, adapter, dataset.")] = "model",
              dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell files, bytes and room.")] = False,
              zoo: ZooFile = HERE, quiet: Quiet = False, as_json: Json = False) -> None:
    """Bring members from the hub into its cache: safetensors, configuration, tokenizer, cards; goes on after a kill."""
    brought(what, zoo, kind, dry_run, quiet, as_json)


def brought(what: Sequence[str], zoo: Path, kind: str = "model", dry_run: bool = False, quiet: bool = False,
            as_json: bool = False, aside: bool = False) -> None:
    """Fetch, telling first what will come, and then which commit has come and where it lies.

    aside  all of it on standard error, since something else has the results
    """
    from glue.fetch import asked, fetched, looked_up
    from glue.show.fetch import fetching, print_bundles, print_fetched

    some = asked(what, lambda: opened(zoo), kind)
    bundles = looked_up(some)
    if not as_json and (dry_run or not quiet):
        print_bundles(some, bundles, error=not dry_run)
    if not dry_run:
        with fetching(quiet or as_json) as report:
            fetched(bundles, report)
    if not (aside and quiet):
        print_fetched(bundles, dry_run, as_json, error=aside)


@zoo_app.command()
def add(path: Annotated[str, typer.Argument(help="A folder, or owner/name[@revision] on the hub.")],
        name: Annotated[str | None, typer.Option(help="Default: the last part of the path.")] = None,
        kind: str = "model", base: Annotated[str | None, typer.Option(help="The member it derives from.")] = None,
        tag: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
        licence: str = "", zoo: ZooFile = HERE) -> None:
    """Add a model, adapter or dataset to the zoo's register. zoo.yaml itself is not touched."""
    from glue.care import added

    member = added(opened(zoo), path, name, kind, base, set(tag or ()), licence)
    print(f"added {member.name} ({member.kind}, digest {member.digest[:8]})")


@zoo_app.command()
def remove(name: str, zoo: ZooFile = HERE) -> None:
    """Take a product or an added member out of the register. Its files stay until `glue zoo gc`."""
    found = opened(zoo)
    member = found.remove(name)
    ours = str(member.path).startswith(f"{found.folder}/")
    print(f"removed {member.name}; its files {'go with  glue zoo gc --yes' if ours else 'stay where they are'}")


@zoo_app.command()
def tag(name: str, add: Annotated[list[str] | None, typer.Option(help="A tag to add.")] = None,
        drop: Annotated[list[str] | None, typer.Option(help="A tag to take away.")] = None,
        zoo: ZooFile = HERE) -> None:
    """Add and drop tags of a member."""
    member = opened(zoo).tag(name, set(add or ()), set(drop or ()))
    print(f"{member.name}: {', '.join(sorted(member.tags)) or 'no tags'}")


@zoo_app.command()
def verify(name: str, zoo: ZooFile = HERE) -> None:
    """Read every byte of a member again, compare with its registered digest, and print sha256 sums."""
    from glue.care import verified

    for line in verified(opened(zoo), name):
        print(line)


@zoo_app.command()
def gc(zoo: ZooFile = HERE,
       yes: Annotated[bool, typer.Option("--yes", help="Really delete; without it, only tell.")] = False) -> None:
    """Find what nobody needs - products that no member refers to, older versions nothing depends on, drafts of runs
    that have ended, answers of members that are gone - and what all products take; --yes deletes it."""
    from glue.room import human
    from glue.show.zoo import kept_line
    from glue.spare import pruned, stale, unreferenced

    found = opened(zoo)
    said = "deleted" if yes else "would delete"
    gone = [(folder, size, "") for folder, size in unreferenced(found, delete=yes)]
    gone += [(str(one.path), one.size, one.why) for one in stale(found, delete=yes)]
    for place, size, why in gone:
        print(f"{said} {place} ({', '.join(filter(None, (human(size), why)))})")
    if digests := pruned(found, delete=yes):
        print(f"{'forgot' if yes else 'would forget'} the digests of {digests} folders that are not there any more")
    total = human(sum(size for _, size, _ in gone))
    print(f"{len(gone)} files and folders, {total}" + ("" if yes or not gone else "; add --yes to delete them"))
    print(kept_line(found))
