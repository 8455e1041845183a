"""What a plan says that it takes, and how a run refuses what this machine has no room for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glue import room
from glue.checkpoint import Header
from glue.cli import app
from glue.errors import GlueError, Mistakes, RunError
from glue.family import Choice
from glue.kinds import weights
from glue.merges import merge_file
from glue.orders import Settings
from glue.plan import Plan, make_plan
from glue.preflight import fit
from glue.preflight.fit import refuse
from glue.preflight.footprint import IDLE, MAIN, MANY, POOL, WORKER, Build, Footprint, compared, extracted, together
from glue.preflight.headers import Recorded, tensors
from glue.preflight.needs import needs
from glue.preflight.pace import Pace, Seconds, pace
from glue.recipe import read_recipe
from glue.room import free_disk, free_memory, human, size
from glue.run import run
from glue.steps.extract import deal
from glue.workers import Workers
from glue.zoo import Zoo

GB = 10**9


@pytest.fixture
def place(tiny, tmp_path: Path) -> Path:
    """A zoo of two tiny models, and a recipe that merges and tunes them."""
    one, other = tiny("one"), tiny("other", seed=1)
    data = tmp_path / "words"
    data.mkdir()
    item = {"question": "w3", "choices": ["w4", "w5"], "gold": 0, "answer": "w4"}
    for split in ("train", "dev", "test"):
        (data / f"{split}.jsonl").write_text(json.dumps(item) + "\n")
    (tmp_path / "zoo.yaml").write_text(f"members:\n  one: {{path: {one.path}}}\n  other: {{path: {other.path}}}\n"
                                       "  words: {path: words, kind: dataset}\n")
    (tmp_path / "r.yaml").write_text("steps:\n  - {as: merged, step: merge, members: [one, other], method: linear}\n")
    return tmp_path


@pytest.fixture
def large(monkeypatch) -> Callable[[Plan, str, Footprint], None]:
    """large(plan, task, footprint): as if a task of the plan held so much."""
    def hold(plan: Plan, name: str, hold: Footprint, device: str = "cpu") -> None:
        taken = needs(plan)
        need = replace(taken.tasks[name], hold=hold, device=device)
        monkeypatch.setattr("glue.preflight.fit.needs",
                            lambda plan, workers: replace(taken, tasks={**taken.tasks, name: need}))

    return hold


def planned(place: Path, text: str = "") -> Plan:
    if text:
        (place / "r.yaml").write_text(text)
    return make_plan(read_recipe(place / "r.yaml"), Zoo(place / "zoo.yaml"))


def tuning(place: Path) -> Plan:
    return planned(place, "steps:\n  - {as: tuned, step: tune, base: one, data: {words: 1}, steps: 1, "
                          "learning_rate: 0.1}\n")


def llama() -> Recorded:
    """Two layers of the width of Llama-2-7B."""
    build = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2,
             "num_attention_heads": 32}
    return Recorded("llama", tensors(build, torch.bfloat16))


def folder_bytes(place: Path) -> int:
    return sum(file.stat().st_size for file in place.glob("*.safetensors"))


# --- what is told -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line", [
    "step: merge, members: [one, other], method: linear",
    "step: merge, members: [one, other], method: linear, dtype: bfloat16",
    "step: merge, members: [other], base: one, method: {ties: {density: 0.5}}",
    "step: extract, model: other, base: one, rank: 4",
    "step: extract, model: other, base: one, rank: 2, targets: [q_proj, down_proj], dtype: bfloat16",
])
def test_a_product_has_as_many_bytes_as_the_plan_has_said(place, line):
    plan = planned(place, f"steps:\n  - {{as: made, {line}}}\n")
    said = needs(plan).tasks["r/made"].written
    done = run(plan.recipe, plan.zoo, Workers(0))
    file, = done["made"].folder.glob("*.safetensors")
    with open(file, "rb") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
    assert said == file.stat().st_size - header


def test_processes_are_counted_as_many_as_are_busy_and_one_that_waits():
    hold = Footprint(1000, calls=2, beside=50)
    assert hold.peak(0) == MAIN + 1050
    assert hold.peak(1) == MAIN + POOL + WORKER + 1050
    assert hold.peak(4) == MAIN + POOL + 2 * (WORKER + 1000) + IDLE + 50
    assert Footprint(1000, calls=MANY).peak(4) == MAIN + POOL + 4 * (WORKER + 1000)
    assert Footprint(9, calls=3, sizes=(9, 2, 5)).peak(2) == MAIN + POOL + 2 * WORKER + 14, "the largest two"
    assert Footprint(9, calls=3, sizes=(9, 2, 5)).times(0.5).sizes == (4, 1, 2)
    assert together([hold, Footprint(7000)], 2) == MAIN + POOL + 2 * WORKER + 8000 + 50, "the largest two at once"
    assert together([hold, Footprint(7000)], 0) == MAIN + 7000, "one after the other"


def test_more_members_are_compared_in_hardly_more_memory():
    two, eight = (compared([llama()] * n, 4, delta=False).call for n in (2, 8))
    assert 30e6 < two < 100e6 and eight < 2 * two


def test_few_layers_of_a_large_model_are_cut_at_once():
    layers = {name: header for name, header in llama().headers.items() if "proj" in name}
    hold = extracted(layers, 16, 4, 8)
    assert hold.calls == 2 and 3 * 8 * 4096**2 < hold.call < 500e6
    assert hold.beside == 4 * 16 * sum(sum(header.shape) for header in layers.values())
    assert [len(part) for part in deal({name: header.shape for name, header in layers.items()}, 8)] == [7, 7]
    assert len(deal({"one": (64, 64), "other": (64, 64)}, 8)) == 2
    assert extracted({"w": Header(torch.bfloat16, (8192, 28672))}, 16, 4, 8).calls == 1, "one is all that has room"


# --- how long --------------------------------------------------------------------------------------------------------

def test_what_is_done_beside_each_other_takes_as_long_as_the_slowest_and_no_longer_than_all():
    assert Seconds.of(3.0, 1.0, 2.0) == Seconds(3.0, 6.0) and Seconds.of(0.0, 0.0) is None


def test_a_machine_is_measured_once_and_again_where_it_is_another(tmp_path, monkeypatch):
    monkeypatch.setattr("glue.preflight.pace.PROBE", 1 << 20)
    first = pace(tmp_path)
    assert min(first.read, first.write, first.flops) > 0 and pace(tmp_path) == first
    monkeypatch.setattr("glue.preflight.pace._flops", lambda: 12345.0)
    assert pace(tmp_path) == first
    monkeypatch.setattr("glue.preflight.pace._machine", lambda: "another")
    assert pace(tmp_path).flops == 12345.0
    (tmp_path / "machine.json").write_text("[]")
    assert pace(tmp_path).flops == 12345.0
    assert [file.name for file in tmp_path.iterdir()] == ["machine.json"]


def test_large_tasks_are_told_about_how_long_and_small_ones_are_not(place, monkeypatch):
    monkeypatch.setattr("glue.preflight.needs.pace_of", lambda folder: Pace(read=1e4, write=1e3, flops=1e6))
    plan = planned(place)
    assert needs(plan, 1, timed=True).tasks["r/merged"].takes is None
    monkeypatch.setattr("glue.preflight.needs.LEAST", 1000)
    assert needs(plan, 1).tasks["r/merged"].takes is None, "only where it is asked for"
    need = needs(plan, 1, timed=True).tasks["r/merged"]
    assert need.takes.least == pytest.approx(need.written / 1e3)
    assert need.takes.most >= need.takes.least + (need.read + need.written) / 1e4


def test_batches_and_operations_are_counted_in_tokens(place, monkeypatch):
    monkeypatch.setattr("glue.preflight.needs.pace_of", lambda folder: Pace(read=1e12, write=1e12, flops=1e6))
    monkeypatch.setattr("glue.preflight.needs.LARGE", 1)
    monkeypatch.setattr("glue.preflight.needs.LEAST", 1)
    plan = planned(place, "steps:\n  - {as: tuned, step: tune, base: one, data: {words: 1}, steps: 5, "
                          "learning_rate: 0.1, batch_size: 6}\n")
    need = needs(plan, 1, timed=True).tasks["r/tuned"]
    parameters = sum(header.numel for header in weights(plan.zoo["one"]).headers.values())
    tokens = 4  # the opening, question and answer, and the end of the text
    build = Build(2, 32, 48, weights(plan.zoo["one"]).headers["model.embed_tokens.weight"].shape[0])
    assert need.memory == 16 * parameters + build.trains(3, tokens)
    assert need.takes.least == pytest.approx(6 * parameters * tokens * 5 * 6 / 1e6, rel=1e-6)
    assert max(build.trains(3, 4, 2), build.trains(3, 4, again=True)) < build.trains(3, 4)


# --- what is refused --------------------------------------------------------------------------------------------------

def test_what_the_disk_has_no_room_for_is_refused_before_anything_is_made(place, monkeypatch):
    plan = planned(place)
    written = folder_bytes(place / "one")
    monkeypatch.setattr(fit, "free_disk", lambda folder: written // 2)
    with pytest.raises(RunError, match=r"what r is yet to make takes .* KB, and the disk of .*/zoo has .* KB left"
                                       r"(.|\n)*glue zoo gc  finds nothing(.|\n)*--force"):
        run(plan.recipe, plan.zoo, Workers(0))
    assert not list((place / "zoo").glob("r/*")) and not (place / "zoo" / ".drafts").exists()
    assert run(plan.recipe, plan.zoo, Workers(0), force=True).done
    assert run(plan.recipe, Zoo(place / "zoo.yaml"), Workers(0)).done, "nothing is left to make"


def test_a_task_that_fits_with_fewer_workers_is_refused_with_their_number(place, large):
    plan = planned(place)
    large(plan, "r/merged", Footprint(10 * GB, MANY))
    for free, said in ((46 * GB, None), (35 * GB, "say --workers 3, which takes 30.5 GB"),
                       (12 * GB, "say --workers 1, which takes 10.5 GB"), (9 * GB, "nothing that its line can say")):
        if said is None:
            refuse(plan, 4, free)
            continue
        with pytest.raises(RunError, match="r/merged takes 40.6 GB of memory with 4 workers") as refused:
            refuse(plan, 4, free)
        assert said in str(refused.value) and str(refused.value).startswith(f"{place}/r.yaml:2:")
    refuse(plan, 4, None)


def test_a_lighter_way_is_only_named_where_it_fits(place, large):
    plan = tuning(place)
    large(plan, "r/tuned", Footprint(16 * GB))
    with pytest.raises(RunError, match="say step: lora, which takes 4.5 GB"):
        refuse(plan, 4, 10 * GB)
    with pytest.raises(RunError, match="nothing that its line can say makes it fit"):
        refuse(plan, 4, 4 * GB)


def test_half_as_wide_numbers_are_named_where_the_step_knows_them(place, large):
    (place / "own.yaml").write_text("tasks:\n  things: {data: words, output: choice, metric: acc, chance: 0.5}\n")
    plan = planned(place, "steps:\n  - {as: scored, step: evaluate, members: [one], suite: own.yaml:test}\n")
    choice = plan.tasks[0].choice
    told = replace(plan.tasks[0], choice=Choice(choice.method, {**choice.params, "dtype": "float32"}))
    plan = replace(plan, tasks=(told,))
    large(plan, "r/scored", Footprint(28 * GB, calls=3))
    with pytest.raises(RunError, match="say dtype: bfloat16 and --workers 1, which takes 14.5 GB"):
        refuse(plan, 3, 20 * GB)
    with pytest.raises(RunError, match="say --workers 1, which takes 28.5 GB"):
        refuse(plan, 3, 29 * GB)


def test_a_device_is_asked_for_its_own_memory(place, large, monkeypatch):
    plan = planned(place)
    large(plan, "r/merged", Footprint(30 * GB, MANY), "cuda:0")
    monkeypatch.setattr(fit, "free_on", lambda device: 80 * GB if device == "cuda:0" else None)
    refuse(plan, 2, 1 * GB)
    with pytest.raises(RunError, match="120.0 GB of the memory of cuda:0 with 4 workers, and 80.0 GB are free(.|\n)*"
                                       "say --workers 2, which takes 60.0 GB"):
        refuse(plan, 4, 1 * GB)
    monkeypatch.setattr(fit, "free_on", lambda device: None)
    refuse(plan, 4, 1 * GB)


def test_a_small_zoo_is_never_refused_for_its_memory(place):
    refuse(planned(place), 4, 1)
    refuse(tuning(place), 4, 1)


def test_tasks_that_would_run_at_once_are_counted_together(place, monkeypatch):
    plan = planned(place, "steps:\n" + "".join(f"  - {{as: m{k}, step: merge, members: [one, other], "
                                               f"method: {{linear: {{weight: [{k}, 1]}}}}}}\n" for k in (1, 2, 3)))
    taken = needs(plan)
    tasks = {name: replace(need, hold=Footprint(10 * GB)) for name, need in taken.tasks.items()}
    monkeypatch.setattr("glue.preflight.fit.needs", lambda plan, workers: replace(taken, tasks=tasks))
    with pytest.raises(RunError, match=r"3 tasks that would run at once take about 30\.\d GB(.|\n)*--workers 2"):
        refuse(plan, 4, 25 * GB)
    refuse(plan, 2, 25 * GB)


def test_a_merge_from_a_config_is_refused_too(place, monkeypatch):
    config = place / "linear.yaml"
    config.write_text(f"merge_method: linear\ndtype: float32\nmodels:\n  - model: {place}/one\n"
                      f"    parameters: {{weight: 1}}\n  - model: {place}/other\n    parameters: {{weight: 1}}\n")
    monkeypatch.setattr("glue.merges.free_disk", lambda folder: 1000)
    with pytest.raises(RunError, match="the disk of .*out has 1.0 KB left(.|\n)*--force"):
        merge_file(config, place / "out", Settings())
    monkeypatch.setattr("glue.merges.free_disk", free_disk)
    monkeypatch.setattr("glue.merges.held", lambda merge: 3 * GB)
    monkeypatch.setattr("glue.merges.taken", lambda merge, workers: max(1, workers) * 3 * GB)
    monkeypatch.setattr("glue.merges.free_memory", lambda: 8 * GB)
    with pytest.raises(RunError, match="12.0 GB of memory with 4 processes, and 8.0 GB are free(.|\n)*--workers 2"):
        merge_file(config, place / "out", Settings(), workers=4)
    assert not (place / "out").exists()
    monkeypatch.undo()
    assert merge_file(config, place / "out", Settings(), workers=0)[0]["made"]


# --- budget -----------------------------------------------------------------------------------------------------------

def test_products_may_take_no_more_than_the_budget(place):
    one = folder_bytes(place / "one")
    file = place / "zoo.yaml"
    text = file.read_text()
    file.write_text(f"budget: {2 * one // 1000}KB\n{text}")
    first = planned(place)
    assert run(first.recipe, first.zoo, Workers(0)).done
    second = planned(place, "steps:\n  - {as: merged, step: merge, members: [one, other], method: slerp}\n")
    with pytest.raises(RunError, match=r"that is more than the budget of (.|\n)*raise  budget:  in zoo.yaml(.|\n)*gc"):
        run(second.recipe, second.zoo, Workers(0))
    file.write_text(f"budget: {4 * one // 1000}KB\n{text}")
    plan = planned(place)
    assert run(plan.recipe, plan.zoo, Workers(0)).done
    Zoo(file).remove("r/merged")
    file.write_text(f"budget: {3 * one // 1000}KB\n{text}")
    third = planned(place, "steps:\n  - {as: third, step: merge, members: [one, other], method: karcher}\n")
    with pytest.raises(RunError, match=r"glue zoo gc --yes  would free \d"):
        run(third.recipe, third.zoo, Workers(0))


@pytest.mark.parametrize("text", ["a lot", "-3GB", "0", "[1]"])
def test_a_budget_that_is_no_size_is_told_with_its_place(tmp_path, text):
    (tmp_path / "zoo.yaml").write_text(f"members: {{}}\nbudget: {text}\n")
    with pytest.raises(Mistakes, match=r"zoo.yaml:2:\d+: 'budget' is what products may take of the disk"):
        Zoo(tmp_path / "zoo.yaml")


# --- room -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("version, files, left", [
    ("0::/ours", {"memory.max": "1000", "memory.current": "700", "memory.stat": "active_file 50\ninactive_file 100\n"},
     450),
    ("0::/ours", {"memory.max": "max", "memory.current": "700", "memory.stat": ""}, None),
    ("4:memory:/ours", {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "900",
                        "memory.stat": "total_active_file 0\ntotal_inactive_file 300\n"}, 400),
    ("4:memory:/ours", {"memory.limit_in_bytes": str(2**63 - 4096), "memory.usage_in_bytes": "900",
                        "memory.stat": ""}, None),
])
def test_a_control_group_says_what_it_has_left(tmp_path, monkeypatch, version, files, left):
    folder = tmp_path / ("memory/ours" if "memory" in version else "ours")
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    assert room._left(folder) == left
    monkeypatch.setattr(room, "CGROUPS", tmp_path)
    monkeypatch.setattr(room, "_groups", lambda: [folder, tmp_path])
    monkeypatch.setattr(room, "_available", lambda: 10_000)
    assert free_memory() == (10_000 if left is None else left)


def test_nobody_tells_of_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert room.free_on("cuda") is None and room.free_on("cpu") is None


def test_sizes_are_read_as_they_are_said():
    assert (size("200GB"), size("1.5 MB"), human(200 * GB), human(1_500_000)) == (200 * GB, 1_500_000, "200.0 GB",
                                                                                 "1.5 MB")
    with pytest.raises(GlueError, match="is no size"):
        size("many")


# --- the command line -------------------------------------------------------------------------------------------------

def test_the_command_line_tells_memory_and_disk_and_forces(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    app(["plan", "r.yaml", "--workers", "2"], standalone_mode=False)
    told = capsys.readouterr().out
    assert "products take" in told and "are free" in told and "of memory with 2 workers" in told
    app(["plan", "r.yaml", "--workers", "2", "--json"], standalone_mode=False)
    row, = json.loads(capsys.readouterr().out)
    assert row["bytes_peak"] == MAIN + POOL + 2 * (WORKER + row["bytes_memory"]) and row["bytes_device"] == 0
    assert row["bytes_written"] <= folder_bytes(place / "one")
    monkeypatch.setattr(fit, "free_disk", lambda folder: 10)
    with pytest.raises(RunError, match="10 bytes left"):
        app(["run", "r.yaml", "--workers", "0", "-q"], standalone_mode=False)
    app(["run", "r.yaml", "--workers", "0", "-q", "--force"], standalone_mode=False)
    assert (place / "zoo" / "r" / "merged").exists()
