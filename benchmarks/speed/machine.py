"""What a measurement was made on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "mergekit", "transformers", "safetensors", "numpy")


def machine(folder: Path) -> dict[str, Any]:
    """Processor, cores we may use, memory in bytes, kernel, the file system of `folder`, and versions."""
    return {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)),
            "ram": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "kernel": platform.release(),
            "files": _file_system(folder), "python": platform.python_version(),
            "versions": {name: _version(name) for name in PACKAGES}}


def commit(root: Path) -> str:
    """The commit of the code, with `+` where files were changed since; nothing outside a repository."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "glue") else "")


def _cpu() -> str:
    """The name that the processor gives itself, with its family and model: clouds shorten the name."""
    first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    lines = {word.strip(): value.strip() for word, _, value in (line.partition(":") for line in first.splitlines())}
    name = lines.get("model name", platform.machine())
    return f"{name} (family {lines['cpu family']}, model {lines['model']})" if "cpu family" in lines else name


def _file_system(folder: Path) -> str:
    """The type of the file system that a folder is on."""
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, this, *_ = line.split()
        if folder.resolve().is_relative_to(place) and len(place) >= len(best):
            best, kind = place, this
    return kind


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"
