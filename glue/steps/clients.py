"""`step: clients`: what each client of a federation sent, as members of a group."""

from __future__ import annotations

from typing import Any

from glue.errors import ZooError
from glue.member import Element, Member, Origin
from glue.steps import Job, Made, One, steps
from glue.steps._clients import ADAPTER
from glue.steps.federate import CLIENTS


def kept(of: Member, **_: Any) -> None:
    """Only a federation that was told so has kept what its clients sent."""
    if not (of.folder / CLIENTS).is_dir():
        raise ZooError(f"'{of.name}' has not kept what clients sent", fix="federate with  register_clients: true")


@steps.add("clients", makes="group", check=kept, named=True)
def clients(job: Job, *, of: One) -> Made:
    """The adapters or models of the clients of a federation, to be merged, searched and mixed like any others."""
    kind = of.kind
    found = [Member(f"{job.name}/{folder.name}", _kind(folder, kind), str(folder), base=of.base, licence=of.licence,
                    origin=Origin("clients/1", {"of": (of.digest,)}, {"client": folder.name}, 0, {"of": (of.name,)}),
                    note=f"client {folder.name} of {of.short}")
             for folder in sorted((of.folder / CLIENTS).iterdir())]
    return Made("group", base=of.base, elements=(Element(of.short, of.base, tuple(found)),),
                note=f"{len(found)} clients of {of.short}")


def _kind(folder: Any, otherwise: str) -> str:
    return "adapter" if (folder / ADAPTER).is_file() else otherwise
