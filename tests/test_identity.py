"""Identity: what counts of a folder, and when what was remembered of it still holds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from glue import identity
from glue.errors import CheckpointError, ZooError
from glue.identity import identify


def test_a_folder_keeps_its_identity_under_another_name(model_folder, tmp_path):
    before = identify(model_folder("a"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert identify(tmp_path / "b") == before == identify(model_folder("c")) != identify(model_folder("d", seed=1))


def test_configurations_count_without_paths_and_versions_and_all_else_counts(model_folder):
    plain = '{"model_type": "llama", "inner": {"x": 1}}'
    same = '{"inner": {"x": 1, "_name_or_path": "/here"}, "transformers_version": "5", "model_type": "llama"}'
    other = '{"model_type": "llama", "inner": {"x": 2}}'
    first, second, third = (identify(model_folder(name, config=text))[1]
                            for name, text in (("a", plain), ("b", same), ("c", other)))
    assert first == second != third


def test_a_token_that_is_called_like_a_path_counts(model_folder):
    found = set()
    for name, vocabulary in (("a", {"x": 0}), ("b", {"x": 0, "name_or_path": 1})):
        folder = model_folder(name)
        (folder / "tokenizer.json").write_text(json.dumps({"vocab": vocabulary}))
        found.add(identify(folder)[1])
    assert len(found) == 2


def test_cards_and_logs_do_not_count(model_folder):
    folder = model_folder("a")
    before = identify(folder)
    for name in ("README.md", "glue.json", "search.json", ".hidden.safetensors"):
        (folder / name).write_text("{}")
    assert identify(folder) == before


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The weights that were hashed, one entry each time."""
    real, seen = identity.weights_digest, []
    monkeypatch.setattr(identity, "weights_digest", lambda weights: seen.append(weights.path.name) or real(weights))
    return seen


def test_a_digest_is_computed_once_and_again_when_size_time_or_inode_changes(model_folder, tmp_path, hashed):
    folder, known = model_folder("a"), tmp_path / "digests.json"
    file = folder / "model.safetensors"
    first = identify(folder, known)
    assert identify(folder, known) == first and len(hashed) == 1
    os.utime(file, ns=(1, 1))
    assert identify(folder, known) == first and len(hashed) == 2
    (folder / "copy").write_bytes(file.read_bytes())
    os.replace(folder / "copy", file)
    os.utime(file, ns=(1, 1))  # the same name, size and time: only the inode tells
    assert identify(folder, known) == first and len(hashed) == 3
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert identify(folder, known) != first and len(hashed) == 4


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"x": 3}', '{"x": {"signature": []}}', "\xff"])
def test_a_damaged_cache_is_no_more_than_forgotten(model_folder, tmp_path, text):
    folder, known = model_folder("a"), tmp_path / "digests.json"
    known.write_text(text, encoding="latin-1")
    assert identify(folder, known) == identify(folder) == identify(folder, known)


def test_a_cache_that_cannot_be_written_is_done_without(model_folder):
    assert identify(model_folder("a"), Path("/proc/no/digests.json")) == identify(model_folder("b"))


def test_a_snapshot_of_links_is_followed_and_noticed_when_its_blobs_change(model_folder, tmp_path, hashed):
    folder, blobs, snapshot = model_folder("a"), tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for k, file in enumerate(sorted(folder.iterdir())):
        (blobs / str(k)).write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blobs / str(k))
    known = tmp_path / "digests.json"
    assert identify(snapshot, known) == identify(folder) == identify(snapshot, known) and len(hashed) == 2
    os.utime(blobs / "1", ns=(1, 1))
    identify(snapshot, known)
    assert len(hashed) == 3
    (blobs / "1").unlink()
    with pytest.raises(ZooError, match="model.safetensors is a link to nothing"):
        identify(snapshot, known)


def test_pickled_weights_have_no_identity_though_there_is_a_configuration(model_folder):
    folder = model_folder("a")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        identify(folder)


def test_json_that_is_none_or_too_large_is_named(model_folder, monkeypatch):
    for text in ("{", "[" * 100_000, "\x00\x00"):
        folder = model_folder(f"f{len(text)}", config=text)
        with pytest.raises(ZooError, match="config.json is not JSON"):
            identify(folder)
    monkeypatch.setattr(identity, "JSON_LIMIT", 5)
    with pytest.raises(ZooError, match="config.json has more than 5 bytes"):
        identify(model_folder("big"))


def test_an_empty_folder_has_no_identity(tmp_path):
    with pytest.raises(ZooError, match="holds no weights"):
        identify(tmp_path)
