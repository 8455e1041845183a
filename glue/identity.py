"""The identity of a member's folder: fingerprint and digest over everything that changes what it computes.

Weights count by name, type, shape and bytes; JSON files by their content without paths and versions of libraries;
cards, logs and notes do not count. A digest is computed once and then known by (path, size, time, inode).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import xxhash

from glue.checkpoint import Checkpoint, combined, weights_digest
from glue.errors import ZooError
from glue.files import locked, write_aside
from glue.member import canonical

COUNTED = ("config.json", "adapter_config.json", "generation_config.json", "tokenizer.json", "tokenizer.model",
           "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
           "*.jsonl", "*.parquet", "elements.json")
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
    parts = {file.name: _file_digest(file) for file in _files(folder) if file.suffix != ".safetensors"}
    fingerprint = hashlib.sha256(canonical(parts).encode()).hexdigest()
    if any(file.suffix == ".safetensors" for file in _files(folder)):
        checkpoint = Checkpoint(folder)
        fingerprint = checkpoint.fingerprint
        parts["weights"] = weights_digest(checkpoint)
    digest = combined(parts)
    if known is not None:
        with locked(known):
            entry = {"signature": signature, "fingerprint": fingerprint, "digest": digest}
            write_aside(known, canonical({**_remembered(known), key: entry}))
    return fingerprint, digest


def remember(folder: Path, known: Path, fingerprint: str, digest: str, *, files: Path) -> None:
    """Note the identity of a folder whose files still lie in `files`, to be renamed to `folder`."""
    with locked(known):
        entry = {"signature": _signature(files), "fingerprint": fingerprint, "digest": digest}
        write_aside(known, canonical({**_remembered(known), str(folder.resolve()): entry}))


def _files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    found = {file for pattern in (*COUNTED, "*.safetensors") for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in found if not file.name.startswith("."))


def _signature(folder: Path) -> list[list[Any]]:
    stats = [(file, file.stat()) for file in _files(folder)]
    return [[file.name, stat.st_size, stat.st_mtime_ns, stat.st_ino] for file, stat in stats]


def _remembered(known: Path | None) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(known.read_text()) if known else {}
    except (OSError, ValueError):
        return {}


def _file_digest(file: Path) -> str:
    data = file.read_bytes()
    if file.suffix == ".json":
        try:
            data = canonical(_without(json.loads(data))).encode()
        except ValueError:
            raise ZooError(f"{file} is not JSON", fix="download or write it again") from None
    return xxhash.xxh3_128(data).hexdigest()


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(item) for key, item in value.items() if key not in UNCOUNTED_KEYS}
    return [_without(item) for item in value] if isinstance(value, list) else value
