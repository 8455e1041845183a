"""Families: strict parameters, errors that name the right word, methods of other packages, and the trip to a worker."""

from __future__ import annotations

import importlib.metadata
import pickle
import sys
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from glue import family as module
from glue.errors import MethodError
from glue.family import Choice, Count, Family, Of, PerMember, Positive, Share, describe, families, is_per_member

GRID = "a list (a number > 0 each) of at least 1, or one of fine, coarse, default fine"


@pytest.fixture
def brewing(monkeypatch, tmp_path) -> Family:
    """A family with one method of every sort of parameter, and an empty folder."""
    monkeypatch.setattr(module, "_FAMILIES", dict(module._FAMILIES))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    (tmp_path / "brewery").mkdir()
    (tmp_path / "brewery" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    made = Family("brewing", "brew", "brewery", first="Water -> Tea", traits=("hot",))

    @made.add("tea", hot=True)
    def tea(first, *, leaves: Count = 3, strength: PerMember[Share] = 0.5, milk: bool = False, lambda_: float = 1.0,
            grid: Annotated[list[Positive], Field(min_length=1)] | Literal["fine", "coarse"] = "fine",
            after: Annotated[Any, Of("brewing")] = None) -> Any:
        """Tea."""
        return first, leaves, strength, milk, lambda_, grid, after and after(first)

    @made.add("water", version=2)
    def water(first, *, kind: str) -> str:
        """Nothing but water."""
        return f"{kind} {first}"

    yield made
    for name in [name for name in sys.modules if name.split(".")[0] == "brewery"]:
        del sys.modules[name]


@pytest.mark.parametrize("given", [
    {"leaves": True}, {"leaves": 1.0}, {"leaves": "1"}, {"leaves": 0}, {"milk": 1}, {"milk": "yes"}, {"lambda": "1"},
    {"lambda": True}, {"lambda": float("nan")}, {"lambda": float("inf")}, {"strength": [0.5, float("nan")]},
    {"strength": {"a": 2}}, {"strength": {"a": True}}, {"grid": []}, {"grid": [0]}, {"lambda_": 1.0}, {"leaves": None}])
def test_a_value_of_another_type_or_out_of_range_is_refused(brewing, given):
    with pytest.raises(MethodError) as caught:
        brewing.choose({"tea": given}, loc=("method",))
    assert caught.value.loc[:2] == ("method", "tea") and caught.value.loc[2] in given


def test_a_whole_number_is_a_number_and_is_settled_as_one(brewing):
    assert repr(brewing.choose({"tea": {"lambda": 2}}).params["lambda"]) == "2.0"


def test_a_wrong_word_of_a_union_is_answered_with_all_that_it_may_be(brewing):
    with pytest.raises(MethodError) as caught:
        brewing.choose({"tea": {"grid": "fin"}})
    assert str(caught.value) == ("brew 'tea': 'grid' cannot be 'fin'; did you mean 'fine'?\n"
                                 f"  it is {GRID}")


def test_the_deepest_wrong_value_is_the_one_that_is_named(brewing):
    for given, word, loc in (({"grid": [1, -2]}, "grid[1]", ("grid", 1)),
                             ({"strength": {"a": 7}}, "strength.a", ("strength", "a")),
                             ({"strength": {"b": 1, "a": "x"}}, "strength.a", ("strength", "a")),
                             ({"strength": [0.5, 3]}, "strength[1]", ("strength", 1))):
        with pytest.raises(MethodError, match="greater|less|valid number") as caught:
            brewing.choose({"tea": given})
        assert f"'{word}' cannot be" in str(caught.value) and caught.value.loc == ("tea", *loc)


def test_an_unknown_word_inside_a_nested_choice_has_the_whole_path(brewing):
    with pytest.raises(MethodError, match="did you mean 'leaves'") as caught:
        brewing.choose({"tea": {"after": {"tea": {"leafs": 2}}}}, loc=("method",))
    assert caught.value.loc == ("method", "tea", "after", "tea", "leafs")
    with pytest.raises(MethodError, match="no brew 'watr'; did you mean 'water'") as caught:
        brewing.choose({"tea": {"after": "watr"}})
    assert caught.value.loc == ("tea", "after", "watr")


def test_what_is_needed_and_missing_is_said_with_its_type(brewing):
    with pytest.raises(MethodError) as caught:
        brewing.choose("water")
    assert str(caught.value) == "brew 'water' needs the parameter 'kind'\n  add  kind: ...  (a word)"


@pytest.mark.parametrize("value", [3, None, [], {}, {"tea": {}, "water": {}}, {"tea": 3}, {"tea": []}])
def test_what_is_no_choice_is_refused_with_the_grammar(brewing, value):
    with pytest.raises(MethodError, match="mapping|one word"):
        brewing.choose(value)


def test_parameters_are_described_wholly(brewing):
    said = {name: describe(info) for name, info in brewing["tea"].parameters.items()}
    assert said == {
        "leaves": "a whole number >= 1, default 3", "milk": "true or false, default false",
        "strength": "a number > 0 and <= 1 (one for all, or by member), default 0.5", "lambda": "a number, default 1.0",
        "grid": GRID, "after": "a brew"}


def test_only_a_parameter_by_member_is_one(brewing):
    found = {name for name, info in brewing["tea"].parameters.items() if is_per_member(info.annotation, info.metadata)}
    assert found == {"strength"}


def test_a_choice_survives_the_trip_to_a_worker_with_what_is_nested_in_it(brewing):
    choice = brewing.choose({"tea": {"lambda": 0.25, "strength": {"a": 0.5}, "after": {"water": {"kind": "cold"}}}})
    back = pickle.loads(pickle.dumps(choice))
    assert back == choice and back("w") == ("w", 3, {"a": 0.5}, False, 0.25, "fine", "cold w")
    assert Choice.unspelled(choice.spelled()).spelled() == choice.spelled()
    assert choice.spelled()["params"]["after"] == {"family": "brewing", "name": "water", "version": 2,
                                                   "params": {"kind": "cold"}}


def test_two_methods_of_one_name_are_refused_even_in_one_file(brewing):
    def other(first):
        """Another."""

    with pytest.raises(AssertionError, match="'tea' is registered by"):
        brewing.add("tea")(other)


def test_a_module_that_fails_is_an_error_each_time_and_not_a_gap(brewing, tmp_path):
    (tmp_path / "brewery" / "broken.py").write_text("import no_such_package")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_package"):
            list(brewing)


def _point(monkeypatch, value: str) -> None:
    point = importlib.metadata.EntryPoint("mine", value, "glue.methods")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == "glue.methods" else [])


def test_another_package_adds_methods_through_its_entry_point(brewing, tmp_path, monkeypatch):
    (tmp_path / "brewery_plugin.py").write_text(
        "from glue.family import families\n@families('brewing').add('maté')\ndef mate(first):\n    'Maté.'\n")
    _point(monkeypatch, "brewery_plugin")
    assert [method.name for method in brewing] == ["maté", "tea", "water"]


def test_a_package_whose_methods_cannot_be_loaded_is_named_each_time(brewing, monkeypatch):
    _point(monkeypatch, "no_such_plugin:x")
    for _ in range(2):
        with pytest.raises(MethodError, match="'no_such_plugin:x'.*ModuleNotFoundError") as caught:
            brewing["tea"]
        assert "uninstall the package mine" in str(caught.value)


def test_every_registered_default_is_one_that_a_recipe_could_say():
    for key in module.HOMES:
        for method in families(key):
            given = {name: info.default for name, info in method.parameters.items()
                     if not info.is_required() and info.default is not None}
            needed = {name for name, info in method.parameters.items() if info.is_required()}
            if not needed:
                assert set(method.bind(given).params) == set(method.parameters), f"{key} {method.name}"
            else:
                with pytest.raises(MethodError, match="needs the parameter"):
                    method.bind(given)
