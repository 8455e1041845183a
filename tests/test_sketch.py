"""Sketches: what a few columns tell of a whole model, and how sure they are."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from glue.checkpoint import Checkpoint, InMemory
from glue.cluster.similarity import similarity
from glue.cluster.sketch import SURE, VERSION, Sketch, compare, compare_one, similar, sketch
from glue.errors import CheckpointError

FEW = 12000  # entries of a sketch that leaves most columns out


def model(seed: int, *, layers: int = 6, hidden: int = 96, moved_from: InMemory | None = None, much: float = 0.5,
          dtype=torch.float32) -> InMemory:
    """Matrices as in a Llama, whose columns are moved by very different amounts, as training does."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for k in range(layers):
        for name, shape in (("self_attn.q_proj", (hidden, hidden)), ("mlp.up_proj", (2 * hidden, hidden)),
                            ("mlp.down_proj", (hidden, 2 * hidden))):
            drawn = torch.randn(shape, generator=rng)
            if moved_from is not None:
                width = much * torch.rand(shape[1], generator=rng) * (0.5 + torch.rand(1, generator=rng))
                drawn = moved_from[f"model.layers.{k}.{name}.weight"].float() + width * drawn
            tensors[f"model.layers.{k}.{name}.weight"] = drawn.to(dtype)
    tensors["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    return InMemory(tensors)


@pytest.fixture(scope="module")
def zoo() -> list[InMemory]:
    """A base, four children, a grandchild and a stranger."""
    base = model(0)
    children = [model(k, moved_from=base) for k in range(1, 5)]
    return [base, *children, model(6, moved_from=children[0], much=0.2), model(7)]


def test_a_sketch_of_all_columns_is_exact(zoo):
    cosine, error = compare([sketch(source) for source in zoo])
    assert np.abs(cosine - similarity(zoo)).max() < 1e-6 and (error == 0).all()


@pytest.mark.parametrize("part", ["all", "attention", "mlp"])
def test_few_columns_are_near_and_tell_how_near(zoo, part):
    cosine, error = compare([sketch(source, entries=FEW) for source in zoo], part=part)
    apart = np.abs(cosine - similarity(zoo, part=part))
    pairs = np.triu_indices(len(zoo), 1)
    assert error[pairs].min() > 0 and error.max() < 0.03 and (apart <= SURE * error)[pairs].all()
    assert (cosine == cosine.T).all() and (cosine.diagonal() == 1).all() and (error.diagonal() == 0).all()


def test_what_changed_from_a_base_is_compared_by_its_sketch_too(zoo):
    base, *others = zoo
    known = [sketch(source, entries=FEW) for source in zoo]
    cosine, error = compare(known[1:], base=known[0])
    assert (np.abs(cosine - similarity(others, base=base)) <= SURE * error).all()
    whole, none = compare([sketch(source) for source in others], base=sketch(base))
    assert np.abs(whole - similarity(others, base=base)).max() < 1e-6 and (none == 0).all()


def test_the_standard_error_is_that_of_many_samples(zoo, monkeypatch):
    """Other columns are drawn by calling the matrices other names; the spread of the estimates is the error told."""
    one, other = zoo[1], zoo[2]
    exact, found, told = similarity([one, other])[0, 1], [], []
    for k in range(150):
        renamed = [InMemory({f"{k}.{name}": source[name] for name in source}) for source in (one, other)]
        cosine, error = compare([sketch(source, entries=FEW) for source in renamed])
        found.append(cosine[0, 1])
        told.append(error[0, 1])
    assert np.std(found) == pytest.approx(np.sqrt(np.mean(np.square(told))), rel=0.25)
    assert abs(np.mean(found) - exact) < 4 * np.std(found) / 150 ** 0.5


def test_one_against_many_is_a_row_of_all_pairs(zoo):
    known = [sketch(source, entries=FEW) for source in zoo]
    for base in (None, known[0]):
        whole, errors = compare(known, base=base)
        row, error = compare_one(known[2], known, base=base)
        others = [k for k in range(len(zoo)) if k != 2]
        assert np.abs(row - whole[2])[others].max() < 1e-6 and np.abs(error - errors[2])[others].max() < 1e-6
        assert row[2] == pytest.approx(1, abs=1e-6)


def test_models_of_other_shape_and_sketches_of_other_size_are_not_comparable(zoo):
    known = [sketch(zoo[0]), sketch(zoo[1]), sketch(model(1, hidden=64)), sketch(zoo[1], entries=FEW)]
    cosine, error = compare(known)
    assert np.isnan(cosine).tolist() == np.isnan(error).tolist() == [
        [False, False, True, True], [False, False, True, True], [True, True, False, True], [True, True, True, False]]
    assert np.isnan(compare_one(known[0], known)[0]).tolist() == [False, False, True, True]
    assert np.isnan(compare(known[:2], base=known[2])[0][0, 1])


def test_columns_that_are_zero_count_as_in_similarity():
    zero, one = torch.zeros(4, 6), torch.ones(4, 6)
    one[:, :3] = 0
    sources = [InMemory({"mlp.w": zero}), InMemory({"mlp.w": one})]
    assert compare([sketch(source) for source in sources])[0][0, 1] == similarity(sources)[0, 1] == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_saved_sketch_comes_back_bit_by_bit_in_the_type_of_the_model(tmp_path, dtype):
    made = sketch(model(1, dtype=dtype), entries=FEW)
    made.save(tmp_path / "sketches/one.safetensors")
    back = Sketch.load(tmp_path / "sketches/one.safetensors")
    assert (back.matrices, back.entries, back.fingerprint) == (made.matrices, FEW, made.fingerprint)
    assert set(back.columns) == {96, 192}
    assert all(torch.equal(back.columns[key], made.columns[key]) for key in (96, 192))
    assert back.columns[96].dtype == dtype and (compare([made, back])[0] == pytest.approx(1, abs=1e-7))
    with safe_open(tmp_path / "sketches/one.safetensors", framework="pt") as opened:
        told = json.loads(opened.metadata()["sketch"])
    assert (told["version"], told["entries"], told["fingerprint"]) == (VERSION, FEW, made.fingerprint)


def test_many_sketches_can_be_open_at_once_without_open_files(tmp_path):
    import os

    sketch(model(1, layers=1), entries=FEW).save(tmp_path / "one.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    many = [Sketch.load(tmp_path / "one.safetensors") for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert compare_one(many[0], many)[0] == pytest.approx(np.ones(50), abs=1e-6)


def test_a_damaged_sketch_and_one_of_another_version_are_refused(tmp_path):
    file = tmp_path / "one.safetensors"
    sketch(model(1, layers=1), entries=FEW).save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="damaged"):
        Sketch.load(file)
    file.write_bytes(whole.replace(b'version\\": 1', b'version\\": 0'))
    with pytest.raises(CheckpointError, match="is no sketch of version 1"):
        Sketch.load(file)


def test_a_sketch_reads_every_matrix_once_and_is_small(tmp_path):
    from glue.checkpoint import Header
    from glue.writer import Writer

    source = model(3, layers=2, hidden=512, dtype=torch.bfloat16)
    with Writer(tmp_path, {name: Header(source[name].dtype, tuple(source[name].shape)) for name in source}) as writer:
        for name in source:
            writer.write(name, source[name])
    read: list[str] = []

    class Counted(Checkpoint):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    weights = Counted(tmp_path)
    assert weights.fingerprint
    read.clear()
    made = sketch(weights, entries=20000)
    assert sorted(read) == sorted(name for name in source if "norm" not in name)
    assert 15000 < sum(found.numel() for found in made.columns.values()) <= 20000


class Watched(InMemory):
    """Notes whether a tensor was read since."""

    def __getitem__(self, name):
        self.__dict__.setdefault("read", []).append(name)
        return super().__getitem__(name)


def test_only_pairs_that_a_sketch_cannot_tell_from_the_threshold_are_compared_exactly(zoo):
    sources = [Watched(dict(source)) for source in zoo]
    known = [sketch(source, entries=FEW) for source in sources]
    rough, error = compare(known)
    threshold = float(rough[1, 2]) + 0.5 * error[1, 2]
    for source in sources:
        source.read.clear()
    found, left = similar(sources, threshold, known)
    exact, open_ = similarity(zoo), np.abs(rough - threshold) <= SURE * error + 1e-5
    np.fill_diagonal(open_, False)
    assert open_[1, 2] and not open_[1, 6] and (left[open_] == 0).all() and (left[~open_] == error[~open_]).all()
    assert np.abs(found - exact)[open_].max() < 1e-6 and (found[~open_] == rough[~open_]).all()
    assert ((found > threshold) == (exact > threshold)).all()
    assert [bool(source.read) for source in sources] == open_.any(1).tolist() and not sources[6].read


def test_without_sketches_they_are_made(zoo):
    found, error = similar(zoo[1:], 0.9, base=zoo[0])
    assert np.abs(found - similarity(zoo[1:], base=zoo[0])).max() < 1e-6 and (error == 0).all()
