"""Everything that can be chosen in a recipe, with its parameters."""

from __future__ import annotations

import json
from typing import Any

from rich.markup import escape

from glue.errors import MethodError, did_you_mean
from glue.family import HOMES, describe, families
from glue.show.terminal import console

FAMILIES = tuple(HOMES)


def method_rows(family: str) -> list[dict[str, Any]]:
    """Every method of a family: name, parameters in words, first sentence, source."""
    return [{"family": family, "name": method.name, "about": method.doc.split("\n\n")[0].replace("\n", " "),
             "parameters": {name: describe(info) for name, info in method.parameters.items()},
             "source": method.source} for method in families(family)]


def print_methods(family: str | None, as_json: bool) -> None:
    """All methods of one family, or of all."""
    if family is not None and family not in FAMILIES:
        raise MethodError(f"there is no family '{family}'{did_you_mean(family, FAMILIES)}")
    chosen = [family] if family else [name for name in FAMILIES if name != "kinds"]
    if as_json:
        print(json.dumps([row for name in chosen for row in method_rows(name)], indent=1))
        return
    out = console()
    for name in chosen:
        out.print(f"\n[bold]{name}[/] [dim]({families(name).noun}: {families(name).first})[/]")
        for row in method_rows(name):
            out.print(f"  [cyan]{row['name']}[/]  {escape(row['about'])} [dim]{row['source']}[/]")
            for word, about in row["parameters"].items():
                out.print(f"      {word}: [dim]{escape(about)}[/]")
