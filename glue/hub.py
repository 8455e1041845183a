"""The Hugging Face hub as a place where members are: found in the local cache, never fetched from here."""

from __future__ import annotations

import re
from pathlib import Path

from glue.errors import NotHere, ZooError, one_line

_WORD = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
HUB = re.compile(rf"hub:{_WORD}(/{_WORD})?(@[A-Za-z0-9][A-Za-z0-9._/-]*)?")
_FIX = "write hub:owner/name or hub:owner/name@revision"


def well_formed(path: str) -> None:
    """Raise ZooError for what can be no member's path, on this machine or any other."""
    if path.startswith("hub:") and (not HUB.fullmatch(path) or ".." in path):
        raise ZooError(f"'{one_line(path)}' is no hub path", fix=_FIX)
    if not path or "\0" in path:
        raise ZooError(f"'{one_line(path)}' is no path", fix="write a folder, or hub:owner/name@revision")


def locate(path: str) -> Path:
    """The local folder of a member's path: a folder as it is, or `hub:owner/name[@revision]` in the cache of the hub.

    Raises ZooError that says how to get what is missing.
    """
    well_formed(path)
    if not path.startswith("hub:"):
        folder = Path(path)
        if not folder.exists():
            raise ZooError(f"{one_line(path)} does not exist", fix="put the member there, or correct its path")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, _, revision = path.removeprefix("hub:").partition("@")
    option = f" --revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except LocalEntryNotFoundError:
        raise NotHere(f"{name}{'@' + revision if revision else ''}", f"hf download {name}{option}") from None
    except HFValidationError as problem:
        raise ZooError(f"'{path}' is no hub path: {one_line(str(problem))}", fix=_FIX) from None
