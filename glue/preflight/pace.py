"""Pace: how fast this machine reads, writes and calculates, measured once and kept beside the zoo.

From it follows about how long a task will take: at least as long as the slowest of what it does, were all else done
meanwhile, and as a rule no longer than one after the other. What is kept is measured again on another machine.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from glue.files import write_aside
from glue.merge.matrices import one_thread

FILE = "machine.json"  # in a zoo's folder
PROBE, BLOCK = 1 << 26, 1 << 20  # bytes that are written and read
WIDE, ROUNDS = 768, 3  # of matrices that are multiplied
LEAST = 100_000_000  # bytes, or a thousandth of the operations, below which imports take longer than the work


@dataclass(frozen=True)
class Pace:
    """Bytes a second from and to the disk, and operations a second of one thread in fp32."""

    read: float
    write: float
    flops: float


@dataclass(frozen=True)
class Seconds:
    """About how long something takes."""

    least: float
    most: float

    @staticmethod
    def of(*parts: float) -> Seconds | None:
        """Of things that may be done beside each other, or may not; None of nothing."""
        return Seconds(max(parts), sum(parts)) if sum(parts) else None


def pace(folder: Path) -> Pace | None:
    """Of this machine and the disk of a zoo's folder; None where nothing can be written there."""
    here, file = [_machine(), torch.__version__], folder / FILE
    with suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads(file.read_bytes())
        if told["machine"] == here:
            return Pace(*(float(told[word]) for word in ("read", "write", "flops")))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = Pace(*_disk(folder / f".probe-{os.getpid()}"), _flops())
        write_aside(file, json.dumps({"machine": here, **asdict(found)}, indent=1))
    except OSError:
        return None
    return found


def _machine() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _disk(file: Path) -> tuple[float, float]:
    """Bytes a second, read and written, past the page cache as far as the system lets go of it."""
    block = os.urandom(BLOCK)

    def write() -> None:
        with open(file, "wb", buffering=0) as stream:
            for _ in range(PROBE // BLOCK):
                stream.write(block)
            os.fsync(stream.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def read() -> None:
        with open(file, "rb", buffering=0) as stream:
            while stream.read(BLOCK):
                pass

    try:
        written = _took(write)
        return PROBE / _took(read), PROBE / written
    finally:
        file.unlink(missing_ok=True)


def _flops() -> float:
    one = torch.randn(WIDE, WIDE, generator=torch.Generator().manual_seed(0))
    with one_thread():
        return 2 * WIDE**3 / min(_took(lambda: one @ one, time.thread_time) for _ in range(ROUNDS))


def _took(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds; by the clock of the thread those that it had to itself, whatever else runs."""
    began = clock()
    work()
    return max(clock() - began, 1e-9)
