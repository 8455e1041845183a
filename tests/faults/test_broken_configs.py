"""Broken merge configs: each is refused with its file and line, in a few lines, before anything is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from glue.checkpoint import Header, InMemory
from glue.errors import GlueError, Mistakes, RecipeError
from glue.merge.mergekit.config import read_configs
from glue.merge.mergekit.nouns import ModelRef
from glue.merge.mergekit.targets import Model, planned
from glue.writer import Writer

LINEAR = ("merge_method: linear\nmodels:\n- model: a\n  parameters:\n    weight: 0.5\n"
          "- model: b\n  parameters:\n    weight: 0.5\n")
TIES = "merge_method: ties\nbase_model: z\nmodels:\n- model: a\n  parameters:\n    weight: 1\n    density: 0.5\n"
SLICES = "merge_method: passthrough\nslices:\n- sources:\n  - model: a\n    layer_range: [0, 2]\n"
SLERP = "merge_method: slerp\nbase_model: a\nmodels:\n- model: b\nparameters:\n  t: 0.5\n"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12))


class Broken(NamedTuple):
    """A config, the line that its error names, and a word that it says."""

    text: str
    line: int
    said: str


BROKEN = {
    "a key misspelt": Broken(LINEAR.replace("models:", "modelz:"), 2, "did you mean 'models'"),
    "a method misspelt": Broken(LINEAR.replace("linear", "liner"), 1, "did you mean 'linear'"),
    "no method": Broken("models:\n- model: a\n", 1, "merge_method"),
    "a parameter misspelt": Broken(TIES.replace("density", "densty"), 7, "did you mean 'density'"),
    "a parameter one level too "
    "shallow": Broken(LINEAR.replace("  parameters:\n    weight: 0.5\n- model: b", "  weight: 0.5\n"
                                                               "- model: b"), 4, "parameters: {weight: ...}"),
    "a share above one": Broken(TIES.replace("0.5", "1.5"), 7, "less than or equal to 1"),
    "a share of nothing": Broken(TIES.replace("0.5", "[0.5, 0]"), 7, "greater than 0"),
    "a weight that is no number": Broken(LINEAR.replace("weight: 0.5", "weight: .nan", 1), 5, "finite"),
    "a weight without end": Broken(LINEAR.replace("weight: 0.5", "weight: .inf", 1), 5, "finite"),
    "a weight in words": Broken(LINEAR.replace("weight: 0.5", "weight: half", 1), 5, "'half' is not a number"),
    "a switch that is no switch": Broken(TIES + "parameters:\n  normalize: maybe\n", 9, "true or false"),
    "t beyond the second model": Broken(SLERP.replace("0.5", "1.5"), 6, "less than or equal to 1"),
    "a key twice": Broken(LINEAR + "merge_method: ties\n", 9, "stands twice"),
    "indentation that does not "
    "fit": Broken("merge_method: linear\nmodels:\n  - model: a\n - model: b\n", 4, "not YAML"),
    "a tab": Broken("merge_method: linear\nmodels:\n\t- model: a\n", 3, "not YAML"),
    "no model in a list": Broken("merge_method: linear\nmodels: []\n", 2, "at least one"),
    "a model without a name": Broken(LINEAR.replace("model: b", "model:"), 6, "a model is missing"),
    "a model that is not there": Broken(LINEAR.replace("model: b", "model: nobody"), 6, "nobody"),
    "a model twice": Broken(LINEAR.replace("model: b", "model: a"), 6, "listed twice"),
    "too many models for slerp": Broken(SLERP.replace("- model: b", "- model: b\n- model: z"), 3, "exactly 2 models"),
    "slerp without t": Broken(SLERP.split("parameters")[0], 1, "needs the parameter 't'"),
    "a model without weight": Broken(LINEAR.rsplit("  parameters", 1)[0], 6, "needs a 'weight' for 'b'"),
    "no base": Broken(TIES.replace("base_model: z\n", ""), 1, "base_model"),
    "both models and slices": Broken(SLICES + "models:\n- model: b\n", 6, "exactly one of"),
    "layers backwards": Broken(SLICES.replace("[0, 2]", "[2, 0]"), 5, "layer_range"),
    "half a layer": Broken(SLICES.replace("[0, 2]", "[0, 1.5]"), 5, "whole numbers"),
    "more layers than there are": Broken(SLICES.replace("[0, 2]", "[0, 9]"), 5, "has 2 layers"),
    "sources of unlike "
    "length": Broken(SLICES.replace("passthrough", "linear").replace("[0, 2]", "[0, 2]\n  - model: b\n    "
                                       "layer_range: [0, 1]"), 7, "as many layers"),
    "rules that leave a tensor "
    "out": Broken(SLERP.replace("0.5", "[{filter: mlp, value: 0.5}]"), 6, "no rule of it fits"),
    "weights that cancel": Broken(LINEAR.replace("weight: 0.5", "weight: -0.5", 1), 5, "sum to 0"),
    "a type misspelt": Broken(LINEAR + "dtype: bfloat\n", 9, "did you mean 'bfloat16'"),
    "two tokenizers": Broken(LINEAR + "tokenizer_source: base\ntokenizer: {source: union}\n", 9, "both given"),
    "a bomb": Broken(LINEAR + BOMB, 9, "without end"),
    "a tag of python": Broken(LINEAR.replace("model: a", "model: !!python/object/apply:os.system "
                                                         "[ls]"), 3, "not allowed"),
    "a merge key": Broken("x: &x {weight: 1}\nmerge_method: linear\nmodels:\n- {model: a, parameters: {<<: "
                          "*x}}\n", 4, "'<<'"),
    "a rule with another word": Broken(SLERP.replace("0.5", "\n  - {pattern: mlp, value: 0.5}"), 7, "'pattern'"),
    "words after the end": Broken(LINEAR + "]\n", 9, "not YAML"),
    "vocabularies of two sizes": Broken(LINEAR.replace("model: b", "model: longer"), 6, "tokenizer: {source: union}"),
    "models of two shapes": Broken(LINEAR.replace("model: b", "model: wide"), 6, "shape"),
    "merges in a circle": Broken(f"name: b\n{LINEAR}---\nname: c\n{LINEAR.replace('model: b', 'model: c')}", 1,
                                 "circle"),
}
SHAPES = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,), **{
    f"model.layers.{k}.{name}.weight": (4, 4) for k in range(2) for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.gate_proj",
        "mlp.down_proj", "input_layernorm", "post_attention_layernorm")}}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "vocab_size": 8,
          "hidden_size": 4, "num_attention_heads": 1, "intermediate_size": 4, "tie_word_embeddings": True}


MODELS = ("a", "b", "z", "longer", "wide")


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    def shape_of(word: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        if name == "longer" and "embed" in word:
            return shape[0] + 2, *shape[1:]
        return (*shape[:-1], 6) if name == "wide" else shape

    return {word: shape_of(word, shape) for word, shape in SHAPES.items()}


def opened(ref: ModelRef) -> Model:
    if ref.path not in MODELS:
        raise GlueError(f"there is no model '{ref.path}'")
    tensors = {word: torch.ones(shape) for word, shape in shapes_of(ref.path).items()}
    return Model(ref, ref.path, InMemory(tensors), CONFIG)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """The same models as folders."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in MODELS:
        (folder / name).mkdir()
        shapes = shapes_of(name)
        with Writer(folder / name, {word: Header(torch.float32, shape) for word, shape in shapes.items()}) as writer:
            for word, shape in shapes.items():
                writer.write(word, torch.ones(shape))
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_config_is_refused_with_its_line(tmp_path: Path, name: str):
    text, line, said = BROKEN[name]
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(GlueError) as caught:
        for config in read_configs(file):
            planned(config, opened)
    shown = str(caught.value)
    assert f"{file}:{line}:" in shown and said in shown, shown
    assert len(shown.splitlines()) <= 8


@pytest.mark.parametrize("name", BROKEN)
def test_the_command_line_ends_with_2_and_makes_nothing(shelf: Path, monkeypatch, capsys, name: str):
    from glue.cli import main

    text, line, said = BROKEN[name]
    (shelf / "broken.yaml").write_text(text)
    before = sorted(shelf.iterdir())
    monkeypatch.chdir(shelf)
    monkeypatch.setattr("sys.argv", ["glue", "merge", "broken.yaml", "out"])
    with pytest.raises(SystemExit) as caught:
        main()
    shown = capsys.readouterr().err
    assert caught.value.code == 2
    assert f"broken.yaml:{line}:" in shown and said in shown, shown
    assert len(shown.splitlines()) <= 8 and "Traceback" not in shown
    assert sorted(shelf.iterdir()) == before


def test_there_are_enough_of_them():
    assert len(BROKEN) >= 30


def test_of_many_mistakes_eight_lines_are_shown_and_the_rest_is_counted(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(LINEAR + "".join(f"word{k}: 1\n" for k in range(20)))
    with pytest.raises(Mistakes) as caught:
        read_configs(tmp_path / "c.yaml")
    assert len(str(caught.value).splitlines()) == 8 and "13 more mistakes" in str(caught.value)
    assert len(caught.value.errors) == 20 and {type(error) for error in caught.value.errors} == {RecipeError}
