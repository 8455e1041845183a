"""results.json: what runs have measured, claim by claim and seed by seed.

    {"model-glue/beats-best": {"0": {"date": ..., "made": {...}, "parts": [{asked, value, low, high, items, digests}]}}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.reproduction.claims import Claim
from benchmarks.reproduction.measure import Measured
from glue.errors import RecipeError
from glue.evaluate.statistics import Interval
from glue.files import write_aside

Results = dict[str, dict[str, dict[str, Any]]]


class Part(NamedTuple):
    """What one thing that a claim shows came to at a seed. `same`: all that was compared is one and the same member."""

    found: Interval
    same: bool = False


Parts = dict[int, list[Part]]  # by seed


def read_results(file: Path) -> Results:
    """What was measured so far; nothing where there is no file. Raises RecipeError where it cannot be read."""
    if not file.exists():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise RecipeError(f"{file} cannot be read: {problem}",
                          fix="python -m benchmarks.reproduction run  writes it anew, once it is gone") from None


def noted(results: Results, key: str, seed: int, measured: Sequence[Measured], date: str) -> None:
    """Note what a claim came to at a seed. The date of what has not changed stays: it is when it was first found."""
    parts = [{"asked": one.asked, "value": one.found.value, "low": one.found.low, "high": one.found.high,
              "items": one.items, "digests": dict(one.digests)} for one in measured]
    entry = {"date": date, "made": {name: version for one in measured for name, version in one.made.items()},
             "parts": parts}
    before = results.setdefault(key, {}).get(str(seed), {})
    if {**before, "date": date} != entry:
        results[key][str(seed)] = entry


def write_results(file: Path, results: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Write what was measured, in the order of the claims; claims that are gone are dropped."""
    ordered = {key: dict(sorted(results[key].items(), key=lambda item: int(item[0]))) for key in keys if key in results}
    lines = [f" {json.dumps(key)}: {{\n" + ",\n".join(f"  {json.dumps(seed)}: {json.dumps(entry)}"
                                                     for seed, entry in found.items()) + "\n }"
             for key, found in ordered.items()]  # one seed of one claim a line
    write_aside(file, "{\n" + ",\n".join(lines) + "\n}\n")


def parts(results: Results, claim: Claim) -> Parts:
    """What each thing that the claim shows came to. Answers to other questions than it asks now do not count."""
    asked = [show.asked for show in claim.shows]
    entries = {int(seed): entry["parts"] for seed, entry in results.get(claim.key, {}).items()}
    return {seed: [Part(Interval(part["value"], part["low"], part["high"]),
                        len(part["digests"]) > len(set(part["digests"].values())) == 1) for part in some]
            for seed, some in entries.items() if [part["asked"] for part in some] == asked}
