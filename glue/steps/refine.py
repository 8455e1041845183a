"""`step: refine`: the part of a dataset that is worth the most to a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from glue.errors import MethodError
from glue.family import Choice, Count, Field, Natural, NonNegative, Of, Positive, Share
from glue.files import write_aside
from glue.member import Member, canonical
from glue.steps import Dataset, Device, Job, Made, OnDev, Tunable, steps
from glue.steps._refine import EXAMPLES, TRAIN, VALUES, By, Embed, Ground, asked_last, lines_of, write_chosen

if TYPE_CHECKING:
    from glue.refine.shapley import Valued

JOURNAL = "values.journal"  # the value of each subset of clusters, as it was measured
POOL, PLAYERS = "pool", "players"  # in the draft: all that may be chosen from; what stands for clusters
NEEDED = {"values": (VALUES, "values of clusters", "say  base: and suite:  so that clusters are valued"),
          "losses": (EXAMPLES, "losses of a base", "say  base:"), "places": (EXAMPLES, "", "")}
Kept = Share | Annotated[int, Field(ge=2)]


def sensible(select: Choice, keep: float, base: Any, suite: Any, embed: str, surprise: float, rank: int,
             targets: list[str], **_: Any) -> None:
    """Words that do not go together."""
    if select.method.traits.get("all") and keep != 1:
        raise MethodError(f"'{select.method.name}' keeps everything, and keep is {keep:g}", fix="leave 'keep' out")
    if suite and not base:
        raise MethodError("clusters are valued by what a model learns of them, and no base is named", fix="say  base:")
    if (embed == "hidden" or surprise) and not base:
        raise MethodError("embed: hidden and surprise ask a model, and no base is named", fix="say  base:  or neither")
    if bool(rank) != bool(targets):
        raise MethodError("an adapter has a rank and targets", fix="say both, or neither to train all weights")


def selectable(data: Member, select: Choice, base: Member | None, suite: Any, **_: Any) -> None:
    """What a selector goes by must be measured here, or have been when the dataset was made."""
    need = select.method.traits.get("needs")
    here = {"values": suite is not None, "losses": base is not None, "places": True}
    if need and not here[need] and (base is not None or not _has(data.folder, need)):
        raise MethodError(f"'{select.method.name}' goes by {NEEDED[need][1]}, which '{data.name}' does not bring",
                          fix=f"{NEEDED[need][2]}, or name a refined dataset that has them")


def _has(folder: Path, need: str) -> bool:
    file = folder / NEEDED[need][0]
    return file.is_file() and (need != "losses" or "loss" in json.loads(lines_of(file)[0]))


@steps.add("refine", makes="dataset", holds="trains", resumes=True, words=sensible, check=selectable,
           unkeyed=("device",), source="arXiv:2405.00705")
def refine(job: Job, *, data: Dataset, select: Annotated[Any, Of("selecting")], keep: Kept = 1.0,
           base: Tunable | None = None, suite: OnDev | None = None, dedup: bool = False, clusters: Count = 60,
           embed: Embed = "words", surprise: NonNegative = 0.0, representatives: Count = 1, by: By = "loss",
           epochs: Count = 3, learning_rate: Positive = 1e-3, batch_size: Count = 16,
           prompt_weight: NonNegative = 0.05, rank: Natural = 0, alpha: Positive = 16.0,
           targets: list[str] = [], chains: Count = 10, block: Count = 1, antithetic: bool = True,  # noqa: B006
           tolerance: NonNegative = 0.0, precision: NonNegative = 0.0, most: Count | None = None,
           device: Device = "cpu") -> Made:
    """The examples of a dataset that a selector chooses; with `suite`, after valuing clusters of them on its dev items.

    keep       share of the examples, or from 2 on their number
    base       whose losses are noted, and what is taught; without it, what `data` has been measured by counts: so one
               line that selects `full` values a dataset, and others choose from what it leaves
    dedup      first drop examples whose question and answer have come before
    clusters   of alike examples; by words (TF-IDF), by the base's hidden state, or by a sentence encoder that is here
    surprise   how far apart one standard deviation of the base's losses sets two examples whose places else have
               length 1: apart from this, a wrong answer lies where the right one does
    representatives   of each cluster, nearest to its middle: a cluster is worth what these are
    by         how a fit on the representatives of some clusters is measured: loss on the suite's answers, or its score
    epochs, learning_rate, batch_size, prompt_weight  of each fit; all begin at the base
    rank, alpha, targets  of an adapter, if that is to be taught and not all weights
    chains, block, antithetic, tolerance, precision, most  orders in which clusters leave, how many at a time, in pairs
               of opposite ones; how little counts as nothing; how precise is enough; how many fits may be made
    """
    pool = job.folder / POOL
    if not (pool / EXAMPLES).is_file():  # else left by a run that was killed
        job.workers.call("glue.steps._refine:pooled", pool, data.folder, dedup, base is None)
        if not (pool / EXAMPLES).is_file():
            job.workers.call("glue.steps._refine:placed", pool, embed, surprise, clusters, base, job.seed,
                             job.place(device))
    told: dict[str, Any] = {}
    if suite is not None:
        assert base is not None, "checked when planned"
        lora = {"r": rank, "alpha": alpha, "targets": targets} if rank else None
        fit = {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size,
               "prompt_weight": prompt_weight, "lora": lora}
        players = Players.of(pool, representatives, job.folder / PLAYERS)
        key = sha256(canonical([base.digest, fit, suite.told(), suite.digests(), by, job.seed, players.owner,
                                (players.folder / TRAIN).read_text()]).encode()).hexdigest()
        ground = Ground(key, base, players.folder, players.owner, fit, suite, by, job.seed, job.place(device))
        valued = _valued(job, ground, players.count, chains=chains, block=block, antithetic=antithetic,
                         tolerance=tolerance, precision=precision, most=most)
        write_aside(pool / VALUES, "".join(json.dumps(row) + "\n" for row in _rows(valued, players)))
        trained = epochs * sum(players.owner.count(k) for subset in valued.values for k in subset)
        told = {"fits": valued.fits, "trained": trained, "exact": valued.exact, "by": by,
                "all": valued.values[frozenset(range(players.count))], "nobody": valued.values[frozenset()]}
    count = write_chosen(job.folder, pool, data.folder, select, keep, job.seed, told)
    shutil.rmtree(pool)
    shutil.rmtree(job.folder / PLAYERS, ignore_errors=True)
    note = f"{count[0]:,} of {count[1]:,} examples of {data.short} by {select.method.name}"
    if told:
        note += f"; {told['fits']:,} values of clusters, {told['trained']:,} trained examples"
    return Made("dataset", seen=frozenset(suite.digests().values()) if suite else frozenset(), note=note)


@dataclass(frozen=True)
class Players:
    """The examples that stand for clusters, written as a dataset, those of one cluster after those of the other.

    owner  cluster of each
    """

    folder: Path
    owner: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many clusters there are."""
        return max(self.owner) + 1

    @staticmethod
    def of(pool: Path, each: int, folder: Path) -> Players:
        """Those of a pool, at most `each` of a cluster."""
        from glue.refine.clusters import representatives

        told, lines = [json.loads(line) for line in lines_of(pool / EXAMPLES)], lines_of(pool / TRAIN)
        chosen = representatives(np.array([line["cluster"] for line in told]),
                                 np.array([line["distance"] for line in told]), each)
        folder.mkdir(exist_ok=True)
        write_aside(folder / TRAIN, "".join(f"{asked_last(lines[k])}\n" for some in chosen for k in some))
        return Players(folder, tuple(cluster for cluster, some in enumerate(chosen) for _ in some))


def _valued(job: Job, ground: Ground, count: int, **game: Any) -> Valued:
    """The table of clusters; fits are spread over the workers, and written down as they come."""
    from glue.refine.journal import Journal
    from glue.refine.shapley import shapley

    journal = Journal(job.folder / JOURNAL, ground.key)

    def value(subsets: Sequence[frozenset[int]]) -> list[float]:
        return job.workers.map("glue.steps._refine:worth", [(ground, subset) for subset in subsets],
                               each=lambda k, found: journal.add(subsets[k], found))

    return shapley(count, value, seed=job.seed, journal=journal, report=job.report, **game)


def _rows(valued: Valued, players: Players) -> list[dict[str, Any]]:
    """One line a cluster; an interval that one order cannot tell is null."""
    questions = [json.loads(line)["question"] for line in lines_of(players.folder / TRAIN)]
    columns = {"value": valued.mean, "error": valued.error, "low": valued.low, "high": valued.high}
    return [{"cluster": k, **{name: float(some[k]) if isfinite(some[k]) else None for name, some in columns.items()},
             "example": questions[players.owner.index(k)]} for k in range(players.count)]
