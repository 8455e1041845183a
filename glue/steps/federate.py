"""`step: federate`: one model taught by clients that keep their data, in rounds or in one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from glue.errors import MethodError, RecipeError, RunError
from glue.family import Choice, Count, NonNegative, Of, Positive, Share
from glue.files import write_aside
from glue.member import Member
from glue.recipe import NAME, NAME_RULE
from glue.steps import Device, Job, Made, OnDev, Shares, Tunable, steps
from glue.steps._clients import Asking, Client, Partition, Start, asked_here, check_partition, dealt, names_of
from glue.workers_ray import RayWorkers

if TYPE_CHECKING:
    from glue.federate.rounds import State
    from glue.steps._server import Federation

LEDGER, ROUNDS, SPOOL = "ledger.json", "rounds.json", "federation"
CLIENTS, LATE = "clients", "late"  # folders of what each client sent in the last round, where they are kept
Runtime = Literal["here", "ray", "superlink"]
Weight = Literal["examples", "shapley"]


def federable(kind: str, targets: list[str], combine: Choice, start: str, partition: Partition, clients: Any,
              server_scale: Any, suite: Any, rank: Any, rounds: int, register_clients: bool,
              privacy: dict[str, float] | None, weight: str, **_: Any) -> None:
    """Words that do not go together."""
    factors = combine.method.traits["space"] == "factors"
    check_partition(partition)
    if kind == "lora" and not targets:
        raise RecipeError("adapters need layers to sit on", fix="add  targets: [q_proj, v_proj]")
    if kind == "full" and factors:
        raise MethodError(f"merge method '{combine.method.name}' combines adapters, and kind: full trains all weights",
                          fix="combine with linear, ties or another method on whole models")
    if combine.method.name == "ffa" and start != "frozen":
        raise MethodError("merge method 'ffa' needs clients with one A that nobody trains", fix="add  start: frozen")
    if combine.method.name == "fedit" and isinstance(rank, dict) and len(set(rank.values())) > 1:
        raise MethodError("merge method 'fedit' averages factors of one rank, and clients have several",
                          fix="combine with flora, flexlora or zero_pad")
    if isinstance(server_scale, list) and suite is None:
        raise RecipeError("several values of server_scale are compared on dev items",
                          fix="add  suite: NAME:dev, or give one number")
    if weight == "shapley":
        _check_weight(combine, suite)
    if register_clients and kind == "lora" and not factors and rounds > 1:
        raise MethodError(f"after {rounds} rounds of '{combine.method.name}' a client's adapter sits on a model that "
                          f"is not kept", fix="leave register_clients out, or combine with flora")
    if privacy is not None:
        _check_privacy(privacy, kind)
    given = partition.get("given", {}) if isinstance(partition, dict) else {}
    named = [*(clients if isinstance(clients, list) else []), *given]
    for name in named:
        if not NAME.fullmatch(str(name)):
            raise RecipeError(f"'{name}' cannot be the name of a client: {NAME_RULE}")
    if len(set(named)) < len(named) and not given:
        raise RecipeError("two clients have one name", fix="rename one")


def _check_weight(combine: Choice, suite: Any) -> None:
    from glue.steps._games import takes_weights

    if suite is None:
        raise RecipeError("what an update is worth is measured on dev items", fix="add  suite: NAME:dev")
    if not takes_weights(combine):
        raise MethodError(f"merge method '{combine.method.name}' takes no weight for each member, so nothing can be "
                          f"weighted", fix="leave weight out, or combine with flora, linear or ties")


def _check_privacy(privacy: dict[str, float], kind: str) -> None:
    from glue.federate.privacy import Privacy

    if kind == "full":
        raise RecipeError("privacy is for adapters: noise in all weights would drown what was learnt",
                          fix="add  kind: lora, or leave privacy out")
    if "clip" not in privacy or set(privacy) - {"clip", "noise", "delta"}:
        raise RecipeError(f"privacy is {privacy}", fix="write  privacy: {clip: 1, noise: 1, delta: 1e-5}")
    Privacy(**privacy)


def feasible(base: Member, data: dict[Member, float], partition: Partition, clients: Any, rank: Any,
             **_: Any) -> None:
    """Names that have to fit to each other, once the datasets are there."""
    check_partition(partition, [member.short for member in data])
    if len({member.short for member in data}) < len(data):
        raise RecipeError("two datasets have one name but for their recipe", fix="make one under another name")
    if isinstance(rank, dict) and (lacking := set(names_of(clients, data, partition)) - set(rank)):
        raise RecipeError(f"client '{min(lacking)}' has no rank", fix="name every client, or give one rank for all")


@steps.add("federate", makes=lambda combine, kind, **_: _kind(combine, kind), writes="one", holds="trains",
           resumes=True, words=federable, check=feasible, unkeyed=("device",), source="arXiv:2409.05976")
def federate(job: Job, *, base: Tunable, data: Shares, clients: Count | list[str] = 4,
             partition: Literal["iid", "by_dataset"] | dict[str, Any] = "iid", rounds: Count = 1,
             kind: Literal["lora", "full"] = "lora", steps: Count, learning_rate: Positive, batch_size: Count = 64,
             weight_decay: NonNegative = 0.0, prompt_weight: NonNegative = 0.05, rank: Count | dict[str, Count] = 8,
             alpha: Positive | None = None, targets: list[str] = [], start: Start = "own",  # noqa: B006
             combine: Annotated[Any, Of("merging")] = "flora", server_scale: NonNegative | list[NonNegative] = 1.0,
             weight: Weight = "examples", suite: OnDev | None = None, quorum: Share = 1.0,
             deadline: Positive | None = None, patience: NonNegative = 0.0, per_round: Count | None = None,
             norm_bound: Positive = 2.0, privacy: dict[str, NonNegative] | None = None, register_clients: bool = False,
             runtime: Runtime = "here", device: Device = "cpu") -> Made:
    """An adapter, or a model, out of what clients learn: each round they train, and what they learnt is combined.

    clients       how many, or their names
    partition     whose items are whose: iid; by_dataset; {dirichlet: alpha}; {given: {client: {dataset: share}}}
    kind          what is trained and sent: an adapter, or all weights
    steps         of each client in each round
    rank, alpha   of the adapters, one for all or by client; alpha is twice the rank unless given
    start         of A: each client its own, all the same, or all the same and not trained
    combine       a merge method over what came
    server_scale  of what a round adds; of several, the best on the suite in each round
    weight        of updates: examples, as many as a client has; shapley: what an update is worth on the suite in that
                  round, among those that came. Who is worth nothing is left out; where nobody is worth anything,
                  examples count. Whatever the recipe says of the merge method's weight is multiplied
    quorum        share of the clients without which a round fails; deadline, in seconds, after which it is enough
    patience      seconds after the last round in which late updates are still kept
    per_round     how many clients are asked in a round
    norm_bound    the largest update that is taken, in units of the base's norm
    privacy       {clip, noise, delta}: adapters are clipped and noised before they leave a client; the ledger has the
                  epsilon
    register_clients  keep what clients sent, for the steps clients and refold
    runtime       here: in this run's workers; ray: in Flower's simulation; superlink: at clients of their own, by way
                  of the SuperLink at $GLUE_SUPERLINK (see  glue federate). The result is the same to the bit
    device        where clients train and states are asked; clients of a SuperLink say their own
    """
    from glue.federate.rounds import Terms
    from glue.federate.spool import Spool
    from glue.steps._server import REPORTS, Federation, Server

    spool, done = job.folder / SPOOL, job.folder / ROUNDS
    if not done.exists():
        names = names_of(clients, data, partition)
        shares = dealt(spool / "data", names, data, partition, job.seed)
        ranks = {name: _of(rank, name) if kind == "lora" else 0 for name in names}
        told = {name: Client(name, k, ranks[name], alpha or 2.0 * (ranks[name] or 1), *shares[name])
                for k, name in enumerate(names)}
        asking = Asking(base, told, job.seed, kind, tuple(targets), start, {
            "steps": steps, "learning_rate": learning_rate, "batch_size": batch_size, "weight_decay": weight_decay,
            "prompt_weight": prompt_weight}, privacy, device)
        scales = tuple(server_scale) if isinstance(server_scale, list) else (server_scale,)
        server = Server(base, kind, told, targets, combine, scales, suite, norm_bound, spool / REPORTS, job.workers,
                        job.seed, counts=runtime == "superlink", weight=weight, place=job.place(device))
        terms = Terms(rounds, quorum, deadline, per_round, patience, job.seed)
        federation = Federation(Spool(spool), asking, terms, server)
        _leave(job, _run(job, federation, runtime), federation, keep=register_clients)
    shutil.rmtree(spool, ignore_errors=True)
    chose = isinstance(server_scale, list) or weight == "shapley"
    seen = frozenset(suite.digests().values()) if suite and chose else frozenset()
    return Made(_kind(combine, kind), base=base, seen=seen, note=_note(done, base))


def _run(job: Job, federation: Federation, runtime: Runtime) -> State:
    """All rounds, by clients in this run's workers, in Flower's simulation, or at a SuperLink."""
    if runtime == "here":
        return federation.run(asked_here(job.workers, federation.spool, federation.asking), job.report)
    if runtime == "ray" and isinstance(job.workers, RayWorkers):
        raise RunError("with --on ray all of Ray is this run's own, and Flower's simulation would wait for it forever",
                       fix="leave runtime out: clients are then actors of Ray as well")
    flower = flower_app()
    return (flower.simulated if runtime == "ray" else flower.at_superlink)(federation, job.report)


def flower_app() -> Any:
    """What runs on Flower. Raises RunError where Flower is not installed."""
    try:
        from glue.steps import _flower_app as found
    except ImportError as problem:
        raise RunError(f"federations across machines need the package flwr ({problem})",
                       fix="pip install 'glue[federated]', or leave runtime out") from None
    return found


def _leave(job: Job, state: State, federation: Federation, keep: bool) -> None:
    """Put the last state into the folder, the ledger and the story of the rounds beside it, and what clients sent."""
    from glue.federate.ledger import KEPT, ledger
    from glue.federate.privacy import Privacy
    from glue.steps._server import linked, report_of, stack

    spool, server = federation.spool, federation.server
    assert state.folder is not None
    linked(state.folder, job.folder)
    last = max(spool.closed())
    if keep:
        counted = {update.client for update in spool.taken(last)}
        for update in spool.taken(last, late=True):
            place = job.folder / (CLIENTS if update.client in counted else LATE) / update.client
            shutil.rmtree(place, ignore_errors=True)
            if last > 1 and update.kind == "lora":  # over what it began with, so that it too sits on the base
                stack([(spool.state(last - 1), 1.0), (update.folder, 1.0)], server.about(), place)
            else:
                linked(update.folder, place)
    sent = {name: sum(line["client"] == name for line in spool.events("update", "refused")) for name in server.clients}
    privacy = federation.asking.privacy
    told = ledger(server.clients, spool.events(), revealed=KEPT if keep else server.revealed,
                  privacy=Privacy(**privacy).told(sent) if privacy else None)
    write_aside(job.folder / LEDGER, json.dumps(told, indent=1))
    # last, since its presence means that all is there
    write_aside(job.folder / ROUNDS, json.dumps(report_of(server.reports), indent=1))


def _note(rounds: Path, base: Member) -> str:
    told = json.loads(rounds.read_text())
    came = {client for one in told for client in one["clients"]}
    off = [one["aggregation_error"] for one in told if "aggregation_error" in one]
    first = told[0]["heterogeneity"]
    by = {one["weight"]["by"] for one in told if "weight" in one}
    return (f"{base.short} taught by {len(came)} client{'s' * (len(came) > 1)} in {len(told)} "
            f"round{'s' * (len(told) > 1)}; " + f"aggregation off by {max(off, default=0):.2g}; " * bool(off) +
            f"weighted by {' and '.join(sorted(by))}; " * bool(by) +
            f"largest change {max(first['tau']):.2g} of the base: {first['advice']}")


def _of(rank: int | dict[str, int], name: str) -> int:
    return rank[name] if isinstance(rank, dict) else rank


def _kind(combine: Choice, kind: str) -> str:
    """What comes out: factors make an adapter, everything else a whole model."""
    return "adapter" if kind == "lora" and combine.method.traits["space"] == "factors" else "model"
