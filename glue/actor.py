"""What a worker of a cluster does on its node: it says what it finds there, works, and ends when it is given up."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import glue
from glue.errors import RunError, one_line
from glue.files import write_aside
from glue.workers import RECORDED, quieten, run_here

BEAT = 1.0  # seconds between two looks at whether a worker is still wanted
SENT = ("HF_", "GLUE_", "TRANSFORMERS_", "OMP_", "MKL_", "ATEN_", "DNNL_")  # what results and keys of endpoints hang on
SEEN = ".seen"  # behind the name of a slip: what the worker answers


@dataclass(frozen=True)
class Slip:
    """A file that the driver writes for one worker, in a folder that all nodes must see.

    word  that stands in it and nowhere else
    """

    file: Path
    word: str

    def write(self) -> None:
        """Put it where the worker will look. Raises RunError."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_aside(self.file, self.word)
        except OSError as problem:
            raise RunError(f"{self.file.parent} cannot be written to: {problem.strerror or problem}",
                           fix="workers of a cluster write their results there: make it writable") from None

    def answered(self, patience: float) -> bool:
        """Whether the worker's answer is seen from here, at once or a little later."""
        answer, until = self.file.with_name(self.file.name + SEEN), time.monotonic() + patience
        while not answer.exists():
            if time.monotonic() > until:
                return False
            time.sleep(BEAT / 10)
        return True

    def withdraw(self) -> None:
        """Take it away, upon which the worker ends, should it still be there."""
        for file in (self.file, self.file.with_name(self.file.name + SEEN)):
            file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Found:
    """What a worker finds on its node.

    unseen    why the slip could not be read or answered; nothing where it was
    deciding  what `deciding` tells there
    """

    node: str
    unseen: str
    deciding: Mapping[str, str]


class Actor:
    """One worker. Its second thread tells how far the first is.

    environment  variables that the driver sends along
    folder       where the driver works, and this worker too if it is there
    """

    def __init__(self, threads: int, environment: Mapping[str, str], folder: str):
        os.environ.update(environment)
        quieten()
        with suppress(OSError):
            os.chdir(folder)  # paths on a command line are seen from there
        self.threads, self.lock = threads, threading.Lock()
        self.told: list[tuple[int, int, str]] = []

    def meet(self, slip: Slip) -> Found:
        """Say what is found on this node, and watch the slip from now on."""
        unseen = ""
        try:
            if slip.file.read_text() != slip.word:
                unseen = "something else lies there"
            else:
                write_aside(slip.file.with_name(slip.file.name + SEEN), slip.word)
                threading.Thread(target=_watch, args=(slip,), daemon=True).start()
        except OSError as problem:
            unseen = problem.strerror or str(problem)
        return Found(socket.gethostname(), unseen, deciding())

    def work(self, target: str, args: tuple[Any, ...], tells: bool) -> tuple[Any, Exception | None, list]:
        """The result or the error, as it is: Ray would wrap it. And what was not told yet."""
        import torch

        torch.set_num_threads(self.threads)  # here, since it is said for each thread
        try:
            return run_here(target, args, self._note if tells else None), None, self.news()
        except Exception as error:
            error.add_note(traceback.format_exc())  # which does not travel with it
            return None, error, self.news()

    def _note(self, done: int, total: int, note: str = "") -> None:
        with self.lock:
            self.told.append((done, total, note))

    def news(self) -> list[tuple[int, int, str]]:
        """What was reported since the last time."""
        with self.lock:
            told, self.told = self.told, []
        return told


def _watch(slip: Slip, end: Callable[[int], Any] = os._exit) -> None:
    """End this process when its slip is gone: its work was given to another, and two must not go on with it."""
    while True:
        time.sleep(BEAT)
        try:
            open(slip.file).close()  # opening asks the file server; stat may be answered from a cache
        except FileNotFoundError:
            end(1)
            return
        except OSError:  # the file server is busy, or away for a while
            continue


def sent() -> dict[str, str]:
    """The variables of this process that workers on other machines get too; no token of the hub, which none needs."""
    return {name: value for name, value in os.environ.items() if name.startswith(SENT) and "HF_TOKEN" not in name}


def deciding() -> dict[str, str]:
    """What the last bits of a result may hang on, here: versions of libraries, and glue's own files."""
    found: dict[str, str] = {}
    for name in RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    root, total = Path(glue.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        total.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return {**found, "glue's files": total.hexdigest()[:12]}


def refuse(found: Found, here: Mapping[str, str], slip: Slip) -> None:
    """Raise RunError, which names the node, where work there could not go well or would come out differently."""
    if found.unseen:
        raise RunError(f"node {found.node} does not see {slip.file.parent} as this machine does: {found.unseen}",
                       fix="put the zoo on a file system that all nodes mount under one path, and may write to")
    for name, mine in here.items():
        if (theirs := found.deciding.get(name, "not there")) != mine:
            raise RunError(f"node {found.node} has {name} {theirs}, and this machine {mine}: results would differ",
                           fix="use one environment, and one copy of glue, on every node")


def why(error: Exception) -> str:
    """What Ray says of a worker's end, in one line and without advice."""
    text = str(error).split("The actor is dead because ")[-1].split(" Some common causes")[0]
    return one_line(" ".join(text.split()), 200)
