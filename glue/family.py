"""Families: the one plug-in pattern. A method is one function in one folder; its signature is its schema.

A family is a folder. Every module in it registers functions with `@family.add("name", source=..., **traits)`.
The first argument is what the method works on; the keyword-only arguments are its parameters, checked strictly by
pydantic, and the docs table and the JSON schema of recipes are made from them. Other packages add methods through
entry points of the group `glue.methods`, whose value names a module to import.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import json
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from glue.errors import MethodError, did_you_mean

T = TypeVar("T")
PER_MEMBER = "one value for all members, a list in their order, or a mapping from their names"
PerMember = Annotated[Union[T, list[T], dict[str, T]], PER_MEMBER]  # noqa: UP007 - subscripted with T below
Share = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]

_FAMILIES: dict[str, Family] = {}


@dataclass(frozen=True)
class Of:
    """Marks a parameter whose value is a choice from another family: `strategy: Annotated[Any, Of("searching")]`."""

    family: str


@dataclass(frozen=True)
class Method:
    """A registered function. `version` is raised by hand when its results change: it is part of every origin."""

    family: str
    name: str
    call: Callable
    source: str
    version: int
    traits: Mapping[str, Any]
    doc: str
    schema: type[BaseModel] = field(repr=False)

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameter name, as it is written in recipes, to pydantic field."""
        return {info.alias or name: info for name, info in self.schema.model_fields.items()}

    def bind(self, given: Mapping[str, Any] | None = None) -> Choice:
        """The method with its parameters settled: checked, nested choices bound, defaults spelled out.

        Raises MethodError; its `loc` is the path of keys to the word that is wrong.
        """
        try:
            model = self.schema.model_validate(dict(given or {}))
        except ValidationError as error:
            raise _worded(self, error, dict(given or {})) from None
        params = {info.alias or name: getattr(model, name) for name, info in self.schema.model_fields.items()}
        for name, info in self.parameters.items():
            for mark in marks(info):
                if isinstance(mark, Of) and params[name] is not None and not isinstance(params[name], Choice):
                    params[name] = families(mark.family).choose(params[name], loc=(name,))
        return Choice(self, params)


@dataclass(frozen=True)
class Choice:
    """A method with its parameters settled. Calling it runs it: `choice(first)`."""

    method: Method
    params: Mapping[str, Any]

    def __call__(self, first: Any, *more: Any, **replaced: Any) -> Any:
        given = {**self.params, **replaced}
        return self.method.call(first, *more, **{_python_name(name): value for name, value in given.items()})

    def spelled(self) -> dict[str, Any]:
        """Name, version and parameters as plain data: what an origin records and a worker is sent."""
        params = {name: value.spelled() if isinstance(value, Choice) else value for name, value in self.params.items()}
        return {"family": self.method.family, "name": self.method.name, "version": self.method.version,
                "params": params}

    def __reduce__(self):  # a worker process finds the function by its name
        return Choice.unspelled, (self.spelled(),)

    @staticmethod
    def unspelled(data: Mapping[str, Any]) -> Choice:
        """The choice that `spelled` wrote down."""
        params = {name: Choice.unspelled(value) if isinstance(value, dict) and set(value) == _SPELLED else value
                  for name, value in data["params"].items()}
        return families(data["family"])[data["name"]].bind(params)


_SPELLED = {"family", "name", "version", "params"}


class Family:
    """All methods of one noun, found in one folder on first use.

    noun    what a method of this family is called in errors and docs, as in "merge method"
    folder  the dotted package whose modules register methods
    first   what the first argument of a method is, for docs
    traits  the traits that a method may declare
    """

    def __init__(self, key: str, noun: str, folder: str, first: str, traits: tuple[str, ...] = ()):
        self.key, self.noun, self.folder, self.first, self.traits = key, noun, folder, first, traits
        self._methods: dict[str, Method] = {}
        self._loaded = False
        _FAMILIES[key] = self

    def add(self, name: str, *, source: str = "", version: int = 1, **traits: Any) -> Callable[[Callable], Callable]:
        """Register the decorated function under `name`."""
        def register(call: Callable) -> Callable:
            unknown = set(traits) - set(self.traits)
            assert not unknown, f"{self.noun} '{name}' declares unknown traits {unknown}; known: {self.traits}"
            taken = self._methods.get(name)
            assert taken is None or taken.call.__module__ == call.__module__, \
                f"{self.noun} '{name}' is registered by {taken and taken.call.__module__} and by {call.__module__}"
            doc = inspect.cleandoc(call.__doc__ or "")
            assert doc, f"{self.noun} '{name}' has no docstring"
            self._methods[name] = Method(self.key, name, call, source, version, dict(traits), doc, _schema(name, call))
            return call
        return register

    def load(self) -> Family:
        """Import every module of the folder, then the entry points; a module that fails is an error, not a gap."""
        if not self._loaded:
            package = importlib.import_module(self.folder)
            for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
                if not module.startswith("_"):
                    importlib.import_module(f"{self.folder}.{module}")
            self._loaded = True
            for point in sorted(importlib.metadata.entry_points(group="glue.methods"), key=lambda point: point.name):
                point.load()
        return self

    def __iter__(self) -> Iterator[Method]:
        return iter(sorted(self.load()._methods.values(), key=lambda method: method.name))

    def __getitem__(self, name: str) -> Method:
        methods = self.load()._methods
        if name not in methods:
            raise MethodError(f"there is no {self.noun} '{name}'{did_you_mean(name, methods)}")
        return methods[name]

    def choose(self, value: Any, loc: tuple[str | int, ...] = ()) -> Choice:
        """The choice a recipe spells: a bare word, or one word with its parameters.

        `ties` -> ties with its defaults;  `{ties: {density: 0.5}}` -> ties with density 0.5
        """
        if isinstance(value, str):
            value = {value: {}}
        if not isinstance(value, Mapping) or len(value) != 1:
            raise _at(MethodError(f"a {self.noun} is one word, or one word with its parameters; this is {_short(value)}",
                                  fix=f"write  name  or  {{name: {{parameter: value}}}}; "
                                      f"names: {', '.join(method.name for method in self)}"), loc)
        (name, params), = value.items()
        if params is not None and not isinstance(params, Mapping):
            raise _at(MethodError(f"the parameters of {self.noun} '{name}' are a mapping; this is {_short(params)}",
                                  fix=f"write  {{{name}: {{parameter: value}}}}"), (*loc, name))
        try:
            return self[name].bind(params)
        except MethodError as error:
            raise _at(error, (*loc, name)) from None


def families(key: str) -> Family:
    """The family called `key`; importing its module if it has not been imported yet."""
    if key not in _FAMILIES:
        importlib.import_module(HOMES[key])
    return _FAMILIES[key]


HOMES = {"merging": "glue.merge", "routing": "glue.mix", "searching": "glue.search", "teaching": "glue.skills",
         "kinds": "glue.kinds", "steps": "glue.steps"}


def _at(error: MethodError, loc: tuple[str | int, ...]) -> MethodError:
    error.loc = (*loc, *getattr(error, "loc", ()))  # type: ignore[attr-defined]
    return error


def _python_name(name: str) -> str:
    return f"{name}_" if name in _RESERVED else name


_RESERVED = {"lambda", "from"}


def _schema(name: str, call: Callable) -> type[BaseModel]:
    hints = get_type_hints(call, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            default = ... if parameter.default is parameter.empty else parameter.default
            alias = parameter.name.rstrip("_") if parameter.name.rstrip("_") in _RESERVED else None
            fields[parameter.name] = (hints[parameter.name], Field(default, alias=alias, validate_default=False))
    config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())
    return create_model(name, __config__=config, **fields)


def is_per_member(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> bool:
    """Whether a parameter takes a value for each member."""
    if PER_MEMBER in metadata:
        return True
    return get_origin(annotation) is Annotated and PER_MEMBER in get_args(annotation)


def _worded(method: Method, error: ValidationError, given: dict[str, Any]) -> MethodError:
    """The first thing pydantic found, in our words."""
    found = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    noun = families(method.family).noun
    loc = _path(given, found["loc"])
    word = str(loc[0]) if loc else ""
    if found["type"] == "extra_forbidden" and len(loc) == 1:
        return _at(MethodError(f"{noun} '{method.name}' has no parameter '{word}'"
                               f"{did_you_mean(word, method.parameters)}"), loc)
    if found["type"] == "missing" and len(loc) == 1:
        return MethodError(f"{noun} '{method.name}' needs the parameter '{word}'",
                           fix=f"add  {word}: ...  ({describe(method.parameters[word])})")
    about = describe(method.parameters[word]) if word in method.parameters else ""
    value = found.get("input")
    return _at(MethodError(f"{noun} '{method.name}': '{word}' cannot be {_short(value)}: "
                           f"{found['msg'][:1].lower()}{found['msg'][1:]}", fix=f"it is {about}" if about else ""), loc)


def _path(given: Any, loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The part of pydantic's path that names keys of what was written; it also names the branches of unions."""
    path: list[int | str] = []
    for part in loc:
        inside = part in given if isinstance(given, Mapping) else isinstance(given, list) and isinstance(part, int)
        if inside:
            given = given[part]
            path.append(part)
    return tuple(path)


def describe(info: Any) -> str:
    """One parameter in words: its type, its limits, its default."""
    limits = [f"{sign} {getattr(mark, key)}" for mark in marks(info)
              for key, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")) if hasattr(mark, key)]
    words = _type_words(info.annotation)
    text = words + (f" {' and '.join(dict.fromkeys(limits))}" if limits else "")
    if PER_MEMBER in info.metadata:
        text += " (one for all, or by member)"
    if not info.is_required() and info.default is not None:
        text += f", default {json.dumps(info.default) if not isinstance(info.default, str) else info.default}"
    return text


def marks(info: Any) -> list[Any]:
    """Everything that `Annotated` says of a parameter, at any depth: limits, `Of`, and what others mark."""
    found, stack = list(info.metadata), [info.annotation]
    while stack:
        item = stack.pop()
        stack += get_args(item)
        found += [item, *getattr(item, "metadata", ())]
    return found


def _type_words(annotation: Any) -> str:
    known = {float: "a number", int: "a whole number", str: "a word", bool: "true or false"}
    if annotation in known:
        return known[annotation]
    if get_origin(annotation) is Annotated:
        return _type_words(get_args(annotation)[0])
    if str(get_origin(annotation)) == "typing.Literal":
        return "one of " + ", ".join(map(str, get_args(annotation)))
    parts = [_type_words(part) for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is list:
        return f"a list ({parts[0]} each)"
    if get_origin(annotation) is dict:
        return f"a mapping (to {parts[1]} each)"
    return parts[0] if parts else "a value"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str) if not isinstance(value, str) else f"'{value}'"
    return text if len(text) <= 60 else text[:57] + "..."
