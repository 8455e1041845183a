"""Records out of files that others have written: JSON lines, JSON, Parquet, and what `datasets` saves to a folder.

Nothing of such a file is trusted: no code and no pickle is read from it, sizes are bounded, and whatever is wrong with
a record is told with its file and line; a row of Parquet or Arrow counts as a line.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import xxhash

from glue.errors import Place, SuiteError, did_you_mean, one_line

Kind = Literal["jsonl", "json", "parquet", "arrow"]
KINDS: Mapping[str, Kind] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
STATE, SPLITS = "state.json", "dataset_dict.json"  # in a folder that `datasets` has saved: of one split, of several
EVERY = "all"  # in place of the name of a split: all files of a folder
PART = re.compile(r"[-_.]?\d{5}-of-\d{5}.*")  # what the name of one of several files ends with
LARGEST, JSON_LARGEST, LINE_LARGEST = 8 << 30, 200_000_000, 16 << 20  # bytes: of all files, of one of JSON, of a line
FILES, ROWS, BLOCK = 10_000, 1024, 1 << 20  # files of a dataset; rows and bytes that are read at once


class Record(NamedTuple):
    """One record with its place, or what is wrong with it."""

    place: Place
    value: Any = None
    wrong: SuiteError | None = None


@dataclass(frozen=True)
class Files:
    """Files of one kind that make a dataset, in the order in which they are read."""

    kind: Kind
    files: tuple[Path, ...]

    def digest(self) -> str:
        """xxh3_128 over the bytes of all files, whatever they are called."""
        stats = [(str(file), file.stat()) for file in self.files]
        return _digest(tuple((file, stat.st_size, stat.st_mtime_ns, stat.st_ino) for file, stat in stats))

    def records(self) -> Iterator[Record]:
        """Every record; where the rest of a file cannot be read, the last that comes from it says so."""
        read = {"jsonl": _lines, "json": _list, "parquet": _parquet, "arrow": _arrow}[self.kind]
        for file in self.files:
            yield from read(file)


def files_of(path: Path, split: str | None = None) -> Files:
    """The files of a dataset: a file, a folder of files of one kind, or a folder that `datasets` has saved.

    split  which of the splits that a folder holds; "all" for every file. Raises SuiteError where that is not clear.
    """
    if not path.exists():
        raise SuiteError(f"there is no file or folder {path}", fix="paths are seen from the recipe's folder")
    if path.is_file():
        if split is not None:
            raise SuiteError(f"{path} is one file, which has no split '{one_line(split)}'", fix="leave split out")
        return _checked(path, [path])
    if (path / SPLITS).is_file():
        there = sorted(place.name for place in path.iterdir() if (place / STATE).is_file())
        return files_of(path / _one(path, split, there))
    if (path / STATE).is_file():
        return _saved(path)
    found = sorted(Path(place) / name for place, folders, names in os.walk(path) if not _hides(folders)
                   for name in names if not name.startswith(".") and Path(name).suffix in KINDS)
    found = [file for file in found if file.name not in ("dataset_infos.json", "dataset_info.json")]
    if not found:
        raise SuiteError(f"{path} holds no file that ends in {', '.join(KINDS)}",
                         fix="unpack it first, or name the right folder")
    named = {file: PART.sub("", file.stem) for file in found}
    if split != EVERY and (split is not None or len(set(named.values())) > 1):
        chosen = _one(path, split, sorted(set(named.values())))
        found = [file for file in found if named[file] == chosen]
    return _checked(path, found)


def _hides(folders: list[str]) -> bool:
    """Keep `os.walk` out of hidden folders."""
    folders[:] = sorted(name for name in folders if not name.startswith("."))
    return False


def _one(path: Path, split: str | None, there: list[str]) -> str:
    if split in there:
        return str(split)
    if split is None:
        listed = ", ".join(map(one_line, there[:12])) + (", ..." if len(there) > 12 else "")
        raise SuiteError(f"{path} holds {len(there)} splits: {listed}", fix=f"say which:  split: {one_line(there[0])}"
                         if there else "save it again")
    raise SuiteError(f"{path} has no split '{one_line(split)}'{did_you_mean(split, there)}")


def _saved(folder: Path) -> Files:
    """What `Dataset.save_to_disk` has left; its state names the files."""
    try:
        told = json.loads((folder / STATE).read_bytes()[:JSON_LARGEST])
        names = [str(one["filename"]) for one in told["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SuiteError(f"{folder / STATE} does not tell the files of a dataset", fix="save it again") from None
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise SuiteError(f"{folder / STATE} names '{one_line(name)}', which is no file beside it",
                             fix="save it again")
    return _bounded(folder, Files("arrow", tuple(folder / name for name in names)))


def _checked(path: Path, found: list[Path]) -> Files:
    kinds = {KINDS.get(file.suffix) for file in found}
    if None in kinds:
        raise SuiteError(f"{path} is of no kind that can be read", fix=f"give one that ends in {', '.join(KINDS)}")
    if len(kinds) > 1:
        raise SuiteError(f"{path} holds files of several kinds: {', '.join(sorted(map(str, kinds)))}",
                         fix="name one of the files, or a folder that holds only one kind")
    kind = kinds.pop()
    assert kind is not None
    return _bounded(path, Files(kind, tuple(found)))


def _bounded(path: Path, files: Files) -> Files:
    size = sum(file.stat().st_size for file in files.files)
    if len(files.files) > FILES or size > LARGEST:
        raise SuiteError(f"{path} holds {len(files.files):,} files of {size:,} bytes; a dataset has up to {FILES:,} "
                         f"files and {LARGEST:,} bytes", fix="take a part of it")
    for file in files.files if files.kind == "json" else ():
        if file.stat().st_size > JSON_LARGEST:
            raise SuiteError(f"{file} has more than {JSON_LARGEST:,} bytes, and JSON is read as a whole",
                             fix="write it as JSON lines, one record a line")
    return files


@lru_cache(maxsize=64)  # a plan is made again whenever a step of its run is done
def _digest(signature: tuple[tuple[str, int, int, int], ...]) -> str:
    total = xxhash.xxh3_128()
    for file, size, _, _ in signature:
        total.update(size.to_bytes(8, "little"))
        with open(file, "rb") as stream:
            while block := stream.read(BLOCK):
                total.update(block)
    return total.hexdigest()


# -- one reader for each kind --


def _lines(file: Path) -> Iterator[Record]:
    with open(file, "rb") as stream:
        number = 0
        while line := stream.readline(LINE_LARGEST + 1):
            number += 1
            place = Place(str(file), number, 1)
            if len(line) > LINE_LARGEST:
                yield Record(place, wrong=SuiteError(f"this line has more than {LINE_LARGEST:,} bytes",
                                                     fix="cut its record into several"))
                return
            if line.strip():
                yield _read(line if number > 1 else line.removeprefix(b"\xef\xbb\xbf"), place)


def _read(line: bytes, place: Place) -> Record:
    try:
        return Record(place, json.loads(line.decode()))
    except UnicodeDecodeError as problem:
        return Record(place, wrong=_no_text(problem))
    except (ValueError, RecursionError) as problem:
        return Record(place, wrong=_no_json(problem))


def _no_text(problem: UnicodeDecodeError) -> SuiteError:
    return SuiteError(f"byte {problem.start + 1} of this line is no UTF-8", fix="save the file in UTF-8")


def _no_json(problem: Exception) -> SuiteError:
    told = "it is nested too deeply" if isinstance(problem, RecursionError) else one_line(str(problem), 80)
    return SuiteError(f"this is not JSON: {told}", fix="repair it, or take it out")


def _list(file: Path) -> Iterator[Record]:
    """The records of one JSON list, each read by itself so that its line is known."""
    data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        start = data.rfind(b"\n", 0, problem.start) + 1
        yield Record(Place(str(file), line, problem.start - start + 1), wrong=_no_text(UnicodeDecodeError(
            "utf-8", data[start:problem.end], problem.start - start, problem.end - start, problem.reason)))
        return
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    at, line, counted = _after(space, text, 0), 1, 0

    def place() -> Place:
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, at), at
        return Place(str(file), line, at - text.rfind("\n", 0, at))

    if text[at:at + 1] != "[":
        yield Record(place(), wrong=SuiteError("a file of JSON is one list of records",
                                               fix="write it as a list, or as JSON lines (.jsonl)"))
        return
    at = _after(space, text, at + 1)
    while text[at:at + 1] != "]":
        here = place()
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as problem:
            yield Record(here, wrong=_no_json(problem))
            return
        yield Record(here, value)
        at = _after(space, text, at)
        if text[at:at + 1] == ",":
            at = _after(space, text, at + 1)
        elif text[at:at + 1] != "]":
            yield Record(place(), wrong=SuiteError("the list of records is broken off here", fix="write it again"))
            return


def _after(space: re.Pattern[str], text: str, at: int) -> int:
    found = space.match(text, at)
    assert found is not None
    return found.end()


def _parquet(file: Path) -> Iterator[Record]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        with parquet.ParquetFile(file) as opened:
            size = sum(opened.metadata.row_group(k).total_byte_size for k in range(opened.metadata.num_row_groups))
            if size > LARGEST:
                raise OSError(f"unpacked it would have {size:,} bytes, and may have {LARGEST:,}")
            yield from _rows(file, opened.iter_batches(ROWS))
    except (ArrowException, OSError, ValueError) as problem:  # ArrowInvalid is a ValueError too
        yield _damaged(file, problem)


def _arrow(file: Path) -> Iterator[Record]:
    import pyarrow

    try:
        with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as opened:
            yield from _rows(file, opened)
    except (pyarrow.ArrowException, OSError, ValueError) as problem:
        yield _damaged(file, problem)


def _rows(file: Path, batches: Any) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for value in batch.to_pylist():
            number += 1
            yield Record(Place(str(file), number, 1), value)


def _damaged(file: Path, problem: Exception) -> Record:
    return Record(Place(str(file), 1, 1), wrong=SuiteError(f"the file cannot be read: {one_line(str(problem), 120)}",
                                                           fix="write or download it again"))
