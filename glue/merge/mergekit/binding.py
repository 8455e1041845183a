"""Binding: the settings of a config at one tensor, as a choice of one of our methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from glue.errors import MethodError, RecipeError
from glue.family import Choice
from glue.merge import merging
from glue.merge.engine import tried
from glue.merge.mergekit.layout import Stretch
from glue.merge.mergekit.nouns import Config, ModelRef, Settings
from glue.merge.mergekit.settings import ends, found
from glue.merge.mergekit.words import Dialect

Bound = tuple[Choice, list[ModelRef], ModelRef | None]  # the method, its members in order, and its base


class Binding:
    """Resolves settings for the tensors of one config."""

    def __init__(self, config: Config):
        self.config, self.method = config, Dialect.of(config.merge_method)
        self._choices: dict[Any, Choice] = {}
        self._kept = merging["passthrough"].bind({})

    def bound(self, made: str, present: Sequence[tuple[ModelRef, str]], stretch: Stretch, *,
              lacking: bool) -> Bound | None:
        """The choice for a tensor, its members in order and its base; None where it is to be left out.

        made     the name of the tensor in the result, for what all members share
        present  each model that has it, with the name of the tensor there
        lacking  whether some model does not have it

        Raises RecipeError where a parameter has no value, or a method does not take what is left.
        """
        base = stretch.base if self.method.base != "ignored" else None
        models = [model for model, _ in present]
        names = dict(present)
        if lacking:
            if self._alone(models, base):
                return self._kept, models, None
            if self.method.peer.alone == "fewer" and len(models) < self.method.members[0] + 1:
                return None
            if base and base not in models:
                raise RecipeError(f"'{made}' is not in the base_model '{base}'", place=self._place(stretch, base),
                                  fix="take a base with the tensors of all others, or drop the models that have more")
        members = [model for model in models if model != base]
        if self.method.peer.first and base:
            members, base = [base, *members], None
        if not members:
            return self._kept, models, None
        fewest, most = self.method.members
        if len(members) < fewest or (most and len(members) > most):
            raise RecipeError(f"'{made}' is in {len(members)} of the models, and '{self.config.merge_method}' takes "
                              f"{'at least' if len(members) < fewest else 'at most'} "
                              f"{fewest if len(members) < fewest else most}", place=self.config.place("merge_method"),
                              fix="drop the models that lack it, or choose another method")
        return self._choice(made, [(model, names[model]) for model in members], stretch), members, base

    def _alone(self, models: list[ModelRef], base: ModelRef | None) -> bool:
        alone = self.method.peer.alone
        return len(models) == 1 and (alone == "any" or (alone in ("base", "fewer") and models[0] == base))

    def _choice(self, made: str, members: Sequence[tuple[ModelRef, str]], stretch: Stretch) -> Choice:
        given: dict[str, Any] = {}
        for word in self.method.kinds:
            default = self.method.peer.differs.get(word)
            if word in self.method.by_model:
                row = [self._value(word, name, stretch, model) for model, name in members]
                row = [default if value is None else value for value in row]
                if all(value is None for value in row):
                    continue
                if None in row:  # what one model says of a parameter leaves the others their default
                    info = self.method.method.parameters[word]
                    row = [info.default if value is None else value for value in row]
                given[word] = row[0] if self.method.method.name == "passthrough" else row
            elif (value := self._value(word, made, stretch, None)) is not None:
                given[word] = value
            elif default is not None:
                given[word] = default
        key = tuple((word, tuple(value) if isinstance(value, list) else value) for word, value in given.items())
        if key not in self._choices:
            try:
                self._choices[key] = self.method.method.bind(given)
                tried(self._choices[key], [str(model) for model, _ in members])
            except MethodError as error:
                said = next((word for word in given if word in error.what), next(iter(given), ""))
                model = members[0][0] if said in self.method.by_model else None
                raise RecipeError(f"{error.what}, at '{made}'", place=self._place(stretch, model, said),
                                  fix=error.fix) from None
        return self._choices[key]

    def _value(self, word: str, tensor: str, stretch: Stretch, model: ModelRef | None) -> Any:
        """The value of a parameter at one tensor, or None for its default; `tensor` is what filters look at."""
        scopes = list(self._scopes(stretch, model))
        first = next((value for scope in scopes if word in scope for _, value in ends(scope[word])), None)
        try:
            value = found(word, self.method.kind(word, first), scopes, tensor, stretch.t)
        except ValueError as problem:  # each of its values was checked, but not what lies between them
            raise RecipeError(f"'{word}' at '{tensor}': {problem}", place=self._place(stretch, model, word),
                              fix="write values between which there are only such, or rules with filters") from None
        if value is None and word in self.method.peer.needs:
            whose = f" for '{model}'" if model else ""
            raise RecipeError(f"there is no '{word}'{whose} at '{tensor}': no rule of it fits this tensor",
                              place=self._place(stretch, model, word),
                              fix=f"end the rules of '{word}' with one that has no filter:  - value: ...")
        return self.method.settled(word, value)

    def _scopes(self, stretch: Stretch, model: ModelRef | None) -> Iterator[Settings]:
        yield from (source.settings for source in stretch.sources if source.model == model)
        yield from stretch.scopes
        yield self.config.settings

    def _place(self, stretch: Stretch, model: ModelRef | None, word: str = "") -> Any:
        """Where the parameter, or else the model, stands in the config."""
        own = [source.loc for source in stretch.sources if source.model == model and source.loc]
        for loc in [*own, *stretch.locs, ()] if word else []:
            place = self.config.place(*loc, "parameters", word)
            if place != self.config.place(*loc, "parameters"):
                return place
        loc = (*own[0], "model") if own else ("base_model",) if model else ("parameters",)
        return self.config.place(*loc)
