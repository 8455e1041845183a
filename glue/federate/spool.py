"""The spool: every reply of a federation on disk, renamed into place and noted, so that nothing is trained twice.

    incoming/1-c0    what a client has written: whole, since it was renamed from elsewhere, and not looked at yet
    updates/1-c0     what was taken
    states/1         what a round has come to
    journal.jsonl    one line for each thing that happened
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glue.federate.update import Update, read_update
from glue.files import append_line, publish, whole_lines
from glue.member import canonical

INCOMING, UPDATES, STATES, JOURNAL = "incoming", "updates", "states", "journal.jsonl"


class Spool:
    """All of a federation that outlives its process."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    # what happened

    def note(self, event: str, **more: Any) -> None:
        """Write one line down, synced."""
        append_line(self.folder / JOURNAL, canonical({"event": event, **more}))

    def events(self, *names: str) -> Iterator[dict[str, Any]]:
        """The lines of these names, or all, oldest first."""
        for line in map(json.loads, whole_lines(self.folder / JOURNAL)):
            if not names or line["event"] in names:
                yield line

    # replies

    def incoming(self, round: int, client: str) -> Path:
        """Where the reply of a client goes, by `publish`."""
        return self.folder / INCOMING / f"{round}-{client}"

    def arrived(self, round: int, clients: Sequence[str]) -> list[str]:
        """Clients of a round whose reply is there and was not looked at: a killed server was about to."""
        return [client for client in clients if self.incoming(round, client).is_dir()]

    def has(self, round: int, client: str) -> bool:
        """Whether a reply was taken, in time or late; a second one is not looked at."""
        return (self.folder / UPDATES / f"{round}-{client}").is_dir()

    def take(self, round: int, client: str, *, late: bool = False) -> Update:
        """Keep a reply that came in. A kill before the line is written leaves what `taken` finds all the same."""
        update = read_update(self.incoming(round, client))
        final = self.folder / UPDATES / f"{round}-{client}"
        if late:
            self.note("late", round=round, client=client)  # first, or it would count after a restart
        publish(update.folder, final)
        self.note("update", round=round, client=client, bytes=update.bytes, examples=update.examples)
        return read_update(final)

    def drop(self, round: int, client: str) -> None:
        """Throw a reply away that was refused."""
        shutil.rmtree(self.incoming(round, client), ignore_errors=True)

    def taken(self, round: int, *, late: bool = False) -> list[Update]:
        """Updates of a round in the order of clients; with the late ones or without."""
        folders = (self.folder / UPDATES).glob(f"{round}-*")
        behind = {line["client"] for line in self.events("late") if line["round"] == round}
        found = [read_update(folder) for folder in folders if not _replaced(folder)]
        return sorted((update for update in found if late or update.client not in behind),
                      key=lambda update: update.client)

    # rounds

    def state(self, round: int) -> Path:
        """The folder of what a round has come to."""
        return self.folder / STATES / str(round)

    def draft(self, round: int) -> Path:
        """An empty folder in which that can be made."""
        draft = self.folder / STATES / f".{round}"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        return draft

    def close(self, round: int, clients: Sequence[str], digest: str) -> None:
        """Rename the draft of a round into place, and note it."""
        if not self.state(round).exists():
            publish(self.folder / STATES / f".{round}", self.state(round))
        self.note("closed", round=round, clients=sorted(clients), digest=digest)

    def closed(self) -> dict[int, dict[str, Any]]:
        """Round -> its line, for rounds that are done."""
        return {line["round"]: line for line in self.events("closed")}


def _replaced(folder: Path) -> bool:
    return ".replaced-" in folder.name
