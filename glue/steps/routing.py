"""`step: routing`: whom mixtures ask for what, and how much a better choice would score; leaves a table."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from glue.errors import MethodError
from glue.kinds import Place
from glue.member import Member, Score, Table, canonical
from glue.steps import AtOnce, Device, Job, Made, Many, Measured, OnSuite, RunsIn, Takes, steps
from glue.steps.evaluate import evaluate

if TYPE_CHECKING:
    import numpy as np

    from glue.kinds import Running

    Mixtures = list[Member]
else:
    Mixtures = Annotated[list[Any], Takes("many", ("mixture",))]

NOTE = "routing.jsonl"  # beside the table: one mixture a line, all that a report tells
BATCH_TOKENS = 8192     # padded tokens that a mixture which decides token by token reads at once


def of_these(members: list[Member], experts: list[Member], **_: Any) -> None:
    """Experts are compared with a mixture of them, and of nothing else."""
    for mixture in members:
        _order(mixture, experts)


@steps.add("routing", makes="table", named=True, holds="runs", check=of_these,
           unkeyed=("device", "batch_size"), later=("dtype",), version=2)
def routing(job: Job, *, members: Mixtures, experts: Many, suite: OnSuite, device: Device = "cpu",
            dtype: RunsIn = "float32", batch_size: AtOnce = "auto") -> Made:
    """Which expert each mixture asks for each item, beside what every expert alone answers to it.

    members  mixtures of the same experts: several routers, or several levels
    experts  what they were made of, in any order; all are evaluated, so that regret is per item
    device, dtype, batch_size  as of step evaluate
    """
    evaluate(job, members=[*members, *experts], suite=suite, device=device, dtype=dtype, batch_size=batch_size)
    table, place = Table.read(Member(job.name, "table", str(job.folder))), job.place(device, dtype, batch_size)
    routes = job.workers.map("glue.steps.routing:work",
                             [(mixture, len(_order(mixture, experts)), suite, place) for mixture in members])
    lines = [told(mixture, [experts[k] for k in _order(mixture, experts)], found, table)
             for mixture, found in zip(members, routes, strict=True)]
    (job.folder / NOTE).write_text("".join(canonical(line) + "\n" for line in lines), encoding="utf-8")
    return Made("table", note=f"routes of {len(members)} mixtures on {suite.suite.name}:{suite.split}")


def work(mixture: Member, e: int, suite: Measured, place: Place) -> dict[str, np.ndarray]:
    """In a worker: task -> shares [items, l, e]."""
    import numpy as np

    from glue.mix.regret import shares_of

    running = place.load(mixture)
    routes: Mapping[str, Sequence[Hashable]]
    if running.choose is not None:
        routes = {task: running.choose([item.question for item in some]) for task, some in suite.items().items()}
    elif running.route is not None:
        routes = {task: running.route(contexts) for task, contexts in _contexts(running, suite).items()}
    else:
        return {task: token_shares(running, contexts, e) for task, contexts in _contexts(running, suite).items()}
    return {task: np.stack([shares_of(route, e) for route in some]) for task, some in routes.items()}


def _contexts(running: Running, suite: Measured) -> dict[str, list[list[int]]]:
    """Task -> the tokens of each question that choose, which are the last that the model can see."""
    from glue.evaluate.fast import prepare
    from glue.kinds.text import longest

    seen = longest(running.model, running.tokenizer)
    prepared = prepare(running.tokenizer, suite.suite.tasks, suite.items())
    return {task: [list(prepared.rows[some[0][0]].context[-seen:]) for some in places]
            for task, places in prepared.places.items()}


def token_shares(running: Running, contexts: list[list[int]], e: int) -> np.ndarray:
    """What each expert adds to the tokens of each context in each layer that has a router. [items, l, e]

    For mixtures that decide token by token, inside: the weights of a token, mean over the tokens of its context.
    Raises MethodError for a model that decides nothing, such as a mixture of which all layers are dense.
    """
    import numpy as np
    import torch

    from glue.kinds.mixture import left_read

    model: Any = running.model
    k = getattr(model.config, "num_experts_per_tok", None)
    if k is None:
        raise MethodError(f"'{running.member.name}' has no router: all of its layers are dense",
                          fix="leave it out; step evaluate measures it")

    @torch.inference_mode()
    def means(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        where = (mask.cumsum(-1) - 1).clamp(min=0)
        asked = {name: tensor.to(model.device) for name, tensor in
                 (("input_ids", ids), ("attention_mask", mask), ("position_ids", where))}
        told = model(**asked, output_router_logits=True, use_cache=False)
        logits = torch.stack([layer.view(*ids.shape, e).cpu() for layer in told.router_logits], 2).float()
        weights = logits.softmax(-1)  # [b, s, l, e]
        top = weights.topk(k, -1)
        kept = torch.zeros_like(weights).scatter(-1, top.indices, top.values)
        kept = kept / kept.sum(-1, keepdim=True) * mask[:, :, None, None]
        return (kept.sum(1) / mask.sum(1)[:, None, None]).double()

    found = dict(left_read(running.room, contexts, means, BATCH_TOKENS))
    return np.stack([found[place].numpy() for place in range(len(contexts))])


def told(mixture: Member, experts: list[Member], shares: Mapping[str, np.ndarray], table: Table) -> dict[str, Any]:
    """One line of the note: numbers of one mixture, its experts in their order.

    shares  task -> [items, l, e]
    table   holds the results of the mixture and of every expert
    """
    import numpy as np

    from glue.evaluate.statistics import average, difference
    from glue.mix.regret import best_by_task, choices, hindsight, promised

    results = {(score.digest, score.task): score for score in table.rows}
    names = list(shares)
    counts = [len(shares[name]) for name in names]
    tasks = np.repeat(np.arange(len(names)), counts)
    own = np.concatenate([_results(results[mixture.digest, name]) for name in names])
    wins = np.stack([np.concatenate([_results(results[expert.digest, name]) for name in names]) for expert in experts],
                    axis=1)
    every = np.concatenate([shares[name] for name in names])
    found = choices(every, wins, tasks)

    def split(values: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, np.split(values, np.cumsum(counts)[:-1]), strict=True))

    there = {word: {"score": average(split(values)), "regret": difference(split(values), split(own))}
             for word, values in hindsight(wins, tasks).items()}
    return {"mixture": mixture.name, "digest": mixture.digest, "suite": results[mixture.digest, names[0]].suite,
            "experts": [expert.name for expert in experts], "tasks": names, "items": counts, "places": every.shape[1],
            "shares": found.by_task.tolist(), "load": found.load.tolist(), "entropy": found.entropy,
            "within": found.within.tolist(), "doubt": found.doubt, "variation": found.variation,
            "agrees": found.agrees, "follows": found.follows, "hits": _known(found.hits), "luck": _known(found.luck),
            "score": average(split(own)), "promised": average(split(promised(every, wins))).value,
            "best": best_by_task(wins, tasks).tolist(), "hindsight": there}


def _results(score: Score) -> np.ndarray:
    import numpy as np

    return np.asarray(score.results)


def _known(value: float) -> float | None:
    """JSON has no NaN."""
    return None if value != value else value


def _order(mixture: Member, experts: list[Member]) -> list[int]:
    """Places of a mixture's experts, in its own order. Raises MethodError where they are not those named."""
    made_of = mixture.origin.inputs.get("members", ()) if mixture.origin else ()
    if not made_of:
        raise MethodError(f"nothing says what '{mixture.name}' is made of",
                          fix="report on a mixture that a mix step has made")
    places = {expert.digest: place for place, expert in reversed(list(enumerate(experts)))}
    if set(made_of) != set(places):
        names = mixture.origin.names.get("members", ()) if mixture.origin else ()
        raise MethodError(f"'{mixture.name}' is a mixture of {', '.join(names)}; "
                          f"these are {', '.join(expert.name for expert in experts)}",
                          fix="name the same experts as the mix step does")
    return [places[digest] for digest in made_of]
