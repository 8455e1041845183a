"""Clients of a federation: what one is asked, what it does with that in a worker, and whose data is whose."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from glue.errors import GlueError, RecipeError, RunError, did_you_mean
from glue.files import publish
from glue.hub import locate
from glue.member import Member
from glue.steps._training import told

if TYPE_CHECKING:
    from glue.federate.rounds import Ask, Reply, State
    from glue.federate.spool import Spool
    from glue.workers import Workers

ADAPTER = "adapter_config.json"  # where it lies, a folder is an adapter's and not a model's
TICK = 0.5  # seconds after which a loop that waits for clients may look at its deadline
Start = Literal["own", "shared", "frozen"]
Partition = Literal["iid", "by_dataset"] | dict[str, Any]
PARTITIONS = ("iid", "by_dataset", "{dirichlet: alpha}", "{given: {client: {dataset: share}}}")
NOISE = 1  # beside a seed, so that noise is drawn from other numbers than batches are
TRAINING = "training"  # beside `incoming`: what is being trained


@dataclass(frozen=True)
class Client:
    """One client and its settings, the same in every round.

    number   of its partition, which decides its seeds
    rank     of its adapter; 0 where all weights are trained
    data     dataset folders, and how much of the training is theirs
    """

    name: str
    number: int
    rank: int
    alpha: float
    examples: int
    data: tuple[tuple[Path, float], ...]


@dataclass(frozen=True)
class Errand:
    """What a client is asked in one round: everything that its update depends on.

    parent   folder of the state that it begins with; None in the first round
    options  of training: steps, learning_rate, batch_size, weight_decay, prompt_weight
    privacy  clip, noise and delta of what leaves the client; None sends what was learnt as it is
    device   where it trains
    """

    client: Client
    round: int
    base: Member
    parent: Path | None
    parent_digest: str
    seed: int
    kind: Literal["lora", "full"]
    targets: tuple[str, ...]
    start: Start
    options: Mapping[str, Any] = field(default_factory=dict)
    privacy: Mapping[str, float] | None = None
    device: str = "cpu"

    def as_data(self) -> dict[str, Any]:
        """As plain data, for a client on another machine; the state travels beside it."""
        data = [[str(folder), share] for folder, share in self.client.data]
        base = {"name": self.base.name, "kind": self.base.kind, "path": self.base.path, "digest": self.base.digest}
        return {**vars(self), "client": {**vars(self.client), "data": data}, "base": base, "parent": None}

    @staticmethod
    def from_data(told: Mapping[str, Any]) -> Errand:
        """The errand that `as_data` told, without its state."""
        data = tuple((Path(folder), share) for folder, share in told["client"]["data"])
        return Errand(**{**told, "client": Client(**{**told["client"], "data": data}), "base": Member(**told["base"]),
                         "targets": tuple(told["targets"])})


@dataclass(frozen=True)
class Asking:
    """What all errands of a federation have in common."""

    base: Member
    clients: Mapping[str, Client]
    seed: int
    kind: Literal["lora", "full"]
    targets: tuple[str, ...]
    start: Start
    options: Mapping[str, Any]
    privacy: Mapping[str, float] | None = None
    device: str = "cpu"

    def errand(self, round: int, client: str, parent: State) -> Errand:
        """What a client is asked in a round."""
        return Errand(self.clients[client], round, self.base, parent.folder, parent.digest, self.seed, self.kind,
                      self.targets, self.start, self.options, self.privacy, self.device)


def asked_here(workers: Workers, spool: Spool, asking: Asking) -> Ask:
    """Clients as calls of this run's workers, as many at a time as there are workers."""
    def ask(round: int, clients: Sequence[str], parent: State) -> Iterator[Reply | None]:
        with ThreadPoolExecutor(max(1, workers.number)) as threads:
            asked = {threads.submit(workers.call, "glue.steps._clients:train", asking.errand(round, client, parent),
                                    spool.incoming(round, client)): client for client in clients}
            try:
                pending = set(asked)
                while pending:
                    done, pending = wait(pending, timeout=TICK, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield _reply(asked[future], round, future)
                    if not done:
                        yield None
            finally:
                for future in asked:
                    future.cancel()

    return ask


def _reply(client: str, round: int, future: Future) -> Reply:
    """What a call came to. What ends the whole run, such as a worker that died, is raised."""
    from glue.federate.rounds import Reply

    try:
        future.result()
    except RunError:
        raise
    except GlueError as error:
        return Reply(client, round, error.what)
    except Exception as error:
        return Reply(client, round, f"{type(error).__name__}: {error}")
    return Reply(client, round)


def train(errand: Errand, out: Path, report=None, secret: bool = False) -> None:
    """In a worker, or on a client's own machine: train, write the note, and rename the folder to `out`.

    secret  whether noise is drawn from this machine alone; else from the seed, which the server knows
    """
    from glue.federate.update import Update
    from glue.kinds.device import device_of
    from glue.tune.finetune import finetune

    client, draft = errand.client, out.parent.parent / TRAINING / out.name
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    seed = seed_of(errand.seed, client.number, errand.round)
    lora: dict[str, Any] | None = None
    if errand.kind == "lora":
        lora = {"r": client.rank, "alpha": client.alpha, "targets": list(errand.targets)}
        if errand.start != "own":
            lora |= {"shared": errand.seed, "frozen": errand.start == "frozen"}
    base, below = locate(errand.base.path), None
    if errand.parent and (errand.parent / ADAPTER).is_file():
        below = errand.parent
    elif errand.parent:
        base = errand.parent
    finetune(draft, base=base, below=below, data=client.data, lora=lora, seed=seed, report=told(report),
             device=device_of(errand.device), **errand.options)
    if errand.privacy:
        from glue.federate.privacy import Privacy, privatise

        noise = np.random.default_rng() if secret else np.random.default_rng([seed, NOISE])
        privatise(draft, Privacy(**errand.privacy), noise, frozen=errand.start == "frozen")
    (draft / "README.md").unlink(missing_ok=True)  # peft's, which tells nothing and travels with every update
    Update(client.name, errand.round, errand.base.digest, errand.parent_digest, errand.kind, client.rank,
           client.examples, errand.options["steps"], seed).write(draft)
    publish(draft, out)


def seed_of(*numbers: int) -> int:
    """A seed of 32 bits that depends on all of these."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def names_of(clients: int | list[str], data: Mapping[Member, float], partition: Partition) -> list[str]:
    """What the clients are called: as said, or c0, c1, ... with as many digits as the last has."""
    if isinstance(partition, dict) and "given" in partition:
        return list(partition["given"])
    if isinstance(clients, list):
        return clients
    return [f"c{k:0{len(str(clients - 1))}}" for k in range(clients)]


def check_partition(partition: Partition, datasets: Sequence[str] | None = None) -> None:
    """Raise RecipeError for a partition that is none of PARTITIONS, or that gives what is not there."""
    if isinstance(partition, str):
        return
    alpha, table = partition.get("dirichlet"), partition.get("given")
    if len(partition) == 1 and type(alpha) in (int, float) and alpha > 0:  # type: ignore[operator]
        return
    if len(partition) != 1 or not _table(table):
        raise RecipeError(f"{partition} is no partition", fix=f"write one of {', '.join(PARTITIONS)}")
    for client, row in partition["given"].items():
        for name in row if datasets is not None else ():
            if name not in (datasets or ()):
                raise RecipeError(f"client '{client}' is given '{name}', which is not in the data"
                                  f"{did_you_mean(name, datasets or ())}")


def _table(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(
        isinstance(row, dict) and row and all(type(share) in (int, float) and share > 0 for share in row.values())
        for row in value.values())


def dealt(folder: Path, names: Sequence[str], data: Mapping[Member, float], partition: Partition, seed: int,
          ) -> dict[str, tuple[int, tuple[tuple[Path, float], ...]]]:
    """Write each client's items into a folder of its own: name -> (how many, dataset folders with their shares).

    An item of a dataset counts as much for its client as the dataset's share says it does for all of them together.
    """
    lines = {member: (member.folder / "train.jsonl").read_text(encoding="utf-8").split("\n")[:-1] for member in data}
    groups = [member.short for member, some in lines.items() for _ in some]
    every = [line for some in lines.values() for line in some]
    parts = _parts(groups, names, partition, seed)
    found = {}
    for name, part in zip(names, parts, strict=True):
        mine = []
        for member, share in data.items():
            some = [every[k] for k in part if groups[k] == member.short]
            if some:
                place = folder / name / member.short
                place.mkdir(parents=True, exist_ok=True)
                (place / "train.jsonl").write_text("\n".join(some) + "\n", encoding="utf-8")
                mine.append((place, share * len(some) / len(lines[member])))
        found[name] = len(part), tuple(mine)
    return found


def _parts(groups: Sequence[str], names: Sequence[str], partition: Partition, seed: int) -> list[np.ndarray]:
    from glue.federate import partition as ways

    if partition == "iid":
        return ways.iid(len(groups), len(names), seed)
    if partition == "by_dataset":
        return ways.by_dataset(groups, len(names))
    assert isinstance(partition, dict)
    if "dirichlet" in partition:
        return ways.dirichlet(groups, len(names), partition["dirichlet"], seed, least=8)
    return ways.given(groups, list(partition["given"].values()), seed)
