"""`step: search`: the best merge of some of the members, chosen on a dev split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from glue.errors import MethodError
from glue.family import Choice, Count, Of, is_per_member
from glue.member import Member
from glue.steps import Job, Made, Many, Measured, OnDev, One, steps
from glue.steps.merge import compatible, merge_into, source_of, sources_of

SEARCH_NOTE = "search.json"  # in the folder of what a search found: its weights and every candidate it tried


def searchable(merge: Choice, strategy: Choice, **_: Any) -> None:
    """Where the strategy merges, the merge method must take a weight for each member, and any number of members."""
    if not strategy.method.traits.get("merges", True):
        return
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


@steps.add("search", makes="model", lone=True, writes="one", words=searchable, check=mergeable,
           source="arXiv:2410.05357")
def search(job: Job, *, members: Many, strategy: Annotated[Any, Of("searching")],
           merge: Annotated[Any, Of("merging")] = "task_arithmetic", suite: OnDev, base: One | None = None,
           budget: Count = 200) -> Made:
    """The best of the members and their merges, as a strategy finds it on dev items.

    merge   how a candidate is made; the strategy sets its `weight` by member
    budget  the most candidates that may be evaluated
    """
    from glue.search.space import Rule, Space

    done = 0

    def evaluate(candidates: Sequence) -> list[np.ndarray]:
        nonlocal done
        calls = [(candidate, members, base, merge, suite, job.seed) for candidate in candidates]
        found = job.workers.map("glue.steps.search:score_candidate", calls)
        done += len(calls)
        job.report(done, budget, "candidates")
        return [np.concatenate(list(one.values())) for one in found]

    sizes = [len(items) for items in suite.items().values()]
    neutral = frozenset(member.name for member in members if base is not None and member.digest == base.digest)
    on_base = base is not None and merge.method.traits["space"] == "delta"
    rule: Rule = "add" if on_base else "interpolate"
    space = Space(tuple(member.name for member in members), evaluate, np.repeat(np.arange(len(sizes)), sizes),
                  rule=rule, budget=budget, neutral=neutral if rule == "add" else frozenset())
    found = strategy(space)
    seen, note = frozenset(suite.digests().values()), f"{found.candidate} of {done} candidates"
    told = {"merged": found.candidate.merged, "weights": found.candidate.weights, "value": found.value,
            "evaluated": done, "log": [[str(row.candidate), row.value, row.purpose] for row in found.log]}
    (job.folder / SEARCH_NOTE).write_text(json.dumps(told, indent=1))
    if not found.candidate.merged:
        member = _by_name(members)[found.candidate.parts[0][0]]
        return Made(member.kind, base=member.base, seen=seen, same=member, note=note)
    choice, chosen = _choice(found.candidate, members, merge)
    merge_into(job, chosen, base, choice, None)
    return Made("model", base=base or members[0], seen=seen, note=note)


def score_member(running, suite: Measured) -> dict[str, np.ndarray]:
    """Per-item results of whatever runs, by task."""
    from glue.evaluate.fast import prepare, score

    return score(running, prepare(running.tokenizer, suite.suite.tasks, suite.items()))


def score_candidate(candidate, members: list[Member], base: Member | None, merge: Choice, suite: Measured,
                    seed: int) -> dict[str, np.ndarray]:
    """In a worker: per-item results of one candidate by task."""
    from glue.kinds import load
    from glue.kinds.model import assembled
    from glue.merge.engine import merged

    if not candidate.merged:
        return score_member(load(_by_name(members)[candidate.parts[0][0]]), suite)
    choice, chosen = _choice(candidate, members, merge)
    tensors = merged(choice, sources_of(chosen), source_of(base), seed=seed)
    return score_member(assembled(base or members[0], tensors), suite)


def _choice(candidate, members: list[Member], merge: Choice) -> tuple[Choice, list[Member]]:
    """The merge method with the candidate's weights, and the members that take part."""
    chosen = [member for member in members if member.name in candidate.weights]
    weight = [float(candidate.weights[member.name]) for member in chosen]
    return Choice(merge.method, {**merge.params, "weight": weight}), chosen


def _by_name(members: list[Member]) -> dict[str, Member]:
    return {member.name: member for member in members}
