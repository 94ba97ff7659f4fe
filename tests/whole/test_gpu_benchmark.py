"""`benchmarks.gpu` works on the day when there is a GPU: here a CPU stands in for it."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.gpu.__main__ import parse, run
from benchmarks.gpu.report import Figures, Report

SECTIONS = {"info", "parity", "waits", "blocks", "speed"}


def test_every_section(tmp_path: Path) -> None:
    assert run(parse(["--device", "cpu", "--tiny", "--out", str(tmp_path)])).failures == []
    table = (tmp_path / "table.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (.+) \| (.+) \|$", table, re.M)
    assert {section for section, _, _ in rows} == SECTIONS | {"section"}
    assert "skipped" not in table
    assert "llama float32 | logits off by 0; equal tokens 1; loss 0; worst gradient 0" in table
    assert json.loads((tmp_path / "results.json").read_text()).keys() == SECTIONS


def test_a_run_that_is_cut_off_loses_nothing(tmp_path: Path) -> None:
    report = Report(tmp_path, "Title:", budget=60)

    def fails() -> Figures:
        report.put("blocks", "one", {"ms": 1.25})
        raise RuntimeError("no kernel | for\nthis card")

    report.attempt("blocks", "one", fails)
    report.attempt("blocks", "too long", lambda: {"never": 1}, needs=61)
    report.attempt("blocks", "two", lambda: {"ms": 2345.6})
    assert report.failures == ["blocks: one: RuntimeError: no kernel | for\nthis card"]
    assert (tmp_path / "table.md").read_text().splitlines() == [
        "Title:",
        "",
        "| section | what | figures |",
        "|---|---|---|",
        "| blocks | one | ms 1.25; FAILED RuntimeError: no kernel / for this card |",
        "| blocks | too long | skipped 60 s were left, it takes about 61 |",
        "| blocks | two | ms 2,346 |",
    ]
    assert json.loads((tmp_path / "results.json").read_text())["blocks"]["one"]["ms"] == 1.25


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["--sections", "info,speeed"])
    assert "no section speeed; there are info, parity, waits, blocks, speed" in capsys.readouterr().err
