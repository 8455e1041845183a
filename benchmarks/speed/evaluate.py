"""The scorer of a search beside lm-eval: the same items of the tiny zoo, asked of one member, side by side.

Rounds alternate in one process with one thread, after one of each that does not count. Both begin with a model in
memory and end with one number for each item; that these are the same is told with the times.

    python -m benchmarks.speed.evaluate --zoo zoo.yaml
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.speed.machine import commit, machine
from benchmarks.speed.pairs import ROOT
from glue.errors import GlueError
from glue.evaluate.suite import read_suite
from glue.files import write_aside
from glue.kinds import Running, load
from glue.steps import Measured
from glue.zoo import Zoo

MEMBER = "tiny_zoo/A-facts"
Scores = dict[str, list[float]]  # task -> items


def main() -> int:
    """Ask, print, and write down where --json says so."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--zoo", type=Path, default=Path("zoo.yaml"))
    words.add_argument("--member", default=MEMBER)
    words.add_argument("--suite", type=Path, default=ROOT / "benchmarks/suites/tiny.yaml")
    words.add_argument("--split", default="test", choices=("dev", "test"))
    words.add_argument("--pairs", type=int, default=5)
    words.add_argument("--shots", type=int, nargs="+", default=[0, 5], help="examples before each question")
    words.add_argument("--json", type=Path)
    given = words.parse_args()
    zoo = Zoo(given.zoo)
    if given.member not in zoo:
        raise GlueError(f"{given.zoo} has no '{given.member}'",
                        fix="make the tiny zoo:  glue run recipes/tiny_zoo.yaml")
    suite = read_suite(given.suite)
    asked = Measured(suite, given.split, {task.data: zoo[task.data] for task in suite.tasks})
    torch.set_num_threads(1)
    running = load(zoo[given.member])
    with tempfile.TemporaryDirectory() as folder:
        rows = {shots: compare(running, _after_examples(asked, shots, Path(folder) / str(shots)), Path(folder),
                               given.pairs) for shots in given.shots}
    for shots, rounds in rows.items():
        print(told(f"{given.member} on {suite.name}:{given.split}, {shots} shots", rounds))
    if given.json:
        write_aside(given.json, json.dumps({"machine": machine(Path.cwd()), "commit": commit(ROOT), "rows": rows},
                                           indent=1) + "\n")
    return 0


def _after_examples(asked: Measured, shots: int, folder: Path) -> Measured:
    """The same items, each after as many others with their answers: real questions are longer than those of the zoo."""
    if not shots:
        return asked
    data = {}
    for task, items in asked.items().items():
        name = next(one.data for one in asked.suite.tasks if one.name == task)
        (folder / task).mkdir(parents=True)
        lines = []
        for k, item in enumerate(items):
            others = [items[(k + 1 + j) % len(items)] for j in range(shots)]
            question = " ".join([*(f"{other.question} {other.answer}" for other in others), item.question])
            lines.append(json.dumps(item._replace(question=question)._asdict()) + "\n")
        (folder / task / f"{asked.split}.jsonl").write_text("".join(lines))
        data[name] = replace(asked.data[name], path=str(folder / task))
    return replace(asked, data=data)


def compare(running: Running, asked: Measured, folder: Path, pairs: int) -> list[dict[str, float]]:
    """Seconds of each side in each round, which has both, and how many items differ between them (`apart`)."""
    from glue.evaluate.fast import prepare, score
    from glue.evaluate.lm_eval import evaluate
    from glue.evaluate.suite import write_tasks

    suite, items = asked.suite, asked.items()
    names = write_tasks(suite, asked.split, asked.folders(), folder / "tasks")  # no work of either side

    def ours() -> Scores:
        found = score(running, prepare(running.tokenizer, suite.tasks, items))
        return {name: some.tolist() for name, some in found.items()}

    def theirs() -> Scores:
        found = evaluate(running, folder / "tasks", names)
        return {task.name: found[name] for task, name in zip(suite.tasks, names, strict=True)}

    rounds = []
    for _ in range(pairs + 1):
        (fast, one), (lm_eval, other) = _timed(ours), _timed(theirs)
        apart = sum(a != b for name in one for a, b in zip(one[name], other[name], strict=True))
        rounds.append({"glue": fast, "lm-eval": lm_eval, "items": sum(map(len, one.values())), "apart": apart})
    return rounds[1:]


def told(name: str, rounds: Sequence[dict[str, float]]) -> str:
    """Medians, the ratio round by round, and whether the items agree."""
    ratios = [one["lm-eval"] / one["glue"] for one in rounds]
    ours, theirs = (median(one[side] for one in rounds) for side in ("glue", "lm-eval"))
    return (f"{name}, {rounds[0]['items']:.0f} items: {ours:.3f} s against {theirs:.3f} s (lm-eval), "
            f"{median(ratios):.1f} times ({min(ratios):.1f} to {max(ratios):.1f}, {len(rounds)} rounds); "
            f"{max(one['apart'] for one in rounds):.0f} items differ")


def _timed(ask: Callable[[], Scores]) -> tuple[float, Scores]:
    start = time.perf_counter()
    found = ask()
    return time.perf_counter() - start, found


if __name__ == "__main__":
    raise SystemExit(main())
