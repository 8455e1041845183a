"""What stands beside merged weights, read by the libraries that will read it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from glue.errors import MethodError, ZooError
from glue.kinds.card import Card, Source, card_text
from glue.kinds.furnish import changed, furnish, template_of, template_text
from glue.kinds.licence import agreed, licence_of

CARD = Card("merged", "linear", (Source("owner/a", hub=True, revision="abc", digest="1f", licence="mit"),
                                 Source("b", digest="2e", licence="mit")), config="merge_method: linear\n")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def merged(tiny, tmp_path):
    """A donor, and a folder that holds weights of its shape and nothing else."""
    donor = tiny("donor", seed=1).folder
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copy(donor / "model.safetensors", folder)
    return donor, folder


def test_a_furnished_folder_is_a_model_to_transformers(merged):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    donor, folder = merged
    (donor / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.6}')  # which transformers
    furnish(folder, donor, CARD)  # would refuse to write again, since it says nothing of sampling
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        ours, theirs = (AutoModelForCausalLM.from_pretrained(place)(ids).logits for place in (folder, donor))
    assert torch.equal(ours, theirs)
    assert AutoTokenizer.from_pretrained(folder)("w5 w9").input_ids == [1, 5, 9]
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2


def test_the_tokenizer_is_copied_byte_for_byte(merged):
    donor, folder = merged
    (donor / "tokenizer.model").write_bytes(b"\x0a\x0e\x00\xff")
    (donor / "tokenizer_config.json").write_text((donor / "tokenizer_config.json").read_text() + "  \n")
    (donor / "additional_chat_templates").mkdir()
    (donor / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (donor / "preprocessor_config.json").write_text("{}")
    (donor / "modeling_own.py").write_text("raise SystemExit")
    furnish(folder, donor, CARD)
    same = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "preprocessor_config.json",
            "additional_chat_templates/tool_use.jinja"]
    assert [(folder / name).read_bytes() for name in same] == [(donor / name).read_bytes() for name in same]
    assert not (folder / "modeling_own.py").exists()


def test_files_have_the_mode_that_the_umask_gives(merged):
    donor, folder = merged
    before = os.umask(0o027)
    try:
        (folder / "model.safetensors").chmod(0o600)
        furnish(folder, donor, CARD)
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {"0o640"}
    assert not [file.name for file in folder.iterdir() if file.name.startswith(".")]


def test_furnishing_twice_is_furnishing_once(merged):
    donor, folder = merged
    how = {"changes": {"dtype": "bfloat16"}, "layers": {"num_hidden_layers": [0, 1, 1]}, "chat_template": "chatml"}
    furnish(folder, donor, CARD, **how)
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    furnish(folder, donor, CARD, **how)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first


# --- config.json ------------------------------------------------------------------------------------------------------

def test_a_type_is_said_wherever_one_is_named():
    new = {"dtype": "float32", "text_config": {"torch_dtype": "float32"}, "quantization_config": {"dtype": "int8"}}
    assert changed(new, {"dtype": "bfloat16"}) == {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16"},
                                                   "quantization_config": {"dtype": "int8"}}
    assert changed({"torch_dtype": "float16"}, {"dtype": "torch.float32"}) == {"torch_dtype": "float32"}
    assert changed({}, {"dtype": "bfloat16"}) == {"torch_dtype": "bfloat16"}


def test_stacked_layers_keep_what_is_said_of_each_of_them():
    told = {"text_config": {"num_hidden_layers": 2, "layer_types": ["full", "sliding"], "heads": [8, 8]}}
    stacked = changed(told, {"text_config.vocab_size": 40}, {"text_config.num_hidden_layers": [0, 1, 1]})
    assert stacked == {"text_config": {"num_hidden_layers": 3, "layer_types": ["full", "sliding", "sliding"],
                                       "heads": [8, 8], "vocab_size": 40}}
    assert told["text_config"]["num_hidden_layers"] == 2
    with pytest.raises(ZooError, match="no mapping 'text_config'"):
        changed({}, {"text_config.vocab_size": 40})


def test_a_stack_of_sliding_layers_loads(tmp_path):
    from transformers import AutoConfig, Qwen3Config

    donor, folder = tmp_path / "donor", tmp_path / "out"
    layers = ["sliding_attention", "full_attention"]
    sliding = {"sliding_window": 8, "use_sliding_window": True}
    Qwen3Config(num_hidden_layers=2, layer_types=layers, **sliding).save_pretrained(donor)
    folder.mkdir()
    furnish(folder, donor, CARD, layers={"num_hidden_layers": [0, 1, 0, 1, 1]})
    told = AutoConfig.from_pretrained(folder)
    assert told.layer_types == [*layers, *layers, "full_attention"] and told.num_hidden_layers == 5


def test_code_and_paths_of_the_donor_are_forgotten():
    told = {"_name_or_path": "/home/me/a", "auto_map": {"AutoConfig": "../../evil.Config", "AutoModel": "o/r--m.Model"}}
    assert changed(told, {}) == {"auto_map": {"AutoModel": "o/r--m.Model"}}


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 1', "[" * 5000])
def test_a_configuration_that_is_none_is_a_clear_error(merged, text):
    donor, folder = merged
    (donor / "config.json").write_text(text)
    with pytest.raises(ZooError, match="config.json is not"):
        furnish(folder, donor, CARD)
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]


# --- chat templates ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("said", ["chatml", TEMPLATE])
def test_transformers_reads_the_chat_template_that_was_asked_for(merged, said):
    from transformers import AutoTokenizer

    donor, folder = merged
    (donor / "chat_template.jinja").write_text("the donor's {{ own }}")
    (donor / "chat_template.json").write_text('{"chat_template": "older"}')
    furnish(folder, donor, CARD, chat_template=said)
    read = AutoTokenizer.from_pretrained(folder)
    told = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert read.chat_template == told == template_text(said)
    assert template_of(folder) == told.strip()
    assert "w7" in read.apply_chat_template([{"role": "user", "content": "w7"}], tokenize=False)
    assert not (folder / "chat_template.json").exists()


@pytest.mark.parametrize("name,begins", [("chatml", "<|im_start|>user"), ("llama3", "<|start_header_id|>user"),
                                         ("alpaca", "### Instruction"), ("exaone", "[|system|]"),
                                         ("mistral", "[INST]")])
def test_the_five_templates_that_mergekit_has_are_known_by_name(name, begins):
    from jinja2.sandbox import SandboxedEnvironment

    words = {"messages": [{"role": "user", "content": "w7"}], "bos_token": "", "eos_token": ""}
    said = SandboxedEnvironment().from_string(template_text(name)).render(words).strip()
    assert said.startswith(begins) and "w7" in said


def test_auto_is_what_most_members_have_and_the_first_where_it_is_a_tie(tmp_path):
    told = {"a": "{{ one }}", "b": "{{ two }}", "c": " {{ two }}\n", "d": None}
    for name, text in told.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"chat_template": text} if text else {}))
    a, b, c, d = (tmp_path / name for name in told)
    assert template_text("auto", [a, b, c, d]) == "{{ two }}"
    assert template_text("auto", [d, a, b]) == "{{ one }}" and template_text("auto", [b, a]) == "{{ two }}"
    assert template_text("auto", [d]) is None and template_text(None, [a]) is None
    named = [{"name": "tool_use", "template": "{{ t }}"}, {"name": "default", "template": "{{ three }}"}]
    (d / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert template_of(d) == "{{ three }}"
    (d / "chat_template.jinja").write_text("{{ four }}")  # which comes first, as in transformers
    assert template_of(d) == "{{ four }}"


def test_a_word_that_is_no_template_suggests_the_nearest(merged):
    donor, folder = merged
    with pytest.raises(MethodError, match="'chatlm' is no chat template; did you mean 'chatml'"):
        furnish(folder, donor, CARD, chat_template="chatlm")
    (donor / "tokenizer_config.json").unlink()
    with pytest.raises(MethodError, match="has no tokenizer_config.json"):
        furnish(folder, donor, CARD, chat_template="chatml")
    assert [file.name for file in folder.iterdir()] == ["model.safetensors"]


# --- the card ---------------------------------------------------------------------------------------------------------

def test_the_hub_reads_the_card(merged):
    from huggingface_hub import ModelCard

    donor, folder = merged
    furnish(folder, donor, CARD)
    card = ModelCard((folder / "README.md").read_text())
    told = card.data.to_dict()
    assert told == {"base_model": ["owner/a", "b"], "library_name": "transformers", "license": "mit",
                    "tags": ["mergekit", "merge"]}
    for part in ("[owner/a](https://huggingface.co/owner/a) | abc | 1f | mit", "| b | - | 2e | mit",
                 "linear, with seed 0", "merge_method: linear", "### Merge Method", "### Models Merged",
                 "### Configuration", "glue merge mergekit_config.yml out"):
        assert part in card.text
    assert (folder / "mergekit_config.yml").read_text() == CARD.config


def test_nothing_breaks_out_of_its_place_in_a_card():
    from huggingface_hub import ModelCard

    name = 'a"\n- evil\n---\n<script>|`x`'
    card = ModelCard(card_text(Card(name, "ties", (Source(name), Source("no id", hub=True)), "# ```\n````\n# out\n")))
    assert card.data.base_model == ['a"\\n- evil\\n---\\n<script>|`x`', "no id"]
    assert card.data.tags == ["mergekit", "merge"]
    assert "\n# out\n`````\n" in card.text and "\n`````yaml\n# ```\n" in card.text
    assert "<script>" not in card.text.replace("\\<script\\>", "") and "](https" not in card.text


def test_a_base_is_told_apart_and_named_once():
    base = Source("owner/base", hub=True)
    text = card_text(Card("m", "ties", (base, Source("x")), "a: 1", base=base))
    assert text.count('- "owner/base"') == 1 and "(base)" in text and "over the base [owner/base]" in text


def test_a_licence_is_claimed_only_where_all_models_have_it(tmp_path):
    assert agreed(["mit", "mit"]) == "mit"
    assert agreed(["mit", ""]) == agreed(["mit", "llama2"]) == agreed(["evil: [", "evil: ["]) == ""
    for text, licence in [("---\nlicense: llama2\ntags: [a]\n---\nlicense: mit", "llama2"),
                          ('---\r\nlicense: "apache-2.0" \r\n---\r\n', "apache-2.0"),
                          ("license: mit", ""), ("---\nlicense: [a, b]\n---\n", ""),
                          ("---\na: 1\n---\nlicense: mit", "")]:
        (tmp_path / "README.md").write_bytes(text.encode())
        assert licence_of(tmp_path) == licence
    assert licence_of(Path(tmp_path / "none")) == ""
