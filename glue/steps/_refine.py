"""What `step: refine` does with files: what may be chosen from, its clusters, a short fit on some, the choice."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from glue.errors import GlueError
from glue.family import Choice
from glue.files import write_aside
from glue.kinds import Place
from glue.member import Member
from glue.refine.pool import Pool
from glue.steps import Measured

if TYPE_CHECKING:
    from glue.tune.items import Item
    from glue.tune.refit import Start

Embed = Literal["words", "hidden", "sentences"]
By = Literal["loss", "score"]
TRAIN = "train.jsonl"
EXAMPLES = "examples.jsonl"  # beside it, line by line: cluster, distance from its middle, loss
VALUES = "values.jsonl"  # one line a cluster
PLACES, SOURCES = "places.npy", "sources.json"  # of each line: where it lies, which dataset it was joined from
REPORT = "refine.json"  # what was valued, what it took, and what was chosen


def lines_of(file: Path) -> list[str]:
    """The lines of a split as they are; not by splitlines, since U+2028 may stand inside of a question."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return text.removesuffix("\n").split("\n") if text else []


def pairs_of(lines: list[str]) -> list[tuple[str, str]]:
    """Question and answer of each line."""
    told = [json.loads(line) for line in lines]
    return [(line["question"], line["answer"]) for line in told]


def asked_last(line: str) -> str:
    """A line without the turns of its conversation: one item, its last question and answer, whatever else was said."""
    told = json.loads(line)
    kept = {word: value for word, value in told.items() if word != "messages"}
    return line if kept == told else json.dumps(kept)


def pooled(pool: Path, data: Path, dedup: bool, measured: bool) -> None:
    """Write all that may be chosen from: the train items, each once with `dedup`, and what the dataset tells of them.

    measured  whether that includes clusters and values
    """
    lines = lines_of(data / TRAIN)
    if not lines:
        raise GlueError(f"{data / TRAIN} holds no items to choose from", fix="make the dataset with  train: 1  or more")
    rows = np.arange(len(lines))
    if dedup:
        first: dict[tuple[str, str], int] = {}
        for k, pair in enumerate(pairs_of(lines)):
            first.setdefault(pair, k)
        rows = np.array(list(first.values()))
    shutil.rmtree(pool, ignore_errors=True)  # what a worker has left that was lost
    pool.mkdir(parents=True)
    if measured and (data / VALUES).is_file():
        shutil.copy(data / VALUES, pool / VALUES)
    _write_rows(pool, data, rows, (EXAMPLES, PLACES) if measured else ())


def _write_rows(out: Path, folder: Path, rows: np.ndarray, more: Sequence[str]) -> None:
    """Some of the train items, with what is told of each, what says that all is there last."""
    if (folder / SOURCES).is_file():
        sources = json.loads((folder / SOURCES).read_text())
        (out / SOURCES).write_text(json.dumps([sources[k] for k in rows]))
    if PLACES in more and (folder / PLACES).is_file():
        np.save(out / PLACES, np.load(folder / PLACES)[rows])
    for name in (TRAIN, EXAMPLES):
        if (lines := lines_of(folder / name)) and name in (TRAIN, *more):
            write_aside(out / name, "".join(f"{lines[k]}\n" for k in rows))


def write_chosen(out: Path, pool: Path, data: Path, select: Choice, keep: float, seed: int,
                 told: Mapping[str, Any]) -> tuple[int, int]:
    """Choose from a pool and write a dataset; returns how many, of how many. Other splits of `data` are taken over."""
    lines = [json.loads(line) for line in lines_of(pool / EXAMPLES)]
    values = [json.loads(line) for line in lines_of(pool / VALUES)]
    size = round(keep * len(lines)) if keep <= 1 else int(keep)
    cluster = np.array([line["cluster"] for line in lines])
    sees = Pool(max(1, size), seed, cluster, np.array([line["value"] for line in values]) if values else None,
                np.load(pool / PLACES), np.array([line["loss"] for line in lines]) if "loss" in lines[0] else None)
    rows = np.sort(select(sees))
    _write_rows(out, pool, rows, (EXAMPLES, PLACES))
    if values:
        of, taken = np.bincount(cluster, minlength=len(values)), np.bincount(cluster[rows], minlength=len(values))
        write_aside(out / VALUES, "".join(json.dumps({**line, "size": int(of[k]), "chosen": int(taken[k])}) + "\n"
                                          for k, line in enumerate(values)))
    for split in ("dev", "test"):
        if (data / f"{split}.jsonl").is_file():
            shutil.copy(data / f"{split}.jsonl", out / f"{split}.jsonl")
    report = {**told, "select": select.spelled(), "of": len(lines), "kept": len(rows)}
    if (pool / SOURCES).is_file():
        of_all, of_kept = (Counter(json.loads((folder / SOURCES).read_text())) for folder in (pool, out))
        report["sources"] = {name: [of_kept[name], count] for name, count in sorted(of_all.items())}
    write_aside(out / REPORT, json.dumps(report, indent=1) + "\n")
    return len(rows), len(lines)


def placed(folder: Path, embed: Embed, surprise: float, clusters: int, base: Member | None, seed: int,
           place: Place = Place()) -> None:  # noqa: B008 - a value
    """Place the examples of a folder, cluster them, note how surprised a base is by each; examples.jsonl is last."""
    from glue.refine.clusters import clustered
    from glue.refine.embed import by_member, by_sentences, by_words

    pairs = pairs_of(lines_of(folder / TRAIN))
    texts, running = [f"{question} {answer}" for question, answer in pairs], place.load(base) if base else None
    if embed == "hidden":
        assert running is not None, "checked when planned"
        places = by_member(running, texts)
    else:
        places = by_words(texts, seed=seed) if embed == "words" else by_sentences(texts)
    told: list[dict[str, Any]] = [{} for _ in pairs]
    if running is not None:
        from glue.evaluate.fast import losses
        from glue.evaluate.suite import Item, Task

        asked = Task("train", "", "choice", "acc", 0)
        items = [Item(question, (answer,), 0, answer) for question, answer in pairs]
        lost = losses(running, [asked], {"train": items})["train"]
        told = [{"loss": float(value)} for value in lost]
        if surprise and lost.std():  # right and wrong answers to alike questions are alike in all but this
            places = np.column_stack([places, surprise * (lost - lost.mean()) / lost.std()]).astype(np.float32)
    cluster, distance = clustered(places, clusters, seed=seed)
    told = [{**line, "cluster": int(k), "distance": float(far)}
            for line, k, far in zip(told, cluster, distance, strict=True)]
    np.save(folder / PLACES, places)
    write_aside(folder / EXAMPLES, "".join(json.dumps(line) + "\n" for line in told))


@dataclass(frozen=True)
class Ground:
    """What all fits of one valuation have in common.

    key      of everything that a value depends on, but for who takes part
    folder   of the examples that stand for the clusters, those of one cluster after those of the other
    owner    cluster of each of them
    options  of a fit: epochs, learning_rate, batch_size, prompt_weight, lora
    by       loss: less than that of nobody counts, in bits a byte; score: of the suite
    place    where fits are made and asked
    """

    key: str
    base: Member = field(compare=False)
    folder: Path = field(compare=False)
    owner: tuple[int, ...] = field(compare=False)
    options: Mapping[str, Any] = field(compare=False)
    suite: Measured = field(compare=False)
    by: By = field(compare=False)
    seed: int = field(compare=False)
    place: Place = field(compare=False, default=Place())


class Opened:
    """What a worker keeps of a valuation: the base, the examples and the dev items, ready."""

    def __init__(self, ground: Ground):
        from glue.tune.items import read_items
        from glue.tune.refit import Start

        base = ground.place.load(ground.base)
        self.ground, self.asked = ground, ground.suite.items()
        limit = base.model.config.max_position_embeddings
        self.items: Sequence[Item] = read_items(ground.folder, base.tokenizer, limit)
        self.start: Start = Start(base, ground.options["lora"], ground.seed)

    def worth(self, subset: frozenset[int]) -> float:
        """What the base is worth after a fit on the examples of some clusters."""
        from glue.evaluate.fast import losses

        ground = self.ground
        part = [k for k, owner in enumerate(ground.owner) if owner in subset]
        options = {word: value for word, value in ground.options.items() if word != "lora"}
        taught = self.start.taught(self.items, part, seed=ground.seed, **options)
        tasks = ground.suite.suite.tasks
        found = ground.suite.ask(taught) if ground.by == "score" else losses(taught, tasks, self.asked)
        mean = float(np.mean([values.mean() for values in found.values()]))
        return mean if ground.by == "score" else -mean


def worth(ground: Ground, subset: frozenset[int]) -> float:
    """In a worker: the value of some clusters."""
    return _opened(ground).worth(subset)


@lru_cache(maxsize=2)  # a model is large; but two valuations that go on side by side must not push each other out
def _opened(ground: Ground) -> Opened:
    return Opened(ground)
