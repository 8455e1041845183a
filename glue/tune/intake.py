"""Datasets of others made ours: every record checked, duplicates kept together, and parted into train, dev and test.

Which items are dev and test is decided by a hash of how their question begins, not by their place: the same record is
on the same side whatever else is in the files, and items that have their question in common are never on two sides.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from glue.errors import GlueError, Mistakes, SuiteError
from glue.tune.formats import Format, Pair, Turns, pairs
from glue.tune.records import Files

TOLD = 20  # mistakes that are told one by one
Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Taken:
    """What was read.

    pairs   items in the order of the files
    faulty  how many of the records cannot be used; told: what is wrong with the first of them
    """

    pairs: tuple[Pair, ...]
    records: int
    faulty: int = 0
    told: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parted:
    """Items by split.

    duplicates  items that came again, as far as they were dropped
    left_out    items that have a question in common with one of dev or test, and are in no split
    """

    splits: Mapping[str, tuple[Pair, ...]]
    duplicates: int
    left_out: int


def taken(files: Files, format: Format, fields: Mapping[str, str], *, drop_faulty: bool = False,
          turns: Turns = "part") -> Taken:
    """Every item of these files. Raises Mistakes with all that is wrong, unless faulty records are to be dropped."""
    found: list[Pair] = []
    wrong: list[GlueError] = []
    count = records = 0
    for record in files.records():
        records += 1
        try:
            if record.wrong is not None:
                raise record.wrong
            found += pairs(record.value, format, fields, turns)
        except SuiteError as problem:
            count += 1
            if len(wrong) < TOLD:
                wrong.append(problem.at(record.place))
    if wrong and not drop_faulty:
        more = [SuiteError(f"and {count - TOLD:,} records more", fix="faulty: drop  leaves all of them out")]
        raise Mistakes([*wrong, *(more if count > TOLD else [])])
    if not found:
        file = files.files[0]
        raise SuiteError(f"no record of {file} can be used" if wrong else f"{file} holds no records",
                         fix=str(wrong[0]) if wrong else "give it at least one")
    return Taken(tuple(found), records, count, tuple(str(one).partition("\n")[0] for one in wrong))


def parted(items: Sequence[Pair], *, dev: int, test: int, seed: int, duplicates: Literal["keep", "drop"]) -> Parted:
    """Items in train, dev and test; train keeps their order, in dev and test each question stands once.

    dev, test  how many. Raises SuiteError where there are not so many questions.
    """
    before = len(items)
    if duplicates == "drop":
        items = list(dict.fromkeys(items))
    families: dict[str, list[int]] = {}
    for k, item in enumerate(items):
        families.setdefault(item.kin, []).append(k)
    drawn = sorted(families, key=lambda kin: sha256(f"{seed}|{kin}".encode()).digest())
    held: dict[str, list[int]] = {"test": [], "dev": []}
    gone: set[int] = set()
    for kin in drawn:
        split = next((name for name, most in (("test", test), ("dev", dev)) if len(held[name]) < most), None)
        if split is None:
            break
        own = list({items[k].question: k for k in reversed(families[kin])}.values())  # the first of each question
        held[split] += sorted(own)[:{"test": test, "dev": dev}[split] - len(held[split])]
        gone |= set(families[kin])
    for name, most in (("test", test), ("dev", dev)):
        if len(held[name]) < most:
            have = len({item.question for item in items})
            raise SuiteError(f"{dev} dev and {test} test items are asked for, and there are {have:,} different "
                             f"questions", fix="ask for fewer")
    splits = {"train": [k for k in range(len(items)) if k not in gone], **{name: sorted(held[name]) for name in held}}
    kept = sum(map(len, splits.values()))
    return Parted({name: tuple(items[k] for k in some) for name, some in splits.items()}, before - len(items),
                  len(items) - kept)


def write(folder: Path, found: Parted, about: Mapping[str, Any]) -> None:
    """Write train.jsonl, dev.jsonl and test.jsonl as other datasets have them, and dataset.json, which tells more."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in found.splits.items():
        if some:
            with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(_line(item, turns=name == "train")) + "\n" for item in some)
    counts = Counter({name: len(some) for name, some in found.splits.items()})
    told = {**about, "counts": counts, "duplicates": found.duplicates, "left_out": found.left_out}
    (folder / "dataset.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _line(item: Pair, *, turns: bool) -> dict[str, Any]:
    """An item as it stands in a file; its turns too, where it may teach and is not only asked."""
    told = {"question": item.question, "choices": list(item.choices),
            "gold": item.choices.index(item.answer) if item.choices else 0, "answer": item.answer}
    if item.turns and turns:
        told["messages"] = [{"role": role, "content": text} for role, text in item.turns]
    return told
