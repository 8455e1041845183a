"""Workers on Ray: two nodes on loopback, one of which is killed; what is refused, and what is asked of nodes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

import glue
from glue import actor, workers_ray
from glue.actor import SEEN, Actor, Found, Slip, deciding, refuse, sent
from glue.errors import GlueError, MethodError, RunError
from glue.merge import merging
from glue.merge.engine import prepared
from glue.merge.leaf import Source
from glue.merge.write import fill, write
from glue.recipe import read_recipe
from glue.run import Watcher, run
from glue.workers import Workers
from glue.workers_ray import ADDRESS, RayWorkers, _Asks, _Crew, check, is_address, python_path
from glue.zoo import Zoo

HERE, FOLDER = "test_workers_ray", str(Path(__file__).parent)
LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


# -- what workers are asked --

def square(x: int, report=None) -> int:
    if report:
        report(x, 10, "squaring")
    return x * x


def where(_: int) -> tuple[int, int, str, str]:
    import torch

    time.sleep(0.2)
    return os.getppid(), torch.get_num_threads(), os.environ.get("CUDA_VISIBLE_DEVICES", ""), os.getcwd()


def refused(_: int) -> None:
    raise MethodError("this cannot be", fix="do that")


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(mark: Path) -> str:
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return "done by another"
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


def linger(mark: Path) -> int:
    """The first who is asked is at it for long; the next is not."""
    if not mark.exists():
        mark.write_text(str(os.getpid()))
        time.sleep(60)
    return os.getpid()


def filled(merge, layout, names) -> tuple[dict[str, str], int]:
    time.sleep(0.1)
    return fill(merge, layout, names), os.getppid()


# -- two nodes --

def listening(word: str) -> set[str]:
    """Addresses at which this process waits for connections, and those whose command or environment holds a word."""
    sockets = set()
    for process in (*running(word), os.getpid()):
        for handle in Path(f"/proc/{process}/fd").glob("*"):
            with suppress(OSError):  # it may have ended, or closed it
                sockets.add(os.readlink(handle))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                found.add(local.split(":")[0])
    return found


def running(word: str) -> dict[int, tuple[int, str]]:
    """Process -> (its parent, its command line), of those whose command line or environment holds a word."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            line = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state, parent = (place / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z" and (word in line or word in (place / "environ").read_text(errors="replace")):
                found[int(place.name)] = int(parent), line
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def cluster():
    """A head with four CPUs and a second node with three, which are only counted, on the loopback address alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in {**workers_ray.SETTINGS, **workers_ray.ALONE}.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", os.pathsep.join([FOLDER, str(Path(glue.__file__).parents[1])]))
        from ray._private import ray_constants
        from ray.cluster_utils import Cluster

        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)  # it may have been imported before
        place = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # paths of sockets are short
        made = Cluster()
        how = {"node_ip_address": "127.0.0.1", "object_store_memory": 80_000_000, "include_dashboard": False}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        try:
            def add(**more):
                for left in (2, 1, 0):
                    try:
                        node = made.add_node(**{"num_cpus": 3, **how, **more})
                        break
                    except Exception:  # within 30 seconds, which a machine with other work may not have
                        if not left:
                            raise
                return SimpleNamespace(node=node, raylet=node.all_processes["raylet"][0].process.pid)

            add(num_cpus=4, temp_dir=str(place), ray_client_server_port=port)
            yield SimpleNamespace(address=made.address, client=f"ray://127.0.0.1:{port}", add=add, second=add(),
                                  remove=lambda one: made.remove_node(one.node, allow_graceful=False))
            found = listening(str(place))
            assert found and found <= LOOPBACK
        finally:
            import ray

            ray.shutdown()
            made.shutdown()
            until = time.monotonic() + 20
            while (left := running(str(place))) and time.monotonic() < until:
                time.sleep(0.2)
            for process in left:
                os.kill(process, signal.SIGKILL)
            shutil.rmtree(place, ignore_errors=True)
        assert not left, left


@pytest.fixture
def quick(monkeypatch):
    """A lost worker is given up at once."""
    monkeypatch.setattr(workers_ray, "BEAT", 0.1)


@pytest.fixture(scope="module")
def workers(cluster, tmp_path_factory):
    with RayWorkers(3, on=cluster.address, folder=tmp_path_factory.mktemp("seen")) as made:
        yield made


# -- the same as any workers --

def test_a_cluster_has_as_many_workers_as_it_has_room_for(cluster):
    with RayWorkers(on=cluster.address) as workers:
        assert workers.number == 7 and workers.apart
    with RayWorkers(0, 2, on=cluster.address) as workers:
        assert workers.number == 3


def test_results_come_back_in_order_and_one_by_one(workers: RayWorkers):
    seen: dict[int, int] = {}
    assert workers.map(f"{HERE}:square", [(k,) for k in range(7)], each=seen.__setitem__) == [k * k for k in range(7)]
    assert seen == {k: k * k for k in range(7)}


def test_progress_is_told_and_an_error_keeps_its_kind_and_its_fix(workers: RayWorkers):
    told: list[tuple[int, int, str]] = []
    assert workers.call(f"{HERE}:square", 3, report=lambda *event: told.append(event)) == 9
    assert told == [(3, 10, "squaring")]
    with pytest.raises(MethodError) as caught:
        workers.call(f"{HERE}:refused", 1)
    assert (caught.value.what, caught.value.fix) == ("this cannot be", "do that")


def test_workers_are_on_both_nodes_where_the_driver_works_with_a_thread_each(workers: RayWorkers, cluster):
    found = workers.map(f"{HERE}:where", [(k,) for k in range(9)])
    assert len({parent for parent, *_ in found}) == 2 and cluster.second.raylet in {parent for parent, *_ in found}
    assert {threads for _, threads, *_ in found} == {1} and {place for *_, place in found} == {os.getcwd()}


def test_a_merge_is_shared_by_both_nodes_and_has_the_bits_of_one_process(workers: RayWorkers, plain_model, tmp_path):
    from glue.checkpoint import Checkpoint

    base = plain_model(tmp_path / "base", 0)
    sources = [Source(f"m{k}", Checkpoint(plain_model(tmp_path / f"m{k}", k, base))) for k in (1, 2, 3)]
    merge = prepared(merging.choose({"dare_ties": {"density": 0.5}}), sources, Source("base", Checkpoint(base)), seed=3)
    nodes: set[int] = set()

    def spread(calls, each) -> None:
        def told(k, found) -> None:
            nodes.add(found[1])
            each(k, found[0])

        workers.map(f"{HERE}:filled", calls, each=told)

    alone = write(merge, tmp_path / "alone")
    assert write(merge, tmp_path / "shared", number=workers.number, spread=spread, apart=True) == alone
    assert len(nodes) == 2
    name = "model.safetensors"
    assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_a_merge_config_is_carried_out_by_the_cluster(workers: RayWorkers, cluster, plain_model, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from glue.cli import app

    for k in range(2):
        plain_model(tmp_path / f"m{k}", k)
    (tmp_path / "c.yaml").write_text("merge_method: linear\ndtype: bfloat16\nmodels:\n"
                                     "  - {model: m0, parameters: {weight: 0.3}}\n"
                                     "  - {model: m1, parameters: {weight: 0.7}}\n")
    monkeypatch.chdir(tmp_path)
    asked, before = [], RayWorkers.map
    monkeypatch.setattr(RayWorkers, "map", lambda self, target, *more, **how: [
        asked.append((self.address, target)), before(self, target, *more, **how)][1])
    for out, on in (("far", ["--on", cluster.address, "--workers", "2"]), ("near", [])):
        ran = CliRunner().invoke(app, ["merge", "c.yaml", out, "--quiet", *on], catch_exceptions=False)
        assert ran.exit_code == 0
    name = "model.safetensors"
    assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "near" / name).read_bytes()
    assert asked == [(cluster.address, "glue.merge.write:fill")]
    ran = CliRunner().invoke(app, ["merge", "c.yaml", "out", "--device", "cuda", "--on", cluster.address])
    assert "with --device cuda one process does the work" in str(ran.exception)


# -- lost workers --

def test_a_lost_worker_is_replaced_and_its_call_made_again_but_not_forever(cluster, quick, tmp_path, monkeypatch):
    with RayWorkers(2, on=cluster.address, folder=tmp_path) as workers:
        calls = [(tmp_path / "a",), (tmp_path / "b",), (tmp_path / "a",)]
        assert workers.map(f"{HERE}:die_once", calls) == ["done by another"] * 3
        assert len(workers.lost) == 2 and all("process has died" in why for why in workers.lost)
        monkeypatch.setattr(workers_ray, "REPEATS", 1)
        with pytest.raises(RunError, match=r"a worker process died, and so did 1 others that did its work \(.*:die\)"):
            workers.call(f"{HERE}:die", 1)
        assert len(workers.lost) == 4
        assert workers.call(f"{HERE}:square", 4) == 16, "others are there for other work"
    assert not list(tmp_path.glob(".workers-*")), "slips are taken away"


def test_a_worker_that_is_given_up_ends_itself(cluster, quick, tmp_path):
    """As one does that is cut off from the cluster, and would write beside the one that does its work."""
    with RayWorkers(1, on=cluster.address, folder=tmp_path) as workers:
        def withdraw() -> None:
            while not (tmp_path / "mark").exists() or not (tmp_path / "mark").read_text():
                time.sleep(0.05)
            for file in tmp_path.glob(".workers-*/*"):
                file.unlink()

        threading.Thread(target=withdraw).start()
        second = workers.call(f"{HERE}:linger", tmp_path / "mark")
        first = int((tmp_path / "mark").read_text())
        assert len(workers.lost) == 1 and second != first
        assert not Path(f"/proc/{first}").exists() or first not in running("ray")


RECIPE = """steps:
  - {as: ties, step: merge, members: [m1, m2, m3], base: m0, method: {ties: {density: 0.5}}}
  - {as: found, step: search, members: [m0, m1, m2, m3], base: m0, suite: own.yaml:dev, budget: 30,
     strategy: {evolve: {prove: false}}}
  - {as: near, step: extract, model: m1, base: m0, rank: 4}
  - {as: scored, step: evaluate, members: [ties, found, near], suite: own.yaml:test}
"""
SUITE = "tasks:\n  things: {data: asked, output: choice, metric: acc, chance: 0.5}\n"


@pytest.fixture
def place(tiny, tmp_path):
    """place("here") is a folder with a zoo of four models, a suite, and a recipe."""
    members, rng = [tiny(f"m{k}", seed=k) for k in range(4)], random.Random(7)
    (tmp_path / "asked").mkdir()
    for split in ("dev", "test"):
        lines = []
        for _ in range(40):
            choices = rng.sample([f"w{k}" for k in range(3, 40)], 2)
            lines.append({"question": " ".join(f"w{rng.randrange(3, 40)}" for _ in range(4)), "choices": choices,
                          "gold": 0, "answer": choices[0]})
        (tmp_path / "asked" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def make(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        told = "".join(f"  {member.name}: {{path: {member.path}}}\n" for member in members)
        (folder / "zoo.yaml").write_text(f"members:\n{told}  asked: {{path: {tmp_path}/asked, kind: dataset}}\n"
                                         "include: zoo/members.yaml\n")
        (folder / "own.yaml").write_text(SUITE)
        (folder / "r.yaml").write_text(RECIPE)
        return folder

    return make


class Struck(Watcher):
    """Kills a node with all that runs on it, as a machine dies, when some candidates have been measured."""

    def __init__(self, raylet: int):
        self.raylet, self.killed = raylet, []

    def progress(self, task, done, total, note) -> None:
        if note == "candidates" and done >= 8 and not self.killed:
            below = {process for process, (parent, _) in running("").items() if parent == self.raylet}
            self.killed = [line for process, (_, line) in running("").items() if process in below]
            for process in (self.raylet, *below):
                os.kill(process, signal.SIGKILL)


def made(folder: Path, workers: Workers, watcher: Watcher) -> tuple[dict[str, str], list[str]]:
    """Name -> digest of everything that a recipe leaves, and its scores."""
    with workers:
        plan = run(read_recipe(folder / "r.yaml"), Zoo(folder / "zoo.yaml"), workers, watcher)
    return ({task.name: task.member.digest for task in plan},
            (folder / "zoo" / "scores.jsonl").read_text().splitlines())


# -- what workers ask of nodes --

def test_gpus_are_requested_and_each_worker_sees_its_own(cluster, tmp_path):
    with pytest.raises(RunError, match="no node has room for a worker of 1 CPUs and 1 GPUs: the nodes have "
                                       "[34] CPUs and 0 GPUs"):
        RayWorkers(on=cluster.address, gpus=1)
    node = cluster.add(num_cpus=2, num_gpus=2)  # which only counts
    try:
        with RayWorkers(on=cluster.address, folder=tmp_path, gpus=1) as workers:  # as many as GPUs
            assert workers.number == 2
            found = workers.map(f"{HERE}:where", [(k,) for k in range(6)])
        assert {parent for parent, *_ in found} == {node.raylet} and {gpus for _, _, gpus, _ in found} == {"0", "1"}
    finally:
        cluster.remove(node)


def test_what_no_node_can_give_is_told_at_once(cluster):
    with pytest.raises(RunError, match="no node has room for a worker of 99 CPUs and 0 GPUs"):
        RayWorkers(1, 99, on=cluster.address)
    with pytest.raises(RunError, match="Ray Client cannot wait for 65 workers"):
        RayWorkers(65, on=cluster.client)
    with pytest.raises(RunError, match="cannot have 1.5 GPUs"):
        RayWorkers(1, on=cluster.address, gpus=1.5)
    assert _Asks(2, 0.5).room([{"Alive": True, "Resources": {"CPU": 8, "GPU": 1}},
                               {"Alive": False, "Resources": {"CPU": 8, "GPU": 8}}]) == 2


def test_a_cluster_that_is_full_is_not_waited_for_forever(cluster, workers, monkeypatch, tmp_path):
    workers.map(f"{HERE}:where", [(k,) for k in range(9)])  # one of these is on the head, and takes one of its four
    monkeypatch.setattr(workers_ray, "ROOM", 1.0)
    with RayWorkers(1, 4, on=cluster.address, folder=tmp_path) as late, \
            pytest.raises(RunError, match="no node had room for a worker of 4 CPUs"):
        late.call(f"{HERE}:square", 1)


def test_a_node_that_does_not_see_the_zoo_or_has_another_torch_is_named(tmp_path):
    here, slip = deciding(), Slip(tmp_path / "slips" / "one", "word")
    assert {"torch", "glue", "glue's files"} <= set(here)
    refuse(Found("far", "", here), here, slip)
    with pytest.raises(RunError, match=f"node far does not see {tmp_path}/slips as this machine does: No such file"):
        refuse(Found("far", "No such file", here), here, slip)
    with pytest.raises(RunError, match=r"node far has torch 1\.0, and this machine .*: results would differ"):
        refuse(Found("far", "", {**here, "torch": "1.0"}), here, slip)


def test_a_worker_reads_its_slip_and_answers_it(tmp_path, monkeypatch):
    monkeypatch.setattr(actor, "_watch", lambda slip: None)
    monkeypatch.chdir(tmp_path)
    slip, one = Slip(tmp_path / "slips" / "one", "word"), Actor(1, {}, str(tmp_path))
    assert one.meet(slip).unseen == "No such file or directory" and not slip.answered(0)
    slip.write()
    found = one.meet(slip)
    assert (found.unseen, found.node) == ("", socket.gethostname()) and slip.answered(0)
    (tmp_path / "slips" / "one").write_text("other")
    assert one.meet(slip).unseen == "something else lies there"
    with pytest.raises(RunError, match="one/two cannot be written to: Not a directory"):
        Slip(tmp_path / "slips" / "one" / "two" / "three", "word").write()
    slip.withdraw()
    assert not (tmp_path / "slips" / f"one{SEEN}").exists()


def test_a_node_with_another_glue_is_refused_before_any_work(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(workers_ray, "deciding", lambda: {**deciding(), "glue's files": "changed"})
    with RayWorkers(2, on=cluster.address, folder=tmp_path) as workers, \
            pytest.raises(RunError, match=f"node {socket.gethostname()} has glue's files .*, and this machine changed"):
        workers.call(f"{HERE}:square", 1)


def test_variables_that_results_depend_on_are_sent_and_tokens_are_not(monkeypatch):
    for name in ("HF_HOME", "GLUE_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "told")
    assert {"HF_HOME", "GLUE_API_KEY"} <= set(sent()) and not {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY"} & set(sent())


def test_nodes_look_for_modules_where_this_process_does(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.pathsep}{FOLDER}")
    assert python_path().split(os.pathsep) == [str(tmp_path), FOLDER, str(Path(glue.__file__).resolve().parents[1])]


# -- addresses --

def test_addresses_are_told_from_other_words():
    assert all(map(is_address, ("ray://head:10001", "10.0.0.1:6379", "[::1]:6379", "head.cluster.local:1")))
    assert not any(map(is_address, ("ray", "here", "rya://head:1", "head", "head:port", "ray://head", "a b:1")))


def test_an_address_at_which_nothing_or_something_else_listens_is_refused_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # taken, and nobody listens
        port = free.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            with pytest.raises(RunError, match=f"nothing listens at 127.0.0.1:{port}"):
                RayWorkers(on=address)
        free.listen()

        def answer() -> None:
            for _ in range(8):
                one, _ = free.accept()
                one.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                one.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(RunError, match=f"what listens at 127.0.0.1:{port} is not Ray"):
            check(f"127.0.0.1:{port}")


def test_a_cluster_that_does_not_answer_any_more_is_told(monkeypatch):
    """Ray itself would end the process after a minute, without a word."""
    monkeypatch.setattr(workers_ray, "LOOK", 0.01)
    crew = SimpleNamespace(over=threading.Event(), cut=False, problem=None)
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        looking = threading.Thread(target=_Crew._look, args=(crew, address, ADDRESS.fullmatch(address)))
        looking.start()
        for _ in range(30):
            head.accept()[0].close()
        assert not crew.cut
    looking.join(20)
    assert crew.cut and crew.problem.what == f"the cluster at {address} does not answer any more"


def test_the_two_kinds_of_address_are_not_mistaken_for_each_other(cluster):
    for address, other in ((cluster.client.removeprefix("ray://"), cluster.client),
                           (f"ray://{cluster.address}", cluster.address)):
        with pytest.raises(RunError, match=f"{address} is the port of") as caught:
            check(address)
        assert caught.value.fix == f"--on {other}"
        check(other)


def test_what_ray_says_of_another_version_is_told_in_one_line(cluster, monkeypatch):
    import ray

    def init(**_):
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 1.0\n    Python: 3.6")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RunError, match=f"Ray at {cluster.address} cannot be used: Version mismatch: The cluster was "
                                       "started with: Ray: 1.0 Python: 3.6"):
        RayWorkers(on=cluster.address)


def test_without_ray_or_its_client_one_is_told_how_to_get_it(cluster, monkeypatch):
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(RunError, match="Ray Client, which is not installed"):
        check(cluster.client)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RunError, match="ray, which is not installed") as caught:
        RayWorkers(2)
    assert caught.value.fix == "pip install 'glue[ray]'"


def test_the_command_line_refuses_what_is_no_place_for_workers(place, monkeypatch):
    from typer.testing import CliRunner

    from glue.cli import app

    monkeypatch.chdir(place("asked-wrongly"))
    for words, told in ((["--on", "head"], "there are no workers on 'head'"),
                        (["--gpus", "1"], "GPUs are asked of Ray"),
                        (["--on", "127.0.0.1:1"], "nothing listens at 127.0.0.1:1")):
        for command in (["run", "r.yaml"], ["eval", "m0", "--suite", "own.yaml:test"], ["reproduce", "m0"]):
            ran = CliRunner().invoke(app, [*command, *words])
            assert isinstance(ran.exception, GlueError) and told in str(ran.exception)


# -- in processes of their own: Ray Client, and Ray that is started here --

ALONE = """
import os
import sys
from pathlib import Path
os.environ["STARTED_BY"] = sys.argv[2]  # by which its processes are known
from glue.workers_ray import RayWorkers
from test_workers_ray import listening
with RayWorkers(2, on=sys.argv[1], folder=Path(sys.argv[2])) as workers:
    mark = Path(sys.argv[2]) / "mark"
    assert workers.map("test_workers_ray:die_once", [(mark,), (mark,)]) == ["done by another"] * 2
    print(workers.map("test_workers_ray:square", [(k,) for k in range(5)]), len(workers.lost), workers.apart)
    try:
        workers.call("test_workers_ray:refused", 1)
    except Exception as error:
        print(type(error).__name__, error.fix)
    print(sorted(listening(sys.argv[2])))
"""


def in_a_process(on: str, folder: Path) -> list[str]:
    import subprocess

    folder.mkdir()
    for _ in range(3):
        ran = subprocess.run([sys.executable, "-c", ALONE, on, str(folder)], capture_output=True, text=True,
                             timeout=300)
        if "Initialization failure from server" not in ran.stderr:  # Ray gives a client's server 30 seconds to start
            break
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout.splitlines()


@pytest.mark.slow
def test_ray_client_does_the_same(cluster, tmp_path):
    squares, error, _ = in_a_process(cluster.client, tmp_path / "client")
    assert squares == "[0, 1, 4, 9, 16] 1 True" and error == "MethodError do that"


@pytest.mark.slow
def test_ray_that_is_started_here_listens_on_this_machine_alone(cluster, tmp_path):
    squares, error, addresses = in_a_process("ray", tmp_path / "here")
    assert squares == "[0, 1, 4, 9, 16] 1 False" and error == "MethodError do that"
    assert addresses != "[]" and set(eval(addresses)) <= LOOPBACK


# -- last, since the second node does not come back --

@pytest.mark.slow
def test_a_recipe_ends_with_the_same_digests_where_a_node_is_killed_in_the_middle(cluster, place):
    folder, struck = place("struck"), Struck(cluster.second.raylet)
    workers = RayWorkers(2, on=cluster.address, folder=folder / "zoo")
    digests, scores = made(folder, workers, struck)
    assert any("ray::Actor" in line for line in struck.killed), struck.killed
    assert workers.lost and len(digests) == 4
    cluster.remove(cluster.second)
    alone = made(place("alone"), Workers(0), Watcher())
    assert (digests, sorted(scores)) == (alone[0], sorted(alone[1]))
    assert not (folder / "zoo" / "answered").exists() and not list(folder.glob("zoo/**/.*.[0-9]*"))
