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
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from keyword import iskeyword
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from glue.errors import MethodError, did_you_mean, one_line

T = TypeVar("T")
PER_MEMBER = "one value for all members, a list in their order, or a mapping from their names"
if TYPE_CHECKING:  # what arrives is settled by the verb: a merge method is given a tensor [n, 1, ..., 1]
    from typing_extensions import TypeAliasType

    PerMember = TypeAliasType("PerMember", Any, type_params=(T,))
else:
    PerMember = Annotated[Union[T, list[T], dict[str, T]], PER_MEMBER]  # noqa: UP007 - subscripted with T below
Share = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]

_FAMILIES: dict[str, Family] = {}
_LOADING = threading.RLock()  # a family that another thread is loading is waited for, not seen in part


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
            assert taken is None or _where(taken.call) == _where(call), \
                f"{self.noun} '{name}' is registered by {taken and _where(taken.call)} and by {_where(call)}"
            doc = inspect.cleandoc(call.__doc__ or "")
            assert doc, f"{self.noun} '{name}' has no docstring"
            self._methods[name] = Method(self.key, name, call, source, version, dict(traits), doc, _schema(name, call))
            return call
        return register

    def load(self) -> Family:
        """Import every module of the folder, then the entry points; a module that fails is an error, not a gap."""
        with _LOADING:
            if self._loaded:
                return self
            self._loaded = True  # before the imports, since a module may look its own family up
            try:
                package = importlib.import_module(self.folder)
                for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
                    if not module.startswith("_"):
                        importlib.import_module(f"{self.folder}.{module}")
                for point in sorted(importlib.metadata.entry_points(group="glue.methods"), key=lambda one: one.name):
                    _plugged_in(point)
            except BaseException:
                self._loaded = False
                raise
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
            raise _at(MethodError(f"a {self.noun} is one word, or one word with its parameters; this is "
                                  f"{_short(value)}", fix=f"write  name  or  {{name: {{parameter: value}}}}; "
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


HOMES = {"merging": "glue.merge", "routing": "glue.mix", "searching": "glue.search", "selecting": "glue.refine",
         "teaching": "glue.skills", "kinds": "glue.kinds", "steps": "glue.steps"}


def _plugged_in(point: importlib.metadata.EntryPoint) -> None:
    try:
        point.load()
    except Exception as problem:
        raise MethodError(f"the module '{point.value}', which adds methods of another package, cannot be loaded "
                          f"({type(problem).__name__}: {problem})",
                          fix=f"repair or uninstall the package {point.dist.name if point.dist else point.name}",
                          ) from problem


def _where(call: Callable) -> str:
    return f"{call.__module__}.{call.__qualname__}"


def _at(error: MethodError, loc: tuple[str | int, ...]) -> MethodError:
    error.loc = (*loc, *error.loc)
    return error


def _python_name(name: str) -> str:
    """A parameter that recipes call `lambda` is `lambda_` in Python."""
    return f"{name}_" if iskeyword(name) else name


def _schema(name: str, call: Callable) -> type[BaseModel]:
    hints = get_type_hints(call, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            default = ... if parameter.default is parameter.empty else parameter.default
            alias = parameter.name[:-1] if iskeyword(parameter.name[:-1]) else None
            fields[parameter.name] = (hints[parameter.name], Field(default, alias=alias, validate_default=False))
    config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True,
                        protected_namespaces=())
    return create_model(name, __config__=config, **fields)


def is_per_member(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> bool:
    """Whether a parameter takes a value for each member."""
    return PER_MEMBER in metadata or any(PER_MEMBER in get_args(part) for part in (annotation, *get_args(annotation)))


def _worded(method: Method, error: ValidationError, given: dict[str, Any]) -> MethodError:
    """The most telling thing that pydantic found, in our words: an unknown word first, then what lies deepest."""
    paths = [(_path(given, item["loc"]), item) for item in error.errors()]
    loc, found = min(paths, key=lambda pair: (pair[1]["type"] != "extra_forbidden", -len(pair[0]),
                                              pair[1]["type"].endswith("_type")))
    noun = families(method.family).noun
    if found["type"] == "missing" and not loc:
        word = str(found["loc"][0])
        return MethodError(f"{noun} '{method.name}' needs the parameter '{word}'",
                           fix=f"add  {word}: ...  ({describe(method.parameters[word])})")
    word = str(loc[0])
    if word not in method.parameters:
        return _at(MethodError(f"{noun} '{method.name}' has no parameter '{one_line(word)}'"
                               f"{did_you_mean(word, method.parameters)}"), loc)
    info = method.parameters[word]
    value = found["input"]
    of_many = sum(path == loc for path, _ in paths) > 1 and found["type"].endswith(("_type", "literal_error"))
    why = "" if of_many else f": {found['msg'][:1].lower()}{found['msg'][1:]}"  # one branch of a union says too little
    near = did_you_mean(value, _literals(info)) if isinstance(value, str) else ""
    return _at(MethodError(f"{noun} '{method.name}': '{_spelled(loc)}' cannot be {_short(value)}"
                           f"{near if 'mean' in near else why}", fix=f"it is {describe(info)}"), loc)


def _path(given: Any, loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The part of pydantic's path that names keys of what was written; it also names the branches of unions."""
    path: list[int | str] = []
    for part in loc:
        inside = part in given if isinstance(given, Mapping) else \
            isinstance(given, list) and isinstance(part, int) and part < len(given)
        if inside:
            given = given[part]
            path.append(part)
    return tuple(path)


def _spelled(loc: tuple[int | str, ...]) -> str:
    """`weight`, `weight.left`, `values[2]`"""
    more = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc[1:])
    return one_line(f"{loc[0]}{more}", 80)


def describe(info: Any) -> str:
    """One parameter in words: its type, its limits, its default."""
    text = _type_words(info.annotation, info.metadata)
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


_WORDS = {float: "a number", int: "a whole number", str: "a word", bool: "true or false"}


def _type_words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type in words, every branch of a union and the limits of each."""
    parts, metadata = get_args(annotation), list(metadata)
    if PER_MEMBER in metadata:
        return f"{_type_words(parts[0])} (one for all, or by member)"
    if choice := next((mark for mark in metadata if isinstance(mark, Of)), None):
        return f"a {families(choice.family).noun}"
    if annotation in _WORDS:
        words = _WORDS[annotation]
    elif get_origin(annotation) is Annotated:
        words = _type_words(parts[0], parts[1:])
    elif get_origin(annotation) is Literal:
        words = "one of " + ", ".join(map(str, parts))
    elif get_origin(annotation) in (Union, UnionType):
        words = ", or ".join(_type_words(part) for part in parts if part is not type(None))
    elif get_origin(annotation) is list:
        words = f"a list ({_type_words(parts[0])} each)"
    elif get_origin(annotation) is dict:
        keys = " or ".join(get_args(parts[0])) if get_origin(parts[0]) is Literal else ""
        told = _type_words(parts[1])
        words = f"a mapping ({keys}: {told})" if keys else f"a mapping (to {told} each)"
    else:
        words = "a value"
    limits = " and ".join(dict.fromkeys(_limits(metadata)))
    return words + (f" {limits}" if limits else "")


def _limits(metadata: Iterable[Any]) -> Iterator[str]:
    for mark in metadata:
        for key, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="), ("min_length", "of at least"),
                          ("max_length", "of at most")):
            if hasattr(mark, key):
                yield f"{sign} {getattr(mark, key)}"
        yield from _limits(getattr(mark, "metadata", ()))


def _literals(info: Any) -> list[str]:
    return [word for mark in marks(info) if get_origin(mark) is Literal for word in get_args(mark)
            if isinstance(word, str)]


def _short(value: Any) -> str:
    if isinstance(value, (str, float)):
        return one_line(f"'{value}'" if isinstance(value, str) else repr(value), 60)
    return one_line(json.dumps(value, default=str, ensure_ascii=False), 60)
