"""Plans: a recipe with every word checked, every member found and every finished step recognised.

A plan is a pure function of recipe and zoo, and cheap; `run` makes a new one whenever something was finished. So a
group that a step has yet to make is simply not expanded until it is there: its tasks are `deferred`, with every
word checked now, and arity and compatibility when the group exists. What is not on this machine is refused, or, where
somebody only wants to know, planned as `missing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from glue.errors import GlueError, MethodError, Mistakes, NotHere, RecipeError, ZooError
from glue.family import Choice, Method, marks
from glue.find import Finder, Outcome, Pending
from glue.kinds.device import usable
from glue.member import Element, Member, Origin
from glue.recipe import Line, Recipe
from glue.snapshot import whole
from glue.steps import Configured, Measured, Takes, steps, wide
from glue.zoo import Zoo

State = Literal["done", "alias", "ready", "waiting", "deferred", "missing"]
GROUP = "group/1"


@dataclass(frozen=True)
class Task:
    """One thing to make.

    state      done; alias: made under another name, to be registered; ready; waiting for other tasks; deferred: how
               many there are is decided by a group that is yet to be made; missing: inputs are not on this machine
    arguments  of the step, resolved (when ready)       origin  known as soon as all inputs are made
    known      what it is made of, as far as that is there or can be brought, while it waits for the rest
    lacks      those of them that are not on this machine
    """

    name: str
    line: Line
    step: str
    makes: str
    state: State
    waits_for: tuple[str, ...] = ()
    choice: Choice | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin | None = None
    member: Member | None = None
    inputs: tuple[Member, ...] = ()
    elements: tuple[Element, ...] = ()
    known: tuple[Member, ...] = ()
    lacks: tuple[Member, ...] = ()

    def folder(self, zoo: Zoo) -> Path:
        """Where its product lies or will lie."""
        assert self.origin is not None
        return zoo.folder / f"{self.name}-{self.origin.key[:8]}"


@dataclass(frozen=True)
class Plan:
    """All tasks of a recipe in order."""

    recipe: Recipe
    zoo: Zoo
    tasks: tuple[Task, ...]

    def __iter__(self):
        return iter(self.tasks)

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return all(task.state == "done" for task in self.tasks)

    def __getitem__(self, word: str) -> Member:
        """The member that a word of this recipe means, once it is made."""
        outcomes = {task.name: Outcome(task.member, task.makes, frozenset(task.line.tags)) for task in self.tasks}
        found = Finder(self.zoo, self.recipe, outcomes).one(word, self.recipe.name)
        if isinstance(found, Pending):
            raise RecipeError(f"'{word}' has not been made yet", fix=f"glue run {self.recipe.file}")
        return found


def make_plan(recipe: Recipe, zoo: Zoo, *, missing: bool = False) -> Plan:
    """Check every word of the recipe and find what is done. Raises Mistakes with everything that is wrong.

    missing  hand-written members that are not on this machine are no mistake: what needs them is planned as far as it
             goes, and says so. Such a plan cannot be run
    """
    planner = _Planner(recipe, zoo, missing)
    for line in recipe.lines:
        planner.plan(line)
    if planner.errors:
        raise Mistakes(_gathered(planner.errors, str(recipe.file)))
    return Plan(recipe, zoo, tuple(planner.tasks))


def _gathered(errors: list[GlueError], recipe: str) -> list[GlueError]:
    """Errors once each; all members that are not on this machine as one, with all commands that get them."""
    told = {str(error): error for error in errors if not isinstance(error, NotHere)}
    missing = [error for error in errors if isinstance(error, NotHere)]
    if not missing:
        return list(told.values())
    if len(commands := {error.command: error.part for error in missing}) == 1:
        return [*told.values(), missing[0]]
    each = [f"{command}  ({part} is missing)" if part else command for command, part in commands.items()]
    return [*told.values(), ZooError(f"{len(commands)} members are not on this machine", place=missing[0].place,
                                     fix="\n    ".join([f"glue zoo fetch {recipe}  gets them all; one by one:",
                                                        *each]))]


class _Planner:
    def __init__(self, recipe: Recipe, zoo: Zoo, missing: bool):
        self.recipe, self.zoo, self.missing = recipe, zoo, missing
        self.tasks: list[Task] = []
        self.errors: list[GlueError] = []
        self.outcomes: dict[str, Outcome] = {}
        self.finder = Finder(zoo, recipe, self.outcomes)

    def plan(self, line: Line) -> None:
        """Add the tasks of one line, or its mistakes."""
        try:
            method = steps[line.step]
        except MethodError as error:
            self.errors.append(RecipeError(error.what, fix=error.fix, place=line.place("step")))
            self.outcomes[line.product] = Outcome(None, "unknown", frozenset(line.tags))
            return
        outcome = Outcome(None, "unknown", frozenset(line.tags))
        try:
            params = {**_wide(method, line), **line.params}
            if line.each:
                if "members" not in method.parameters or "members" in params:
                    raise RecipeError(f"step '{line.step}' cannot have both 'each' and 'members'" if "members" in params
                                      else f"step '{line.step}' works on no members, so 'each' means nothing here",
                                      place=line.place("each"))
                params["members"] = [{"each": line.each}]
            choice = method.bind(params)
            makes = _makes(choice)
            outcome = Outcome(None, "group" if line.each else makes, frozenset(line.tags),
                              of=makes if line.each else "unknown")
            _runnable(choice)
            if "words" in method.traits:
                method.traits["words"](**choice.params)
            self._expand(line, method, choice)
            if not line.each and (made := self.tasks[-1].member):
                outcome = Outcome(made, made.kind, frozenset(line.tags))
            elif line.each and self.tasks and self.tasks[-1].name == line.product and self.tasks[-1].member:
                outcome = Outcome(self.tasks[-1].member, "group", frozenset(line.tags))
        except Mistakes as error:
            self.errors += error.errors
        except GlueError as error:
            self.errors.append(error.at(line.place(*getattr(error, "loc", ()) or ("step",))))
        self.outcomes[line.product] = outcome

    def _expand(self, line: Line, method: Method, choice: Choice) -> None:
        if not line.each:
            self.tasks.append(self._task(line, method, choice, line.product, None))
            return
        group = self.finder.group(line.each, line)
        if isinstance(group, Pending):
            arguments, _ = self._resolve(line, choice, None)  # every other word is checked now
            self.tasks.append(Task(line.product, line, line.step, "group", "deferred", group.names, choice,
                                   known=tuple(_members(arguments))))
            return
        made = []
        for element in group.elements:
            task = self._task(line, method, choice, f"{line.product}/{element.name}", element)
            self.tasks.append(task)
            self.outcomes[task.name] = Outcome(task.member, task.makes, frozenset(line.tags))
            made.append(task)
        self.tasks.append(self._group(line, group.elements, made))

    def _task(self, line: Line, method: Method, choice: Choice, name: str, element: Element | None) -> Task:
        arguments, pending = self._resolve(line, choice, element)
        makes = _makes(choice)
        known = tuple(_members(arguments))
        if lacks := tuple(dict.fromkeys(member for member in known if self.missing and not present(member))):
            return Task(name, line, line.step, makes, "missing", tuple(dict.fromkeys(pending)), choice, known=known,
                        lacks=lacks)
        if pending:
            return Task(name, line, line.step, makes, "waiting", tuple(dict.fromkeys(pending)), choice, known=known)
        if "check" in method.traits:
            method.traits["check"](**{**choice.params, **arguments})
        origin = _origin(method, choice, arguments, line.seed)
        inputs = tuple(_members(arguments))
        task = Task(name, line, line.step, makes, "ready", (), choice, arguments, origin, None, inputs)
        lone = method.traits.get("lone") and element is not None and len(arguments["members"]) == 1
        member = self.zoo.made(origin, name)
        if member is None and lone:
            return replace(task, state="alias", makes=arguments["members"][0].kind,
                           member=replace(arguments["members"][0], name=name, origin=origin, tags=frozenset(line.tags)))
        return self._found(task, member)

    def _found(self, task: Task, member: Member | None) -> Task:
        if member is None:
            return task
        named = member if member.name == task.name else replace(member, name=task.name, tags=frozenset(task.line.tags))
        newest = task.name in self.zoo and self.zoo[task.name] == named
        return replace(task, state="done" if newest else "alias", member=named)

    def _group(self, line: Line, elements: Iterable[Element], tasks: list[Task]) -> Task:
        if any(task.member is None for task in tasks):
            names = tuple(task.name for task in tasks if task.member is None)
            return Task(line.product, line, line.step, "group", "waiting", names)
        made = tuple(Element(element.name, element.root, (task.member,))
                     for element, task in zip(elements, tasks, strict=True) if task.member)
        members = tuple(item.members[0] for item in made)
        origin = Origin(GROUP, {"members": tuple(member.digest for member in members)},
                        {"names": [item.name for item in made]}, 0, {"members": tuple(m.name for m in members)})
        task = Task(line.product, line, line.step, "group", "ready", (), None, {}, origin, None, members, made)
        return self._found(task, self.zoo.made(origin, task.name))

    def _resolve(self, line: Line, choice: Choice, element: Element | None) -> tuple[dict[str, Any], list[str]]:
        """Parameters that name members, resolved; and the names of what is not made yet."""
        arguments: dict[str, Any] = {}
        pending: list[str] = []
        errors: list[GlueError] = []
        for name, info in choice.method.parameters.items():
            takes = next((mark for mark in marks(info) if isinstance(mark, Takes)), None)
            value = choice.params[name]
            if takes is None or value is None:
                continue
            try:
                found = self.finder.resolve(takes, value, line, name, element)
                if isinstance(found, Pending):
                    pending += found.names
                    if found.beside:
                        arguments[name] = self._identified(list(found.beside), line, name)
                else:
                    arguments[name] = self._identified(found, line, name)
            except Mistakes as error:
                errors += error.errors
            except GlueError as error:
                errors.append(error)
        if errors:
            raise Mistakes(errors)
        return arguments, pending

    def _identified(self, value: Any, line: Line, name: str) -> Any:
        def one(member: Member) -> Member:
            if self.missing and not present(member):
                return member
            try:
                return self.zoo.identified(member)
            except GlueError as error:
                problems.append(error.at(line.place(name)))
                return member

        problems: list[GlueError] = []
        if isinstance(value, Member):
            value = one(value)
        elif isinstance(value, list):
            value = [one(member) for member in value]
        elif isinstance(value, dict):
            value = {one(member): share for member, share in value.items()}
        elif isinstance(value, Measured):
            value = replace(value, data={word: one(member) for word, member in value.data.items()})
        elif isinstance(value, Configured):
            value = replace(value, models={ref: one(member) for ref, member in value.models.items()})
        if problems:
            raise Mistakes(problems)
        return value


def _wide(method: Method, line: Line) -> dict[str, Any]:
    """What is said for all lines, of what this step knows."""
    return {name: line.wide[word] for word, name in wide(method).items() if word in line.wide}


def _runnable(choice: Choice) -> None:
    """Raise MethodError for a device that is not here, or numbers that it does not calculate with."""
    words = wide(choice.method)
    if "device" in words:
        try:
            usable(choice.params[words["device"]], choice.params[words["dtype"]] if "dtype" in words else "float32")
        except MethodError as error:
            error.loc = (words["device"],)
            raise


def present(member: Member) -> bool:
    """Whether all files of a member, and of what it sits on, are on this machine."""
    try:
        whole(member.path, member.kind)
    except NotHere:
        return False
    except GlueError:
        return member.path.startswith("hub:")  # what is wrong with that is told where it is read
    return present(member.base) if member.changes and member.base else True


def _makes(choice: Choice) -> str:
    """The kind of member that a step leaves, where that depends on its parameters."""
    makes = choice.method.traits["makes"]
    return makes(**choice.params) if callable(makes) else makes


def _members(arguments: Mapping[str, Any]) -> Iterable[Member]:
    for value in arguments.values():
        if isinstance(value, Member):
            yield value
        elif isinstance(value, (list, dict)):
            yield from value
        elif isinstance(value, Measured):
            yield from value.data.values()
        elif isinstance(value, Configured):
            yield from value.models.values()


def _origin(method: Method, choice: Choice, arguments: Mapping[str, Any], seed: int) -> Origin:
    """What this task will leave, as a key: everything that its bits depend on."""
    inputs: dict[str, tuple[str, ...]] = {}
    names: dict[str, tuple[str, ...]] = {}
    params: dict[str, Any] = {}
    for name, value in choice.params.items():
        if name in method.traits.get("unkeyed", ()) or \
                name in method.traits.get("later", ()) and value == method.parameters[name].default:
            continue
        value = arguments.get(name, value)
        if isinstance(value, Measured):
            params[name] = value.told()
            value = [value.data[task.data] for task in value.suite.tasks]
        elif isinstance(value, Configured):
            params[name] = value.config.text
            value = list(value.models.values())
        elif name in arguments and isinstance(value, dict):
            params[name] = [share for _, share in value.items()]
            value = list(value)
        elif name in arguments:
            value = [value] if isinstance(value, Member) else value
        else:
            params[name] = value.spelled() if isinstance(value, Choice) else value
            continue
        inputs[name] = tuple(member.digest for member in value)
        names[name] = tuple(member.name for member in value)
    if method.traits.get("named"):
        params["names"] = {name: list(value) for name, value in names.items()}
    return Origin(f"{method.name}/{method.version}", inputs, params, seed, names)
