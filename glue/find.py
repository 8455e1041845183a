"""Finding: what a word of a recipe means, in the zoo or among the products of earlier lines."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glue.errors import GlueError, NotHere, RecipeError, did_you_mean
from glue.member import Element, Member, Origin
from glue.recipe import Line, Recipe
from glue.snapshot import whole
from glue.steps import Configured, Measured, Takes
from glue.zoo import Zoo

ROOT = "root"
FOUND = Origin("files/1", {}, {}, 0)  # of what is no member, but goes into one: its digest is known


@dataclass(frozen=True)
class Outcome:
    """What a line leaves: its member once made, and the kind it will have. `of` is the kind of a group's elements."""

    member: Member | None
    kind: str
    tags: frozenset[str]
    of: str = ""


@dataclass(frozen=True)
class Pending:
    """Members that are yet to be made, by name, and their kind; `beside` are those of them that are there."""

    names: tuple[str, ...]
    kind: str
    beside: tuple[Member, ...] = ()


class Finder:
    """Looks words up as a line of a recipe sees them: this recipe's earlier lines, its includes', then the zoo."""

    def __init__(self, zoo: Zoo, recipe: Recipe, outcomes: Mapping[str, Outcome]):
        self.zoo, self.recipe, self.outcomes = zoo, recipe, outcomes

    def resolve(self, takes: Takes, value: Any, line: Line, name: str, element: Element | None) -> Any:
        """The members that a parameter names, or Pending. Raises RecipeError with the place of the word."""
        try:
            if takes.how == "suite":
                return self._suite(takes, value, line)
            if takes.how == "config":
                return self._config(takes, value, line)
            if takes.how == "files":
                try:
                    return files(self.zoo, Path(line.document.file).parent, value, line.params.get("split"))
                except NotHere:  # the plan tells it, or goes on without
                    return Member(value, "dataset", value)
            if takes.how == "one":
                return self._checked(self.one(value, line.recipe, element, line), takes, value, line)
            if takes.how == "shares":
                pairs = {word: self._checked(self.one(word, line.recipe, element, line), takes, word, line)
                         for word in value}
                late = [found for found in pairs.values() if isinstance(found, Pending)]
                if late:
                    return _joined(late)
                shares = {pairs[word]: share for word, share in value.items()}
                if len(shares) < len(value):
                    raise RecipeError(f"'{name}' names one member twice: {', '.join(value)}", fix="keep one of the two")
                return shares
            found = self._many(value, takes, line, name, element)
            if isinstance(found, list) and not found:
                raise RecipeError(f"'{name}' names no members", fix="name some, or a tag or group that has some")
            return found
        except GlueError as error:
            raise error.at(line.place(name)) from None

    def one(self, word: str, recipe: str, element: Element | None = None, line: Line | None = None) -> Member | Pending:
        """The one member that a word means."""
        if word == ROOT and line is not None and line.each:
            if element is None:
                return Pending((line.each,), "model")
            if element.root is None:
                raise RecipeError(f"family '{element.name}' has no root", fix="name the base instead of 'root'")
            return element.root
        outcome = self._outcome(word, recipe)
        if outcome is not None:
            name, found = outcome
            return found.member or Pending((name,), found.kind)
        for name, found in self.outcomes.items():
            if found.kind == "group" and self._full(word, recipe, name):
                if found.member is None:
                    return Pending((name,), found.of or "model")
                for part in (member for item in found.member.elements for member in item.members):
                    if part.name in (word, f"{recipe}/{word}"):  # and not one that another seed has left under its name
                        return part
        if word in self.zoo or "@" in word:
            return self.zoo[word]
        later = [other.name for other in self.recipe.lines if other.name == word]
        if later:
            raise RecipeError(f"'{word}' is made by a later step", fix="move that step up")
        known = {*self.outcomes, *(name.split("/", 1)[1] for name in self.outcomes), *(m.name for m in self.zoo)}
        raise RecipeError(f"there is no member '{word}'{did_you_mean(word, known)}")

    def group(self, word: str, line: Line) -> Member | Pending:
        """The group that `each:` names."""
        try:
            found = self.one(word, line.recipe)
            if found.kind not in ("group", "unknown"):
                raise RecipeError(f"'{word}' is a {found.kind}; 'each' maps a step over a group",
                                  fix="name the line of a cluster step, or of one that has 'each' itself")
            return found
        except GlueError as error:
            raise error.at(line.place("each")) from None

    def _outcome(self, word: str, recipe: str) -> tuple[str, Outcome] | None:
        if f"{recipe}/{word}" in self.outcomes:
            return f"{recipe}/{word}", self.outcomes[f"{recipe}/{word}"]
        if word in self.outcomes:
            return word, self.outcomes[word]
        found = [(name, outcome) for name, outcome in self.outcomes.items() if name.split("/", 1)[1] == word]
        if len(found) > 1:
            raise RecipeError(f"'{word}' may mean {' or '.join(name for name, _ in found)}", fix="write the full name")
        return found[0] if found else None

    @staticmethod
    def _full(word: str, recipe: str, group: str) -> bool:
        return any(name.startswith(f"{group}/") for name in (word, f"{recipe}/{word}")) \
            or word.startswith(group.split("/", 1)[1] + "/")

    def _many(self, value: list[Any], takes: Takes, line: Line, name: str,
              element: Element | None) -> list[Member] | Pending:
        found: list[Member] = []
        late: list[Pending] = []
        for k, item in enumerate(value):
            try:
                for one in self._selected(item, line, element):
                    one = self._checked(one, takes, str(item), line)
                    if isinstance(one, Pending):
                        late.append(one)
                    elif one.name not in {other.name for other in found}:
                        found.append(one)
            except GlueError as error:
                raise error.at(line.place(name, k)) from None
        return _joined(late, found) if late else found

    def _selected(self, item: Any, line: Line, element: Element | None) -> list[Member | Pending]:
        if isinstance(item, dict) and set(item) == {"each"}:
            return list(element.members) if element else [Pending((item["each"],), "model")]
        if isinstance(item, dict):
            return self._where(item, line)
        if not isinstance(item, str):
            raise RecipeError(f"a member is a word or {{group: name, where: same_shape}}, not {item!r}")
        if item.startswith("tag:"):
            return self._tagged(item)
        one = self.one(item, line.recipe, element, line)
        if isinstance(one, Member) and one.kind == "group":
            return [member for part in one.elements for member in part.members]
        return [Pending(one.names, "model")] if isinstance(one, Pending) and one.kind == "group" else [one]

    def _where(self, item: dict[str, Any], line: Line) -> list[Member | Pending]:
        unknown = set(item) - {"group", "where"}
        if unknown or "group" not in item:
            word = sorted(unknown)[0] if unknown else "group"
            raise RecipeError(f"'{word}' is {'not known' if unknown else 'missing'} here",
                              fix="write  {group: name, where: same_shape}")
        if item.get("where", "same_shape") != "same_shape":
            raise RecipeError(f"'where' knows same_shape, not '{item['where']}'")
        found = self._selected(item["group"], line, None)
        if "where" not in item or any(isinstance(one, Pending) for one in found):
            return found
        from glue.kinds import weights

        shapes: dict[tuple, list[Member | Pending]] = {}
        for one in found:
            assert isinstance(one, Member)
            headers = weights(one).headers
            shapes.setdefault(tuple(sorted((name, header.shape) for name, header in headers.items())), []).append(one)
        return max(shapes.values(), key=len)  # the first of the largest

    def _tagged(self, item: str) -> list[Member | Pending]:
        tag = item.removeprefix("tag:")
        found: list[Member | Pending] = [member for member in self.zoo.select(item) if member.origin is None]
        found += [outcome.member or Pending((name,), outcome.kind)
                  for name, outcome in self.outcomes.items() if tag in outcome.tags]
        if not found:
            known = {word for member in self.zoo for word in member.tags} | {
                word for outcome in self.outcomes.values() for word in outcome.tags}
            raise RecipeError(f"no member has the tag '{tag}'{did_you_mean(tag, known)}")
        return found

    def _checked(self, found: Member | Pending, takes: Takes, word: str, line: Line) -> Member | Pending:
        if takes.kinds and takes.how != "suite" and found.kind not in (*takes.kinds, "unknown"):
            raise RecipeError(f"'{word}' is a {found.kind}; step '{line.step}' needs a {' or '.join(takes.kinds)} here")
        return found

    def _suite(self, takes: Takes, value: str, line: Line) -> Measured | Pending:
        from glue.evaluate.suite import parse, read_suite

        name, split = parse(value)
        if takes.kinds and split not in takes.kinds:
            raise RecipeError(f"step '{line.step}' chooses by what it measures, so it may not look at '{value}'",
                              fix=f"write {name}:{takes.kinds[0]}; the test split is for reporting")
        suite = read_suite(self._suite_file(name, line))
        sources: dict[str, str] = {}
        if suite.named:
            from glue.evaluate.lm_eval import check_named

            if not takes.named:
                raise RecipeError(f"suite '{name}' has tasks of lm-eval's own, and step '{line.step}' asks only items "
                                  "of dataset members", fix="measure it by  step: evaluate,  and name a suite here "
                                  "whose tasks have  data:")
            sources = check_named(suite, split)
        found = {task.data: self._checked(self.one(task.data, line.recipe), Takes("one", ("dataset",)), task.data, line)
                 for task in suite.tasks}
        late = [one for one in found.values() if isinstance(one, Pending)]
        if late:
            return _joined(late)
        data = {word: one for word, one in found.items() if isinstance(one, Member)}
        for word, member in data.items():
            if _there(member) and not (member.folder / f"{split}.jsonl").is_file():
                raise RecipeError(f"dataset '{word}' has no split '{split}'", fix=f"make it with  {split}: 200")
        return Measured(suite, split, data, sources)

    def _config(self, takes: Takes, value: str, line: Line) -> Configured | Pending:
        from glue.merge.mergekit.config import read_configs

        file = Path(line.document.file).parent / value
        if not value.endswith((".yaml", ".yml")) or not file.is_file():
            raise RecipeError(f"there is no merge config '{value}' beside the recipe",
                              fix="write a path that ends in .yaml, seen from the recipe's folder")
        configs = read_configs(file)
        if len(configs) > 1:
            raise RecipeError(f"{value} holds {len(configs)} merges", fix="give each a file and a step of its own")
        found: dict[Any, Member | Pending] = {}
        for ref in configs[0].referenced():
            try:
                found[ref] = self._checked(self.one(str(ref), line.recipe), takes, str(ref), line)
            except RecipeError as error:
                raise RecipeError(error.what, fix="in a recipe, models of a config are members;  glue zoo add  makes "
                                                  "a folder one", place=configs[0].place("models")) from None
        late = [one for one in found.values() if isinstance(one, Pending)]
        models = {ref: one for ref, one in found.items() if isinstance(one, Member)}
        return _joined(late) if late else Configured(configs[0], models)

    def _suite_file(self, name: str, line: Line) -> Path:
        beside = Path(line.document.file).parent / name
        if name.endswith((".yaml", ".yml")) and beside.is_file():
            return beside
        folder = self.zoo.file.parent / "benchmarks" / "suites"
        file = folder / f"{name}.yaml"
        if not file.is_file():
            known = {path.stem for path in folder.glob("*.yaml")}
            raise RecipeError(f"there is no suite '{name}'{did_you_mean(name, known)}",
                              fix=f"suites are {folder.name}/NAME.yaml, or a path ending in .yaml beside the recipe")
        return file


def _there(member: Member) -> bool:
    try:
        return member.folder.exists()
    except NotHere:
        return False


def _joined(late: list[Pending], beside: Iterable[Member] = ()) -> Pending:
    return Pending(tuple(dict.fromkeys(name for one in late for name in one.names)), late[0].kind, tuple(beside))


def files(zoo: Zoo, folder: Path, path: str, split: str | None) -> Member:
    """Files that others have written, as what goes into a product: named as seen from the zoo, known by their bytes.

    folder  from which the path is seen; of a dataset on the hub nothing, since that has the same path everywhere
    Raises SuiteError where it is not clear which files are meant, NotHere for what has to be fetched first.
    """
    from glue.tune.records import files_of

    if path.startswith("hub:"):
        return Member(path, "dataset", path, digest=files_of(whole(path, "dataset"), split).digest(), origin=FOUND)
    place, here = (Path(os.path.abspath(one)) for one in (folder / path, zoo.file.parent))
    name = str(place.relative_to(here)) if place.is_relative_to(here) else str(place)
    return Member(name, "dataset", str(place), digest=files_of(place, split).digest(), origin=FOUND)
