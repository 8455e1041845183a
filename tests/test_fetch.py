"""What members need comes from the hub once, whole and undamaged; what cannot come is told with what to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import LlamaForCausalLM

from glue import fetch
from glue.care import verified
from glue.checkpoint import Checkpoint
from glue.cli_zoo import brought
from glue.errors import GlueError, NotHere, RunError, Unreachable, ZooError
from glue.fetch import asked, check_room, fetched, looked_up
from glue.hub import address, locate
from glue.identity import identify
from glue.kinds import load
from glue.lineage import lineage
from glue.member import FOLDER_NOTE, Member
from glue.orders import Settings, orders
from glue.plan import make_plan
from glue.recipe import read_recipe
from glue.run import run
from glue.show.plans import print_plan
from glue.show.zoo import print_member
from glue.snapshot import needed, refuse_strange, whole
from glue.workers import Workers
from glue.zoo import Zoo
from tests.fake_hub import Hub, fake_hub
from tests.test_reproduce import model_folder

ROOT = Path(__file__).parents[1]
CUT = constants.DOWNLOAD_CHUNK_SIZE  # bytes that the library takes from the network before it writes them down
ZOO = """\
members:
  llama: {path: hub:owner/llama, tags: [far]}
  two: {path: hub:owner/two, tags: [far]}
include: zoo/members.yaml
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def hub(cache, monkeypatch) -> Iterator[Hub]:
    with fake_hub(monkeypatch) as found:
        yield found


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """Two models as repositories hold them: one in a file, with pickles and code beside it, one in shards."""
    place = tmp_path_factory.mktemp("models")
    model_folder(place / "one", 0)
    sharded = model_folder(place / "other", 1)
    shutil.rmtree(place / "other")
    sharded.save_pretrained(place / "other", max_shard_size="8KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(place / "one" / name, place / "other" / name)
    one, other = contents(place / "one"), contents(place / "other")
    assert sum(name.endswith(".safetensors") for name in other) > 2
    return {"one": {**one, **EXTRA}, "other": other}


EXTRA = {"pytorch_model.bin": b"\x80\x02", "consolidated.00.pth": b"PK", "model.gguf": b"G", "tf_model.h5": b"h",
         "flax_model.msgpack": b"f", "modeling_own.py": b"import os", "onnx/model.onnx": b"o",
         "onnx/config.json": b"{}", "pytorch_model.bin.index.json": b"{}", ".gitattributes": b"", "picture.png": b"p",
         "README.md": b"---\nlicense: mit\n---\nit\n", "LICENSE": b"MIT", "chat_template.jinja": b"{{ x }}",
         "consolidated.safetensors": b"twice", "USE_POLICY.md": b"be kind"}
TAKEN = {"README.md", "LICENSE", "chat_template.jinja", "USE_POLICY.md", "config.json", "generation_config.json",
         "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def bring(*words: str, zoo: Zoo | None = None, kind: str = "model") -> list[fetch.Bundle]:
    bundles = looked_up(asked(words, lambda: zoo, kind))  # type: ignore[arg-type,return-value]
    fetched(bundles)
    return bundles


def surroundings(hub: Hub, cache: Path) -> dict[str, str]:
    """Of a process that asks this hub; patient, since the machine may be busy."""
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "0",
            "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "120",
            "HF_HUB_ETAG_TIMEOUT": "120"}


def snapshot(cache: Path, name: str, commit: str, kind: str = "models") -> Path:
    return cache / f"{kind}--{name.replace('/', '--')}" / "snapshots" / commit


# what comes

def test_fetched_members_load_and_merge_by_their_hub_paths_and_nothing_is_sent_twice(tmp_path, hub, cache, models):
    commit, second = hub.hold("owner/llama", models["one"]), hub.hold("owner/two", models["other"])
    (tmp_path / "zoo.yaml").write_text(ZOO)
    zoo = Zoo(tmp_path / "zoo.yaml")
    first, other = bring("tag:far", zoo=zoo)
    assert (first.listing.commit, other.listing.commit) == (commit, second)
    assert first.pin == f"hub:owner/llama@{commit}" and first.asked.names == ("llama",)
    for name, held in (("llama", "one"), ("two", "other")):
        folder = locate(zoo[name].path)
        sent = {key: data for key, data in models[held].items() if key in TAKEN or held == "other"}
        assert contents(folder) == sent
        assert identify(folder)[1] == zoo.identified(zoo[name]).digest
    tokens = torch.tensor([[1, 5, 9, 7]])
    with torch.inference_mode():
        said = load(zoo["two"]).model(tokens).logits
        own = LlamaForCausalLM.from_pretrained(locate("hub:owner/two"), dtype=torch.float32).eval()(tokens).logits
    assert torch.equal(said, own)
    (tmp_path / "r.yaml").write_text("steps: [{as: both, step: merge, members: [llama, two], method: linear}]\n")
    made = run(read_recipe(tmp_path / "r.yaml"), zoo, Workers(0))["both"]
    one, two, both = (Checkpoint(folder) for folder in (locate(zoo["llama"].path), locate(zoo["two"].path),
                                                       made.folder))
    for name in both:
        assert torch.allclose(both[name], (one[name] + two[name]) / 2, atol=1e-7)
    before = len(hub.sent)
    assert [one.coming for one in bring("llama", "two", zoo=zoo)] == [0, 0] and len(hub.sent) == before


def test_what_went_in_is_recorded_with_its_commit(tmp_path, hub, cache, models):
    commit = hub.hold("owner/llama", models["one"])
    hub.hold("owner/two", models["other"])
    (tmp_path / "zoo.yaml").write_text(ZOO)
    zoo = Zoo(tmp_path / "zoo.yaml")
    bring("llama", "two", zoo=zoo)
    (tmp_path / "r.yaml").write_text("steps: [{as: both, step: merge, members: [llama, two], method: linear}]\n")
    made = run(read_recipe(tmp_path / "r.yaml"), zoo, Workers(0))["both"]
    told = json.loads((made.folder / FOLDER_NOTE).read_text())["inputs"]
    assert {one["name"]: one["revision"] for one in told}["llama"] == commit
    assert commit in (made.folder / "README.md").read_text()
    tree = lineage(zoo, "r/both")
    assert {one.name: one.hub for one in tree}["llama"] == f"owner/llama@{commit}"
    assert any(f"owner/llama at {commit[:12]}" in line for line in tree.lines())


def test_pickles_code_and_second_sets_of_weights_are_not_fetched(hub, cache, models):
    commit = hub.hold("owner/llama", models["one"])
    bring("hub:owner/llama")
    assert set(contents(snapshot(cache, "owner/llama", commit))) == TAKEN
    assert {file for file, _, _ in hub.sent} == TAKEN


@pytest.mark.parametrize("names, kind, want", [
    ({"model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"}, "model",
     {"model.safetensors"}),
    ({"adapter_model.safetensors", "model.safetensors.index.json", "adapter_config.json"}, "adapter",
     {"adapter_model.safetensors", "adapter_config.json"}),
    ({"glue.json", "model.safetensors", "gates.safetensors", "x.bin"}, "mixture",
     {"glue.json", "model.safetensors", "gates.safetensors"}),
    ({"config.json", "experts/a/model.safetensors", "experts/a/config.json", "experts/a/x.py", "other/config.json"},
     "mixture", {"config.json", "experts/a/model.safetensors", "experts/a/config.json"}),
    ({"data/train.parquet", "a.csv", "README.md", "x/state.json", "x/d.arrow", "d.arrow", ".x/y.json",
      "license.py", "readme.png"}, "dataset",
     {"data/train.parquet", "README.md", "x/state.json", "x/d.arrow"}),
])
def test_one_set_of_weights_and_what_belongs_to_it_is_needed(names, kind, want):
    assert set(needed(names, kind, lambda place: ())) == want


def test_a_moved_branch_is_followed_when_it_is_fetched_and_a_pinned_commit_stays(tmp_path, hub, cache, models):
    old = hub.hold("owner/llama", models["one"])
    bring("hub:owner/llama", f"hub:owner/llama@{old}")
    new = hub.hold("owner/llama", {**models["one"], "config.json": models["one"]["config.json"] + b"\n"})
    assert address("hub:owner/llama").commit == old != new
    bring("hub:owner/llama")
    assert locate("hub:owner/llama").name == new and locate(f"hub:owner/llama@{old}").name == old
    assert [count for _, count in hub.whole("model.safetensors")] == [len(models["one"]["model.safetensors"])]


def test_the_command_tells_what_comes_then_the_commit_and_how_to_pin_it(tmp_path, hub, cache, models, capsys):
    commit = hub.hold("owner/llama", models["one"])
    (tmp_path / "zoo.yaml").write_text(ZOO)
    file, size = tmp_path / "zoo.yaml", len(models["one"]["model.safetensors"])
    brought(["llama"], file, dry_run=True)
    told = capsys.readouterr().out
    assert f"llama: owner/llama at {commit} (main)" in told and f"{size:>16,}  model.safetensors" in told
    assert "9 files, " in told and "to download" in told and not hub.sent and not cache.exists()
    brought(["llama"], file, dry_run=True, as_json=True)
    data = json.loads(capsys.readouterr().out)["repositories"][0]
    assert data["bytes_to_download"] == sum(len(models["one"][name]) for name in TAKEN) == data["bytes"]
    brought(["llama"], file)
    out, err = capsys.readouterr()
    assert out == (f"llama: commit {commit} in {snapshot(cache, 'owner/llama', commit)}\n"
                   f"  it is what 'main' is now; to stay with it:  path: hub:owner/llama@{commit}\n")
    assert "model.safetensors" in err
    brought(["llama"], file, quiet=True)
    assert capsys.readouterr().err == ""


def test_a_recipe_brings_what_its_plan_lacks_and_no_more(tmp_path, hub, cache, models):
    hub.hold("owner/llama", models["one"])
    hub.hold("owner/two", models["other"])
    (tmp_path / "zoo.yaml").write_text(ZOO + "# and one that nobody asks for\n")
    (tmp_path / "r.yaml").write_text("steps: [{as: both, step: merge, members: [llama, two], method: linear}]\n")
    zoo = Zoo(tmp_path / "zoo.yaml")
    bring("llama", zoo=zoo)
    hub.sent.clear()
    found = bring(str(tmp_path / "r.yaml"), zoo=zoo)
    assert [one.asked.called for one in found] == ["two"]
    assert asked([str(tmp_path / "r.yaml")], lambda: zoo) == []
    with pytest.raises(RunError, match="there is no file nowhere.yaml"):
        asked(["nowhere.yaml"], lambda: zoo)


def test_a_merge_config_brings_the_models_that_it_names(tmp_path, hub, cache, models):
    hub.hold("owner/llama", models["one"])
    (tmp_path / "config.yaml").write_text(f"merge_method: linear\ndtype: float32\nmodels:\n"
                                          f"  - {{model: owner/llama, parameters: {{weight: 1}}}}\n"
                                          f"  - {{model: {tmp_path}, parameters: {{weight: 1}}}}\n")
    found, = bring(str(tmp_path / "config.yaml"))
    assert found.asked.called == "hub:owner/llama" and locate("hub:owner/llama").is_dir()


def test_what_others_have_downloaded_in_part_by_patterns_is_found_if_it_is_enough(hub, cache, models):
    commit = hub.hold("owner/llama", models["one"])
    snapshot_download("owner/llama", allow_patterns=["*.json", "model.safetensors"], cache_dir=cache)
    with pytest.raises(LocalEntryNotFoundError):  # the library misses the pickles
        snapshot_download("owner/llama", local_files_only=True, cache_dir=cache)
    assert whole("hub:owner/llama") == snapshot(cache, "owner/llama", commit)


# going on

def large(models: dict[str, dict[str, bytes]]) -> tuple[dict[str, bytes], bytes]:
    """A model whose weights take long enough to be cut: its file, and the bytes of it."""
    data = b"".join(bytes([k]) * 1_000_000 for k in range(26))
    return {**models["one"], "model.safetensors": data}, data


def test_a_connection_that_ends_in_the_middle_is_taken_up_where_it_ended(hub, cache, models):
    files, data = large(models)
    commit = hub.hold("owner/llama", files)
    hub.cuts["model.safetensors"] = [CUT + 1000, CUT]
    bring("hub:owner/llama")
    starts = [first for first, _ in hub.whole("model.safetensors")]
    assert starts[0] == 0 < CUT <= starts[1] < starts[2] and len(starts) == 3
    assert (snapshot(cache, "owner/llama", commit) / "model.safetensors").read_bytes() == data


def test_a_fetch_that_was_killed_goes_on_where_it_was(tmp_path, hub, cache, models):
    files, data = large(models)
    commit, go = hub.hold("owner/llama", files), Event()
    hub.holds["model.safetensors"] = (CUT + 5_000_000, go)
    command = [sys.executable, "-c", "from glue.cli import main; main()", "zoo", "fetch", "hub:owner/llama", "--quiet"]
    env = surroundings(hub, cache)
    with subprocess.Popen(command, cwd=tmp_path, env=env) as process:
        blobs = cache / "models--owner--llama" / "blobs"
        while process.poll() is None and not any(file.stat().st_size >= CUT for file in blobs.glob("*.incomplete")):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    go.set()
    with pytest.raises(NotHere, match="owner/llama is not on this machine"):  # no branch points to what is not whole
        locate("hub:owner/llama")
    kept = next(blobs.glob("*.incomplete")).stat().st_size
    hub.sent.clear()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert {file for file, _, _ in hub.sent} == {"model.safetensors"}  # the small files are not sent again
    assert min(first for _, first, _ in hub.sent) == kept >= CUT
    assert (snapshot(cache, "owner/llama", commit) / "model.safetensors").read_bytes() == data
    assert not list(blobs.glob("*.incomplete"))


def test_a_hub_that_knows_no_ranges_sends_all_of_it_and_it_is_right(hub, cache, models):
    files, data = large(models)
    commit = hub.hold("owner/llama", files)
    hub.deaf, hub.cuts["model.safetensors"] = True, [CUT + 1000]
    told: list[int] = []
    fetched(looked_up(asked(["hub:owner/llama"], lambda: None)),  # type: ignore[arg-type,return-value]
            lambda done, total: told.append(total - done))
    assert [first for first, _ in hub.whole("model.safetensors")] == [0, 0]
    assert (snapshot(cache, "owner/llama", commit) / "model.safetensors").read_bytes() == data
    assert told[-1] == 0 == min(told)  # what was thrown away does not count as having come


def test_two_that_fetch_the_same_at_one_time_have_it_sent_once(hub, cache, models):
    files, data = large(models)
    commit = hub.hold("owner/llama", files)
    with ThreadPoolExecutor(2) as threads:
        for each in [threads.submit(bring, "hub:owner/llama") for _ in range(2)]:
            each.result()
    assert hub.whole("model.safetensors") == [(0, len(data))]
    assert (snapshot(cache, "owner/llama", commit) / "model.safetensors").read_bytes() == data


def test_what_arrives_damaged_is_thrown_away_and_told(hub, cache, models):
    files, _ = large(models)
    hub.hold("owner/llama", files)
    found = looked_up(asked(["hub:owner/llama"], lambda: None))  # type: ignore[arg-type,return-value]
    weights = next(one for one in found[0].files if one.name == "model.safetensors")
    draft = cache / "models--owner--llama" / "blobs" / f"{weights.blob}.incomplete"
    draft.parent.mkdir(parents=True)
    draft.write_bytes(b"\xff" * CUT)  # as two that write into one file leave it
    with pytest.raises(RunError, match="what came as model.safetensors is not what the hub says"):
        fetched(found)
    assert not draft.exists()
    bring("hub:owner/llama")
    assert hub.whole("model.safetensors")[-1] == (0, weights.size)


# what stands in the way

def test_a_gated_repository_is_told_with_its_page_before_anything_comes(hub, cache, models, monkeypatch, tmp_path):
    hub.hold("owner/llama", models["one"])
    hub.hold("owner/two", models["other"])
    hub.gated |= {"models/owner/llama", "models/owner/two"}
    with pytest.raises(RunError) as told:
        bring("hub:owner/llama")
    assert "owner/llama is gated" in str(told.value) and f"open {hub.url}/owner/llama" in str(told.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(GlueError) as told:
        bring("hub:owner/llama", "hub:owner/two")
    assert str(told.value).count("is gated") == 2 and "hf auth login" in str(told.value) and not hub.sent


@pytest.mark.parametrize("word, said, fix", [
    ("hub:owner/nobody", "there is no model owner/nobody on the hub, or it is private", "--kind dataset"),
    ("hub:owner/llama@v9", "owner/llama has no revision 'v9'", "lists its branches and tags"),
    ("hub:owner/../etc", "is no hub path", "write hub:owner/name"),
    ("hub:owner/llama@../../x", "is no hub path", "write hub:owner/name"),
    ("hub:owner/llama/inner", "is no hub path", "write hub:owner/name"),
])
def test_what_is_not_there_is_told_with_what_to_do(hub, cache, models, word, said, fix):
    hub.hold("owner/llama", models["one"])
    with pytest.raises(GlueError) as told:
        bring(word)
    assert said in str(told.value) and fix in str(told.value) and not cache.exists()


def test_a_repository_with_pickles_alone_is_refused_with_the_way_to_convert_it(hub, cache, models):
    hub.hold("owner/old", {name: data for name, data in {**models["one"], **EXTRA}.items()
                           if not name.endswith(".safetensors")})
    with pytest.raises(ZooError) as told:
        bring("hub:owner/old")
    assert "has no safetensors weights, but consolidated.00.pth, " in str(told.value)
    assert "safetensors/convert" in str(told.value) and "hub:owner/old@refs/pr/1" in str(told.value)
    hub.hold("owner/words", {"config.json": b"{}"})
    with pytest.raises(ZooError, match="owner/words has no weights"):
        bring("hub:owner/words")
    hub.hold("owner/old", models["one"], branch="refs/pr/1")
    bring("hub:owner/old@refs/pr/1")
    assert whole("hub:owner/old@refs/pr/1").is_dir()


def test_without_a_network_it_says_so_once(hub, cache, models, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(Unreachable, match="owner/llama could not be fetched from http://127.0.0.1:9") as told:
        bring("hub:owner/llama", "hub:owner/two")
    assert "check the network" in str(told.value) and "owner/two" not in str(told.value)


@pytest.mark.parametrize("status, fix", [(500, "try later"), (403, "a token that may read it")])
def test_what_the_hub_refuses_is_told(status, fix, hub, cache, models):
    hub.hold("owner/llama", models["one"])
    hub.refuses = status
    with pytest.raises(RunError, match=f"owner/llama: the hub answered {status}") as told:
        bring("hub:owner/llama")
    assert fix in str(told.value)


def test_offline_it_says_exactly_what_is_missing_and_how_it_comes(tmp_path, hub, cache, models, monkeypatch, capsys):
    hub.hold("owner/llama", models["one"])
    commit = hub.hold("owner/two", models["other"])
    (tmp_path / "zoo.yaml").write_text(ZOO)
    zoo = Zoo(tmp_path / "zoo.yaml")
    bring("two", zoo=zoo)
    folder = snapshot(cache, "owner/two", commit)
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asks = len(hub.requests)
    with pytest.raises(RunError) as told:
        bring("llama", "two", zoo=zoo)
    assert "HF_HUB_OFFLINE is set, so nothing is fetched, and 2 repositories are not wholly" in str(told.value)
    assert "llama: all of it  (glue zoo fetch hub:owner/llama)" in str(told.value)
    assert f"two: {shard.name}  (glue zoo fetch hub:owner/two)" in str(told.value)
    (tmp_path / "r.yaml").write_text("steps: [{as: both, step: merge, members: [llama, two], method: linear}]\n")
    with pytest.raises(GlueError) as told:
        make_plan(read_recipe(tmp_path / "r.yaml"), zoo)
    assert f"glue zoo fetch {tmp_path / 'r.yaml'}  gets them all" in str(told.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    bring("llama", zoo=zoo)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asks = len(hub.requests)
    brought(["llama"], tmp_path / "zoo.yaml")
    assert "nobody looked for newer commits" in capsys.readouterr().err and len(hub.requests) == asks


def test_a_part_of_a_model_is_told_by_the_shard_that_is_missing(tmp_path, hub, cache, models):
    commit = hub.hold("owner/two", models["other"])
    bring("hub:owner/two")
    folder = snapshot(cache, "owner/two", commit)
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].resolve().unlink()  # the link stays, to nothing
    member = Member("two", "model", "hub:owner/two")
    for use in (lambda: whole(member.path), lambda: load(member)):
        with pytest.raises(NotHere) as told:
            use()
        assert f"only a part of owner/two is on this machine: {shards[1].name} is missing" in str(told.value)
        assert "glue zoo fetch hub:owner/two" in str(told.value)
    (tmp_path / "config.yaml").write_text("merge_method: linear\ndtype: float32\nmodels:\n"
                                          "  - {model: owner/two, parameters: {weight: 1}}\n")
    with pytest.raises(GlueError, match=f"{shards[1].name} is missing"):
        orders(tmp_path / "config.yaml", tmp_path / "out", Settings(0), None)
    (tmp_path / "zoo.yaml").write_text(ZOO)
    (tmp_path / "r.yaml").write_text("steps: [{as: copy, step: merge, members: [two], method: linear}]\n")
    zoo = Zoo(tmp_path / "zoo.yaml")
    task, = make_plan(read_recipe(tmp_path / "r.yaml"), zoo, missing=True)
    assert task.state == "missing"
    hub.sent.clear()
    bring(str(tmp_path / "r.yaml"), zoo=zoo)
    assert [file for file, _, _ in hub.sent] == [shards[1].name]
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text("{}")  # as whoever looked only at that leaves it
    with pytest.raises(NotHere, match="any file of weights is missing"):
        whole(member.path)


def test_a_full_disk_is_told_before_anything_comes(hub, cache, models, monkeypatch):
    hub.hold("owner/llama", models["one"])
    found = looked_up(asked(["hub:owner/llama"], lambda: None))  # type: ignore[arg-type,return-value]
    free = found[0].coming + fetch.MARGIN - 17
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(free, 0, free))
    with pytest.raises(RunError, match="and 17 are lacking|: 17 are lacking") as told:
        fetched(found)
    assert "HF_HOME" in str(told.value) and not hub.sent and not cache.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(free + 17, 0, free + 17))
    assert check_room(found) == free + 17


def test_a_disk_that_fills_up_meanwhile_is_told(hub, cache, models, monkeypatch):
    hub.hold("owner/llama", models["one"])

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(RunError, match="there is no room left in") as told:
        bring("hub:owner/llama")
    assert "it goes on where it was" in str(told.value)


def test_names_that_lead_out_of_the_folder_are_refused(hub, cache, models):
    for name in ("../x", "a/../x", "/etc/passwd", "a\\..\\x", "c:x", "a\nb", "a//b"):
        with pytest.raises(ZooError, match="could lead out of its folder"):
            refuse_strange([name], "it")
    hub.hold("owner/bad", {**models["one"], "../../../../evil.json": b"{}"})
    with pytest.raises(ZooError, match="which could lead out of its folder"):
        bring("hub:owner/bad")
    index = {"weight_map": {"a": "../../model.safetensors"}}
    hub.hold("owner/worse", {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(GlueError, match="names shards outside its folder"):
        bring("hub:owner/worse")
    assert not list(cache.rglob("evil*")) if cache.exists() else True


# what lies there

def test_a_blob_that_was_damaged_in_the_cache_is_found_and_mended(tmp_path, hub, cache, models, capsys):
    hub.hold("owner/llama", models["one"])
    (tmp_path / "zoo.yaml").write_text(ZOO)
    zoo = Zoo(tmp_path / "zoo.yaml")
    bring("llama", zoo=zoo)
    assert any(line.endswith("  model.safetensors") for line in verified(zoo, "llama"))
    for name in ("model.safetensors", "tokenizer.json"):  # a large file by sha256, a small one by git's sum
        blob = (locate("hub:owner/llama") / name).resolve()
        data = bytearray(blob.read_bytes())
        data[-2] ^= 1
        blob.write_bytes(data)
        with pytest.raises(ZooError, match=f"'llama' is damaged: {name} no longer holds") as told:
            list(verified(zoo, "llama"))
        assert f"rm {blob} , then  glue zoo fetch hub:owner/llama" in str(told.value)
        blob.unlink()
        bring("llama", zoo=zoo)
        assert blob.read_bytes() == models["one"][name]
    list(verified(zoo, "llama"))


def test_showing_a_member_tells_its_commit_and_sums_without_reading_weights(tmp_path, hub, cache, models, capsys,
                                                                            monkeypatch):
    commit = hub.hold("owner/llama", models["one"])
    member = Member("llama", "model", "hub:owner/llama")
    print_member(member, [member], False)
    assert "not on this machine; get it with  glue zoo fetch hub:owner/llama" in capsys.readouterr().out
    bring("hub:owner/llama")
    blob = (locate("hub:owner/llama") / "model.safetensors").resolve()
    monkeypatch.setattr("glue.snapshot._read_sha256", lambda file: "read " + file.name)
    print_member(member, [member], True)
    told = json.loads(capsys.readouterr().out)
    assert told["commit"] == commit
    sums = {file["name"]: file["sha256"] for file in told["files"]}
    assert sums["model.safetensors"] == blob.name and sums["config.json"] == "read config.json"
    print_member(member, [member], False)
    assert f"commit: {commit} (main, which may move; hub:owner/llama@{commit} stays)" in \
        capsys.readouterr().out.replace("\n", "")


# datasets

ROWS = {"instruction": "add", "output": "four"}


def lines(count: int) -> bytes:
    return b"".join(json.dumps({**ROWS, "instruction": f"add {k}"}).encode() + b"\n" for k in range(count))


def test_a_dataset_of_the_hub_is_fetched_and_imported_by_a_recipe(tmp_path, hub, cache, monkeypatch):
    commit = hub.hold("owner/sums", {"main/train.jsonl": lines(12), "main/test.jsonl": lines(3),
                                     "other/train.jsonl": lines(5), "README.md": b"it", "load.py": b"import os"},
                      kind="dataset")
    (tmp_path / "zoo.yaml").write_text("members: {}\ninclude: zoo/members.yaml\n")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("steps: [{as: sums, step: import, path: hub:owner/sums/main, split: train, format: alpaca, "
                      "dev: 2}]\n")
    zoo = Zoo(tmp_path / "zoo.yaml")
    with pytest.raises(GlueError) as told:
        make_plan(read_recipe(recipe), zoo)
    assert "hf download owner/sums --repo-type dataset" in str(told.value)
    assert [task.state for task in make_plan(read_recipe(recipe), zoo, missing=True)] == ["missing"]
    found, = bring(str(recipe), zoo=zoo)
    assert {file for file, _, _ in hub.sent} == {"main/train.jsonl", "main/test.jsonl", "README.md"}
    made = run(read_recipe(recipe), zoo, Workers(0))["sums"]
    assert len((made.folder / "train.jsonl").read_text().splitlines()) == 10
    told = json.loads((made.folder / FOLDER_NOTE).read_text())["inputs"]
    assert [(one["hub"], one["revision"]) for one in told] == [("owner/sums", commit)]
    recipe.write_text(recipe.read_text().replace("hub:owner/sums/main", "hub:owner/sums/other"))
    with pytest.raises(GlueError, match="only a part of owner/sums is on this machine: other is missing") as told:
        make_plan(read_recipe(recipe), zoo)
    assert "glue zoo fetch hub:owner/sums/other --kind dataset" in str(told.value)
    with pytest.raises(ZooError, match="owner/sums has no records in 'nowhere'"):
        bring("hub:owner/sums/nowhere", kind="dataset")


def test_the_same_records_from_the_hub_and_from_a_folder_are_the_same_dataset(tmp_path, hub, cache):
    hub.hold("owner/sums", {"train.jsonl": lines(6)}, kind="dataset")
    bring("hub:owner/sums", kind="dataset")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "train.jsonl").write_bytes(lines(6))
    (tmp_path / "zoo.yaml").write_text("members: {}\ninclude: zoo/members.yaml\n")
    (tmp_path / "r.yaml").write_text("steps:\n" + "".join(
        f"  - {{as: {name}, step: import, path: {path}, format: alpaca}}\n"
        for name, path in (("far", "hub:owner/sums"), ("near", "here"))))
    done = run(read_recipe(tmp_path / "r.yaml"), Zoo(tmp_path / "zoo.yaml"), Workers(0))
    assert done["far"].digest == done["near"].digest


def test_a_dataset_member_may_lie_on_the_hub(tmp_path, hub, cache):
    item = b'{"question": "w3", "choices": ["w4", "w5"], "gold": 0, "answer": "w4"}\n'
    hub.hold("owner/questions", {f"{split}.jsonl": item * 3 for split in ("dev", "test")}, kind="dataset")
    suites = tmp_path / "benchmarks" / "suites"
    suites.mkdir(parents=True)
    (suites / "own.yaml").write_text("tasks: {it: {data: asked, output: choice, metric: acc, chance: 0.5}}\n")
    (tmp_path / "zoo.yaml").write_text("members:\n  asked: {path: hub:owner/questions, kind: dataset}\n"
                                       "  llama: {path: hub:owner/llama}\n")
    (tmp_path / "r.yaml").write_text("steps: [{as: scored, step: evaluate, members: [llama], suite: 'own:dev'}]\n")
    zoo = Zoo(tmp_path / "zoo.yaml")
    with pytest.raises(NotHere, match="hf download owner/questions --repo-type dataset"):
        zoo.identified(zoo["asked"])
    task, = make_plan(read_recipe(tmp_path / "r.yaml"), zoo, missing=True)
    assert {member.name for member in task.lacks} == {"asked", "llama"}
    assert {one.address.command for one in asked([str(tmp_path / "r.yaml")], lambda: zoo)} == {
        "hf download owner/questions --repo-type dataset", "hf download owner/llama"}
    bring("asked", zoo=zoo)
    assert zoo["asked"].folder == locate("hub:owner/questions", "dataset")
    assert (zoo["asked"].folder / "dev.jsonl").read_bytes() == item * 3 and zoo.identified(zoo["asked"]).digest


def test_one_command_fetches_and_runs(tmp_path, hub, cache, models, capsys):
    hub.hold("owner/llama", models["one"])
    hub.hold("owner/two", models["other"])
    (tmp_path / "zoo.yaml").write_text(ZOO)
    (tmp_path / "r.yaml").write_text("steps: [{as: both, step: merge, members: [llama, two], method: linear}]\n")

    def glue(*words: str, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", "from glue.cli import main; main()", *words], cwd=tmp_path,
                              env={**surroundings(hub, cache), **more}, capture_output=True, text=True)

    print_plan(make_plan(read_recipe(tmp_path / "r.yaml"), Zoo(tmp_path / "zoo.yaml"), missing=True), False)
    assert f"glue zoo fetch {tmp_path / 'r.yaml'}  brings what is on the hub" in capsys.readouterr().out
    refused = glue("run", "r.yaml", "--fetch", HF_HUB_OFFLINE="1")
    assert refused.returncode == 2 and "llama: all of it" in refused.stderr and "Traceback" not in refused.stderr
    done = glue("run", "r.yaml", "--fetch", "--workers", "0")
    assert done.returncode == 0 and "to stay with it" in done.stderr and (tmp_path / "zoo" / "r" / "both").is_dir()
