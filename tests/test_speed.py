"""The speed benchmark measures what it says; nothing here looks at how long anything takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from glue.checkpoint import Checkpoint, weights_digest
from glue.errors import GlueError, RunError

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # benchmarks is no part of the installed package
    sys.path.insert(0, str(ROOT))

from benchmarks.speed import measure, probe  # noqa: E402
from benchmarks.speed.__main__ import main  # noqa: E402
from benchmarks.speed.compare import compare  # noqa: E402
from benchmarks.speed.pairs import OURS, PEER, recorded, steady  # noqa: E402
from benchmarks.speed.rows import ROWS, SYNCED  # noqa: E402
from benchmarks.speed.shapes import SHAPES, made  # noqa: E402
from benchmarks.speed.table import END, START, kept, limit, markdown, put, ratios, stage  # noqa: E402


def run_of(merge: float, **more: float) -> dict[str, float]:
    return {"plan": 0.5, "merge": merge, "wall": merge + 2, "cpu": 1.0, "others": 0.0, "cold": 0, "anonymous": 2e8,
            "private": 2e8, "resident": 5e8, "processes": 1, "bytes_read": 8e9, "bytes_written": 2e9, **more}


def results(pairs: list[dict], **more: object) -> dict:
    """Results of one row, `linear`: 4 GB read twice, 2 GB written."""
    row = {"method": "linear", "settings": "", "members": 4, "synced": False, "passes": 2, "reads": 4e9, "writes": 2e9,
           "floor": [6.0, 4.0], "near": 1.7, "date": "2026-01-02T03:04:05", "commit": "abc", "pairs": pairs,
           "memory": {}, **more}
    return {"shape": "1b1", "bytes": 2e9, "rows": {"linear": row},
            "machine": {"cpu": "a processor", "cores": 4, "ram": 2**34, "files": "ext4", "kernel": "6", "python": "3",
                        "versions": {"torch": "2"}}}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return made(tmp_path_factory.mktemp("tiny"), SHAPES["tiny"], 2)


def test_the_shapes_have_the_sizes_of_the_models_they_stand_for():
    assert {name: round(shape.nbytes / 1e9, 3) for name, shape in SHAPES.items() if name != "tiny"} \
        == {"160m": 0.325, "1b1": 2.2, "7b": 13.477}


def test_a_synthetic_model_has_the_names_and_shapes_that_transformers_expects(models):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**json.loads((models["m0"] / "config.json").read_text()))
    expected = {name: tuple(tensor.shape) for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    assert {name: tuple(header.shape) for name, header in Checkpoint(models["m0"]).headers.items()} == expected


def test_members_differ_from_their_base_as_tuned_models_do(models):
    base, member = Checkpoint(models["base"]), Checkpoint(models["m0"])
    delta = member["model.layers.0.mlp.up_proj.weight"].double() - base["model.layers.0.mlp.up_proj.weight"].double()
    assert 0.001 < delta.square().mean().sqrt() < 0.002
    assert (delta.abs() > 3 * delta.square().mean().sqrt()).double().mean() > 0.005  # a normal one has 0.0027
    spectrum = torch.linalg.svdvals(delta).square()
    assert 0.2 < spectrum[:8].sum() / spectrum.sum() < 0.9
    norm = "model.layers.1.input_layernorm.weight"
    assert (member[norm] == base[norm]).float().mean() > 0.7


def test_models_are_the_same_every_time_and_are_made_once(models, tmp_path):
    again = made(tmp_path, SHAPES["tiny"], 2)
    digests = [weights_digest(Checkpoint(place)) for place in again.values()]
    assert digests == [weights_digest(Checkpoint(place)) for place in models.values()] and len(set(digests)) == 3
    before = {place: (place / "model.safetensors").stat().st_mtime_ns for place in again.values()}
    (again["m1"] / "config.json").unlink()  # as after a kill
    assert made(tmp_path, SHAPES["tiny"], 2) == again
    after = {place: (place / "model.safetensors").stat().st_mtime_ns for place in again.values()}
    assert [after[place] == before[place] for place in again.values()] == [True, True, False]


def test_a_full_disk_is_told_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10e9}))
    with pytest.raises(GlueError, match=r"10\.0 GB left; 13\.2 GB are needed for 4 more checkpoints and 2 outputs"):
        made(tmp_path / "m", SHAPES["1b1"], 3)
    assert not any((tmp_path / "m").iterdir())


@pytest.mark.parametrize("name", ROWS)
def test_mergekit_understands_every_configuration(name, models):
    from mergekit.config import MergeConfiguration

    row = ROWS[name]
    places = {**models, "m2": models["m0"], "m3": models["m1"]}
    read = MergeConfiguration.model_validate(yaml.safe_load(row.config(places, 4)))
    assert read.merge_method == name and read.dtype == "bfloat16"
    assert len(read.models) == len(row.members(4)) == (2 if name in ("slerp", "nuslerp") else 4)
    assert (read.base_model is None) == (row.base == "none")
    assert len(row.inputs(4)) == len({str(ref.model.path) for ref in read.referenced_models()} & set(map(str,
               models.values()))) + (2 if len(row.members(4)) == 4 else 0)


def test_private_memory_counts_what_children_hold_and_shared_pages_once(tmp_path):
    # pages are touched one by one: a copy on the way would count where it is seen
    hold = ("import os, time\ndef held(n):\n    room = bytearray(n << 20)\n"
            "    for k in range(0, len(room), 4096): room[k] = 1\n    return room\n"
            "all_of_them = held(60)\n"
            "for _ in range(2):\n    if not os.fork():\n        own = held(30)\n"
            "        time.sleep(1.0)\n        os._exit(0)\n"
            "for _ in range(2): os.wait()\nprint('done')")
    ran = measure.run([sys.executable, "-c", hold], folder=tmp_path, environment={}, closely=True)
    assert ran.output == "done\n" and ran.processes == 3
    assert 120e6 < ran.private < 170e6 and 240e6 < ran.anonymous < 300e6  # 60 shared by three, and twice 30


def test_a_run_that_fails_says_why(tmp_path):
    with pytest.raises(RunError, match="ended with code 3:\nbad luck"):
        measure.run([sys.executable, "-c", "import sys; sys.stderr.write('bad luck'); sys.exit(3)"], folder=tmp_path,
                    environment={})


def test_the_probes_leave_nothing_behind_and_touch_every_byte(tmp_path):
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(bytes(3_000_001))
    assert probe.read(files, threads=3) > 0
    size = 3_000_001
    seen = []
    unlink = Path.unlink

    def look(self: Path, *words: bool) -> None:
        seen.append(self.read_bytes())
        unlink(self, *words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", look)
        assert probe.write(tmp_path / "c", size, threads=3, sync=True) > 0
    assert len(seen[0]) == size and seen[0].count(0) < 0.01 * size  # random bytes everywhere: no hole is left
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


def test_agreement_counts_entries_and_ulps(tmp_path):
    from glue.checkpoint import Header
    from glue.writer import Writer

    def written(name: str, *values: float) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        with Writer(folder, {"w": Header(torch.bfloat16, (len(values),))}) as writer:
            writer.write("w", torch.tensor(values, dtype=torch.bfloat16))
        return folder

    ulp = 2.0**-7  # of bf16 at 1
    found = compare(written("a", 1, 1, 1, 0, -2, 0), written("b", 1, 1 + ulp, 1 + 3 * ulp, 0, -2, 0))
    assert found == {"differ": 2 / 6, "beyond": 1 / 6, "ulps": 3.0, "apart": 3 * ulp}
    added = compare(tmp_path / "a", tmp_path / "b", written("base", 0, 0, 0, 0, -2, 0))
    assert added["rms"] == pytest.approx((3 / 6) ** 0.5)
    assert compare(tmp_path / "a", written("c", 1, 1, 1, 1e-40, -2, 0))["differ"] == 1 / 6


def test_a_pair_whose_probe_is_far_from_the_median_does_not_count():
    pairs = [{"read": read, "write": write, OURS: run_of(0.5), PEER: run_of(ours)}
             for read, write, ours in ((10, 5, 3), (11, 5, 4), (6, 5, 99), (10, 9, 99), (9, 5, 5))]
    row = results(pairs)["rows"]["linear"]
    assert steady(pairs) == [True, True, False, False, True] and len(kept(row)) == 3
    assert ratios(row, stage) == [3.5, 4.5, 5.5]
    assert steady([]) == [] and steady([{OURS: run_of(1)}]) == [True]


def test_the_limit_is_the_slower_of_reading_and_writing():
    pair = {OURS: run_of(1), PEER: run_of(9)}
    assert limit(results([{"read": 10e9, "write": 5e9, **pair}])["rows"]["linear"]) == pytest.approx(0.8)
    assert limit(results([{"read": 40e9, "write": 5e9, **pair}])["rows"]["linear"]) == pytest.approx(0.4)
    assert limit(results([pair])["rows"]["linear"]) is None


def test_the_table_says_how_many_pairs_counted_and_which_aims_were_missed(tmp_path):
    pairs = [{"read": 10e9, "write": 5e9, OURS: run_of(1.0), PEER: run_of(x)} for x in (8.5, 9.5, 10.5)]
    file = tmp_path / "r.json"
    file.write_text(json.dumps(results([*pairs, {**pairs[0], "read": 2e9}])))
    text = markdown([file])
    assert "| 1.50 / 10.00 | **6.7x** (6.0-7.3) | 6x | 3.00 / 11.50 | **3.8x** (3.5-4.2) | 4x missed |" in text
    assert "| 0.80 | 1.9 (aim 1.7, missed) | 3, 1 left out |" in text
    assert "a processor, 4 cores, 16 GiB" in text
    file.write_text(json.dumps(results(pairs) | {"shape": "160m"}))
    assert "missed" not in markdown([file])  # aims are for one shape


def test_the_table_tells_what_disturbed_the_runs(tmp_path):
    file = tmp_path / "r.json"
    pair = {"read": 10e9, "write": 5e9, OURS: run_of(1.0, others=0.5, cold=3e9), PEER: run_of(9, others=1.5)}
    file.write_text(json.dumps(results([pair])))
    assert "Other work kept 1.0 cores busy; 1 of 2 runs found inputs gone from the cache." in markdown([file])


def test_memory_alone_gives_a_table_without_times(tmp_path):
    file = tmp_path / "r.json"
    file.write_text(json.dumps(results([], memory={OURS: run_of(1.0, private=4.2e8)})))
    text = markdown([file])
    assert "| 0.42 / - | 0.50 / - | 1.0 / - | 8.00, 2.00 | - | - |" in text
    assert "stage" not in text and text.endswith("slowed down for it.")


def test_the_table_goes_between_the_markers_of_a_page(tmp_path, capsys):
    file, page = tmp_path / "r.json", tmp_path / "page.md"
    file.write_text(json.dumps(results([{OURS: run_of(1.0)}])))
    page.write_text("no place")
    with pytest.raises(GlueError, match="put back the lines"):
        put(page, [file])
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    assert main(["table", str(file), "--into", str(page), "--check"]) == 1
    assert main(["table", str(file), "--into", str(page)]) == 0
    assert page.read_text() == f"before\n{START}\n{markdown([file])}\n{END}\nafter\n"
    assert main(["table", str(file), "--into", str(page), "--check"]) == 0
    assert "is out of date" in capsys.readouterr().out


def test_results_of_another_machine_are_not_mixed_in(tmp_path):
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"shape": "tiny", "machine": {"cpu": "a"}, "rows": {"linear": {}}}))
    assert recorded(file, {"shape": "tiny", "machine": {"cpu": "a"}})["rows"] == {"linear": {}}
    with pytest.raises(GlueError, match="with another machine"):
        recorded(file, {"shape": "tiny", "machine": {"cpu": "b"}})


def test_an_unknown_row_is_named_with_the_nearest_one(capsys):
    assert main(["merge", "--shape", "tiny", "--methods", "tise"]) == 2
    assert "there is no row 'tise'; did you mean 'ties'?" in capsys.readouterr().err
    assert SYNCED not in ROWS


def test_a_tiny_benchmark_runs_from_end_to_end(tmp_path, capsys):
    file = tmp_path / "tiny.json"
    assert main(["merge", "--shape", "tiny", "--pairs", "1", "--methods", "linear", "--folder", str(tmp_path / "f"),
                 "--json", str(file)]) == 0
    row = json.loads(file.read_text())["rows"]["linear"]
    pair, = row["pairs"]
    assert pair["order"] == [OURS, PEER] and pair["read"] > 0 < pair["write"]
    assert all(pair[side]["anonymous"] > 10e6 and pair[side]["cpu"] > 0 for side in (OURS, PEER))
    assert row["reads"] == pytest.approx(4 * SHAPES["tiny"].nbytes, rel=0.05)
    assert pair[OURS]["bytes_read"] >= 4 * SHAPES["tiny"].nbytes
    assert pair[OURS]["bytes_written"] >= SHAPES["tiny"].nbytes
    assert row["agreement"]["ulps"] <= 1 and row["agreement"]["differ"] < 0.02
    assert "**linear** (4 models)" in capsys.readouterr().out
    assert not list((tmp_path / "f").glob("*/out-*"))
    assert main(["merge", "--shape", "tiny", "--folder", str(tmp_path / "f"), "--clean"]) == 0
    assert not (tmp_path / "f" / "tiny").exists()


def test_a_candidate_is_the_same_in_memory_and_by_way_of_the_disk(tmp_path, capsys):
    out = tmp_path / "rounds.json"
    assert main(["search", "--shape", "tiny", "--pairs", "2", "--zoo", str(tmp_path / "none.yaml"), "--folder",
                 str(tmp_path), "--json", str(out)]) == 0
    assert "made, tiny: " in capsys.readouterr().out
    rounds = json.loads(out.read_text())["rows"]["made, tiny"]
    assert len(rounds) == 2
    assert all(0 <= one["apart"] < 0.02 for one in rounds)  # the peer's sums are in bf16, whose step at 1 is 0.0078
