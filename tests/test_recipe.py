"""Recipes: grammar alone. Every mistake has its place, all of them are told at once, and each in a few lines."""

from __future__ import annotations

import pytest

from glue.errors import GlueError, Mistakes
from glue.recipe import read_recipe

LINE = "steps:\n  - {as: a, step: merge}\n"


def mistakes(tmp_path, text: str, name: str = "r.yaml") -> list[GlueError]:
    (tmp_path / name).write_text(text)
    with pytest.raises(Mistakes) as caught:
        read_recipe(tmp_path / name)
    return caught.value.errors


@pytest.mark.parametrize("text, line, said", [
    ("", 1, "a recipe is a mapping"), ("- a", 1, "a recipe is a mapping"), ("steps: []", 1, "needs 'steps'"),
    ("seed: 1", 1, "needs 'steps'"), ("step: []\n" + LINE, 1, "no key 'step'; did you mean 'steps'?"),
    ("seed: 1.5\n" + LINE, 1, "must be a whole number, not 1.5"), ("seed: true\n" + LINE, 1, "not true"),
    ("device: [cpu]\n" + LINE, 1, "'device' is one word"),
    ("seed: -1\n" + LINE, 1, "a seed lies between"), ("seed: null\n" + LINE, 1, "not null"),
    ("about: [x]\n" + LINE, 1, "'about' must be a word"), ("include: 5\n" + LINE, 1, "'include' is the path"),
    ("include: [1]\n" + LINE, 1, "'include' is the path"), ('include: "a\\0b"\n' + LINE, 1, "'include' is the path"),
    ("include: no.yaml\n" + LINE, 1, "there is no file"), (LINE + "full: {seed: [1]}", 3, "'full' is a mapping"),
    (LINE + "full: {seeds: [true]}", 3, "'full' is a mapping"), (LINE + "board: {tabel: a}", 3, "'board' is a mapping"),
    (LINE + "board: {table: b}", 3, "no line of this recipe is called 'b'"),
    (LINE + "board: {table: [a]}", 3, "'board' is a mapping"),
    (LINE + "board: {table: a, headline: [x]}", 3, "'headline' must be a word"),
    (LINE + "board: {table: a, claims: [{better: a}]}", 3, "a claim is"),
    ("steps:\n  - merge\n", 2, "a step is a mapping"), ("steps:\n  - {step: merge}\n", 2, "no 'as'"),
    ("steps:\n  - {as: a, stp: merge}\n", 2, "no 'step'; did you mean 'stp'?"),
    ("steps:\n  - {as: 1, step: merge}\n", 2, "'as' must be a word, not 1"),
    ("steps:\n  - {as: a, step: [merge]}\n", 2, "'step' must be a word"),
    ("steps:\n  - {as: a, step: merge, tags: x}\n", 2, "'tags' must be a list"),
    ("steps:\n  - {as: a, step: merge, tags: [-x]}\n", 2, "tags are a list of words"),
    ("steps:\n  - {as: a, step: merge, each: 3}\n", 2, "'each' must be a word"),
    ("steps:\n  - {as: a, step: merge, seed: 4294967296}\n", 2, "a seed lies between"),
    (LINE + "  - {as: a, step: mix}\n", 3, "'as: a' stands twice, first at")])
def test_a_mistake_of_grammar_is_one_short_error_on_its_line(tmp_path, text, line, said):
    error, = mistakes(tmp_path, text)
    assert said in str(error) and error.place.line == line and len(str(error).splitlines()) <= 8


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", ".hidden", "a/b", "", " ", "a b", "a\\nb", "a\\0", "-x",
                                  "ﬁne", "а", "a\\u202e", "x" * 101, "~", "a:b", "tag:x", "a@b", "%s", "{x}"])
def test_a_hostile_name_is_refused_in_one_line(tmp_path, name):
    error, = mistakes(tmp_path, f'steps:\n  - {{as: "{name}", step: merge}}\n')
    assert error.place.line == 2 and "cannot be a name" in str(error)
    assert len(str(error).splitlines()) <= 2 and len(str(error)) < 700


def test_all_mistakes_are_told_at_once_those_of_includes_too(tmp_path):
    (tmp_path / "below.yaml").write_text("steps:\n  - {as: x/y, step: merge}\n")
    found = mistakes(tmp_path, "sead: 1\ninclude: below.yaml\nsteps:\n  - {as: ../a, step: merge}\n  - {as: b}\n")
    assert [(error.place.file.rsplit("/", 1)[-1], error.place.line) for error in found] == [
        ("r.yaml", 1), ("below.yaml", 2), ("r.yaml", 4), ("r.yaml", 5)]


def test_includes_come_first_and_once_however_often_they_are_named(tmp_path):
    (tmp_path / "base.yaml").write_text("steps:\n  - {as: z, step: data}\n")
    for name in ("left", "right"):
        (tmp_path / f"{name}.yaml").write_text(f"include: base.yaml\nsteps:\n  - {{as: {name}, step: merge}}\n")
    (tmp_path / "r.yaml").write_text("include: [left.yaml, right.yaml]\n" + LINE)
    assert [line.product for line in read_recipe(tmp_path / "r.yaml").lines] == ["base/z", "left/left", "right/right",
                                                                                 "r/a"]


def test_recipes_that_include_each_other_in_a_ring_or_without_end_are_refused(tmp_path):
    (tmp_path / "b.yaml").write_text("include: r.yaml\n" + LINE)
    error, = mistakes(tmp_path, "include: ./b.yaml\n" + LINE)
    assert "'r.yaml' includes itself" in str(error) and error.place.file.endswith("b.yaml")
    error, = mistakes(tmp_path, "include: r.yaml\n" + LINE)
    assert "'r.yaml' includes itself" in str(error)
    for k in range(40):  # each names the next one twice: 2^40 ways, and each file is read once
        (tmp_path / f"c{k}.yaml").write_text(f"include: [c{k + 1}.yaml, c{k + 1}.yaml]\n" + LINE)
    assert "more than 20 deep" in str(mistakes(tmp_path, "include: c0.yaml\n" + LINE)[0])


def test_two_files_of_one_name_do_not_hide_each_others_products(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "zoo.yaml").write_text(LINE)
    error, = mistakes(tmp_path, "include: [one/zoo.yaml, two/zoo.yaml]\n" + LINE)
    assert "'zoo/a' would be made twice" in str(error) and error.place.line == 1


def test_words_for_all_lines_reach_includes_and_the_command_line_goes_first(tmp_path):
    (tmp_path / "base.yaml").write_text("device: cpu\ndtype: float16\nsteps:\n  - {as: z, step: data}\n")
    (tmp_path / "r.yaml").write_text("device: cuda\nbatch_size: 4\ninclude: base.yaml\n" + LINE)
    inner, outer = (line.wide for line in read_recipe(tmp_path / "r.yaml").lines)
    assert inner == {"device": "cuda", "dtype": "float16", "batch_size": 4} and outer == {"device": "cuda",
                                                                                         "batch_size": 4}
    inner, outer = (line.wide for line in read_recipe(tmp_path / "r.yaml", wide={"device": "auto"}).lines)
    assert inner["device"] == outer["device"] == "auto" and inner["dtype"] == "float16"


def test_a_seed_is_added_to_those_of_the_lines_and_reaches_includes(tmp_path):
    (tmp_path / "base.yaml").write_text("seed: 5\nsteps:\n  - {as: z, step: data, seed: 100}\n")
    (tmp_path / "r.yaml").write_text("include: base.yaml\n" + LINE)
    def seeds(**given):
        return [line.seed for line in read_recipe(tmp_path / "r.yaml", **given).lines]

    assert seeds() == [105, 0] and seeds(seed=7) == [107, 7]
    (tmp_path / "r.yaml").write_text("seed: 3\ninclude: base.yaml\n" + LINE)
    assert seeds() == [103, 3]
    with pytest.raises(GlueError, match="a seed lies between"):
        seeds(seed=-1)


def test_a_file_whose_name_cannot_name_products_is_refused(tmp_path):
    assert "cannot name products" in str(mistakes(tmp_path, LINE, "my recipe.yaml")[0])
