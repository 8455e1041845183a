"""The fence around lm-eval: ask a loaded member the task files of a folder, and bring its results home item by item.

What lm-eval's own command reports for the same files and the same model is the mean of what comes back here. Nothing is
drawn, since no examples are put before a question and text is written greedily, so the seeds of the process stay.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from glue.errors import SuiteError, did_you_mean
from glue.evaluate.routes import by_route
from glue.kinds import Running


def evaluate(running: Running, folder: Path, names: list[str], *, batch_size: int = 64) -> dict[str, list[float]]:
    """What a member scores on each item of the tasks `names`, in the order of the items in their files.

    folder  holds the task files that `write_tasks` wrote
    Raises SuiteError for a name that has no task file there.
    """
    from lm_eval.evaluator import evaluate as run
    from lm_eval.tasks import TaskManager

    with _quiet():
        known = TaskManager(include_path=str(folder), include_defaults=False)
        for name in names:
            if name not in known.all_subtasks:
                raise SuiteError(f"there is no task '{name}' in {folder}{did_you_mean(name, known.all_subtasks)}")
        loaded = known.load(names)
        # not simple_evaluate: that one seeds every generator of the process and asks git and the hardware who they are
        found = run(_as_lm(running, batch_size), loaded, bootstrap_iters=0, log_samples=True)
    results = {}
    for name in names:
        metric = loaded["tasks"][name].config.metric_list[0]["metric"]
        rows = sorted(found["samples"][name], key=lambda row: row["doc_id"])
        results[name] = [float(row[metric]) for row in rows]
    return results


def _as_lm(running: Running, batch_size: int) -> Any:
    """The member as lm-eval's own model class, with requests grouped by route before they reach it."""
    from lm_eval.models.huggingface import HFLM

    class Routed(HFLM):
        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            def run(some):
                return HFLM._loglikelihood_tokens(self, some, disable_tqdm=disable_tqdm, override_bs=override_bs)

            return by_route(running, [context for _, context, _ in requests], requests, run, self.max_length)

        def generate_until(self, requests, disable_tqdm=False):
            def run(some):
                return HFLM.generate_until(self, some, disable_tqdm=disable_tqdm)

            contexts = [self.tok_encode(request.args[0]) for request in requests]
            return by_route(running, contexts, requests, run, self.max_length)

    return Routed(pretrained=running.model, tokenizer=running.tokenizer, batch_size=batch_size)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no advice: bars go nowhere, loggers speak only of errors. Exceptions pass."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
