"""Cards and notes of products: what the hub reads, by its own parser, and whom they name."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from glue.cards import card_of, licence_remark, licence_remarks, source, told, write_card
from glue.kinds.card import card_text
from glue.kinds.licence import agreed, licence_of
from glue.member import Member, Origin
from glue.plan import make_plan
from glue.recipe import read_recipe
from glue.zoo import Zoo

COMMIT = "a" * 40


def origin(step: str, **roles: list[Member]) -> Origin:
    return Origin(step, {role: tuple(one.digest for one in some) for role, some in roles.items()},
                  {"density": 0.5}, 3, {role: tuple(one.name for one in some) for role, some in roles.items()})


def model(name: str, digest: str, licence: str = "", kind: str = "model") -> Member:
    return Member(name, kind, f"/nowhere/{name}", digest=digest, licence=licence)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Member:
    """A model of the hub that is on this machine, with a card that says its licence."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / "models--owner--llama"
    for name, text in ((f"snapshots/{COMMIT}/config.json", "{}"), ("refs/main", COMMIT),
                       (f"snapshots/{COMMIT}/README.md", "---\nlicense: llama2\n---\n")):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    return Member("mine", "model", "hub:owner/llama", digest="c" * 32)


def test_a_member_of_the_hub_is_named_by_its_id_and_commit_and_its_own_licence(hub):
    found = source(hub)
    assert (found.name, found.hub, found.revision, found.licence) == ("owner/llama", True, COMMIT, "llama2")


def test_the_note_tells_each_input_once_with_all_its_roles(hub):
    other = model("other", "d" * 32, "mit")
    found = told(origin("merge/1", members=[hub, other], base=[hub]), [hub, other, hub])
    assert found == [
        {"name": "mine", "kind": "model", "roles": ["members", "base"], "digest": "c" * 32, "hub": "owner/llama",
         "revision": COMMIT, "licence": "llama2"},
        {"name": "other", "kind": "model", "roles": ["members"], "digest": "d" * 32, "hub": None, "revision": "",
         "licence": "mit"}]


@pytest.mark.parametrize("step, kind, relation, tag, loads", [
    ("merge", "model", "merge", "merge", "transformers"), ("search", "model", "merge", "merge", "transformers"),
    ("mix", "mixture", "merge", "moe", "transformers"), ("lora", "adapter", "adapter", "lora", "peft"),
    ("extract", "adapter", "adapter", "lora", "peft"), ("merge", "adapter", "merge", "merge", "peft"),
    ("tune", "model", "finetune", "glue", "transformers")])
def test_the_hub_reads_models_relation_tags_and_library(step, kind, relation, tag, loads):
    one, two = model("one", "1" * 32, "mit"), model("two", "2" * 32, "mit")
    data = model("asked", "3" * 32, "", "dataset")
    card = ModelCard(card_text(card_of("r/it", origin(f"{step}/1", members=[one, two], suite=[data]),
                                       [one, two, data], "said", kind)))
    assert card.data.base_model == ["one", "two"] and card.data.base_model_relation == relation
    assert tag in card.data.tags and card.data.library_name == loads and card.data.license == "mit"
    assert "| asked | - | " + "3" * 32 in card.text and '"density": 0.5' in card.text and "seed 3" in card.text


def test_a_licence_is_not_claimed_where_parents_differ_and_data_has_no_say():
    one, two, data = model("one", "1" * 32, "mit"), model("two", "2" * 32, "llama2"), \
        model("asked", "3" * 32, "cc0-1.0", "dataset")
    made = origin("merge/1", members=[one, two], suite=[data])
    assert ModelCard(card_text(card_of("m", made, [one, two, data], "", "model"))).data.license is None
    assert ModelCard(card_text(card_of("m", made, [one, data], "", "model"))).data.license == "mit"


def test_a_model_made_from_data_alone_names_no_base():
    data = model("asked", "3" * 32, "", "dataset")
    card = ModelCard(card_text(card_of("m", origin("pretrain/1", data=[data]), [data], "said", "model")))
    assert card.data.base_model is None and "### Models" not in card.text and "## Training Details" in card.text


def test_a_card_that_a_config_has_left_is_kept(tmp_path: Path):
    one = model("one", "1" * 32)
    (tmp_path / "README.md").write_text("its own")
    (tmp_path / "mergekit_config.yml").write_text("merge_method: linear")
    write_card(tmp_path, "m", origin("mergekit/1", config=[one]), [one], "", "model")
    assert (tmp_path / "README.md").read_text() == "its own"
    (tmp_path / "mergekit_config.yml").unlink()
    write_card(tmp_path, "m", origin("merge/1", members=[one]), [one], "", "model")
    assert "# m\n" in (tmp_path / "README.md").read_text()


def test_licences_that_each_bind_the_result_are_remarked_with_their_owners(hub):
    free, bound = model("free", "1" * 32, "apache-2.0"), model("bound", "2" * 32, "gemma")
    assert licence_remark("m", [hub, free, hub]) == licence_remark("m", [bound, free]) == ""
    assert licence_remark("m", [hub, model("unsaid", "4" * 32)]) == ""
    product = model("product", "3" * 32, "gemma, mit")
    told = licence_remark("m", [hub, free, bound, product])
    assert told.startswith("m: licences gemma (bound, product) and llama2 (owner/llama) bind")


@pytest.mark.parametrize("one, two, clash", [
    ("llama2", "apache-2.0", ""), ("llama2", "mit", ""), ("apache-2.0", "MIT", ""), ("llama2", "Llama2", ""),
    ("llama2", "llama3", "llama2 (one) and llama3 (two)"), ("llama2", "gpl-3.0", "gpl-3.0 (two) and llama2 (one)"),
    ("cc-by-nc-4.0", "apache-2.0", ""), ("cc-by-nc-4.0", "llama2", "cc-by-nc-4.0 (one) and llama2 (two)"),
    ("cc-by-4.0", "gpl-3.0", ""), ("gpl-2.0", "gpl-3.0", "gpl-2.0 (one) and gpl-3.0 (two)"),
    ("cc-by-nc-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0 (one) and cc-by-sa-4.0 (two)"),
    ("other", "other", "other (one, two)"), ("other", "mit", ""), ("other", "gemma", "gemma (two) and other (one)"),
    ("qwen-research", "qwen-research", ""), ("qwen-research", "llama2", "llama2 (two) and qwen-research (one)"),
    ("llama2", "", ""), ("gemma, llama2", "mit", "gemma (one) and llama2 (one)"),
    ("gemma, mit", "gemma", ""), ("gemma, mit", "llama2, mit", "gemma (one) and llama2 (two)")])
def test_licences_are_remarked_where_two_bind_in_any_order(one, two, clash):
    def said(first: str, second: str) -> str:
        return licence_remark("m", [model("one", "1" * 32, first), model("two", "2" * 32, second)])

    told = said(one, two)
    assert told.startswith(f"m: licences {clash} bind") if clash else told == ""
    assert bool(said(two, one)) == bool(clash)


def test_a_licence_without_a_word_of_the_hub_goes_by_its_own_name(tmp_path):
    front = '---\nlicense: other\nlicense_name: "qwen-research"\n---\n'
    (tmp_path / "README.md").write_text(front)
    assert licence_of(tmp_path) == "qwen-research"
    (tmp_path / "README.md").write_text("---\nlicense: Other\n---\n")
    assert licence_of(tmp_path) == "Other"
    both = [model("one", "1" * 32, "qwen-research"), model("two", "2" * 32, "qwen-research")]
    card = ModelCard(card_text(card_of("m", origin("merge/1", members=both), both, "", "model")))
    assert (card.data.license, card.data.license_name) == ("other", "qwen-research")
    assert agreed(["Apache-2.0", "apache-2.0"]) == "apache-2.0"
    assert agreed(["other", "other"]) == agreed(["unknown", "unknown"]) == ""  # which may be two


LICENSED = """\
members:
  meta: {path: meta, licence: llama2}
  ours: {path: ours, licence: apache-2.0}
  google: {path: google, licence: gemma}
  asked: {path: asked, kind: dataset, licence: cc-by-nc-4.0}
"""
STEPS = """\
steps:
  - {as: fine, step: merge, members: [meta, ours], method: linear}
  - {as: bad, step: merge, members: [meta, google], method: linear}
  - {as: later, step: merge, members: [bad, ours], method: linear}
  - {as: across, step: merge, members: [fine, google], method: linear}
  - {as: after, step: merge, members: [across, bad], method: linear}
  - {as: taught, step: tune, base: meta, data: {asked: 1}, steps: 1, learning_rate: 0.1}
  - {as: families, step: cluster, members: [meta, ours, google], threshold: 0.5}
  - {as: each, step: merge, each: families, method: linear}
"""


def test_a_plan_tells_of_licences_once_where_they_come_together(tmp_path, model_folder):
    for seed, name in enumerate(("meta", "ours", "google")):
        model_folder(name, seed=seed)
    (tmp_path / "asked").mkdir()
    (tmp_path / "asked" / "train.jsonl").write_text("{}\n")
    (tmp_path / "zoo.yaml").write_text(LICENSED)
    (tmp_path / "r.yaml").write_text(STEPS)
    plan = make_plan(read_recipe(tmp_path / "r.yaml"), Zoo(tmp_path / "zoo.yaml"))
    told = licence_remarks(plan)
    assert told[0].startswith("r/bad: licences gemma (google) and llama2 (meta) bind")
    assert told[1].startswith("r/across: licences gemma (google) and llama2 (meta) bind")
    assert len(told) == 2  # no data, no group of what is apart in it, and nothing that is made of what was told
