"""The identity of a member's folder: fingerprint and digest over everything that changes what it computes.

Weights count by name, type, shape and bytes; JSON files by their content, configurations without paths and versions
of libraries; cards, logs and notes do not count. Of a mixture by text, the folders of its experts count in the same
way. A digest is computed once and then known by (path, size, time, inode).
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from glue.checkpoint import INDEX, Checkpoint, combined, weights_digest
from glue.errors import ZooError
from glue.files import locked, write_aside
from glue.member import canonical

COUNTED = ("config.json", "adapter_config.json", "seed_history.json", "generation_config.json", "tokenizer.json",
           "*.model", "vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json",
           "added_tokens.json", "chat_template.jinja", "*.jsonl", "*.parquet", "elements.json")
WEIGHTS = ("*.safetensors", INDEX, "*.bin", "*.pt", "*.pth", "*.gguf")  # all but the first two are refused when read
JSON_LIMIT, BLOCK = 200_000_000, 1 << 20  # bytes: of one JSON file; of other files, read at once
PARTS = ("experts/*", "pair/*")  # below the folder of a mixture by text, or of a proxy: models like any other
UNCOUNTED_KEYS = ("_name_or_path", "base_model_name_or_path", "name_or_path", "transformers_version", "peft_version")


def identify(folder: Path, known: Path | None = None) -> tuple[str, str]:
    """(fingerprint, digest) of a folder. `known` is the file in which digests are remembered.

    Raises ZooError where the folder holds nothing that counts, CheckpointError where its weights are damaged.
    """
    signature = _signature(folder)
    if not signature:
        raise ZooError(f"{folder} holds no weights, data or configuration", fix="check the path")
    key = str(folder.resolve())
    remembered = _remembered(known).get(key)
    if remembered and remembered["signature"] == signature:
        return remembered["fingerprint"], remembered["digest"]
    found = checkpoints(folder)
    prints = [checkpoint.fingerprint for checkpoint in found.values()]
    told = parts(folder)
    if not prints:
        prints = [hashlib.sha256(canonical(told).encode()).hexdigest()]
    fingerprint = prints[0] if len(prints) == 1 else hashlib.sha256("|".join(prints).encode()).hexdigest()
    told |= {name: weights_digest(checkpoint) for name, checkpoint in found.items()}
    digest = combined(told)
    if known is not None and _signature(folder) == signature:  # else it was written to while it was read
        with suppress(OSError):  # a zoo that may only be read has no cache
            _note(known, key, signature, fingerprint, digest)
    return fingerprint, digest


def parts(folder: Path) -> dict[str, str]:
    """File -> digest of its content, for every file that counts but those that hold weights."""
    return {_told(file, folder): _file_digest(file) for file in _files(folder) if not _holds_weights(file)}


def checkpoints(folder: Path) -> dict[str, Checkpoint]:
    """`weights` -> the weights of a folder; in a mixture by text also `experts/<name>/weights`, sorted by folder."""
    places = {folder if file == folder else file.parent for file in _files(folder) if _holds_weights(file)}
    return {"weights" if place == folder else f"{_told(place, folder)}/weights": Checkpoint(place)
            for place in sorted(places)}


def remember(folder: Path, known: Path, fingerprint: str, digest: str, *, files: Path) -> None:
    """Note the identity of a folder whose files still lie in `files`, to be renamed to `folder`."""
    _note(known, str(folder.resolve()), _signature(files), fingerprint, digest)


def forgotten(known: Path, *, delete: bool) -> int:
    """How many folders are remembered that are not there any more; with `delete` they are not remembered from then on.
    """
    if not any(not Path(key).exists() for key in _remembered(known)):
        return 0
    with locked(known):
        entries = _remembered(known)
        there = {key: entry for key, entry in entries.items() if Path(key).exists()}
        if delete:
            write_aside(known, canonical(there))
        return len(entries) - len(there)


def _note(known: Path, key: str, signature: list[list[Any]], fingerprint: str, digest: str) -> None:
    with locked(known):
        entry = {"signature": signature, "fingerprint": fingerprint, "digest": digest}
        write_aside(known, canonical({**_remembered(known), key: entry}))


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    places = [folder, *(place for part in PARTS for place in folder.glob(part) if not place.name.startswith("."))]
    found = {file for place in places for pattern in (*COUNTED, *WEIGHTS) for file in place.glob(pattern)
             if file.is_file() or file.is_symlink()}
    return sorted(file for file in found if not file.name.startswith("."))


def _told(place: Path, folder: Path) -> str:
    """What a file or folder is called here: its path within the folder, with slashes."""
    return place.name if place == folder else place.relative_to(folder).as_posix()


def _holds_weights(file: Path) -> bool:
    return any(file.match(pattern) for pattern in WEIGHTS)


def _signature(folder: Path) -> list[list[Any]]:
    """What tells that a file was changed; links are followed, as in the cache of the hub."""
    try:
        stats = [(file, file.stat()) for file in _files(folder)]
    except FileNotFoundError as problem:
        raise ZooError(f"{problem.filename} is a link to nothing", fix="download the folder again") from None
    return [[_told(file, folder), stat.st_size, stat.st_mtime_ns, stat.st_ino] for file, stat in stats]


def _remembered(known: Path | None) -> dict[str, dict[str, Any]]:
    """What the cache holds; nothing where it is damaged, since all of it can be computed again."""
    try:
        found = json.loads(known.read_bytes()) if known else {}
        return {key: entry for key, entry in found.items() if {"signature", "fingerprint", "digest"} <= set(entry)}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _file_digest(file: Path) -> str:
    if file.suffix == ".json":
        return xxhash.xxh3_128(_content(file).encode(errors="surrogatepass")).hexdigest()
    total = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while block := stream.read(BLOCK):
            total.update(block)
    return total.hexdigest()


def _content(file: Path) -> str:
    if file.stat().st_size > JSON_LIMIT:
        raise ZooError(f"{file} has more than {JSON_LIMIT:,} bytes, too many for JSON of a model",
                       fix="download or write it again")
    try:
        content = json.loads(file.read_bytes())
        return canonical(_without(content) if file.name.endswith("config.json") else content)
    except (ValueError, RecursionError):
        raise ZooError(f"{file} is not JSON", fix="download or write it again") from None


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items() if key not in UNCOUNTED_KEYS}
    return [_without(item) for item in value] if isinstance(value, list) else value
