"""Flower: the loop's `ask` over a grid of nodes, one reply in memory at a time; folders as records, byte for byte.

A node says by a query which client it is, since its id is drawn anew whenever it connects. A node that comes back
under another id is asked again for what it still owes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from glue.errors import one_line
from glue.federate.rounds import Reply, State
from glue.federate.spool import Spool
from glue.federate.update import Refused, sent
from glue.files import publish

FILES, TOLD = "files", "told"  # the two records of a message
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.(safetensors|json|jinja|txt|model)")  # what may travel: never code
VALID = 30 * 86400.0  # seconds that a message and its reply may take
Train = Callable[[str, Path | None, Path, Mapping[str, Any]], Path]


def packed(folder: Path) -> ArrayRecord:
    """The files of a folder that travel, as bytes: no number is converted, whatever its type."""
    return ArrayRecord({file.name: Array("uint8", (file.stat().st_size,), "bytes", file.read_bytes())
                        for file in sent(folder)})


def unpacked(record: ArrayRecord, folder: Path) -> Path:
    """Write the files of a record into a new folder. Raises Refused for names that no update has."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in record.items():
        if not FILE.fullmatch(name):
            raise Refused(f"it brings a file '{one_line(name, 60)}', which no update has")
        (folder / name).write_bytes(array.data)
    return folder


def client_app(train: Train) -> ClientApp:
    """An app that says which partition a node has, and trains.

    train  (errand as text, folder of the state or None, empty folder to work in, settings of the node) -> the update
    """
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        told = ConfigRecord({"partition": int(context.node_config["partition-id"])})
        return Message(RecordDict({TOLD: told}), reply_to=message)

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        with TemporaryDirectory(prefix="glue-client-") as name:
            place = Path(name)
            try:
                parent = None
                if FILES in message.content.array_records:
                    parent = unpacked(message.content.array_records[FILES], place / "state")
                errand = str(message.content.config_records[TOLD]["errand"])
                update = train(errand, parent, place, dict(context.node_config))
                answer = RecordDict({TOLD: ConfigRecord({"error": ""}), FILES: packed(update)})
            except Exception as error:  # whatever it is, the server is told and the round may go on without us
                why = one_line(f"{type(error).__name__}: {error}")
                answer = RecordDict({TOLD: ConfigRecord({"error": why})})
            return Message(answer, reply_to=message)

    return app


class Nodes:
    """The clients of a federation, as nodes of a grid; lives as long as the federation, so that late replies are kept.

    clients  partition -> client
    errand   what a client is asked in a round, as text
    pause    seconds between two looks
    """

    def __init__(self, grid: Grid, clients: Mapping[int, str], errand: Callable[[int, str, State], str], spool: Spool,
                 pause: float = 0.2):
        self.grid, self.clients, self.errand, self.spool, self.pause = grid, clients, errand, spool, pause
        self._asked_who: dict[str, int] = {}  # message -> node
        self._seen: set[int] = set()
        self._node: dict[str, int] = {}  # client -> node
        self._open: dict[str, tuple[int, str]] = {}  # message -> round, client

    def ask(self, round: int, clients: Sequence[str], parent: State) -> Iterator[Reply | None]:
        """See `glue.federate.rounds.Ask`."""
        waiting = set(clients)
        while True:
            for client in self._found(clients):
                waiting |= {client} if (round, client) in self._open.values() else set()
            for client in sorted(waiting & set(self._node)):
                self._send(round, client, parent)
                waiting.remove(client)
            quiet = True
            for identity in list(self._open):
                for message in self.grid.pull_messages([identity]):
                    quiet = False
                    yield self._reply(message, *self._open.pop(identity))
            if quiet:
                yield None
                time.sleep(self.pause)

    def _found(self, wanted: Collection[str]) -> list[str]:
        """Clients whose node has just said that it is theirs; nodes that are new are asked."""
        new = [node for node in self.grid.get_node_ids() if node not in self._seen]
        if new:
            self._seen.update(new)
            self._asked_who |= dict(zip(self._push([(node, "query", RecordDict(), "who") for node in new]), new,
                                        strict=True))
        found = []
        for message in self.grid.pull_messages(list(self._asked_who)) if self._asked_who else ():
            node = self._asked_who.pop(message.metadata.reply_to_message_id)
            if message.has_error():
                self._seen.discard(node)  # it may have been starting
                continue
            client = self.clients.get(int(str(message.content.config_records[TOLD]["partition"])))
            if client is not None:
                self._node[client] = node
                found.append(client)
        return [client for client in found if client in wanted]

    def _send(self, round: int, client: str, parent: State) -> None:
        content = RecordDict({TOLD: ConfigRecord({"errand": self.errand(round, client, parent)})})
        if parent.folder:
            content[FILES] = packed(parent.folder)
        for identity in self._push([(self._node[client], "train", content, str(round))]):
            self._open = {old: owed for old, owed in self._open.items() if owed != (round, client)}
            self._open[identity] = round, client

    def _push(self, told: Iterable[tuple[int, str, RecordDict, str]]) -> list[str]:
        return list(self.grid.push_messages([Message(content, node, kind, group_id=group, ttl=VALID)
                                             for node, kind, content, group in told]))

    def _reply(self, message: Message, round: int, client: str) -> Reply:
        """Put an update into the spool, and forget its arrays."""
        if message.has_error():
            return Reply(client, round, message.error.reason or f"error {message.error.code}")
        if error := str(message.content.config_records[TOLD]["error"]):
            return Reply(client, round, error)
        draft = self.spool.folder / "arriving" / f"{round}-{client}"
        try:
            publish(unpacked(message.content.array_records[FILES], draft), self.spool.incoming(round, client))
        except Refused as reason:
            return Reply(client, round, reason.what)
        return Reply(client, round)


class LocalGrid(Grid):
    """A grid in this process, for tests: a node runs its app when its reply is asked for.

    silent  partitions that say who they are and never train
    """

    def __init__(self, app: ClientApp, nodes: int, *, seed: int = 0, silent: Collection[int] = (),
                 config: Mapping[str, Any] | None = None):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
        ids = np.random.default_rng(seed).integers(2, 2**62, nodes)
        self._nodes = {int(identity): Context(1, int(identity), {"partition-id": k, "num-partitions": nodes,
                                                                 **(config or {})}, RecordDict(), {})
                       for k, identity in enumerate(ids)}
        self._app, self._silent, self._sent = app, set(silent), dict[str, Message]()
        self.pushed = 0

    def set_run(self, run: Any) -> None:
        """There is only one."""

    @property
    def run(self) -> Any:
        """None."""
        return None

    def create_message(self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str,
                       ttl: float | None = None) -> Message:
        """A message, as its constructor makes it."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """All, in no order that means anything."""
        return sorted(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until their replies are asked for."""
        identities = []
        for message in messages:
            self.pushed += 1
            identities.append(f"m{self.pushed}")
            message.metadata.__dict__["_message_id"] = identities[-1]
            self._sent[identities[-1]] = message
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the app on these messages now."""
        for identity in message_ids:
            told = self._sent[identity].metadata
            context = self._nodes.get(told.dst_node_id)  # None: it has left
            if context and (told.message_type != "train" or context.node_config["partition-id"] not in self._silent):
                yield self._app(self._sent.pop(identity), context)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push and pull."""
        return self.pull_messages(self.push_messages(messages))
