"""The header of every shard names the digest of all weights, which does not depend on it, also after a kill."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import glue.stamp
import glue.writer
from glue.checkpoint import INDEX, Checkpoint, Header, weights_digest
from glue.errors import RunError
from glue.stamp import stamp
from glue.writer import BLANK, DIGEST, Stream, Writer
from tests.crashes import Crash, crashing

TENSORS = {"a" + "0" * 40: torch.arange(6.0), "b": torch.arange(300, dtype=torch.int8), "c": torch.ones(7)}
HEADERS = {name: Header(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
TOTAL = sum(header.nbytes for header in HEADERS.values())
TWO = 330  # bytes a shard, for two


def write(folder: Path, *, shard_size: int = 10**9, key: str = "k") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    with Writer(folder, HEADERS, shard_size=shard_size, key=key) as writer:
        for name in writer.left:
            writer.write(name, TENSORS[name])
        return writer.close()


def told(folder: Path) -> list[str]:
    """What the header of each shard says, by the library that others read it with."""
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
            found.append(opened.metadata()[DIGEST])
    return found


@pytest.mark.parametrize("shard_size, shards", [(10**9, 1), (TWO, 2)])
def test_every_shard_names_the_digest_of_all_weights(tmp_path, shard_size, shards):
    digest = write(tmp_path, shard_size=shard_size)
    assert told(tmp_path) == [digest] * shards and digest == weights_digest(Checkpoint(tmp_path))


def test_the_digest_does_not_depend_on_what_a_header_says_of_it(tmp_path):
    digest = write(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    assert data.count(digest.encode()) == 1 and data.count(BLANK) == 1  # which is in a name
    file.write_bytes(data.replace(digest.encode(), b"f" * 32))
    assert told(tmp_path) == ["f" * 32] and weights_digest(Checkpoint(tmp_path)) == digest
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(file).items())


@pytest.mark.parametrize("shard_size", [10**9, TWO])
@pytest.mark.parametrize("after", [0, 30, TOTAL - 1, TOTAL, TOTAL + 1, TOTAL + 31, TOTAL + 32, TOTAL + 50])
def test_a_writer_killed_anywhere_also_within_the_digest_goes_on_to_the_same_bytes(
        tmp_path, monkeypatch, after, shard_size):
    write(tmp_path / "calm", shard_size=shard_size, key="")
    with monkeypatch.context() as patch:
        patch.setattr(glue.writer.os, "pwrite", crashing(after))
        if after < TOTAL + 32 or shard_size == TWO:
            with pytest.raises(Crash):
                write(tmp_path / "out", shard_size=shard_size)
            assert not list((tmp_path / "out").glob("model*"))
        else:
            write(tmp_path / "out", shard_size=shard_size)
    written: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", lambda self, name, tensor, real=Writer.write:
                      written.append(name) or real(self, name, tensor))
        write(tmp_path / "out", shard_size=shard_size)
    whole = after >= TOTAL + 32 and shard_size != TWO  # and has its name: it is written anew
    assert len(written) == (3 if whole else sum(after < end for end in (24, 324, 352)))
    files = {folder: {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}
             for folder in ("calm", "out")}
    assert files["calm"] == files["out"] and (INDEX in files["out"]) == (shard_size == TWO)


def test_a_file_made_by_the_writer_loads_in_transformers_as_before(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=2))
    tensors = model.state_dict()
    model.config.save_pretrained(tmp_path)
    headers = {name: Header(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with Writer(tmp_path, headers, shard_size=2000) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    again = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert len(told(tmp_path)) > 1 and all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "by": "another"}])
def test_what_another_library_has_written_gets_the_digest_and_keeps_its_tensors(tmp_path, metadata):
    file = tmp_path / "adapter_model.safetensors"
    save_file(TENSORS, file, metadata=metadata)
    digest = weights_digest(Checkpoint(tmp_path))
    stamp(Checkpoint(tmp_path))
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {**(metadata or {}), DIGEST: digest}
    assert weights_digest(Checkpoint(tmp_path)) == digest and list(tmp_path.iterdir()) == [file]
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(file).items())
    before = file.stat()
    stamp(Checkpoint(tmp_path))  # it has it already
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_another_machine_writes_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    synced: list[str] = []
    monkeypatch.setattr("os.fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    header = Header(torch.float32, (4,))
    with Writer(tmp_path, {"a": header, "b": header}, key="k") as writer:
        for name, layout in (("a", writer.layout), ("b", replace(writer.layout, synced=True))):
            with Stream(layout, name) as stream:
                stream.write(torch.zeros(4))
                writer.done({name: stream.close()})
            assert synced == [str(layout.part("model.safetensors"))] * (name == "b")
    assert len(Checkpoint(tmp_path)) == 2


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "adapter_model.safetensors"
    save_file(TENSORS, file)
    before = file.read_bytes()
    monkeypatch.setattr(glue.stamp.shutil, "copyfileobj", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(RunError, match="cannot be written to: No space"):
        stamp(Checkpoint(tmp_path))
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
