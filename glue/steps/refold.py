"""`step: refold`: a federation of one round combined again, with who came late, or without somebody."""

from __future__ import annotations

import json
import shutil
from math import inf
from pathlib import Path
from typing import Any

from glue.errors import ZooError, did_you_mean
from glue.family import Choice, NonNegative
from glue.files import write_aside
from glue.member import Member
from glue.steps import Job, Made, One, steps
from glue.steps.clients import kept
from glue.steps.federate import CLIENTS, LATE, LEDGER, ROUNDS


def foldable(of: Member, without: list[str], late: bool, **_: Any) -> None:
    """One round, whose updates are still there, and names that are among them."""
    kept(of)
    rounds = json.loads((of.folder / ROUNDS).read_text())  # there wherever clients are
    if "weight" in rounds[0]:
        raise ZooError(f"'{of.name}' weighted its clients by what they are worth beside each other",
                       fix="federate again without that client, or weight by examples")
    if len(rounds) > 1:
        raise ZooError(f"'{of.name}' took {len(rounds)} rounds, and later ones began with what everybody sent in the "
                       f"first", fix="federate again without that client")
    names = _folders(of, late)
    for name in without:
        if name not in names:
            raise ZooError(f"'{of.name}' has nothing of a client '{name}'{did_you_mean(name, names)}")
    if set(names) == set(without):
        raise ZooError("nobody would be left", fix="keep one client at least")


@steps.add("refold", makes=lambda **_: "unknown", writes="one", check=foldable, source="arXiv:2412.04650")
def refold(job: Job, *, of: One, without: list[str] = [], late: bool = False,  # noqa: B006
           server_scale: NonNegative | None = None) -> Made:
    """What a one-round federation would have come to without some clients, or with those who came late: the same bits.

    without       clients whose updates are left out
    late          whether updates that came after the round was closed are put in
    server_scale  as it was, unless given
    """
    from glue.federate.rounds import State
    from glue.federate.update import read_update
    from glue.steps._server import Server, report_of

    assert of.base is not None
    said, = json.loads((of.folder / ROUNDS).read_text())
    updates = sorted((read_update(folder) for name, folder in _folders(of, late).items() if name not in without),
                     key=lambda update: update.client)
    scale = said["server_scale"]["taken"] if server_scale is None else server_scale
    server = Server(of.base, updates[0].kind, {}, said["targets"], Choice.unspelled(said["combine"]), (scale,), None,
                    inf, job.folder / ".reports", job.workers, job.seed)
    server.combine(1, updates, State(), job.folder)
    write_aside(job.folder / ROUNDS, json.dumps(report_of(server.reports), indent=1))
    shutil.rmtree(server.reports)
    ledger = json.loads((of.folder / LEDGER).read_text())
    for name, account in ledger["clients"].items():
        account["rounds"] = [1] if name in {update.client for update in updates} else []
    write_aside(job.folder / LEDGER, json.dumps(ledger, indent=1))
    for update in updates:
        shutil.copytree(update.folder, job.folder / CLIENTS / update.client)
    more = f" without {', '.join(without)}" * bool(without) + " with who came late" * late
    return Made(of.kind, base=of.base, note=f"{of.short}{more}: {len(updates)} clients")


def _folders(of: Member, late: bool) -> dict[str, Path]:
    return {folder.name: folder for place in (CLIENTS, LATE) if place == CLIENTS or late
            for folder in sorted((of.folder / place).glob("*"))}
