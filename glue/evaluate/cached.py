"""What the datasets library keeps on this machine of datasets of the hub: where it lies, whether, and its digest."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from functools import cache
from glob import escape
from pathlib import Path

import xxhash

from glue.checkpoint import combined

LOCAL = ("json", "csv", "text", "parquet", "arrow")  # ways to read files of one's own, not datasets of the hub
BLOCK = 1 << 20


def datasets_cache() -> Path:
    """Where the datasets library keeps what it has loaded; without importing it, which takes a second."""
    return Path(os.environ.get("HF_DATASETS_CACHE") or _home() / "datasets").expanduser()


def _home() -> Path:
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(home).expanduser()


def in_cache(path: str, name: str = "") -> bool:
    """Whether the datasets library finds a dataset of the hub on this machine; name: of its configuration."""
    return path in LOCAL or newest(path, name) is not None


def newest(path: str, name: str = "") -> Path | None:
    """The folder that the library reads where there is no network: configuration/version/hash, the last changed."""
    *owner, dataset = path.split("/")
    dataset = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", dataset)  # as the library spells MMLU-Pro and mathQA
    dataset = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", dataset).lower()
    place = datasets_cache() / "___".join([*owner, dataset])
    found = [info.parent for info in place.glob(f"{escape(name) or '*'}/*/*/dataset_info.json")]
    return max(found, key=lambda folder: folder.stat().st_mtime) if found else None


def digest(path: str, name: str, splits: Iterable[str]) -> str:
    """xxh3_128 over the rows of some splits, as they are kept; "" for what does not lie in the cache."""
    folder = newest(path, name)
    if folder is None:
        return ""
    files = {file for split in splits for pattern in (f"*-{split}.arrow", f"*-{split}-?????-of-?????.arrow")
             for file in folder.glob(pattern)}
    told = {file.name: (file, file.stat()) for file in files}
    return combined({name: _of(file, stat.st_size, stat.st_mtime_ns) for name, (file, stat) in told.items()})


@cache
def _of(file: Path, size: int, changed: int) -> str:
    total = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while block := stream.read(BLOCK):
            total.update(block)
    return total.hexdigest()


def has_metric(name: str) -> bool:
    """Whether the evaluate library finds a metric of the hub on this machine."""
    modules = Path(os.environ.get("HF_MODULES_CACHE") or _home() / "modules").expanduser()
    place = modules / "evaluate_modules" / "metrics" / f"evaluate-metric--{name}"
    return any(len(file.parent.name) == 64 for file in place.glob(f"*/{escape(name)}.py"))  # folders by sha256


def lacking(sources: Sequence[tuple[str, str]], code: bool) -> tuple[str, str] | None:
    """What is not on this machine of datasets (path, configuration), and how to get it; None where all is there.

    code  whether code that a model wrote will be run, for which the evaluate library needs a metric of the hub
    """
    parts: dict[str, dict[str, None]] = {}
    for path, name in sources:
        if not in_cache(path, name):
            parts.setdefault(path, {})[name] = None
    told = {path: list(names) for path, names in parts.items()}
    words = [f"{path} ({', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)})"
             if any(names) else path for path, names in told.items()]
    gets = [f"for name in {names}: load_dataset({path!r}, name)" if any(names) else f"load_dataset({path!r})"
            for path, names in told.items()]
    if code and not has_metric("code_eval"):
        words.append("the metric code_eval")
        gets.append("import evaluate; evaluate.load('code_eval')  # into ~/.cache/huggingface/modules")
    if not words:
        return None
    return ", ".join(words), "\n  ".join([
        "run this in Python where there is a network, and put what it leaves in ~/.cache/huggingface/datasets "
        f"into {datasets_cache()} here:", "from datasets import load_dataset", *gets])
