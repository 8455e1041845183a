"""What a merge config says, as plain values: the models, which of their layers, and the settings of the method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from glue.checkpoint import Weights
from glue.document import Document
from glue.errors import Place, RecipeError

Loc = tuple[str | int, ...]  # the path of keys to where something stands in the document
Settings = Mapping[str, Any]  # a word to a value, a gradient, or rules; see settings.py


@dataclass(frozen=True)
class ModelRef:
    """A model as a config names it: a folder or a repository, and an adapter on top of it.

    architecture  the class of model to take it for, instead of what its own config says
    """

    path: str
    revision: str = ""
    lora: str = ""
    lora_revision: str = ""
    architecture: str = ""

    @staticmethod
    def parse(text: str) -> ModelRef:
        """`path@revision+lora@revision`, where all but the path may be left out. Raises RecipeError."""
        parts = [half.split("@") for half in text.split("+")]
        if len(parts) > 2 or any(len(part) > 2 for part in parts):
            raise RecipeError(f"'{text}' does not name a model", fix="write  path@revision+lora@revision; all but "
                              "the path may be left out, and '@' and '+' may stand once each")
        if not all(word for part in parts for word in part):
            raise RecipeError(f"'{text}' does not name a model: a part of it is empty",
                              fix="write  path, path@revision or path+lora")
        return ModelRef(*[word for part in parts for word in (*part, "")[:2]])

    def __str__(self) -> str:
        def spelled(path: str, revision: str) -> str:
            return f"{path}@{revision}" if revision else path

        whole = spelled(self.path, self.revision)
        return f"{whole}+{spelled(self.lora, self.lora_revision)}" if self.lora else whole


@dataclass(frozen=True)
class Model:
    """A model of a config, opened: its weights, and its config.json."""

    ref: ModelRef
    name: str
    weights: Weights
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """A model that takes part in a slice, with its own settings.

    layers  from the first to the one behind the last; None for all that the model has
    """

    model: ModelRef
    layers: tuple[int, int] | None
    settings: Settings
    loc: Loc


@dataclass(frozen=True)
class Slice:
    """Some layers of the result, made of as many layers of each source."""

    sources: tuple[Source, ...]
    base: ModelRef | None = None
    settings: Settings = field(default_factory=dict)
    loc: Loc = ()


@dataclass(frozen=True)
class Module:
    """A part of a model, such as its text decoder: slices one after the other, or whole models."""

    models: tuple[Source, ...] = ()
    slices: tuple[Slice, ...] = ()
    settings: Settings = field(default_factory=dict)
    loc: Loc = ()


@dataclass(frozen=True)
class Tokenizer:
    """Which tokens the result has.

    source  "union", "base" or a model
    tokens  a token to where its embedding comes from, as it was written
    """

    source: str | ModelRef
    tokens: Mapping[str, Any] | None = None
    pad_to_multiple_of: int | None = None
    loc: Loc = ()


@dataclass(frozen=True)
class Config:
    """One merge, as a document of a config file says it: exactly one of models, slices and modules is not empty.

    name      what later documents of the file call its result, or ""
    document  for the places of what is said, and the text
    notes     what was accepted and means nothing here
    """

    name: str
    document: Document = field(repr=False, compare=False)
    merge_method: str
    base_model: ModelRef | None = None
    dtype: str = ""
    out_dtype: str = ""
    models: tuple[Source, ...] = ()
    slices: tuple[Slice, ...] = ()
    modules: Mapping[str, Module] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    chat_template: str = ""
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What was read, for the record."""
        return self.document.text

    @property
    def file(self) -> str:
        """The file it stands in."""
        return self.document.file

    def place(self, *loc: str | int) -> Place:
        """Where in the file a path of keys stands."""
        return self.document.place(*loc)

    def groups(self) -> Iterator[tuple[tuple[Source, ...], Slice | None, Module | None]]:
        """Every set of sources that is merged, with the slice and the module that it stands in."""
        if self.models:
            yield self.models, None, None
        for each in self.slices:
            yield each.sources, each, None
        for module in self.modules.values():
            if module.models:
                yield module.models, None, module
            for each in module.slices:
                yield each.sources, each, module

    def referenced(self) -> list[ModelRef]:
        """Every model that is needed, each once: the base first, then as they are written."""
        found = dict.fromkeys([self.base_model] if self.base_model else [])
        for sources, piece, _ in self.groups():
            found |= dict.fromkeys([piece.base] if piece and piece.base else [])
            found |= dict.fromkeys(source.model for source in sources)
        if self.tokenizer and isinstance(self.tokenizer.source, ModelRef):
            found.setdefault(self.tokenizer.source)
        return list(found)
