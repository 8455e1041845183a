"""One command, measured from outside: seconds, CPU seconds of it and of others, memory of it and all its children.

Private memory is anonymous and shared-memory pages, sampled while the command runs. The counters of each process cost
nothing, but a page that a fork left shared counts in each. To count it once is to ask for the proportional set size,
which holds up the process for up to a second where it has gigabytes mapped: that is for runs that nobody times.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from glue.errors import RunError

PAUSE = 0.02  # seconds between two looks at memory, or as long as the last look took


@dataclass(frozen=True)
class Ran:
    """What a command took.

    wall, cpu  seconds
    others     cores that other processes kept busy meanwhile
    cold       bytes that had to come from the disk, since the page cache had lost them
    anonymous  peak bytes of anonymous and shared memory, all processes together; what a fork left shared, in each
    private    the same with everything once; 0 where the run was not watched closely and had several processes
    resident   peak bytes including mapped files, all processes together, what is shared in each
    processes  the most that were alive at once
    read       bytes that all processes together had brought from the disk when they were last looked at; what was in
               the page cache already is none of them
    written    bytes that they had handed to be written
    output     what it printed
    """

    wall: float
    cpu: float
    others: float
    cold: int
    anonymous: int
    private: int
    resident: int
    processes: int
    read: int
    written: int
    output: str


def run(command: Sequence[str], *, folder: Path, environment: Mapping[str, str], closely: bool = False) -> Ran:
    """Run a command to its end in `folder`, with these variables and no others; `closely` measures private memory.

    Raises RunError with the end of its complaints where it fails.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as complaints:
        busy, start = _busy(), time.perf_counter()
        child = subprocess.Popen(command, stdout=out, stderr=complaints, cwd=folder, env=dict(environment))
        watcher = _Watcher(child.pid, closely)
        watcher.start()
        try:
            _, status, used = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        watcher.stop()
        cpu = used.ru_utime + used.ru_stime
        out.seek(0)
        complaints.seek(0)
        if child.returncode:
            tail = complaints.read().decode(errors="replace").strip().splitlines()[-8:]
            raise RunError(f"{' '.join(command)} ended with code {child.returncode}:\n" + "\n".join(tail))
        private = watcher.private if watcher.processes > 1 else watcher.anonymous
        return Ran(wall, cpu, max(0.0, (_busy() - busy - cpu) / wall), 512 * used.ru_inblock, watcher.anonymous,
                   private, watcher.resident, watcher.processes, watcher.read, watcher.written, out.read().decode())


class _Watcher(threading.Thread):
    def __init__(self, root: int, closely: bool):
        super().__init__(daemon=True)
        self.root, self.closely = root, closely
        self.anonymous = self.private = self.resident = self.processes = 0
        self.read = self.written = 0
        self._over = threading.Event()

    def run(self) -> None:
        pause = PAUSE
        while not self._over.wait(pause):
            start, tree = time.perf_counter(), _tree(self.root)
            looks = [_counts(process, "status") for process in tree]
            self.anonymous = max(self.anonymous, sum(look["RssAnon"] + look["RssShmem"] for look in looks))
            self.resident = max(self.resident, sum(look["VmRSS"] for look in looks))
            self.processes = max(self.processes, len(tree))
            if self.closely:
                looks = [_counts(process, "smaps_rollup") for process in tree]
                self.private = max(self.private, sum(look["Pss_Anon"] + look["Pss_Shmem"] for look in looks))
            looks = [_counts(process, "io", "") for process in tree]  # with what its children have read that ended
            self.read = max(self.read, sum(look["read_bytes"] for look in looks))
            self.written = max(self.written, sum(look["write_bytes"] for look in looks))
            pause = max(PAUSE, time.perf_counter() - start)

    def stop(self) -> None:
        self._over.set()
        self.join()


def _tree(root: int) -> list[int]:
    """A process and all below it; started by any of its threads."""
    found, todo = [], [root]
    while todo:
        process = todo.pop()
        found.append(process)
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{process}/task"):
                with suppress(OSError):
                    todo += map(int, Path(f"/proc/{process}/task/{thread}/children").read_text().split())
    return found


def _counts(process: int, file: str, unit: str = "kB") -> Counter[str]:
    """The lines `word: number kB` of a file of /proc, or those without a unit, in bytes; nothing of a process that has
    ended since."""
    found: Counter[str] = Counter()
    with suppress(OSError):
        for line in Path(f"/proc/{process}/{file}").read_text().splitlines():
            word, _, rest = line.partition(":")
            number, *more = rest.split() or [""]
            if number.isdecimal() and more == unit.split():
                found[word] = int(number) * (1024 if unit else 1)
    return found


def _busy() -> float:
    """CPU seconds that all processes of the machine have used since it started."""
    user, nice, system, _, _, hard, soft, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + hard + soft) / os.sysconf("SC_CLK_TCK")
