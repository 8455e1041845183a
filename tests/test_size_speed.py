"""What steps take at a size: real processes are measured here at a tiny one, and held against their plan."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # benchmarks is no part of the installed package
    sys.path.insert(0, str(ROOT))

from benchmarks.speed.__main__ import main  # noqa: E402
from benchmarks.speed.table import END, START  # noqa: E402


def test_what_processes_take_is_within_fifteen_percent_of_the_plan(tmp_path, capsys):
    file = tmp_path / "tiny.json"
    assert main(["size", "--shape", "tiny", "--rows", "extract", "--folder", str(tmp_path), "--json", str(file)]) == 0
    row = json.loads(file.read_text())["rows"]["extract"]
    assert row["private"] == pytest.approx(row["told"]["bytes_peak"], rel=0.15)
    head = 4096  # names and shapes of so few numbers are some of the file
    assert 0 <= row["products"] - row["told"]["bytes_written"] < head
    out = capsys.readouterr().out
    assert "| **extract** |" in out and "Two models of shape tiny" in out


def test_a_row_that_is_not_there_is_refused_with_the_nearest(tmp_path, capsys):
    assert main(["size", "--shape", "tiny", "--rows", "lineer", "--folder", str(tmp_path)]) == 2
    assert "did you mean 'linear'" in capsys.readouterr().err


def test_the_page_is_what_was_measured_and_all_of_it_is_within_the_aims():
    files = [ROOT / "benchmarks" / "speed" / "results" / f"{name}.json" for name in ("7b", "size-160m")]
    page = ROOT / "docs" / "size.md"
    assert START in page.read_text() and END in page.read_text()
    assert main(["table", *map(str, files), "--into", str(page), "--check"]) == 0
    large, small = (json.loads(file.read_text())["rows"] for file in files)
    assert all(row["private"] < 2e9 for row in large.values())
    for name, row in [*large.items(), *small.items()]:
        if told := row["told"]:
            assert told["bytes_peak"] == pytest.approx(row["private"], rel=0.15), name
            assert told["bytes_written"] == pytest.approx(row["products"], rel=0.01), name
