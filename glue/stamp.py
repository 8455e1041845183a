"""Stamps: the digest of all weights in the headers of files that another library has written."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

from glue.checkpoint import Checkpoint, weights_digest
from glue.writer import BLOCK, DIGEST, packed, unwritten


def stamp(checkpoint: Checkpoint) -> None:
    """Put the digest of all weights into the header of each file that lacks one.

    Such a file is written anew beside itself, its tensors byte for byte. Raises RunError where there is no room.
    """
    files = sorted({header.file for header in checkpoint.headers.values() if header.file})
    heads = {file: _head(file) for file in files}
    lacking = [file for file, (entries, _) in heads.items() if DIGEST not in entries.get("__metadata__", {})]
    digest = weights_digest(checkpoint) if lacking else ""
    for file in lacking:
        entries, at = heads[file]
        head = packed({"__metadata__": {**entries.pop("__metadata__", {}), DIGEST: digest}, **entries})
        draft = file.with_name(f".{file.name}.stamped")
        try:
            with open(file, "rb") as old, open(draft, "wb") as new:
                old.seek(at)
                new.write(head)
                shutil.copyfileobj(old, new, BLOCK)
                new.flush()
                os.fsync(new.fileno())
            os.replace(draft, file)
        except OSError as problem:
            draft.unlink(missing_ok=True)
            raise unwritten(file.parent, problem) from None


def _head(file: Path) -> tuple[dict[str, Any], int]:
    """What the header of a file says, and where its tensors begin."""
    with open(file, "rb") as stream:
        length, = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(length)), 8 + length
