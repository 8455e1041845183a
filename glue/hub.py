"""The Hugging Face hub as a place where members are: found in the local cache; sent where asked to.

What is not in the cache is fetched by `glue/download.py`, and only where somebody asks for that.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from glue.errors import NotHere, RunError, ZooError, one_line

_WORD = r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?"
_REVISION = r"(@[A-Za-z0-9][A-Za-z0-9._/-]*)?"
HUB = re.compile(rf"hub:{_WORD}(/{_WORD})?{_REVISION}")
_DATA = re.compile(rf"hub:{_WORD}(/{_WORD}(/[A-Za-z0-9_][A-Za-z0-9._ -]*)*)?{_REVISION}")
_FIX = "write hub:owner/name or hub:owner/name@revision"
_DATA_FIX = "write hub:owner/name, hub:owner/name/folder, and @revision after it where it shall not be the newest"
COMMIT = re.compile(r"[0-9a-f]{40}")
_STALE = re.compile(r"(experts/[^/]+/)?[^/]+\.safetensors(\.index\.json)?")  # weights, not to be mixed with ours
Repository = Literal["model", "dataset"]
REFUSED = {401: ("the hub does not know this token, or there is none", "hf auth login , or set HF_TOKEN"),
           403: ("this token may not write there", "take a token that may write, of an account that owns it"),
           404: ("there is no such repository for this token", "check owner and name, and whose token it is")}


@dataclass(frozen=True)
class Address:
    """What a hub path says.

    revision  a branch, a tag or a commit; nothing: the branch main
    inner     of a dataset, the folder or file in it that is meant; nothing: all of it
    """

    name: str
    revision: str = ""
    kind: Repository = "model"
    inner: str = ""

    def __str__(self) -> str:
        return f"{self.name}{f'@{self.revision}' if self.revision else ''}"

    @property
    def path(self) -> str:
        """As members and recipes write it."""
        return f"hub:{'/'.join(filter(None, (self.name, self.inner)))}{f'@{self.revision}' if self.revision else ''}"

    @property
    def command(self) -> str:
        """How the hub's own command gets all of it."""
        return (f"hf download {self.name}" + (f" --revision {self.revision}" if self.revision else "")
                + (" --repo-type dataset" if self.kind == "dataset" else ""))

    @property
    def ours(self) -> str:
        """How glue gets what it needs of it."""
        return f"glue zoo fetch {self.path}" + (" --kind dataset" if self.kind == "dataset" else "")

    @property
    def page(self) -> str:
        """Where people read of it."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    @property
    def moves(self) -> bool:
        """Whether what it means may change: it names no commit."""
        return not COMMIT.fullmatch(self.revision)

    @property
    def storage(self) -> Path:
        """Its folder in the cache: blobs, refs, snapshots."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE).expanduser() / f"{self.kind}s--{self.name.replace('/', '--')}"

    @property
    def commit(self) -> str:
        """The commit that it means on this machine; nothing where none was fetched."""
        if not self.moves:
            return self.revision
        try:
            told = (self.storage / "refs" / (self.revision or "main")).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return ""
        return told if COMMIT.fullmatch(told) else ""


@dataclass(frozen=True)
class Said:
    """What the hub will read in a card: its licence, and what it says it was made of."""

    licence: str
    base_model: tuple[str, ...]
    results: int


@dataclass(frozen=True)
class Commit:
    """What was made on the hub.

    removed  weights of an earlier push, which would have lain beside the new ones; git still has them
    """

    url: str
    removed: tuple[str, ...]


def well_formed(path: str, kind: str = "model") -> None:
    """Raise ZooError for what can be no member's path, on this machine or any other; kind: of the member."""
    data = kind == "dataset"
    if path.startswith("hub:") and (not (_DATA if data else HUB).fullmatch(path) or ".." in path):
        raise ZooError(f"'{one_line(path)}' is no hub path", fix=_DATA_FIX if data else _FIX)
    if not path or "\0" in path:
        raise ZooError(f"'{one_line(path)}' is no path", fix="write a folder, or hub:owner/name@revision")


def address(path: str, kind: str = "model") -> Address:
    """What a hub path means for a member of this kind: datasets have repositories of their own. Raises ZooError."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    well_formed(path, kind)
    whose, _, revision = path.removeprefix("hub:").partition("@")
    parts = whose.split("/")
    name = "/".join(parts[:2])
    try:
        validate_repo_id(name)
    except HFValidationError as problem:
        raise ZooError(f"'{path}' is no hub path: {one_line(str(problem))}", fix=_FIX) from None
    return Address(name, revision, "dataset" if kind == "dataset" else "model", "/".join(parts[2:]))


def locate(path: str, kind: str = "model") -> Path:
    """The local folder of a member's path: a folder as it is, or `hub:owner/name[@revision]` in the cache of the hub.

    kind  of the member: a dataset is in a repository of datasets, and may be `hub:owner/name/folder`
    Whether all of it is there, `snapshot.whole` says. Raises ZooError that says how to get what is missing.
    """
    well_formed(path, kind)
    if not path.startswith("hub:"):
        folder = Path(path)
        if not folder.exists():
            raise ZooError(f"{one_line(path)} does not exist", fix="put the member there, or correct its path")
        return folder
    found = address(path, kind)
    folder = found.storage / "snapshots" / found.commit
    if not found.commit or not folder.is_dir():
        raise NotHere(str(found), found.command, ours=found.ours)
    if not (folder / found.inner).exists():
        raise NotHere(str(found), found.ours, part=found.inner)
    return folder / found.inner


def repository(name: str) -> None:
    """Raise ZooError for what can be no repository on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as problem:
        raise ZooError(f"'{one_line(name)}' is no repository: {one_line(str(problem))}",
                       fix="write owner/name") from None
    if "/" not in name:
        raise ZooError(f"'{name}' does not say whose repository it is", fix=f"write owner/{name}")


def read_card(text: str, kind: Repository) -> Said:
    """What the hub reads in a card, by its own parser, without asking it. Raises ZooError for what it cannot take."""
    from huggingface_hub import DatasetCard, ModelCard

    try:
        data: Any = (DatasetCard if kind == "dataset" else ModelCard)(text).data
        told = data.to_dict()
        if not told:
            raise ValueError("it has no front matter")
        words = {key: [told[key]] if isinstance(told[key], str) else told[key]
                 for key in ("license", "base_model", "tags") if key in told}
        for key, value in words.items():
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                raise ValueError(f"'{key}' is neither a word nor a list of words")
        bases, licence = tuple(words.get("base_model", ())), ", ".join(words.get("license", ()))
        if licence == "other" and not told.get("license_name"):
            raise ValueError("'license: other' needs a 'license_name' beside it")
        for one in bases:
            if not HUB.fullmatch(f"hub:{one}"):
                raise ValueError(f"base_model '{one_line(one)}' can be no id of the hub")
    except Exception as problem:  # of the parsers of YAML, of cards and of results, each has its own
        raise ZooError(f"the hub would not take this card: {one_line(str(problem))}",
                       fix="correct the front matter of README.md, between its two lines of ---") from None
    return Said(licence, bases, len(getattr(data, "eval_results", None) or ()))


def upload(name: str, files: Mapping[str, Path | bytes], sums: Mapping[str, str], *, kind: Repository = "model",
           private: bool = False, revision: str = "", message: str = "Upload", quiet: bool = False) -> Commit:
    """Send files in one commit; the repository and the branch are made where they are not there.

    sums  sha256 of each file as it was checked: what was sent, and what the hub then has, are held against it
    Weights that lie there from an earlier push, and are none of these, go with the same commit. Raises RunError.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
    from huggingface_hub.utils import disable_progress_bars

    if constants.HF_HUB_OFFLINE:
        raise RunError("HF_HUB_OFFLINE is set, so nothing is sent", fix="unset it, or add --dry-run")
    if not get_token():
        raise RunError("there is no token for the hub", fix="hf auth login , or set HF_TOKEN; it must be able to write")
    if quiet:
        disable_progress_bars()
    api = HfApi(library_name="glue")
    with _told(name):
        api.create_repo(name, repo_type=kind, private=private or None, exist_ok=True)
        if private and not api.repo_info(name, repo_type=kind).private:
            raise RunError(f"{name} is there already and can be seen by everybody; nothing was sent",
                           fix="make it private on the hub first, or leave out --private")
        if revision:
            api.create_branch(name, branch=revision, repo_type=kind, exist_ok=True)
        there = api.list_repo_files(name, repo_type=kind, revision=revision or None)
        adds = [CommitOperationAdd(file, content) for file, content in sorted(files.items())]
        stale = tuple(file for file in sorted(there) if _STALE.fullmatch(file) and file not in files)
        done = api.create_commit(name, [*adds, *map(CommitOperationDelete, stale)], commit_message=message,
                                 repo_type=kind, revision=revision or None)
        wrong = [add.path_in_repo for add in adds if add.upload_info.sha256.hex() != sums[add.path_in_repo]]
        found = {one.path: one for one in api.get_paths_info(name, sorted(files), revision=done.oid, repo_type=kind)}
    wrong += [file for file, content in files.items() if not _same(found.get(file), content, sums[file])]
    if wrong:
        raise RunError(f"{done.commit_url} does not hold what was checked: {', '.join(sorted(set(wrong)))}",
                       fix="something wrote to these files meanwhile, or the way to the hub is bad; push again")
    return Commit(str(done.commit_url), stale)


def _same(there: Any, content: Path | bytes, sha256: str) -> bool:
    """Whether a file on the hub is this one: by sha256 where it lies in its large storage, else by git's own sum."""
    if there is None:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == sha256)
    data = content if isinstance(content, bytes) else content.read_bytes()
    return bool(there.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What goes wrong between here and the hub, as one RunError that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError as problem:
        code = problem.response.status_code
        why, fix = REFUSED.get(code, (f"the hub answered {code}", "try again later"))
        said = f" ({one_line(problem.server_message)})" if problem.server_message else ""
        raise RunError(f"{name} was not sent: {why}{said}", fix=fix) from None
    except (HTTPError, OSError, ValueError, RuntimeError) as problem:
        raise RunError(f"{name} was not sent: {one_line(str(problem) or type(problem).__name__)}",
                       fix="check the way to the hub, and push again; what is there is not sent twice") from None
