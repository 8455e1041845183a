"""The parts of the documentation that follow from the code: docs/methods.md and the table of methods in README.md.

    python -m glue.docs            writes them
    python -m glue.docs --check    writes nothing and fails where they are out of date
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from glue.errors import GlueError
from glue.family import HOMES, PER_MEMBER, Family, Method, Of, describe, families, marks
from glue.files import write_aside
from glue.steps import Takes

START, END = "<!-- methods: made by `python -m glue.docs` -->", "<!-- end of methods -->"
MEMBERS = {"one": "a member", "many": "members: names, `tag:x`, groups",
           "shares": "a mapping from datasets to shares > 0", "suite": "a suite and split, `name:dev` or `name:test`",
           "config": "a YAML of mergekit, beside the recipe", "files": "a file or a folder, seen from the recipe's"}
HEAD = """\
# Methods

Everything that a recipe can choose, family by family. This page is made from the signatures of the registered
functions by `python -m glue.docs`; `glue methods` prints the same in a terminal.
"""


def pages(root: Path) -> dict[Path, str]:
    """What each generated file should hold: path -> text. Raises GlueError where README.md has lost its markers."""
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise GlueError(f"{readme} has no place for the table of methods", fix=f"put back the lines {START} and {END}")
    table = "\n".join(overview())
    return {root / "docs" / "methods.md": "\n".join(reference()) + "\n",
            readme: f"{before}{START}\n{table}\n{END}{after}"}


def overview() -> Iterator[str]:
    """A table with one row for each family."""
    yield "| family | said in a recipe as | what there is | a new one is one file in |"
    yield "|---|---|---|---|"
    for family in _shown():
        names = ", ".join(f"[{method.name}](docs/methods.md#{_anchor(family, method)})" for method in family)
        yield f"| {family.key} | {_said(family)} | {names} | `{family.folder.replace('.', '/')}/` |"


def reference() -> Iterator[str]:
    """docs/methods.md: every method with its parameters."""
    yield HEAD
    for family in _shown():
        yield f"## {family.key}\n"
        yield f"A {family.noun} is a function {family.first}. In a recipe: {_said(family)}.\n"
        for method in family:
            yield from _method(family, method)


def _method(family: Family, method: Method) -> Iterator[str]:
    about, _, more = method.doc.partition("\n\n")
    yield f"### {family.noun}: {method.name}\n"
    yield about.replace("\n", " ") + (f" Source: {method.source}." if method.source else "") + "\n"
    if method.parameters:
        yield "| parameter | what it is | default |"
        yield "|---|---|---|"
        for name, info in method.parameters.items():
            yield f"| `{name}` | {_kind(info)} | {_default(info)} |"
        yield ""
    if more:
        yield f"```text\n{more}\n```\n"


def _kind(info: Any) -> str:
    """A parameter in words, without its default; members, suites and choices by what a recipe writes."""
    for mark in marks(info):
        if isinstance(mark, Of):
            noun = families(mark.family).noun
            return f"a {noun}: a word, or a word with its parameters"
        if isinstance(mark, Takes):
            if mark.how == "suite" and len(mark.kinds) == 1:
                return f"a suite and split, `name:{mark.kinds[0]}`"
            of = f" ({' or '.join(mark.kinds)})" if mark.how in ("one", "many") else ""
            return MEMBERS[mark.how] + of
    words = describe(info).partition(", default ")[0].replace("|", "\\|")
    return words.replace("(one for all, or by member)", f"({PER_MEMBER})")


def _default(info: Any) -> str:
    if info.is_required():
        return "needed"
    if info.default is None:
        return "none"
    return f"`{info.default if isinstance(info.default, str) else json.dumps(info.default)}`"


def _said(family: Family) -> str:
    """Which parameters of which steps take a method of the family."""
    if family.key == "steps":
        return "`step:` of every line"
    found = [f"`{name}:` of {step.name}" for step in families("steps") for name, info in step.parameters.items()
             if any(isinstance(mark, Of) and mark.family == family.key for mark in marks(info))]
    return ", ".join(found)


def _shown() -> list[Family]:
    """All families that recipes can choose from; steps first."""
    return [families(key) for key in sorted(HOMES, key=lambda key: key != "steps") if key != "kinds"]


def _anchor(family: Family, method: Method) -> str:
    """The anchor that a heading of docs/methods.md gets."""
    return f"{family.noun} {method.name}".lower().replace(" ", "-")


def main(arguments: list[str] | None = None) -> int:
    """Write the generated parts, or with --check only compare; 1 where something is out of date."""
    parser = argparse.ArgumentParser(prog="python -m glue.docs", description="Write what follows from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is out of date")
    check = parser.parse_args(arguments).check
    old = 0
    for file, text in pages(Path.cwd()).items():
        if file.exists() and file.read_text(encoding="utf-8") == text:
            continue
        old += 1
        if not check:
            write_aside(file, text)
        print(f"{file.relative_to(Path.cwd())} {'is out of date; run  python -m glue.docs' if check else 'written'}")
    return int(check and old > 0)


if __name__ == "__main__":
    raise SystemExit(main())
