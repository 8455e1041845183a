"""The fence around lm-eval: ask a loaded member its tasks, and bring the results home item by item.

What lm-eval's own command reports for the same tasks and the same model is the mean of what comes back here. Tasks of a
folder draw nothing. For tasks that lm-eval has itself the process is seeded as its command seeds it, so that the same
examples stand before the same questions; afterwards the seeds are what they were.

Requests are cut into batches here, always the same for the same requests, and every batch that is answered can be
written down: an evaluation that was killed goes on after its last batch, and ends in the same bits.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from glue.checkpoint import combined
from glue.errors import SuiteError, did_you_mean
from glue.evaluate import cached
from glue.evaluate.answered import Answered
from glue.evaluate.imported import rows_digest
from glue.evaluate.routes import by_expert, by_route, document_texts
from glue.evaluate.suite import Named, Split, Suite
from glue.evaluate.surroundings import SEED, offline, quiet, seeded
from glue.kinds import BatchSize, Running
from glue.kinds.batches import Cutter

CODE = "HF_ALLOW_CODE_EVAL"
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Asked:
    """What a member scores on a task that lm-eval has.

    items  one number per item, in the order of the documents; of a group, of the tasks below it in lm-eval's order
    split  digest of the documents and what is right of each, as that of imported results
    """

    items: tuple[float, ...]
    split: str


def evaluate(running: Running, folder: Path, names: list[str], *, batch_size: BatchSize = "auto",
             answered: Answered | None = None, report: Report | None = None) -> dict[str, list[float]]:
    """What a member scores on each item of the tasks `names`, in the order of the items in their files.

    folder    holds the task files that `write_tasks` wrote
    answered  batches that are not asked again; what is answered now is added to them
    report    is told (items answered, items in all)
    Raises SuiteError for a name that has no task file there.
    """
    from lm_eval.tasks import TaskManager

    answered = answered or Answered(room=running.room)
    with quiet():
        known = TaskManager(include_path=str(folder), include_defaults=False)
        for name in names:
            if name not in known.all_subtasks:
                raise SuiteError(f"there is no task '{name}' in {folder}{did_you_mean(name, known.all_subtasks)}")
        loaded = known.load(names)
        found = _run(as_lm(running, batch_size, answered), loaded, answered, report)
    results = {}
    for name in names:
        metric = loaded["tasks"][name].config.metric_list[0]["metric"]
        rows = sorted(found["samples"][name], key=lambda row: row["doc_id"])
        results[name] = [float(row[metric]) for row in rows]
    return results


def evaluate_named(running: Running, tasks: Sequence[Named], split: Split, *, batch_size: BatchSize = "auto",
                   answered: Answered | None = None, report: Report | None = None) -> dict[str, Asked]:
    """Task, as the suite calls it, -> what a member scores on it: what lm-eval's command for that task alone reports.

    report  is told (done, all), where each task is as much as any other
    Raises SuiteError for tasks that cannot be loaded, and for metrics that are no mean over items.
    """
    answered = answered or Answered(room=running.room)
    with quiet():
        lm = as_lm(running, batch_size, answered)
    together: dict[tuple[str, int], list[Named]] = {}
    for task in tasks:
        together.setdefault((task.task, task.shots[split]), []).append(task)
    results = {}
    for k, ((name, shots), some) in enumerate(together.items()):
        tell = None if report is None else partial(_part, report, k, len(together))
        with quiet(), offline(), seeded():
            loaded = _loaded(name, shots)
            found = _run(lm, loaded, answered, tell)
        results.update({task.name: _told(task, list(loaded["tasks"]), found) for task in some})
    return {task.name: results[task.name] for task in tasks}


def _part(report: Report, k: int, parts: int, done: int, total: int) -> None:
    report(k * total + done, parts * total)


def _loaded(name: str, shots: int) -> Any:
    """A task or group of lm-eval with so many examples before each question, drawn as its command draws them."""
    try:
        loaded = _known().load([name])
    except Exception as problem:  # whatever the modules and the data of a task may raise
        raise SuiteError(f"lm-eval cannot load its task '{name}': {type(problem).__name__}: {problem}",
                         fix="install what it lacks, or leave the task out of a copy of the suite") from problem
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=SEED)
    return loaded


def _told(task: Named, leaves: list[str], found: Any) -> Asked:
    rows = [row for leaf in leaves for row in sorted(found["samples"][leaf], key=lambda row: row["doc_id"])
            if row["filter"] == task.filter]
    items: list[float] = []
    for row in rows:  # a document may hold several things that are right or wrong, each of which is an item
        items += map(float, row[task.metric] if isinstance(row[task.metric], (list, tuple)) else [row[task.metric]])
    value = found["results"][task.task][f"{task.metric},{task.filter}"]
    if not math.isclose(sum(items) / len(items), value, rel_tol=1e-9, abs_tol=1e-12):
        raise SuiteError(f"{task.metric} of lm-eval's '{task.task}' is {value:.6g}, and the mean of its items is "
                         f"{sum(items) / len(items):.6g}", fix="take a metric that is a mean over items")
    return Asked(tuple(items), rows_digest(rows, "doc_hash", "target_hash"))


def _run(lm: Any, loaded: Any, answered: Answered | None = None, report: Report | None = None) -> Any:
    """What lm-eval finds out, with one row for each document and filter.

    Not simple_evaluate: that one asks git and the hardware who they are, and leaves the generators seeded.
    """
    from lm_eval.evaluator import evaluate as run

    if report and answered:
        _count(lm, loaded, answered, report)
    return run(lm, loaded, bootstrap_iters=0, log_samples=True, fewshot_as_multiturn=True, confirm_run_unsafe_code=True)


def _count(lm: Any, loaded: Any, answered: Answered, report: Report) -> None:
    """Let `report` be told how many items are answered, as the share of answered requests of their kind."""
    items: Counter[str] = Counter()
    for task in loaded["tasks"].values():
        kind = "loglikelihood" if task.OUTPUT_TYPE == "multiple_choice" else task.OUTPUT_TYPE
        items[kind] += len(task.task_docs)
    before = 0

    def counted(kind: str, ask: Callable[..., Any]) -> Callable[..., Any]:
        def call(requests: Sequence[Any], **more: Any) -> Any:
            nonlocal before
            done = 0

            def told(now: int) -> None:
                nonlocal done
                done += now
                report(before + items[kind] * done // len(requests), items.total())

            answered.told = told
            answers = ask(requests, **more)
            before += items[kind]
            return answers

        return call

    for kind in items:
        setattr(lm, kind, counted(kind, getattr(type(lm), kind).__get__(lm)))  # of the class: not what counted before


def as_lm(running: Running, batch_size: BatchSize = "auto", answered: Answered | None = None) -> Any:
    """The member as a model of lm-eval, with requests grouped by who answers them.

    batch_size  how many distinct inputs are read at once; auto: so many that they most likely fit, and half as many
                where they do not
    """
    answered = answered or Answered(room=running.room)
    make = _with_routes if running.choose is None else _by_text
    return make(running, batch_size, answered)


def _by_text(running: Running, batch_size: BatchSize, answered: Answered) -> Any:
    """A model of lm-eval that passes every request to that of the expert which the text of its document chooses."""
    from lm_eval.api.model import LM

    models: dict[str, Any] = {}

    def model_of(expert: Running) -> Any:
        if expert.member.name not in models:
            models[expert.member.name] = as_lm(expert, batch_size, answered)
        return models[expert.member.name]

    class ByText(LM):
        def loglikelihood(self, requests, disable_tqdm=False):
            return by_expert(running, document_texts(requests), requests,
                             lambda expert, some: model_of(expert).loglikelihood(some, disable_tqdm=disable_tqdm))

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            return by_expert(
                running, [""] * len(requests), requests,  # the whole text is what is asked for, and nothing its context
                lambda expert, some: model_of(expert).loglikelihood_rolling(some, disable_tqdm=disable_tqdm))

        def generate_until(self, requests, disable_tqdm=False):
            return by_expert(running, document_texts(requests), requests,
                             lambda expert, some: model_of(expert).generate_until(some, disable_tqdm=disable_tqdm))

    return ByText()


def _with_routes(running: Running, batch_size: BatchSize, answered: Answered) -> Any:
    """The member as lm-eval's own model class: requests grouped by route, cut into batches and written down."""
    from lm_eval.models.huggingface import HFLM

    who = running.member.digest or running.member.name
    cutter = Cutter.of(batch_size, running.model.device.type)

    class Routed(HFLM):
        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            def once(some):
                told = HFLM._loglikelihood_tokens(self, some, disable_tqdm=disable_tqdm, override_bs=len(some))
                return [[float(value), bool(greedy)] for value, greedy in told]

            def run(some):
                tokens = [(context, ending) for _, context, ending in some]
                inputs = [tuple(context + ending[:-1]) for context, ending in tokens]
                told = answered.each(("likelihood", who), tokens, partial(cutter.cut, inputs),
                                     lambda batch: once([some[k] for k in batch]))
                return [(value, greedy) for value, greedy in told]

            return by_route(running, [context for _, context, _ in requests], requests, run, self.max_length)

        def generate_until(self, requests, disable_tqdm=False):
            def once(some):
                self.batch_size_per_gpu = len({request.args[0] for request in some})
                return HFLM.generate_until(self, some, disable_tqdm=disable_tqdm)

            def run(some):
                if any(request.args[1].get("do_sample") for request in some):
                    return once(some)  # what is drawn is another text every time
                told = [list(request.args) for request in some]
                inputs = [tuple(self.tok_encode(request.args[0])) for request in some]

                def together(places, halved):
                    groups: dict[str, list[int]] = {}
                    for k in places:
                        groups.setdefault(repr(some[k].args[1]), []).append(k)  # one batch is written in one way
                    return [batch for group in groups.values() for batch in cutter.cut(
                        inputs, group, halved, some[group[0]].args[1].get("max_gen_toks", self.max_gen_toks))]

                return answered.each(("text", who), told, together, lambda batch: once([some[k] for k in batch]))

            contexts = [self.tok_encode(request.args[0]) for request in requests]
            return by_route(running, contexts, requests, run, self.max_length)

    return Routed(pretrained=running.model, tokenizer=running.tokenizer, batch_size=cutter.rows)


def check_named(suite: Suite, split: Split) -> dict[str, str]:
    """See that lm-eval has the named tasks of a suite and their metrics, and this machine their data; loads no data.

    Returns for each task, as the suite calls it, the digest of the data that it is asked of. Raises SuiteError with
    the nearest name, with every dataset that is missing and how to get it, or with what a task wants before it runs.
    """
    known, sources = _known(), dict[str, dict[tuple[str, str], set[str]]]()
    unsafe, safe = list[str](), list[str]()
    with quiet():
        for task in suite.named:
            if task.task not in known.task_index:
                raise SuiteError(f"task '{task.name}' of suite '{suite.name}': lm-eval has no '{task.task}'"
                                 f"{did_you_mean(task.task, known.task_index)}")
            leaves = dict(_leaves(known, task.task))
            for leaf, config in leaves.items():
                _check_leaf(suite, split, task, leaf, config)
                source = str(config["dataset_path"]), str(config.get("dataset_name") or "")
                splits = {config.get(f"{role}_split") for role in ("test", "validation", "training", "fewshot")}
                sources.setdefault(task.name, {}).setdefault(source, set()).update(filter(None, splits))
            if list(leaves) != [task.task] and not _pooled(known, task):
                raise SuiteError(f"task '{task.name}' of suite '{suite.name}': lm-eval reports no {task.metric} of all "
                                 f"items of '{task.task}'", fix="name the tasks below it one by one, each with  under: "
                                                                f"{task.name}:  {', '.join(list(leaves)[:3])} ...")
            unsafe += [task.name] if any(config.get("unsafe_code") for config in leaves.values()) else []
            safe += [leaf for leaf, config in leaves.items() if not config.get("unsafe_code")]
    if lacking := cached.lacking([source for some in sources.values() for source in some], bool(unsafe)):
        raise SuiteError(f"the data of suite '{suite.name}' are not on this machine: {lacking[0]}", fix=lacking[1])
    if unsafe and os.environ.get(CODE) != "1":
        raise SuiteError(f"suite '{suite.name}' runs code that a model has written, with all that you may do here: for "
                         f"{', '.join(unsafe)}", fix=f"where nothing can be lost, a container without a network, say  "
                         f"{CODE}=1  before the command; or leave these tasks out of a copy of the suite")
    for leaf in safe:
        _check_packages(known, leaf)
    return {name: combined({f"{path}/{config}": cached.digest(path, config, splits)
                            for (path, config), splits in some.items()}) for name, some in sources.items()}


def _check_packages(known: Any, leaf: str) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        load_yaml(known.task_index[leaf].yaml_path, resolve_func=True)
    except ImportError as lacking:
        raise SuiteError(f"lm-eval's {leaf} needs the package '{lacking.name}', which is not installed here",
                         fix=f"pip install {lacking.name}") from None


def _check_leaf(suite: Suite, split: Split, task: Named, leaf: str, config: Mapping[str, Any]) -> None:
    keys = _reported(config)
    if (task.metric, task.filter) not in keys:
        wanted, told = f"{task.metric},{task.filter}", [",".join(key) for key in keys]
        raise SuiteError(f"task '{task.name}' of suite '{suite.name}': lm-eval's {leaf} reports no "
                         f"'{wanted}'{did_you_mean(wanted, told)}", fix=f"it reports {', '.join(told)}")
    if config.get("num_fewshot") == 0 and task.shots[split]:
        raise SuiteError(f"task '{task.name}' of suite '{suite.name}': lm-eval's {leaf} never has examples before a "
                         f"question, and {task.shots[split]} are asked for", fix="say  num_fewshot: 0")


@cache
def _known() -> Any:
    """The index of lm-eval's own tasks, which takes seconds to read."""
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager()


def _leaves(known: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tasks below a task, group or tag of lm-eval, each with its configuration."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = known.task_index[name]
    if entry.yaml_path is None:  # a tag
        below = sorted(entry.tags)
    else:
        told = load_yaml(entry.yaml_path, resolve_func=False)
        if "group" not in told:
            yield name, told
            return
        below = [part if isinstance(part, str) else part["task"] for part in told["task"]]
    for part in below:
        yield from _leaves(known, part)


def _reported(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(metric, filter) of each number that lm-eval reports for a task."""
    names: list[str] = []
    for line in config.get("metric_list") or ({"metric": "acc"}, {"metric": "acc_norm"}):
        name = str(line["metric"]).rsplit(".", 1)[-1]  # a function stands with its file
        names += [f"pass@{k}" for k in line["k"]] if name == "pass_at_k" else [name]
    filters = [line["name"] for line in config.get("filter_list") or ()] or ["none"]
    return [(name, one) for name in names for one in filters]


def _pooled(known: Any, task: Named) -> bool:
    """Whether lm-eval reports a group's metric as the mean over all items of the tasks below it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = known.task_index[task.task]
    told = load_yaml(entry.yaml_path, resolve_func=False).get("aggregate_metric_list") if entry.yaml_path else None
    lines = [told] if isinstance(told, dict) else told or []
    return any(line["metric"] == task.metric and line.get("weight_by_size", True) for line in lines)
