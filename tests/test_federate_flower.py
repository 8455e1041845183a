"""Federations over Flower: the same adapter as without it, in this process, in its simulation, at a SuperLink."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Array, ArrayRecord

from glue.errors import RunError
from glue.federate.flower import LocalGrid, Nodes, client_app, packed, unpacked
from glue.federate.rounds import Loop, State, Terms
from glue.federate.spool import Spool
from glue.federate.update import Refused, Update, check
from glue.member import Member
from glue.recipe import read_recipe
from glue.run import run
from glue.steps import _flower_app
from glue.steps._flower_app import free_port
from glue.workers import Workers
from glue.zoo import Zoo

CLIENTS = {k: f"c{k}" for k in range(4)}


def answer(told: str, parent: Path | None, place: Path, node) -> Path:
    """A client that adds its number to the state, for the tests of the grid."""
    said = json.loads(told)
    if said["client"] in said.get("failing", ()):
        raise MemoryError("no room")
    before = json.loads((parent / "value.json").read_text()) if parent else 0.0
    out = place / "update"
    out.mkdir()
    (out / "value.json").write_text(json.dumps(before + node["partition-id"]))
    Update(said["client"], said["round"], "base", said["parent"], "lora", 1, 1, 1, 0).write(out)
    return out


class World:
    """A loop over a grid of four nodes, with a combine that takes the mean."""

    def __init__(self, folder: Path, *, seed: int = 0, silent=(), failing=(), **terms):
        self.spool, self.now = Spool(folder), 0.0
        self.grid = LocalGrid(client_app(answer), 4, seed=seed, silent=silent)
        self.failing, self.terms = list(failing), Terms(**terms)

    def errand(self, round: int, client: str, parent: State) -> str:
        return json.dumps({"client": client, "round": round, "parent": parent.digest, "failing": self.failing})

    def combine(self, round, updates, parent, out) -> str:
        values = [json.loads((update.folder / "value.json").read_text()) for update in updates]
        (out / "value.json").write_text(json.dumps(sum(values) / len(values)))
        return repr(values)

    def clock(self) -> float:
        self.now += 1.0
        return self.now

    def run(self) -> State:
        return Loop(list(CLIENTS.values()), self.terms, self.spool, combine=self.combine, clock=self.clock,
                    ask=Nodes(self.grid, CLIENTS, self.errand, self.spool, pause=0.0).ask,
                    check=lambda update, client, round, parent: check(
                        update, client=client, round=round, base="base", parent=parent.digest, kind="lora",
                        size=lambda _: 0.0, bound=1.0)).run()


def value(state: State) -> float:
    return json.loads((state.folder / "value.json").read_text())


def test_rounds_over_a_grid_send_the_state_and_find_clients_by_their_partition(tmp_path):
    found = [World(tmp_path / str(seed), seed=seed, rounds=3).run() for seed in range(3)]
    assert [value(state) for state in found] == [3 * 1.5] * 3 and len({state.digest for state in found}) == 1


def test_an_error_at_a_client_is_its_reply_and_the_round_goes_on(tmp_path):
    world = World(tmp_path, failing=["c3"], quorum=0.75)
    assert value(world.run()) == 1.0
    assert [line["reason"] for line in world.spool.events("failed")] == ["MemoryError: no room"]


def test_a_node_that_never_answers_is_left_behind_at_the_deadline(tmp_path):
    assert value(World(tmp_path, silent=[0], quorum=0.5, deadline=20.0).run()) == 2.0
    with pytest.raises(RunError, match="1 usable updates of 4 and needs 2: the deadline of 20 s"):
        World(tmp_path / "x", silent=[0, 1, 2], quorum=0.5, deadline=20.0).run()


def test_a_reply_to_a_round_that_is_over_is_kept_as_late(tmp_path):
    world = World(tmp_path, silent=[0], rounds=2, quorum=0.5, deadline=20.0)
    combine = world.combine

    def wakes(*given) -> str:
        world.grid._silent = set()
        return combine(*given)

    world.combine = wakes
    assert value(world.run()) == 2.0 + 1.5
    assert [update.client for update in world.spool.taken(1)] == ["c1", "c2", "c3"]
    assert [update.client for update in world.spool.taken(1, late=True)] == ["c0", "c1", "c2", "c3"]
    assert len(world.spool.taken(2)) == 4


def test_a_node_that_comes_back_under_another_id_is_asked_again(tmp_path):
    world = World(tmp_path, silent=[2])
    nodes = Nodes(world.grid, CLIENTS, world.errand, world.spool, pause=0.0)
    replies = nodes.ask(1, ["c1", "c2"], State())
    assert [next(replies), next(replies)] == [("c1", 1, ""), None]
    back = LocalGrid(client_app(answer), 4, seed=9)
    world.grid._nodes, world.grid._silent = back._nodes, set()
    assert next(reply for reply in replies if reply) == ("c2", 1, "")


def test_folders_travel_byte_for_byte_and_nothing_but_what_an_update_has(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", ".hidden"):
        (tmp_path / "a" / name).write_bytes(os.urandom(99))
    unpacked(packed(tmp_path / "a"), tmp_path / "b")
    assert {file.name for file in (tmp_path / "b").iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    for file in (tmp_path / "b").iterdir():
        assert file.read_bytes() == (tmp_path / "a" / file.name).read_bytes()
    for name in ("../x.json", "/etc/x.json", "pytorch_model.bin", "x.py", ".x.json", "x.pt"):
        with pytest.raises(Refused, match="which no update has"):
            unpacked(ArrayRecord({name: Array("uint8", (1,), "bytes", b"x")}), tmp_path / "c")


# -- real training, three ways --

DATA = """steps:
  - {as: kind, step: data, skill: {kind: {things: 45}}, train: 240, dev: 20}
  - {as: base, step: pretrain, steps: 5, learning_rate: 6e-3, batch_size: 8, vocabulary: [kind],
     architecture: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 48},
     data: {kind: 1}}
"""
FEDERATE = """  - {as: RUNTIME, step: federate, base: base, data: {kind: 1}, clients: 3, rounds: 2, steps: 4,
     batch_size: 8, learning_rate: 5e-3, rank: {c0: 4, c1: 2, c2: 1}, targets: [q_proj, v_proj], quorum: 0.6,
     runtime: RUNTIME}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A zoo with a base and a federation of three that was made here."""
    folder = tmp_path_factory.mktemp("flower")
    (folder / "zoo.yaml").write_text("members: {}\n")
    made(folder, "here")
    return folder


def made(place: Path, runtime: str, seconds: int = 300, **env: str) -> dict:
    """Run the recipe with that runtime; what the product says of itself."""
    (place / "r.yaml").write_text(DATA + FEDERATE.replace("RUNTIME", runtime))
    done = subprocess.run([sys.executable, "-m", "glue.cli", "run", "r.yaml", "--workers", "1", "-q"], cwd=place,
                          capture_output=True, text=True, timeout=seconds, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((place / "zoo/r" / runtime / "glue.json").read_text())


def over_a_grid(place: Path, here: Path, monkeypatch, runtime: str, name: str, **config) -> Member:
    """Run the recipe in this process, over a grid of three nodes instead of what the runtime means."""
    def local(federation, report) -> State:
        grid = LocalGrid(_flower_app.client, 3, seed=5, config=config)
        return federation.run(_flower_app.nodes(grid, federation.asking, federation.spool, 1).ask, report)

    monkeypatch.setattr(_flower_app, name, local)
    shutil.copytree(place, here, symlinks=True)
    (here / "r.yaml").write_text(DATA + FEDERATE.replace("RUNTIME", runtime))
    with Workers(0) as workers:
        return run(read_recipe(here / "r.yaml"), Zoo(here / "zoo.yaml"), workers)[runtime]


def test_over_a_grid_in_this_process_the_adapter_is_the_same_to_the_bit(place, tmp_path, monkeypatch):
    member = over_a_grid(place, tmp_path / "zoo", monkeypatch, "ray", "simulated")
    assert member.digest == json.loads((place / "zoo/r/here/glue.json").read_text())["digest"]


def test_clients_with_data_of_their_own_train_on_those_and_say_how_many_they_have(place, tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    lines = (place / "zoo/r/kind/train.jsonl").read_text().splitlines(keepends=True)[:50]
    (tmp_path / "own/train.jsonl").write_text("".join(lines))
    member = over_a_grid(place, tmp_path / "zoo", monkeypatch, "superlink", "at_superlink", data=str(tmp_path / "own"),
                         base=str(place / "zoo/r/base"))
    assert member.digest != json.loads((place / "zoo/r/here/glue.json").read_text())["digest"]
    ledger = json.loads((member.folder / "ledger.json").read_text())["clients"]
    assert [account["examples"] for account in ledger.values()] == [50, 50, 50]


def test_a_client_with_another_base_than_the_servers_does_not_train(place):
    from glue.steps._clients import Client, Errand

    base = place / "zoo/r/base"
    told = Errand(Client("c0", 0, 2, 4.0, 3, ((place / "nowhere", 1.0),)), 1,
                  Member("b", "model", str(base), digest="f" * 32), None, "", 0, "lora", ("q_proj",), "own").as_data()
    grid = LocalGrid(_flower_app.client, 1, config={"base": str(base)})
    nodes = Nodes(grid, {0: "c0"}, lambda *_: json.dumps({**told, "threads": 1}), Spool(place / "spool"), pause=0.0)
    reply = next(reply for reply in nodes.ask(1, ["c0"], State()) if reply)
    assert "the base here is" in reply.error and "ffffffff is asked for" in reply.error


def test_a_simulation_that_breaks_down_is_told_and_nothing_waits_for_it(place, tmp_path, monkeypatch):
    """As where Ray cannot be started, or is ended by somebody else."""
    from flwr import simulation

    waiting: list[threading.Thread] = []

    def broken(server_app, client_app, num_supernodes, backend_config):
        assert backend_config["init_args"]["address"] == "local", "whatever else of Ray there is"
        grid = SimpleNamespace(get_node_ids=list, pull_messages=lambda identities: [])
        waiting.append(threading.Thread(target=lambda: pytest.raises(RunError, server_app, grid, None), daemon=True))
        waiting[0].start()
        try:
            raise RuntimeError("Simulation Runtime crashed.") from ConnectionError("no room\nfor Ray")
        except RuntimeError as problem:
            raise RuntimeError("An error was encountered. Ending simulation.") from problem

    monkeypatch.setattr(simulation, "run_simulation", broken)
    shutil.copytree(place, tmp_path / "here", symlinks=True)
    (tmp_path / "here/r.yaml").write_text(DATA + FEDERATE.replace("RUNTIME", "ray"))
    with Workers(0) as workers, pytest.raises(RunError, match="simulation broke down: no room"):
        run(read_recipe(tmp_path / "here/r.yaml"), Zoo(tmp_path / "here/zoo.yaml"), workers)
    waiting[0].join(30)
    assert not waiting[0].is_alive()


@pytest.mark.slow
def test_in_flowers_simulation_on_ray_the_adapter_is_the_same_to_the_bit(place):
    here = json.loads((place / "zoo/r/here/glue.json").read_text())
    assert made(place, "ray")["digest"] == here["digest"]


def certificates(folder: Path) -> dict[str, Path]:
    """An authority, and a certificate of this machine that it signed."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("authority", "server")}
    names = {name: x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in keys}
    now, found = datetime.now(UTC), {}
    for name in keys:
        made = x509.CertificateBuilder().subject_name(names[name]).issuer_name(names["authority"]).public_key(
            keys[name].public_key()).serial_number(x509.random_serial_number()).not_valid_before(
            now - timedelta(days=1)).not_valid_after(now + timedelta(days=1)).add_extension(
            x509.BasicConstraints(ca=name == "authority", path_length=None), critical=True).add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]),
            critical=False).sign(keys["authority"], hashes.SHA256())
        found[name] = folder / f"{name}.pem"
        found[name].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    found["key"] = folder / "server.key"
    found["key"].write_bytes(keys["server"].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return found


WATCH = """import os, socket
before = socket.socket.connect
def connect(self, address, *rest):
    if self.family != socket.AF_UNIX and str(address[0]) not in ("127.0.0.1", "localhost", "::1"):
        with open(os.environ["WATCHED"], "a") as file:
            file.write(f"{address}\\n")
    return before(self, address, *rest)
socket.socket.connect = connect
"""


@pytest.fixture
def watched(tmp_path, monkeypatch) -> Path:
    """A file to which every process of the test writes whom it calls outside of this machine."""
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch/sitecustomize.py").write_text(WATCH)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "watch"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("WATCHED", str(tmp_path / "called"))
    subprocess.run([sys.executable, "-c", "import socket; s = socket.socket(); s.settimeout(0.1)\n"
                    "try: s.connect(('192.0.2.1', 9))\nexcept OSError: pass"], check=True)
    assert (tmp_path / "called").read_text() == "('192.0.2.1', 9)\n"  # the watch works
    (tmp_path / "called").unlink()
    return tmp_path / "called"


@pytest.fixture
def superlink(tmp_path) -> Iterator[Callable[..., dict[str, str]]]:
    """superlink(secure) starts a SuperLink here with three SuperNodes, and returns what a run needs to know of it."""
    running = []

    def begun(*words: str) -> None:
        with open(tmp_path / f"{len(running)}.log", "wb") as log:
            running.append(subprocess.Popen(
                [sys.executable, "-c", "from glue.cli_federate import federate_app; federate_app()", *words],
                cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "FLWR_HOME": str(tmp_path / "home")}))

    def start(secure: bool) -> dict[str, str]:
        port, held = free_port(), certificates(tmp_path) if secure else {}
        begun("serve", "--port", str(port), *(["--certificate", str(held["server"]), "--key", str(held["key"]),
                                               "--authority", str(held["authority"])] if secure else []))
        listening = False
        while not listening:
            assert running[0].poll() is None, (tmp_path / "0.log").read_text()[-3000:]
            with socket.socket() as one:
                listening = one.connect_ex(("127.0.0.1", port)) == 0
            time.sleep(0.2)
        for k in range(3):
            begun("join", f"127.0.0.1:{port}", "--client", str(k), "--of", "3",
                  *(["--root-certificate", str(held["authority"])] if secure else []))
        return {"GLUE_SUPERLINK": f"127.0.0.1:{port}",
                **({"GLUE_SUPERLINK_CERTIFICATE": str(held["authority"])} if secure else {})}

    yield start
    for one in running:
        os.killpg(one.pid, signal.SIGTERM)
    for one in running:
        try:
            one.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(one.pid, signal.SIGKILL)
            one.wait()


@pytest.mark.slow
def test_at_a_superlink_with_three_supernodes_the_adapter_is_the_same_to_the_bit_and_nobody_else_is_called(
        place, superlink, watched):
    here = json.loads((place / "zoo/r/here/glue.json").read_text())
    assert made(place, "superlink", **superlink(secure=True))["digest"] == here["digest"]
    ledger = json.loads((place / "zoo/r/superlink/ledger.json").read_text())["clients"]
    assert all(account["asked"] == 2 and account["rounds"] == [1, 2] for account in ledger.values())
    assert not watched.exists(), watched.read_text()


@pytest.mark.slow
def test_a_run_that_is_killed_while_its_clients_are_elsewhere_goes_on_from_what_they_sent(place, superlink, tmp_path):
    here = tmp_path / "zoo"
    shutil.copytree(place, here, symlinks=True)
    shutil.rmtree(here / "zoo/r/superlink", ignore_errors=True)
    known = superlink(secure=False)
    (here / "r.yaml").write_text(DATA + FEDERATE.replace("RUNTIME", "superlink").replace("rounds: 2", "rounds: 3"))
    run = subprocess.Popen([sys.executable, "-m", "glue.cli", "run", "r.yaml", "--workers", "1", "-q"], cwd=here,
                           env={**os.environ, **known}, start_new_session=True)
    until = time.monotonic() + 120
    while not [line for file in here.glob("zoo/.drafts/*/federation/journal.jsonl")
               for line in file.read_text().splitlines() if '"closed"' in line]:
        assert time.monotonic() < until and run.poll() is None
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    calm = DATA + FEDERATE.replace("RUNTIME", "here").replace("rounds: 2", "rounds: 3")
    (here / "c.yaml").write_text(calm.replace("as: here", "as: calm"))
    for recipe in ("r.yaml", "c.yaml"):
        done = subprocess.run([sys.executable, "-m", "glue.cli", "run", recipe, "--workers", "1", "-q"], cwd=here,
                              capture_output=True, text=True, timeout=300, env={**os.environ, **known})
        assert done.returncode == 0, done.stderr[-3000:]
    digests = [json.loads((here / "zoo" / name / "glue.json").read_text())["digest"]
               for name in ("r/superlink", "c/calm")]
    assert digests[0] == digests[1]
    ledger = json.loads((here / "zoo/r/superlink/ledger.json").read_text())["clients"]
    assert all(3 <= account["asked"] <= 4 for account in ledger.values())


def test_a_superlink_that_is_nowhere_is_told_before_anything_is_sent(place):
    with pytest.raises(RunError, match="needs to know where the SuperLink is"):
        _flower_app.at_superlink(None, lambda *_: None)


def test_without_flower_the_package_that_is_missing_is_named(monkeypatch):
    from glue.steps.federate import flower_app

    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    for name in ("glue.steps._flower_app", "glue.federate.flower"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("glue.steps._flower_app", raising=False)
    with pytest.raises(RunError, match=r"need the package flwr(.|\n)*pip install 'glue\[federated\]'"):
        flower_app()
