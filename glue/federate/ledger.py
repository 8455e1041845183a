"""The ledger: what each client sent and was sent, what of it was refused and why, and what others see of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# What whoever gets the result, each client among them, can read of any one client in it.
SLOTS = "the result holds each client's factors as they are, side by side"
KEPT = "the folder holds what each client sent"
SUMS = "the result holds sums over all who came, not what any one of them sent"


@dataclass
class Account:
    """One client's.

    asked     how often it was asked to train; more than its rounds where a run was cut off
    up, down  bytes of updates received, and of states sent
    rounds    whose result holds its update            late  rounds for which it came after they were closed
    refused   round -> reason                          failed  round -> the client's own error
    """

    asked: int = 0
    up: int = 0
    down: int = 0
    examples: int = 0
    rounds: list[int] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    refused: dict[int, str] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)


def ledger(clients: Iterable[str], events: Iterable[Mapping[str, Any]], *, revealed: str,
           privacy: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What ledger.json holds, from the lines of a spool's journal.

    revealed  KEPT, SLOTS or SUMS
    privacy   what was done to updates before they left a client, with the accountant's figure; None: nothing
    """
    accounts = {client: Account() for client in clients}
    for event in events:
        account, round = accounts.get(event.get("client", "")), event.get("round", 0)
        match event["event"]:
            case "closed":
                for client in event["clients"]:
                    accounts[client].rounds.append(round)
            case "sent" if account:
                account.asked += 1
                account.down += event["bytes"]
            case "update" if account:
                account.up += event["bytes"]
                account.examples = event["examples"]
            case "late" if account:
                account.late.append(round)
            case "refused" if account:
                account.up += event["bytes"]
                account.refused[round] = event["reason"]
            case "failed" if account:
                account.failed[round] = event["reason"]
    told = {client: asdict(account) for client, account in accounts.items()}
    return {"clients": told, "up": sum(account.up for account in accounts.values()),
            "down": sum(account.down for account in accounts.values()),
            "privacy": {"noise": dict(privacy) if privacy else "none", "revealed": revealed}}


def lora_bytes(shapes: Iterable[tuple[int, int]], rank: int, itemsize: int = 4) -> int:
    """Bytes of an adapter of this rank over linear weights of these shapes (m, n): r (m + n) numbers each."""
    return sum(rank * (m + n) for m, n in shapes) * itemsize
