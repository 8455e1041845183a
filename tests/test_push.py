"""What goes to the hub is what was checked, names no place of this machine, and is read there as it was meant."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.repocard_data import model_index_to_eval_results

from glue.errors import RunError, ZooError
from glue.evaluate.statistics import average
from glue.files import append_line
from glue.hub import read_card
from glue.identity import identify
from glue.known import likeness, readme
from glue.member import FOLDER_NOTE, Member, Score, canonical
from glue.push import packed, push
from glue.recipe import read_recipe
from glue.reproduce import reproduce
from glue.run import run
from glue.workers import Workers
from glue.zoo import Zoo
from tests.fake_hub import TOKEN, fake_hub

COMMIT = "b" * 40
RECIPE = """\
seed: 3
steps:
  - {as: families, step: cluster, members: [llama, two, three], threshold: 0.0}
  - {as: merged, step: merge, members: [llama, two], method: linear}
  - {as: again, step: merge, members: [merged, three], method: {linear: {weight: {merged: 0.4, three: 0.6}}}}
  - {as: lora, step: lora, base: merged, data: {low: 1}, steps: 1, learning_rate: 0.01, rank: 2, batch_size: 2,
     targets: [q_proj]}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A zoo over a model of the hub, which lies in the cache, and two that were tuned from it; a recipe was run."""
    from tests.test_reproduce import model_folder

    place = tmp_path_factory.mktemp("home")
    cached = place / "cache" / "models--owner--llama" / "snapshots" / COMMIT
    cached.mkdir(parents=True)
    (cached.parent.parent / "refs").mkdir()
    (cached.parent.parent / "refs" / "main").write_text(COMMIT)
    for seed, folder in enumerate((cached, place / "two", place / "three")):
        model_folder(folder, seed)
    (cached / "README.md").write_text("---\nlicense: llama2\n---\n")
    (place / "low").mkdir()
    items = [canonical({"question": f"w{k} w4", "answer": "w5", "choices": ["w5", "w6"], "gold": 0}) for k in range(9)]
    (place / "low" / "train.jsonl").write_text("".join(item + "\n" for item in items))
    (place / "zoo.yaml").write_text(
        "members:\n  llama: {path: hub:owner/llama}\n  two: {path: two, base: llama, licence: llama2}\n"
        "  three: {path: three, base: llama, licence: llama2}\n  low: {path: low, kind: dataset, licence: mit}\n"
        "include: zoo/members.yaml\n")
    (place / "r.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch, Workers(0) as workers:
        patch.setattr(constants, "HF_HUB_CACHE", str(place / "cache"))
        run(read_recipe(place / "r.yaml"), Zoo(place / "zoo.yaml"), workers)
    return place


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """A copy of that zoo which a test may change."""
    copy = tmp_path / "home" / "me"
    shutil.copytree(made, copy, symlinks=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(copy / "cache"))
    return copy


@pytest.fixture
def zoo(place) -> Zoo:
    return Zoo(place / "zoo.yaml")


@pytest.fixture
def alone(monkeypatch) -> None:
    """Nothing may be connected to."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("something was connected to"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


def score(zoo: Zoo, name: str, task: str, results: tuple[float, ...], split: str = "s", suite: str = "t:test") -> None:
    one = Score(name, zoo.identified(zoo[name]).digest, suite, task, "acc", results, split + task, "{}", 0.25)
    append_line(zoo.folder / "scores.jsonl", canonical(one.as_dict()))


def text(parcel, name: str) -> str:
    content = next(one.content for one in parcel.files if one.name == name)
    return content.decode() if isinstance(content, bytes) else content.read_text()


# what would go

@pytest.mark.parametrize("name, kind, repo", [("r/merged", "model", "model"), ("r/lora", "adapter", "model"),
                                              ("low", "dataset", "dataset"), ("two", "model", "model")])
def test_what_would_go_is_told_without_network_or_token(name, kind, repo, zoo, alone):
    parcel = packed(zoo, name, "me/it")
    assert parcel.kind == repo and zoo[name].kind == kind
    for one in parcel.files:
        data = one.content if isinstance(one.content, bytes) else one.content.read_bytes()
        assert (one.size, one.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    told = "\n".join(parcel.lines())
    assert all(f"{one.sha256}  {one.size:>14,}  {one.name}" in told for one in parcel.files)
    assert "me/it" in told and "licence:" in told and "README.md" in told
    assert json.loads(json.dumps(parcel.as_data()))["bytes"] == sum(one.size for one in parcel.files)


def test_a_card_names_the_hub_ancestors_and_the_licence_of_what_went_in(zoo):
    parcel = packed(zoo, "r/merged", "me/it")
    assert parcel.said.base_model == ("owner/llama",) and parcel.said.licence == "llama2"
    assert "  licence: llama2" in parcel.lines() and "  base_model: owner/llama" in parcel.lines()
    card = ModelCard(readme(zoo, "r/again"))  # of products and local models, whose names lead nowhere on the hub
    assert card.data.base_model == ["owner/llama"] and card.data.base_model_relation == "merge"
    assert "| r/merged | - |" in card.text and "| three | - |" in card.text
    assert f"| [owner/llama](https://huggingface.co/owner/llama) | {COMMIT} |" in readme(zoo, "r/merged")


def test_nothing_that_goes_names_a_place_of_this_machine(zoo, place):
    for name in ("r/merged", "r/again", "r/lora", "two", "low"):
        parcel = packed(zoo, name, "me/it")
        for one in parcel.files:
            data = one.content if isinstance(one.content, bytes) else one.content.read_bytes()
            assert str(place).encode() not in data and b"/home/" not in data, one.name
    lora = packed(zoo, "r/lora", "me/it")
    assert json.loads(text(lora, "adapter_config.json"))["base_model_name_or_path"] == "r/merged"
    assert [one.why for one in lora.files if one.name == "adapter_config.json"] == ["without local paths"]
    assert any("its base r/merged is not on the hub" in remark for remark in lora.remarks)


@pytest.mark.parametrize("name", ["r/merged", "r/lora", "low"])
def test_what_goes_is_the_member_to_its_digest(name, zoo, tmp_path):
    for one in packed(zoo, name, "me/it").files:
        file = tmp_path / "got" / one.name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(one.content if isinstance(one.content, bytes) else one.content.read_bytes())
    own = Member(name, zoo[name].kind, str(tmp_path / "got"), base=zoo[name].base, digest=identify(tmp_path / "got")[1])
    assert zoo.with_base(own).digest == zoo.identified(zoo[name]).digest
    assert not (tmp_path / "got" / "README.md").read_text().startswith("# ")


def test_a_note_without_paths_still_makes_the_member_again(zoo, tmp_path):
    folder = zoo["r/merged"].folder
    note = json.loads((folder / FOLDER_NOTE).read_text())
    note["inputs"][0]["from"] = "/home/me/models/llama"
    (folder / FOLDER_NOTE).write_text(canonical(note))
    (folder / "kept.txt").write_text("see /home/me/notes.txt")
    parcel = packed(zoo, "r/merged", "me/it")
    assert text(parcel, "kept.txt") == "see notes.txt"
    assert json.loads(text(parcel, FOLDER_NOTE))["inputs"][0]["from"] == "llama"
    (tmp_path / "got").mkdir()
    for one in parcel.files:
        data = one.content if isinstance(one.content, bytes) else one.content.read_bytes()
        (tmp_path / "got" / one.name).write_bytes(data)
    with Workers(0) as workers:
        assert reproduce(str(tmp_path / "got"), zoo, workers).equal


# what must not go

@pytest.mark.parametrize("spoil, said", [
    (lambda folder: flip(folder / "model.safetensors"), "'r/merged' has changed: its digest is"),
    (lambda folder: (folder / "out").symlink_to(folder.parent), "is a link that leads elsewhere"),
    (lambda folder: (folder / "out.json").symlink_to(Path(os.devnull)), "is a link that leads elsewhere"),
    (lambda folder: (folder / "gone").symlink_to(folder / "nowhere"), "is a link that leads elsewhere"),
    (lambda folder: (folder / "training_args.bin").write_bytes(b""), "may hold a pickle"),
    (lambda folder: (folder / "state").write_bytes(pickle.dumps([1])), "may hold a pickle"),
    (lambda folder: torch.save([1], folder / "state"), "may hold a pickle"),
    (lambda folder: os.mkfifo(folder / "pipe"), "is no ordinary file"),
    (lambda folder: (folder / "run.py").write_text("open('/home/me/x')"), "names a path of this machine, /home/me/x"),
])
def test_what_is_not_the_member_or_could_harm_does_not_go(spoil, said, zoo, alone):
    spoil(zoo["r/merged"].folder)
    with pytest.raises(ZooError, match=said):
        packed(zoo, "r/merged", "me/it")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_path_in_what_a_member_computes_with_is_refused(zoo, place):
    file = place / "two" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "_name_or_path": "/home/me/models/llama"}))
    parcel = packed(zoo, "two", "me/it")
    assert json.loads(text(parcel, "config.json"))["_name_or_path"] == "llama"
    file.write_text(json.dumps({**config, "head": "/home/me/head"}))
    with pytest.raises(ZooError, match="config.json names a path of this machine, /home/me/head, where it is part of"):
        packed(Zoo(place / "zoo.yaml"), "two", "me/it")


@pytest.mark.parametrize("name, to, said", [
    ("r/families", "me/it", "'r/families' is a group"), ("llama", "me/it", "'llama' is on the hub already"),
    ("r/merged", "it", "does not say whose"), ("r/merged", "me/a b", "is no repository"),
    ("nobody", "me/it", "no member 'nobody'")])
def test_what_cannot_be_pushed_is_told(name, to, said, zoo, alone):
    with pytest.raises(ZooError, match=said):
        packed(zoo, name, to)


def test_hidden_files_and_journals_stay_here(zoo):
    folder = zoo["r/merged"].folder
    for name in (".env", "search.journal", "train.log"):
        (folder / name).write_text("secret")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.py").write_text("")
    names = {one.name for one in packed(zoo, "r/merged", "me/it").files}
    assert names == {"README.md", "config.json", "generation_config.json", FOLDER_NOTE, "model.safetensors",
                     "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("front, said", [
    ("", "it has no front matter"), ("---\nlicense: [1]\n---\n", "'license' is neither a word nor a list"),
    ("---\nlicense: other\n---\n", "needs a 'license_name'"),
    ("---\nbase_model: {a: 1}\n---\n", "'base_model' is neither"),
    ("---\nbase_model: /home/me/x\n---\n", "can be no id of the hub"), ("---\na: [\n---\n", "would not take this card"),
    ("---\nmodel-index: [{name: x}]\n---\n", "would not take this card")])
def test_a_card_that_the_hub_would_not_take_is_refused_here(front, said):
    with pytest.raises(ZooError, match=said):
        read_card(front + "# it\n", "model")


def test_a_card_that_people_wrote_goes_as_it_is_but_for_paths(zoo, place):
    (place / "two" / "README.md").write_text(f"---\nlicense: mit\n---\nmine, from {place}/two\n")
    assert text(packed(zoo, "two", "me/it"), "README.md") == "---\nlicense: mit\n---\nmine, from two\n"
    (place / "two" / "README.md").write_text("---\nbase_model: /home/me/llama\n---\nmine\n")
    with pytest.raises(ZooError, match="names a path of this machine: /home/me/llama"):
        packed(zoo, "two", "me/it")


# what a card says by now

def test_scores_are_told_with_intervals_and_read_by_the_hub(zoo):
    low, high = (1.0,) * 30 + (0.0,) * 10, (1.0,) * 18 + (0.0,) * 2
    score(zoo, "r/merged", "low", (0.0,) * 40)  # measured anew since
    score(zoo, "r/merged", "low", low)
    score(zoo, "r/merged", "high", high)
    score(zoo, "r/again", "low", (0.0,) * 40)  # another's
    card = ModelCard(readme(zoo, "r/merged"))
    name, found = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "r/merged" and {one.dataset_name: one.metric_value for one in found} == {
        "t:test high": 0.9, "t:test low": 0.75}
    for task, results in (("low", low), ("high", high)):
        value, below, above = average({task: results})
        cell = f"{value * 100:.1f} [{below * 100:.1f}, {above * 100:.1f}]"
        assert f"| t:test | {task} | acc | {cell} | 25 | {len(results)} |" in card.text
        one = next(one for one in found if one.dataset_name.endswith(task))
        assert one.metric_args == {"items": len(results), "low_95": round(below, 4), "high_95": round(above, 4)}
        assert one.metric_value - one.metric_args["low_95"] > 0.05
    value, below, above = average({"low": low, "high": high})
    cell = f"{value * 100:.1f} [{below * 100:.1f}, {above * 100:.1f}]"
    assert f"| t:test | **mean of tasks** | acc | {cell} | 25 | 60 |" in card.text
    assert card.data.license == "llama2" and read_card(str(card), "model").results == 2


def test_items_that_a_search_has_seen_are_marked_and_claim_nothing(zoo):
    from dataclasses import replace

    seen = zoo.add(replace(zoo["r/merged"], name="r/found", seen=frozenset({"slow"})))
    score(zoo, seen.name, "low", (1.0,) * 20)
    score(zoo, seen.name, "high", (1.0,) * 20)
    card = ModelCard(readme(zoo, "r/found"))
    assert "| t:test \\* | low |" in card.text and "| t:test | high |" in card.text and "say nothing" in card.text
    assert "| t:test \\* | **mean of tasks** |" in card.text
    assert [one.dataset_name for one in card.data.eval_results] == ["t:test high"]


def test_a_card_tells_the_lineage_and_how_alike_parents_are(zoo):
    card = readme(zoo, "r/merged")
    assert "r/merged  (model, merge/" in card and "├─ llama  (model, " in card
    note = json.loads((zoo["r/families"].folder / "similarity.json").read_text())
    cosine = note["cosine"]["all"][note["names"].index("llama")][note["names"].index("two")]
    assert f"| owner/llama | 1.0000 | {cosine:.4f} |" in card and "exact, as r/families compared all matrices" in card
    assert "### Similarity" not in readme(zoo, "r/again")  # nobody has compared these
    told = readme(zoo, "r/again", similarity=True)
    assert "exact, compared for this card" in told and "| three | 0." in told


def test_kept_sketches_tell_how_alike_parents_are_where_nobody_has_clustered(zoo, monkeypatch):
    from glue.cards import source
    from glue.near import near

    near(zoo, "r/merged", "three")
    models = [source(zoo.identified(zoo[name])) for name in ("r/merged", "three")]
    found = likeness(zoo, models)
    assert found is not None and found.how.startswith("estimated from samples, to within 0.")
    exact = likeness(zoo, [source(zoo.identified(zoo[name])) for name in ("llama", "two")])
    assert exact is not None and exact.how.startswith("exact")
    monkeypatch.setattr("glue.known._sketched", lambda *_: None)
    now = likeness(zoo, models, similarity=True)
    assert now is not None and found.cosines[0][1] == pytest.approx(now.cosines[0][1], abs=0.02)
    with pytest.raises(ZooError, match="9 models went in, and weights of at most 8"):
        many = [source(Member(f"m{k}", "model", "/x", digest=f"{k:032x}")) for k in range(9)]
        likeness(zoo, many, similarity=True)


def test_the_card_in_the_folder_is_no_part_of_the_member(zoo, place):
    file = zoo["r/merged"].folder / "README.md"
    before = identify(file.parent)[1]
    file.write_text("another")
    assert identify(file.parent)[1] == before == zoo["r/merged"].digest
    assert "another" not in readme(zoo, "r/merged")


# sending

def test_a_member_is_sent_in_one_commit_and_lies_there_byte_for_byte(zoo, monkeypatch):
    parcel = packed(zoo, "r/merged", "me/it")
    with fake_hub(monkeypatch) as hub:
        hub.private["models/me/it"] = False
        hub.branches["models/me/it", "main"] = {
            "model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "own.gguf": b"kept"}
        done = push(parcel, message="a word")
        assert done.removed == ("model-00001-of-00002.safetensors", "model.safetensors.index.json")
        assert done.url.startswith(f"{hub.url}/models/me/it/commit/main")
        files = hub.branches["models/me/it", "main"]
        assert {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != "own.gguf"} == {
            one.name: one.sha256 for one in parcel.files}
        assert hub.commits == [("models/me/it", "main", "a word", list(done.removed))]
        assert hub.tokens == {f"Bearer {TOKEN}"} and files["own.gguf"] == b"kept"


def test_datasets_go_to_datasets_private_ones_are_private_and_branches_are_made(zoo, monkeypatch):
    with fake_hub(monkeypatch) as hub:
        push(packed(zoo, "low", "me/data"), private=True, revision="trial")
        assert hub.private == {"datasets/me/data": True}
        assert set(hub.branches["datasets/me/data", "trial"]) == {".gitattributes", "README.md", "train.jsonl"}
        assert set(hub.branches["datasets/me/data", "main"]) == {".gitattributes"}
        version = zoo.identified(zoo["low"]).version
        assert hub.commits[0][:3] == ("datasets/me/data", "trial", f"{version}, with glue")


def test_nothing_private_is_sent_to_what_everybody_sees(zoo, monkeypatch):
    with fake_hub(monkeypatch) as hub:
        hub.private["models/me/open"] = False
        with pytest.raises(RunError, match="can be seen by everybody; nothing was sent"):
            push(packed(zoo, "two", "me/open"), private=True)
        assert not hub.commits and not hub.large


@pytest.mark.parametrize("status, said, fix", [(401, "does not know this token", "hf auth login"),
                                               (403, "may not write there", "a token that may write"),
                                               (500, "the hub answered 500", "try again")])
def test_what_the_hub_refuses_is_one_error_that_says_what_to_do(status, said, fix, zoo, monkeypatch):
    parcel = packed(zoo, "two", "me/it")
    with fake_hub(monkeypatch) as hub:
        hub.refuses = status
        with pytest.raises(RunError, match=f"me/it was not sent: .*{said}") as told:
            push(parcel)
        assert fix in str(told.value) and not hub.branches


def test_without_a_token_or_offline_nothing_is_asked(zoo, monkeypatch, tmp_path):
    parcel = packed(zoo, "two", "me/it")
    with fake_hub(monkeypatch) as hub:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(RunError, match="there is no token for the hub"):
            push(parcel)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(RunError, match="HF_HUB_OFFLINE is set"):
            push(parcel)
        assert hub.requests == []


def test_a_hub_that_cannot_be_reached_is_one_error(zoo, monkeypatch):
    parcel = packed(zoo, "two", "me/it")
    with fake_hub(monkeypatch):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
        with pytest.raises(RunError, match="me/it was not sent: .*") as told:
            push(parcel)
        assert "push again" in str(told.value)


def test_what_arrives_otherwise_than_it_was_checked_is_told(zoo, monkeypatch):
    parcel = packed(zoo, "two", "me/it")
    with fake_hub(monkeypatch) as hub:
        hub.spoils = lambda data: data[:-1] + b"!"
        with pytest.raises(RunError, match="does not hold what was checked: model.safetensors"):
            push(parcel)
        hub.spoils = bytes
        flip(zoo["two"].folder / "generation_config.json")  # written to after it was checked
        with pytest.raises(RunError, match="does not hold what was checked: generation_config.json"):
            push(parcel)
