"""`step: search`: the best merge of some of the members, chosen on a dev split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from glue.errors import MethodError
from glue.family import Choice, Count, Of, is_per_member
from glue.files import append_line, whole_lines
from glue.member import Member, canonical
from glue.steps import AtOnce, Device, Job, Made, Many, OnDev, One, RunsInFloats, steps
from glue.steps._candidates import Ground
from glue.steps.merge import compatible, spread

if TYPE_CHECKING:
    from glue.refine.shapley import Value
    from glue.search.candidate import Candidate
    from glue.search.space import Found, Space

SEARCH_NOTE = "search.json"  # in the folder of what a search found: its weights and every candidate it tried
JOURNAL = "search.journal"  # beside it: the results of every candidate item by item, one candidate a line


def searchable(merge: Choice, strategy: Choice, **_: Any) -> None:
    """Where the strategy merges, the merge method must take a weight for each member, and any number of members."""
    if not strategy.method.traits.get("merges", True):
        return
    if merge.method.traits["space"] == "factors":
        raise MethodError(f"merge method '{merge.method.name}' makes adapters, and a search tries models",
                          fix="search over linear, task_arithmetic, ties or dare_ties: adapters are models to these")
    info = merge.method.parameters.get("weight")
    fewest, most = merge.method.traits.get("members", (1, None))
    weighted = info is not None and is_per_member(info.annotation, info.metadata)
    if not weighted or fewest > 1 or most is not None:
        lacking = "takes no weight for each member" if not weighted else "does not take any number of members"
        raise MethodError(f"merge method '{merge.method.name}' {lacking}, so a search has nothing to try",
                          fix="search over linear, task_arithmetic, ties or dare_ties")


def mergeable(members: list[Member], merge: Choice, strategy: Choice, base: Member | None = None, **_: Any) -> None:
    """Where the strategy merges, as in `merge`."""
    if strategy.method.traits.get("merges", True):
        compatible(members, merge, base)


@steps.add("search", makes="model", lone=True, writes="one", holds="runs", resumes=True, words=searchable,
           check=mergeable, unkeyed=("device", "batch_size"), later=("runs_in",), source="arXiv:2410.05357")
def search(job: Job, *, members: Many, strategy: Annotated[Any, Of("searching")],
           merge: Annotated[Any, Of("merging")] = "task_arithmetic", suite: OnDev, base: One | None = None,
           budget: Count = 200, items: Count | None = None,
           dtype: Literal["float32", "bfloat16", "float16"] | None = None, device: Device = "cpu",
           runs_in: RunsInFloats = "float32", batch_size: AtOnce = "auto") -> Made:
    """The best of the members and their merges, as a strategy finds it on dev items.

    merge   how a candidate is made; the strategy sets its `weight` by member, and what else it says
    budget  the most candidates that may be measured
    items   the most answers that may be asked for, candidates times items; unless given, all that the budget allows
    dtype   of candidates and of the result; as in `merge`
    device, runs_in, batch_size  where candidates are merged and asked, what they calculate in (`dtype` where it is said
            for all lines), and how many questions they read at once
    """
    ground = Ground.of(members, base, merge, dtype, suite, job.seed, job.place(device, runs_in, batch_size))
    journal = Journal(job.folder / JOURNAL)
    space = _space(job, ground, journal, budget, items, _similarity(job, members, strategy))
    found = strategy(space)
    (job.folder / SEARCH_NOTE).write_text(json.dumps(_told(found), indent=1))
    seen = frozenset(suite.digests().values())
    note = f"{found.candidate} of {found.candidates} candidates, {found.items} answers"
    if not found.candidate.merged:
        member = ground.member(found.candidate.names[0])
        return Made(member.kind, seen=seen, same=member, note=note)
    write_candidate(job, ground, found.candidate)
    return Made("model", base=ground.frame, seen=seen, note=note)


def write_candidate(job: Job, ground: Ground, candidate: Candidate) -> None:
    """Stream the merge that a candidate is into the job's folder, with configuration and tokenizer."""
    spread(ground.variants().merge(ground.setting(candidate)), job.folder, job.workers)
    job.workers.call("glue.kinds.frame:copy_frame", ground.frame, job.folder)


class Journal:
    """What was measured, in a file that a killed search is gone on with: (candidate, items) -> results.

    known  candidate -> results [items], NaN for those that it was not asked
    """

    def __init__(self, file: Path):
        self.file = file

    def known(self, size: int) -> dict[Candidate, np.ndarray]:
        """Everything that was written down, for a search over `size` items."""
        from glue.search.candidate import Candidate

        found: dict[Candidate, np.ndarray] = {}
        for line in map(json.loads, whole_lines(self.file)):
            results = found.setdefault(Candidate.unspelled(line["candidate"]), np.full(size, np.nan))
            results[_indices(line["items"], size)] = line["results"]
        return found

    def add(self, candidate: Candidate, items: np.ndarray | None, results: np.ndarray) -> None:
        """Write one measurement down; items None: all of them."""
        told = "all" if items is None else [int(k) for k in items]
        numbers = [int(value) if value == int(value) else float(value) for value in results]
        append_line(self.file, canonical({"candidate": candidate.spelled(), "items": told, "results": numbers}))


def _indices(told: str | list[int], size: int) -> np.ndarray:
    return np.arange(size) if told == "all" else np.asarray(told, dtype=np.int64)


def _space(job: Job, ground: Ground, journal: Journal, budget: int, answers: int | None,
           similarity: np.ndarray | None) -> Space:
    """The space of a search, whose candidates are measured by the workers and written down as they come back."""
    from glue.search.space import Rule, Space

    members, base = ground.members, ground.base
    sizes = [len(some) for some in ground.suite.items().values()]
    known = journal.known(sum(sizes))
    done = len(known)

    def evaluate(candidates: Sequence[Candidate], items: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
        wanted = [None] * len(candidates) if items is None else list(items)
        calls = [(ground, candidate, some) for candidate, some in zip(candidates, wanted, strict=True)]

        def each(k: int, results: np.ndarray) -> None:
            nonlocal done
            journal.add(candidates[k], wanted[k], results)
            done += 1
            job.report(min(done, budget), budget, "candidates")

        return job.workers.map("glue.steps._candidates:measure", calls, each=each)

    neutral = {member.name for member in members if base is not None and member.digest == base.digest}
    rule: Rule = "add" if base is not None and ground.merge.method.traits["space"] == "delta" else "interpolate"
    own = {word: is_per_member(info.annotation, info.metadata)
           for word, info in ground.merge.method.parameters.items() if word != "weight"}
    return Space([member.name for member in members], evaluate, np.repeat(np.arange(len(sizes)), sizes), rule=rule,
                 budget=budget, item_budget=answers, neutral=frozenset(neutral if rule == "add" else ()), seed=job.seed,
                 parameters=own, layers=ground.layers, similarity=similarity, known=known,
                 shapley=partial(_worth, job.seed))


def _worth(seed: int, n: int, value: Value, most: int) -> list[float]:
    """What each of n players is worth, by all subsets or by as many orders as may be asked."""
    from glue.refine.shapley import shapley

    return shapley(n, value, most=most, chains=most, seed=seed).mean.tolist()


def _similarity(job: Job, members: list[Member], strategy: Choice) -> np.ndarray | None:
    """How alike the members are in their MLPs, where the strategy goes by it: [n, n]."""
    if strategy.params.get("order") not in ("similarity", "dissimilarity"):
        return None
    return job.workers.call("glue.steps._candidates:alike", members)


def _told(found: Found) -> dict[str, Any]:
    """What search.json says: enough to make the same merge again, and every step on the way to it."""
    return {"merged": found.candidate.merged, "weights": found.candidate.weights,
            "candidate": found.candidate.spelled(), "value": found.value, "evaluated": found.candidates,
            "items": found.items, "log": [[str(row.candidate), row.value, row.purpose, row.items]
                                          for row in found.log]}
