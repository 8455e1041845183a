"""A candidate of a search, ours in memory beside mergekit's by way of the disk: made, and made and asked.

Rounds alternate in one process, which has imported everything before the clock starts. Ours has one thread, as every
worker of a search; the peer is run with one and with one a core, and the faster of the two is told. Every candidate has
other weights than the one before, so that no tensor can stay as it is. Both sides end with a model in fp32; how far
apart their weights are is told with the times.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.speed.machine import commit, machine
from benchmarks.speed.pairs import OURS, PEER, ROOT
from benchmarks.speed.peer import SHARD
from benchmarks.speed.shapes import SHAPES, made
from glue.errors import GlueError
from glue.evaluate.suite import read_suite
from glue.files import write_aside
from glue.kinds import Running
from glue.member import Member
from glue.steps import Measured
from glue.zoo import Zoo

TINY = ("tiny_zoo/A-base", "tiny_zoo/A-facts", "tiny_zoo/A-kind", "tiny_zoo/A-trans")
Weights = dict[str, float]
Round = dict[str, float]
WIDE = "peer with a thread a core"
SIDES = (OURS, PEER, WIDE)
ASKED = ("lm-eval's evaluate", "lm-eval's simple_evaluate")  # the second loads its tasks each time, as most people do


class Sides:
    """Two ways from the weights of members to a model that can be asked: task arithmetic over a base.

    folder  for what the peer writes
    """

    def __init__(self, base: Member, members: Sequence[Member], dtype: str, folder: Path):
        from glue.family import families
        from glue.kinds.frame import tokenizer_of
        from glue.kinds.model import Skeleton
        from glue.merge.variants import Variants
        from glue.steps.merge import source_of, sources_of

        self.base, self.members, self.dtype, self.folder = base, members, dtype, folder
        self.tokenizer, self.skeleton = tokenizer_of(base), Skeleton()
        self.variants = Variants(families("merging")["task_arithmetic"].bind(), sources_of(list(members)),
                                 source_of(base), out_dtype=dtype)

    def ours(self, weights: Weights) -> Running:
        """In memory, in the one model that stays."""
        from glue.merge.variants import marks

        merge = self.variants.merge(lambda _: {"weight": weights})
        return self.skeleton.filled(self.base, merge, marks(merge))

    def theirs(self, weights: Weights) -> Running:
        """mergekit writes it and transformers loads it; the tokenizer is there already."""
        from mergekit.config import MergeConfiguration
        from mergekit.merge import MergeOptions, run_merge
        from transformers import AutoModelForCausalLM

        models = [{"model": member.path, "parameters": {"weight": weights[member.name]}} for member in self.members]
        config = MergeConfiguration.model_validate({"merge_method": "task_arithmetic", "base_model": self.base.path,
                                                    "dtype": self.dtype, "models": models})
        out = self.folder / "candidate"
        options = MergeOptions(async_write=True, out_shard_size=SHARD, quiet=True, copy_tokenizer=False)
        run_merge(config, str(out), options)
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True)
        return Running(self.base, loaded.eval(), self.tokenizer)

    def rounds(self, count: int, ask: Sequence[Callable[[Running], Any]] = ()) -> list[Round]:
        """Seconds of so many rounds, after one that does not count; `ask` is what ours and theirs are asked."""
        found = []
        for k in range(count + 1):
            weights = {member.name: 0.2 + 0.01 * k + 0.1 * i for i, member in enumerate(self.members)}
            seconds: Round = {}
            models: dict[str, Running] = {}
            for side in SIDES if k % 2 else reversed(SIDES):
                shutil.rmtree(self.folder / "candidate", ignore_errors=True)
                torch.set_num_threads(len(os.sched_getaffinity(0)) if side == WIDE else 1)
                began = time.perf_counter()
                models[side] = self.ours(weights) if side == OURS else self.theirs(weights)
                if ask:
                    ask[side != OURS](models[side])
                seconds[side] = time.perf_counter() - began
            seconds["apart"] = _apart(models[OURS], models[PEER])
            found.append(seconds)
        return found[1:]


    def batches(self, count: int, asked: Measured, ask: Callable[[Running], Any]) -> list[Round]:
        """Seconds a candidate where all cores are used: ours by workers, as a search does, the peer one by one."""
        from glue.family import families
        from glue.search.candidate import Candidate
        from glue.steps._candidates import Ground
        from glue.workers import Workers

        cores = len(os.sched_getaffinity(0))
        ground = Ground.of(self.members, self.base, families("merging")["task_arithmetic"].bind(), self.dtype, asked, 0)
        found = []
        with Workers(cores) as pool:
            for k in range(count + 1):
                candidates = [Candidate.merge({member.name: 0.2 + 0.01 * k + 0.001 * j + 0.1 * i
                                               for i, member in enumerate(self.members)}) for j in range(2 * cores)]
                seconds: Round = {"apart": 0.0}
                for side in SIDES if k % 2 else reversed(SIDES):
                    torch.set_num_threads(cores if side == WIDE else 1)
                    some = candidates if side == OURS else candidates[:1]
                    began = time.perf_counter()
                    if side == OURS:
                        pool.map("glue.steps._candidates:measure", [(ground, candidate) for candidate in some])
                    else:
                        shutil.rmtree(self.folder / "candidate", ignore_errors=True)
                        ask(self.theirs(some[0].weights))
                    seconds[side] = (time.perf_counter() - began) / len(some)
                found.append(seconds)
        return found[1:]


def main(given: argparse.Namespace) -> int:
    """Measure row by row, print each, and write them down."""
    given.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(given.folder), "commit": commit(ROOT), "rows": {}}
    threads = torch.get_num_threads()
    try:
        for name, rounds in rows(given):
            results["rows"][name] = rounds
            print(told(name, rounds), flush=True)
            if given.json:
                write_aside(given.json, json.dumps(results, indent=1) + "\n")
    finally:
        torch.set_num_threads(threads)
    return 0


def rows(given: argparse.Namespace) -> Iterator[tuple[str, list[Round]]]:
    """Name and rounds of each row: models of a shape, then those of the tiny zoo, made, and made and asked."""
    places = made(given.folder / given.shape, SHAPES[given.shape], 2, outputs=1)
    _tokenizer(places["base"])
    base, *members = (Member(name, "model", str(places[name])) for name in ("base", "m0", "m1"))
    yield f"made, {given.shape}", Sides(base, members, "bfloat16", given.folder).rounds(given.pairs)
    if given.zoo.exists():
        zoo = Zoo(given.zoo)
        if TINY[0] not in zoo:
            raise GlueError(f"{given.zoo} has no '{TINY[0]}'", fix="make the tiny zoo:  glue run recipes/tiny_zoo.yaml")
        base, *members = (zoo[name] for name in TINY)
        tiny = Sides(base, members, "float32", given.folder)
        yield "made, tiny zoo", tiny.rounds(given.pairs)
        score, *others = questions(tiny, zoo, given.folder)
        for told, ask in zip(ASKED, others, strict=True):
            yield f"made and asked, tiny zoo, {told}", tiny.rounds(given.pairs, [score, ask])
        for told, ask in zip(ASKED, others, strict=True):
            name = f"made and asked, tiny zoo, {told}, all cores"
            yield name, tiny.batches(given.pairs, _measured(zoo), ask)


def _measured(zoo: Zoo) -> Measured:
    """The dev split of the tiny suite."""
    suite = read_suite(ROOT / "benchmarks/suites/tiny.yaml")
    return Measured(suite, "dev", {task.data: zoo[task.data] for task in suite.tasks})


def questions(sides: Sides, zoo: Zoo, folder: Path) -> list[Callable[[Running], Any]]:
    """The dev items of the tiny zoo, asked by the scorer of a search, and by lm-eval in each of the ways of ASKED."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from glue.evaluate.fast import prepare, score
    from glue.evaluate.lm_eval import evaluate
    from glue.evaluate.suite import write_tasks

    asked = _measured(zoo)
    prepared = prepare(sides.tokenizer, asked.suite.tasks, asked.items())
    names = write_tasks(asked.suite, "dev", asked.folders(), folder / "tasks")
    known = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)

    def simply(running: Running) -> Any:
        lm = HFLM(pretrained=running.model, tokenizer=running.tokenizer, batch_size=64)
        return simple_evaluate(lm, tasks=list(names), task_manager=known)

    return [lambda running: score(running, prepared), lambda running: evaluate(running, folder / "tasks", names),
            simply]


def told(name: str, rounds: Sequence[Round]) -> str:
    """One row in words: medians, and the ratio round by round."""
    middle = {side: median(one[side] for one in rounds) for side in SIDES}
    peer = min((PEER, WIDE), key=lambda side: middle[side])
    ratios = [one[peer] / one[OURS] for one in rounds]
    return (f"{name}: {middle[OURS]:.4f} s against {middle[peer]:.4f} s ({peer}), {median(ratios):.1f} times "
            f"({min(ratios):.1f} to {max(ratios):.1f}, {len(rounds)} rounds); weights at most "
            f"{max(one['apart'] for one in rounds):.1e} apart")


def _apart(one: Running, other: Running) -> float:
    """The most that two models are apart in any weight."""
    theirs = other.model.state_dict()
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in one.model.state_dict().items())


def _tokenizer(folder: Path) -> None:
    """Put one that knows one word into a folder without any, since a model that runs has one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").exists():
        words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<unk>").save_pretrained(folder)
