"""Results that lm-eval's own command left (`--output_path DIR --log_samples`), read item by item as scores of a member.

Nothing is measured again: every number is the file's, and the items are held against it. A metric that is no mean over
items (a perplexity, say) is told with its value, but makes no score.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glue.errors import Place, SuiteError
from glue.files import append_line, whole_lines
from glue.member import Member, Score, canonical

_STAMP = re.compile(r"_(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.json$")
IMPORTED = "lm-eval:test"  # what imported scores are of, where no suite is named
LOGGED = "run lm-eval again with  --log_samples --output_path DIR"


@dataclass(frozen=True)
class Measure:
    """One metric of one task.

    filter   through which what was written went; "none" for choices
    stderr   of the value, as lm-eval gives it; None where it gives none
    items    one number per item, in the order of the documents; None where the value is not their mean
    split    digest of the documents and what is right of each: equal for the same questions, however they were put
    prompts  digest of the first prompt of each document: shots, templates and instructions
    chance   what guessing scores, where there are choices to guess among
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    items: tuple[float, ...] | None
    version: str
    shots: int
    split: str
    prompts: str
    chance: float


@dataclass(frozen=True)
class Results:
    """What one run of lm-eval found out about one model.

    model     as it was named there, with its arguments
    versions  of lm_eval and transformers
    groups    name -> the tasks below it
    """

    file: Path
    model: str
    model_args: Mapping[str, Any]
    versions: Mapping[str, str]
    groups: Mapping[str, tuple[str, ...]]
    measures: tuple[Measure, ...]


def read(folder: Path) -> Results:
    """The newest run in an output folder of lm-eval, or in the folder of one model below it. Raises SuiteError."""
    file, stamp = _newest(folder)
    told = _json(file.read_bytes(), str(file))
    if not isinstance(told, dict) or not isinstance(told.get("results"), dict):
        raise SuiteError(f"{file} is no results file of lm-eval: it has no 'results'")
    for key in ("configs", "versions", "n-shot", "n-samples"):
        if not isinstance(told.get(key), dict):
            raise SuiteError(f"{file} does not say '{key}'", fix="lm-eval 0.4 writes it; older results cannot be read")
    groups = {name: tuple(some) for name, some in told.get("group_subtasks", {}).items() if some}
    measures: list[Measure] = []
    for task in told["results"]:
        if task not in groups:
            samples = _samples(file.parent / f"samples_{task}_{stamp}.jsonl", task)
            measures += _measures(task, told, samples, file)
    config = told.get("config", {})
    args = config.get("model_args") or {}
    if isinstance(args, str):  # as they were typed
        args = dict(part.split("=", 1) for part in args.split(",") if "=" in part)
    versions = {"lm_eval": str(told.get("lm_eval_version", "")),
                "transformers": str(told.get("transformers_version", ""))}
    return Results(file, str(told.get("model_name", "")), args, versions, groups, tuple(measures))


def scores(found: Results, member: Member, suite: str = IMPORTED) -> list[Score]:
    """The measures that have items, as scores of `member`: that this is what was measured is the caller's word."""
    return [Score(member.name, member.digest, suite, one.task, one.metric, one.items, one.split, _how(one, found),
                  one.chance) for one in found.measures if one.items is not None]


def add_scores(folder: Path, member: Member, store: Path, suite: str = IMPORTED) -> tuple[list[Score], list[str]]:
    """Read `folder` and append what is new of it to `store`, the zoo's scores.jsonl.

    Returns all of its scores, and "task metric" of each measure that makes none. Raises SuiteError.
    """
    found = read(folder)
    made = scores(found, member, suite)
    if not made:
        raise SuiteError(f"nothing in {found.file} is a mean over items, so there is no score to import")
    known = {(line["digest"], line["task"], line["split"], line["how"]) for line in map(json.loads, whole_lines(store))}
    for score in made:
        if (score.digest, score.task, score.split, score.how) not in known:
            append_line(store, canonical(score.as_dict()))
    return made, [f"{one.task} {one.metric}" for one in found.measures if one.items is None]


def _how(one: Measure, found: Results) -> str:
    return canonical({"harness": f"lm-eval {found.versions['lm_eval']}", "task": one.task, "version": one.version,
                      "num_fewshot": one.shots, "metric": one.metric, "filter": one.filter, "prompts": one.prompts})


def _newest(folder: Path) -> tuple[Path, str]:
    """The newest results file, and the time in its name."""
    if not folder.is_dir():
        raise SuiteError(f"there is no folder {folder}", fix="name the DIR of lm-eval's --output_path")
    found = [(match[1], file) for file in folder.rglob("*.json") if (match := _STAMP.search(file.name))]
    if not found:
        raise SuiteError(f"there is no results_<time>.json of lm-eval in {folder}", fix=LOGGED)
    places = sorted({file.parent for _, file in found})
    if len(places) > 1:
        raise SuiteError(f"{folder} has results of {len(places)} models", fix=f"name one of them, such as {places[0]}")
    stamp, file = max(found)
    return file, stamp


def _json(text: bytes, name: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise SuiteError(f"this is not JSON: {str(problem)[:80]}", place=Place(name, line, 1),
                         fix="the file is damaged or half written; copy it again") from None


def _samples(file: Path, task: str) -> dict[str, list[dict[str, Any]]]:
    """Filter -> rows in the order of the documents."""
    if not file.is_file():
        raise SuiteError(f"task '{task}' has results but no items: there is no {file.name}", fix=LOGGED)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for number, line in enumerate(file.read_bytes().removesuffix(b"\n").split(b"\n"), start=1):
        row, place = _json(line, str(file), number), Place(str(file), number, 1)
        lacking = [key for key in ("doc_id", "doc_hash", "prompt_hash", "target_hash", "arguments", "metrics")
                   if not isinstance(row, dict) or key not in row]
        if lacking:
            raise SuiteError(f"an item does not say '{lacking[0]}'", place=place,
                             fix="lm-eval 0.4.3 and later write it; older items cannot be read")
        rows = found.setdefault(row.get("filter", "none"), {})
        if row["doc_id"] in rows:
            raise SuiteError(f"document {row['doc_id']} stands twice", place=place, fix="copy the file again")
        rows[row["doc_id"]] = row
    return {name: [rows[k] for k in sorted(rows)] for name, rows in found.items()}


def _measures(task: str, told: dict[str, Any], samples: dict[str, list[dict[str, Any]]],
              file: Path) -> Iterator[Measure]:
    config, count = told["configs"].get(task, {}), told["n-samples"].get(task, {}).get("effective")
    means = {line["metric"] for line in config.get("metric_list") or () if line.get("aggregation") == "mean"}
    for key, value in told["results"][task].items():
        metric, comma, name = key.partition(",")
        if not comma or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        rows = samples.get(name, [])
        if len(rows) != count:
            raise SuiteError(f"task '{task}' has {len(rows)} items with filter '{name}', and its results are of "
                             f"{count}", place=Place(str(file), 1, 1),
                             fix="the two files are not of one run, or one is cut off")
        items = _items(rows, metric)
        if items is None or not math.isclose(sum(items) / len(items), value, rel_tol=1e-9, abs_tol=1e-12):
            if metric in means:
                seen = "items without it" if items is None else f"items whose mean is {sum(items) / len(items):.6g}"
                raise SuiteError(f"{metric} of task '{task}' is {value:.6g} in the results, and there are {seen}",
                                 place=Place(str(file), 1, 1), fix="the two files are not of one run; copy both again")
            items = None
        stderr = told["results"][task].get(f"{metric}_stderr,{name}")
        yield Measure(task, metric, name, float(value), float(stderr) if isinstance(stderr, (int, float)) else None,
                      items, str(told["versions"].get(task, "")), int(told["n-shot"].get(task) or 0),
                      rows_digest(rows, "doc_hash", "target_hash"), rows_digest(rows, "prompt_hash"),
                      _chance(rows) if config.get("output_type") == "multiple_choice" and metric.startswith("acc")
                      else 0.0)


def _items(rows: list[dict[str, Any]], metric: str) -> tuple[float, ...] | None:
    values = [float(row[metric]) for row in rows if isinstance(row.get(metric), (bool, int, float))]
    return tuple(values) if rows and len(values) == len(rows) else None


def _chance(rows: list[dict[str, Any]]) -> float:
    """Mean over items of one over the number of choices; acc_mutual_info asks for each choice twice."""
    twice = 2 if "acc_mutual_info" in rows[0]["metrics"] else 1
    return sum(twice / max(1, len(row["arguments"])) for row in rows) / len(rows)


def rows_digest(rows: Sequence[Mapping[str, Any]], *keys: str) -> str:
    """sha256 of what some keys say in each row of lm-eval's samples, in their order."""
    return hashlib.sha256(canonical([[row[key] for key in keys] for row in rows]).encode()).hexdigest()
