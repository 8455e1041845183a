"""`step: bpt`: a soft prompt for a model, searched by clients that keep their data and only ask the model forward."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from glue.errors import GlueError, RecipeError, one_line
from glue.family import Count, Field, NonNegative, Positive, Share
from glue.files import write_aside
from glue.hub import locate
from glue.kinds import Place
from glue.member import Member
from glue.steps import Device, Job, Made, Shares, Tunable, steps
from glue.steps._clients import check_partition, dealt, names_of, seed_of
from glue.steps.federate import LEDGER, ROUNDS, SPOOL, feasible
from glue.steps.kseed import asked_here

if TYPE_CHECKING:
    from glue.federate.bpt import Agreed
    from glue.federate.spool import Spool
    from glue.federate.subspace import Subspace
    from glue.kinds import Running


@dataclass(frozen=True)
class Errand:
    """What a client knows besides what it is sent: its own data, and what was agreed on.

    data    dataset folders, and how much of the batches is theirs
    tokens  of the prompt
    """

    client: str
    number: int
    data: tuple[tuple[Path, float], ...]
    base: Member
    agreed: Agreed
    tokens: int
    batch_size: int
    prompt_weight: float
    place: Place


def fitting(base: Member, tokens: int, dim: int, **given: Any) -> None:
    """A prompt that leaves room for a text, and a space that is no larger than the prompts themselves."""
    from glue.kinds.frame import config_json

    feasible(**{"base": base, "rank": 0, **given})
    told = config_json(locate(base.path), base.name)
    room, width = told.get("max_position_embeddings"), told.get("hidden_size")
    if type(room) is int and tokens >= room:
        raise RecipeError(f"a prompt of {tokens} tokens leaves no room for a text in the {room} that '{base.name}' "
                          f"can read", fix="lower tokens")
    if type(width) is int and dim > tokens * width:
        raise RecipeError(f"{tokens} tokens of '{base.name}' are {tokens * width} numbers, and dim is {dim}",
                          fix="lower dim, or raise tokens")


@steps.add("bpt", makes="prompt", holds="runs", resumes=True, unkeyed=("device",),
           words=lambda partition, **_: check_partition(partition), check=fitting, source="arXiv:2310.01467")
def bpt(job: Job, *, base: Tunable, data: Shares, clients: Count | list[str] = 4,
        partition: Literal["iid", "by_dataset"] | dict[str, Any] = "iid", rounds: Count, generations: Count = 1,
        popsize: Annotated[int, Field(ge=4)] = 20, dim: Count = 64, tokens: Count = 8, sigma: Positive = 1.0,
        batch_size: Count = 32, prompt_weight: NonNegative = 0.05, per_round: Count | None = None,
        quorum: Share = 1.0, bound: Annotated[float, Field(ge=1)] = 10.0, device: Device = "cpu") -> Made:
    """A soft prompt that clients search together without gradients, by CMA-ES in a small space of prompts.

    clients, partition  as in step federate
    generations  that a client goes by itself in a round        popsize  points that it tries in each, at least 4
    dim          of the space: the prompt is p0 + A x, where p0 are vectors of `tokens` tokens, and A is random
    sigma        how far from p0 the search begins, where 1 is about as far as one token is from another
    batch_size   items that the points of a generation are judged by; popsize * generations forward passes over so many
                 are what a client does in a round
    per_round    how many clients are asked in a round        quorum  share of them without which a round fails
    bound        how many times farther than is usual a client's points may lie
    device       where clients calculate
    """
    from glue.federate.bpt import Agreed, run
    from glue.federate.ledger import SUMS, ledger
    from glue.federate.rounds import Terms
    from glue.federate.spool import Spool
    from glue.kinds.prompt import CONFIG

    if not (job.folder / CONFIG).exists():
        spool, names = Spool(job.folder / SPOOL), names_of(clients, data, partition)
        place = job.place(device)
        shares = dealt(spool.folder / "data", names, data, partition, job.seed)
        agreed = Agreed(job.seed, dim, popsize, generations, sigma, bound)
        errands = {name: Errand(name, k, shares[name][1], base, agreed, tokens, batch_size, prompt_weight, place)
                   for k, name in enumerate(names)}
        belief = run({name: count for name, (count, _) in shares.items()},
                     Terms(rounds, quorum, per_round=per_round, seed=job.seed), agreed, spool,
                     ask=asked_here(job.workers, errands, "glue.steps.bpt:answer"), report=job.report)
        told = ledger(names, spool.events(), revealed=SUMS)
        write_aside(job.folder / LEDGER, json.dumps(told, indent=1))
        write_aside(job.folder / ROUNDS, json.dumps(story(spool), indent=1))
        job.workers.call("glue.steps.bpt:leave", job.folder, base, agreed, tokens, belief.mean)
    shutil.rmtree(job.folder / SPOOL, ignore_errors=True)
    return Made("prompt", base=base, note=_note(job.folder, base, tokens))


def story(spool: Spool) -> list[dict[str, Any]]:
    """What each round found: clients, the mean and the least loss of what they tried, and sigma after it."""
    rounds = {line["round"]: {key: line[key] for key in ("round", "clients", "loss", "least", "sigma")}
              for line in spool.events("judged")}
    return [rounds[round] for round in sorted(rounds)]


def answer(errand: Errand, message: bytes, report=None) -> bytes | str:
    """In a worker, or on a client's own machine: try points, and tell them with their losses; or tell the error."""
    from glue.federate.bpt import heard_state, searched
    from glue.tune.soft import guesses

    agreed, (round, _) = errand.agreed, heard_state(message)
    try:
        running = errand.place.load(errand.base)
        space = space_of(running, agreed, errand.tokens)
        batches = guesses(running, errand.tokens, data=errand.data, batch_size=errand.batch_size,
                          prompt_weight=errand.prompt_weight, seed=seed_of(agreed.seed, errand.number, round))

        def judged(generation: int, points: np.ndarray) -> np.ndarray:
            guess = next(batches)  # one batch for all, or a point would be lucky with its items
            losses = np.array([guess(space.prompt(point)) for point in points])
            if report:
                report(generation + 1, agreed.generations, f"loss {losses.mean():.3f}")
            return losses

        return searched(message, agreed, errand.client, judged)
    except GlueError as error:
        return error.what
    except Exception as error:  # whatever it is, the round may go on without this client
        return one_line(f"{type(error).__name__}: {error}")


def space_of(running: Running, agreed: Agreed, tokens: int) -> Subspace:
    """The prompts that can be found, from the embeddings of the model."""
    from glue.federate.subspace import subspace

    table: Any = running.model.get_input_embeddings().weight
    known = len(running.tokenizer)  # a table may have more rows, which are no tokens
    return subspace(table.detach()[:known].float().cpu().numpy(), tokens, agreed.dim, agreed.seed,
                    without=running.tokenizer.all_special_ids)


def leave(folder: Path, base: Member, agreed: Agreed, tokens: int, x: np.ndarray, report=None) -> None:
    """In a worker: the prompt of a point, as peft has it."""
    import torch

    from glue.kinds import load
    from glue.kinds.prompt import write_prompt

    write_prompt(folder, torch.from_numpy(space_of(load(base), agreed, tokens).prompt(x)))


def _note(folder: Path, base: Member, tokens: int) -> str:
    """One line from the ledger and the story of the rounds."""
    told, rounds = json.loads((folder / LEDGER).read_text()), json.loads((folder / ROUNDS).read_text())
    count = len(told["clients"])
    return (f"{base.short} behind {tokens} vectors, searched by {count} clients without gradients; the loss of what "
            f"they tried went from {rounds[0]['loss']:.3f} to {rounds[-1]['loss']:.3f}; each sent "
            f"{told['up'] // count:,} bytes and was sent {told['down'] // count:,}")
