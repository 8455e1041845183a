"""`glue merge` and `glue plan` on configs of mergekit: folders that are whole, made once, and can be made again."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from glue.checkpoint import Checkpoint, Header, weights_digest
from glue.errors import CheckpointError, GlueError, RecipeError, RunError
from glue.member import FOLDER_NOTE
from glue.merges import is_config, merge_file, order_row
from glue.orders import Settings, orders
from glue.room import size
from glue.writer import JOURNAL, Writer
from glue.zoo import Zoo

TIES = """
merge_method: ties
base_model: {base}
models:
  - {{model: {one}, parameters: {{weight: 0.6, density: 0.4}}}}
  - {{model: {two}, parameters: {{weight: [0.2, 0.5], density: 0.5}}}}
dtype: bfloat16
"""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, plain_model) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    base = plain_model(folder / "base", 0)
    for k, name in enumerate(("one", "two", "three"), start=1):
        plain_model(folder / name, k, base)
    return folder


@pytest.fixture
def ties(shelf: Path, tmp_path: Path) -> Path:
    file = tmp_path / "ties.yaml"
    file.write_text(TIES.format(base=shelf / "base", one=shelf / "one", two=shelf / "two"))
    return file


def test_a_merge_leaves_a_whole_folder_and_is_not_made_twice(ties, tmp_path, shelf):
    first, = merge_file(ties, tmp_path / "out", Settings())
    assert first["made"] and first["method"] == "ties"
    assert first["digest"] == weights_digest(Checkpoint(tmp_path / "out"))
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "model.safetensors", "config.json", "README.md", "mergekit_config.yml", FOLDER_NOTE}
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", shelf / "base")]
    assert configs[0] == configs[1]
    told = json.loads((tmp_path / "out" / FOLDER_NOTE).read_text())
    assert told["config"] == ties.read_text() and told["seed"] == 0 and len(told["models"]) == 3
    before = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    again, = merge_file(ties, tmp_path / "out", Settings())
    assert not again["made"] and again["digest"] == first["digest"]
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_merge_can_be_made_again_from_the_file_in_its_folder(ties, tmp_path):
    first, = merge_file(ties, tmp_path / "out", Settings())
    again, = merge_file(tmp_path / "out/mergekit_config.yml", tmp_path / "again", Settings())
    assert again["digest"] == first["digest"]


def test_workers_and_shards_change_no_bit(ties, tmp_path):
    found = {merge_file(ties, tmp_path / f"{number}-{shard}", Settings(shard_size=shard), workers=number)[0]["digest"]
             for number in (0, 2, 3) for shard in (10_000, 5_000_000_000)}
    assert len(found) == 1 and len(list((tmp_path / "2-10000").glob("*.safetensors"))) > 3


def test_another_seed_is_another_merge_where_there_is_chance(shelf, tmp_path):
    file = tmp_path / "dare.yaml"
    file.write_text(TIES.format(base=shelf / "base", one=shelf / "one", two=shelf / "two").replace("ties", "dare_ties"))
    digests = [merge_file(file, tmp_path / f"{seed}", Settings(seed))[0]["digest"] for seed in (0, 1)]
    assert digests[0] != digests[1]


def test_a_folder_that_holds_something_else_is_refused_and_with_overwrite_set_aside(ties, tmp_path):
    (tmp_path / "out").mkdir()
    merge_file(ties, tmp_path / "out", Settings())  # an empty one is taken
    ties.write_text(ties.read_text().replace("0.6", "0.7"))
    with pytest.raises(RecipeError, match="is there already and holds something else"):
        merge_file(ties, tmp_path / "out", Settings())
    done, = merge_file(ties, tmp_path / "out", Settings(overwrite=True))
    assert done["kept"] == str(tmp_path / "out.replaced-1") and Checkpoint(tmp_path / "out.replaced-1").nbytes


def test_later_documents_of_a_file_use_earlier_ones(shelf, tmp_path):
    file = tmp_path / "stages.yaml"
    file.write_text(f"""
name: half
merge_method: linear
models:
  - {{model: {shelf}/one, parameters: {{weight: 1}}}}
  - {{model: {shelf}/two, parameters: {{weight: 1}}}}
---
merge_method: slerp
base_model: {shelf}/three
models: [{{model: half}}, {{model: {shelf}/three}}]
parameters: {{t: 0.5}}
""")
    rows = [order_row(order, 1) for order in orders(file, tmp_path / "out", Settings())]
    assert [row["out"] for row in rows] == [str(tmp_path / "out.stages/half"), str(tmp_path / "out")]
    done = merge_file(file, tmp_path / "out", Settings())
    assert [each["made"] for each in done] == [True, True]
    half = Checkpoint(tmp_path / "out.stages/half")["model.norm.weight"].float()
    mean = (Checkpoint(shelf / "one")["model.norm.weight"].float() + Checkpoint(shelf / "two")["model.norm.weight"]) / 2
    assert torch.allclose(half, mean, atol=1e-3)
    shutil.rmtree(tmp_path / "out")
    assert [each["made"] for each in merge_file(file, tmp_path / "out", Settings())] == [False, True]


def test_members_of_the_zoo_are_named_without_a_path(shelf, tmp_path):
    (tmp_path / "zoo.yaml").write_text("members:\n" + "".join(
        f"  my-{name}: {{path: {shelf / name}}}\n" for name in ("base", "one", "two")))
    file = tmp_path / "ties.yaml"
    file.write_text(TIES.format(base="my-base", one="my-one", two="my-two"))
    done, = merge_file(file, tmp_path / "out", Settings(), Zoo(tmp_path / "zoo.yaml"))
    assert done["bytes_written"] == Checkpoint(shelf / "base").nbytes
    with pytest.raises(GlueError, match="there is no model 'my-base'"):
        merge_file(file, tmp_path / "out2", Settings())


def test_stacked_layers_change_the_configuration(shelf, tmp_path):
    file = tmp_path / "stack.yaml"
    file.write_text(f"""
merge_method: passthrough
dtype: float16
slices:
  - sources: [{{model: {shelf}/one, layer_range: [0, 3]}}]
  - sources: [{{model: {shelf}/two, layer_range: [1, 3]}}]
""")
    merge_file(file, tmp_path / "out", Settings())
    made, config = Checkpoint(tmp_path / "out"), json.loads((tmp_path / "out/config.json").read_text())
    assert (config["num_hidden_layers"], config["torch_dtype"]) == (5, "float16")
    assert len(made) == len(Checkpoint(shelf / "one")) + 2 * 9 and made["lm_head.weight"].dtype == torch.float16
    assert made["model.layers.4.mlp.up_proj.weight"].equal(
        Checkpoint(shelf / "two")["model.layers.2.mlp.up_proj.weight"].half())


def test_a_plan_tells_what_will_be_read_and_written_and_leaves_no_trace(ties, tmp_path, shelf):
    order, = orders(ties, tmp_path / "out", Settings())
    row, base = order_row(order, 1), Checkpoint(shelf / "base")
    assert (row["bytes_read"], row["bytes_written"]) == (3 * base.nbytes, base.nbytes)
    assert (row["tensors"], row["passes"]) == (len(base), 2)
    assert row["seconds"] > 0 and row["bytes_memory"] > 0 and not row["done"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ties.yaml"]


def glue(*words: str | Path, **more) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "glue.cli", *map(str, words)], capture_output=True, text=True,
                          timeout=120, **more)


def test_the_command_line_merges_and_plans(ties, tmp_path):
    planned = glue("plan", ties, cwd=tmp_path)
    assert planned.returncode == 0 and "ties" in planned.stdout and "3 models" in planned.stdout, planned.stderr
    made = glue("merge", ties, tmp_path / "out", "--json", cwd=tmp_path)
    told = json.loads(made.stdout)
    assert told["digest"] == weights_digest(Checkpoint(tmp_path / "out")) and set(told["seconds"]) == {"plan", "merge"}
    again = glue("merge", ties, tmp_path / "out", cwd=tmp_path)
    assert again.returncode == 0 and "is there already" in again.stdout


def test_planning_and_merging_import_no_heavy_library(ties, tmp_path):
    code = ("import sys\nfrom pathlib import Path\nfrom glue.merges import *\nfrom glue.orders import *\n"
            f"order, = orders(Path({str(ties)!r}), Path({str(tmp_path / 'out')!r}), Settings())\norder_row(order, 1)\n"
            f"merge_file(Path({str(ties)!r}), Path({str(tmp_path / 'out')!r}), Settings())\n"
            "print(sorted({name.split('.')[0] for name in sys.modules} & "
            "{'transformers', 'peft', 'lm_eval', 'tokenizers', 'accelerate', 'datasets'}), "
            "[name for name in sys.modules if name.startswith('mergekit') and not name.startswith('mergekit._data') "
            "and name != 'mergekit'])")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == "[] []", found.stdout + found.stderr


KILL = """
import os, signal, sys
import glue.writer
left, pwrite = int(sys.argv[1]), os.pwrite
def kill(file, data, at):
    global left
    left -= len(data)
    if left < 0:
        os.kill({whom}, signal.SIGKILL)
    return pwrite(file, data, at)
glue.writer.os.pwrite = kill
from glue.cli import main
sys.argv = ["glue", *sys.argv[2:]]
main()
"""


@pytest.mark.parametrize("whom, code", [("os.getppid()", -signal.SIGKILL), ("os.getpid()", 2)],
                         ids=["the merge", "one of its workers"])
def test_what_is_killed_goes_on_and_ends_in_the_same_bits(ties, tmp_path, whom, code):
    out = tmp_path / "out"
    struck = subprocess.run([sys.executable, "-c", KILL.format(whom=whom), "20000", "merge", str(ties), str(out), "-q",
                             "--workers", "2"], capture_output=True, text=True, timeout=120)
    assert struck.returncode == code, struck.stderr
    assert code != 2 or ("a worker process died" in struck.stderr and "Traceback" not in struck.stderr)
    assert not out.exists() and len((tmp_path / ".out.draft" / JOURNAL).read_text().splitlines()) > 1
    done, = merge_file(ties, out, Settings())
    calm, = merge_file(ties, tmp_path / "calm", Settings())
    assert done["digest"] == calm["digest"] and not (tmp_path / ".out.draft").exists()


def test_numbers_that_are_not_finite_stop_a_merge_and_leave_nothing(shelf, ties, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(shelf / "two", bad)
    tensors = {name: tensor.clone() for name, tensor in Checkpoint(bad).items()}
    tensors["lm_head.weight"][3, 3] = float("inf")
    with Writer(bad, {name: Header(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    ties.write_text(ties.read_text().replace(str(shelf / "two"), str(bad)))
    with pytest.raises(CheckpointError, match=rf"'lm_head.weight' of '{bad}' \({bad}/model.safetensors\)"):
        merge_file(ties, tmp_path / "out", Settings())
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.draft").exists()
    merge_file(ties, tmp_path / "out", Settings(allow_nan=True))


def test_a_place_that_cannot_be_written_to_is_told(ties, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        merge_file(ties, tmp_path / "file/out", Settings())


def test_a_read_only_disk_is_told_and_nothing_is_lost(ties, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("glue.merges.publish", Mock(side_effect=OSError(errno.EROFS, "Read-only file system")))
        with pytest.raises(RunError, match="cannot be written: Read-only file system"):
            merge_file(ties, tmp_path / "out", Settings())
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.draft/model.safetensors").exists()
    assert merge_file(ties, tmp_path / "out", Settings())[0]["made"]


def test_a_device_that_is_not_there_is_told_before_any_work(ties, tmp_path):
    with pytest.raises(GlueError, match="'cuda:77' cannot be calculated on"):
        merge_file(ties, tmp_path / "out", Settings(device="cuda:77"))
    with pytest.raises(GlueError, match="'gpu' cannot be calculated on"):
        merge_file(ties, tmp_path / "out", Settings(device="gpu"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ties.yaml"]


@pytest.mark.parametrize("text, found", [("500MB", 500_000_000), ("5GB", 5_000_000_000), ("2.5 gib", 2_500_000_000),
                                         ("1000", 1000), ("0", None), ("many", None), ("-5GB", None)])
def test_sizes_are_read_as_people_write_them(text, found):
    if found:
        assert size(text) == found
    else:
        with pytest.raises(GlueError, match="is no size"):
            size(text)


def test_configs_are_told_from_recipes(ties, tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps:\n  - {as: a, step: merge, members: [b], method: linear}\n")
    assert is_config(ties) and not is_config(tmp_path / "recipe.yaml") and not is_config(tmp_path / "none.yaml")
    assert os.path.exists(ties)


def test_a_config_that_changes_the_vocabulary_goes_through_mergekit(tiny, tmp_path):
    words = {f"w{k}": k for k in range(3, 40)}
    one = tiny("one", seed=1)
    two = tiny("two", seed=2, words={"<unk>": 0, "<s>": 1, "</s>": 2, **words, "more": 40, "most": 41})
    file = tmp_path / "union.yaml"
    file.write_text(f"""
merge_method: linear
models:
  - {{model: {one.path}, parameters: {{weight: 0.5}}}}
  - {{model: {two.path}, parameters: {{weight: 0.5}}}}
tokenizer: {{source: union}}
dtype: float32
chat_template: chatml
""")
    order, = orders(file, tmp_path / "out", Settings())
    assert "vocabulary" in order.through and order_row(order)["seconds"] is None
    first, = merge_file(file, tmp_path / "out", Settings())
    again, = merge_file(file, tmp_path / "again", Settings())
    assert first["made"] and first["digest"] == again["digest"]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == Checkpoint(tmp_path / "out").headers["model.embed_tokens.weight"].shape[0] == 42
    assert "im_start" in (tmp_path / "out/chat_template.jinja").read_text()
    assert not merge_file(file, tmp_path / "out", Settings())[0]["made"]


def test_a_config_of_mergekit_moe_is_checked_and_built(tiny, tmp_path):
    members = [tiny(name, seed=k) for k, name in enumerate(("base", "one", "two"))]
    file = tmp_path / "moe.yaml"
    file.write_text(f"""
base_model: {members[0].path}
gate_mode: random
dtype: float32
experts:
  - {{source_model: {members[1].path}, positive_prompts: [w3 w4]}}
  - {{source_model: {members[2].path}, positive_prompts: [w5 w6]}}
""")
    done, = merge_file(file, tmp_path / "out", Settings())
    assert done["made"] and done["method"] == "mergekit-moe, mixtral"
    assert json.loads((tmp_path / "out/config.json").read_text())["num_local_experts"] == 2
    assert "model.layers.0.block_sparse_moe.experts.1.w1.weight" in Checkpoint(tmp_path / "out")
    file.write_text(file.read_text().replace("gate_mode", "gate_mod"))
    with pytest.raises(RecipeError, match="moe.yaml:3:.*did you mean 'gate_mode'"):
        orders(file, tmp_path / "out2", Settings())
