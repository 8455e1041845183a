"""Workers on Ray: the same calls, by actors on this machine or on a cluster that is there already.

All nodes of a cluster must see the zoo under one path. An actor that is lost is replaced, and its call is made again.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import Any, NamedTuple

import glue
from glue.actor import BEAT, Actor, Slip, deciding, refuse, sent, why
from glue.errors import RunError, one_line
from glue.workers import Workers, cores, quieten

PAUSE = 0.2     # seconds between two looks at how far a call is
REPEATS = 3     # of a call whose worker was lost
ROOM = 120.0    # seconds in which the first of the workers must have found a place
TOGETHER = 20.0  # seconds that the first worker which is ready waits for the others, so that nodes are judged first
LOOK, MISSED = 3.0, 10  # seconds between two looks whether a cluster is there, and how many it may miss
PATIENCE = 5.0  # seconds: to connect to an address, and for what a node writes to be seen here
CLIENTS = 64    # workers that one Ray Client may wait for: its server has 100 threads
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0",  # nothing is told to anybody
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # actors see what accelerators there are
            "RAY_ENABLE_AUTO_CONNECT": "0",  # who has lost a cluster is not to start another one
            "RAY_worker_niceness": "0"}  # an actor that is started here counts as much as a process of a pool
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # on every system: Ray then uses the loopback address alone
CLIENT = "ray://"
ADDRESS = re.compile(r"(?:ray://)?(\[[0-9A-Fa-f:]+\]|[\w.-]+):([0-9]{1,5})")
HEALTH = "/grpc.health.v1.Health/Check"


class RayWorkers(Workers):
    """Actors of `threads` cores and `gpus` GPUs each.

    number  0: as many as the cluster has room for, or of this machine at most 4
    on      "ray": the cluster that RAY_ADDRESS names, or else Ray is started here, for as long as the run lasts, and
            listens on this machine alone; "ray://host:port" of Ray Client; "host:port" of a cluster's head
    folder  which all nodes must see under this path, and may write to; where it is not said, one of this machine
    Raises RunError, at once, where Ray is not installed or that cluster cannot be used.
    """

    def __init__(self, number: int = 0, threads: int = 1, *, on: str = "ray", folder: Path | None = None,
                 gpus: float = 0):
        if gpus > 1 and gpus != int(gpus):
            raise RunError(f"a worker cannot have {gpus:g} GPUs", fix="one number below 1, or whole ones")
        self.address = os.environ.get("RAY_ADDRESS", "") if on == "ray" else on
        super().__init__(number or cores(), threads)
        self.apart = self.address not in ("", "local")
        self._asks = _Asks(threads, gpus)
        self._folder = folder or Path(tempfile.gettempdir())
        self._ray, self._began = _ray(self.address), False
        self._crew: _Crew | None = None
        self._room = 0
        most = CLIENTS if self.address.startswith(CLIENT) else number
        if number > most:
            raise RunError(f"Ray Client cannot wait for {number} workers at a time",
                           fix=f"--workers {CLIENTS} or fewer, or from a node of the cluster  --on host:port")
        if self.apart:
            self._connect()
            try:
                self._room = self._asks.room(self._ray.nodes())
            except RunError:
                self.close()
                raise
            self.number = number or min(self._room, most or self._room)

    def _connect(self) -> None:
        """Join the cluster, or start Ray here. Raises RunError."""
        if self.apart:
            check(self.address)
        self._began = not self._ray.is_initialized()
        if not self._began:
            return
        here = self.address or "this machine"
        how: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if self.apart:
            path = python_path()
            how |= {"address": self.address, "runtime_env": {"env_vars": {"PYTHONPATH": path} if path else {}}}
        else:
            how |= {"address": "local", "num_cpus": self.number * self.threads, "include_dashboard": False}
        try:
            self._ray.init(**how)
        except Exception as error:  # it has no kind of its own for this
            raise RunError(f"Ray at {here} cannot be used: {one_line(' '.join(str(error).split()))}",
                           fix="use the Ray and Python of the cluster, and its address" if self.apart else
                               "stop what else Ray runs here, or name a cluster: --on host:port") from None

    def _started(self) -> _Crew:  # type: ignore[override]
        with self._lock:
            if self._ended:
                raise RunError("the run was interrupted", fix="run again; what was finished is kept")
            if self._crew is None:
                quieten()
                if not self.apart:
                    self._connect()
                    self._room = self._asks.room(self._ray.nodes())
                self._crew = _Crew(self)
            return self._crew

    def _drain(self, ticket: int) -> None:
        self._reports.pop(ticket, None)  # all was told before the result came

    def close(self, *, now: bool = False) -> None:
        """End the actors, and the connection, or Ray itself where it was started here."""
        with self._lock:
            crew, self._crew, self._ended = self._crew, None, self._ended or now
        if crew is not None:
            crew.close(now)
        if self._began:
            self._began = False
            ending = threading.Thread(target=self._ray.shutdown, daemon=True)
            ending.start()
            ending.join(PATIENCE if crew is not None and crew.cut else None)  # a head that is gone would be waited for


class _Asks(NamedTuple):
    """What each worker takes of a node."""

    threads: int
    gpus: float

    def room(self, nodes: Iterable[Mapping[str, Any]]) -> int:
        """How many workers these nodes have room for. Raises RunError for none."""
        having = [node["Resources"] for node in nodes if node["Alive"]]
        room = sum(min(int(has.get("CPU", 0) // self.threads),
                       int(has.get("GPU", 0) / self.gpus + 1e-9) if self.gpus else 1 << 20) for has in having)
        if not room:
            told = ", ".join(f"{has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs" for has in having)
            raise RunError(f"no node has room for a worker of {self.threads} CPUs and {self.gpus:g} GPUs: the nodes "
                           f"have {told or 'nothing'}",
                           fix="ask for less (--threads, --gpus), or add a node that has it (ray start --num-gpus)")
        return room

    def as_options(self) -> dict[str, Any]:
        """As Ray has them: spread over nodes, with a second thread that tells how far the first is."""
        return {"num_cpus": self.threads, "num_gpus": self.gpus, "max_concurrency": 2, "scheduling_strategy": "SPREAD"}


@dataclass(frozen=True, eq=False)
class _Hand:
    """An actor, the slip that keeps it, and what will tell what it finds on its node."""

    actor: Any
    slip: Slip
    meeting: Any


class _Crew:
    """Threads, each of which waits for an actor that is free and then for what it was asked."""

    def __init__(self, workers: RayWorkers):
        self.ray, self.reports, self.lost = workers._ray, workers._reports, workers.lost
        self.folder = workers._folder.absolute() / f".workers-{os.getpid()}"
        self.asks, self.here = workers._asks, deciding()
        self.made = self.ray.remote(**self.asks.as_options())(Actor)
        self.free: Queue[_Hand] = Queue()
        self.hands: set[_Hand] = set()  # all that were asked for and are not lost
        self.up = 0  # of them, those that have found a place
        self.since = time.monotonic()  # when the last of them was lost, or none was there yet
        self.awaited, self.first = min(workers.number, workers._room), 0.0  # how many at the start; when one was up
        self.problem: RunError | None = None
        self.ended, self.cut = False, False
        self.lock, self.over = threading.Lock(), threading.Event()
        if match := ADDRESS.fullmatch(workers.address):
            threading.Thread(target=self._look, args=(workers.address, match), daemon=True).start()
        for _ in range(workers.number):
            self._hire()
        self.threads = ThreadPoolExecutor(workers.number)

    def submit(self, _: Any, target: str, args: tuple[Any, ...], ticket: int | None) -> Future:
        """As a pool of processes does."""
        return self.threads.submit(self._call, target, args, ticket)

    def _hire(self, again: int = REPEATS) -> None:
        """Ask for one more actor; it is free when it has found a place and nothing speaks against that.

        again  how often another is asked for where it ends before it has begun
        """
        slip = Slip(self.folder / secrets.token_hex(8), secrets.token_hex(8))
        slip.answered(0)  # a file system that remembers what was not there must not do so here
        slip.write()
        actor = self.made.remote(self.asks.threads, sent(), os.getcwd())
        hand = _Hand(actor, slip, actor.meet.remote(slip))
        with self.lock:
            self.hands.add(hand)
        threading.Thread(target=self._welcome, args=(hand, again), daemon=True).start()

    def _welcome(self, hand: _Hand, again: int) -> None:
        errors = self.ray.exceptions
        try:
            found = self.ray.get(hand.meeting)
            refuse(found, self.here, hand.slip)
            if not hand.slip.answered(PATIENCE):
                raise RunError(f"what node {found.node} writes into {self.folder} is not seen from here",
                               fix="mount the file system so that new files are seen at once (NFS: lookupcache=none)")
        except RunError as problem:
            self.problem = problem
        except Exception as error:
            if not self._gone(hand) or self.ended:
                return
            node = isinstance(error, errors.RayActorError) and not error.actor_init_failed
            if node and again:  # it went away, and a worker that was on its way there
                time.sleep(BEAT)
                self._hire(again - 1)
            else:
                self.problem = RunError(f"no worker can be started: {why(error)}",
                                        fix="install glue and its extras on every node, or share one environment")
        else:
            with self.lock:
                self.up += 1
                self.first = self.first or time.monotonic()
            self.free.put(hand)

    def _look(self, address: str, match: re.Match[str]) -> None:
        """See that the cluster is there; without its head Ray waits for a minute and then ends the process silently."""
        missed = 0
        while not self.over.wait(LOOK):
            try:
                socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=PATIENCE).close()
                missed = 0
            except OSError:
                missed += 1
            if missed == MISSED:
                self.cut = True
                self.problem = RunError(f"the cluster at {address} does not answer any more",
                                        fix="run again when it is there; what was finished is kept")
                return

    def _gone(self, hand: _Hand, *, up: bool = False) -> bool:
        """Give an actor up for good: whatever of it is left ends itself. Whether nobody has done so before."""
        with self.lock:
            first = hand in self.hands
            self.hands.discard(hand)
            if first and up:
                self.up -= 1
                self.since = time.monotonic()
        hand.slip.withdraw()
        if not self.cut:
            with suppress(Exception):
                self.ray.kill(hand.actor)
        return first

    def _next(self) -> _Hand:
        """An actor that is free. Raises RunError where none may be used, or none finds a place for a long time."""
        while True:
            if self.ended:
                raise RunError("the run was interrupted", fix="run again; what was finished is kept")
            if self.problem is not None:
                raise self.problem
            if self.up >= self.awaited or (self.first and time.monotonic() - self.first > TOGETHER):
                self.awaited = 0  # from now on
                with suppress(Empty):
                    return self.free.get(timeout=PAUSE)
            else:
                time.sleep(PAUSE / 4)
            if not self.up and time.monotonic() - self.since > ROOM:
                raise RunError(f"for {ROOM:g} seconds no node had room for a worker of {self.asks.threads} CPUs and "
                               f"{self.asks.gpus:g} GPUs", fix="see what else the cluster runs (ray status), then run "
                                                               "again; what was finished is kept")

    def _call(self, target: str, args: tuple[Any, ...], ticket: int | None) -> Any:
        ends: list[str] = []
        while True:
            hand = self._next()
            try:
                result, problem = self._asked(hand, target, args, ticket)
            except self.ray.exceptions.RayTaskError as error:  # raised on the way to the call, or back
                self.free.put(hand)
                raise RunError(f"{target} cannot be asked on another node: {one_line(str(error.cause))}",
                               fix="install the same on every node") from None
            except self.ray.exceptions.RayError as error:
                if self.ended or self.problem is not None:
                    continue
                ends.append(why(error))
                self.lost.append(ends[-1])
                self._gone(hand, up=True)
                self._hire()
                if len(ends) > REPEATS:
                    raise RunError(f"a worker process died, and so did {REPEATS} others that did its work ({target}): "
                                   f"{ends[-1]}", fix="most likely memory does not suffice: run again with fewer "
                                   "workers (--workers), or larger nodes; what was finished is kept") from None
                time.sleep(3 * BEAT)  # until one that is cut off and still at it has seen that it is not wanted
            except ConnectionError as error:
                raise RunError(f"the cluster does not answer any more: {one_line(str(error))}",
                               fix="run again when it is there; what was finished is kept") from None
            else:
                self.free.put(hand)
                if problem is not None:
                    raise problem
                return result

    def _asked(self, hand: _Hand, target: str, args: tuple[Any, ...], ticket: int | None) -> tuple[Any, Any]:
        asked = hand.actor.work.remote(target, args, ticket is not None)
        while not self.ray.wait([asked], timeout=PAUSE)[0]:
            if self.cut and self.problem is not None:
                raise self.problem
            if ticket is not None:
                self._tell(ticket, self.ray.get(hand.actor.news.remote(), timeout=LOOK * MISSED))
        result, problem, news = self.ray.get(asked)
        self._tell(ticket, news)
        return result, problem

    def _tell(self, ticket: int | None, news: list[tuple[int, int, str]]) -> None:
        report: Callable[[int, int, str], None] | None = self.reports.get(ticket) if ticket is not None else None
        for event in news if report else ():
            report(*event)  # type: ignore[misc]

    def close(self, now: bool) -> None:
        """End all actors; `now` while they work."""
        self.ended = now
        self.over.set()
        self.threads.shutdown(wait=not now, cancel_futures=True)
        self.ended = True
        for hand in list(self.hands):
            self._gone(hand)
        self.threads.shutdown(wait=True)
        with suppress(OSError):  # of another run of this process
            self.folder.rmdir()


def is_address(on: str) -> bool:
    """Whether this is how the address of a cluster is written: host:port, or ray://host:port."""
    return ADDRESS.fullmatch(on) is not None


def check(address: str) -> None:
    """Raise RunError where nothing listens at an address, or not what is meant; Ray itself waits for minutes."""
    match = ADDRESS.fullmatch(address)
    if match is None:  # such as auto, which Ray understands
        return
    host, port = match[1].strip("[]"), int(match[2])
    try:
        socket.create_connection((host, port), timeout=PATIENCE).close()
    except (OSError, OverflowError) as problem:
        raise RunError(f"nothing listens at {host}:{port}: {getattr(problem, 'strerror', None) or problem}",
                       fix="start Ray there (ray start --head), or correct the address") from None
    try:
        import grpc
    except ImportError:
        if not address.startswith(CLIENT):
            return  # only Ray Client needs it
        raise RunError("--on ray://host:port needs Ray Client, which is not installed",
                       fix="pip install 'glue[ray]'") from None
    with grpc.insecure_channel(f"{match[1]}:{port}") as channel:
        try:
            channel.unary_unary(HEALTH)(b"", timeout=PATIENCE)
            answers = "head"
        except grpc.RpcError as error:
            answers = "client" if error.code() is grpc.StatusCode.UNIMPLEMENTED else \
                "" if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED) else "closed"
    if not answers:
        raise RunError(f"what listens at {host}:{port} is not Ray", fix="the head of a cluster has port 6379, and Ray "
                                                                        "Client 10001, unless it was told otherwise")
    if answers == ("head" if address.startswith(CLIENT) else "client"):
        other = f"{match[1]}:{port}" if answers == "head" else f"{CLIENT}{match[1]}:{port}"
        raise RunError(f"{address} is the port of {'a head' if answers == 'head' else 'Ray Client'}",
                       fix=f"--on {other}")


def python_path() -> str:
    """Where nodes look for modules besides what is installed there: where this process does, and its own glue."""
    tree = Path(glue.__file__).resolve().parents[1]
    places = [os.path.abspath(place) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    if not {"site-packages", "dist-packages"} & set(tree.parts):
        places.append(str(tree))
    return os.pathsep.join(dict.fromkeys(places))


def _ray(address: str) -> Any:
    """The library. Raises RunError where it is not installed."""
    match = ADDRESS.fullmatch(address)
    alone = not address or (match is not None and match[1] in ("127.0.0.1", "localhost", "[::1]"))
    for name, value in {**SETTINGS, **(ALONE if alone else {})}.items():
        os.environ.setdefault(name, value)  # Ray reads them when it is imported
    try:
        import ray
    except ImportError:
        raise RunError("--on ray needs the package ray, which is not installed",
                       fix="pip install 'glue[ray]'") from None
    with suppress(AttributeError):  # its notes on lost workers, which are told here, go to where --json is written
        ray._private.worker.print_to_stdstream = lambda *_, **__: None
    return ray
