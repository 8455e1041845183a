"""An exchange: each client is sent a message and answers it; answers are kept, so that nobody is asked twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from glue.errors import RunError
from glue.federate.rounds import Terms
from glue.federate.spool import Spool
from glue.federate.update import Refused
from glue.files import write_aside

T = TypeVar("T")
Ask = Callable[[int, Mapping[str, bytes]], Iterator[tuple[str, bytes | str]]]  # round, client -> what it is sent
Report = Callable[[int, int, str], None]
REPLIES = "replies"  # in the spool: what each client answered in each round, as it came


def exchanged(round: int, messages: Mapping[str, bytes], clients: Mapping[str, int], terms: Terms, spool: Spool, *,
              hear: Callable[[bytes, bytes, str], T], ask: Ask,
              report: Report = lambda done, total, note: None) -> dict[str, T]:
    """What clients answer in a round, those who have before with those who do now.

    messages  client -> what it is sent
    clients   name -> examples, for the spool's journal
    hear      a reply, what it answers and whose it is -> what it says; raises Refused where it cannot be taken
    ask       may give a reply, or in its place the error of a client, as text
    Raises RunError where too few answer.
    """
    kept = spool.folder / REPLIES
    kept.mkdir(exist_ok=True)
    noted = {line["client"] for line in spool.events("update") if line["round"] == round}
    found: dict[str, T] = {}
    for client in messages:
        if (file := kept / f"{round}-{client}").is_file():
            before = file.read_bytes()
            found[client] = hear(before, messages[client], client)
            if client not in noted:  # killed between the two
                spool.note("update", round=round, client=client, bytes=len(before), examples=clients[client])
    missing = {client: message for client, message in messages.items() if client not in found}
    for client, message in missing.items():
        spool.note("sent", round=round, client=client, bytes=len(message))
    reasons: dict[str, str] = {}
    for client, reply in ask(round, missing) if missing else ():
        if isinstance(reply, str):
            reasons[client] = reply
            spool.note("failed", round=round, client=client, reason=reply)
            continue
        try:
            found[client] = hear(reply, messages[client], client)
            write_aside(kept / f"{round}-{client}", reply)
            spool.note("update", round=round, client=client, bytes=len(reply), examples=clients[client])
        except Refused as refused:
            reasons[client] = refused.what
            spool.note("refused", round=round, client=client, bytes=len(reply), reason=refused.what)
        report((round - 1) * len(messages) + len(found), terms.rounds * len(messages),
               f"round {round}: {len(found)} of {len(messages)} clients")
    if len(found) < (needed := terms.needed(len(messages))):
        told = "".join(f"; {client}: {why}" for client, why in sorted(reasons.items()))
        raise RunError(f"round {round} has {len(found)} usable replies of {len(messages)} and needs {needed}{told}",
                       fix="run again, which asks only those who are missing; or lower quorum")
    return found
