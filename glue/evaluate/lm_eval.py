"""The fence around lm-eval: ask a loaded member the task files of a folder, and bring its results home item by item.

What lm-eval's own command reports for the same files and the same model is the mean of what comes back here. Nothing is
drawn, since no examples are put before a question and text is written greedily, so the seeds of the process stay.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from os.path import commonprefix
from pathlib import Path
from typing import Any

from glue.errors import SuiteError, did_you_mean
from glue.evaluate.routes import by_expert, by_route
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
        found = run(as_lm(running, batch_size), loaded, bootstrap_iters=0, log_samples=True)
    results = {}
    for name in names:
        metric = loaded["tasks"][name].config.metric_list[0]["metric"]
        rows = sorted(found["samples"][name], key=lambda row: row["doc_id"])
        results[name] = [float(row[metric]) for row in rows]
    return results


def as_lm(running: Running, batch_size: int = 64) -> Any:
    """The member as a model of lm-eval, with requests grouped by who answers them."""
    return _with_routes(running, batch_size) if running.choose is None else _by_text(running, batch_size)


def _by_text(running: Running, batch_size: int) -> Any:
    """A model of lm-eval that passes every request to that of the expert which the text of its document chooses."""
    from lm_eval.api.model import LM

    models: dict[str, Any] = {}

    def model_of(expert: Running) -> Any:
        if expert.member.name not in models:
            models[expert.member.name] = as_lm(expert, batch_size)
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


def document_texts(requests: Sequence[Any]) -> list[str]:
    """For each request of lm-eval the text that its document is known by: what its contexts have in common.

    Mostly all requests of a document have one context. Where each choice has its own (winogrande), it is what they
    begin with, so that no choice decides; contexts without text, which some metrics add, are passed over.
    """
    together: dict[Any, list[str]] = {}
    for request in requests:
        together.setdefault(_document(request), []).append(request.args[0])
    shared = {key: commonprefix([text for text in some if text.strip()]) for key, some in together.items()}
    return [shared[_document(request)] for request in requests]


def _document(request: Any) -> tuple[Any, ...]:
    """What tells a document from others; a request that belongs to none stands for itself."""
    return (request.task_name, request.doc_id) if request.doc_id is not None else (request.args[0],)


def _with_routes(running: Running, batch_size: int) -> Any:
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
