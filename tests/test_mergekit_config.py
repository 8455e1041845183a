"""Reading merge configs: what is accepted with a note, what YAML 1.1 habits mean, and several merges in one file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glue.errors import GlueError, RecipeError
from glue.merge.mergekit.config import Config, read_configs
from glue.merge.mergekit.nouns import ModelRef
from glue.merge.mergekit.settings import converted, evaluated

LINEAR = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"


def read(folder: Path, text: str, **how: bool) -> list[Config]:
    (folder / "c.yaml").write_text(text)
    return read_configs(folder / "c.yaml", **how)


def refused(folder: Path, text: str) -> str:
    with pytest.raises(GlueError) as caught:
        read(folder, text)
    return str(caught.value).removeprefix(f"{folder}/")


@pytest.mark.parametrize("text, parts", [
    ("owner/name", ("owner/name", "", "", "")), ("a@main", ("a", "main", "", "")), ("a+l", ("a", "", "l", "")),
    ("a@r+l@s", ("a", "r", "l", "s")), ("/data/a b", ("/data/a b", "", "", ""))])
def test_a_model_is_a_path_with_a_revision_and_an_adapter(text, parts):
    ref = ModelRef.parse(text)
    assert (ref.path, ref.revision, ref.lora, ref.lora_revision) == parts and str(ref) == text


@pytest.mark.parametrize("text", ["a@b@c", "a+b+c", "", "@r", "a+", "a@"])
def test_what_names_no_model_is_refused(text):
    with pytest.raises(RecipeError, match="does not name a model"):
        ModelRef.parse(text)


def test_a_model_may_be_written_as_a_mapping(tmp_path):
    config, = read(tmp_path, LINEAR.replace("model: a", "model: {model: {path: a, revision: r}, lora: l@s}")
                   .replace("model: b", "model: {model: b, override_architecture: LlamaForCausalLM}"))
    assert [source.model for source in config.models] == [ModelRef("a", "r", "l", "s"),
                                                          ModelRef("b", architecture="LlamaForCausalLM")]


def test_a_word_of_another_method_is_left_out_with_one_note(tmp_path):
    config, = read(tmp_path, "merge_method: slerp\nbase_model: a\nmodels:\n- {model: a, parameters: {density: 0.5}}\n"
                             "- {model: b, parameters: {density: 0.5}}\nparameters: {t: 0.5, int8_mask: true}\n")
    assert [note.split(",")[0] for note in config.notes] == ["slerp does not read "
                                                             "'density'", "slerp does not read 'int8_mask'"]
    assert config.settings == {"t": 0.5} and config.models[0].settings == {}


def test_a_word_that_mergekit_reads_and_that_changes_nothing_is_noted(tmp_path):
    config, = read(tmp_path, "merge_method: task_arithmetic\nbase_model: z\nmodels: [{model: a}]\n"
                             "parameters: {weight: 1, density: 0.5}\n")
    assert config.notes == ("'density' changes nothing under task_arithmetic",)


def test_a_value_for_all_models_is_noted_where_it_stands_at_one(tmp_path):
    config, = read(tmp_path, "merge_method: ties\nbase_model: z\nmodels:\n- model: a\n  parameters: {weight: 1, "
                             "normalize: "
                             "false}\n")
    assert len(config.notes) == 1 and "c.yaml:5:27: 'normalize' has one value for all models" in config.notes[0]


def test_unknown_words_are_errors_and_leniently_notes(tmp_path):
    text = LINEAR.replace("weight: 1", "weight: 1, wieght: 2") + "mreged_by: me\n"
    assert "did you mean 'weight'" in refused(tmp_path, text) and "'mreged_by'" in refused(tmp_path, text)
    config, = read(tmp_path, text, lenient=True)
    assert config.settings == {"weight": 1} and len(config.notes) == 2


def test_words_of_our_own_and_methods_that_mergekit_lacks_are_accepted(tmp_path):
    config, = read(tmp_path, "merge_method: ties\nbase_model: z\nmodels: [{model: a}]\nparameters: {weight: 1, "
                             "scope: model}\n")
    assert config.settings["scope"] == "model" and config.notes == ()
    config, = read(tmp_path, "merge_method: dare_ties\nbase_model: z\nmodels: [{model: a}]\nparameters: {weight: 1, "
                             "rescale: share}\n")
    assert config.settings["rescale"] == "share"
    config, = read(tmp_path, "merge_method: median\nmodels: [{model: a}, {model: b}, {model: c}]\n")
    assert config.merge_method == "median"


@pytest.mark.parametrize("value, kind, meant", [
    ("0.5", "number", 0.5), ("1e-3", "number", 0.001), (1, "number", 1.0), ("7", "whole", 7), (3.0, "whole", 3),
    ("yes", "truth", True), ("Off", "truth", False), ("on", "truth", True), ("NO", "truth", False), (1, "truth", True),
    (0.0, "truth", False), (True, "truth", True), ("share", "word", "share")])
def test_habits_of_yaml_1_1_mean_what_they_meant(value, kind, meant):
    found = converted(value, kind)
    assert found == meant and type(found) is type(meant)


@pytest.mark.parametrize("value, kind", [
    ("half", "number"), (True, "number"), (None, "number"), ([], "number"), (2.5, "whole"), ("nan", "whole"),
    (2, "truth"), ("maybe", "truth"), (None, "truth"), (1, "word")])
def test_a_value_of_another_kind_is_refused(value, kind):
    with pytest.raises(ValueError):
        converted(value, kind)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.integers(1, 40))
def test_a_gradient_goes_through_its_values_and_stays_between_them(values, layers):
    found = [evaluated(values, "number", "x", k / layers) for k in range(layers + 1)]
    assert found[0] == values[0] and math.isclose(found[-1], values[-1], abs_tol=1e-12)
    assert min(values) <= min(found) and max(found) <= max(values)


def test_the_first_rule_that_fits_decides():
    rules = [{"filter": "mlp", "value": 1}, {"filter": "up_proj", "value": 2}, {"filter": "*", "value": 3}]
    assert [evaluated(rules, "number", name, 0) for name in ("mlp.up_proj", "attn.up_proj", "norm")] == [1, 2, 3]
    assert evaluated(rules[:2], "number", "norm", 0) is None


def test_merges_of_one_file_come_after_those_they_use(tmp_path):
    last = LINEAR.replace("model: a", "model: second")
    text = f"{last}---\nname: second\n{LINEAR.replace('model: b', 'model: first')}---\nname: first\n{LINEAR}---\n"
    found = read(tmp_path, text)
    assert [config.name for config in found] == ["first", "second", ""]
    assert found[0].text.startswith("name: first") and "second" not in found[0].text
    assert found[0].place("models", 0)[1:] == (12, 10)


def test_two_merges_of_one_name_are_refused(tmp_path):
    assert "two merges are called 'x'" in refused(tmp_path, f"name: x\n{LINEAR}---\nname: x\n{LINEAR}")
    assert "two merges have no name" in refused(tmp_path, f"{LINEAR}---\n{LINEAR}")


def test_an_empty_file_is_no_config(tmp_path):
    assert "holds no config" in refused(tmp_path, "# nothing\n")


@pytest.mark.parametrize("more, said", [
    ("tokenizer: {source: union, pad_to_multiple_of: 0}", "'pad_to_multiple_of' is a whole number from 1"),
    ("tokenizer: {sauce: union}", "did you mean 'source'"),
    ("tokenizer: {tokens: {x: {source: {kind: zeros}}}}", "did you mean 'zero'"),
    ("tokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}", "either 'token' or 'token_id'"),
    ("tokenizer: union", "'tokenizer' is a mapping"), ("chat_template: chatlm", "did you mean 'chatml'"),
    ("dtype: 16", "'dtype' is text"), ("base_model: [a]", "a model is text"), ("layer_range: [0, "
                                                                               "1]", "each source of a slice")])
def test_every_level_is_checked(tmp_path, more, said):
    assert said in refused(tmp_path, LINEAR + more)


@pytest.mark.parametrize("setting, said", [
    ("[0.5, [1]]", "a list inside of a "
                   "list"), ("[{value: 1}, 2]", "mixes rules and values"), ("[{filter: x}]", "without 'value'"),
    ("{value: {value: 1}}", "rules inside of a rule"), ("", "has no value"), ("[{filter: 3, value: 1}]", "not text")])
def test_a_setting_of_another_form_is_refused(tmp_path, setting, said):
    assert said in refused(tmp_path, LINEAR.replace("weight: 1", f"weight: {setting}"))


def test_the_base_takes_part_in_a_method_that_ignores_bases_and_needs_a_weight(tmp_path):
    text = "merge_method: linear\nbase_model: z\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    assert refused(tmp_path, text).startswith("c.yaml:2:1: merge method 'linear' needs a 'weight' for 'z'")
    config, = read(tmp_path, text.replace("}}]", "}}, {model: z, parameters: {weight: 0}}]"))
    assert config.referenced() == [ModelRef("z"), ModelRef("a")]
