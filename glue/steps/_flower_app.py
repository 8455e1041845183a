"""The apps that Flower loads, and the three ways to run them: in its simulation on Ray, or at a SuperLink.

    glue federate serve                  starts a SuperLink
    glue federate join ADDRESS           starts a SuperNode, one for each client
    GLUE_SUPERLINK=ADDRESS glue run ...  sends the federation there

What runs at a SuperLink is loaded from this very package; the bundle that Flower asks for holds one line.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import glue
from glue.errors import GlueError, RunError, one_line
from glue.federate.flower import Nodes, client_app
from glue.federate.rounds import Reply, State
from glue.federate.spool import Spool
from glue.files import write_aside
from glue.identity import identify
from glue.kinds.device import usable
from glue.steps._clients import Asking, Errand, train
from glue.tune.items import read_pairs
from glue.workers import Report, quieten

if TYPE_CHECKING:
    from glue.steps._server import Federation

ADDRESS, CERTIFICATE = "GLUE_SUPERLINK", "GLUE_SUPERLINK_CERTIFICATE"
OFFLINE = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0",
           "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1"}
CALL, RUN, OUTCOME = "call.pickle", "superlink.json", "outcome.json"  # in the spool
PAUSE, LOOK = 0.5, 10.0  # seconds between two looks at the journal; and at whether the run is still there
APP = """[project]
name = "glue-federation"
version = "1.0.0"
dependencies = []
[build-system]
requires = []
[tool.flwr.app]
publisher = "glue"
[tool.flwr.app.components]
serverapp = "glue_federation:server"
clientapp = "glue_federation:client"
[tool.flwr.app.config]
call = ""
"""


# -- what runs at a client --


def fit(told: str, parent: Path | None, place: Path, node: Mapping[str, Any]) -> Path:
    """Train as an errand says, with the base and the data of this node where it has its own."""
    import torch

    quieten()
    said = json.loads(told)
    torch.set_num_threads(said.pop("threads"))
    errand = replace(Errand.from_data(said), parent=parent)
    if own := node.get("base"):
        found = identify(Path(own))[1]
        if found != errand.base.digest:
            raise GlueError(f"the base here is {found[:8]}, and {errand.base.digest[:8]} is asked for")
        errand = replace(errand, base=replace(errand.base, path=str(own)))
    if own := node.get("data"):
        count = len(read_pairs(Path(own)))
        errand = replace(errand, client=replace(errand.client, data=((Path(own), 1.0),), examples=count))
    if own := node.get("device"):
        errand = replace(errand, device=str(own))
    out = place / "out" / f"{errand.round}-{errand.client.name}"
    train(errand, out, secret="data" in node)  # a client with data of its own keeps its noise to itself
    return out


client = client_app(fit)


# -- what runs at the server --


def nodes(grid: Grid, asking: Asking, spool: Spool, threads: int) -> Nodes:
    """The clients of a federation at a grid."""
    def errand(round: int, name: str, parent: State) -> str:
        return json.dumps({**asking.errand(round, name, parent).as_data(), "threads": threads})

    return Nodes(grid, {one.number: name for name, one in asking.clients.items()}, errand, spool)


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """At a SuperLink: run the federation that a `glue run` has written down, and say how it ended."""
    quieten()
    call = Path(str(context.run_config["call"]))
    try:
        federation: Federation = pickle.loads(call.read_bytes())  # our own, written by `at_superlink`
        federation.run(nodes(grid, federation.asking, federation.spool, federation.server.workers.threads).ask)
        outcome = {"error": "", "fix": ""}
    except GlueError as error:
        outcome = {"error": error.what, "fix": error.fix}
    except Exception:
        outcome = {"error": traceback.format_exc(), "fix": ""}
    write_aside(call.with_name(OUTCOME), json.dumps(outcome))


# -- how a run gets there --


def simulated(federation: Federation, report: Report) -> State:
    """In Flower's simulation: its nodes are actors of Ray, of as many threads as this run's workers have.

    That Ray is one of its own, whatever else of Ray there is on this machine. Raises RunError where it breaks down.
    """
    with environment(OFFLINE):
        from flwr.simulation import run_simulation

        logging.getLogger("flwr").setLevel(logging.ERROR)
        found: list[State] = []
        app, over = ServerApp(), threading.Event()
        threads = federation.server.workers.threads

        @app.main()
        def local(grid: Grid, context: Context) -> None:
            at = nodes(grid, federation.asking, federation.spool, threads)
            found.append(federation.run(lambda *asked: _until(over, at.ask(*asked)), report))

        try:
            run_simulation(server_app=app, client_app=client, num_supernodes=len(federation.asking.clients),
                           backend_config={"client_resources": {"num_cpus": threads, "num_gpus": 0.0}, "init_args": {
                               "address": "local", "num_cpus": max(1, federation.server.workers.number) * threads,
                               "include_dashboard": False}})
        except RuntimeError as problem:
            told: BaseException = problem
            while told.__cause__ is not None:
                told = told.__cause__
            raise RunError(f"Flower's simulation broke down: {one_line(str(told) or type(told).__name__)}",
                           fix="run again, which asks only those who are missing; or say  runtime: here") from problem
        finally:
            over.set()  # the thread of the server would wait for replies for ever
    return found[0]


def _until(over: threading.Event, replies: Iterator[Reply | None]) -> Iterator[Reply | None]:
    """Replies for as long as there is anybody who could give one."""
    for reply in replies:
        if over.is_set():
            raise RunError("the simulation has ended")
        yield reply


def at_superlink(federation: Federation, report: Report) -> State:
    """At the SuperLink that GLUE_SUPERLINK names, on this machine or with these files under the same path."""
    address = os.environ.get(ADDRESS)
    if not address:
        raise RunError("runtime: superlink needs to know where the SuperLink is",
                       fix=f"set {ADDRESS}=host:port;  glue federate serve  starts one")
    place = federation.spool.folder
    (place / OUTCOME).unlink(missing_ok=True)
    write_aside(place / CALL, pickle.dumps(federation))
    with TemporaryDirectory(prefix="glue-flower-") as name:
        home = Path(name)
        _settings(home, address)
        _stop_other(home, place / RUN, address)
        identity = _submitted(home, place / CALL)
        write_aside(place / RUN, json.dumps({"address": address, "run": identity}))
        try:
            _watched(home, identity, federation, report)
        except BaseException:
            _flwr(home, "stop", identity, "glue")
            raise
    told = json.loads((place / OUTCOME).read_text())
    if told["error"]:
        raise RunError(told["error"], fix=told["fix"])
    (place / CALL).unlink()
    return federation.state


def _stop_other(home: Path, note: Path, address: str) -> None:
    """End what a killed `glue run` has left running there: two servers must not write into one spool."""
    other = json.loads(note.read_text()) if note.exists() else {}
    if other.get("address") == address:
        _flwr(home, "stop", other["run"], "glue")
        until = time.monotonic() + 6 * LOOK
        while not _ended(home, other["run"]) and time.monotonic() < until:
            time.sleep(PAUSE)


def _settings(home: Path, address: str) -> None:
    """The connection and the app, in a folder of their own."""
    certificate = os.environ.get(CERTIFICATE)
    secure = f'root-certificates = "{Path(certificate).resolve()}"' if certificate else "insecure = true"
    (home / "config.toml").write_text(f'[superlink]\ndefault = "glue"\n[superlink.glue]\naddress = "{address}"\n'
                                      f"{secure}\n")
    (home / "app/glue_federation").mkdir(parents=True)
    (home / "app/pyproject.toml").write_text(APP)
    (home / "app/glue_federation/__init__.py").write_text(
        "from glue.steps import _flower_app\n\nclient = _flower_app.client\nserver = _flower_app.server\n")


def _submitted(home: Path, call: Path) -> str:
    """The id of the run at the SuperLink. Raises RunError where it does not take it."""
    done = _flwr(home, "run", str(home / "app"), "glue", "--format", "json", "-c", f"call={json.dumps(str(call))}")
    try:
        told = json.loads(done.stdout[done.stdout.index("{"):])
    except ValueError:
        told = {}
    if "run-id" in told:
        return str(told["run-id"])
    said = told.get("error-message") or (done.stderr + done.stdout).strip() or "it said nothing"
    raise RunError(f"the SuperLink at {os.environ[ADDRESS]} did not take the run: {one_line(str(said))}",
                   fix=f"check {ADDRESS}, and that  glue federate serve  is running there")


def _watched(home: Path, identity: str, federation: Federation, report: Report) -> None:
    """Wait for the outcome; tell how far it is from the journal."""
    total = federation.terms.rounds * len(federation.terms.asked(1, list(federation.asking.clients)))
    looked = time.monotonic()
    while not (federation.spool.folder / OUTCOME).exists():
        time.sleep(PAUSE)
        done = sum(1 for _ in federation.spool.events("update"))
        report(min(done, total), total, f"{done} of {total} updates, at {os.environ[ADDRESS]}")
        if time.monotonic() - looked > LOOK:
            looked = time.monotonic()
            if _ended(home, identity) and not (federation.spool.folder / OUTCOME).exists():
                raise RunError("the SuperLink says that the run has ended, and it has left no result",
                               fix=f"run again, which goes on from there;  flwr log {identity}  tells what happened")


def _ended(home: Path, identity: str) -> bool:
    """Whether the SuperLink says that the run is over; where it says nothing, it may be back in a moment."""
    told = _flwr(home, "list", "glue", "--run-id", identity, "--format", "json").stdout
    return bool(re.search(r'"status": *"finished', told))


def _flwr(home: Path, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([_command("flwr"), *words], capture_output=True, text=True, env=_surroundings(home))


# -- what the command line starts --


def serve(host: str = "127.0.0.1", port: int = 9190, *, certificate: Path | None = None, key: Path | None = None,
          authority: Path | None = None, authenticate: bool = False, database: Path | None = None) -> int:
    """Run a SuperLink until it is interrupted; without a certificate it is not encrypted. Returns its exit code."""
    words = ["--host", host, "--port", str(port), "--disable-runtime-dependency-installation"]
    words += _secured(certificate, key, authority)
    words += ["--enable-supernode-auth"] * authenticate
    words += ["--database", str(database)] if database else []
    return _started("flower-superlink", words)


def join(superlink: str, client: int, of: int, *, data: Path | None = None, base: Path | None = None,
         root_certificate: Path | None = None, private_key: Path | None = None, port: int = 0,
         device: str = "cpu") -> int:
    """Run a SuperNode, which is client number `client`, until it is interrupted. Returns its exit code.

    data, base  folders of this machine, in place of those that the server names
    port        for its own processes; 0 is any that is free
    device      where it trains, whatever the recipe says
    """
    usable(device)
    config = [f"partition-id={client}", f"num-partitions={of}", f'device="{device}"']
    config += [f'{word}="{folder.resolve()}"' for word, folder in (("data", data), ("base", base)) if folder]
    words = ["--superlink", superlink, "--port", str(port or free_port()), "--node-config", " ".join(config)]
    words += ["--root-certificates", str(root_certificate)] if root_certificate else ["--insecure"]
    words += ["--auth-supernode-private-key", str(private_key)] if private_key else []
    return _started("flower-supernode", words)


def _secured(certificate: Path | None, key: Path | None, authority: Path | None) -> list[str]:
    if certificate is None:
        return ["--insecure"]
    if key is None or authority is None:
        raise GlueError("a certificate needs its key and the certificate of its authority",
                        fix="give --certificate, --key and --authority")
    return ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key), "--ssl-ca-certfile", str(authority)]


def _started(command: str, words: Sequence[str]) -> int:
    """Run one of Flower's commands with our package in its path and nothing that calls home."""
    home = Path(os.environ.get("FLWR_HOME") or Path.cwd() / "zoo" / ".flower")
    running = subprocess.Popen([_command(command), *words], env=_surroundings(home))
    try:
        return running.wait()
    except KeyboardInterrupt:
        running.terminate()
        return running.wait()


def _surroundings(home: Path) -> dict[str, str]:
    """What Flower's processes find: this package, the commands beside this Python, and nobody to call."""
    def joined(name: str, folder: Path) -> str:
        return os.pathsep.join(filter(None, [str(folder), os.environ.get(name, "")]))

    return {**os.environ, **OFFLINE, "FLWR_HOME": str(home), "PATH": joined("PATH", Path(sys.executable).parent),
            "PYTHONPATH": joined("PYTHONPATH", Path(glue.__file__).parents[1])}


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _command(name: str) -> str:
    """One of Flower's commands: the one beside this Python, or else in the path."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise RunError(f"there is no command {name}", fix="pip install 'glue[federated]'")
    return found


@contextmanager
def environment(wanted: Mapping[str, str]) -> Iterator[None]:
    """Set what the user has not set."""
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
