"""The Hugging Face hub as a place where members are: found in the local cache, never fetched from here."""

from __future__ import annotations

from pathlib import Path

from glue.errors import ZooError


def locate(path: str) -> Path:
    """The local folder of a member's path: a folder as it is, or `hub:owner/name[@revision]` in the cache of the hub.

    Raises ZooError that says how to get what is missing.
    """
    if not path.startswith("hub:"):
        folder = Path(path)
        if not folder.exists():
            raise ZooError(f"{folder} does not exist", fix="put the member there, or correct its path in zoo.yaml")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, _, revision = path.removeprefix("hub:").partition("@")
    option = f" --revision {revision}" if revision else ""
    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except LocalEntryNotFoundError:
        raise ZooError(f"{name}{'@' + revision if revision else ''} is not on this machine",
                       fix=f"get it with  hf download {name}{option}") from None
    except HFValidationError as problem:
        raise ZooError(f"'{path}' is no hub path: {problem}", fix="write hub:owner/name or hub:owner/name@revision",
                       ) from None
