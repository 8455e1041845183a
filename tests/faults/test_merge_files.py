"""Merges that are killed, run out of space or find damage: nothing is lost or half written, and bits are the same."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import glue.writer
from glue.checkpoint import INDEX, Checkpoint, Header, weights_digest
from glue.errors import CheckpointError, RunError
from glue.merge import merging
from glue.merge.engine import Merge, prepared
from glue.merge.leaf import Source
from glue.merge.write import shares, write
from glue.workers import Workers
from glue.writer import JOURNAL, Stream, Writer
from tests.crashes import Crash, crashing

SHAPES = {"embed.weight": (600, 300), "a.weight": (500, 400), "b.weight": (64, 900), "norm": (400,), "none": (0, 4)}
TOTAL = 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())
RANDOM = ("dare_linear", "dare_ties", "della")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> list[Path]:
    """A base and three models tuned from it, as folders."""
    folder, numbers = tmp_path_factory.mktemp("zoo"), torch.Generator().manual_seed(0)
    base = {name: 0.05 * torch.randn(shape, generator=numbers) for name, shape in SHAPES.items()}
    for k in range(4):
        tuned = {name: tensor + (k > 0) * 0.004 * torch.randn(tensor.shape, generator=numbers)
                 for name, tensor in base.items()}
        (folder / f"m{k}").mkdir()
        headers = {name: Header(torch.bfloat16, shape) for name, shape in SHAPES.items()}
        with Writer(folder / f"m{k}", headers) as writer:
            for name, tensor in tuned.items():
                writer.write(name, tensor.bfloat16())
    return [folder / f"m{k}" for k in range(4)]


def merge_of(zoo: list[Path], method: str = "dare_ties", order: tuple[int, ...] = (0, 1, 2), **how) -> Merge:
    base, *members = (Source(path.name, Checkpoint(path)) for path in zoo)
    given = {"density": 0.4, "weight": {"m1": 0.5, "m2": 0.3, "m3": 0.2}}
    return prepared(merging[method].bind(given), [members[k] for k in order], base, **how)


@pytest.fixture(scope="module")
def calm(zoo, tmp_path_factory) -> dict[str, str]:
    """Method -> digest of its merge when nothing disturbs it."""
    return {method: write(merge_of(zoo, method), tmp_path_factory.mktemp(method)) for method in RANDOM}


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize("method", RANDOM)
@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_no_order_of_members_changes_a_bit(zoo, calm, tmp_path, method, order):
    assert write(merge_of(zoo, method, order), tmp_path) == calm[method]


@pytest.mark.parametrize("method", RANDOM)
@pytest.mark.parametrize("shard_size", [1, 300_000, 400_000, 10**9])
def test_no_shard_size_changes_a_bit(zoo, calm, tmp_path, method, shard_size):
    assert write(merge_of(zoo, method), tmp_path, shard_size=shard_size) == calm[method]
    assert (INDEX in files(tmp_path)) == (shard_size < 10**9)
    assert Checkpoint(tmp_path)["norm"].equal(merge_of(zoo, method).glanced().tensor("norm"))


@pytest.mark.parametrize("number", [1, 2, 4])
def test_no_number_of_workers_changes_a_bit(zoo, calm, tmp_path, number):
    torch.ones(100_000).exp().sum()  # a merge after other work of torch, as after an evaluation
    with Workers(number) as workers:
        for method in RANDOM:
            found = write(merge_of(zoo, method), tmp_path / method, number=number,
                          spread=lambda calls, each: workers.map("glue.merge.write:fill", calls, each=each))
            assert found == calm[method]


@pytest.mark.parametrize("after", random.Random(7).sample(range(TOTAL), 20))
def test_a_merge_that_dies_at_any_byte_goes_on_and_ends_in_the_same_bits(zoo, calm, tmp_path, monkeypatch, after):
    method = RANDOM[after % 3]
    with monkeypatch.context() as patch:
        patch.setattr(glue.writer.os, "pwrite", crashing(after))
        with pytest.raises(Crash):
            write(merge_of(zoo, method), tmp_path, shard_size=400_000)
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        Checkpoint(tmp_path)
    done = len((tmp_path / JOURNAL).read_text().splitlines()) - 1
    written: list[str] = []
    with monkeypatch.context() as patch:
        stream = glue.merge.write.Stream
        patch.setattr(glue.merge.write, "Stream", lambda layout, name: written.append(name) or stream(layout, name))
        assert write(merge_of(zoo, method), tmp_path, shard_size=400_000) == calm[method]
    assert len(written) == len(SHAPES) - done
    assert files(tmp_path) == sorted([INDEX, *(f"model-{k:05d}-of-00003.safetensors" for k in (1, 2, 3))])


KILLED = """
import os, signal, sys
from pathlib import Path
import glue.writer
from tests_merge import merge_of, write
left, pwrite = int(sys.argv[2]), os.pwrite
def kill(file, data, at):
    global left
    left -= len(data)
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return pwrite(file, data, at)
glue.writer.os.pwrite = kill
zoo = [Path(sys.argv[3]) / f"m{k}" for k in range(4)]
print(write(merge_of(zoo), Path(sys.argv[1])))
"""


def killed(out: Path, zoo: list[Path], after: int) -> subprocess.CompletedProcess:
    code = KILLED.replace("tests_merge", Path(__file__).stem)
    words = [str(out), str(after), str(zoo[0].parent)]
    return subprocess.run([sys.executable, "-c", code, *words], text=True, timeout=120, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})


def test_three_real_kills_and_a_last_run_give_the_same_digest(zoo, calm, tmp_path):
    for after in (100_000, 200_000, 200_000):
        assert killed(tmp_path, zoo, after).returncode == -signal.SIGKILL
        assert not list(tmp_path.glob("model*"))
    assert killed(tmp_path, zoo, 10**9).stdout.strip() == calm["dare_ties"]


def test_what_was_written_is_read_again_and_not_trusted(zoo, calm, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(glue.writer.os, "pwrite", crashing(700_000))
        with pytest.raises(Crash):
            write(merge_of(zoo), tmp_path)
    part = next(tmp_path.glob(".model*.part"))
    data = bytearray(part.read_bytes())
    data[2000:2100] = bytes(100)  # as a power cut leaves pages that never reached the disk
    part.write_bytes(data)
    assert write(merge_of(zoo), tmp_path) == calm["dare_ties"]


@pytest.mark.parametrize("change", [{"seed": 1}, {"out_dtype": "float32"}])
def test_another_merge_does_not_go_on_from_this_one(zoo, tmp_path, monkeypatch, change):
    with monkeypatch.context() as patch:
        patch.setattr(glue.writer.os, "pwrite", crashing(700_000))
        with pytest.raises(Crash):
            write(merge_of(zoo), tmp_path / "a")
    assert write(merge_of(zoo, **change), tmp_path / "a") == write(merge_of(zoo, **change), tmp_path / "b")


def test_a_full_disk_is_told_and_leaves_what_can_be_gone_on_with(zoo, calm, tmp_path, monkeypatch):
    calls = itertools.count()

    def full(file: int, data, at: int) -> int:
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.pwritev(file, [data], at)

    with monkeypatch.context() as patch:
        patch.setattr(glue.writer.os, "pwrite", full)
        with pytest.raises(RunError, match=f"{tmp_path} cannot be written to: No space left"):
            write(merge_of(zoo), tmp_path)
    assert not list(tmp_path.glob("model*")) and (tmp_path / JOURNAL).exists()
    assert write(merge_of(zoo), tmp_path) == calm["dare_ties"]


def test_a_disk_that_is_too_small_is_told_before_any_work(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr("glue.merge.write.shutil.disk_usage", lambda _: Free())
    with pytest.raises(RunError, match=rf"needs {TOTAL:,} bytes, and its disk has .* left"):
        write(merge_of(zoo), tmp_path)


class Free:
    free = 1000


def test_a_shard_that_is_cut_short_or_lies_about_its_size_is_named(zoo, tmp_path):
    for name in ("m0", "m1"):
        (tmp_path / name).mkdir()
        data = bytearray((zoo[int(name[1])] / "model.safetensors").read_bytes())
        (tmp_path / name / "model.safetensors").write_bytes(data[:-1000] if name == "m0" else
                                                            data.replace(b"[500,400]", b"[500,401]"))
        with pytest.raises(CheckpointError, match=f"{name}/model.safetensors is damaged"):
            Checkpoint(tmp_path / name)


def test_numbers_that_are_not_finite_name_tensor_and_file_and_leave_nothing(zoo, tmp_path):
    base, *members = (Source(path.name, Checkpoint(path)) for path in zoo)
    (tmp_path / "bad").mkdir()
    with Writer(tmp_path / "bad", members[0].weights.headers) as writer:
        for name, tensor in members[0].weights.items():
            tensor = tensor.clone()
            if name == "b.weight":
                tensor[3, 5] = float("nan")
            writer.write(name, tensor)
    members[0] = Source("bad", Checkpoint(tmp_path / "bad"))
    choice = merging["linear"].bind()
    with pytest.raises(CheckpointError, match=r"'b.weight' of 'bad' \(.*bad/model.safetensors\) holds numbers"):
        write(prepared(choice, members), tmp_path / "out")
    assert files(tmp_path / "out") == []
    write(prepared(choice, members, allow_nan=True), tmp_path / "out")
    assert int(Checkpoint(tmp_path / "out")["b.weight"].isnan().sum()) == 1


def test_files_follow_the_umask(zoo, tmp_path):
    before = os.umask(0o027)
    try:
        write(prepared(merging["linear"].bind(), [Source("m", Checkpoint(zoo[0]))]), tmp_path, shard_size=300_000)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}


def test_work_is_shared_out_evenly_and_all_of_it(zoo):
    merge = merge_of(zoo)
    parts = shares(merge, merge.targets, 3)
    assert sorted(name for part in parts for name in part) == sorted(SHAPES) and len(parts) == 3
    assert parts[0] == ["a.weight"] and parts[1] == ["embed.weight"]


LARGE = {"a": (700, 1021), "b": (3,), "c": (1024, 1024), "d": (1500, 999), "e": (2,)}  # some begin and end inside pages


@pytest.mark.parametrize("piece", [1 << 17, 50_001])
def test_large_tensors_that_go_past_the_page_cache_are_the_same(tmp_path, monkeypatch, piece):
    random = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=random).bfloat16() for name, shape in LARGE.items()}
    headers = {name: Header(torch.bfloat16, shape) for name, shape in LARGE.items()}
    opened, real = [], os.open
    monkeypatch.setattr(glue.writer.os, "open",
                        lambda file, flags, *mode: opened.append(flags) or real(file, flags, *mode))
    with Writer(tmp_path, headers) as writer:
        for name, tensor in tensors.items():
            with Stream(writer.layout, name) as stream:
                for part in tensor.reshape(-1).split(piece):
                    stream.write(part)
                writer.done({name: stream.close()})
    assert sum(bool(flags & os.O_DIRECT) for flags in opened) == 3
    assert all(torch.equal(Checkpoint(tmp_path)[name], tensor) for name, tensor in tensors.items())
    assert writer.close() == weights_digest(Checkpoint(tmp_path))


def test_a_file_system_without_direct_writes_gets_plain_ones(tmp_path, monkeypatch):
    real = os.pwrite

    def refusing(file: int, data, at: int) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(file, data, at)

    monkeypatch.setattr(glue.writer.os, "pwrite", refusing)
    numbers = torch.arange(2_000_003, dtype=torch.float32)
    with Writer(tmp_path, {"w": Header(torch.float32, tuple(numbers.shape))}) as writer:
        writer.write("w", numbers)
    assert torch.equal(Checkpoint(tmp_path)["w"], numbers)
