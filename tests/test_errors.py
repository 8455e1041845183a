"""Errors: what they carry, how they are worded, and that they survive the trip from a worker."""

from __future__ import annotations

import pickle

import pytest

from glue.errors import GlueError, MethodError, Mistakes, NotHere, Place, did_you_mean, one_line


def test_an_error_says_where_what_and_the_fix():
    error = GlueError("this is wrong", fix="do that", place=Place("a.yaml", 3, 7))
    assert str(error) == "a.yaml:3:7: this is wrong\n  do that"


def test_a_place_is_given_once():
    error = GlueError("x").at(Place("inner", 1, 1)).at(Place("outer", 2, 2))
    assert str(error) == "inner:1:1: x"


def test_mistakes_that_have_no_place_yet_get_one_each():
    both = Mistakes([GlueError("a"), GlueError("b", place=Place("f", 1, 1))]).at(Place("g", 2, 2))
    assert str(both) == "g:2:2: a\nf:1:1: b"


@pytest.mark.parametrize("error", [
    GlueError("a", fix="b", place=Place("f", 1, 2)), NotHere("a/b", "hf download a/b"),
    Mistakes([GlueError("a", place=Place("f", 1, 2)), MethodError("b", fix="c")])])
def test_an_error_survives_the_trip_from_a_worker(error):
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error) and str(back) == str(error) and back.place == error.place


def test_the_path_of_keys_survives_the_trip_too():
    error = MethodError("x")
    error.loc = ("merge", "ties", "density")
    assert pickle.loads(pickle.dumps(error)).loc == ("merge", "ties", "density")


def test_the_nearest_word_is_named_or_all_where_none_is_near():
    assert did_you_mean("densty", ["density", "weight"]) == "; did you mean 'density'?"
    assert did_you_mean("zzz", ["b", "a"]) == "; known: a, b"
    assert did_you_mean("x", []) == ""


def test_text_from_a_file_cannot_break_the_terminal():
    assert one_line("a\nb\x1b[31m") == "a\\nb\\x1b[31m"
    assert len(one_line("x" * 10**6)) == 300
