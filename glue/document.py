"""Documents: YAML read strictly, as YAML 1.2 means it, with the place of every key.

`1e-3` is a number and `no` is a word; a key that stands twice, a tag such as !!python, a merge key `<<`, an alias
that loops or grows without end are errors. What is read is plain data: mappings, lists, words, numbers, true, false
and null.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from glue.errors import GlueError, Place, one_line

SIZE_LIMIT, NODE_LIMIT = 2_000_000, 100_000  # bytes; nodes after aliases are expanded
_CORE = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {"null": None, "Null": None, "NULL": None, "~": None, "": None, "true": True, "True": True, "TRUE": True,
          "false": False, "False": False, "FALSE": False,
          **{word: float("nan") for word in (".nan", ".NaN", ".NAN")},
          **{sign + word: float(f"{sign}inf") for sign in ("", "+", "-") for word in (".inf", ".Inf", ".INF")}}
_TAGGED = re.compile(r"(&\S+\s+)?!")  # how a value begins whose tag is written out
Path_ = tuple[str | int, ...]


class Document:
    """One YAML document: `value` is its data, `place(*path)` says where a key stands, `text` is what was read."""

    def __init__(self, value: Any, file: str, places: dict[Path_, Place], text: str = ""):
        self.value, self.file, self._places, self.text = value, file, places, text

    def place(self, *path: str | int) -> Place:
        """The place of the key at `path`, or of the nearest one above it that is written down."""
        while path and path not in self._places:
            path = path[:-1]
        return self._places.get(path, Place(self.file, 1, 1))


def read(file: Path, error: type[GlueError], shown: str | None = None) -> Document:
    """Read `file`; every mistake is an `error` that names file:line:column."""
    name = one_line(shown or str(file))
    return parse(_text(file, name, error), name, error)


def read_all(file: Path, error: type[GlueError]) -> list[Document]:
    """Read a file of one or several documents, parted by `---`; empty ones are left out."""
    name = one_line(str(file))
    return parse_all(_text(file, name, error), name, error)


def _text(file: Path, name: str, error: type[GlueError]) -> str:
    try:
        if file.is_dir():
            raise error(f"{name} is a folder; a YAML file is needed")
        if not file.is_file():
            raise error(f"there is no file {name}")
        data = file.read_bytes() if file.stat().st_size <= SIZE_LIMIT else b""
    except (OSError, ValueError) as problem:
        raise error(f"{name} cannot be read: {problem}") from None
    if not data and file.stat().st_size:
        raise error(f"{name} is larger than {SIZE_LIMIT:,} bytes, too large to be written by hand")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        column = problem.start - data.rfind(b"\n", 0, problem.start)
        raise error(f"this is not UTF-8 text (byte 0x{data[problem.start]:02x})", place=Place(name, line, column),
                    fix="save the file as UTF-8") from None


def parse(text: str, name: str, error: type[GlueError]) -> Document:
    """Read YAML from a string; `name` stands for the file in errors."""
    node, = _composed(text, name, error, lambda: [yaml.compose(text, Loader=yaml.BaseLoader)])
    return _document(node, name, error, text)


def parse_all(text: str, name: str, error: type[GlueError]) -> list[Document]:
    """Read one or several YAML documents from a string; empty ones are left out."""
    nodes = _composed(text, name, error, lambda: list(yaml.compose_all(text, Loader=yaml.BaseLoader)))
    own = (text if len(nodes) == 1 else text[node.start_mark.index:node.end_mark.index] for node in nodes)
    found = [_document(node, name, error, part) for node, part in zip(nodes, own, strict=True)]
    return [document for document in found if document.value is not None]


def _composed(text: str, name: str, error: type[GlueError], compose: Callable[[], list[Any]]) -> list[Any]:
    try:
        return compose()
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        place = Place(name, mark.line + 1, mark.column + 1) if mark else Place(name, 1, 1)
        why = ", ".join(filter(None, (problem.context, problem.problem)))
        raise error(f"this is not YAML: {one_line(why)}", place=place,
                    fix="look for a missing colon, bracket or quote, or a tab, on this line or before") from None
    except yaml.reader.ReaderError as problem:
        before = text[:problem.position]
        place = Place(name, before.count("\n") + 1, len(before) - before.rfind("\n"))
        raise error(f"this is not YAML: the character #x{problem.character:04x} may not stand here", place=place,
                    fix="remove it") from None
    except (yaml.YAMLError, ValueError, RecursionError) as problem:
        raise error(f"this is not YAML: {str(problem).splitlines()[0]}", place=Place(name, 1, 1)) from None


def _document(node: yaml.Node | None, name: str, error: type[GlueError], text: str) -> Document:
    reader = _Reader(name, error)
    value = reader.plain(node, (), ()) if node is not None else None
    return Document(value, name, reader.places, text)


class _Reader:
    def __init__(self, name: str, error: type[GlueError]):
        self.name, self.error, self.nodes = name, error, 0
        self.places: dict[Path_, Place] = {}

    def place(self, node: yaml.Node) -> Place:
        return Place(self.name, node.start_mark.line + 1, node.start_mark.column + 1)

    def plain(self, node: yaml.Node, path: Path_, above: tuple[int, ...]) -> Any:
        self.nodes += 1
        if id(node) in above or self.nodes > NODE_LIMIT or len(above) > 50:
            raise self.error("aliases or brackets here loop or grow without end", place=self.place(node),
                             fix="write the value out")
        self.places.setdefault(path, self.place(node))
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            self._tag(node, "map")
            return self._mapping(node, path, above)
        if isinstance(node, yaml.SequenceNode):
            self._tag(node, "seq")
            return [self.plain(item, (*path, k), above) for k, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path_, above: tuple[int, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.error("a key must be a single word", place=self.place(key))
            self._tag(key, "str")
            if key.value in found:
                raise self.error(f"'{one_line(key.value)}' stands twice", place=self.place(key),
                                 fix="keep one of the two")
            if key.value == "<<" and key.style is None:
                raise self.error("a merge key '<<' is not read: YAML 1.2 has none", place=self.place(key),
                                 fix="write the keys out; an alias may stand for a whole value")
            self.places[(*path, key.value)] = self.place(key)
            found[key.value] = self.plain(value, (*path, key.value), above)
        return found

    def _tag(self, node: yaml.Node, expected: str) -> None:
        written = node.start_mark.buffer is not None and _TAGGED.match(node.start_mark.buffer, node.start_mark.pointer)
        if written and not getattr(node, "style", None) or node.tag != _CORE + expected:
            shown = one_line(node.tag.replace(_CORE, "!!"))
            raise self.error(f"the tag {shown} is not allowed; only plain data is read", place=self.place(node),
                             fix="remove the tag; quotes make a word of a number")

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        self._tag(node, "str")
        text = node.value
        if node.style is not None:
            return text
        if text in _WORDS:
            return _WORDS[text]
        try:
            if _INT.fullmatch(text):
                return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
            return float(text) if _FLOAT.fullmatch(text) else text
        except ValueError:
            raise self.error(f"a number of {len(text)} digits is too long", place=self.place(node)) from None
