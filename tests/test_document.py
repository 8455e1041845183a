"""Documents: YAML as version 1.2 means it; what is hostile or doubtful is refused with its place."""

from __future__ import annotations

import math
import time

import pytest

from glue.document import SIZE_LIMIT, parse, read
from glue.errors import RecipeError


def value(text: str):
    return parse(text, "f.yaml", RecipeError).value


@pytest.mark.parametrize("text, expected", [
    ("1e-3", 0.001), ("1.5E+2", 150.0), (".5", 0.5), ("1.", 1.0), ("-7", -7), ("+7", 7), ("010", 10), ("0o17", 15),
    ("0x1F", 31), ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("y", "y"), ("true", True),
    ("FALSE", False),
    ("tRUE", "tRUE"), ("~", None), ("null", None), ("", None), ("Null", None), (".inf", math.inf), ("-.INF", -math.inf),
    ("+.Inf", math.inf), ("1_000", "1_000"), ("0b11", "0b11"), ("2001-01-01", "2001-01-01"), ("12:30:45", "12:30:45"),
    ("'1'", "1"), ('"true"', "true"), ("1e", "1e"), ("e5", "e5"), ("-", None), ("٣", "٣"), ("|\n  7", "7")])
def test_plain_words_mean_what_yaml_1_2_says(text, expected):
    found = value(f"a: {text}")["a"] if text != "-" else value("- \n")[0]
    assert found == expected and type(found) is type(expected)


def test_not_a_number_is_one_in_every_spelling():
    assert all(math.isnan(value(f"a: {word}")["a"]) for word in (".nan", ".NaN", ".NAN"))


@pytest.mark.parametrize("text, said", [
    ("k: 1\nk: 2", "f.yaml:2:1: 'k' stands twice"),
    ("a: {x: 1, 'x': 2}", "f.yaml:1:11: 'x' stands twice"),
    ("a: !!python/object/apply:os.system [ls]", "f.yaml:1:4: the tag !!python/object/apply:os.system is not allowed"),
    ("a: !!str 1", "f.yaml:1:4: the tag !!str is not allowed"),
    ("a: &n !!int 1", "f.yaml:1:4: the tag !!int is not allowed"),
    ("!mine {a: 1}", "f.yaml:1:1: the tag !mine is not allowed"),
    ("b: 1\na:\n  <<: {b: 1}", "f.yaml:3:3: a merge key '<<' is not read"),
    ("a: &x [1, *x]", "f.yaml:1:4: aliases or brackets here loop"),
    ("a: *x", "undefined alias"),
    ("a:\n\t- b", "f.yaml:2:1: this is not YAML"),
    ("a: 'b\nc: d", "f.yaml:2:"),
    ("a: [1, 2\nb: 3", "f.yaml:2:"),
    ("a: 1\n---\nb: 2", "but found another document"),
    ("? [a]\n: b", "a key must be a single word"),
    ("a: 'x\n  \0y'", "f.yaml:2:3: this is not YAML: the character #x0000"),
    ("a: " + "9" * 5000, "f.yaml:1:4: a number of 5000 digits is too long"),
    ("[" * 60 + "]" * 60, "loop or grow without end"),
    ("[" * 5000, "f.yaml:1:1: this is not YAML"),
    ('"a\\n\\e[31mb": 1\n"a\\n\\e[31mb": 2', "'a\\n\\x1b[31mb' stands twice")])
def test_what_is_hostile_or_doubtful_is_refused_with_its_place(text, said):
    with pytest.raises(RecipeError) as caught:
        value(text)
    assert said in str(caught.value) and str(caught.value).startswith("f.yaml:")
    assert len(str(caught.value).splitlines()) <= 3


def test_a_billion_laughs_are_stopped_at_once():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 12)]
    began = time.monotonic()
    with pytest.raises(RecipeError, match="grow without end"):
        value("\n".join(lines))
    assert time.monotonic() - began < 5


def test_every_key_knows_its_line_and_column_also_behind_an_alias():
    doc = parse("seed: 0\nsteps:\n  - {as: x,\n     inner: &i {deep: 1}}\n  - as: y\n    inner: *i\n", "f", RecipeError)
    assert [doc.place(*path)[1:] for path in (("seed",), ("steps", 0, "as"), ("steps", 0, "inner"), ("steps", 1, "as"),
                                              ("steps", 1, "inner"))] == [(1, 1), (3, 6), (4, 6), (5, 5), (6, 5)]
    assert doc.place("steps", 0, "nothing")[1:] == (3, 5) and doc.place("steps", 0, "inner", "deep")[1:] == (4, 17)
    assert doc.value["steps"][1]["inner"] == {"deep": 1}


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "f.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    doc = read(tmp_path / "f.yaml", RecipeError)
    assert doc.value == {"a": 1, "b": 2} and doc.place("a")[1:] == (1, 1)


def test_bytes_that_are_not_utf8_are_pointed_at(tmp_path):
    (tmp_path / "f.yaml").write_bytes("a: 1\nb: café\n".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"f.yaml:2:7: this is not UTF-8 text \(byte 0xe9\)"):
        read(tmp_path / "f.yaml", RecipeError)


def test_a_file_that_cannot_be_read_is_one_short_error(tmp_path):
    (tmp_path / "big.yaml").write_bytes(b"#" * (SIZE_LIMIT + 1))
    for path, said in ((tmp_path / "no.yaml", "there is no file"), (tmp_path, "is a folder"),
                       (tmp_path / ("x" * 5000), "there is no file|cannot be read"),
                       (tmp_path / "big.yaml", "is larger than"), (tmp_path / "a\0b", "a\\x00b")):
        with pytest.raises(RecipeError, match=said.replace("\\", "\\\\")):
            read(path, RecipeError)


def test_an_empty_file_is_nothing(tmp_path):
    (tmp_path / "f.yaml").write_text("# only a comment\n")
    assert read(tmp_path / "f.yaml", RecipeError).value is None
