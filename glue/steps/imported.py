"""`step: import`: files that others have written, made an ordinary dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from glue.errors import MethodError, RunError
from glue.family import Natural
from glue.member import Member
from glue.steps import DataFiles, Job, Made, steps
from glue.tune.formats import TALKS, Format, Turns, check_fields


def sensible(format: Format, fields: dict[str, str], turns: Turns, **_: Any) -> None:
    """Fields that the format has, turns only of conversations."""
    check_fields(format, fields)
    if turns == "keep" and format not in TALKS:
        raise MethodError(f"a record of format '{format}' has no turns that could be kept",
                          fix=f"remove  turns: keep,  or say which of {', '.join(TALKS)} the records are")


@steps.add("import", makes="dataset", words=sensible, later=("turns",))
def taken_in(job: Job, *, path: DataFiles, format: Format, split: str | None = None, dev: Natural = 0,
             test: Natural = 0, fields: dict[str, str] = {},  # noqa: B006 - read only
             duplicates: Literal["keep", "drop"] = "keep", faulty: Literal["refuse", "drop"] = "refuse",
             turns: Turns = "part") -> Made:
    """Records of a file or a folder as items in train, dev and test: JSON lines, JSON, Parquet, or what the library
    `datasets` has saved. What lies in the files is part of the origin, so that other bytes make another member.

    path        seen from the recipe's folder; or a dataset of the hub: hub:owner/name, or one of its folders or files,
                hub:owner/name/folder, with @revision after it for one that stays what it is
    format      alpaca: instruction, input, output; sharegpt: conversations of turns with from and value; messages:
                messages of turns with role and content; completion: prompt, completion; text: text; items: question,
                answer, choices. It is never guessed
    split       of a folder that holds several, the one that is meant; all takes every file
    dev, test   how many items are held out, by a hash of their questions; what has a question in common with one of
                them is in no other split
    fields      role -> the key that records have it under:  {output: response}
    duplicates  drop: an item that comes again counts once
    faulty      drop: records that cannot be used are left out and told in dataset.json; else nothing is made
    turns       keep: a conversation is one train item with its turns, which `tune` renders by the chat template of the
                base; part: every answer is an item, whose question is all that came before it
    """
    options = {"format": format, "fields": fields, "split": split, "dev": dev, "test": test, "seed": job.seed,
               "duplicates": duplicates, "faulty": faulty, **({"turns": turns} if turns != "part" else {})}
    counts = job.workers.call("glue.steps.imported:work", job.folder, path, options)
    note = ", ".join(f"{counts[name]:,} {name}" for name in ("train", "dev", "test"))
    more = "".join(f"; {counts[name]:,} {told}" for name, told in (
        ("duplicates", "duplicates dropped"), ("left_out", "beside dev and test left out"),
        ("faulty", "faulty records dropped")) if counts[name])
    name = path.path if path.path.startswith("hub:") else Path(path.path).name
    return Made("dataset", note=f"{name}, {format}: {note}{more}")


def work(folder, files: Member, options: dict[str, Any]) -> dict[str, int]:
    """In a worker: read, part and write. Returns how many there are of what."""
    from glue.tune.intake import parted, taken, write
    from glue.tune.records import files_of

    found = files_of(files.folder, options["split"])
    if found.digest() != files.digest:
        raise RunError(f"{files.path} has changed since this run began", fix="run again")
    items = taken(found, options["format"], options["fields"], drop_faulty=options["faulty"] == "drop",
                  turns=options.get("turns", "part"))
    parts = parted(items.pairs, dev=options["dev"], test=options["test"], seed=options["seed"],
                   duplicates=options["duplicates"])
    write(folder, parts, {"files": [file.name for file in found.files], **options, "records": items.records,
                          "left_out_records": items.faulty, "wrong": list(items.told)})
    return {**{name: len(some) for name, some in parts.splits.items()}, "duplicates": parts.duplicates,
            "left_out": parts.left_out, "faulty": items.faulty}
