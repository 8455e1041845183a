"""Room: what this machine has left just now of its disk, its memory and that of a device; and sizes as people say them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from glue.errors import GlueError, one_line

CGROUPS = Path("/sys/fs/cgroup")


def free_disk(folder: Path) -> int:
    """Bytes that may still be written to the file system of a folder, which need not exist yet."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.is_dir())).free


def free_memory() -> int | None:
    """Bytes that processes here may still take: what the system says is available, or less where a control group of
    ours, such as that of a container, allows less. None where nobody tells."""
    told = [_available(), *map(_left, _groups())]
    return min((one for one in told if one is not None), default=None)


def free_on(device: str) -> int | None:
    """Bytes that a CUDA device has left; None where nobody tells.

    Asked of the driver's own tool: to ask torch is to begin with the device, which a process that is forked must not.
    """
    if not device.startswith("cuda"):
        return None
    index = device.partition(":")[2] or "0"
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        asked = ["nvidia-smi", f"--id={index}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
        return int(told.strip()) << 20
    return None


def _available() -> int | None:
    with suppress(OSError):
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    return None


def _groups() -> list[Path]:
    """Folders of the control groups that count our memory, of either version, the innermost first."""
    found: list[Path] = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root = CGROUPS / "memory" if controllers else CGROUPS
            place = root / path.strip("/")
            found += [folder for folder in (place, *place.parents) if folder.is_relative_to(root) and folder.is_dir()]
    return found


def _left(group: Path) -> int | None:
    """What a control group has left, counting as free what it only caches of files; None where it has no limit."""
    for most, now, files in (("memory.max", "memory.current", ("active_file", "inactive_file")),
                             ("memory.limit_in_bytes", "memory.usage_in_bytes",
                              ("total_active_file", "total_inactive_file"))):
        with suppress(OSError, ValueError):
            limit = int((group / most).read_text())
            if limit >= 1 << 60:  # how version 1 says that there is none
                return None
            lines = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines())
            return max(0, limit - int((group / now).read_text()) + sum(int(lines.get(word, 0)) for word in files))
    return None


def size(text: str) -> int:
    """Bytes of a size such as 500MB or 5GB. Raises GlueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    bytes_ = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if bytes_ < 1:
        raise GlueError(f"'{one_line(text)}' is no size", fix="write a number and a unit: 500MB, 5GB")
    return bytes_


def human(size: int) -> str:
    """Bytes as a person says them."""
    number = float(size)
    for unit in ("bytes", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"
