"""`step: join`: datasets laid together."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated

from glue.family import Field
from glue.member import Member
from glue.steps import Datasets, Job, Made, steps
from glue.steps._refine import SOURCES, lines_of


@steps.add("join", makes="dataset")
def join(job: Job, *, data: Datasets, duplicates: Annotated[float, Field(ge=0, lt=1)] = 0.0) -> Made:
    """All items of the datasets, each split by itself, those of train in a random order.

    duplicates  share of the train items that are copies of others, added by chance: a dataset as it is found
    """
    counts = job.workers.call("glue.steps.join:work", job.folder, data, duplicates, job.seed)
    told = ", ".join(f"{count} {split}" for split, count in counts.items() if count)
    return Made("dataset", note=f"{told} of {', '.join(member.short for member in data)}")


def work(folder: Path, data: list[Member], duplicates: float, seed: int) -> dict[str, int]:
    """In a worker: write the files, and which dataset each train item is from."""
    rng, counts, sources = random.Random(f"{seed}|join"), {}, list[str]()
    for split in ("train", "dev", "test"):
        pairs = [(line, member.short) for member in data for line in lines_of(member.folder / f"{split}.jsonl")]
        if split == "train" and pairs:
            more = round(len(pairs) * duplicates / (1 - duplicates))
            pairs += [(line, f"copy of {source}") for line, source in rng.choices(pairs, k=more)]
            rng.shuffle(pairs)
            sources = [source for _, source in pairs]
        if pairs:
            (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line, _ in pairs), encoding="utf-8")
        counts[split] = len(pairs)
    (folder / SOURCES).write_text(json.dumps(sources))
    told = {"joined": [member.name for member in data], "duplicates": duplicates, "seed": seed, "counts": counts}
    (folder / "dataset.json").write_text(json.dumps(told, indent=2) + "\n")
    return counts
