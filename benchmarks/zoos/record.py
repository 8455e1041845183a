"""Score tables for tests: everything that the two searches of a zoo asked for, so that they can be run again alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from glue.plan import Plan
from glue.steps import Measured
from glue.steps.search import JOURNAL, Journal

UNKNOWN = -1  # an answer that was not asked for


def record(plan: Plan, folder: Path) -> Path:
    """Write zoo-SEED.npz: `results` [candidates, items] of 0, 1 or UNKNOWN, `tasks` [items], and the rest as JSON."""
    tasks = {task.line.name: task for task in plan}
    arguments = tasks["grid"].arguments
    suite: Measured = arguments["suite"]
    sizes = [len(items) for items in suite.items().values()]
    rows: dict = {}
    for name in ("grid", "raced"):
        for candidate, results in Journal(tasks[name].folder(plan.zoo) / JOURNAL).known(sum(sizes)).items():
            before = rows.setdefault(candidate, results)
            rows[candidate] = np.where(np.isnan(before), results, before)
    ordered = sorted(rows)
    told = {"names": [member.name for member in arguments["members"]], "base": arguments["base"].name,
            "seed": tasks["grid"].line.seed, "candidates": [candidate.spelled() for candidate in ordered]}
    file = folder / f"zoo-{plan.recipe.seed}.npz"
    results = np.nan_to_num(np.stack([rows[candidate] for candidate in ordered]), nan=UNKNOWN).astype(np.int8)
    np.savez_compressed(file, results=results, tasks=np.repeat(np.arange(len(sizes), dtype=np.int8), sizes),
                        told=np.array(json.dumps(told)))
    return file
