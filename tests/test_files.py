"""Files: whole lines whatever tore the last one, folders that are put aside and never lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glue.files import BLOCK, append_line, publish, whole_lines, write_aside


@given(kept=st.lists(st.text().filter(lambda line: "\n" not in line)),
       torn=st.binary().filter(lambda data: b"\n" not in data))
def test_a_torn_last_line_is_not_seen_and_is_cut_off_by_the_next(tmp_path_factory, kept, torn):
    file = tmp_path_factory.mktemp("torn") / "lines"
    for line in kept:
        append_line(file, line)
    with open(file, "ab") as stream:
        stream.write(torn)
    assert whole_lines(file) == kept
    append_line(file, "next")
    assert file.read_bytes() == "".join(f"{line}\n" for line in [*kept, "next"]).encode()


def test_a_line_may_hold_every_character_that_json_leaves_as_it_is(tmp_path):
    for text in ("a\u2028b", "a\x85b", "a\x0bb\x0cc\x1cd\re"):
        append_line(tmp_path / "f", text)
    assert whole_lines(tmp_path / "f") == ["a\u2028b", "a\x85b", "a\x0bb\x0cc\x1cd\re"]


@pytest.mark.parametrize("torn", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_a_torn_line_of_any_length_is_found_from_behind(tmp_path, torn):
    for start in (b"", b"first\n"):
        (tmp_path / "f").write_bytes(start + b"x" * torn)
        append_line(tmp_path / "f", "last")
        assert (tmp_path / "f").read_bytes() == start + b"last\n"


def test_appending_reads_only_the_end_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "f").write_bytes(b"x" * 99 + b"\n" + b"y" * (40 * BLOCK) + b"\n")
    read = []
    real = open

    def counting(path, mode="r", **more):
        stream = real(path, mode, **more)
        if "a" in mode:
            inner = stream.read
            stream = type("Counting", (), {"__getattr__": lambda self, name: getattr(inner.__self__, name),
                                           "__enter__": lambda self: self,
                                           "__exit__": lambda self, *_: inner.__self__.close(),
                                           "read": lambda self, n=-1: read.append(n) or inner(n)})()
        return stream

    monkeypatch.setattr("builtins.open", counting)
    append_line(tmp_path / "f", "z")
    assert read == [1]


def test_only_a_new_file_gets_a_heading(tmp_path):
    for line in "ab":
        append_line(tmp_path / "f", line, heading="# top")
    assert whole_lines(tmp_path / "f") == ["# top", "a", "b"]


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch):
    write_aside(tmp_path / "f", "old")
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_aside(tmp_path / "f", "new")
    assert [file.name for file in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "old"


def test_what_stood_where_a_folder_is_published_is_kept_under_another_name(tmp_path):
    final = tmp_path / "zoo" / "x"
    for k, expected in enumerate([None, "x.replaced-1", "x.replaced-2"]):
        draft = tmp_path / "draft"
        (draft / "inner").mkdir(parents=True)
        (draft / "inner" / "f").write_text(str(k))
        kept = publish(draft, final)
        assert (kept and kept.name) == expected and not draft.exists()
    found = {folder.name: (folder / "inner" / "f").read_text() for folder in final.parent.iterdir()}
    assert found == {"x": "2", "x.replaced-1": "0", "x.replaced-2": "1"}


def test_what_a_killed_process_was_writing_aside_is_not_published(tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    draft = tmp_path / "draft"
    (draft / "inner").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", killed)
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)
        for name in ("config.json", "inner/a.jsonl"):
            with pytest.raises(KeyboardInterrupt):
                write_aside(draft / name, "half")
    write_aside(draft / "whole.json", "whole")
    (draft / ".gitattributes").touch()
    (draft / ".v1.2.3").touch()
    assert len(list(draft.rglob("*.*"))) == 5
    publish(draft, tmp_path / "final")
    assert {file.name for file in (tmp_path / "final").rglob("*")} == {"whole.json", ".gitattributes", ".v1.2.3",
                                                                      "inner"}


def test_a_file_in_the_way_of_a_folder_is_kept_too(tmp_path):
    (tmp_path / "draft").mkdir()
    (tmp_path / "x").write_text("mine")
    assert publish(tmp_path / "draft", tmp_path / "x").read_text() == "mine" and (tmp_path / "x").is_dir()


def test_a_draft_that_is_gone_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "draft", tmp_path / "x")
