"""The grammar of a merge config: models, slices, modules and settings, with mistakes and notes gathered."""

from __future__ import annotations

from typing import Any

from glue.document import Document
from glue.errors import MethodError, RecipeError, did_you_mean, one_line
from glue.merge.mergekit.nouns import Loc, ModelRef, Module, Slice, Source
from glue.merge.mergekit.settings import ends, malformed
from glue.merge.mergekit.words import KNOWN, Dialect

# Words that stand at one level only, and where that is.
HOMES = {**dict.fromkeys(("merge_method", "base_model", "models", "slices", "modules", "dtype", "out_dtype",
                          "tokenizer", "tokenizer_source", "chat_template"), "the top level"),
         "layer_range": "each source of a slice", "sources": "each of 'slices'", "model": "each model"}


class Reading:
    """Reads one document; what is wrong goes to `mistakes`, what means nothing here to `notes`."""

    def __init__(self, document: Document, lenient: bool):
        self.document, self.lenient = document, lenient
        self.method: Dialect | None = None
        self.mistakes: list[RecipeError] = []
        self.notes: list[str] = []

    def wrong(self, loc: Any, what: str, fix: str = "") -> None:
        """One more mistake, at a path of keys."""
        self.mistakes.append(RecipeError(what, fix=fix, place=self.document.place(*loc)))

    def note(self, loc: Loc, what: str) -> None:
        """One more note, at a path of keys."""
        self.notes.append(f"{self.document.place(*loc)}: {what}")

    def known(self, value: dict[str, Any], loc: Loc, words: tuple[str, ...]) -> None:
        """Every key that is not one of `words` is a mistake, with the place where it belongs if it has one."""
        for word in value:
            if word in words:
                continue
            shown = one_line(word, 60)
            if self.lenient:
                self.note((*loc, word), f"'{shown}' is not known here and is left out")
            elif "parameters" in words and word in (*KNOWN, *(self.method.kinds if self.method else ())):
                self.wrong((*loc, word), f"'{shown}' is a parameter, and stands one level too shallow",
                           f"put it under  parameters:  here, as  parameters: {{{shown}: ...}}")
            elif word in HOMES:
                self.wrong((*loc, word), f"'{shown}' does not belong here", f"it belongs to {HOMES[word]}")
            else:
                self.wrong((*loc, word), f"there is no '{shown}' here{did_you_mean(word, words)}")

    def text(self, value: dict[str, Any], word: str, loc: Loc = ()) -> str:
        """A word's text, of a mapping at `loc`; nothing where it is absent."""
        found = value.get(word)
        if found is not None and not isinstance(found, str):
            self.wrong((*loc, word), f"'{word}' is text, and this is {_shown(found)}", "put it in quotes")
        return found if isinstance(found, str) else ""

    def model(self, value: Any, loc: Loc) -> ModelRef | None:
        """A model, as text or as the mapping that mergekit writes itself."""
        try:
            if isinstance(value, str):
                return ModelRef.parse(value)
            if isinstance(value, dict):
                self.known(value, loc, ("model", "lora", "override_architecture", "path", "revision"))
                inner = value if "path" in value else value.get("model")
                path, revision = self._path(inner, (*loc, "model"))
                lora = self._path(value["lora"], (*loc, "lora")) if value.get("lora") is not None else ("", "")
                return ModelRef(path, revision, *lora, self.text(value, "override_architecture", loc))
        except RecipeError as error:
            self.mistakes.append(error.at(self.document.place(*loc)))  # type: ignore[arg-type]
            return None
        self.wrong(loc, "a model is missing here" if value is None else f"a model is text, and this is {_shown(value)}",
                   "write  model: owner/name  or the path of a folder")
        return None

    def _path(self, value: Any, loc: Loc) -> tuple[str, str]:
        if isinstance(value, str):
            ref = ModelRef.parse(value)
            return ref.path, ref.revision
        if not isinstance(value, dict) or not isinstance(value.get("path"), str) or not value["path"]:
            raise RecipeError("a model has a path", fix="write  {path: owner/name, revision: main}")
        self.known(value, loc, ("path", "revision", "model", "lora", "override_architecture"))
        return value["path"], self.text(value, "revision", loc)

    def models(self, value: Any, loc: Loc, words: tuple[str, ...]) -> tuple[Source, ...]:
        """A list of models, each with its settings; with layers where `words` has them."""
        found = []
        for k, entry in enumerate(self._list(value, loc, "{model: ...}")):
            here = (*loc, k)
            if not isinstance(entry, dict):
                self.wrong(here, f"each of '{loc[-1]}' is a mapping, and this is {_shown(entry)}",
                           "write  - model: owner/name")
                continue
            self.known(entry, here, words)
            model = self.model(entry.get("model"), (*here, "model"))
            layers = self._layers(entry.get("layer_range"), (*here, "layer_range")) if "layer_range" in words else None
            settings = self.settings(entry, here, of_model=True)
            if model:
                found.append(Source(model, layers, settings, here))
        for k, source in enumerate(found):
            if source.model in [other.model for other in found[:k]]:
                self.wrong(source.loc, f"'{source.model}' is listed twice", "keep one of the two")
        return tuple(found)

    def slices(self, value: Any, loc: Loc) -> tuple[Slice, ...]:
        """A list of slices."""
        found = []
        for k, entry in enumerate(self._list(value, loc, "{sources: [...]}")):
            here = (*loc, k)
            if not isinstance(entry, dict):
                self.wrong(here, f"each of 'slices' is a mapping, and this is {_shown(entry)}",
                           "write  - sources: [{model: ..., layer_range: [0, 8]}]")
                continue
            self.known(entry, here, ("sources", "base_model", "parameters", "residual_weight"))
            if entry.get("residual_weight") is not None:
                self.note((*here, "residual_weight"), "'residual_weight' is read by nobody and is left out")
            base = entry.get("base_model")
            before = len(self.mistakes)
            sources = self.models(entry.get("sources"), (*here, "sources"), ("model", "layer_range", "parameters"))
            if entry.get("sources") is None:
                self.wrong(here, "a slice has 'sources'", "write  sources: [{model: ..., layer_range: [0, 8]}]")
            lengths = [source.layers[1] - source.layers[0] for source in sources if source.layers]
            if len(self.mistakes) == before and len(set(lengths)) > 1:
                odd = next(k for k, length in enumerate(lengths) if length != lengths[0])
                self.wrong((*sources[odd].loc, "layer_range"), f"the sources of a slice have as many layers each, and "
                           f"these have {', '.join(map(str, lengths))}", "give them layer ranges of one length")
            found.append(Slice(sources, self.model(base, (*here, "base_model")) if base is not None else None,
                               self.settings(entry, here), here))
        return tuple(found)

    def modules(self, value: Any) -> dict[str, Module]:
        """A mapping from the names of a model's modules."""
        if value is None:
            return {}
        if not isinstance(value, dict) or not value:
            self.wrong(("modules",), "'modules' is a mapping from the names of modules",
                       "write  modules: {text_decoder: {models: [...]}}")
            return {}
        found = {}
        for name, entry in value.items():
            here = ("modules", name)
            if not isinstance(entry, dict):
                self.wrong(here, f"the module '{one_line(name, 60)}' is a mapping", "write  {models: [...]}")
                continue
            self.known(entry, here, ("models", "slices", "parameters"))
            given = [word for word in ("models", "slices") if entry.get(word) is not None]
            if len(given) != 1:
                self.wrong(here, f"the module '{one_line(name, 60)}' has either 'models' or 'slices'",
                           "keep one of them" if given else "add one of them")
            found[name] = Module(self.models(entry.get("models"), (*here, "models"), ("model", "parameters")),
                                 self.slices(entry.get("slices"), (*here, "slices")), self.settings(entry, here), here)
        return found

    def settings(self, entry: dict[str, Any], loc: Loc, of_model: bool = False) -> dict[str, Any]:
        """The parameters at one level, checked value by value; the form that they are written in is kept."""
        given = entry.get("parameters")
        if given is None:
            return {}
        if not isinstance(given, dict):
            self.wrong((*loc, "parameters"), f"'parameters' is a mapping, and this is {_shown(given)}",
                       "write  parameters: {word: value}")
            return {}
        return {word: setting for word, setting in given.items()
                if self._setting(word, setting, (*loc, "parameters", word), of_model)}

    def _setting(self, word: str, setting: Any, loc: Loc, of_model: bool) -> bool:
        """Whether a setting counts: its word is read, and nothing is wrong with it."""
        if self.method is None:
            return False
        name = self.method.method.name
        if word not in self.method.kinds:
            if word in KNOWN:
                harmless = word in self.method.unread
                self.notes.append(f"'{word}' changes nothing under {name}" if harmless else f"{name} does not read "
                                  f"'{word}', which is a parameter of other methods; it is left out")
            elif self.lenient:
                self.note(loc, f"'{one_line(word, 60)}' is not known and is left out")
            elif word in HOMES:
                self.wrong(loc, f"'{word}' is no parameter", f"it belongs to {HOMES[word]}")
            else:
                self.wrong(loc, f"merge method '{name}' has no parameter '{one_line(word, 60)}'"
                           f"{did_you_mean(word, {*self.method.kinds, *self.method.unread})}")
            return False
        before = len(self.mistakes)
        for where, what in malformed(setting):
            self.wrong((*loc, *where), f"'{word}' {what}", "write a value, a list of values for the layers, or a list "
                       "of  {filter: ..., value: ...}")
        if len(self.mistakes) > before:
            return False
        for where, value in ends(setting):
            try:
                self.method.value(word, value)
            except MethodError as error:
                self.wrong((*loc, *where), error.what, error.fix)
        if of_model and word not in self.method.by_model:
            self.note(loc, f"'{word}' has one value for all models, so it is not read here; put it under the "
                      f"parameters of the slice or of the top level")
        return True

    def _layers(self, value: Any, loc: Loc) -> tuple[int, int] | None:
        whole = [int(number) if isinstance(number, str) and number.isdecimal() else number for number in value] \
            if isinstance(value, list) else []
        if len(whole) != 2 or any(type(number) is not int for number in whole):
            self.wrong(loc, "'layer_range' is missing" if value is None else
                       f"'layer_range' is two whole numbers, and this is {_shown(value)}", "write  layer_range: [0, 8]")
            return None
        if not 0 <= whole[0] < whole[1]:
            self.wrong(loc, f"'layer_range' goes from a layer to one behind the last, and {whole} holds none",
                       "write  layer_range: [first, last + 1], counted from 0")
            return None
        return whole[0], whole[1]

    def _list(self, value: Any, loc: Loc, entry: str) -> list[Any]:
        if value is not None and (not isinstance(value, list) or not value):
            self.wrong(loc, f"'{loc[-1]}' is a list of at least one, and this is {_shown(value)}",
                       f"write  {loc[-1]}: [{entry}, ...]")
            return []
        return value or []


def _shown(value: Any) -> str:
    return one_line("empty" if value in ([], {}, None) else repr(value), 60)
