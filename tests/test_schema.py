"""The JSON schema of recipes: what the planner takes it takes, and it notices a typo."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest

from glue.document import parse, read
from glue.errors import RecipeError
from glue.schema import recipe_schema

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))
GOOD = """\
seed: 1
steps:
  - {as: a, step: search, members: [x], suite: "tiny:dev", strategy: {greedy: {coefficients: [0.5]}},
     merge: {ties: {lambda: 2}}}
  - {as: b, step: merge, each: a, method: {linear: {weight: {x: 1, y: 2.5}}}, tags: [t], seed: 3}
  - {as: c, step: evaluate, members: [a, b], suite: "tiny:test"}
board: {table: c, headline: a, claims: [{better: a, than: b}, {refused: x, by: a}]}
full: {seeds: [0, 7]}
"""


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())
    return jsonschema.Draft202012Validator(recipe_schema())


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_every_recipe_fits_the_schema(schema, file):
    assert [error.message for error in schema.iter_errors(read(file, RecipeError).value)] == []


def test_members_may_be_left_out_of_a_step_that_has_players_of_another_kind(schema):
    def fits(words: str) -> bool:
        return schema.is_valid(parse(f"steps: [{{as: w, step: value, suite: 'tiny:dev', {words}}}]", "f",
                                     RecipeError).value)

    assert fits("of: fed") and fits("members: [a], base: b, merge: linear") and fits("each: a, base: root, merge: ties")
    assert not fits("members: [a], each: a, base: b, merge: linear")


@pytest.mark.parametrize("old, new", [
    ("seed: 1", "sead: 1"), ("seed: 1", "seed: -1"), ("seed: 1", "seed: true"), ("step: merge", "step: merg"),
    ("method:", "metod:"), ("greedy", "gredy"), ("coefficients", "coefs"), ("[0.5]", "gird"), ("[0.5]", "[0]"),
    ("lambda: 2", "lambda_: 2"), ("lambda: 2", "lambda: two"), ("y: 2.5", "y: big"), ("each: a", "each: [a]"),
    ("each: a", "each: a, members: [a]"), ("each: a, ", ""), ("tags: [t]", "tags: t"), ("as: c, ", ""),
    ("table: c, ", ""), ("than: b", "then: b"), ("seeds", "seed"), ("headline", "headlines")])
def test_a_typo_does_not_fit_the_schema(schema, old, new):
    assert schema.is_valid(parse(GOOD, "f", RecipeError).value) and old in GOOD
    assert not schema.is_valid(parse(GOOD.replace(old, new), "f", RecipeError).value)
