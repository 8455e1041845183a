"""Downloads: what a repository on the hub holds, and its files brought into the cache.

The library of the hub begins a file again when its process has ended. Here large files go into `<blob>.incomplete`,
under the lock that the library has for that blob, so a download that was killed goes on at the byte where it was; what
arrives is held against the sha256 that the hub tells, and only then gets its name. A branch points to a commit when all
of it is here.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from io import BufferedWriter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from glue.errors import GlueError, RunError, Unreachable, one_line
from glue.files import write_aside
from glue.hub import Address
from glue.snapshot import blob_name, is_blob, refuse_strange

AT_ONCE = 4  # files that are brought side by side
TRIES = 2    # in a row without a byte, each of which the library tries five times
LISTED = 100_000_000  # bytes that an index may have
Report = Callable[[int], None]  # bytes that have come


@dataclass(frozen=True)
class File:
    """One file of a repository. blob: its name in the cache, which is its sha256, or git's sum of a small one."""

    name: str
    size: int
    blob: str

    @property
    def large(self) -> bool:
        """Whether it lies in the hub's large storage, where sums are sha256."""
        return len(self.blob) == 64


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one commit."""

    address: Address
    commit: str
    files: tuple[File, ...]

    @property
    def folder(self) -> Path:
        """Where this commit lies on this machine, or will lie."""
        return self.address.storage / "snapshots" / self.commit

    def blob(self, file: File) -> Path:
        """Where the bytes of a file are kept."""
        return self.address.storage / "blobs" / file.blob

    def here(self, file: File) -> bool:
        """Whether a file is on this machine, by its name and its length."""
        link = self.folder / file.name
        return link.is_file() and link.stat().st_size == file.size and blob_name(link) in (file.blob, "")

    def left(self, file: File) -> int:
        """Bytes of a file that have yet to come."""
        if self.here(file) or _complete(self.blob(file), file):
            return 0
        with suppress(OSError):
            return max(0, file.size - _draft(self.blob(file)).stat().st_size) if file.large else file.size
        return file.size


def offline() -> bool:
    """Whether nothing may be fetched, since HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def cache_folder() -> Path:
    """Where everything from the hub lies: in HF_HOME, unless HF_HUB_CACHE says otherwise."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def listed(address: Address) -> Listing:
    """Every file that the hub has of a repository, at the commit that its revision means now. Raises RunError."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(library_name="glue")
    with _asked(address):
        about: Any = api.repo_info(address.name, repo_type=address.kind, revision=address.revision or None)
        if about.gated:  # its files are listed for everybody, and given to some
            api.auth_check(address.name, repo_type=address.kind)
        commit = str(about.sha)
        found = [one for one in api.list_repo_tree(address.name, recursive=True, revision=commit,
                                                   repo_type=address.kind) if isinstance(one, RepoFile)]
    refuse_strange((one.path for one in found), f"the hub's {address}")
    files = tuple(File(one.path, int(one.size), one.lfs.sha256 if one.lfs else one.blob_id) for one in found)
    for what, length in ((commit, 40), *((file.blob, (40, 64)[file.large]) for file in files)):
        if len(what) != length or set(what) - set("0123456789abcdef"):
            raise RunError(f"the hub tells '{one_line(what, 80)}' as a sum or commit of {address}, which is none",
                           fix="check HF_ENDPOINT")
    return Listing(address, commit, files)


@contextmanager
def small(listing: Listing, name: str) -> Iterator[Path]:
    """A folder that holds one small file of a repository: its place in the cache, or one that goes again."""
    file = next(one for one in listing.files if one.name == name)
    if listing.here(file):
        yield (listing.folder / name).parent
        return
    if file.size > LISTED:
        raise RunError(f"{listing.address}: {name} has {file.size:,} bytes, too many for what it is",
                       fix="do not trust this repository")
    with TemporaryDirectory(prefix="glue-") as place:
        with _asked(listing.address), _silent():
            found = _library(listing, name, cache_dir=place)
        yield Path(found).parent


def bring(listing: Listing, files: Sequence[File], report: Report = lambda count: None) -> None:
    """Bring files of a repository into the cache, several at a time, small ones first, so that what is here of a
    commit tells what it lacks; then let its branch point to the commit.

    report  called from any thread with bytes that have come
    Raises RunError for the first file that does not come; what has come of the others stays and is not sent again.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(AT_ONCE) as threads, _silent():
        for some in ([one for one in files if not one.large], [one for one in files if one.large]):
            waiting = [threads.submit(_bring, listing, one, report, stop) for one in some]
            try:
                for each in wait(waiting, return_when=FIRST_EXCEPTION).done:
                    each.result()
            except BaseException:
                stop.set()
                for each in waiting:
                    each.cancel()
                raise
    address = listing.address
    if address.moves:
        ref = address.storage / "refs" / (address.revision or "main")
        with _asked(address):
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_aside(ref, listing.commit)


class _Stopped(Exception):
    """Another file could not be brought, or somebody has pressed Ctrl-C."""


def _bring(listing: Listing, file: File, report: Report, stop: threading.Event) -> None:
    from huggingface_hub import constants

    address, link = listing.address, listing.folder / file.name
    if listing.here(file) or stop.is_set():
        return
    before = listing.left(file)
    with _asked(address):
        ours = file.large and file.size <= constants.MAX_HTTP_DOWNLOAD_SIZE  # the hub sends no more over plain HTTP
        if ours:
            _stream(listing, file, report, stop)
        blob = listing.blob(file)
        if not listing.here(file):  # else another process has linked it meanwhile
            link.unlink(missing_ok=True)  # to a blob that is not there, or cut short, which the library would take
            if blob.exists() and not _complete(blob, file):
                blob.unlink()
            _library(listing, file.name)  # all of a small file, only the link to a large one
        if not listing.here(file) or not ours and not is_blob(link, file.blob):
            link.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)
            raise _damaged(listing, file)
    if not ours:
        report(before)


def _library(listing: Listing, name: str, **more: Any) -> str:
    """What the library of the hub does for one file; the path of it."""
    from huggingface_hub import hf_hub_download

    return hf_hub_download(listing.address.name, name, repo_type=listing.address.kind, revision=listing.commit,
                           library_name="glue", **more)


def _stream(listing: Listing, file: File, report: Report, stop: threading.Event) -> None:
    """Bring the rest of a large file into its draft, and give that its name when its sum is right."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.file_download import http_get

    blob = listing.blob(file)
    blob.parent.mkdir(parents=True, exist_ok=True)
    draft, tries = _draft(blob), 0
    with _lock(listing, file, stop):
        while not _complete(blob, file):
            with open(draft, "ab") as stream:
                if stream.tell() > file.size:
                    stream.truncate(0)
                before = done = stream.seek(0, os.SEEK_END)
                try:
                    if done < file.size:
                        url, headers = _source(listing, file)
                        http_get(url, _Counted(stream, report, stop), resume_size=done,  # type: ignore[arg-type]
                                 headers=headers, expected_size=file.size)
                    stream.flush()
                    os.fsync(stream.fileno())
                except (HTTPError, OSError) as problem:
                    stream.flush()
                    done = stream.tell()
                    if isinstance(problem, OSError) and problem.errno is not None:
                        raise  # of this machine: no room, no right to write
                    tries = 0 if done > before else tries + 1
                    code = problem.response.status_code if isinstance(problem, HfHubHTTPError) else 0
                    # with something sent since, an address that was signed for an hour may have run out
                    if tries and (tries > TRIES or code and code != 429 and code < 500):
                        raise
                    time.sleep(tries)
                    continue
            if not is_blob(draft, file.blob):
                draft.unlink()
                raise _damaged(listing, file)
            os.replace(draft, blob)


def _damaged(listing: Listing, file: File) -> RunError:
    return RunError(f"{listing.address}: what came as {file.name} is not what the hub says that it has (by its sum)",
                    fix="it was thrown away; run the same command again")


def _draft(blob: Path) -> Path:
    return blob.with_name(f"{blob.name}.incomplete")


def _complete(blob: Path, file: File) -> bool:
    return blob.is_file() and blob.stat().st_size == file.size


@contextmanager
def _lock(listing: Listing, file: File, stop: threading.Event) -> Iterator[None]:
    """The lock that the library of the hub takes for a blob. Where a file system only pretends to lock, two may write
    one draft; then its sum is wrong, and it is fetched again."""
    from huggingface_hub.utils import WeakFileLock

    storage = listing.address.storage
    place = storage.parent / ".locks" / storage.name / f"{file.blob}.lock"
    place.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        while True:
            if stop.is_set():
                raise _Stopped
            with suppress(TimeoutError):  # another process brings this very file
                held.enter_context(WeakFileLock(place, timeout=1))
                break
        yield


class _Counted:
    """A file that tells how much is written to it, and takes nothing more once it is to stop."""

    def __init__(self, stream: BufferedWriter, report: Report, stop: threading.Event):
        self._stream, self._report, self._stop = stream, report, stop
        self.tell, self.seek = stream.tell, stream.seek

    def write(self, data: bytes) -> int:
        """Append."""
        if self._stop.is_set():
            raise _Stopped
        self._report(len(data))
        return self._stream.write(data)

    def truncate(self) -> int:
        """Cut off what stands after the place, as where the hub sends the whole file and not the rest of it."""
        end = self._stream.seek(0, os.SEEK_CUR)
        size = os.fstat(self._stream.fileno()).st_size
        self._report(end - size)
        return self._stream.truncate()


def _source(listing: Listing, file: File) -> tuple[str, dict[str, str]]:
    """(address, headers) of a file: where the hub says that it lies, without the token where that is not the hub."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(listing.address.name, file.name, repo_type=listing.address.kind, revision=listing.commit)
    headers = build_hf_headers(library_name="glue")
    place = get_hf_file_metadata(url, headers=dict(headers)).location
    if urlsplit(place).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)
    return place, {**headers, "Accept-Encoding": "identity"}  # ranges are of the bytes as they lie there


@contextmanager
def _silent() -> Iterator[None]:
    """Without the library's own bars: there is one line for everything."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _asked(address: Address) -> Iterator[None]:
    """What goes wrong between here and the hub, as one RunError that says what to do."""
    from huggingface_hub import constants, errors

    try:
        yield
    except GlueError:
        raise
    except errors.GatedRepoError:
        raise RunError(f"{address.name} is gated: whoever wants it accepts its terms first",
                       fix=f"open {address.page} , accept them there" + _login(" , then  {}")) from None
    except errors.RepositoryNotFoundError:
        other = "" if address.kind == "dataset" else "; of a dataset, add  --kind dataset"
        raise RunError(f"there is no {address.kind} {address.name} on the hub, or it is private",
                       fix=f"check owner and name{other}" + _login("; if it is private,  {}")) from None
    except errors.RevisionNotFoundError:
        raise RunError(f"{address.name} has no revision '{one_line(address.revision)}'",
                       fix=f"{address.page}/tree/main  lists its branches and tags") from None
    except errors.HfHubHTTPError as problem:
        code, said = problem.response.status_code, one_line(problem.server_message or "", 120)
        raise RunError(f"{address}: the hub answered {code}" + (f" ({said})" if said else ""),
                       fix={401: "the token is not known there:  hf auth login , or correct HF_TOKEN",
                            403: "take a token that may read it:  hf auth login"}.get(code, "try later")) from None
    except OSError as problem:
        if problem.errno in (ENOSPC, EDQUOT):
            raise RunError(f"there is no room left in {constants.HF_HUB_CACHE}",
                           fix="make room, or set HF_HOME to a folder on a larger disk, and run the same command "
                               "again: it goes on where it was") from None
        if problem.errno is not None and problem.filename:
            raise RunError(f"{problem.filename} cannot be written: {problem.strerror}",
                           fix="set HF_HOME to a folder that may be written to") from None
        raise _cut(address, problem) from None
    except (errors.HTTPError, ValueError, RuntimeError) as problem:
        raise _cut(address, problem) from None


def _cut(address: Address, problem: Exception) -> Unreachable:
    from huggingface_hub import constants

    said = one_line(str(problem).strip().partition("\n")[0] or type(problem).__name__, 160)
    return Unreachable(f"{address} could not be fetched from {constants.ENDPOINT}: {said}",
                       fix="check the network, HTTPS_PROXY and HF_ENDPOINT, and run the same command again: it goes on "
                           "where it was")


def _login(text: str) -> str:
    """How to say who one is, where nobody has said it."""
    from huggingface_hub import get_token

    return "" if get_token() else text.format("hf auth login")


