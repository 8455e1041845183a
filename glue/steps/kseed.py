"""`step: kseed`: all weights of a model tuned by clients that keep their data, and send one number for each step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from glue.errors import GlueError, RecipeError, one_line
from glue.family import Count, NonNegative, Positive, Share
from glue.files import write_aside
from glue.member import Member
from glue.steps import Device, Job, Made, Shares, Tunable, steps
from glue.steps._clients import Partition, check_partition, dealt, names_of, seed_of
from glue.steps._training import told
from glue.steps.federate import LEDGER, feasible

if TYPE_CHECKING:
    from glue.federate.exchange import Ask
    from glue.federate.kseed import Agreed
    from glue.federate.spool import Spool
    from glue.kinds.seed_history import History
    from glue.workers import Workers

SPOOL = "federation"
PRIVACY = ("clip", "noise", "delta")


@dataclass(frozen=True)
class Errand:
    """What a client knows besides what it is sent: its own data, and what was agreed on.

    data     dataset folders, and how much of the training is theirs
    privacy  clip, noise and delta; None sends slopes as they are
    device   where it calculates
    """

    client: str
    number: int
    data: tuple[tuple[Path, float], ...]
    base: Member
    agreed: Agreed
    history: History
    epsilon: float
    batch_size: int
    prompt_weight: float
    privacy: Mapping[str, float] | None
    device: str = "cpu"


def sensible(partition: Partition, privacy: dict[str, float] | None, **_: Any) -> None:
    """Words that do not go together."""
    check_partition(partition)
    if privacy is not None:
        if "clip" not in privacy or set(privacy) - set(PRIVACY):
            raise RecipeError(f"privacy is {privacy}", fix="write  privacy: {clip: 1, noise: 1, delta: 1e-5}")
        from glue.federate.privacy import Privacy

        Privacy(**privacy)


@steps.add("kseed", makes="seed_history", holds="runs", resumes=True, words=sensible,
           check=lambda **given: feasible(**{"rank": 0, **given}), unkeyed=("device",), source="arXiv:2312.06353")
def kseed(job: Job, *, base: Tunable, data: Shares, clients: Count | list[str] = 4,
          partition: Literal["iid", "by_dataset"] | dict[str, Any] = "iid", rounds: Count = 1, steps: Count,
          learning_rate: Positive, seeds: Count = 4096, epsilon: Positive = 5e-4, batch_size: Count = 16,
          prompt_weight: NonNegative = 0.05, targets: list[str] = [], pro: bool = False,  # noqa: B006
          per_round: Count | None = None, quorum: Share = 1.0, bound: Positive = 1e4,
          privacy: dict[str, NonNegative] | None = None, device: Device = "cpu") -> Made:
    """The history of a model that clients tune together without gradients: K numbers, which replay to its weights.

    clients, partition  as in step federate
    steps      of each client in each round; each is two losses and one number
    seeds      K, the number of directions; what a client is sent and sends is 4 K bytes and a head, or less
    epsilon    how far along a direction the two losses are taken
    targets    words in the names of tensors that move; all move unless some are named
    pro        draw directions by how steep they have been
    per_round  how many clients are asked in a round        quorum  share of them without which a round fails
    bound      the steepest slope that is taken from a client
    privacy    {clip, noise, delta}: slopes are clipped and noised before they leave a client
    device     where clients calculate
    """
    from glue.federate.kseed import Agreed, run
    from glue.federate.rounds import Terms
    from glue.federate.spool import Spool
    from glue.kinds.seed_history import NOTE, History

    if not (job.folder / NOTE).exists():
        spool, names = Spool(job.folder / SPOOL), names_of(clients, data, partition)
        shares = dealt(spool.folder / "data", names, data, partition, job.seed)
        agreed = Agreed(job.seed, seeds, steps, pro, bound)
        told = {"step": "kseed", "clients": len(names), "rounds": rounds, "steps": steps, "epsilon": epsilon,
                "batch_size": batch_size, "pro": pro, "privacy": privacy}
        history = History(base.digest, job.seed, learning_rate, np.zeros(seeds, np.float32), tuple(targets), told)
        errands = {name: Errand(name, k, shares[name][1], base, agreed, history, epsilon, batch_size, prompt_weight,
                                privacy, device) for k, name in enumerate(names)}
        examples = {name: count for name, (count, _) in shares.items()}
        gone = run(examples, Terms(rounds, quorum, per_round=per_round, seed=job.seed), agreed, spool,
                   ask=asked_here(job.workers, errands), report=job.report)
        write_aside(job.folder / LEDGER, json.dumps(account(spool, names, privacy, steps), indent=1))
        replace(history, accumulators=gone.accumulators).write(job.folder)  # last: it means that all is there
    shutil.rmtree(job.folder / SPOOL, ignore_errors=True)
    return Made("seed_history", base=base, note=_note(job.folder, base))


def account(spool: Spool, names: Sequence[str], privacy: Mapping[str, float] | None, steps: int) -> dict[str, Any]:
    """What each client was sent and sent, and what that tells of it: each slope is an answer, refused or not."""
    from glue.federate.ledger import SUMS, ledger
    from glue.federate.privacy import Privacy

    sent = {name: sum(steps for line in spool.events("update", "refused") if line["client"] == name) for name in names}
    return ledger(names, spool.events(), revealed=SUMS, privacy=Privacy(**privacy).told(sent) if privacy else None)


def asked_here(workers: Workers, errands: Mapping[str, Any], answer: str = "glue.steps.kseed:answer") -> Ask:
    """Clients as calls of this run's workers, as many at a time as there are workers.

    answer  the dotted name of what makes a reply of an errand and a message
    """
    def ask(round: int, messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes | str]]:
        with ThreadPoolExecutor(max(1, workers.number)) as threads:
            asked = {threads.submit(workers.call, answer, errands[client], message): client
                     for client, message in messages.items()}
            try:
                pending = set(asked)
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in sorted(done, key=lambda one: one.exception() is not None):  # first keep what came
                        yield asked[future], future.result()
            finally:
                for future in asked:
                    future.cancel()

    return ask


def answer(errand: Errand, message: bytes, report=None) -> bytes | str:
    """In a worker, or on a client's own machine: replay, walk on, and tell the slopes; or tell the error."""
    from glue.federate.kseed import heard_state, told_reply
    from glue.federate.privacy import Privacy
    from glue.kinds.device import device_of
    from glue.tune.zeroth import taught

    round, accumulators, places = heard_state(message, errand.agreed, errand.client)
    seed = seed_of(errand.agreed.seed, errand.number, round)
    # Played from the run's seed; on a machine of its own a client would take this from its system.
    noise = np.random.default_rng([seed, 1])
    tempered = Privacy(**errand.privacy).slope(noise) if errand.privacy else float
    try:
        slopes = taught(errand.base, replace(errand.history, accumulators=accumulators), data=errand.data,
                        places=places, epsilon=errand.epsilon, batch_size=errand.batch_size,
                        prompt_weight=errand.prompt_weight, seed=seed, report=told(report), tempered=tempered,
                        device=device_of(errand.device))
    except GlueError as error:
        return error.what
    except Exception as error:  # whatever it is, the round may go on without this client
        return one_line(f"{type(error).__name__}: {error}")
    return told_reply(message, slopes, places)


def _note(folder: Path, base: Member) -> str:
    """One line from the ledger."""
    told = json.loads((folder / LEDGER).read_text())
    count = len(told["clients"])
    return (f"{base.short} tuned without gradients by {count} clients, each of which sent {told['up'] // count:,} "
            f"bytes and was sent {told['down'] // count:,}")
